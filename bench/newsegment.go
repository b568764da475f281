//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/walfleet/walfleet/internal/wal"
)

const (
	newSegmentSize    = wal.SegmentSize(1 << 30)
	newSegmentMargin  = 4 << 20 // bytes before the segment's end, at which the load begins
	newSegmentSeconds = 10      // after the start of the segment, in which commits count
	newSegmentClients = 4
)

// newSegmentScenario measures commits that wait for the archiver while that begins a segment of 1 GB.
func newSegmentScenario(ctx context.Context, b *bench) (err error) {
	s, err := b.startServer(ctx, newSegmentSize, "synchronous_standby_names='*'", "min_wal_size=6GB", "wal_recycle=on")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	if err := s.initPgbench(ctx, 10); err != nil {
		return err
	}
	if _, err := s.sql(ctx, awaitPassed); err != nil {
		return err
	}
	t := table{title: "Commits at the start of a new segment of 1 GB", about: fmt.Sprintf("pgbench's TPC-B transactions of %d clients, "+
		"as above, while the WAL passes from one segment to the next. What counts are the commits of the %d s after that. The server has the "+
		"segment preallocated, so that the archiver's part shows.", newSegmentClients, newSegmentSeconds)}
	return b.measure(ctx, t, func(ctx context.Context, c contender) (values []value, err error) {
		boundary, err := s.approachSegment(ctx)
		if err != nil {
			return nil, err
		}
		err = b.archiving(ctx, c, s, s.port, func() error {
			values, err = s.passSegment(ctx, boundary)
			return err
		})
		return values, err
	})
}

// approachSegment fills the current segment up to the margin before its end, which it returns, with the next one
// preallocated.
func (s *server) approachSegment(ctx context.Context) (boundary wal.LSN, err error) {
	for range 5 {
		// A checkpoint makes future segments of those that it no longer needs.
		out, err := s.sql(ctx, "CHECKPOINT; SELECT count(*) FROM pg_ls_waldir() WHERE length(name) = 24 AND name > pg_walfile_name(pg_current_wal_insert_lsn())")
		if err != nil {
			return 0, err
		}
		now, err := s.flushed(ctx)
		if err != nil {
			return 0, err
		}
		boundary = newSegmentSize.Segment(1, now).End()
		if out != "0" && now+newSegmentMargin < boundary {
			return boundary, s.fill(ctx, boundary-newSegmentMargin)
		}
		if _, err := s.sql(ctx, "SELECT pg_logical_emit_message(false, 'bench', ''); SELECT pg_switch_wal()"); err != nil {
			return 0, err
		}
	}
	return 0, errors.New("the server preallocates no segment")
}

// awaitPassed creates the function await_passed(boundary): it returns once the flushed WAL has reached boundary,
// and returns when that was, in seconds since 1970. After 5 s it writes what is missing to get there.
const awaitPassed = `CREATE FUNCTION await_passed(boundary pg_lsn) RETURNS float8 LANGUAGE plpgsql AS $$
DECLARE
	began timestamptz := clock_timestamp();
	waited bool := false;
BEGIN
	WHILE pg_current_wal_flush_lsn() < boundary LOOP
		IF NOT waited AND clock_timestamp() > began + interval '5 s' THEN
			waited := true;
			PERFORM pg_logical_emit_message(false, 'bench', repeat('x', greatest(boundary - pg_current_wal_insert_lsn(), 0)::int));
		END IF;
		IF clock_timestamp() > began + interval '60 s' THEN
			RAISE 'the WAL has not reached % after a minute', boundary;
		END IF;
		PERFORM pg_sleep(0.001);
	END LOOP;
	RETURN extract(epoch FROM clock_timestamp());
END $$`

// passSegment runs pgbench across the boundary and returns what its commits needed behind that.
func (s *server) passSegment(ctx context.Context, boundary wal.LSN) ([]value, error) {
	type passed struct {
		at  string
		err error
	}
	at := make(chan passed, 1)
	go func() {
		out, err := s.sql(ctx, fmt.Sprintf("SELECT await_passed('%s')", boundary))
		at <- passed{out, err}
	}()
	_, all, err := s.load(ctx, newSegmentClients, newSegmentSeconds+7)
	p := <-at
	if err := errors.Join(err, p.err); err != nil {
		return nil, err
	}
	begin, err := strconv.ParseFloat(p.at, 64)
	if err != nil {
		return nil, err
	}
	var after []transaction
	for _, t := range all {
		if t.end >= begin && t.end-t.latency/1e3 <= begin+newSegmentSeconds {
			after = append(after, t)
		}
	}
	if len(after) == 0 {
		return nil, fmt.Errorf("no commit after %s", boundary)
	}
	latency := latencies(after)
	return []value{
		{quantity{"worst commit", "ms", false}, percentile(latency, 100)},
		{quantity{"median", "ms", false}, median(latency)},
		{quantity{"commits per second", "", true}, float64(len(after)) / newSegmentSeconds},
	}, nil
}
