package wal_test

import (
	"fmt"
	"math"
	"testing"

	"pgregory.net/rapid"

	"github.com/walfleet/walfleet/internal/wal"
)

const (
	mb = 1 << 20
	gb = 1 << 30
)

func TestSegmentSize(t *testing.T) {
	for z, want := range map[wal.SegmentSize]bool{
		0: false, 1: false, 8192: false, mb - 1: false, mb: true, mb + 1: false, 2 * mb: true, 3 * mb: false,
		16 * mb: true, 512 * mb: true, gb - 1: false, gb: true, gb + 1: false, 2 * gb: false, math.MaxUint32: false,
	} {
		if z.Valid() != want {
			t.Errorf("SegmentSize(%d).Valid() = %v", z, !want)
		}
		_ = wal.Segment{Timeline: 1, Start: 1, Size: z}.Name() // must not panic
	}
}

// What XLogFileName gives; those of 1 GiB as PolarDB was seen to name them.
var segmentNames = []struct {
	name  string
	size  wal.SegmentSize
	tli   wal.Timeline
	start wal.LSN
}{
	{"000000010000000000000001", 16 * mb, 1, 0x1000000},
	{"0000000100000000000000FF", 16 * mb, 1, 0xFF000000},
	{"000000010000000100000000", 16 * mb, 1, 0x100000000},
	{"0000000A00000010000000FE", 16 * mb, 10, 0x10FE000000},
	{"000000010000000000000003", gb, 1, 0xC0000000},
	{"000000010000000100000000", gb, 1, 0x100000000},
	{"000000010000000000000FFF", mb, 1, 0xFFF00000},
	{"000000010000000100000000", mb, 1, 0x100000000},
	{"FFFFFFFFFFFFFFFF000000FE", 16 * mb, math.MaxUint32, 0xFFFFFFFFFE000000},
	{"000000010000000000000000", 16 * mb, 1, 0},
}

func TestSegment(t *testing.T) {
	for _, c := range segmentNames {
		s, err := wal.ParseSegment(c.name, c.size)
		want := wal.Segment{Timeline: c.tli, Start: c.start, Size: c.size}
		if err != nil || s != want {
			t.Errorf("ParseSegment(%s, %d) = %#v, %v", c.name, c.size, s, err)
			continue
		}
		if s.Name() != c.name || s.String() != c.name {
			t.Errorf("%#v is named %s, want %s", s, s.Name(), c.name)
		}
		for _, l := range []wal.LSN{s.Start, s.Start + 1, s.End() - 1} {
			if got := c.size.Segment(c.tli, l); got != s || c.size.Start(l) != s.Start || c.size.Offset(l) != int64(l-s.Start) {
				t.Errorf("the segment of %s is %s, want %s", l, got, s)
			}
		}
		if got := c.size.Segment(c.tli, s.End()); got != s.Next() || got.Start != s.End() {
			t.Errorf("the segment of %s is %s, want %s", s.End(), got, s.Next())
		}
	}
}

func TestParseSegmentRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		size wal.SegmentSize
	}{
		{"", 16 * mb},
		{"00000001000000000000000", 16 * mb},
		{"0000000100000000000000011", 16 * mb},
		{"000000010000000000000001.partial", 16 * mb},
		{"00000001000000000000000a", 16 * mb},
		{"00000001000000000000000G", 16 * mb},
		{"00000001000000000000000 ", 16 * mb},
		{"+00000010000000000000001", 16 * mb},
		{"000000000000000000000001", 16 * mb}, // timeline 0
		{"000000010000000000000100", 16 * mb}, // 256 in 4 GiB
		{"000000010000000000000004", gb},
		{"000000010000000000001000", mb},
		{"0000000100000000FFFFFFFF", 16 * mb},
		{"00000001FFFFFFFF000000FF", 16 * mb}, // its end is 2^64
		{"000000010000000000000001", 0},
		{"000000010000000000000001", 15 * mb},
		{"00000001000000000000000١", 16 * mb},
	} {
		if s, err := wal.ParseSegment(c.name, c.size); err == nil {
			t.Errorf("ParseSegment(%q, %d) = %#v", c.name, c.size, s)
		}
	}
}

func TestSegmentRoundTrip(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		z := wal.SegmentSize(1 << rapid.IntRange(20, 30).Draw(t, "log2 of the size"))
		l := wal.LSN(rapid.Uint64Max(math.MaxUint64-gb).Draw(t, "position"))
		s := z.Segment(wal.Timeline(rapid.Uint32Min(1).Draw(t, "timeline")), l)
		if s.Start > l || l >= s.End() {
			t.Fatalf("%s is not within %s to %s", l, s.Start, s.End())
		}
		got, err := wal.ParseSegment(s.Name(), z)
		if err != nil || got != s {
			t.Fatalf("%s parses as %#v, %v", s, got, err)
		}
		// XLogFileName, in its own words
		no, per := uint64(l)/uint64(z), uint64(0x100000000)/uint64(z)
		if want := fmt.Sprintf("%08X%08X%08X", s.Timeline, no/per, no%per); s.Name() != want {
			t.Fatalf("%s, want %s", s, want)
		}
	})
}

func FuzzParseSegment(f *testing.F) {
	for _, c := range segmentNames {
		f.Add(c.name, uint32(c.size))
	}
	f.Fuzz(func(t *testing.T, name string, size uint32) {
		s, err := wal.ParseSegment(name, wal.SegmentSize(size))
		if err != nil {
			return
		}
		if s.Name() != name || s.End() <= s.Start || s.Timeline == 0 || !s.Size.Valid() {
			t.Errorf("ParseSegment(%q, %d) = %#v", name, size, s)
		}
	})
}
