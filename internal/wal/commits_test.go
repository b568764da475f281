package wal_test

import (
	"encoding/binary"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

var commitBegin = time.Date(2026, 1, 31, 12, 0, 0, 123456000, time.UTC)

// scan gives pages to a scanner, some at a time.
func scan(c *wal.CommitScanner, p []byte, pages int) bool {
	for more := true; len(p) > 0; {
		n := min(len(p), pages*wal.PageSize)
		if more = c.Feed(p[:n]); !more {
			return false
		}
		p = p[n:]
	}
	return true
}

func TestCommitsAreFoundWhereverTheyLie(t *testing.T) {
	// The record's parts fall on both sides of a page's end.
	for before := wal.LSN(8); before <= 64; before += 8 {
		for _, edge := range []wal.LSN{testStart + 3*wal.PageSize, testStart + testSize} {
			g := newWAL(testStart)
			_, first := g.Commit(commitBegin)
			g.Append(make([]byte, 20000))
			g.FillTo(edge - before)
			_, last := g.Commit(commitBegin.Add(time.Minute))
			g.Append(make([]byte, 9000))
			whole := g.Bytes(testStart, testStart+testSize+4*wal.PageSize)
			for _, pages := range []int{1, 7, 1000} {
				c := wal.NewCommitScanner(testSize, testStart)
				scan(c, whole, pages)
				for name, got := range map[string]wal.Commit{"first": c.First, "last": c.Last} {
					want := wal.Commit{End: first, Time: commitBegin}
					if name == "last" {
						want = wal.Commit{End: last, Time: commitBegin.Add(time.Minute)}
					}
					if (got.End+7)&^7 != want.End || !got.Time.Equal(want.Time) {
						t.Errorf("%d bytes before %s, %d pages at a time: the %s is %+v, want %+v", before, edge, pages, name, got, want)
					}
				}
				// From within the record of 20000 bytes.
				c = wal.NewCommitScanner(testSize, testStart+wal.PageSize)
				scan(c, whole[wal.PageSize:], pages)
				if c.First != c.Last || !c.Last.Time.Equal(commitBegin.Add(time.Minute)) {
					t.Errorf("from the second page: %+v, %+v", c.First, c.Last)
				}
				c = wal.NewCommitScanner(testSize, testStart)
				c.Until = last - 8
				scan(c, whole, pages)
				if c.First != c.Last || !c.Last.Time.Equal(commitBegin) {
					t.Errorf("until %s: %+v, %+v", c.Until, c.First, c.Last)
				}
			}
		}
	}
}

// What is no WAL, or is damaged, has no commits; nor has what stands behind the end of the WAL.
func TestWhatIsNoCommit(t *testing.T) {
	g := newWAL(testStart)
	g.Commit(commitBegin)
	at, _ := g.Commit(commitBegin.Add(time.Minute))
	for name, damage := range map[string]func(p []byte){
		"its time":               func(p []byte) { p[at-testStart+26] ^= 1 },
		"its checksum":           func(p []byte) { p[at-testStart+20] ^= 1 },
		"its link":               func(p []byte) { p[at-testStart+8] ^= 8 },
		"its manager":            func(p []byte) { p[at-testStart+17] = 2 },
		"its kind":               func(p []byte) { p[at-testStart+16] = 0x10 },
		"its length":             func(p []byte) { p[at-testStart] = 3 },
		"a length of a gigabyte": func(p []byte) { p[at-testStart+3] = 0x40 },
	} {
		p := g.Bytes(testStart, testStart+wal.PageSize)
		damage(p)
		c := wal.NewCommitScanner(testSize, testStart)
		scan(c, p, 1)
		if c.First != c.Last || !c.Last.Time.Equal(commitBegin) {
			t.Errorf("%s is wrong: %+v, %+v", name, c.First, c.Last)
		}
	}
	for name, damage := range map[string]func(p []byte){
		"magic":    func(p []byte) { p[1] = 0 },
		"position": func(p []byte) { p[10] ^= 1 },
		"flags":    func(p []byte) { p[2] |= 0x10 },
		"zeros":    func(p []byte) { clear(p) },
	} {
		p := g.Bytes(testStart, testStart+wal.PageSize)
		damage(p)
		if c := wal.NewCommitScanner(testSize, testStart); scan(c, p, 1) || c.First != (wal.Commit{}) {
			t.Errorf("%s: %+v", name, c.First)
		}
	}
	// Behind the end of the WAL there can be what was there before, valid in itself.
	old, young := newWAL(testStart), newWAL(testStart)
	old.Append(make([]byte, 40))
	left, _ := old.Commit(commitBegin)
	young.Append(make([]byte, 8))
	young.Append(make([]byte, 8))
	if young.End() != left {
		t.Fatalf("the WAL ends at %s, not %s", young.End(), left)
	}
	remnant := append(young.Bytes(testStart, left), old.Bytes(testStart, testStart+wal.PageSize)[left-testStart:]...)
	if c := wal.NewCommitScanner(testSize, testStart); scan(c, remnant, 1) || c.First != (wal.Commit{}) {
		t.Errorf("a remnant: %+v", c.First)
	}
	// A segment's unused rest may have anything.
	g.Switch()
	p := g.Bytes(testStart, testStart+testSize)
	copy(p[3*wal.PageSize:], g.Bytes(testStart, testStart+wal.PageSize))
	if c := wal.NewCommitScanner(testSize, testStart); scan(c, p, 100) || !c.Last.Time.Equal(commitBegin.Add(time.Minute)) {
		t.Errorf("after a switch: %+v", c.Last)
	}
}

// Headers of an origin and of a top-level transaction come before the data (XLogRecordAssemble), and the length of
// that takes four bytes where there is much of it.
func TestCommitTimeBehindOtherHeaders(t *testing.T) {
	micros := binary.LittleEndian.AppendUint64(nil, 12345678)
	want := time.Date(2000, 1, 1, 0, 0, 12, 345678000, time.UTC)
	for name, c := range map[string]struct {
		payload []byte
		found   bool
	}{
		"short":             {append([]byte{255, 8}, micros...), true},
		"long":              {append([]byte{254, 8, 0, 0, 0}, micros...), true},
		"origin":            {append([]byte{253, 1, 0, 255, 8}, micros...), true},
		"top level":         {append([]byte{252, 1, 0, 0, 0, 255, 8}, micros...), true},
		"all":               {append([]byte{253, 1, 0, 252, 1, 0, 0, 0, 254, 8, 0, 0, 0}, micros...), true},
		"a block":           {append([]byte{0, 1, 255, 8}, micros...), false},
		"no data":           {[]byte{253, 1, 0}, false},
		"half a time":       {append([]byte{255, 4}, micros[:4]...), false},
		"nothing":           {nil, false},
		"a header in parts": {[]byte{254, 8}, false},
	} {
		g := pgtest.NewWAL(pgtest.WALConfig{Size: testSize, Start: testStart})
		g.Transaction(0, c.payload)
		s := wal.NewCommitScanner(testSize, testStart)
		scan(s, g.Bytes(testStart, testStart+wal.PageSize), 1)
		if found := s.First != (wal.Commit{}); found != c.found || found && !s.First.Time.Equal(want) {
			t.Errorf("%s: %+v", name, s.First)
		}
	}
	for info, found := range map[byte]bool{0: true, 0x80: true, 0x20: true, 0xA0: true, 0x30: true, 0x40: true, 0x10: false, 0x50: false, 0x60: false, 0x70: false} {
		g := pgtest.NewWAL(pgtest.WALConfig{Size: testSize, Start: testStart})
		g.Transaction(info, append([]byte{255, 8}, micros...))
		s := wal.NewCommitScanner(testSize, testStart)
		scan(s, g.Bytes(testStart, testStart+wal.PageSize), 1)
		if (s.First != wal.Commit{}) != found {
			t.Errorf("a record of kind %#x: %+v", info, s.First)
		}
	}
}

func FuzzCommitScanner(f *testing.F) {
	g := newWAL(testStart)
	g.Commit(commitBegin)
	g.Append(make([]byte, 20000))
	g.Commit(commitBegin)
	f.Add(g.Bytes(testStart, testStart+4*wal.PageSize))
	f.Fuzz(func(t *testing.T, p []byte) {
		c := wal.NewCommitScanner(testSize, testStart)
		c.Feed(p)
		if c.Last.End > testStart+wal.LSN(len(p)) {
			t.Errorf("a commit ends at %s", c.Last.End)
		}
	})
}
