//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"time"
)

// journalScenario measures commits on a file system of its own, ext4 with a journal: where the disk's has none, a sync
// costs little more than the data, whatever an archiver did to spare the metadata.
func journalScenario(ctx context.Context, b *bench) error {
	if os.Geteuid() != 0 {
		b.report.tables = append(b.report.tables, table{title: "Synchronous commits, a journaled ext4",
			about: "Not measured: to mount a file system takes root."})
		return nil
	}
	return onJournal(ctx, b.dir, func(dir string) error {
		there := *b
		there.dir = dir
		err := measureCommits(ctx, &there, "a journaled ext4")
		b.report = there.report
		return err
	})
}

// journalSize is that of the file system: a server with pgbench's tables, its WAL and an archive.
const journalSize = 12 << 30

// onJournal calls f with the directory of an ext4 with a journal, in a file in dir through a loop device. That takes
// root, and mkfs.ext4 and mount.
func onJournal(ctx context.Context, dir string, f func(dir string) error) (err error) {
	image, mounted := filepath.Join(dir, "journal.img"), filepath.Join(dir, "journal")
	run := func(ctx context.Context, name string, args ...string) error {
		if out, err := command(ctx, name, args...).CombinedOutput(); err != nil {
			return fmt.Errorf("%s: %w: %s", name, err, lastLines(out, 3))
		}
		return nil
	}
	defer func() { err = errors.Join(err, os.RemoveAll(image), os.RemoveAll(mounted)) }()
	// Written, so that the disk's own file system has nothing left to do.
	if err := run(ctx, "dd", "if=/dev/zero", "of="+image, "bs=1M", fmt.Sprintf("count=%d", journalSize>>20), "oflag=direct"); err != nil {
		return err
	}
	if err := run(ctx, "mkfs.ext4", "-q", "-F", "-O", "has_journal", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=0", image); err != nil {
		return err
	}
	if err := os.Mkdir(mounted, 0o755); err != nil {
		return err
	}
	if err := run(ctx, "mount", "-o", "loop", image, mounted); err != nil {
		return err
	}
	defer func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
		defer cancel()
		err = errors.Join(err, run(ctx, "umount", mounted))
	}()
	return f(mounted)
}

// commitsScenario measures commits on the disk as it is.
func commitsScenario(ctx context.Context, b *bench) error { return measureCommits(ctx, b, "") }

// measureCommits measures commits that wait for the archiver, the server's synchronous standby.
func measureCommits(ctx context.Context, b *bench, where string) (err error) {
	s, err := b.startServer(ctx, 16<<20, "synchronous_standby_names='*'")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := s.initPgbench(ctx, 64); err != nil {
		return err
	}
	const seconds = 10
	for _, clients := range []int{1, 8, 64} {
		title := fmt.Sprintf("Synchronous commits, %d clients", clients)
		if clients == 1 {
			title = "Synchronous commits, 1 client"
		}
		disk := "the same disk"
		if where != "" {
			title += ", " + where
			disk = where + ", made for this in a file on the disk above"
		}
		t := table{title: title, about: fmt.Sprintf("pgbench's TPC-B transactions for %d s (`-M prepared`, scale 64) on a server with "+
			"fsync = on, whose synchronous standby is the archiver: `pg_receivewal --synchronous`, or the daemon with its default "+
			"configuration; segments of 16 MB. No checkpoint comes, so no record has a full page. Server and archive are on %s, pgbench on the same processors.", seconds, disk)}
		err := b.measure(ctx, t, func(ctx context.Context, c contender) (values []value, err error) {
			err = b.archiving(ctx, c, s, s.port, func() error {
				tps, all, err := s.load(ctx, clients, seconds)
				if err != nil {
					return err
				}
				latency := latencies(all)
				values = []value{
					{quantity{"commits per second", "", true}, tps},
					{quantity{"median", "ms", false}, median(latency)},
					{quantity{"99 %", "ms", false}, percentile(latency, 99)},
					{quantity{"99.9 %", "ms", false}, percentile(latency, 99.9)},
					{quantity{"worst", "ms", false}, percentile(latency, 100)},
				}
				return nil
			})
			return values, err
		})
		if err != nil {
			return err
		}
	}
	return nil
}

// transaction is a line of pgbench's log.
type transaction struct {
	latency float64 // ms
	end     float64 // seconds since 1970
}

func latencies(all []transaction) []float64 {
	var ms []float64
	for _, t := range all {
		ms = append(ms, t.latency)
	}
	return ms
}

var tpsLine = regexp.MustCompile(`(?m)^tps = ([0-9.]+)`)

// load runs pgbench's TPC-B transactions, whose commits wait for the synchronous standby.
func (s *server) load(ctx context.Context, clients, seconds int) (tps float64, all []transaction, err error) {
	// A commit whose standby is gone waits for ever.
	limit := time.Duration(seconds)*time.Second + 2*time.Minute
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("commits still wait after %s", limit))
	defer cancel()
	prefix := filepath.Join(s.dir, "transactions")
	out, err := s.program(ctx, "pgbench", "-n", "-M", "prepared", "-c", strconv.Itoa(clients), "-j", strconv.Itoa(min(clients, runtime.NumCPU())),
		"-T", strconv.Itoa(seconds), "-l", "--log-prefix", prefix, s.conninfo())
	if err != nil {
		return 0, nil, err
	}
	m := tpsLine.FindStringSubmatch(out)
	if m == nil {
		return 0, nil, fmt.Errorf("pgbench printed no rate:\n%s", out)
	}
	if tps, err = strconv.ParseFloat(m[1], 64); err != nil {
		return 0, nil, err
	}
	files, err := filepath.Glob(prefix + ".*") // one for each thread
	if err != nil {
		return 0, nil, err
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			return 0, nil, err
		}
		more, err := parseTransactions(string(text))
		if err != nil {
			return 0, nil, fmt.Errorf("pgbench's log: %w", err)
		}
		all = append(all, more...)
		if err := os.Remove(file); err != nil {
			return 0, nil, err
		}
	}
	return tps, all, nil
}

// parseTransactions reads lines of "client transaction latency script seconds microseconds" (pgbench's documentation,
// "Per-Transaction Logging").
func parseTransactions(log string) ([]transaction, error) {
	var all []transaction
	for line := range strings.Lines(log) {
		var client, number, latency, script, seconds, micros int64
		if _, err := fmt.Sscan(line, &client, &number, &latency, &script, &seconds, &micros); err != nil {
			return nil, fmt.Errorf("%q: %w", line, err)
		}
		all = append(all, transaction{float64(latency) / 1e3, float64(seconds) + float64(micros)/1e6})
	}
	return all, nil
}
