package integration

import (
	"context"
	"fmt"
	"sync/atomic"
	"testing"
	"time"
)

// write makes about n MB of WAL, half in rows and half in one record, and returns when it is flushed.
func (s *server) write(t testing.TB, n int) {
	t.Helper()
	half := n * megabyte / 2
	s.query(t, fmt.Sprintf(`CREATE TABLE IF NOT EXISTS filled (i int, t text);
		INSERT INTO filled SELECT i, repeat(md5(i::text), 30) FROM generate_series(1, %d) i;
		SELECT pg_logical_emit_message(true, 'walfleet', repeat(md5('x'), %d))`, half/1024, half/32))
}

// switchWAL ends the current segment early.
func (s *server) switchWAL(t testing.TB) {
	t.Helper()
	s.query(t, "SELECT pg_switch_wal()")
}

// load writes to a server, transaction by transaction, until it is stopped. It connects again whenever the
// server went away.
type load struct {
	commits atomic.Int64
	end     context.CancelFunc
	ended   chan struct{}
}

// startLoad starts a load of small and large records on a table of its own.
func startLoad(t testing.TB, s *server) *load {
	t.Helper()
	s.query(t, "CREATE TABLE IF NOT EXISTS loaded (i bigint, t text)")
	ctx, cancel := context.WithCancel(context.Background())
	l := &load{end: cancel, ended: make(chan struct{})}
	go func() {
		defer close(l.ended)
		for ctx.Err() == nil {
			if err := l.session(ctx, s); err != nil {
				select {
				case <-ctx.Done():
				case <-time.After(50 * time.Millisecond):
				}
			}
		}
	}()
	t.Cleanup(l.stop)
	return l
}

func (l *load) session(ctx context.Context, s *server) error {
	conn, err := s.connect(ctx)
	if err != nil {
		return err
	}
	defer func() {
		closing, cancel := context.WithTimeout(context.Background(), time.Second)
		defer cancel()
		conn.Close(closing)
	}()
	for {
		n := l.commits.Load()
		sql := fmt.Sprintf("INSERT INTO loaded SELECT i, repeat(md5(i::text), 5) FROM generate_series(%d, %d) i", n, n+100)
		if n%10 == 0 { // spans several pages
			sql = "SELECT pg_logical_emit_message(true, 'walfleet', repeat('large ', 10000))"
		}
		if _, err := conn.Exec(ctx, sql).ReadAll(); err != nil {
			return err
		}
		l.commits.Add(1)
	}
}

// stop ends the load and waits for its end.
func (l *load) stop() {
	l.end()
	<-l.ended
}

// await waits until n more transactions were committed.
func (l *load) await(t testing.TB, n int64) {
	t.Helper()
	target := l.commits.Load() + n
	await(t, patience, fmt.Sprintf("%d more commits of the load", n), func() (bool, string) {
		have := l.commits.Load()
		return have >= target, fmt.Sprint(target-have, " missing")
	})
}
