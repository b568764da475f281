package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/check"
	"github.com/walfleet/walfleet/internal/control"
)

func newCheckCommand(g *globals) *cobra.Command {
	var asJSON, nagios, diff bool
	cmd := &cobra.Command{
		Use:   "check [CLUSTER...]",
		Short: "Test everything that archiving a cluster depends on, with hints",
		Long: `check asks the servers of the configuration file's clusters, or of those that are
named, and looks at their archives' directories. Each test is OK, WARNING (it
works, but for something) or FAILED, with what to do. It changes nothing, on
neither side: it can be used for a file before the daemon gets it, and while the
daemon runs. Run it as the user that runs the daemon.

Exit status: 0 when nothing failed, 1 when something did, 2 for a command line
that makes no sense. With --nagios: 0, 1, 2 and 3 for OK, WARNING, CRITICAL and
UNKNOWN, after one line with performance data.

With --diff no server is asked: the file is sent to the running daemon, which
says what a reload of it would start, stop, restart, adjust and keep.`,
		Example: `  walfleet check                           every cluster of the file
  walfleet check orders -c new.toml        one, in a file that is not live yet
  walfleet check -c new.toml --diff        what a reload of new.toml would do`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case asJSON && nagios:
				return &usageError{errors.New("--json and --nagios exclude each other")}
			case diff && (nagios || len(args) > 0):
				return &usageError{errors.New("--diff is about the whole file: it takes no cluster, and no --nagios")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			out := cmd.OutOrStdout()
			if diff {
				return preview(cmd, g.configFile, asJSON)
			}
			report, err := runCheck(cmd.Context(), g.configFile, args)
			switch {
			case nagios && err != nil:
				fmt.Fprintln(out, "WALFLEET UNKNOWN -", check.OneLine(err.Error()))
				return exitStatus(check.NagiosUnknown)
			case err != nil:
				return err
			case nagios:
				line, status := report.Nagios()
				if _, err := fmt.Fprintln(out, line); err != nil || status != 0 {
					return errors.Join(exitStatus(status), err)
				}
				return nil
			case asJSON:
				err = printJSON(cmd, report)
			default:
				err = report.Print(out)
			}
			if err == nil && report.Level == check.Failed {
				return exitStatus(1)
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	cmd.Flags().BoolVar(&nagios, "nagios", false, "print one line, and exit, as a Nagios plugin does")
	cmd.Flags().BoolVar(&diff, "diff", false, "print what a reload of the file would do to the running daemon")
	return cmd
}

func runCheck(ctx context.Context, file string, clusters []string) (check.Report, error) {
	cfg, err := fleet.Load(file)
	if err != nil {
		return check.Report{}, err
	}
	return check.Run(ctx, cfg, check.Options{Clusters: clusters})
}

// preview prints what a reload of the file would do to the running daemon.
func preview(cmd *cobra.Command, file string, asJSON bool) error {
	file, err := filepath.Abs(file)
	if err != nil {
		return err
	}
	cfg, err := fleet.Load(file) // which knows the runtime directory
	if err != nil {
		return err
	}
	content, err := os.ReadFile(file)
	if err != nil {
		return fmt.Errorf("configuration file: %w", err)
	}
	out, err := control.Preview(cmd.Context(), cfg.RuntimeDir, file, content)
	if err != nil {
		return err
	}
	if asJSON {
		err = printJSON(cmd, out)
	} else {
		err = out.WritePreview(cmd.OutOrStdout())
	}
	if err == nil && out.Error != "" {
		return exitStatus(1)
	}
	return err
}
