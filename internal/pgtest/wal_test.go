package pgtest_test

import (
	"bytes"
	"slices"
	"testing"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

const segment = 1 << 20

// walk follows all of g, checking every CRC, and returns the boundaries of its records.
func walk(t *testing.T, g *pgtest.WAL, start wal.LSN, tli wal.Timeline) []wal.LSN {
	t.Helper()
	w := wal.NewWalker(wal.WalkerConfig{Start: start, Timeline: tli, Size: segment, SystemID: 42, CheckCRC: true})
	var ends []wal.LSN
	p := g.Bytes(start, g.End())
	for ; len(p) > 0; p = p[8:] {
		before := w.Boundary()
		if err := w.Feed(p[:8]); err != nil {
			t.Fatal(err)
		}
		if w.Boundary() != before {
			ends = append(ends, w.Boundary())
		}
	}
	return ends
}

// What it makes is WAL by the rules of the walker, which was compared with pg_waldump on real servers' WAL.
func TestWAL(t *testing.T) {
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: 42})
	var ends []wal.LSN
	for _, n := range []int{0, 1, 8143, 8144, 8145, 40, 3000000, 5} {
		before := g.End()
		start, end := g.Append(make([]byte, n))
		if start < before || start-before > 40 || end != g.End() || end%8 != 0 {
			t.Errorf("%d bytes after %s: from %s to %s, the WAL's end is %s", n, before, start, end, g.End())
		}
		ends = append(ends, end)
	}
	if !slices.Equal(ends, g.Boundaries()) {
		t.Errorf("boundaries %v, want %v", g.Boundaries(), ends)
	}
	if got := walk(t, g, segment, 1); !slices.Equal(got, ends) {
		t.Errorf("followed over %v, want %v", got, ends)
	}

	own := g.End() + 24
	end := g.Switch()
	if end%segment != 0 || end-own > segment || end != g.End() {
		t.Errorf("switched at %s to %s, the WAL's end is %s", own, end, g.End())
	}
	if rest := g.Bytes(own, end); len(bytes.Trim(rest, "\x00")) != 0 {
		t.Error("the rest of the segment is not zero")
	}
	lost, page := g.Abort(make([]byte, 9000), 1)
	if lost != end+40 || page != end+wal.PageSize {
		t.Errorf("gave up %s on %s after %s", lost, page, end)
	}
	target := end + 3*wal.PageSize
	g.FillTo(target)
	if g.End() != target {
		t.Errorf("filled to %s, want %s", g.End(), target)
	}
	ends = append(ends, own)
	ends = append(ends, g.Boundaries()[len(ends)-1:]...)
	if got := walk(t, g, segment, 1); !slices.Equal(got, ends) {
		t.Errorf("followed over %v, want %v", got, ends)
	}
}

func TestWALBytes(t *testing.T) {
	g := pgtest.NewWAL(pgtest.WALConfig{})
	g.Append(make([]byte, 20000))
	all := g.Bytes(segment, g.End())
	if !bytes.Equal(g.Bytes(segment+100, segment+9000), all[100:9000]) {
		t.Error("a part differs from the whole")
	}
	if !bytes.Equal(g.Bytes(g.End()-8, g.End()+8), append(slices.Clone(all[len(all)-8:]), make([]byte, 8)...)) {
		t.Error("not zero after the end")
	}
	if !bytes.Equal(g.Bytes(g.End()+8, g.End()+16), make([]byte, 8)) || len(g.Bytes(segment, segment)) != 0 {
		t.Error("beyond the end, or nothing")
	}
	clear(all)
	if bytes.Equal(g.Bytes(segment, g.End()), all) {
		t.Error("what Bytes returned is no copy")
	}
}

func TestWALFork(t *testing.T) {
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: 42})
	var ends []wal.LSN
	for n := range 5 {
		_, end := g.Append(bytes.Repeat([]byte{1}, n*5000))
		ends = append(ends, end)
	}
	onPage := g.End() - g.End()%wal.PageSize + 2*wal.PageSize
	g.FillTo(onPage)
	g.Append([]byte("lost"))
	before := g.Bytes(segment, g.End())
	for _, at := range append(ends, onPage, segment) {
		f := g.Fork(at, 3)
		f.Append(bytes.Repeat([]byte{2}, 20000))
		f.Append([]byte("more"))
		if !bytes.Equal(f.Bytes(segment, at), g.Bytes(segment, at)) {
			t.Errorf("forked at %s, it differs before", at)
		}
		if got, want := walk(t, f, segment, 3), f.Boundaries(); !slices.Equal(got, want) {
			t.Errorf("forked at %s, followed over %v, want %v", at, got, want)
		}
		next := (at + wal.PageSize - 1) &^ (wal.PageSize - 1)
		if tli := f.Bytes(next+4, next+5)[0]; tli != 3 {
			t.Errorf("forked at %s, page %s is of timeline %d", at, next, tli)
		}
		if at > segment && at != onPage {
			if tli := f.Bytes(next-wal.PageSize+4, next)[0]; tli != 1 {
				t.Errorf("forked at %s, page %s is of timeline %d", at, next-wal.PageSize, tli)
			}
		}
	}
	if !bytes.Equal(before, g.Bytes(segment, g.End())) {
		t.Error("the WAL that was forked has changed")
	}
}

func TestWALConfig(t *testing.T) {
	const start = 5*16<<20 + 3*wal.PageSize
	g := pgtest.NewWAL(pgtest.WALConfig{Timeline: 9, Size: 16 << 20, SystemID: 42, Start: start})
	if g.End() != start {
		t.Errorf("it begins at %s", g.End())
	}
	g.Append(make([]byte, 100000))
	g.Switch()
	g.Append([]byte("x"))
	w := wal.NewWalker(wal.WalkerConfig{Start: start, Timeline: 9, Size: 16 << 20, SystemID: 42, CheckCRC: true})
	if err := w.Feed(g.Bytes(start, g.End())); err != nil || w.Boundary() != g.End() {
		t.Errorf("followed to %s, want %s: %v", w.Boundary(), g.End(), err)
	}
}
