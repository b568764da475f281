//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/walfleet/walfleet/internal/wal"
)

// fleetScenario archives n clusters at once, which are slots on two servers (or one): it lets all of them catch up, be idle,
// and then follow a light load.
func fleetScenario(ctx context.Context, b *bench, n int) (err error) {
	var servers []*server
	defer func() {
		for _, s := range servers {
			err = errors.Join(err, s.stop())
		}
	}()
	for range min(n, 2) {
		s, err := b.startServer(ctx, 16<<20, "fsync=off")
		if err != nil {
			return err
		}
		servers = append(servers, s)
		if err := s.initPgbench(ctx, 2); err != nil {
			return err
		}
		if _, err := s.sql(ctx, caughtUp); err != nil {
			return err
		}
	}
	t := table{title: fmt.Sprintf("Fleet of %d clusters", n), slow: true, about: fmt.Sprintf("One daemon with its default configuration "+
		"against %d processes of `pg_receivewal --synchronous`. The clusters are slots on %d server(s) with fsync = off. All begin at once, in "+
		"empty directories, %d MB of WAL behind; the times count from the first start until pg_stat_replication shows that WAL as flushed. "+
		"Then nothing happens for half a minute (the CPU is that of %s, from the 10th second on), and then pgbench runs on each "+
		"server, %d transactions a second, for %s. PSS is proportional memory: a page that n processes share counts 1/n in each. "+
		"CPU is in percent of one processor.", n, len(servers), fleetBehind>>20, idleWatch, loadRate, loadTime)}
	if n == 1 {
		t.title = "Fleet of 1 cluster"
	}
	return b.measure(ctx, t, func(ctx context.Context, c contender) (values []value, err error) {
		err = withArchive(b.dir, func(dir string) error {
			values, err = fleetOnce(ctx, b, servers, c, dir, n)
			return err
		})
		return values, err
	})
}

const (
	fleetBehind = 32 << 20 // bytes of WAL that a cluster is behind
	idleWatch   = 15 * time.Second
	loadTime    = 10 * time.Second
	loadRate    = 20 // transactions per second and server
)

func fleetOnce(ctx context.Context, b *bench, servers []*server, c contender, dir string, n int) (_ []value, err error) {
	sources := make([][]source, len(servers)) // of each server
	var all []source
	for i := range n {
		name := fmt.Sprintf("c%03d", i)
		on := i % len(servers)
		all = append(all, source{name, servers[on].port, name})
		sources[on] = append(sources[on], all[i])
	}
	targets := make([]wal.LSN, len(servers))
	for i, s := range servers {
		defer func() { err = errors.Join(err, s.dropSlots(context.WithoutCancel(ctx), sources[i])) }()
		if targets[i], err = s.fallBehind(ctx, sources[i], fleetBehind); err != nil {
			return nil, err
		}
	}
	cmds, err := b.archivers(ctx, c, dir, all...)
	if err != nil {
		return nil, err
	}
	var values []value
	_, err = withArchivers(cmds, func(ps *processes) error {
		var group errgroup.Group
		times := make([][]float64, len(servers))
		for i, s := range servers {
			group.Go(func() (err error) {
				times[i], err = s.caughtUpAfter(ctx, ps.started, len(sources[i]), targets[i])
				return err
			})
		}
		if err := group.Wait(); err != nil {
			return err
		}
		caughtUp := slices.Concat(times...)
		slowest, fastest := slices.Max(caughtUp), slices.Min(caughtUp)
		values = []value{
			{quantity{"last caught up after", "s", false}, slowest},
			{quantity{"last caught up, compared with the first", "", false}, slowest / fastest},
		}
		return fleetCosts(ctx, ps, servers, sources, &values)
	})
	return values, err
}

// fleetCosts watches archivers that have caught up: half a minute in which nothing happens, and under load.
func fleetCosts(ctx context.Context, ps *processes, servers []*server, sources [][]source, values *[]value) error {
	var looks []cost
	for _, wait := range []time.Duration{10 * time.Second, idleWatch, 5 * time.Second} {
		if err := pause(ctx, wait); err != nil {
			return err
		}
		c, err := ps.cost()
		if err != nil {
			return err
		}
		looks = append(looks, c)
	}
	began := time.Now()
	var group errgroup.Group
	for i, s := range servers {
		group.Go(func() error {
			_, err := s.program(ctx, "pgbench", "-n", "-c", "2", "-T", strconv.Itoa(int(loadTime.Seconds())), "-R", strconv.Itoa(loadRate), s.conninfo())
			return errors.Join(err, s.awaitArchivers(ctx, len(sources[i])))
		})
	}
	if err := group.Wait(); err != nil {
		return err
	}
	took := time.Since(began)
	loaded, err := ps.cost()
	if err != nil {
		return err
	}
	early, later, idle := looks[0], looks[1], looks[2]
	percent := func(from, to cost, d time.Duration) float64 { return 100 * (to.cpu - from.cpu).Seconds() / d.Seconds() }
	*values = append(*values,
		value{quantity{"PSS, idle for 10 s", "MB", false}, float64(early.pss) / (1 << 20)},
		value{quantity{"PSS, idle for 30 s", "MB", false}, float64(idle.pss) / (1 << 20)},
		value{quantity{"CPU, idle", "%", false}, percent(early, later, idleWatch)},
		value{quantity{"threads", "", false}, float64(idle.threads)},
		value{quantity{"descriptors", "", false}, float64(idle.descriptors)},
		value{quantity{"PSS, loaded", "MB", false}, float64(loaded.pss) / (1 << 20)},
		value{quantity{"CPU, loaded", "%", false}, percent(idle, loaded, took)},
	)
	return nil
}

// fallBehind creates the slots of sources, and then n bytes of WAL in many small records at least. It returns where they end.
func (s *server) fallBehind(ctx context.Context, sources []source, n wal.LSN) (wal.LSN, error) {
	// A slot keeps WAL from the last checkpoint on, and a receiver begins where that one's segment does.
	for _, query := range []string{"SELECT pg_switch_wal()", "CHECKPOINT"} {
		if _, err := s.sql(ctx, query); err != nil {
			return 0, err
		}
	}
	for _, source := range sources {
		if err := s.createSlot(ctx, source.slot); err != nil {
			return 0, err
		}
	}
	begin, err := s.flushed(ctx)
	for end := begin; err == nil && end < begin+n; {
		if _, err := s.sql(ctx, "UPDATE pgbench_accounts SET abalance = abalance + 1 WHERE aid <= 10000"); err != nil {
			return 0, err
		}
		end, err = s.flushed(ctx)
	}
	if err != nil {
		return 0, err
	}
	return s.flushed(ctx)
}

func (s *server) dropSlots(ctx context.Context, sources []source) error {
	var errs []error
	for _, source := range sources {
		errs = append(errs, s.dropSlot(ctx, source.slot))
	}
	return errors.Join(errs...)
}

// caughtUp creates the function caught_up(n, target, timeout): for each of n receivers, the time (in seconds since 1970) at
// which it was seen to have flushed all WAL up to target.
const caughtUp = `CREATE FUNCTION caught_up(n int, target pg_lsn, timeout float8) RETURNS SETOF float8 LANGUAGE plpgsql AS $$
DECLARE
	began timestamptz := clock_timestamp();
	seen int[] := '{}';
	there int[];
BEGIN
	WHILE cardinality(seen) < n LOOP
		IF clock_timestamp() > began + timeout * interval '1 s' THEN
			RAISE 'only % of % receivers have flushed % after % s', cardinality(seen), n, target, timeout;
		END IF;
		PERFORM pg_sleep(0.005);
		there := ARRAY(SELECT pid FROM pg_stat_get_wal_senders() WHERE flush_lsn >= target AND pid <> ALL (seen));
		RETURN QUERY SELECT extract(epoch FROM clock_timestamp())::float8 FROM unnest(there);
		seen := seen || there;
	END LOOP;
END $$`

// caughtUpAfter waits until n archivers have flushed all WAL up to target, and returns each one's seconds since began.
func (s *server) caughtUpAfter(ctx context.Context, began time.Time, n int, target wal.LSN) ([]float64, error) {
	out, err := s.sql(ctx, fmt.Sprintf("SELECT caught_up(%d, '%s', 300)", n, target))
	if err != nil {
		return nil, err
	}
	var all []float64
	for line := range strings.Lines(out) {
		at, err := strconv.ParseFloat(strings.TrimSpace(line), 64)
		if err != nil {
			return nil, err
		}
		all = append(all, at-float64(began.UnixMicro())/1e6)
	}
	return all, nil
}
