package main

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"os/signal"
	"path/filepath"
	"runtime"
	"strings"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/term"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/verify"
	"github.com/walfleet/walfleet/internal/wal"
)

func newVerifyCommand(g *globals) *cobra.Command {
	var directory, maxRate, since string
	var asJSON bool
	o := verify.Options{Timeout: time.Minute}
	cmd := &cobra.Command{
		Use:   "verify [CLUSTER...]",
		Short: "Check every byte of the archives",
		Long: `verify reads every byte of the archives of the configuration file's clusters, or of
those that are named, or of one directory. It checks files, pages, records with
their checksums and how they follow each other across segments and timelines,
histories, and gaps. Each fault names the file, the place in it, and what to do;
docs/recovery.md says what it proves and what it cannot.

It locks and changes nothing, and can be used while the daemon archives. What it
came to is kept in the directory of a cluster of the file, for status and metrics.
Ctrl-C ends it, and says what was not checked.

Exit status: 0 when all was checked and is whole, 1 when there is a fault or
something could not be checked, 2 for a command line that makes no sense.`,
		Example: `  walfleet verify                            every archive of the file
  walfleet verify orders --since 7d          what was written in a week
  walfleet verify --archive /mnt/copy/orders a copy, on a host without a configuration
  walfleet verify orders --against "host=db1 user=walfleet"`,
		Args: func(_ *cobra.Command, args []string) error {
			var err error
			switch {
			case directory != "" && len(args) > 0:
				err = errors.New("--archive names a directory, so no cluster can be named")
			case o.Jobs < 1:
				err = fmt.Errorf("--jobs is %d, and must be 1 at least", o.Jobs)
			case o.Resume != "" && directory == "" && len(args) != 1:
				err = errors.New("--resume takes one archive: name a cluster, or --archive")
			case o.Against != "" && directory == "" && len(args) != 1:
				err = errors.New("--against takes one archive: name a cluster, or --archive")
			default:
				if o.MaxRate, err = fleet.ParseSize(maxRate, 1<<60); err != nil {
					err = fmt.Errorf("--max-rate: %w", err)
				} else if o.Since, o.From, err = parseSince(since, time.Now()); err != nil {
					err = fmt.Errorf("--since: %w", err)
				}
			}
			if err != nil {
				return &usageError{err}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			// After the first signal the default action is back.
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			context.AfterFunc(ctx, stop)
			archives, err := archivesToVerify(g.configFile, directory, args)
			if err != nil {
				return err
			}
			reports := verifyAll(ctx, cmd.ErrOrStderr(), archives, o)
			if asJSON {
				err = printJSON(cmd, reports)
			} else {
				for _, r := range reports {
					if err = r.Print(cmd.OutOrStdout()); err != nil {
						break
					}
				}
			}
			for _, r := range reports {
				if err == nil && !r.Whole {
					return exitStatus(1)
				}
			}
			return err
		},
	}
	flags := cmd.Flags()
	flags.StringVar(&directory, "archive", "", "verify the archive in this `directory`; no configuration is read")
	flags.IntVarP(&o.Jobs, "jobs", "j", runtime.NumCPU(), "read so many `segments` at a time")
	flags.StringVar(&maxRate, "max-rate", "0", "check so much WAL a second at most, such as 50MB; 0: no `limit`")
	flags.StringVar(&since, "since", "", "leave out segments whose files are older than a `time` (36h, 7d), or that end before an LSN")
	flags.StringVar(&o.Resume, "resume", "", "keep in this `file` what was checked: go on there after an interruption; it is removed at the end")
	flags.StringVar(&o.Against, "against", "", "compare with the WAL that the server of this `conninfo` still has")
	flags.BoolVar(&asJSON, "json", false, "print JSON")
	return cmd
}

// parseSince reads how far back to go: a duration, which may have days, or an LSN.
func parseSince(text string, now time.Time) (since time.Time, from wal.LSN, err error) {
	if text == "" {
		return since, 0, nil
	}
	if strings.Contains(text, "/") {
		from, err = wal.ParseLSN(text)
		return since, from, err
	}
	d, err := fleet.ParseAge(text)
	if err != nil || d <= 0 {
		return since, 0, fmt.Errorf(`%q is neither a duration, such as 36h or 7d, nor an LSN`, text)
	}
	return now.Add(-d), 0, nil
}

// namedArchive is a directory to verify; Name is the cluster's, "" without a configuration.
type namedArchive struct{ name, dir string }

func archivesToVerify(file, directory string, clusters []string) (archives []namedArchive, err error) {
	if directory != "" {
		return []namedArchive{{"", directory}}, nil
	}
	cfg, err := fleet.Load(file)
	if err != nil {
		return nil, err
	}
	dirs := map[string]string{}
	for _, c := range cfg.Clusters {
		dirs[c.Name] = c.Dir
		if len(clusters) == 0 {
			archives = append(archives, namedArchive{c.Name, c.Dir})
		}
	}
	for _, name := range clusters {
		dir, ok := dirs[name]
		if !ok {
			return nil, fmt.Errorf("there is no cluster %q", name)
		}
		archives = append(archives, namedArchive{name, dir})
	}
	return archives, nil
}

// verifyAll verifies one archive after the other. What keeps one from being read is in its report.
func verifyAll(ctx context.Context, stderr io.Writer, archives []namedArchive, o verify.Options) []verify.Report {
	reports := []verify.Report{}
	for _, a := range archives {
		bar := startProgressBar(stderr, cmp.Or(a.name, filepath.Base(a.dir)))
		o.Progress = bar.note
		report, err := verify.Run(ctx, a.dir, o)
		bar.stop()
		report.Cluster = a.name
		if err != nil {
			report.Whole, report.Error = false, err.Error()
		}
		if a.name != "" && (len(report.NotChecked) == 0 || len(report.Faults) > 0) { // an interrupted one that found nothing is no news
			if err := recordVerify(a.dir, report); err != nil && !errors.Is(err, fs.ErrNotExist) { // the directory, which the report tells
				fmt.Fprintf(stderr, "walfleet status and metrics will not show this verification of %s: %v\n", a.name, err)
			}
		}
		reports = append(reports, report)
	}
	return reports
}

// recordVerify keeps what a verification came to, for status and metrics.
func recordVerify(dir string, r verify.Report) error {
	var last fleet.VerifyReport
	if len(r.Faults) == 0 && r.Skipped > 0 && archive.ReadRecord(dir, archive.VerifyRecord, &last) == nil && last.Faults > 0 {
		return errors.New("it left segments out, and the last one found faults, which stand until all is verified")
	}
	return fleet.VerifyReport{Time: time.Now().UTC(), Seconds: r.Seconds, Whole: r.Whole, Error: r.Error, Faults: len(r.Faults),
		Unproven: len(r.Unproven), Segments: r.Segments, Skipped: r.Skipped, CheckedBytes: r.Bytes}.Record(dir)
}

// progressBar shows on a terminal how far a verification has come, a few times a second.
type progressBar struct {
	done, total atomic.Int64
	end, ended  chan struct{}
}

func startProgressBar(w io.Writer, name string) *progressBar {
	b := &progressBar{end: make(chan struct{}), ended: make(chan struct{})}
	f, ok := w.(*os.File)
	if !ok || !term.IsTerminal(int(f.Fd())) {
		close(b.ended)
		return b
	}
	begin := time.Now()
	go func() {
		defer close(b.ended)
		tick := time.NewTicker(300 * time.Millisecond)
		defer tick.Stop()
		for {
			select {
			case <-b.end:
				fmt.Fprint(f, "\r\x1b[K")
				return
			case <-tick.C:
				fmt.Fprintf(f, "\r\x1b[K%s: %s", name, progressText(b.done.Load(), b.total.Load(), time.Since(begin)))
			}
		}
	}()
	return b
}

func (b *progressBar) note(done, total int64) {
	b.done.Store(done)
	b.total.Store(total)
}

func (b *progressBar) stop() {
	close(b.end)
	<-b.ended
}

// progressText is the share, the speed, and the time that is left at that speed.
func progressText(done, total int64, took time.Duration) string {
	if done <= 0 || total <= 0 || took <= 0 {
		return "begins"
	}
	speed := float64(done) / took.Seconds()
	left := time.Duration(float64(max(total-done, 0)) / speed * float64(time.Second))
	return fmt.Sprintf("%d %% of %s, %s/s, %s left", min(100, done*100/total), verify.SizeText(total), verify.SizeText(int64(speed)), left.Round(time.Second))
}
