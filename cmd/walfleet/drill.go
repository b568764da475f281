package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/restore"
)

func newDrillCommand(g *globals) *cobra.Command {
	var (
		o       restore.DrillOptions
		to      string
		timeout time.Duration
		asJSON  bool
	)
	cmd := &cobra.Command{
		Use:   "drill {CLUSTER | --archive DIR} --backup DIR|TAR",
		Short: "Rehearse a recovery from a base backup and the archive",
		Long: `drill copies a base backup into a directory of its own, starts a throwaway server
on the copy, lets it recover with "walfleet restore-wal" from the archive alone, to the
archive's end or to a target, looks into each database, reports, and removes
everything. It fails when recovery ends early, and shows what the server said. What
it came to is kept in the directory of a cluster of the file, for status and metrics.

The backup is a directory that pg_basebackup made, plain or with base.tar (.gz, .lz4,
.zst), or such a tar file. Its configuration is not used, and of its WAL nothing: the
server contacts nobody, and listens on a Unix socket in the drill's directory alone.
The PostgreSQL of the backup's major version must be installed here, and there must
be room for a copy of the backup and of what changes in it. When root runs the drill,
the archive's owner runs the server.

WAL that creates a tablespace names its directory. Where the report does not say
"confined" (Linux 5.19 and later can do that), do not run a drill on a machine that has
such a directory of the cluster itself.`,
		Example: `  walfleet drill orders --backup /backup/orders/monday
  walfleet drill --archive /wal/orders --backup base.tar.gz --to "2026-01-31 10:00:00+01"`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) > 1:
				return &usageError{fmt.Errorf("%s takes one argument, the cluster's name", cmd.Name())}
			case (len(args) == 1) == (o.Archive != ""):
				return &usageError{errors.New("drill takes a cluster's name, or --archive with its archive's directory")}
			case o.Backup == "":
				return &usageError{errors.New("drill needs --backup")}
			}
			var err error
			if o.To, err = restore.ParseTarget(to); err != nil {
				return &usageError{fmt.Errorf("--to: %w", err)}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) (err error) {
			if len(args) == 1 {
				if o.Archive, err = clusterDir(g.configFile, args[0]); err != nil {
					return err
				}
			}
			if o.Archive, err = filepath.Abs(o.Archive); err != nil {
				return err
			}
			if o.Program, err = os.Executable(); err != nil {
				return fmt.Errorf("where walfleet itself is, for restore_command: %w", err)
			}
			if term.IsTerminal(int(os.Stderr.Fd())) {
				o.Progress = func(text string) { fmt.Fprintln(os.Stderr, text) }
			}
			ctx, stop := untilToldToEnd(cmd.Context())
			defer stop()
			ctx, cancel := context.WithTimeoutCause(ctx, timeout, fmt.Errorf("not done after %s (--timeout)", timeout))
			defer cancel()
			report, drillErr := restore.Drill(ctx, o)
			if len(args) == 1 {
				if err := recordDrill(o.Archive, report); err != nil {
					fmt.Fprintf(cmd.ErrOrStderr(), "walfleet status and metrics will not show this drill of %s: %v\n", args[0], err)
				}
			}
			if asJSON {
				err = printJSON(cmd, report)
			} else {
				err = report.Write(cmd.OutOrStdout())
			}
			if err == nil && drillErr != nil {
				return exitStatus(1) // the report says why
			}
			return err
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&o.Archive, "archive", "", "the archive's directory, without a configuration")
	flags.StringVar(&o.Backup, "backup", "", "the base backup")
	flags.StringVar(&to, "to", "", "recover to this time or position (default: the archive's end)")
	flags.StringVar(&o.User, "user", "postgres", "a superuser of the cluster")
	flags.StringVar(&o.Work, "work", "", "where the drill makes a directory of its own (default: TMPDIR, or /var/tmp)")
	flags.DurationVar(&timeout, "timeout", 24*time.Hour, "give up after this time")
	flags.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// recordDrill keeps what a drill came to, for status and metrics.
func recordDrill(dir string, r restore.DrillReport) error {
	return fleet.DrillReport{Time: time.Now().UTC(), Seconds: r.Seconds, OK: r.OK, Error: r.Error, Backup: r.Backup,
		RecoveredLSN: r.RecoveredLSN, Timeline: r.Timeline, LastCommit: r.LastCommit}.Record(dir)
}

// untilToldToEnd ends with every signal that would end the process without its cleaning
// up, the loss of its terminal or of whoever reads its output included.
func untilToldToEnd(ctx context.Context) (context.Context, context.CancelFunc) {
	signals := []os.Signal{syscall.SIGINT, syscall.SIGTERM, syscall.SIGPIPE}
	if !signal.Ignored(syscall.SIGHUP) { // as by nohup
		signals = append(signals, syscall.SIGHUP)
	}
	return signal.NotifyContext(ctx, signals...)
}
