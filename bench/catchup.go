//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"

	"github.com/walfleet/walfleet/internal/wal"
)

// catchUpScenario receives the WAL that a slot has kept, of many small records, until its end.
func catchUpScenario(ctx context.Context, b *bench, segmentSize wal.SegmentSize, amount int64) (err error) {
	s, begin, end, err := b.startBehind(ctx, segmentSize, amount)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()

	run := func(parent string, device bool) func(ctx context.Context, c contender) ([]value, error) {
		return func(ctx context.Context, c contender) (values []value, err error) {
			err = withArchive(parent, func(dir string) error {
				values, err = catchUpOnce(ctx, b, s, c, dir, begin, end, device)
				return err
			})
			return values, err
		}
	}
	size := fmt.Sprintf("segments of %d MB", segmentSize>>20)
	about := fmt.Sprintf("%.1f GB of WAL of many small records (UPDATE of pgbench_accounts), from a slot into an empty directory until "+
		"--endpos: `pg_receivewal --synchronous` and `walfleet receivewal` with the same arguments. "+
		"The time is that of the process, from its start to its end.", float64(end-begin)/(1<<30))
	if err := b.measure(ctx, table{title: "Catch-up to disk, " + size, about: about}, run(b.dir, true)); err != nil {
		return err
	}

	memory := table{title: "Catch-up to memory, " + size, about: about + " The directory is on a tmpfs, so that no disk limits it."}
	const shm = "/dev/shm"
	fs, err := fileSystemOf(shm)
	need := int64(end-begin) + 2*int64(segmentSize)
	switch {
	case err != nil || !fs.memory:
		memory.about = "Not measured: " + shm + " is no tmpfs here."
	case fs.free < need:
		memory.about = fmt.Sprintf("Not measured: %s has %d MB free, %d MB are needed.", shm, fs.free>>20, need>>20)
	default:
		return b.measure(ctx, memory, run(shm, false))
	}
	fmt.Fprintf(os.Stderr, "  %s: %s\n", memory.title, memory.about)
	b.report.tables = append(b.report.tables, memory)
	return nil
}

// startBehind starts a server whose slot "base" keeps amount bytes of WAL at least, of many small records, from begin, where a
// receiver with an empty directory starts, to end. There is more WAL behind that: who receives until there need not wait for it.
func (b *bench) startBehind(ctx context.Context, segmentSize wal.SegmentSize, amount int64) (_ *server, begin, end wal.LSN, err error) {
	s, err := b.startServer(ctx, segmentSize, "fsync=off", "wal_keep_size=64GB", "wal_recycle=off", "wal_init_zero=off")
	if err != nil {
		return nil, 0, 0, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, s.stop())
		}
	}()
	if err := s.createSlot(ctx, "base"); err != nil {
		return nil, 0, 0, err
	}
	if begin, err = s.flushed(ctx); err != nil {
		return nil, 0, 0, err
	}
	begin = segmentSize.Start(begin)
	if end, err = s.update(ctx, begin+wal.LSN(amount)); err != nil {
		return nil, 0, 0, err
	}
	return s, begin, end, settle(s.dir)
}

// update fills a server with WAL of many small records, up to target at least, and returns where it ends. There is more
// WAL behind that: who receives until there need not wait for it.
func (s *server) update(ctx context.Context, target wal.LSN) (wal.LSN, error) {
	if err := s.initPgbench(ctx, 10); err != nil {
		return 0, err
	}
	for {
		end, err := s.flushed(ctx)
		if err != nil {
			return 0, err
		}
		if end >= target {
			return end, s.emit(ctx, 1<<20)
		}
		if _, err := s.sql(ctx, "UPDATE pgbench_accounts SET abalance = abalance + 1"); err != nil {
			return 0, err
		}
	}
}

// catchUpOnce receives from a copy of the slot "base".
func catchUpOnce(ctx context.Context, b *bench, s *server, c contender, dir string, begin, end wal.LSN, device bool) (_ []value, err error) {
	if _, err := s.sql(ctx, "SELECT pg_copy_physical_replication_slot('base', 'run')"); err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, s.dropSlot(context.WithoutCancel(ctx), "run")) }()
	before, err := deviceBytes(dir)
	if err != nil {
		return nil, err
	}
	ps, err := start(b.catchUp(ctx, c, source{port: s.port, slot: "run"}, dir, end))
	if err != nil {
		return nil, err
	}
	u, err := ps.wait()
	if err != nil {
		return nil, err
	}
	after, err := deviceBytes(dir)
	if err != nil {
		return nil, err
	}
	bytes := float64(end - begin)
	values := []value{
		{quantity{"throughput", "MB/s", true}, bytes / (1 << 20) / u.wall.Seconds()},
		{quantity{"CPU per GB", "s", false}, u.cpu.Seconds() / bytes * (1 << 30)},
		{quantity{"peak memory", "MB", false}, float64(u.peak) / (1 << 20)},
	}
	if device {
		values = append(values, value{quantity{"bytes to the device per byte of WAL", "", false}, (after - before) / bytes})
	}
	return values, nil
}
