package wal_test

import (
	"bytes"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"

	"pgregory.net/rapid"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

const (
	testSize   = mb
	testStart  = wal.LSN(mb) // where pgtest begins
	testSystem = 7000000000000000001
)

func newWAL(start wal.LSN) *pgtest.WAL {
	return pgtest.NewWAL(pgtest.WALConfig{Size: testSize, SystemID: testSystem, Start: start})
}

func config(start wal.LSN, crc bool) wal.WalkerConfig {
	return wal.WalkerConfig{Start: start, Timeline: 1, Size: testSize, SystemID: testSystem, CheckCRC: crc}
}

// bothModes runs f with and without CheckCRC.
func bothModes(t *testing.T, f func(t *testing.T, crc bool)) {
	for _, crc := range []bool{false, true} {
		t.Run(fmt.Sprintf("crc=%v", crc), func(t *testing.T) { f(t, crc) })
	}
}

// boundaryAt is the last of ends (ascending) that is not above pos, or start.
func boundaryAt(start wal.LSN, ends []wal.LSN, pos wal.LSN) wal.LSN {
	b := start
	for _, e := range ends {
		if e <= pos {
			b = e
		}
	}
	return b
}

// mustFeed feeds g to w up to to, in single bytes near the given ends of records and in bigger pieces
// elsewhere, and checks the boundary after each.
func mustFeed(t *testing.T, w *wal.Walker, g *pgtest.WAL, to wal.LSN, ends []wal.LSN) {
	t.Helper()
	start := w.Pos()
	for w.Pos() < to {
		n := min(200, to-w.Pos())
		if slices.ContainsFunc(ends, func(e wal.LSN) bool { return e < w.Pos()+210 && e+50 > w.Pos() }) {
			n = 1
		}
		if err := w.Feed(g.Bytes(w.Pos(), w.Pos()+n)); err != nil {
			t.Fatal(err)
		}
		if want := boundaryAt(start, ends, w.Pos()); w.Boundary() != want {
			t.Fatalf("fed from %s to %s, the boundary is %s, want %s", start, w.Pos(), w.Boundary(), want)
		}
	}
}

// Records of all lengths that end or begin around the end of a page and of a segment.
func TestWalkerLengths(t *testing.T) {
	const segEnd = testStart + testSize
	bothModes(t, func(t *testing.T, crc bool) {
		for _, edge := range []wal.LSN{testStart + 3*wal.PageSize, segEnd} {
			for before := wal.LSN(0); before <= 64; before += 8 { // the record starts so many bytes before edge
				for _, payload := range []int{0, 1, 7, 8, 9, 16, 24, 31, 32, 40, 8127, 8128, 8129, 8143, 8144, 8145, 8152, 8168, 8169, 20000} {
					start := edge - 2*wal.PageSize
					g := newWAL(start)
					g.FillTo(edge - before)
					g.Append(bytes.Repeat([]byte{0xA5}, payload))
					g.Append([]byte("next"))
					w := wal.NewWalker(config(start, crc))
					mustFeed(t, w, g, g.End(), g.Boundaries())
					if w.Boundary() != g.End() || w.Pos() != g.End() {
						t.Fatalf("%d bytes at %s: followed to %s, want %s", payload, edge-before, w.Boundary(), g.End())
					}
				}
			}
		}
	})
}

// After an XLOG_SWITCH the boundary is its own end, then its segment's, wherever it lies.
func TestWalkerSwitch(t *testing.T) {
	const segEnd = testStart + testSize
	bothModes(t, func(t *testing.T, crc bool) {
		for _, c := range []struct {
			name     string
			at       wal.LSN // end of the record before the XLOG_SWITCH
			own, end wal.LSN // end of the XLOG_SWITCH, and of the segment that it leaves
		}{
			{"in a page", testStart + 1000, testStart + 1024, segEnd},
			{"to the end of a page", testStart + 3*8192 - 24, testStart + 3*8192, segEnd},
			{"over the end of a page", testStart + 3*8192 - 16, testStart + 3*8192 + 24 + 8, segEnd},
			{"over the end of a page, length only", testStart + 3*8192 - 8, testStart + 3*8192 + 24 + 16, segEnd},
			{"first in a page", testStart + 3*8192, testStart + 3*8192 + 24 + 24, segEnd},
			{"last page", segEnd - 40, segEnd - 16, segEnd},
			{"to the end of the segment", segEnd - 24, segEnd, segEnd},
			{"over the end of the segment", segEnd - 16, segEnd + 40 + 8, segEnd + testSize},
			{"over the end of the segment, length only", segEnd - 8, segEnd + 40 + 16, segEnd + testSize},
			{"first in a segment", segEnd, segEnd + 40 + 24, segEnd + testSize},
		} {
			t.Run(c.name, func(t *testing.T) {
				g := newWAL(testStart)
				g.FillTo(c.at)
				if end := g.Switch(); end != c.end {
					t.Fatalf("pgtest switched to %s, want %s", end, c.end)
				}
				g.Append([]byte("next"))
				ends := []wal.LSN{c.at, c.own, c.end, g.End()}
				from := max(testStart, c.at-c.at%wal.PageSize-wal.PageSize)
				mustFeed(t, wal.NewWalker(config(from, crc)), g, g.End(), ends)
				mustFeed(t, wal.NewWalker(config(testStart, crc)), g, g.End(), ends)
			})
		}
	})
}

// A walker that starts within an XLOG_SWITCH follows it too, but takes the segment for complete only when
// the next one shows that the zeros were no preallocated file's.
func TestWalkerStartsWithinSwitch(t *testing.T) {
	const segEnd = testStart + testSize
	bothModes(t, func(t *testing.T, crc bool) {
		for _, before := range []wal.LSN{8, 16} {
			for _, edge := range []wal.LSN{testStart + 3*wal.PageSize, segEnd} {
				g := newWAL(testStart)
				g.FillTo(edge - before)
				own := edge + 24 + 24 - before
				if edge == segEnd {
					own += 16
				}
				end := g.Switch()
				g.Append([]byte("next"))
				header := wal.LSN(40)
				w := wal.NewWalker(config(edge, crc))
				mustFeed(t, w, g, end, []wal.LSN{own})
				if w.ProvenFrom() != w.Pos() {
					t.Errorf("proven from %s, want %s", w.ProvenFrom(), w.Pos())
				}
				for w.Pos() < g.End() {
					if err := w.Feed(g.Bytes(w.Pos(), w.Pos()+1)); err != nil {
						t.Fatal(err)
					}
					if want := boundaryAt(own, []wal.LSN{g.End()}, w.Pos()); w.Pos() < end+header && w.Boundary() != want {
						t.Fatalf("at %s: %s, want %s", w.Pos(), w.Boundary(), want)
					} else if want := boundaryAt(end, []wal.LSN{g.End()}, w.Pos()); w.Pos() >= end+header && w.Boundary() != want {
						t.Fatalf("at %s: %s, want %s", w.Pos(), w.Boundary(), want)
					}
				}
				if w.ProvenFrom() != end {
					t.Errorf("proven from %s, want %s", w.ProvenFrom(), end)
				}

				// The record after it must say where it was.
				p := g.Bytes(edge, g.End())
				p[end+header-edge+8] ^= 8
				w = wal.NewWalker(config(edge, false))
				wantCorrupt(t, w.Feed(p), end+header)
			}
		}
	})
}

// Data at the end of a record can look like an XLOG_SWITCH, and so does what is left of the file then: the
// boundary must not pass the record.
func TestWalkerStartsWithinLookalike(t *testing.T) {
	const edge = testStart + 3*wal.PageSize
	bothModes(t, func(t *testing.T, crc bool) {
		for _, tail := range []int{8, 16} {
			g := newWAL(testStart)
			g.FillTo(edge - 128)
			payload := make([]byte, 128-24+tail)
			payload[len(payload)-8] = 0x40
			_, end := g.Append(payload)

			w := wal.NewWalker(config(edge, crc))
			mustFeed(t, w, g, testStart+testSize, []wal.LSN{end})
			wantCorrupt(t, w.Feed(make([]byte, 40)), testStart+testSize)
			if w.Boundary() != end {
				t.Errorf("the boundary is %s, want %s", w.Boundary(), end)
			}

			start, next := g.Append([]byte("next"))
			w = wal.NewWalker(config(edge, crc))
			mustFeed(t, w, g, next, []wal.LSN{end, next})
			if w.ProvenFrom() != start {
				t.Errorf("proven from %s, want %s", w.ProvenFrom(), start)
			}
			wantCorrupt(t, w.Feed(make([]byte, 8)), next)

			// With another type there is nothing to mistake.
			p := g.Bytes(edge, end)
			p[len(p)-7] = 1
			w = wal.NewWalker(config(edge, crc))
			wantCorrupt(t, w.Feed(append(p, make([]byte, 100)...)), end)
		}
	})
}

// An incomplete record that the server gave up when it restarted stays the boundary until the record that
// takes its place is complete.
func TestWalkerOverwrite(t *testing.T) {
	bothModes(t, func(t *testing.T, crc bool) {
		for before := wal.LSN(8); before <= 48; before += 8 {
			for _, edge := range []wal.LSN{testStart + 3*wal.PageSize, testStart + testSize} {
				for _, pages := range []int{1, 2, 3} {
					start := edge - 2*wal.PageSize
					g := newWAL(start)
					g.FillTo(edge - before)
					lost, page := g.Abort(make([]byte, 100000), pages)
					g.Append([]byte("next"))
					if lost != edge-before {
						t.Fatalf("pgtest lost %s, want %s", lost, edge-before)
					}
					ends := g.Boundaries()
					w := wal.NewWalker(config(start, crc))
					mustFeed(t, w, g, g.End(), ends)
					if w.Boundary() != g.End() || w.ProvenFrom() != start {
						t.Errorf("followed from %s to %s, want %s", w.ProvenFrom(), w.Boundary(), g.End())
					}
					// From within the record that is given up, and from the page that says so.
					for from := edge; from <= page; from += wal.PageSize {
						w := wal.NewWalker(config(from, crc))
						mustFeed(t, w, g, g.End(), ends[1:])
						if w.ProvenFrom() != page {
							t.Errorf("from %s: proven from %s, want %s", from, w.ProvenFrom(), page)
						}
					}
				}
			}
		}
	})
}

// What stands in a header that is to be split over a page may be a remnant of a recycled file, which a server
// gives up like any other record (XLogDecodeNextRecord does not judge it before the header is whole).
func TestWalkerOverwriteAfterRemnant(t *testing.T) {
	const edge = testStart + 3*wal.PageSize
	g := newWAL(testStart)
	g.FillTo(edge - 16)
	lost, page := g.Abort(make([]byte, 100), 1)
	p := g.Bytes(testStart, g.End())
	for i := lost; i < page; i++ {
		p[i-testStart] = 0xFF
	}
	bothModes(t, func(t *testing.T, crc bool) {
		w := wal.NewWalker(config(testStart, crc))
		if err := w.Feed(p); err != nil || w.Boundary() != g.End() {
			t.Errorf("followed to %s, want %s: %v", w.Boundary(), g.End(), err)
		}
	})
}

// A walker may start at any page. What belongs to a record that began before is not proven.
func TestWalkerStartsAnywhere(t *testing.T) {
	g := newWAL(testStart)
	var starts []wal.LSN
	for _, n := range []int{10, 8000, 100, 8192 - 24 - 24 - 100, 30000, 1, 2, 70000, 0, 16000} {
		start, _ := g.Append(make([]byte, n))
		starts = append(starts, start)
	}
	bothModes(t, func(t *testing.T, crc bool) {
		for from := testStart; from < g.End(); from += wal.PageSize {
			w := wal.NewWalker(config(from, crc))
			ends := slices.DeleteFunc(g.Boundaries(), func(e wal.LSN) bool { return e <= from })
			mustFeed(t, w, g, g.End(), ends)
			want := ends[0]
			if from == testStart || slices.Contains(starts, from+24) {
				want = from // a record begins with the page
			}
			if w.ProvenFrom() != want {
				t.Errorf("from %s: proven from %s, want %s", from, w.ProvenFrom(), want)
			}
		}
	})

	w := wal.NewWalker(config(testStart+6*wal.PageSize, true)) // within the 70000 bytes
	if err := w.Feed(g.Bytes(testStart+6*wal.PageSize, testStart+7*wal.PageSize)); err != nil {
		t.Fatal(err)
	}
	if w.Boundary() != testStart+6*wal.PageSize || w.ProvenFrom() != w.Pos() {
		t.Errorf("within one record: boundary %s, proven from %s", w.Boundary(), w.ProvenFrom())
	}
}

// After a fork the timeline's own pages follow those of its ancestors.
func TestWalkerTimelines(t *testing.T) {
	old := newWAL(testStart)
	_, at := old.Append(make([]byte, 20000))
	old.Append(make([]byte, 30000))
	g := old.Fork(at, 3)
	g.Append(make([]byte, 30000))
	first := at - at%wal.PageSize + wal.PageSize // of the new timeline

	for _, c := range []struct {
		name string
		tli  wal.Timeline
		edit func(p []byte)
		at   wal.LSN // of the fault; 0 = none
	}{
		{"its own", 3, nil, 0},
		{"a later one", 5, nil, 0},
		{"an ancestor's", 2, nil, first},
		{"descending", 3, func(p []byte) { p[first+wal.PageSize-testStart+4] = 2 }, first + wal.PageSize},
		{"none", 3, func(p []byte) { p[first-testStart+4] = 0 }, first},
	} {
		bothModes(t, func(t *testing.T, crc bool) {
			cfg := config(testStart, crc)
			cfg.Timeline = c.tli
			w := wal.NewWalker(cfg)
			p := g.Bytes(testStart, g.End())
			if c.edit != nil {
				c.edit(p)
			}
			err := w.Feed(p)
			switch {
			case c.at == 0 && (err != nil || w.Boundary() != g.End()):
				t.Errorf("%s: followed to %s, want %s: %v", c.name, w.Boundary(), g.End(), err)
			case c.at != 0:
				wantCorrupt(t, err, c.at)
				if w.Boundary() != at {
					t.Errorf("%s: the boundary is %s, want %s", c.name, w.Boundary(), at)
				}
			}
		})
	}
}

// Every field that is checked, each with one wrong value.
func TestWalkerRefuses(t *testing.T) {
	g := newWAL(testStart)
	const page = testStart + wal.PageSize // goes on with the first record
	first, _ := g.Append(make([]byte, 10000))
	second, end := g.Append(make([]byte, 100))
	third, _ := g.Append(make([]byte, 8192-24-24-int(end%wal.PageSize)))
	const whole = testStart + 3*wal.PageSize // begins with a record
	g.FillTo(whole)
	fifth, _ := g.Append([]byte("fifth"))
	if fifth != whole+24 {
		t.Fatalf("the fifth record is at %s", fifth)
	}

	for _, c := range []struct {
		name     string
		at       wal.LSN // of the byte
		xor      byte
		fault    wal.LSN
		boundary wal.LSN
		crcOnly  bool
	}{
		{"magic, upper byte", page + 1, 1, page, testStart, false},
		{"flags, upper byte", page + 3, 1, page, testStart, false},
		{"an unknown flag", page + 2, 0x10, page, testStart, false},
		{"no long header at a segment's start", testStart + 2, 2, testStart, testStart, false},
		{"long header within a segment", page + 2, 2, page, testStart, false},
		{"timeline", page + 4, 2, page, testStart, false},
		{"no timeline", testStart + 4, 1, testStart, testStart, false},
		{"address, lowest byte", page + 8, 1, page, testStart, false},
		{"address, highest byte", page + 15, 1, page, testStart, false},
		{"rest of the record", page + 16, 1, page, testStart, false},
		{"no rest of the record", page + 2, 1, page, testStart, false},
		{"a rest where there is none", whole + 2, 1, whole, whole, false},
		{"both continued and given up", page + 2, 8, page, testStart, false},
		{"system identifier", testStart + 24, 1, testStart, testStart, false},
		{"segment size", testStart + 35, 1, testStart, testStart, false},
		{"page size", testStart + 37, 1, testStart, testStart, false},
		{"length of a record on two pages", first, 1, page, testStart, false},
		{"length of a record, to 1", second, 100 + 24 ^ 1, second, second, false},
		{"length of a record, to 23", second, 100 + 24 ^ 23, second, second, false},
		{"link to the record before", third + 8, 8, third, third, false},
		{"link to the record before, high byte", third + 15, 0x80, third, third, false},
		{"link of the first record", first + 15, 0x80, first, testStart, false},
		{"transaction", second + 4, 1, second, second, true},
		{"flags of a record", second + 16, 1, second, second, true},
		{"manager of a record", second + 17, 0x80, second, second, true},
		{"checksum", second + 20, 1, second, second, true},
		{"first byte of the data", second + 24, 1, second, second, true},
		{"last byte of the data", second + 123, 0x80, second, second, true},
		{"data after a page's end", page + 24, 1, first, testStart, true},
	} {
		bothModes(t, func(t *testing.T, crc bool) {
			for _, step := range []int{1, 7, 1 << 20} {
				p := g.Bytes(testStart, g.End())
				p[c.at-testStart] ^= c.xor
				w := wal.NewWalker(config(testStart, crc))
				var err error
				for len(p) > 0 && err == nil {
					n := min(step, len(p))
					err = w.Feed(p[:n])
					p = p[n:]
				}
				if c.crcOnly && !crc {
					if err != nil || w.Boundary() != g.End() {
						t.Errorf("%s: looked at without CheckCRC: %s, %v", c.name, w.Boundary(), err)
					}
					continue
				}
				wantCorrupt(t, err, c.fault)
				if w.Boundary() != c.boundary || w.Pos() < w.Boundary() || t.Failed() {
					t.Fatalf("%s: the boundary is %s, want %s; fed to %s: %v", c.name, w.Boundary(), c.boundary, w.Pos(), err)
				}
				pos := w.Pos()
				if again := w.Feed(g.Bytes(testStart, g.End())); again != err || w.Pos() != pos || w.Boundary() != c.boundary {
					t.Errorf("%s: fed again: %v at %s", c.name, again, w.Pos())
				}
			}
		})
	}
}

// The first page that is fed may go on with a record of which nothing is known, but not with nothing of it.
func TestWalkerRefusesEmptyRest(t *testing.T) {
	g := newWAL(testStart)
	g.FillTo(testStart + wal.PageSize)
	g.Append([]byte("second page"))
	p := g.Bytes(testStart+wal.PageSize, g.End())
	p[2] |= 1
	w := wal.NewWalker(config(testStart+wal.PageSize, true))
	wantCorrupt(t, w.Feed(p), testStart+wal.PageSize)
}

// What may differ between valid pages.
func TestWalkerAccepts(t *testing.T) {
	g := newWAL(testStart)
	g.Append(make([]byte, 50000))
	p := g.Bytes(testStart, g.End())
	p[0] = 0x06             // magic number of PostgreSQL 13
	p[2] |= 4               // XLP_BKP_REMOVABLE
	p[wal.PageSize+2] |= 4  //
	p[wal.PageSize+20] = 99 // padding of the page header
	cfg := config(testStart, true)
	cfg.SystemID = 0
	w := wal.NewWalker(cfg)
	if err := w.Feed(p); err != nil || w.Boundary() != g.End() {
		t.Errorf("followed to %s, want %s: %v", w.Boundary(), g.End(), err)
	}
}

// The end of valid WAL in a file that was filled ahead of it.
func TestWalkerZeros(t *testing.T) {
	bothModes(t, func(t *testing.T, crc bool) {
		for _, end := range []wal.LSN{testStart + 1024, testStart + wal.PageSize - 8, testStart + wal.PageSize, testStart + 5*wal.PageSize - 32} {
			g := newWAL(testStart)
			g.FillTo(end)
			w := wal.NewWalker(config(testStart, crc))
			wantCorrupt(t, w.Feed(g.Bytes(testStart, testStart+testSize)), end)
			if w.Boundary() != end {
				t.Errorf("the boundary is %s, want %s", w.Boundary(), end)
			}
		}
	})
	w := wal.NewWalker(config(testStart, true))
	wantCorrupt(t, w.Feed(make([]byte, wal.PageSize)), testStart)
}

func TestWalkerConfig(t *testing.T) {
	good := config(testStart, false)
	for name, edit := range map[string]func(*wal.WalkerConfig){
		"start":    func(c *wal.WalkerConfig) { c.Start++ },
		"timeline": func(c *wal.WalkerConfig) { c.Timeline = 0 },
		"size":     func(c *wal.WalkerConfig) { c.Size = 3 * mb },
		"no size":  func(c *wal.WalkerConfig) { c.Size = 0 },
	} {
		c := good
		edit(&c)
		w := wal.NewWalker(c)
		var ce *wal.CorruptError
		if err := w.Feed([]byte{0}); err == nil || errors.As(err, &ce) {
			t.Errorf("%s: got %v", name, err)
		}
		if w.Pos() != c.Start || w.Boundary() != c.Start {
			t.Errorf("%s: at %s, %s", name, w.Pos(), w.Boundary())
		}
	}
	w := wal.NewWalker(good)
	if err := w.Feed(nil); err != nil || w.Pos() != testStart || w.Boundary() != testStart || w.ProvenFrom() != testStart {
		t.Errorf("nothing fed: %s, %s, %v", w.Pos(), w.Boundary(), err)
	}
}

// Feeding allocates nothing, whatever the pieces.
func TestWalkerAllocations(t *testing.T) {
	g := newWAL(testStart)
	for g.End() < testStart+testSize/2 {
		g.Append(make([]byte, 70))
		g.Append(make([]byte, 9000))
	}
	g.Switch()
	p := g.Bytes(testStart, g.End())
	bothModes(t, func(t *testing.T, crc bool) {
		for _, step := range []int{13, 4096, 100000} {
			var err error
			n := testing.AllocsPerRun(2, func() {
				w := wal.NewWalker(config(testStart, crc))
				for off := 0; off < len(p) && err == nil; off += step {
					err = w.Feed(p[off:min(off+step, len(p))])
				}
			})
			if err != nil || n > 1 { // one for the walker itself
				t.Errorf("pieces of %d bytes: %v allocations, %v", step, n, err)
			}
		}
	})
}

// drawWAL makes WAL of everything that occurs, with lengths that often meet the ends of pages.
func drawWAL(t *rapid.T) (g *pgtest.WAL, start wal.LSN) {
	start = testStart + testSize - wal.LSN(rapid.IntRange(0, 5).Draw(t, "pages before a segment's end"))*wal.PageSize
	g = newWAL(start)
	payload := func() []byte {
		n := rapid.OneOf(rapid.IntRange(0, 300), rapid.IntRange(8050, 8250), rapid.IntRange(0, 40000)).Draw(t, "payload")
		return bytes.Repeat([]byte{byte(n), 0x40, 0}, n/3+1)[:n]
	}
	for range rapid.IntRange(1, 12).Draw(t, "records") {
		switch rapid.IntRange(0, 20).Draw(t, "kind") {
		case 0:
			g.Switch()
		case 1:
			g.Abort(make([]byte, 40000), rapid.IntRange(1, 4).Draw(t, "pages"))
		case 2, 3, 4:
			next := g.End() - g.End()%wal.PageSize + 2*wal.PageSize
			g.FillTo(next - wal.LSN(rapid.IntRange(0, 8).Draw(t, "before the end of the page"))*8)
		default:
			g.Append(payload())
		}
	}
	return g, start
}

// However WAL is cut, the walker says the same after the same byte.
func TestWalkerSplits(t *testing.T) {
	bothModes(t, func(t *testing.T, crc bool) {
		rapid.Check(t, func(t *rapid.T) {
			g, start := drawWAL(t)
			end := g.End() + wal.LSN(rapid.SampledFrom([]int{0, 0, 1, 8, 100}).Draw(t, "zeros"))
			from := start + wal.LSN(rapid.IntRange(0, int((g.End()-start-1)/wal.PageSize)).Draw(t, "first page"))*wal.PageSize
			p := g.Bytes(from, end)
			for range rapid.SampledFrom([]int{0, 0, 1, 3}).Draw(t, "faults") {
				p[rapid.IntRange(0, len(p)-1).Draw(t, "fault")] ^= 1 << rapid.IntRange(0, 7).Draw(t, "bit")
			}
			a, b := wal.NewWalker(config(from, crc)), wal.NewWalker(config(from, crc))
			var errA, errB error
			for len(p) > 0 && errA == nil {
				n := min(len(p), rapid.OneOf(rapid.IntRange(1, 40), rapid.IntRange(8100, 8300), rapid.IntRange(1, 200000)).Draw(t, "piece"))
				if n == len(p) {
					n = max(1, n/2)
				}
				before := a.Boundary()
				errA = a.Feed(p[:n])
				cut := rapid.IntRange(1, 9).Draw(t, "smaller piece")
				if n > 1000 {
					cut = rapid.IntRange(n/40, n).Draw(t, "smaller piece")
				}
				for q := p[:n]; len(q) > 0 && errB == nil; {
					k := min(cut, len(q))
					errB = b.Feed(q[:k])
					q = q[k:]
				}
				p = p[n:]
				if a.Boundary() != b.Boundary() || fmt.Sprint(errA) != fmt.Sprint(errB) {
					t.Fatalf("boundary %s, in smaller pieces %s; %v, %v", a.Boundary(), b.Boundary(), errA, errB)
				}
				if errA == nil && (a.Pos() != b.Pos() || a.ProvenFrom() != b.ProvenFrom()) {
					t.Fatalf("fed to %s, in smaller pieces to %s; proven from %s, %s", a.Pos(), b.Pos(), a.ProvenFrom(), b.ProvenFrom())
				}
				if a.Boundary() < before || a.Boundary() > a.Pos() || a.Boundary()%8 != 0 {
					t.Fatalf("boundary %s after %s, fed to %s", a.Boundary(), before, a.Pos())
				}
			}
		})
	})
}

// All valid WAL is followed to its end, from its start.
func TestWalkerFollows(t *testing.T) {
	bothModes(t, func(t *testing.T, crc bool) {
		rapid.Check(t, func(t *rapid.T) {
			g, start := drawWAL(t)
			w := wal.NewWalker(config(start, crc))
			if err := w.Feed(g.Bytes(start, g.End())); err != nil || w.Boundary() != g.End() {
				t.Fatalf("followed to %s, want %s: %v", w.Boundary(), g.End(), err)
			}
		})
	})
}

// Promise 2: with CheckCRC no record that has a changed byte counts as valid.
func TestWalkerFindsChangedByte(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		const start = testStart + testSize - 5*wal.PageSize
		g := newWAL(start)
		var starts, ends []wal.LSN
		for range rapid.IntRange(1, 10).Draw(t, "records") {
			begin, end := g.Append(make([]byte, 8*rapid.IntRange(0, 3000).Draw(t, "payload/8")))
			starts, ends = append(starts, begin), append(ends, end)
		}
		i := rapid.IntRange(0, len(starts)-1).Draw(t, "changed record")
		p := g.Bytes(start, g.End())
		at := starts[i] + wal.LSN(rapid.IntRange(0, int(ends[i]-starts[i])-1).Draw(t, "changed byte"))
		if off := at % wal.PageSize; off < 24 || at%testSize < 40 {
			t.Skip("in a page header")
		}
		p[at-start] ^= byte(rapid.IntRange(1, 255).Draw(t, "changed bits"))
		w := wal.NewWalker(config(start, true))
		err := w.Feed(p)
		if w.Boundary() > starts[i] {
			t.Fatalf("%s changed in the record at %s, but followed to %s: %v", at, starts[i], w.Boundary(), err)
		}
	})
}

// FuzzWalker changes bytes of valid WAL (edits: two bytes of position, one of value, …), starts at one of its
// pages and cuts it as cuts says.
func FuzzWalker(f *testing.F) {
	const from = testStart + testSize - 4*wal.PageSize // 8 pages around the end of a segment
	base := newWAL(from)
	for _, n := range []int{0, 40, 100, 8000, 300} {
		base.Append(bytes.Repeat([]byte{0x40, 0}, n))
	}
	base.Abort(make([]byte, 9000), 1)
	base.FillTo(testStart + testSize - 16)
	base.Append(make([]byte, 12000))
	base.Append(make([]byte, 10))
	base.FillTo(testStart + testSize + 2*wal.PageSize - 8)
	base.Switch()

	f.Add([]byte(nil), []byte{1}, uint8(0), true)
	f.Add([]byte{0, 40, 24, 0, 41, 0}, []byte{255, 3}, uint8(0), false)
	f.Add([]byte{0x20, 2, 1}, []byte{7, 200}, uint8(1), true)
	f.Fuzz(func(t *testing.T, edits, cuts []byte, page uint8, crc bool) {
		p := base.Bytes(from, from+8*wal.PageSize)
		for len(edits) >= 3 {
			p[binary.BigEndian.Uint16(edits)] = edits[2]
			edits = edits[3:]
		}
		skip := int(page%8) * wal.PageSize
		start := from + wal.LSN(skip)
		p = p[skip:]

		whole := wal.NewWalker(config(start, crc))
		wholeErr := whole.Feed(p)
		w := wal.NewWalker(config(start, crc))
		var err error
		for i := 0; len(p) > 0 && err == nil; i++ {
			n := len(p)
			if len(cuts) > 0 {
				n = min(n, 1+int(cuts[i%len(cuts)])*(1+i%50))
			}
			before := w.Boundary()
			err = w.Feed(p[:n])
			if w.Boundary() < before || w.Boundary() > w.Pos() || w.Boundary()%8 != 0 {
				t.Fatalf("boundary %s after %s, fed to %s", w.Boundary(), before, w.Pos())
			}
			p = p[n:]
		}
		if w.Boundary() != whole.Boundary() || fmt.Sprint(err) != fmt.Sprint(wholeErr) {
			t.Errorf("boundary %s, fed at once %s; %v, %v", w.Boundary(), whole.Boundary(), err, wholeErr)
		}
	})
}

func wantCorrupt(t *testing.T, err error, at wal.LSN) {
	t.Helper()
	var ce *wal.CorruptError
	if !errors.As(err, &ce) || ce.LSN != at || ce.Reason == "" || !strings.Contains(err.Error(), at.String()) {
		t.Errorf("got %v, want a fault at %s", err, at)
	}
}
