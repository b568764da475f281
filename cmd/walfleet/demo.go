package main

import (
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/walfleet/walfleet/internal/demo"
)

func newDemoCommand() *cobra.Command {
	var o demo.Options
	cmd := &cobra.Command{
		Use:   "demo",
		Short: "Archive two throwaway primaries, kill one, and compare every byte",
		Long: `demo starts two throwaway PostgreSQL primaries on loopback, one with 16 MB
segments and one with 1 GB segments as PolarDB has, writes to both, archives
both, kills one with SIGKILL and starts it again, and then compares every
archived segment with the server's own, byte for byte. It takes less than a
minute and cleans up after itself. The exit status is 0 only if all was equal.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// A second signal does not end the clean-up, which is short.
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			o.Out = cmd.OutOrStdout()
			return demo.Run(ctx, o)
		},
	}
	cmd.Flags().StringVar(&o.Dir, "dir", "", "where the demo makes its own directory (default: a temporary one)")
	cmd.Flags().StringVar(&o.Image, "image", "", "run the servers in containers of this image, not from installed binaries")
	cmd.Flags().BoolVar(&o.Keep, "keep", false, "keep the demo's directory: archive, configuration, log")
	cmd.Flags().BoolVar(&o.Verbose, "verbose", false, "show the daemon's log instead of a moving table")
	return cmd
}
