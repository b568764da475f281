package main

import (
	"context"
	"errors"
	"fmt"
	"strings"

	"github.com/spf13/cobra"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/control"
)

func newStatusCommand(g *globals) *cobra.Command {
	var asJSON, watched bool
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

With --watch it fills the terminal and is drawn anew every second, with what was
received in the last 15 minutes beside it, until q or Ctrl-C. The arrows, PgUp, PgDn,
Home and End scroll. When the daemon stops answering, what it said last stays, and
goes on when it is back. NO_COLOR in the environment turns colours off.

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
			if watched && asJSON {
				return &usageError{errors.New("--watch and --json exclude each other: run status --json as often as it is wanted")}
			}
			cluster := strings.Join(args, "") // one at most
			read := func(ctx context.Context) (fleet.Report, error) {
				report, err := readStatus(ctx, g.configFile, cluster)
				if err == nil && cluster != "" {
					var ok bool
					if report, ok = report.Cluster(cluster); !ok {
						return report, fmt.Errorf("there is no cluster %q", cluster)
					}
				}
				return report, err
			}
			if watched {
				return watch(cmd, read, cluster != "")
			}
			report, err := read(cmd.Context())
			if err != nil {
				return err
			}
			if report.Daemon == nil || cluster != "" { // whose directory a daemon may have looked into a minute ago
				report = report.Peek(cmd.Context())
			}
			switch {
			case asJSON:
				err = printJSON(cmd, report)
			case cluster != "":
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
	cmd.Flags().BoolVar(&watched, "watch", false, "fill the terminal with it, and draw it anew every second")
	return cmd
}

// readStatus asks the daemon of a configuration file how its clusters are, or the one of a
// name. When none answers, the report has
// what the file says. A file that has become invalid is no obstacle while the daemon
// runs with what it was before.
func readStatus(ctx context.Context, file, cluster string) (fleet.Report, error) {
	cfg, invalid := fleet.Load(file)
	if invalid != nil {
		if dir := fleet.Locate(file); dir != "" {
			if report, err := control.Status(ctx, dir, cluster); err == nil {
				return report, nil
			}
		}
		return fleet.Report{}, invalid
	}
	report, err := control.Status(ctx, cfg.RuntimeDir, cluster)
	if err != nil {
		report = fleet.Configured(cfg, err)
	}
	return report, nil
}
