//go:build linux

// The program bench compares walfleet with pg_receivewal: both do the same work on the same WAL, on this machine,
// in turn, in one run.
//
//	go run ./bench [-pairs N] [-run REGEXP] [-dir DIRECTORY] [-o DIRECTORY]
//
// It starts throwaway servers of the installed PostgreSQL (15 or later) on 127.0.0.1, builds walfleet, and writes
// benchmarks.md, with medians and ratios, and benchmarks.csv, with every measurement, into the directory of -o. A
// scenario is in a file of its own; what the numbers mean stands in the report, where its reader looks.
package main

import (
	"cmp"
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"regexp"
	"syscall"
	"time"

	"github.com/walfleet/walfleet/internal/postgres"
)

// scenario is what -run chooses from: one setup of servers, and one or more tables in the report.
type scenario struct {
	name string
	run  func(ctx context.Context, b *bench) error
}

// scenarios in the order of the report. Each leaves nothing behind.
var scenarios = []scenario{
	{"catchup-16MB", func(ctx context.Context, b *bench) error { return catchUpScenario(ctx, b, 16<<20, 3<<29) }},
	{"catchup-1GB", func(ctx context.Context, b *bench) error { return catchUpScenario(ctx, b, 1<<30, 2<<30) }},
	{"commits", commitsScenario},
	{"journal", journalScenario},
	{"new-segment", newSegmentScenario},
	{"reconnect", reconnectScenario},
	{"fleet-1", func(ctx context.Context, b *bench) error { return fleetScenario(ctx, b, 1) }},
	{"fleet-10", func(ctx context.Context, b *bench) error { return fleetScenario(ctx, b, 10) }},
	{"fleet-100", func(ctx context.Context, b *bench) error { return fleetScenario(ctx, b, 100) }},
	{"scale", scaleScenario},
	{"compression", compressionScenario},
}

// bench is one run of the program.
type bench struct {
	pairs    int
	dir      string // of this run: servers, archives, the binary of walfleet; on a disk
	pg       postgres.Installation
	owner    *postgres.Owner // whom the servers run as
	walfleet string          // its binary
	report   report
}

func main() {
	if len(os.Args) == 3 && os.Args[1] == walsendersMode {
		if err := walsenders(os.Args[2]); err != nil {
			fmt.Fprintln(os.Stderr, "bench: scripted walsenders:", err)
			os.Exit(1)
		}
		return
	}
	// A second signal ends it at once, and leaves servers behind.
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM)
	context.AfterFunc(ctx, stop)
	if err := run(ctx); err != nil {
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) (err error) {
	var (
		pairs  = flag.Int("pairs", 5, "`number` of measured pairs, after one that is not counted")
		filter = flag.String("run", "", "only the scenarios whose name matches this `regexp`; the report has these alone")
		parent = flag.String("dir", "", "`directory` for servers and archives, on a disk (default: TMPDIR, /tmp or /var/tmp)")
		output = flag.String("o", "docs", "`directory` of benchmarks.md and benchmarks.csv")
	)
	flag.Parse()
	wanted, err := regexp.Compile(*filter)
	if err != nil || *pairs < 1 || flag.NArg() > 0 {
		flag.Usage()
		return cmp.Or(err, errors.New("usage: -pairs needs at least 1, and there are no arguments"))
	}
	b := &bench{pairs: *pairs}
	programs := []string{"initdb", "pg_ctl", "psql", "pgbench", "pg_receivewal"}
	var ok bool
	// Before 15 pg_receivewal cannot start where a slot does.
	if b.pg, ok = postgres.Find(ctx, 15, programs...); !ok {
		return fmt.Errorf("PostgreSQL 15 or later with %q in one directory is not installed here; for example: apt install postgresql", programs)
	}
	if b.owner, err = postgres.ServerOwner(); err != nil {
		return err
	}
	if b.dir, err = makeDir(*parent); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(b.dir)) }()
	b.walfleet = filepath.Join(b.dir, "walfleet")
	build := exec.CommandContext(ctx, "go", "build", "-trimpath", "-o", b.walfleet, "./cmd/walfleet")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		return fmt.Errorf("building walfleet (run this in the module's directory): %w\n%s", err, out)
	}
	if b.report.machine, err = machine(ctx, b); err != nil {
		return err
	}
	b.report.pairs, b.report.filter = *pairs, *filter

	var errs []error
	for _, s := range scenarios {
		if !wanted.MatchString(s.name) || ctx.Err() != nil {
			continue
		}
		started := time.Now()
		fmt.Fprintf(os.Stderr, "%s\n", s.name)
		if err := b.runScenario(ctx, s); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", s.name, err))
			continue
		}
		fmt.Fprintf(os.Stderr, "%s: %s\n", s.name, time.Since(started).Round(time.Second))
	}
	if ctx.Err() != nil { // what is there is not the whole, and the last report may be
		return errors.Join(append(errs, context.Cause(ctx))...)
	}
	return errors.Join(append(errs, b.report.write(*output))...)
}

// runScenario gives a scenario far more time than it takes on a slow machine: what hangs ends.
func (b *bench) runScenario(ctx context.Context, s scenario) error {
	limit := time.Duration(b.pairs+2) * 10 * time.Minute
	ctx, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("not done after %s", limit))
	defer cancel()
	return s.run(ctx, b)
}

// makeDir makes the directory of this run, on a disk: parent, or the first usual place that is none of memory.
func makeDir(parent string) (string, error) {
	parents := []string{os.TempDir(), "/var/tmp"}
	if parent != "" {
		parents = []string{parent}
	}
	var errs []error
	for _, parent := range parents {
		parent, err := filepath.Abs(parent)
		if err != nil {
			return "", err
		}
		fs, err := fileSystemOf(parent)
		switch {
		case err != nil:
			errs = append(errs, err)
			continue
		case fs.memory:
			errs = append(errs, fmt.Errorf("%s is memory, where syncs cost nothing", parent))
			continue
		case fs.free < diskNeeded:
			errs = append(errs, fmt.Errorf("%s has %d GB free, %d GB are needed", parent, fs.free>>30, diskNeeded>>30))
			continue
		}
		dir, err := os.MkdirTemp(parent, "walfleet-bench-")
		if err != nil {
			return "", err
		}
		return dir, os.Chmod(dir, 0o711) // the servers' user goes through to its own
	}
	return "", fmt.Errorf("no directory for servers and archives, choose one with -dir: %w", errors.Join(errs...))
}

// diskNeeded is the most that a scenario takes: a server with recycled 1 GB segments, and an archive.
const diskNeeded = 16 << 30
