package demo

import (
	"context"
	"fmt"
	"slices"
	"sync"
	"time"
)

// A load commits one transaction after the other, and connects again for as
// long as it takes when the server is gone.
type load struct {
	server server
	sql    string        // one transaction
	every  time.Duration // from the start of one transaction to that of the next, at least

	mu    sync.Mutex
	times []time.Duration // of each commit
}

// createTable needs no answer from a synchronous standby.
const createTable = "CREATE TABLE load (id bigint GENERATED ALWAYS AS IDENTITY, body text)"

// transaction inserts rows of about 1 kB each and writes one record of about
// record kB, which spans many pages and now and then two segments.
func transaction(rows, record int) string {
	const text = "(SELECT string_agg(md5(random()::text), '') AS text FROM generate_series(1, 32)) AS t"
	return fmt.Sprintf("BEGIN; INSERT INTO load (body) SELECT text FROM %s, generate_series(1, %d); "+
		"SELECT FROM %s, pg_logical_emit_message(true, 'walfleet demo', repeat(text, %d)); COMMIT", text, rows, text, record)
}

// statementTimeout ends a commit that nobody confirms.
const statementTimeout = 10 * time.Second

// run returns when stop is closed and the transaction in progress is done, or
// when ctx is.
func (l *load) run(ctx context.Context, stop <-chan struct{}) {
	for {
		l.connection(ctx, stop)
		select {
		case <-stop:
			return
		case <-ctx.Done():
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// connection writes until its connection fails, or run has to end. What the
// error was does not matter: the story watches both ends.
func (l *load) connection(ctx context.Context, stop <-chan struct{}) {
	db, err := connect(ctx, l.server)
	if err != nil {
		return
	}
	defer func() { _ = db.close() }()
	for {
		begin := time.Now()
		if err := l.commit(ctx, db); err != nil {
			return
		}
		took := time.Since(begin)
		l.mu.Lock()
		l.times = append(l.times, took)
		l.mu.Unlock()
		select {
		case <-stop:
			return
		case <-time.After(l.every - took):
		}
	}
}

func (l *load) commit(ctx context.Context, db *session) error {
	ctx, cancel := context.WithTimeout(ctx, statementTimeout)
	defer cancel()
	_, err := db.query(ctx, l.sql)
	return err
}

// latencies sums up how long transactions took, as their client saw it.
type latencies struct {
	commits       int
	median, worst time.Duration
}

func (l *load) latencies() latencies {
	l.mu.Lock()
	sorted := slices.Clone(l.times)
	l.mu.Unlock()
	if len(sorted) == 0 {
		return latencies{}
	}
	slices.Sort(sorted)
	return latencies{commits: len(sorted), median: sorted[len(sorted)/2], worst: sorted[len(sorted)-1]}
}
