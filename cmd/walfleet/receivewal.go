package main

import (
	"github.com/spf13/cobra"

	"github.com/walfleet/walfleet/internal/receivewal"
)

func newReceivewalCommand() *cobra.Command {
	return &cobra.Command{
		Use:                "receivewal [OPTION]...",
		Short:              "Archive one cluster, with pg_receivewal's options, messages and exit statuses",
		DisableFlagParsing: true, // -c, --config and -h mean nothing here, or something else
		RunE: func(cmd *cobra.Command, args []string) error {
			std := receivewal.Streams{In: cmd.InOrStdin(), Out: cmd.OutOrStdout(), Err: cmd.ErrOrStderr()}
			if status := receivewal.Main(args, version(), std); status != 0 {
				return exitStatus(status)
			}
			return nil
		},
	}
}

// exitStatus is the failure of a command that has said what failed.
type exitStatus int

func (exitStatus) Error() string { return "failed" }
