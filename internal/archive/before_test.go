package archive_test

import (
	"bytes"
	"testing"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// longRecordWAL has a record that begins in the first segment, and ends in the
// fourth, and some records after it, up to end.
func longRecordWAL() (g *pgtest.WAL, end wal.LSN) {
	g = walTo(begin + mb - 20<<10)
	g.Append(bytes.Repeat([]byte("long"), (2*mb+400<<10)/4))
	for range 20 {
		g.Append(bytes.Repeat([]byte("after"), 1000))
	}
	return g, g.End()
}

// TestRecordLongerThanASegmentIsGoneOnWith restarts in the segment in which a
// record ends that began three segments before: neither is anything of it
// received again, nor is another record in its place taken.
func TestRecordLongerThanASegmentIsGoneOnWith(t *testing.T) {
	g, end := longRecordWAL()
	path := t.TempDir()
	d := open(t, path)
	w := openTail(t, d)
	write(t, w, g, 100_000, end)
	if n := len(flush(t, w)); n != 3 {
		t.Fatalf("%d segments were sealed, want 3", n)
	}
	w = openTail(t, d)
	if again := end - w.Pos(); w.Durable() != end || again > 2*wal.PageSize {
		t.Errorf("durable up to %s, and %d bytes come again; want %s, and two pages at most", w.Durable(), again, end)
	}
	write(t, w, g, 1000, end)
	wantContent(t, path, g, end, end)
}
