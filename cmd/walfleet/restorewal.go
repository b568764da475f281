package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime/debug"
	"strings"
	"syscall"

	"github.com/spf13/cobra"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/restore"
)

const restoreName = "restore-wal"

// restoreFailed is the exit status of restore-wal for everything but "found" and
// "not in the archive". PostgreSQL ends recovery, and opens for writing, after any
// status up to 125, takes 126 and 127 for a shell's, and 143 for its own shutdown
// (RestoreArchivedFile in xlogarchive.c, wait_result_is_any_signal in
// wait_error.c). It is none of those of signals either.
const restoreFailed exitStatus = 200

func newRestoreWALCommand(g *globals) *cobra.Command {
	var r restore.Request
	var ahead bool
	cmd := &cobra.Command{
		Use:   restoreName + " CLUSTER %f %p | " + restoreName + " --archive DIR %f %p",
		Short: "Give a server in recovery a file of its archive (restore_command)",
		Long: `restore-wal is for postgresql.conf, with the path to walfleet in front:

  restore_command = 'walfleet restore-wal orders "%f" "%p"'

or, where there is no configuration file, with the archive's directory:

  restore_command = 'walfleet restore-wal --archive /var/lib/walfleet/orders "%f" "%p"'

It finds segments, compressed or not, and timelines' histories; it needs no
daemon, and changes nothing in the archive. What it restores is whole, and was
checked to be that segment of that cluster.

The next segments are made ready by a process beside, while the server replays
what it has (--prefetch), in a directory of its pg_wal that servers, pg_basebackup
and pg_rewind leave alone.

With --partial a segment that is not complete will do, where the server has not
more of it itself: the last seconds before a primary was lost. It is for a
recovery that is to end there, not for a standby.

Exit status: 0 when the file was restored, 1 when the archive does not have it and
recovery may go on without, 200 for everything else: an archive that is not
mounted, damage, a full disk, WAL that is missing although there is later WAL. Then
the server stops, instead of opening in the middle of its WAL. That is so for a
standby as well.`,
		Args: func(_ *cobra.Command, args []string) error {
			want, what := 3, "a cluster's name, %f and %p"
			if r.Archive != "" {
				want, what = 2, "%f and %p, for --archive names the archive"
			}
			if len(args) != want {
				return &usageError{fmt.Errorf("%s takes %s; got %q", restoreName, what, args)}
			}
			if r.Prefetch < 0 {
				return &usageError{errors.New("--prefetch is 0 or more")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			if ahead {
				r.Name, r.Path = args[0], args[1]
				makeAhead(cmd.Context(), r)
				return nil
			}
			dieLoudly()
			who := r.Archive
			if who == "" {
				who = args[0]
				dir, err := clusterDir(g.configFile, who)
				if err != nil {
					return err
				}
				r.Archive, args = dir, args[1:]
			}
			r.Name, r.Path = args[0], args[1]
			err := restore.Run(cmd.Context(), r)
			var none *restore.NotFoundError
			switch {
			case errors.As(err, &none):
				if none.Hint != "" {
					fmt.Fprintf(cmd.ErrOrStderr(), "walfleet: %s %s %s: %s\n", restoreName, who, r.Name, oneLine(none.Hint))
				}
				return exitStatus(1)
			case err != nil:
				return fmt.Errorf("%s %s %q: %w", restoreName, who, r.Name, err)
			}
			if r.More() {
				startAhead(r)
			}
			return nil
		},
	}
	cmd.Flags().StringVar(&r.Archive, "archive", "", "the archive's directory, instead of a cluster of the configuration file")
	cmd.Flags().BoolVar(&r.Partial, "partial", false, "restore what a segment has that is not complete, where the server has not more")
	cmd.Flags().IntVar(&r.Prefetch, "prefetch", 4, "how many of the next segments to make ready beside, in pg_wal; 0: none")
	cmd.Flags().BoolVar(&ahead, aheadFlag, false, "make the next segments ready")
	if err := cmd.Flags().MarkHidden(aheadFlag); err != nil {
		panic(err)
	}
	return cmd
}

const aheadFlag = "ahead"

// startAhead starts a process that makes the next segments ready. It is in a session
// of its own, with nothing of the server's open. Whether it can be started does not
// matter.
func startAhead(r restore.Request) {
	program, err := os.Executable()
	if err != nil {
		return
	}
	cmd := exec.Command(program, restoreName, "--"+aheadFlag, fmt.Sprintf("--prefetch=%d", r.Prefetch), "--archive", r.Archive, "--", r.Name, r.Path)
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if cmd.Start() == nil {
		_ = cmd.Process.Release()
	}
}

// makeAhead is what that process does. It ends with exit status 0, whatever comes:
// where the server is the first process of a container, what has lost its parent
// becomes its child, and it takes one that fails for a backend of its own that
// crashed (CleanupBackend in postmaster.c).
func makeAhead(ctx context.Context, r restore.Request) {
	ctx, stop := signal.NotifyContext(ctx, syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT)
	defer stop()
	_ = restore.Ahead(ctx, r) // whoever asks for the segment finds out, and says so
}

// clusterDir is the archive's directory of a cluster of the configuration file.
func clusterDir(file, name string) (string, error) {
	cfg, err := fleet.Load(file)
	if err != nil {
		return "", err
	}
	for _, c := range cfg.Clusters {
		if c.Name == name {
			return c.Dir, nil
		}
	}
	return "", fmt.Errorf("there is no cluster %q in %s", name, file)
}

// dieLoudly makes sure that no end of this process is taken for the end of all WAL.
// What the runtime would end with exit status 2, panics, want of memory, and signals
// that print stacks, it ends by a signal then, which a server stops for. SIGTERM
// stays as it is: the server sends it when it shuts down, and takes a death by it for
// that. SIGQUIT it sends when it has to end at once, and may miss itself as long as
// it waits for us.
func dieLoudly() {
	debug.SetTraceback("crash")
	quit := make(chan os.Signal, 1)
	signal.Notify(quit, syscall.SIGQUIT, syscall.SIGABRT)
	go func() {
		os.Exit(128 + int((<-quit).(syscall.Signal)))
	}()
}

// failedRestore tells whether a command line, of which cmd was made out, was meant
// for restore-wal, also where that cannot be read.
func failedRestore(cmd *cobra.Command, args []string) bool {
	if cmd.HasParent() {
		return cmd.Name() == restoreName
	}
	for _, arg := range args {
		if strings.HasPrefix(filepath.Base(arg), "restore") {
			return true
		}
	}
	return false
}

// oneLine is a text as one line, as which a server's log shows it.
func oneLine(text string) string { return strings.Join(strings.Fields(text), " ") }
