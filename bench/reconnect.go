//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"strconv"
	"sync"
	"sync/atomic"

	"github.com/walfleet/walfleet/internal/wal"
)

// reconnectScenario measures what the loss of a connection costs in the middle of a segment of 1 GB.
func reconnectScenario(ctx context.Context, b *bench) (err error) {
	const offset = 400 << 20
	s, err := b.startServer(ctx, 1<<30, "fsync=off", "wal_init_zero=off")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	now, err := s.flushed(ctx)
	if err != nil {
		return err
	}
	if err := s.fill(ctx, wal.SegmentSize(1<<30).Segment(1, now).Start+offset); err != nil {
		return err
	}
	if _, err := s.sql(ctx, reconnectFunction); err != nil {
		return err
	}
	t := table{title: "Reconnect in the middle of a segment of 1 GB", about: fmt.Sprintf("The server is idle, %d MB into a segment, and all is archived. "+
		"Its walsender is terminated; what counts is until a new one is streaming and has been told that all is flushed. pg_receivewal "+
		"waits 5 s before it connects again, and receives the segment from its start. The bytes are all that the server "+
		"sent in that time, counted by a proxy.", offset>>20)}
	return b.measure(ctx, t, func(ctx context.Context, c contender) (values []value, err error) {
		p, err := startProxy(s.port)
		if err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, p.stop()) }()
		err = b.archiving(ctx, c, s, p.port(), func() error {
			before := p.received.Load()
			out, err := s.sql(ctx, "SELECT reconnect()")
			if err != nil {
				return err
			}
			seconds, err := strconv.ParseFloat(out, 64)
			values = []value{
				{quantity{"time until all is streamed again", "s", false}, seconds},
				{quantity{"received again", "kB", false}, float64(p.received.Load()-before) / (1 << 10)},
			}
			return err
		})
		return values, err
	})
}

// reconnectFunction creates the function reconnect(): it ends the walsender, waits for another one that has streamed all
// there is, and returns the seconds that took.
const reconnectFunction = `CREATE FUNCTION reconnect() RETURNS float8 LANGUAGE plpgsql AS $$
DECLARE
	began timestamptz := clock_timestamp();
	target pg_lsn := pg_current_wal_flush_lsn();
	old int := (SELECT pid FROM pg_stat_get_wal_senders());
BEGIN
	PERFORM pg_terminate_backend(old);
	WHILE NOT EXISTS (SELECT FROM pg_stat_get_wal_senders() WHERE pid <> old AND state = 'streaming' AND flush_lsn >= target) LOOP
		IF clock_timestamp() > began + interval '2 min' THEN
			RAISE 'no new walsender has streamed up to % after 2 minutes', target;
		END IF;
		PERFORM pg_sleep(0.001);
	END LOOP;
	RETURN extract(epoch FROM clock_timestamp() - began);
END $$`

// proxy joins connections with the server and counts.
type proxy struct {
	listener net.Listener
	received atomic.Int64 // bytes that the server sent
	cancel   context.CancelFunc
	done     chan struct{} // closed when all its goroutines have ended
}

func startProxy(server int) (*proxy, error) {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(context.Background())
	p := &proxy{listener: listener, cancel: cancel, done: make(chan struct{})}
	go func() {
		defer close(p.done)
		var joined sync.WaitGroup
		defer joined.Wait()
		for {
			client, err := listener.Accept()
			if err != nil { // closed
				return
			}
			joined.Go(func() { p.join(ctx, client.(*net.TCPConn), server) })
		}
	}()
	return p, nil
}

func (p *proxy) port() int { return p.listener.Addr().(*net.TCPAddr).Port }

func (p *proxy) stop() error {
	p.cancel()
	err := p.listener.Close()
	<-p.done
	return err
}

// join copies in both directions until both ends have closed theirs, or ctx is done.
func (p *proxy) join(ctx context.Context, client *net.TCPConn, port int) {
	defer func() { _ = client.Close() }()
	server, err := net.DialTCP("tcp", nil, &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
	if err != nil {
		return // the client sees the end of its connection
	}
	defer func() { _ = server.Close() }()
	defer context.AfterFunc(ctx, func() { _, _ = client.Close(), server.Close() })()
	var both sync.WaitGroup
	both.Go(func() {
		_, _ = io.Copy(server, client)
		_ = server.CloseWrite()
	})
	both.Go(func() {
		_, _ = io.Copy(client, io.TeeReader(server, (*counter)(&p.received)))
		_ = client.CloseWrite()
	})
	both.Wait()
}

// counter counts what is written to it.
type counter atomic.Int64

func (c *counter) Write(b []byte) (int, error) {
	(*atomic.Int64)(c).Add(int64(len(b)))
	return len(b), nil
}
