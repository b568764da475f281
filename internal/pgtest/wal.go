// Package pgtest has what tests of the other packages need: WAL that is valid byte by byte, and a scripted server
// that streams it.
package pgtest

import (
	"encoding/binary"
	"fmt"
	"hash/crc32"
	"slices"
	"time"

	"github.com/walfleet/walfleet/internal/wal"
)

// WALConfig says what WAL to make. Zero values stand for timeline 1, segments of 1 MiB, and the second
// segment's start, which is where initdb begins.
type WALConfig struct {
	Timeline wal.Timeline
	Size     wal.SegmentSize
	SystemID uint64
	Start    wal.LSN // start of a page
}

// WAL is WAL as a PostgreSQL 15 server would write it: pages with their headers and magic number, records with
// their links and checksums. Only what is in the records is made up, so pg_waldump may not know what to
// make of them. The same calls give the same bytes. What makes no sense panics: it is a fault in the test.
type WAL struct {
	c       WALConfig
	buf     []byte    // from c.Start; ends where the last record and its padding do
	starts  []wal.LSN // of all complete records
	ends    []wal.LSN // of all complete records, padding included
	prev    wal.LSN   // start of the last complete record
	aborted bool      // the next page gives up the record before it
}

const (
	magic15        = 0xD110
	pageContrecord = 0x0001
	pageLong       = 0x0002
	pageOverwrite  = 0x0008
	recordHeader   = 24
	rmgrXLOG       = 0
	rmgrXact       = 1
	xlogNoop       = 0x20
	xlogSwitch     = 0x40
	xlogOverwrite  = 0xD0
)

// NewWAL returns WAL without records.
func NewWAL(c WALConfig) *WAL {
	if c.Timeline == 0 {
		c.Timeline = 1
	}
	if c.Size == 0 {
		c.Size = 1 << 20
	}
	if c.Start == 0 {
		c.Start = wal.LSN(c.Size)
	}
	if !c.Size.Valid() || c.Start%wal.PageSize != 0 {
		panic(fmt.Sprintf("pgtest: no WAL can start at %s with segments of %d bytes", c.Start, c.Size))
	}
	return &WAL{c: c}
}

// End is the end of the last record, padding included. At the end of a page that is the next page's start.
func (w *WAL) End() wal.LSN {
	return w.c.Start + wal.LSN(len(w.buf))
}

// Boundaries are the exclusive ends of all complete records, padding included, in their order. After a
// Switch that is its segment's end.
func (w *WAL) Boundaries() []wal.LSN {
	return slices.Clone(w.ends)
}

// Append adds a record (XLOG_NOOP) with payload after its header of 24 bytes. It returns where the record
// starts (past the page header when the WAL ended at a page's end), and its exclusive end with padding.
func (w *WAL) Append(payload []byte) (start, end wal.LSN) {
	return w.append(xlogNoop, payload)
}

// Commit adds the record of a transaction that commits at when (xl_xact_commit), to the microsecond. It returns
// where the record starts, and its exclusive end with padding.
func (w *WAL) Commit(when time.Time) (start, end wal.LSN) {
	payload := []byte{255, 8} // XLR_BLOCK_ID_DATA_SHORT, and the data's length
	micros := when.Sub(time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)).Microseconds()
	return w.Transaction(0, binary.LittleEndian.AppendUint64(payload, uint64(micros)))
}

// Transaction adds a record of the transaction manager (RM_XACT_ID), with all that comes after its header.
func (w *WAL) Transaction(info byte, payload []byte) (start, end wal.LSN) {
	return w.record(rmgrXact, info, payload)
}

// FillTo adds one record whose length makes the WAL end at end, a multiple of 8. That takes 24 bytes of room
// at least, page headers not counted. It returns the record's start.
func (w *WAL) FillTo(end wal.LSN) (start wal.LSN) {
	room := 0
	for l := w.End(); l < end; {
		if l%wal.PageSize == 0 {
			l += wal.LSN(w.pageHeader(l))
		}
		next := min(end, l-l%wal.PageSize+wal.PageSize)
		room += int(next - l)
		l = next
	}
	if room < recordHeader || end%8 != 0 {
		panic(fmt.Sprintf("pgtest: no record can end at %s after %s", end, w.End()))
	}
	start, _ = w.Append(make([]byte, room-recordHeader))
	return start
}

// Switch adds an XLOG_SWITCH record and fills the rest of the segment in which that ends with zeros. It
// returns the segment's end.
func (w *WAL) Switch() wal.LSN {
	_, end := w.append(xlogSwitch, nil)
	if rest := w.c.Size.Offset(end); rest > 0 {
		w.buf = append(w.buf, make([]byte, int64(w.c.Size)-rest)...)
		w.ends[len(w.ends)-1] = w.End()
	}
	return w.End()
}

// Abort adds as many pages of a record with payload as the server had written before it crashed, pages
// counting the one in which the record starts, and then what a restarted server does about it: a page that
// gives up the record, and an XLOG_OVERWRITE_CONTRECORD record. It returns the starts of the record that
// was given up and of the page after it. The record must not be complete within those pages.
func (w *WAL) Abort(payload []byte, pages int) (start, page wal.LSN) {
	start, end := w.put(rmgrXLOG, xlogNoop, payload)
	page = start - start%wal.PageSize + wal.LSN(pages)*wal.PageSize
	if pages < 1 || end <= page {
		panic(fmt.Sprintf("pgtest: the record from %s to %s is complete before %s", start, end, page))
	}
	w.buf = w.buf[:page-w.c.Start]
	w.aborted = true
	overwrite := make([]byte, 16) // xl_overwrite_contrecord: overwritten_lsn, overwrite_time
	binary.LittleEndian.PutUint64(overwrite, uint64(start))
	w.append(xlogOverwrite, overwrite)
	return start, page
}

// Bytes is a copy of the WAL from from (inclusive) to to (exclusive). Beyond End it is zeros, as in a file
// that was filled with them ahead of the WAL.
func (w *WAL) Bytes(from, to wal.LSN) []byte {
	if from < w.c.Start || to < from {
		panic(fmt.Sprintf("pgtest: no WAL from %s to %s in what starts at %s", from, to, w.c.Start))
	}
	b := make([]byte, to-from)
	if from < w.End() {
		copy(b, w.buf[from-w.c.Start:])
	}
	return b
}

// Fork is the WAL of a new timeline that equals w up to at, the end of a record of w or its Start. As on
// a server, pages that begin before at keep w's timeline.
func (w *WAL) Fork(at wal.LSN, tli wal.Timeline) *WAL {
	n := 0
	if at != w.c.Start {
		i := slices.Index(w.ends, at)
		if i < 0 {
			panic(fmt.Sprintf("pgtest: no record ends at %s", at))
		}
		n = i + 1
	}
	if tli <= w.c.Timeline {
		panic(fmt.Sprintf("pgtest: timeline %d cannot follow %d", tli, w.c.Timeline))
	}
	f := &WAL{
		c:      w.c,
		buf:    slices.Clone(w.buf[:at-w.c.Start]),
		starts: slices.Clone(w.starts[:n]),
		ends:   slices.Clone(w.ends[:n]),
	}
	f.c.Timeline = tli
	if n > 0 {
		f.prev = f.starts[n-1]
	}
	return f
}

func (w *WAL) append(info byte, payload []byte) (start, end wal.LSN) {
	return w.record(rmgrXLOG, info, payload)
}

func (w *WAL) record(rmgr, info byte, payload []byte) (start, end wal.LSN) {
	start, end = w.put(rmgr, info, payload)
	w.prev = start
	w.starts = append(w.starts, start)
	w.ends = append(w.ends, end)
	return start, end
}

// put writes one record.
func (w *WAL) put(rmgr, info byte, payload []byte) (start, end wal.LSN) {
	if w.End()%wal.PageSize == 0 {
		w.putPage(0)
	}
	start = w.End()

	r := make([]byte, recordHeader, recordHeader+len(payload))
	binary.LittleEndian.PutUint32(r, uint32(recordHeader+len(payload)))
	binary.LittleEndian.PutUint64(r[8:], uint64(w.prev))
	r[16], r[17] = info, rmgr
	crc := crc32.MakeTable(crc32.Castagnoli)
	binary.LittleEndian.PutUint32(r[20:], crc32.Update(crc32.Checksum(payload, crc), crc, r[:20]))
	r = append(r, payload...)

	for len(r) > 0 {
		if w.End()%wal.PageSize == 0 {
			w.putPage(len(r))
		}
		n := min(len(r), wal.PageSize-int(w.End()%wal.PageSize))
		w.buf = append(w.buf, r[:n]...)
		r = r[n:]
	}
	for w.End()%8 != 0 {
		w.buf = append(w.buf, 0)
	}
	return start, w.End()
}

// pageHeader is the length of the header of the page at lsn.
func (w *WAL) pageHeader(lsn wal.LSN) int {
	if w.c.Size.Offset(lsn) == 0 {
		return 40
	}
	return 24
}

// putPage begins a page; rest is what it has of the record before.
func (w *WAL) putPage(rest int) {
	lsn := w.End()
	h := make([]byte, w.pageHeader(lsn))
	var info uint16
	if rest > 0 {
		info |= pageContrecord
	}
	if w.aborted {
		info |= pageOverwrite
		w.aborted = false
	}
	if len(h) == 40 {
		info |= pageLong
		binary.LittleEndian.PutUint64(h[24:], w.c.SystemID)
		binary.LittleEndian.PutUint32(h[32:], uint32(w.c.Size))
		binary.LittleEndian.PutUint32(h[36:], wal.PageSize)
	}
	binary.LittleEndian.PutUint16(h, magic15)
	binary.LittleEndian.PutUint16(h[2:], info)
	binary.LittleEndian.PutUint32(h[4:], uint32(w.c.Timeline))
	binary.LittleEndian.PutUint64(h[8:], uint64(lsn))
	binary.LittleEndian.PutUint32(h[16:], uint32(rest))
	w.buf = append(w.buf, h...)
}
