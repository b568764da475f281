package pgrepl

import (
	"context"
	"fmt"
	"net"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// openStream gives a stream over a socket, and the socket's other end, on which the messages are a test's own.
func openStream(t testing.TB) (*Stream, net.Conn) {
	t.Helper()
	isolate(t)
	client, server := pgtest.SocketPair(t)
	begun := make(chan error, 1)
	go func() { begun <- pgtest.BeginStream(server) }()
	info, err := ParseConninfo("host=db user=archiver sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	dial := func(context.Context, string, string) (net.Conn, error) { return client, nil }
	conn, err := info.Connect(context.Background(), 0, Options{Timeout: 20 * time.Second, Dial: dial})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	s, _, err := conn.StartStream(context.Background(), "", 1, 0x1000000)
	if err != nil {
		t.Fatal(err)
	}
	if err := <-begun; err != nil {
		t.Fatal(err)
	}
	return s, server
}

// BenchmarkReceive receives WAL in messages of a size, as they come from a server that is far ahead: many in the
// socket at a time.
func BenchmarkReceive(b *testing.B) {
	for _, size := range []int{200, 128 << 10} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			s, server := openStream(b)
			message, err := pgtest.WALData(0x1000000, 0x2000000, make([]byte, size)).Encode(nil)
			if err != nil {
				b.Fatal(err)
			}
			var many []byte
			for len(many) < 256<<10 {
				many = append(many, message...)
			}
			sent := make(chan struct{})
			go func() {
				defer close(sent)
				for {
					if _, err := server.Write(many); err != nil { // the benchmark is over
						return
					}
				}
			}()
			b.SetBytes(int64(size))
			b.ReportAllocs()
			for b.Loop() {
				if m, err := s.Receive(); err != nil || len(m.Data) != size {
					b.Fatalf("%d bytes, %v", len(m.Data), err)
				}
			}
			_ = server.Close()
			<-sent
		})
	}
}

// BenchmarkSendStatus sends status updates to a server that reads them at once.
func BenchmarkSendStatus(b *testing.B) {
	s, server := openStream(b)
	read := make(chan struct{})
	go func() {
		defer close(read)
		buf := make([]byte, 64<<10)
		for {
			if _, err := server.Read(buf); err != nil { // the benchmark is over
				return
			}
		}
	}()
	b.ReportAllocs()
	var at wal.LSN
	for b.Loop() {
		at++
		if err := s.SendStatus(Status{Write: at, Flush: at}); err != nil {
			b.Fatal(err)
		}
	}
	_ = server.Close()
	<-read
}
