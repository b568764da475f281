// Command walfleet archives the write-ahead log of many PostgreSQL and PolarDB
// clusters as it is written. See README.md.
package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/walfleet/walfleet/internal/receivewal"
)

func main() {
	if filepath.Base(os.Args[0]) == "pg_receivewal" {
		os.Exit(receivewal.Main(os.Args[1:], version(), receivewal.Streams{In: os.Stdin, Out: os.Stdout, Err: os.Stderr}))
	}
	root := newRoot()
	cmd, err := root.ExecuteContextC(context.Background())
	if err == nil {
		return
	}
	var status exitStatus
	if errors.As(err, &status) {
		os.Exit(int(status))
	}
	if failedRestore(cmd, os.Args[1:]) {
		fmt.Fprintln(os.Stderr, "walfleet:", oneLine(err.Error()))
		os.Exit(int(restoreFailed))
	}
	fmt.Fprintln(os.Stderr, "walfleet:", err)
	var usage *usageError
	if errors.As(err, &usage) {
		fmt.Fprintln(os.Stderr, "Try \"walfleet --help\".")
		os.Exit(2)
	}
	os.Exit(1)
}

// usageError is a command line that makes no sense: exit status 2.
type usageError struct{ err error }

func (e *usageError) Error() string { return e.err.Error() }
func (e *usageError) Unwrap() error { return e.err }

const defaultConfigFile = "/etc/walfleet/walfleet.toml"

// globals are the flags that every command has.
type globals struct{ configFile string }

func newRoot() *cobra.Command {
	g := &globals{configFile: os.Getenv("WALFLEET_CONFIG")}
	if g.configFile == "" {
		g.configFile = defaultConfigFile
	}
	root := &cobra.Command{
		Use:   "walfleet",
		Short: "Archive the WAL of many PostgreSQL and PolarDB clusters as it is written",
		Long: `walfleet archives the write-ahead log (WAL) of many PostgreSQL and PolarDB
clusters as it is written. One daemon reads one TOML file; every cluster gets
its own supervised receiver on a physical replication slot, and its own
directory, in pg_receivewal's layout. WAL is acknowledged only once it is
synced to disk.

First steps:
  walfleet demo                       see it archive two throwaway primaries
  walfleet check -c walfleet.toml     test what archiving the clusters of a file takes
  walfleet run -c walfleet.toml       archive them
  walfleet status                     how the clusters are
  walfleet reload                     read the file again; unchanged clusters are not touched
  walfleet verify                     check every byte of the archives

A smallest file:
  archive_dir = "/var/lib/walfleet"

  [[cluster]]
  name     = "orders"
  conninfo = "host=db1,db2 user=walfleet sslmode=verify-full"

The role needs REPLICATION, and pg_hba.conf a line such as
  hostssl replication walfleet ARCHIVE_HOST/32 scram-sha-256`,
		SilenceErrors:              true,
		SuggestionsMinimumDistance: 2,
		SilenceUsage:               true,
		Args:                       cobra.ArbitraryArgs,
		RunE: func(cmd *cobra.Command, args []string) error {
			if len(args) == 0 {
				return cmd.Help()
			}
			text := fmt.Sprintf("unknown command %q", args[0])
			if near := cmd.SuggestionsFor(args[0]); len(near) > 0 {
				text += fmt.Sprintf("; did you mean %q?", near[0])
			}
			return &usageError{errors.New(text)}
		},
	}
	root.PersistentFlags().StringVarP(&g.configFile, "config", "c", g.configFile, "configuration file (environment: WALFLEET_CONFIG)")
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return &usageError{err} })
	root.AddCommand(newRunCommand(g), newCheckCommand(g), newStatusCommand(g), newReloadCommand(g), newAcceptGapCommand(g), newAcceptDivergenceCommand(g),
		newListCommand(g), newVerifyCommand(g), newRestoreWALCommand(g), newDrillCommand(g), newPruneCommand(g),
		newReceivewalCommand(), newDemoCommand(), newVersionCommand())
	return root
}

// noArgs refuses arguments as a usage error.
func noArgs(cmd *cobra.Command, args []string) error {
	if len(args) == 0 {
		return nil
	}
	return &usageError{fmt.Errorf("%s takes no argument, got %q", cmd.Name(), args[0])}
}
