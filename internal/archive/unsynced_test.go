package archive

import (
	"strings"
	"testing"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// An archive that nothing is synced for is the same archive.
func TestNothingIsSyncedInAnUnsyncedArchive(t *testing.T) {
	const size, begin = 1 << 20, 64 << 20
	id := Identity{SystemID: 1, SegmentSize: size}
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: 1, Size: size, Start: begin})
	g.FillTo(begin + size + 3000)
	d, err := OpenUnsynced(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	mem := newMemDisk()
	mem.before = func(kind, name string) {
		if strings.Contains(kind, "sync") {
			t.Errorf("%s was synced", name)
		}
	}
	if _, ok := d.disk.(unsynced); !ok {
		t.Fatalf("the disk is a %T", d.disk)
	}
	d.disk = unsynced{mem}
	if err := d.Bind(id, Origin{Timeline: 1, LSN: begin}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.StoreHistory(2, []byte("1\t0/4000000\tno recovery target specified\n")); err != nil {
		t.Fatal(err)
	}
	for from := range 2 { // the second goes on in the second segment
		w, err := d.OpenWriter(t.Context(), id, 1, begin+size*wal.LSN(from))
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Write(w.Pos(), g.Bytes(w.Pos(), g.End())); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		if w.Durable() != g.End() {
			t.Errorf("durable %s, want %s", w.Durable(), g.End())
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
	}
	if mem.names[id.SegmentSize.Segment(1, begin).Name()] == nil {
		t.Error("the segment is not sealed")
	}
}
