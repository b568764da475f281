package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/control"
)

func newStatusCommand(g *globals) *cobra.Command {
	var asJSON bool
	cmd := &cobra.Command{
		Use:   "status [CLUSTER]",
		Short: "Show how the clusters are",
		Long: `status asks the running daemon, and shows a line for each cluster, those in trouble
first; with a cluster's name it shows everything that is known about that one.
Nothing is asked of any server.

  TLI       timeline
  FLUSHED   end of the WAL that is synced and acknowledged
  LAG       WAL that the server had when it last spoke, and the archive has not
  BEHIND    how old the WAL can be that the archive lacks
  RATE      received lately, a second
  FREE      left on the archive's file system
  SINCE     how long it has been in that state

When no daemon answers, that is said, and what each archive's directory tells by
itself is shown; the exit status is 1 then. It is 0 however the clusters are: see
"walfleet check" for that.`,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) > 1 {
				return &usageError{fmt.Errorf("%s takes one argument at most, a cluster's name", cmd.Name())}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			report, err := readStatus(cmd.Context(), g.configFile)
			if err != nil {
				return err
			}
			if len(args) > 0 {
				var ok bool
				if report, ok = report.Cluster(args[0]); !ok {
					return fmt.Errorf("there is no cluster %q", args[0])
				}
			}
			if report.Daemon == nil || len(args) > 0 {
				report = report.Peek(cmd.Context())
			}
			switch {
			case asJSON:
				err = printJSON(cmd, report)
			case len(args) > 0:
				err = report.WriteDetails(cmd.OutOrStdout())
			default:
				err = report.WriteTable(cmd.OutOrStdout())
			}
			if err == nil && report.Daemon == nil {
				return exitStatus(1) // the report says why
			}
			return err
		},
	}
	cmd.Flags().BoolVar(&asJSON, "json", false, "print the status as JSON")
	return cmd
}

// readStatus asks the daemon of a configuration file. When none answers, the report has
// what the file says. A file that has become invalid is no obstacle while the daemon
// runs with what it was before.
func readStatus(ctx context.Context, file string) (fleet.Report, error) {
	cfg, invalid := fleet.Load(file)
	if invalid != nil {
		if dir := fleet.Locate(file); dir != "" {
			if report, err := control.Status(ctx, dir); err == nil {
				return report, nil
			}
		}
		return fleet.Report{}, invalid
	}
	report, err := control.Status(ctx, cfg.RuntimeDir)
	if err != nil {
		report = fleet.Configured(cfg, err)
	}
	return report, nil
}
