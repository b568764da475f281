package archive

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"time"

	"github.com/walfleet/walfleet/internal/wal"
)

// DivergenceError says that the server sent other bytes than those that the
// archive has for the same position, before the archive's last incomplete
// record, or WAL that does not continue the archive's last record. Nothing on
// disk was changed.
type DivergenceError struct {
	Timeline wal.Timeline
	LSN      wal.LSN // the first byte that differs, or does not continue the archive
	Reason   string  // why it does not continue the archive; "" when it differs
}

func (e *DivergenceError) Error() string {
	text := fmt.Sprintf("the server's history differs from the archive at timeline %d, %s", e.Timeline, e.LSN)
	if e.Reason != "" {
		text += ": " + e.Reason
	}
	return text
}

// AbortedRecordError says that the server sent other bytes inside the archive's
// last incomplete record: a server that crashed, or a PolarDB node that was
// promoted on the same timeline, goes on after the last complete record. When
// the Writer is opened again it goes on there too.
type AbortedRecordError struct {
	Timeline wal.Timeline
	LSN      wal.LSN // the first byte that differs
	Record   wal.LSN // start of the incomplete record
}

func (e *AbortedRecordError) Error() string {
	return fmt.Sprintf("the server abandoned the record at timeline %d, %s (its WAL differs from %s on)", e.Timeline, e.Record, e.LSN)
}

// Writer writes the WAL of one timeline, from one position on without a hole.
//
// Invariants:
//   - Durable ≤ Written, and Pos ≤ Written;
//   - bytes from Tail.Start to Written are in the files; those below Durable are
//     synced, under durable names, and end with a complete record;
//   - every segment that ends at or before Durable is sealed, no other is;
//   - bytes below Written are not changed: what is written there again is
//     compared.
//
// After an error a Writer is of no further use but to be closed; opening a new
// one finds out what the disk has. It is used by one goroutine at a time.
type Writer struct {
	dir      *Dir
	id       Identity
	timeline wal.Timeline
	walker   *wal.Walker // fed up to written, without CRCs
	open     []*segment  // not sealed, ascending; the last one is written to
	pos      wal.LSN     // where the next Write goes; below written while it is compared
	written  wal.LSN
	durable  wal.LSN
	compare  []byte
	// unproven are the first bytes of the first segment, up to here, when they
	// belong to a record whose beginning is not in the archive, so that no CRC
	// speaks for them. They are received again and compared before anything else;
	// 0 once that is done.
	start, unproven wal.LSN
	// torn is the end of what the files have of an incomplete record that begins at
	// record: bytes of an earlier process, or of a connection before this Writer,
	// that are written again. When the server gave that record up, complete ones can
	// follow it, from sure to promised, that may have been acknowledged. Otherwise
	// promised is where record begins.
	record, sure, promised, torn wal.LSN
	kept                         bool     // what the files have from record to torn was kept aside
	aborted                      *Aborted // the same, and not asked for yet
	// before says that the walker has seen the record before start. chained is
	// false while nothing shows yet that a connection's WAL continues the archive.
	before, chained bool
	unsound         *FileError // before start; nil: nothing is
}

// segment is a .partial file that is open.
type segment struct {
	wal.Segment
	file  file
	dirty bool
	begun int64 // up to where the disk was told to write, of what is dirty
	bulk  bool  // it was told since the last flush
	gone  int64 // up to where the page cache was told to forget
	fresh bool  // this Writer made the file: behind written it has never had anything
	ahead int64 // up to where there are zeros that Prepare wrote
	since int64 // where Prepare looked last, and
	syncs int64 // how many flushes came since
}

// step is how much WAL is written until the disk is told to begin with it, and up
// to how many zeros are written ahead.
func (s *segment) step() int64 { return min(1<<20, int64(s.Size)/16) }

// OpenWriter prepares to go on with timeline tli at start, the start of a
// segment that is not sealed. What .partial files have from there on is synced,
// read back from the disk and followed record by record with CRCs; it counts as
// written up to the end of the last complete record, and what comes after that
// will be written again.
func (d *Dir) OpenWriter(ctx context.Context, id Identity, tli wal.Timeline, start wal.LSN) (_ *Writer, err error) {
	w := &Writer{dir: d, id: id, timeline: tli, start: start}
	defer func() {
		if err != nil {
			err = fmt.Errorf("opening the archive at timeline %d, %s: %w", tli, start, errors.Join(err, w.Close()))
		}
	}()
	if err := w.sealBefore(ctx); err != nil {
		return nil, err
	}
	if err := w.recover(ctx); err != nil {
		return nil, err
	}
	if err := w.seedWalker(ctx); err != nil {
		return nil, err
	}
	if _, err := w.Flush(); err != nil { // seals what a crash left complete but not renamed
		return nil, err
	}
	w.Rewind()
	return w, nil
}

// recover opens the partial files from start on, and counts as written what
// complete records prove. Files of later segments are left alone.
func (w *Writer) recover(ctx context.Context) error {
	walker, err := w.walkerBefore(ctx, w.start, true)
	if err != nil {
		return err
	}
	for s := w.id.SegmentSize.Segment(w.timeline, w.start); ; s = s.Next() {
		if err := w.adopt(ctx, s); err != nil {
			return err
		}
		f, err := w.openPartial(s)
		if errors.Is(err, fs.ErrNotExist) {
			break
		}
		if err != nil {
			return err
		}
		w.open = append(w.open, &segment{Segment: s, file: f})
		if err := settle(w.dir.disk, f); err != nil {
			w.dir.distrust(s.Name() + partialSuffix)
			if err := f.DropCache(); err != nil {
				return err
			}
		}
		err = feed(ctx, walker, from(f, 0), int64(s.Size))
		var corrupt *wal.CorruptError
		if errors.As(err, &corrupt) {
			break // the end of what the file has
		}
		if err != nil {
			return err
		}
	}
	w.written = walker.Boundary()
	w.promised = max(w.start, w.written)
	if from, to := walker.Abandoned(); from != 0 {
		w.written, w.sure = min(w.written, from), to
	}
	w.written = max(w.start, w.written)
	if proven := walker.ProvenFrom(); w.start < proven && w.start < w.written {
		w.unproven = min(proven, w.written)
	}
	if w.written < walker.Pos() {
		w.record, w.torn = w.written, walker.Pos()
	}
	if err := w.replaceDistrusted(); err != nil {
		return err
	}
	// Files after the one that is gone on with hold nothing that counts.
	for len(w.open) > 1 && w.open[len(w.open)-1].Start >= w.written {
		last := w.open[len(w.open)-1]
		w.open = w.open[:len(w.open)-1]
		if err := last.file.Close(); err != nil {
			return err
		}
	}
	return nil
}

// replaceDistrusted puts new files in the place of those that a sync failed for,
// with what was read back from the disk. A second sync of the same file could
// return nil while bytes are missing.
func (w *Writer) replaceDistrusted() error {
	for _, s := range w.open {
		name := s.Name() + partialSuffix
		if !w.dir.distrusted[name] {
			continue
		}
		f, err := writeTemp(w.dir.disk, name, w.dir.fileMode(), func(f file) error {
			if err := f.Allocate(int64(s.Size)); err != nil {
				return err
			}
			n := int64(min(max(w.written, w.torn, s.Start), s.End()) - s.Start)
			return copyRange(w.dir.disk, name, 0, f, 0, n)
		})
		if err != nil {
			return err
		}
		if err := publish(w.dir.disk, name, w.dir.disk.Replace); err != nil {
			return errors.Join(err, f.Close())
		}
		if err := s.file.Close(); err != nil {
			return errors.Join(err, f.Close())
		}
		s.file = f
		delete(w.dir.distrusted, name)
	}
	return nil
}

// openPartial opens a segment's .partial file. One that is too short, which
// pg_receivewal leaves when it is killed while it fills the file with zeros, gets
// its size.
func (w *Writer) openPartial(s wal.Segment) (file, error) {
	name := s.Name() + partialSuffix
	f, err := w.dir.disk.OpenWrite(name)
	if err != nil {
		return nil, err
	}
	size, err := f.Size()
	switch {
	case err != nil:
	case size == int64(s.Size):
		return f, nil
	case size == 0:
		err = errors.Join(w.dir.disk.Remove(name), fs.ErrNotExist)
	case size < int64(s.Size):
		if err = f.Allocate(int64(s.Size)); err == nil {
			return f, nil
		}
	default:
		err = &FileError{w.dir.pathOf(name), fmt.Sprintf("has %d bytes, should have %d; move it away and the server sends the segment again", size, s.Size)}
	}
	f.Close()
	return nil, err
}

// settle makes a file and its name durable, and makes sure that what is read
// from it comes from the disk.
func settle(d disk, f file) error {
	if err := f.Sync(); err != nil {
		return err
	}
	if err := d.Sync(); err != nil {
		return err
	}
	return f.DropCache()
}

// feed gives the next n bytes of r to the walker.
func feed(ctx context.Context, walker *wal.Walker, r io.Reader, n int64) error {
	buf := make([]byte, min(64<<10, n))
	for n > 0 {
		if err := ctx.Err(); err != nil {
			return err
		}
		p := buf[:min(int64(len(buf)), n)]
		if _, err := io.ReadFull(r, p); err != nil {
			return err
		}
		if err := walker.Feed(p); err != nil {
			return err
		}
		n -= int64(len(p))
	}
	return nil
}

// seedWalker makes the walker of the receive path, which stands at written.
func (w *Writer) seedWalker(ctx context.Context) (err error) {
	resume := w.resumePoint(w.written)
	if resume == w.written {
		w.walker, err = w.walkerBefore(ctx, resume, false)
		w.before = err == nil && w.walker.ProvenFrom() < resume
		return err
	}
	w.walker = wal.NewWalker(wal.WalkerConfig{Start: resume, Timeline: w.timeline, Size: w.id.SegmentSize, SystemID: w.id.SystemID})
	last := w.open[len(w.open)-1]
	return feed(ctx, w.walker, from(last.file, int64(resume-last.Start)), int64(w.written-resume))
}

// resumePoint is where to ask for WAL again when the last complete record ends
// at boundary: one page before that record's end, in the same segment. What is
// sent again up to there shows whether the server still has our history.
func (w *Writer) resumePoint(boundary wal.LSN) wal.LSN {
	page := boundary - boundary%wal.PageSize
	start := w.id.SegmentSize.Start(boundary)
	if page-start < wal.PageSize {
		return start
	}
	return page - wal.PageSize
}

// Partial are the segments that are not sealed yet, oldest first.
func (w *Writer) Partial() []wal.Segment {
	segments := make([]wal.Segment, len(w.open))
	for i, s := range w.open {
		segments[i] = s.Segment
	}
	return segments
}

// Timeline is the timeline that is written.
func (w *Writer) Timeline() wal.Timeline { return w.timeline }

// Pos is the position that the next Write must have.
func (w *Writer) Pos() wal.LSN { return w.pos }

// Written is the exclusive end of the WAL in the files.
func (w *Writer) Written() wal.LSN { return w.written }

// Durable is the exclusive end of the last record that was complete when all of
// it was synced: what may be acknowledged. An incomplete record after it does
// not count, for its server may abandon it, and WAL is asked for again from its
// start.
func (w *Writer) Durable() wal.LSN { return w.durable }

// Promised is up to where an earlier process may have acknowledged WAL. It is
// above Durable where records follow one that the server gave up, which has to be
// received again.
func (w *Writer) Promised() wal.LSN { return max(w.durable, w.promised) }

// Rewind makes the writer expect WAL from its resume point on, for a new
// connection, and returns that point. What is known already is compared.
func (w *Writer) Rewind() wal.LSN {
	w.pos = max(w.start, w.resumePoint(w.walker.Boundary())) // a record may have begun before start
	if w.unproven > 0 {
		w.pos = w.start
	}
	w.chained = w.pos < w.written || w.written == w.start && !w.before
	return w.pos
}

// SegmentDue reports whether writing n more bytes, at least one, makes a new
// file, which needs room for a whole segment.
func (w *Writer) SegmentDue(n int) bool {
	last := w.pos + wal.LSN(n) - 1
	return last >= w.written && w.segmentAt(last) == nil
}

// SealDue reports whether a segment waits to be sealed by Flush. None is while
// some of its bytes are unproven.
func (w *Writer) SealDue() bool {
	return w.unproven == 0 && len(w.open) > 0 && w.open[0].End() <= w.walker.Boundary()
}

// Write stores WAL that begins at lsn, which must be Pos. The bytes below
// Written are compared with what is there: the error is a DivergenceError, or
// an AbortedRecordError behind the last complete record. WAL whose pages and
// records do not hang together is refused with a wal.CorruptError. p is not
// kept.
func (w *Writer) Write(lsn wal.LSN, p []byte) error {
	if lsn != w.pos {
		return fmt.Errorf("internal error: write at %s, expected %s", lsn, w.pos)
	}
	for len(p) > 0 && w.pos < w.written {
		n, err := w.compareNext(p)
		if err != nil {
			return err
		}
		p = p[n:]
	}
	if len(p) == 0 {
		return nil
	}
	if err := w.walker.Feed(p); err != nil {
		var corrupt *wal.CorruptError
		if errors.As(err, &corrupt) && !w.chained {
			return &DivergenceError{Timeline: w.timeline, LSN: w.written, Reason: corrupt.Error()}
		}
		return err
	}
	w.chained = w.chained || w.walker.Boundary() > w.written
	for len(p) > 0 {
		seg, err := w.current()
		if err != nil {
			return fmt.Errorf("archiving at timeline %d, %s: %w", w.timeline, w.written, err)
		}
		n := min(uint64(len(p)), uint64(seg.End()-w.written))
		if w.written < w.torn {
			err := w.keepTorn(seg, p[:n])
			if diverged := new(DivergenceError); errors.As(err, &diverged) {
				return err
			}
			if err != nil {
				return fmt.Errorf("keeping an aborted record of timeline %d, %s aside: %w", w.timeline, w.record, err)
			}
		}
		if _, err := seg.file.WriteAt(p[:n], int64(w.written-seg.Start)); err != nil {
			return fmt.Errorf("archiving at timeline %d, %s: %w", w.timeline, w.written, err)
		}
		if !seg.dirty {
			seg.dirty, seg.begun = true, int64(w.written-seg.Start)
		}
		w.written += wal.LSN(n)
		w.pos = w.written
		p = p[n:]
		if end := int64(w.written - seg.Start); end-seg.begun >= seg.step() {
			// A flush that finds all under way takes less long, and the disk does not wait for it.
			if err := seg.file.WriteBack(seg.begun, end-seg.begun); err != nil {
				w.dir.distrust(seg.Name() + partialSuffix) // the next sync may not say so again
				return fmt.Errorf("archiving at timeline %d, %s: %w", w.timeline, w.written, err)
			}
			seg.begun, seg.bulk = end, true
		}
	}
	return nil
}

// keepTorn compares what is about to be written at written, into seg, with what
// is there. An incomplete record that is replaced by another one is kept aside;
// complete records that are others are a divergence.
func (w *Writer) keepTorn(seg *segment, p []byte) error {
	have := make([]byte, min(uint64(len(p)), uint64(w.torn-w.written)))
	if _, err := seg.file.ReadAt(have, int64(w.written-seg.Start)); err != nil {
		return err
	}
	end := w.written + wal.LSN(len(have))
	for at := max(w.sure, w.written); at < min(w.promised, end); at++ {
		if i := at - w.written; have[i] != p[i] {
			return &DivergenceError{Timeline: w.timeline, LSN: at}
		}
	}
	if w.kept || !differs(w.written, have, p) {
		return nil
	}
	// What is sealed meanwhile is the same on the server.
	from := max(w.record, w.open[0].Start)
	a, err := w.dir.saveAborted(w.id.SegmentSize, w.timeline, from, w.torn)
	if err != nil {
		return err
	}
	w.kept, w.aborted = true, &a
	return nil
}

// TakeAborted returns the incomplete record that a Write since the last call has
// kept aside, because other bytes came in its place; else nil.
func (w *Writer) TakeAborted() *Aborted {
	a := w.aborted
	w.aborted = nil
	return a
}

// differs tells whether have, which stands at lsn in a file, has other bytes than
// p. What reads as zeros up to the end of a sector was never written, or lost.
func differs(lsn wal.LSN, have, p []byte) bool {
	for i := 0; i < len(have); i++ {
		if have[i] == p[i] {
			continue
		}
		end := min(len(have), i+sectorRest(lsn+wal.LSN(i)))
		if !isZero(have[i:end]) {
			return true
		}
		i = end - 1
	}
	return false
}

// sector is the least that a disk writes as a whole, in bytes. A sector that a
// power loss took reads as zeros from where it was synced to its end.
const sector = 512

// sectorRest is how far it is from lsn to the end of its sector.
func sectorRest(lsn wal.LSN) int { return int(sector - lsn%sector) }

// compareNext compares the beginning of p, up to the end of a segment or of what
// is written, with the file, and returns how much that was.
func (w *Writer) compareNext(p []byte) (int, error) {
	const most = 16 << 10 // about what a reconnect compares
	seg := w.segmentAt(w.pos)
	if seg == nil {
		return 0, fmt.Errorf("internal error: no open segment at %s", w.pos)
	}
	n := int(min(uint64(len(p)), uint64(min(w.written, seg.End())-w.pos), most))
	if w.compare == nil {
		w.compare = make([]byte, most)
	}
	have := w.compare[:n]
	if _, err := seg.file.ReadAt(have, int64(w.pos-seg.Start)); err != nil {
		return 0, fmt.Errorf("comparing at timeline %d, %s: %w", w.timeline, w.pos, err)
	}
	if !bytes.Equal(have, p[:n]) {
		i := 0
		for have[i] == p[i] {
			i++
		}
		at, boundary := w.pos+wal.LSN(i), w.walker.Boundary()
		rest := min(n, i+sectorRest(at))
		switch {
		case at < w.unproven && isZero(have[i:rest]):
			return w.restore(seg, p[:rest])
		case at < boundary:
			return 0, &DivergenceError{Timeline: w.timeline, LSN: at}
		}
		return 0, &AbortedRecordError{Timeline: w.timeline, LSN: at, Record: boundary}
	}
	w.pos += wal.LSN(n)
	if w.pos == w.written {
		w.compare, w.unproven = nil, 0 // needed once a connection
	}
	return n, nil
}

// restore writes p at pos, where a power loss took a sector that was not synced,
// and no CRC could tell.
func (w *Writer) restore(seg *segment, p []byte) (int, error) {
	if _, err := seg.file.WriteAt(p, int64(w.pos-seg.Start)); err != nil {
		return 0, fmt.Errorf("archiving at timeline %d, %s: %w", w.timeline, w.pos, err)
	}
	seg.dirty = true
	w.durable = min(w.durable, w.start)
	w.pos += wal.LSN(len(p))
	return len(p), nil
}

func isZero(p []byte) bool {
	for _, b := range p {
		if b != 0 {
			return false
		}
	}
	return true
}

func (w *Writer) segmentAt(lsn wal.LSN) *segment {
	for _, s := range w.open {
		if s.Start <= lsn && lsn < s.End() {
			return s
		}
	}
	return nil
}

// current is the open segment that written lies in. It is made when it is not
// there.
func (w *Writer) current() (*segment, error) {
	if s := w.segmentAt(w.written); s != nil {
		return s, nil
	}
	s := w.id.SegmentSize.Segment(w.timeline, w.written)
	if sealed, err := w.dir.openSealed(s); !errors.Is(err, fs.ErrNotExist) {
		if err == nil {
			err = cmp.Or[error](sealed.file.Close(), &FileError{sealed.path, "is there already, so its segment cannot be written"})
		}
		return nil, err
	}
	f, err := w.openPartial(s)
	fresh := errors.Is(err, fs.ErrNotExist)
	if err == nil {
		// Nothing in it counts, but a sync of it may have failed: ext4 then thinks
		// that pages are on disk that are not, until it has forgotten them.
		if err := settle(w.dir.disk, f); err != nil {
			w.dir.distrust(s.Name() + partialSuffix)
			return nil, errors.Join(err, f.Close())
		}
	}
	if fresh {
		name := s.Name() + partialSuffix
		w.dir.distrust(name) // until its name is durable
		if f, err = createFile(w.dir.disk, name, int64(s.Size), w.dir.fileMode()); err == nil {
			delete(w.dir.distrusted, name)
		}
	}
	if err != nil {
		return nil, err
	}
	w.open = append(w.open, &segment{Segment: s, file: f, fresh: fresh})
	return w.open[len(w.open)-1], nil
}

// Flush makes everything written durable, then seals the segments that are full
// and whose last record is complete, and returns those.
func (w *Writer) Flush() (sealed []wal.Segment, err error) {
	for _, s := range w.open {
		if !s.dirty {
			continue
		}
		began := time.Now()
		err := s.file.SyncData()
		w.dir.synced(began)
		if err != nil {
			w.dir.distrust(s.Name() + partialSuffix)
			return nil, fmt.Errorf("flushing timeline %d up to %s: %w", w.timeline, w.written, err)
		}
		s.dirty = false
		s.syncs++
		if s.bulk {
			// Pages that are used again at once cost less than new ones, and other
			// programs keep theirs.
			end := int64(min(w.written, s.End()) - s.Start)
			s.file.Forget(s.gone, end-s.gone)
			s.bulk, s.gone = false, end
		}
	}
	for w.SealDue() {
		s := w.open[0]
		if err := w.seal(s); err != nil {
			return sealed, fmt.Errorf("sealing %s: %w", s.Name(), err)
		}
		w.open = w.open[1:]
		sealed = append(sealed, s.Segment)
	}
	w.durable = max(w.start, w.walker.Boundary())
	return sealed, nil
}

var zeroes [1 << 20]byte

// smallFlush is how many bytes of WAL a flush must have at most, on average, to
// gain more from zeros ahead than writing those costs.
const smallFlush = 32 << 10

// Prepare makes the small flushes that follow cheaper: it writes zeros behind
// Written, when few are left there and flushes were small. A flush into blocks that
// were allocated but never written waits for the file system's metadata as well.
//
// It leaves a file alone that was there before: WAL behind a damaged byte does not
// count as written, and is worth something to a person until it comes again. In a new
// one the zeros are what it reads as without them, so nothing depends on them, and
// they need no flush; nor does it matter when they cannot be written.
func (w *Writer) Prepare() {
	s := w.segmentAt(w.written)
	if s == nil || !s.fresh {
		return
	}
	used := int64(w.written - s.Start)
	if left := s.ahead - used; left > s.step()/8 || left <= 0 && used-s.since < s.step()/8 {
		return // enough is left, or too little came to judge by
	}
	small := used-s.since <= s.syncs*smallFlush
	s.since, s.syncs = used, 0
	from, to := max(s.ahead, used), min(used+s.step(), int64(s.Size))
	if !small || from >= to {
		return
	}
	if _, err := s.file.WriteAt(zeroes[:to-from], from); err != nil {
		to = int64(s.Size) // no more of that here
	}
	s.ahead = to
}

// seal gives a full segment its final name.
func (w *Writer) seal(s *segment) error {
	began := time.Now()
	err := s.file.Sync()
	w.dir.synced(began)
	if err != nil {
		w.dir.distrust(s.Name() + partialSuffix)
		return err
	}
	if err := w.dir.disk.Rename(s.Name()+partialSuffix, s.Name()); err != nil {
		return err
	}
	began = time.Now()
	err = w.dir.disk.Sync()
	w.dir.synced(began)
	if err != nil {
		return err
	}
	return s.file.Close()
}

// Trim removes the files of segments that begin inside the last incomplete
// record, after the last Flush, so that the segment that is not sealed is the
// last one: pg_receivewal goes on there, with the whole of it. What may have been
// acknowledged stays. The Writer can only be closed then.
func (w *Writer) Trim() error {
	for len(w.open) > 1 && w.open[len(w.open)-1].Start >= w.Promised() {
		last := w.open[len(w.open)-1]
		w.open = w.open[:len(w.open)-1]
		if err := errors.Join(last.file.Close(), w.dir.disk.Remove(last.Name()+partialSuffix)); err != nil {
			return fmt.Errorf("removing the beginning of %s: %w", last.Name(), err)
		}
	}
	return nil
}

// Close closes the files. It does not flush.
func (w *Writer) Close() error {
	var errs []error
	for _, s := range w.open {
		errs = append(errs, s.file.Close())
	}
	w.open = nil
	return errors.Join(errs...)
}
