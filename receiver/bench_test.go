package receiver

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"math"
	"net"
	"runtime"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// newStream makes a stream that archives from origin on in a new directory, in segments of 16 MB. It has no
// connection yet.
func newStream(t testing.TB, cfg Config) *stream {
	t.Helper()
	id := pgrepl.Identity{SystemID: systemID, Timeline: 1, SegmentSize: 16 * mb}
	dir, err := archive.Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	r := New(cfg, slog.New(slog.DiscardHandler), NewShared(1, 1))
	r.dir = dir
	t.Cleanup(func() {
		if err := r.close(); err != nil {
			t.Error(err)
		}
	})
	if r.writer, err = dir.OpenWriter(context.Background(), archiveIdentity(id), 1, origin); err != nil {
		t.Fatal(err)
	}
	return &stream{session: &session{Receiver: r, candidate: candidate{id: id}}, lastHeard: time.Now()}
}

// TestMessageDoesNotAllocate is DESIGN's section 3: from the socket to the status update that acknowledges it, WAL
// takes no memory that is thrown away.
func TestMessageDoesNotAllocate(t *testing.T) {
	for name, rate := range map[string]int64{"no max_rate": 0, "max_rate": 2 << 20} {
		t.Run(name, func(t *testing.T) { messageDoesNotAllocate(t, rate) })
	}
}

func messageDoesNotAllocate(t *testing.T, rate int64) {
	const (
		size     = 10000
		warm     = 20 // the first ones make the file, and fill pools
		rounds   = 6
		round    = 40
		messages = warm + rounds*round
	)
	w := newWAL(16 * mb)
	for w.End() < origin+messages*size {
		w.Append(make([]byte, 300))
	}
	var wire []byte
	at := []int{0} // where messages begin in wire
	for pos := origin; pos < origin+messages*size; pos += size {
		var err error
		if wire, err = pgtest.WALData(pos, w.End(), w.Bytes(pos, pos+size)).Encode(wire); err != nil {
			t.Fatal(err)
		}
		at = append(at, len(wire))
	}

	client, server := pgtest.SocketPair(t)
	began := make(chan error, 1)
	go func() { began <- pgtest.BeginStream(server) }()
	info, err := pgrepl.ParseConninfo("host=db user=archiver sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	dial := func(context.Context, string, string) (net.Conn, error) { return client, nil }
	conn, err := info.Connect(t.Context(), 0, pgrepl.Options{Timeout: 20 * time.Second, Dial: dial})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	st := newStream(t, Config{Synchronous: true, Adjustable: Adjustable{StatusInterval: time.Hour, ReceiveTimeout: time.Hour, MaxRate: rate}})
	if st.Stream, _, err = conn.StartStream(t.Context(), "", 1, origin); err != nil {
		t.Fatal(err)
	}
	st.silenceAt = time.Now().Add(time.Hour)
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- st.interruptible(ctx) }()
	if err := <-began; err != nil {
		t.Fatal(err)
	}

	// A message is sent when the one before is acknowledged, so that each is written, synced and acknowledged alone.
	status := make([]byte, 39)
	exchange := func(i int) {
		if _, err := io.ReadFull(server, status); err != nil {
			t.Fatalf("message %d: %v", i, err)
		}
		if _, err := server.Write(wire[at[i]:at[i+1]]); err != nil {
			t.Fatal(err)
		}
	}
	_ = server.SetDeadline(time.Now().Add(time.Minute))
	for i := range warm {
		exchange(i)
	}
	// Whatever else the process does meanwhile is counted too, and the race detector empties pools: the best round counts.
	least := uint64(math.MaxUint64)
	for i := warm; i < messages; i += round {
		var before, after runtime.MemStats
		runtime.ReadMemStats(&before)
		for j := range round {
			exchange(i + j)
		}
		runtime.ReadMemStats(&after)
		least = min(least, after.Mallocs-before.Mallocs)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Fatal(err)
	}
	if held := !st.heldAt.IsZero(); held != (rate > 0) {
		t.Errorf("max_rate = %d held reading back: %t", rate, held)
	}
	if least >= round { // testing.AllocsPerRun, too, counts none below one for each run
		t.Errorf("%d allocations for %d messages", least, round)
	}
	// The last message may not have come yet, and the one before it ends inside a record.
	if durable := st.writer.Durable(); durable < origin+(messages-1)*size-400 {
		t.Errorf("only %s is durable", durable)
	}
}

// BenchmarkHandle takes messages of a size into an archive, all but their reading and acknowledging.
func BenchmarkHandle(b *testing.B) {
	const segment = 16 * mb
	w := newWAL(segment)
	for w.End() < origin+segment {
		w.Append(make([]byte, 200))
	}
	data := w.Bytes(origin, origin+segment)
	for _, size := range []int{200, 128 << 10} {
		b.Run(fmt.Sprintf("size=%d", size), func(b *testing.B) {
			b.SetBytes(int64(size))
			b.ReportAllocs()
			var st *stream
			ctx := context.Background()
			at := segment
			for b.Loop() {
				if at+size > segment { // the same segment again, in another directory
					b.StopTimer()
					st, at = newStream(b, Config{Adjustable: Adjustable{MinFree: -1, ReceiveTimeout: time.Hour}}), 0
					b.StartTimer()
				}
				m := pgrepl.Message{Kind: pgrepl.WALData, Start: origin + wal.LSN(at), Data: data[at : at+size], ServerEnd: w.End()}
				if err := st.handle(ctx, m); err != nil {
					b.Fatal(err)
				}
				st.publish()
				at += size
			}
		})
	}
}
