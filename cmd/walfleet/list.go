package main

import (
	"errors"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/receiver"
)

func newListCommand(g *globals) *cobra.Command {
	var asJSON bool
	var dir string
	cmd := &cobra.Command{
		Use:   "list CLUSTER | --archive DIR",
		Short: "Show what an archive holds, and what can be recovered from it",
		Long: `list looks into a cluster's archive, and asks neither a server nor the daemon:
the timelines as a tree, with the WAL of each that is there without a hole; what is
missing, by a gap that was recorded or for no known reason; and what can be
recovered: with a base backup that begins at BACKUP FROM or later, everything UP TO
that position, which is the end of the complete segments, and what the partial
segments have on top.

Times are those of commits and aborts, in UTC, read from the first and the last
segments. "-": there is none in about 64 MB of WAL.

With --archive it takes the directory of an archive, one of pg_receivewal too, and
needs no configuration.`,
		Example: `  walfleet list orders
  walfleet list --archive /mnt/copy/orders --json`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 || (len(args) == 1) == (dir != "") {
				return &usageError{errors.New("list takes a cluster's name, or --archive DIR")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			name := ""
			if dir == "" {
				name = args[0]
				c, err := clusterOf(g.configFile, name)
				if err != nil {
					return err
				}
				dir = c.Dir
			}
			contents, err := fleet.ReadContents(cmd.Context(), name, dir)
			if err != nil {
				return err
			}
			if asJSON {
				return printJSON(cmd, contents)
			}
			return contents.Write(cmd.OutOrStdout())
		},
	}
	cmd.Flags().StringVar(&dir, "archive", "", "the archive's directory, instead of a cluster of the configuration")
	cmd.Flags().BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// clusterOf is a cluster of a configuration file.
func clusterOf(file, name string) (receiver.Config, error) {
	cfg, err := fleet.Load(file)
	if err != nil {
		return receiver.Config{}, err
	}
	return clusterIn(cfg, file, name)
}

// clusterIn is a cluster of a configuration, which was read from file.
func clusterIn(cfg *fleet.Config, file, name string) (receiver.Config, error) {
	for _, c := range cfg.Clusters {
		if c.Name == name {
			return c, nil
		}
	}
	return receiver.Config{}, fmt.Errorf("there is no cluster %q in %s", name, file)
}
