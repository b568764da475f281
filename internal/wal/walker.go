package wal

import (
	"bytes"
	"fmt"
	"hash/crc32"
)

// WalkerConfig says what a Walker is going to be fed.
type WalkerConfig struct {
	Start    LSN         // position of the first byte; the start of a page
	Timeline Timeline    // timeline that the WAL is of; pages from before a fork may carry an ancestor's
	Size     SegmentSize // the cluster's segment size
	SystemID uint64      // the cluster's system identifier; 0 = any
	CheckCRC bool        // check every record's CRC-32C, not only its header
	Settled  LSN         // bytes before it are known to be right: records that were given up there do not count
	Exact    *Exact      // check everything that servers guarantee; nil: what PostgreSQL's own reader and CheckCRC check
}

// Exact asks for WAL as servers write it, bit by bit, where PostgreSQL's own reader is content with less:
// it takes a page of any version and of any older timeline, does not look at bytes that it has no use for,
// and believes a page that claims to give up a record. What servers guarantee nothing about is left: the flag
// XLP_BKP_REMOVABLE, and what stands in a record that was given up.
type Exact struct {
	Magic   uint16  // of all pages, as PageMagic tells it; 0 = any that could be
	History History // of the WAL's timeline: says which one each page is of; a Timeline of 0 = not known

	// GivenUp is told of each record that began and was given up: its start, and the start of the page
	// that says so. nil: nobody wants to know.
	GivenUp func(start, page LSN)
}

// Walker follows contiguous WAL, fed to it in pieces of any length, from page to page and from record to
// record, by the rules of PostgreSQL's xlogreader.c. It knows up to where the WAL consists of complete
// records, which is as far as it can be trusted not to change: what a server wrote of an incomplete record
// may be replaced after a crash.
//
// Without CheckCRC it looks at page headers and record headers alone and leaves all other bytes untouched.
// Either way it keeps a fixed amount of state and allocates nothing until it finds an error.
//
// When the WAL starts in the middle of a record, the rest of that record is skipped by its length, and its
// CRC cannot be checked; see ProvenFrom.
type Walker struct {
	c        WalkerConfig
	err      error // what Feed returns from now on
	pos      LSN
	boundary LSN
	proven   LSN

	page [longPageHeader]byte // header of the page at pos, while it is incomplete
	tli  Timeline             // of the last page

	phase     phase
	record    [recordHeader]byte // the record's header
	have      int                // how much of that is there
	left      uint32             // bytes of the record to come, without padding; known once have >= 4
	crc       uint32             // of the record's bytes after its header, so far
	start     LSN                // of the record
	prev      LSN                // start of the last complete record
	prevKnown bool
	unusedEnd LSN  // end of the segment whose rest is unused
	guess     bool // the record before Start may have been an XLOG_SWITCH; see endRecord
	last      LSN  // start of the last complete record whose beginning was seen; 0: none
	overwrite bool // the next record must be an XLOG_OVERWRITE_CONTRECORD
	abandoned LSN  // start of the first record that was given up; 0: none was
	goesOn    LSN  // start of the page that gave up the last one
}

// phase is what the next byte belongs to, if not to a page's header.
type phase uint8

const (
	inHeader phase = iota // a record's header, expected or begun
	inData                // the rest of a record, and its padding
	inTail                // the rest of a record that began before Start, and its padding
	inUnused              // the rest of a segment after an XLOG_SWITCH; it has no page headers
)

// crc32c computes PostgreSQL's CRC-32C (pg_crc32c.h).
var crc32c = crc32.MakeTable(crc32.Castagnoli)

// CorruptError tells that bytes are not valid WAL.
type CorruptError struct {
	LSN    LSN // start of the page or record that is invalid, or the very byte
	Kind   CorruptKind
	Reason string
}

// CorruptKind is what of the WAL is invalid.
type CorruptKind string

const (
	CorruptPage     CorruptKind = "page"     // a page's header, or that it goes on where the page before ended
	CorruptIdentity CorruptKind = "identity" // a segment's header is of another cluster
	CorruptTimeline CorruptKind = "timeline" // a page is of a timeline that it cannot be of
	CorruptRecord   CorruptKind = "record"   // a record's header, or that it names the record before
	CorruptChecksum CorruptKind = "checksum" // a record's CRC-32C
	CorruptZeros    CorruptKind = "zeros"    // bytes that servers leave zero
)

func (e *CorruptError) Error() string {
	return fmt.Sprintf("invalid WAL at %s: %s", e.LSN, e.Reason)
}

// NewWalker returns a Walker that expects the byte at c.Start next. When c makes no sense (Start is not at
// a page's start, Timeline is 0, Size is not valid), Feed says so.
func NewWalker(c WalkerConfig) *Walker {
	w := &Walker{c: c, pos: c.Start, boundary: c.Start, proven: c.Start}
	switch {
	case c.Start%PageSize != 0:
		w.err = fmt.Errorf("cannot follow WAL from %s: not the start of a page", c.Start)
	case c.Timeline == 0:
		w.err = fmt.Errorf("cannot follow WAL from %s: no timeline", c.Start)
	case !c.Size.Valid():
		w.err = fmt.Errorf("cannot follow WAL from %s: invalid segment size %d", c.Start, c.Size)
	}
	return w
}

// Pos is the exclusive end of the bytes that were fed and accepted.
func (w *Walker) Pos() LSN {
	return w.pos
}

// Boundary is the exclusive end of the last complete record with its padding, and so the start of the
// record that is incomplete or expected next (at the end of a page, the start of the next page, whose header
// stands before that record). It is Start until a record was complete, and never above Pos.
//
// After an XLOG_SWITCH it is the end of that record until the segment's last byte has been fed, and then
// the segment's end. If that record began before Start, so that only the zeros after it tell, the segment's
// end counts once the next segment's first page header has been accepted: a file that was filled with zeros
// ahead of the WAL looks the same.
func (w *Walker) Boundary() LSN {
	return w.boundary
}

// ProvenFrom is the start of the first record whose beginning was seen, or where it is expected. What lies
// between Start and there belongs to a record that began before Start, and no CRC vouches for it. While
// that record goes on, it is Pos.
func (w *Walker) ProvenFrom() LSN {
	if w.phase == inTail || w.guess {
		return w.pos
	}
	return w.proven
}

// Last is the start of the last complete record whose beginning was seen; 0: there is none yet.
func (w *Walker) Last() LSN {
	return w.last
}

// Onto is a copy of w, which stands at the end of a segment, that goes on with the WAL of timeline tli, the same or
// one that branched off behind w's last page.
func (w *Walker) Onto(tli Timeline, exact *Exact) *Walker {
	onto := *w
	onto.c.Timeline, onto.c.Exact = tli, exact
	return &onto
}

// Feed takes the next bytes of the WAL. It keeps no reference to p.
//
// Bytes that are not valid WAL give a *CorruptError, on this and all later calls. Boundary then stays where
// it was, at the end of the valid records; Pos stays at or before the end of what was found invalid, and
// depends on how the bytes were cut. A record length of 0 is such an error too: it is how valid WAL ends in
// a file that was filled with zeros ahead of the WAL, though a recycled file may hold any other invalid
// bytes there.
func (w *Walker) Feed(p []byte) error {
	for len(p) > 0 && w.err == nil {
		off := int(w.pos % PageSize)
		head := pageHeaderSize(w.c.Size, w.pos)
		switch {
		case w.phase == inUnused:
			p, w.err = w.followUnused(p)
		case off >= head:
			n := min(len(p), PageSize-off)
			w.err = w.followPage(p[:n])
			p = p[n:]
		default:
			n := copy(w.page[off:head], p)
			if off+n == head {
				w.err = w.openPage(w.pos-LSN(off), w.page[:head])
			}
			if w.err == nil {
				p = p[n:]
				w.pos += LSN(n)
			}
		}
	}
	return w.err
}

// openPage checks the complete header h of the page at lsn, and that it goes on where the page before
// ended. Bits of xlp_info that are not known are refused, as PostgreSQL does: the last one that was added
// changed where a page's first record starts.
func (w *Walker) openPage(lsn LSN, h []byte) error {
	kind := CorruptPage
	bad := func(format string, args ...any) error {
		return &CorruptError{LSN: lsn, Kind: kind, Reason: fmt.Sprintf(format, args...)}
	}
	info, tli, rest := u16(h[2:]), Timeline(u32(h[4:])), u32(h[16:])
	switch {
	case h[1] != pageMagicHigh:
		return bad("page magic %04X", u16(h))
	case info&^pageAllFlags != 0:
		return bad("unknown page flags %04X", info)
	case LSN(u64(h[8:])) != lsn:
		return bad("the page says that it is %s", LSN(u64(h[8:])))
	case tli == 0 || tli > w.c.Timeline:
		kind = CorruptTimeline
		return bad("page of timeline %d in the WAL of timeline %d", tli, w.c.Timeline)
	case tli < w.tli:
		kind = CorruptTimeline
		return bad("page of timeline %d after one of timeline %d", tli, w.tli)
	case (info&pageLong != 0) != (len(h) == longPageHeader):
		return bad("long page header missing or out of place, flags %04X", info)
	}
	if err := w.openExactPage(lsn, h); err != nil {
		return err
	}
	if len(h) == longPageHeader {
		kind = CorruptIdentity
		switch id := u64(h[24:]); {
		case w.c.SystemID != 0 && id != w.c.SystemID:
			return bad("WAL of system %d, expected %d", id, w.c.SystemID)
		case u32(h[32:]) != uint32(w.c.Size):
			return bad("segment size %d, expected %d", u32(h[32:]), w.c.Size)
		case u32(h[36:]) != PageSize:
			return bad("page size %d, expected %d", u32(h[36:]), PageSize)
		}
		kind = CorruptPage
	}

	continued := info&pageContrecord != 0
	switch {
	case continued && info&pageOverwrite != 0:
		return bad("contradictory page flags %04X", info)
	case info&pageOverwrite != 0:
		if w.c.Exact != nil && lsn != w.c.Start && w.phase != inTail && !w.started() {
			return bad("it gives up a record, and none is incomplete")
		}
		w.giveUp(lsn)
		w.overwrite = w.c.Exact != nil
	case continued && lsn == w.c.Start:
		if rest == 0 {
			return bad("rest of a record of 0 bytes")
		}
		w.phase, w.left = inTail, rest
		if rest == recordHeader-recordAlign || rest == recordHeader-2*recordAlign {
			w.guess = true
			w.start = lsn - LSN(recordHeader-rest)
		}
	case continued && (rest == 0 || rest != w.left):
		return bad("rest of a record of %d bytes, expected %d", rest, w.left)
	case !continued && w.left > 0:
		return bad("no rest of the record before, expected %d bytes", w.left)
	}
	if w.guess && lsn != w.c.Start {
		// The unused rest of a segment ended here, and more WAL follows: it was an XLOG_SWITCH.
		w.guess = false
		w.boundary, w.proven = lsn, lsn
	}
	w.tli = tli
	return nil
}

// openExactPage checks what Exact asks of a page's header beyond the rest: servers make pages from zeros
// (AdvanceXLInsertBuffer in xlog.c), with the timeline that they write at the time.
func (w *Walker) openExactPage(lsn LSN, h []byte) error {
	x := w.c.Exact
	if x == nil {
		return nil
	}
	bad := func(kind CorruptKind, format string, args ...any) error {
		return &CorruptError{LSN: lsn, Kind: kind, Reason: fmt.Sprintf(format, args...)}
	}
	switch magic, tli := u16(h), Timeline(u32(h[4:])); {
	case x.Magic != 0 && magic != x.Magic:
		return bad(CorruptPage, "page magic %04X, expected %04X", magic, x.Magic)
	case x.History.Timeline != 0 && tli != x.History.At(lsn):
		return bad(CorruptTimeline, "page of timeline %d, expected %d", tli, x.History.At(lsn))
	case u16(h[2:])&pageContrecord == 0 && u32(h[16:]) != 0:
		return bad(CorruptPage, "rest of a record of %d bytes, and no flag that says so", u32(h[16:]))
	case u32(h[20:]) != 0:
		return bad(CorruptZeros, "the page header's padding is not zero")
	}
	return nil
}

// started tells whether a record that began is incomplete.
func (w *Walker) started() bool {
	return w.phase == inData || w.have > 0
}

// giveUp forgets the incomplete record: the page at lsn says that it will never be completed. A server that
// crashed before all of a record was on its disk does so when it starts again, and the page begins with an
// XLOG_OVERWRITE_CONTRECORD record, whose xl_prev is the last complete one. As in PostgreSQL, the page may
// also say so when there is none.
func (w *Walker) giveUp(lsn LSN) {
	if w.c.Exact != nil && w.c.Exact.GivenUp != nil && w.started() {
		w.c.Exact.GivenUp(w.start, lsn)
	}
	switch {
	case w.phase == inTail:
		w.proven, w.guess = lsn, false
	case w.started() && lsn > w.c.Settled:
		w.goesOn = lsn
		if w.abandoned == 0 {
			w.abandoned = w.start
		}
	}
	w.phase, w.have, w.left = inHeader, 0, 0
}

// Abandoned is the start of the first record that was seen to begin and then given up by the server, and the
// start of the page that gave up the last one; 0 if there was none, but for those that end by Settled. No CRC
// vouches for such a record's bytes, which stay in the WAL.
func (w *Walker) Abandoned() (from, to LSN) {
	return w.abandoned, w.goesOn
}

// followPage takes p, all of which lies on one page after its header.
func (w *Walker) followPage(p []byte) (err error) {
	for len(p) > 0 && err == nil {
		switch w.phase {
		case inHeader:
			if w.have == 0 {
				p = w.followWhole(p)
			}
			p, err = w.followHeader(p)
		case inData, inTail:
			p, err = w.followData(p)
		case inUnused:
			p, err = w.followUnused(p)
		}
	}
	return err
}

// followWhole takes the records that lie in p as a whole, as most do, at a fraction of the cost of taking
// them by piece. It stops at whatever needs a closer look, and returns that and what comes after it.
func (w *Walker) followWhole(p []byte) []byte {
	if !w.prevKnown || w.guess || w.overwrite {
		return p
	}
	pos, prev := w.pos, w.prev
	for len(p) >= recordHeader {
		h := (*[recordHeader]byte)(p)
		size := u32(h[:])
		n := (uint64(size) + recordAlign - 1) &^ (recordAlign - 1)
		if size < recordHeader || n > uint64(len(p)) || LSN(u64(h[8:])) != prev || isSwitch(h) {
			break
		}
		if w.c.CheckCRC && crc32.Update(crc32.Checksum(p[recordHeader:size], crc32c), crc32c, h[:recordCRC]) != u32(h[recordCRC:]) {
			break
		}
		if w.c.CheckCRC && !isPadding(p[size:n]) {
			break
		}
		p = p[n:]
		prev, pos = pos, pos+LSN(n)
	}
	if pos > w.pos {
		w.boundary, w.last = pos, prev
	}
	w.pos, w.prev = pos, prev
	return p
}

// followHeader takes the next bytes of a record's header, and returns what comes after them. The length
// is complete on this page, since records are aligned; the rest may be on the next page.
func (w *Walker) followHeader(p []byte) ([]byte, error) {
	if w.have == 0 {
		w.start = w.pos
	}
	n := copy(w.record[w.have:], p)
	w.have += n
	size := u32(w.record[:])
	if w.have >= 4 {
		if w.guess && size == 0 {
			w.startUnused()
			return p, nil
		}
		if w.guess {
			w.guess, w.prevKnown = false, false
		}
		if size < recordHeader {
			return nil, w.badRecord("length %d", size)
		}
		w.left = size - uint32(w.have)
	}
	p = p[n:]
	w.pos += LSN(n)
	if w.have < recordHeader {
		return p, nil
	}

	prev := LSN(u64(w.record[8:]))
	switch {
	case w.prevKnown && prev != w.prev:
		return nil, w.badRecord("the record before is said to be at %s, but is at %s", prev, w.prev)
	case prev >= w.start:
		return nil, w.badRecord("the record before is said to be at %s", prev)
	case w.overwrite && (w.record[17] != rmgrXLOG || w.record[16]&rmgrInfoMask != xlogOverwrite):
		return nil, w.badRecord("the page gives up the record before it, and this is no XLOG_OVERWRITE_CONTRECORD")
	}
	w.overwrite = false
	w.phase, w.crc = inData, 0
	return w.followData(p)
}

// followData takes the next bytes of a record after its header, and of the padding after it, and returns
// what comes after them.
func (w *Walker) followData(p []byte) ([]byte, error) {
	n := int(min(uint64(len(p)), uint64(w.left)))
	switch {
	case w.phase == inData && w.c.CheckCRC:
		w.crc = crc32.Update(w.crc, crc32c, p[:n])
	case w.guess:
		copy(w.record[recordHeader-w.left:], p[:n])
	}
	w.left -= uint32(n)
	if w.left == 0 {
		end := n + min(len(p)-n, int(-(w.pos+LSN(n))%recordAlign))
		if i := nonZero(p[n:end]); i >= 0 && (w.phase == inData && w.c.CheckCRC || w.c.Exact != nil) {
			return nil, &CorruptError{LSN: w.pos + LSN(n+i), Kind: CorruptZeros, Reason: "padding after a record is not zero"}
		}
		n = end
	}
	p = p[n:]
	w.pos += LSN(n)
	if w.left > 0 || w.pos%recordAlign != 0 {
		return p, nil
	}
	return p, w.endRecord()
}

// isPadding tells whether bytes after a record are as servers leave them. The CRC does not cover them, so that
// they would not show in a file that some of its writes are missing from.
func isPadding(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

// endRecord accounts for the record that ends at pos, padding included.
func (w *Walker) endRecord() error {
	seen := w.phase == inData
	if seen && w.c.CheckCRC && crc32.Update(w.crc, crc32c, w.record[:recordCRC]) != u32(w.record[recordCRC:]) {
		return &CorruptError{LSN: w.start, Kind: CorruptChecksum, Reason: "record: checksum does not match"}
	}
	if seen {
		w.last = w.start
	}
	w.boundary, w.prev, w.prevKnown = w.pos, w.start, seen
	w.phase, w.have = inHeader, 0
	switch {
	case !seen:
		// An XLOG_SWITCH that began on the page before leaves its type to this one, but other data can
		// look the same. It is one if zeros follow, then a valid page, and a record that says so.
		w.proven = w.pos
		w.guess = w.guess && isSwitch(&w.record)
		w.prevKnown = w.guess
	case isSwitch(&w.record):
		w.startUnused()
	}
	return nil
}

// startUnused leaves out the rest of the segment after an XLOG_SWITCH. A server zeroes it with the headers
// of its pages (CopyXLogRecordToWAL in xlog.c). Nothing is left if the record ended with its segment.
func (w *Walker) startUnused() {
	w.phase, w.have = inUnused, 0
	w.unusedEnd = w.c.Size.Start(w.pos + LSN(w.c.Size) - 1)
}

// followUnused takes the next bytes of a segment's unused rest, and returns what comes after them. With
// CheckCRC they must be zero: in a file, others are left from WAL that was given up.
func (w *Walker) followUnused(p []byte) ([]byte, error) {
	n := min(uint64(len(p)), uint64(w.unusedEnd-w.pos))
	if w.c.CheckCRC {
		if i := nonZero(p[:n]); i >= 0 {
			return nil, &CorruptError{LSN: w.pos + LSN(i), Kind: CorruptZeros, Reason: "not zero after a switch of WAL"}
		}
	}
	w.pos += LSN(n)
	if w.pos == w.unusedEnd {
		w.phase = inHeader
		if !w.guess {
			w.boundary = w.pos
		}
	}
	return p[n:], nil
}

var zeros [PageSize]byte

// nonZero is the index of the first byte of p that is not zero; -1: all are.
func nonZero(p []byte) int {
	for at := 0; at < len(p); at += len(zeros) {
		some := p[at:min(at+len(zeros), len(p))]
		if bytes.Equal(some, zeros[:len(some)]) {
			continue
		}
		for i, b := range some {
			if b != 0 {
				return at + i
			}
		}
	}
	return -1
}

// badRecord is the error for the record being followed.
func (w *Walker) badRecord(format string, args ...any) error {
	return &CorruptError{LSN: w.start, Kind: CorruptRecord, Reason: "record: " + fmt.Sprintf(format, args...)}
}
