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

// commitsScenario measures commits that wait for the archiver, the server's synchronous standby.
func commitsScenario(ctx context.Context, b *bench) (err error) {
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
		t := table{title: title, about: fmt.Sprintf("pgbench's TPC-B transactions for %d s (`-M prepared`, scale 64) on a server with "+
			"fsync = on, whose synchronous standby is the archiver: `pg_receivewal --synchronous`, or the daemon with its default "+
			"configuration; segments of 16 MB. No checkpoint comes, so no record has a full page. Server and archive are on the same disk, pgbench on the same processors.", seconds)}
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
