package main

import (
	"os"

	"github.com/spf13/cobra"

	"github.com/walfleet/walfleet/internal/receivewal"
)

func newReceivewalCommand() *cobra.Command {
	return &cobra.Command{
		Use:                "receivewal [OPTION]...",
		Short:              "Archive one cluster, with pg_receivewal's options, messages and exit statuses",
		DisableFlagParsing: true, // -c, --config and -h mean nothing here, or something else
		RunE: func(_ *cobra.Command, args []string) error {
			if status := receivewalMain(args); status != 0 {
				return exitStatus(status)
			}
			return nil
		},
	}
}

func receivewalMain(args []string) int {
	return receivewal.Main(args, version(), receivewal.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr})
}

// exitStatus is the failure of a command that has said what failed.
type exitStatus int

func (exitStatus) Error() string { return "failed" }
