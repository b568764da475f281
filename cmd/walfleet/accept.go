package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/control"
	"github.com/walfleet/walfleet/receiver"
)

func newAcceptGapCommand(g *globals) *cobra.Command {
	return decisionCommand(g, receiver.AcceptGap, "Write a gap down and go on behind it",
		`accept-gap tells the running daemon that the WAL which a halted cluster waits for
is lost: the server does not have it any more. The gap is written down in the
cluster's archive.json, and the archive goes on behind it. No recovery can pass a
gap, so take a base backup at once.

The cluster's reason ("not archiving" in the log) names what is missing.`)
}

func newAcceptDivergenceCommand(g *globals) *cobra.Command {
	return decisionCommand(g, receiver.AcceptDivergence, "Go on with a server whose WAL is not the archive's",
		`accept-divergence tells the running daemon that a cluster, halted because the
server's WAL differs from the archive's, is to go on with the server's. What the
archive has from the start of that segment on is kept beside it under names that
end in ".diverged", which archive.json lists; the segment is received again.
A recovery from an older base backup can use either, never both: take a base
backup at once.

Make sure first that this is the right server, and not an old primary that still
runs or one that was restored.`)
}

func decisionCommand(g *globals, what receiver.Decision, short, long string) *cobra.Command {
	return &cobra.Command{
		Use:   string(what) + " CLUSTER",
		Short: short,
		Long:  long,
		Args: func(cmd *cobra.Command, args []string) error {
			if len(args) != 1 {
				return &usageError{fmt.Errorf("%s takes one argument, the cluster's name", cmd.Name())}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			cfg, err := fleet.Load(g.configFile)
			if err != nil {
				return err
			}
			done, err := control.Decide(cmd.Context(), cfg.RuntimeDir, args[0], what)
			if err != nil {
				return err
			}
			fmt.Fprintln(cmd.OutOrStdout(), done)
			return nil
		},
	}
}
