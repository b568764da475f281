package wal

import (
	"hash/crc32"
	"time"
)

// Commit is a moment in WAL: the end of a transaction, as its record says.
type Commit struct {
	End  LSN       // exclusive end of the record, without padding
	Time time.Time // of the server's clock; recovery_target_time is compared with it
}

// CommitScanner finds the times at which transactions committed or aborted (those that a
// recovery_target_time is compared with) in contiguous pages of WAL, fed to it one after the other. It reads
// what is there without judging it: whether WAL is whole a Walker tells. A time counts only if its
// record's CRC is right, and scanning ends where a record does not link to the one before.
//
// It keeps a fixed amount of state.
type CommitScanner struct {
	First, Last Commit // so far; the zero Commit: none
	Until       LSN    // records that end behind it do not count; 0: all do

	size  SegmentSize
	pos   LSN // of the next page
	ended bool

	left   uint32 // bytes of the current record to come, without padding; 0: none is begun
	known  bool   // its beginning was seen
	start  LSN    // of it
	length uint32
	head   [commitHead]byte // its first bytes
	have   int              // how many there are
	crc    uint32           // of what comes after its header, so far
	prev   LSN              // start of the record before; 0: not known
}

// commitHead is how much of a record can stand before the end of xact_time: the header, and headers of an
// origin (3 bytes), a top-level transaction (5), and the data (5 at most), in the order of XLogRecordAssemble
// in xloginsert.c.
const commitHead = recordHeader + 3 + 5 + 5 + 8

// Records of transactions (xact.h). The layout is the same in PostgreSQL 13 to 18: xl_xact_commit and
// xl_xact_abort begin with xact_time, and those of prepared transactions are the same structures.
const (
	rmgrXact       = 1 // RM_XACT_ID
	xactOpMask     = 0x70
	xactCommit     = 0x00
	xactAbort      = 0x20
	commitPrepared = 0x30
	abortPrepared  = 0x40

	// Headers within a record (xlogrecord.h). Records of transactions refer to no blocks.
	idOrigin   = 253 // XLR_BLOCK_ID_ORIGIN, and two bytes
	idTopLevel = 252 // XLR_BLOCK_ID_TOPLEVEL_XID, and four
	idLong     = 254 // XLR_BLOCK_ID_DATA_LONG, and a length of four
	idShort    = 255 // XLR_BLOCK_ID_DATA_SHORT, and a length of one
)

// NewCommitScanner returns a scanner that expects the page at start next.
func NewCommitScanner(size SegmentSize, start LSN) *CommitScanner {
	return &CommitScanner{size: size, pos: start}
}

// Feed takes the next WAL, whole pages but for what stands at the end of p, which is left out. It reports
// whether there can be more: false when what came is no WAL, or the rest of the segment is unused.
func (c *CommitScanner) Feed(p []byte) bool {
	for ; len(p) >= PageSize && !c.ended; p = p[PageSize:] {
		c.ended = !c.page(p[:PageSize])
		c.pos += PageSize
	}
	return !c.ended
}

func (c *CommitScanner) page(p []byte) bool {
	off := pageHeaderSize(c.size, c.pos)
	info, rest := u16(p[2:]), u32(p[16:])
	if p[1] != pageMagicHigh || info&^pageAllFlags != 0 || LSN(u64(p[8:])) != c.pos {
		return false
	}
	switch {
	case info&pageContrecord == 0: // whatever was begun was given up
		c.left = 0
	case c.left == 0 && c.prev == 0: // it began before the first page
		c.left, c.known = rest, false
	case c.left != rest:
		return false
	}
	for off < PageSize {
		if c.left == 0 && !c.begin(c.pos+LSN(off), p[off:]) {
			return false
		}
		n := min(int(c.left), PageSize-off)
		c.take(p[off : off+n])
		off += n
		if c.left == 0 {
			if !c.end(c.pos + LSN(off)) {
				return false
			}
			off = (off + recordAlign - 1) &^ (recordAlign - 1)
		}
	}
	return true
}

// begin starts the record at lsn, whose length at least stands in p.
func (c *CommitScanner) begin(lsn LSN, p []byte) bool {
	c.start, c.length = lsn, u32(p)
	c.left, c.known, c.have, c.crc = c.length, true, 0, 0
	return c.length >= recordHeader
}

// take takes the next bytes of the record.
func (c *CommitScanner) take(p []byte) {
	c.left -= uint32(len(p))
	if !c.known {
		return
	}
	n := copy(c.head[c.have:], p)
	body := p[min(len(p), max(0, recordHeader-c.have)):]
	c.have += n
	if c.have >= recordHeader && c.head[17] == rmgrXact {
		c.crc = crc32.Update(c.crc, crc32c, body)
	}
}

// end judges the record that ends at lsn, without padding. It reports whether it continues what came before.
func (c *CommitScanner) end(lsn LSN) bool {
	if !c.known {
		return true
	}
	h := (*[recordHeader]byte)(c.head[:])
	if prev := LSN(u64(h[8:])); c.prev != 0 && prev != c.prev || prev >= c.start {
		return false
	}
	c.prev = c.start
	if isSwitch(h) {
		return false
	}
	if c.Until != 0 && lsn > c.Until {
		return false
	}
	if when, ok := commitTime(c.head[:c.have]); ok && crc32.Update(c.crc, crc32c, h[:recordCRC]) == u32(h[recordCRC:]) {
		c.Last = Commit{lsn, when}
		if c.First == (Commit{}) {
			c.First = c.Last
		}
	}
	return true
}

// commitTime is the time in the beginning of a record; ok is false for one that has none.
func commitTime(r []byte) (t time.Time, ok bool) {
	if r[17] != rmgrXact {
		return t, false
	}
	switch r[16] & xactOpMask {
	case xactCommit, xactAbort, commitPrepared, abortPrepared:
	default:
		return t, false
	}
	for r = r[recordHeader:]; len(r) > 0; {
		n := 0
		switch r[0] {
		case idOrigin:
			n = 1 + 2
		case idTopLevel:
			n = 1 + 4
		case idShort, idLong:
			n = 1 + 1
			if r[0] == idLong {
				n = 1 + 4
			}
			if len(r) < n+8 {
				return t, false
			}
			// TimestampTz: microseconds since 2000.
			return postgresEpoch.Add(time.Duration(int64(u64(r[n:]))) * time.Microsecond), true
		}
		if n == 0 || n > len(r) {
			return t, false
		}
		r = r[n:]
	}
	return t, false
}

var postgresEpoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)
