package main

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/control"
)

func newReloadCommand(g *globals) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "reload",
		Short: "Make the running daemon read the configuration file again",
		Long: `reload checks the whole configuration file, asks the running daemon to follow it,
waits, and prints what was done: which clusters were started, stopped, restarted,
adjusted and kept. A kept cluster is not touched, and an adjusted one keeps its
connection. When anything in the file is wrong, nothing changes and the daemon is not
asked. A cluster that does not stop within shutdown_timeout is named; what replaces it
is started when it has stopped.

The exit status is 0 only if everything was done. SIGHUP does the same without
waiting for it.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			cfg, err := fleet.Load(g.configFile)
			if err != nil {
				return fmt.Errorf("the file is not valid, nothing changed:\n%w", err)
			}
			file, err := filepath.Abs(g.configFile)
			if err != nil {
				return err
			}
			// Another reload may be under way.
			out, err := control.Reload(cmd.Context(), cfg.RuntimeDir, file, 2*cfg.ShutdownTimeout+time.Minute)
			if err != nil {
				return err
			}
			if asJSON {
				err = printJSON(cmd, out)
			} else {
				err = out.Write(cmd.OutOrStdout())
			}
			if err == nil && out.Error != "" {
				return exitStatus(1) // the outcome says it all
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the outcome as JSON")
	return cmd
}

// printJSON prints a value for programs.
func printJSON(cmd *cobra.Command, value any) error {
	e := json.NewEncoder(cmd.OutOrStdout())
	e.SetIndent("", "  ")
	e.SetEscapeHTML(false)
	return e.Encode(value)
}
