package wal

import (
	"fmt"
	"math/bits"
)

// Timeline is a timeline ID (TimeLineID). The first is 1; 0 is none.
type Timeline uint32

// PageSize is the size in bytes of a WAL page (XLOG_BLCKSZ). It can only be changed when PostgreSQL is
// compiled, and pages that were written with another size are refused.
const PageSize = 8192

// SegmentSize is the size in bytes of the files that a cluster's WAL is cut into (wal_segment_size).
type SegmentSize uint32

// Valid tells whether z is a size that PostgreSQL accepts: a power of two from 1 MiB to 1 GiB, both
// included (IsValidWalSegSize in xlog_internal.h). All other methods expect that.
func (z SegmentSize) Valid() bool {
	return z >= 1<<20 && z <= 1<<30 && z&(z-1) == 0
}

// Start is the first position of the segment that contains l.
func (z SegmentSize) Start(l LSN) LSN {
	return l &^ (LSN(z) - 1)
}

// Offset is the distance in bytes of l from the start of the segment that contains it.
func (z SegmentSize) Offset(l LSN) int64 {
	return int64(l - z.Start(l))
}

// Segment is the segment of timeline tli that contains l. A position at the end of a segment belongs to
// the next one.
func (z SegmentSize) Segment(tli Timeline, l LSN) Segment {
	return Segment{Timeline: tli, Start: z.Start(l), Size: z}
}

// Segment is one file of WAL: the bytes from Start (inclusive) to End (exclusive) as timeline Timeline
// has them. Start is a multiple of Size.
type Segment struct {
	Timeline Timeline
	Start    LSN
	Size     SegmentSize
}

// End is the position after the segment's last byte.
func (s Segment) End() LSN {
	return s.Start + LSN(s.Size)
}

// Next is the segment after s on the same timeline.
func (s Segment) Next() Segment {
	s.Start = s.End()
	return s
}

// Name is the segment's file name: the timeline, the upper half of its start, and the segment's number
// within those 4 GiB, in eight upper-case hexadecimal digits each (XLogFileName in xlog_internal.h).
func (s Segment) Name() string {
	return fmt.Sprintf("%08X%08X%08X", uint32(s.Timeline), uint32(s.Start>>32),
		uint32(s.Start)>>bits.TrailingZeros32(uint32(s.Size)))
}

// String is Name.
func (s Segment) String() string {
	return s.Name()
}

// ParseSegment reads a segment's file name, without any suffix, as Name writes it for that size. Names
// that no server writes are refused: timeline 0, a number beyond the 4 GiB that the middle part stands
// for, and the last segment of all, whose end is no LSN.
func ParseSegment(name string, size SegmentSize) (Segment, error) {
	if !size.Valid() {
		return Segment{}, fmt.Errorf("invalid WAL segment size %d", size)
	}
	bad := func(why string) (Segment, error) {
		return Segment{}, fmt.Errorf("invalid WAL segment name %s: %s", quote(name), why)
	}
	if len(name) != 24 {
		return bad("not 24 digits")
	}
	tli, ok1 := parseUpperHex8(name[:8])
	hi, ok2 := parseUpperHex8(name[8:16])
	lo, ok3 := parseUpperHex8(name[16:])
	switch {
	case !ok1 || !ok2 || !ok3:
		return bad("not upper-case hexadecimal")
	case tli == 0:
		return bad("there is no timeline 0")
	case uint64(lo) >= 1<<32/uint64(size):
		return bad(fmt.Sprintf("number out of range for segments of %d bytes", size))
	}
	s := Segment{Timeline: Timeline(tli), Start: LSN(hi)<<32 | LSN(lo)*LSN(size), Size: size}
	if s.End() < s.Start {
		return bad("beyond the last WAL position")
	}
	return s, nil
}
