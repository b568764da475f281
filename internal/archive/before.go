package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	"github.com/walfleet/walfleet/internal/wal"
)

// A Writer goes on with what the sealed segments before its first one begin: a
// record that crosses into it, and the link from its first record to the last one
// of theirs.

// walkerBefore makes a walker that stands at start, the start of a segment.
// Where the segments before are here, it has seen the last record before start
// begin, so that what follows must continue that record, or name it as the one
// before. A record can be longer than a segment, so that one may be several
// segments back.
func (w *Writer) walkerBefore(ctx context.Context, start wal.LSN, checkCRC bool) (*wal.Walker, error) {
	config := wal.WalkerConfig{Start: start, Timeline: w.timeline, Size: w.id.SegmentSize, SystemID: w.id.SystemID, CheckCRC: checkCRC, Settled: start}
	var inside []*sealedFile // of one record, last one first
	defer func() {
		for _, s := range inside {
			s.file.Close()
		}
	}()
	for at := start; ; at -= wal.LSN(w.id.SegmentSize) {
		s, err := w.openSealedBefore(at)
		if s == nil || err != nil {
			return wal.NewWalker(config), err
		}
		inside = append(inside, s)
		walker, err := s.walker(ctx, config)
		if walker != nil {
			for _, later := range slices.Backward(inside[:len(inside)-1]) {
				if err = later.feed(ctx, walker, 0); err != nil {
					s = later
					break
				}
			}
		}
		damaged := new(FileError)
		switch {
		case s.suffix != "" && errors.As(err, &damaged):
			w.unsound = damaged
			return wal.NewWalker(config), nil
		case err != nil:
			return nil, err
		case walker != nil:
			return walker, nil
		}
	}
}

// Unsound is what was found wrong before the place where the Writer goes on, in a
// file that does not stop it from doing so: a compressed segment that cannot be read,
// or a partial file that is not sealed although later ones are; nil: nothing.
func (w *Writer) Unsound() error {
	if w.unsound == nil {
		return nil
	}
	return w.unsound
}

// sealedFile is a sealed segment that is open for reading.
type sealedFile struct {
	wal.Segment
	suffix string // of its compression
	path   string // for errors
	file   file
}

// openSealedBefore opens the sealed segment that ends at at, of this timeline or
// of the ancestor that has it; nil when there is none.
func (w *Writer) openSealedBefore(at wal.LSN) (*sealedFile, error) {
	if at == 0 {
		return nil, nil
	}
	h, _, err := w.dir.History(w.timeline)
	if err != nil {
		return nil, err
	}
	timelines := []wal.Timeline{w.timeline}
	for _, fork := range h.Forks {
		if fork.End >= at {
			timelines = append(timelines, fork.Timeline)
		}
	}
	for _, tli := range timelines {
		if w.dir.accepted(tli, at) {
			return nil, nil // what is before it is another server's
		}
		s, err := w.dir.openSealed(w.id.SegmentSize.Segment(tli, at-1))
		if !errors.Is(err, fs.ErrNotExist) {
			return s, err
		}
	}
	return nil, nil
}

// openSealed opens a sealed segment, compressed or not; fs.ErrNotExist when it is
// not there. Compressing one removes the plain file last, so that is looked for
// first.
func (d *Dir) openSealed(s wal.Segment) (*sealedFile, error) {
	for _, suffix := range sealedSuffixes {
		name := s.Name() + suffix
		f, err := d.disk.Open(name)
		if err == nil {
			return &sealedFile{s, suffix, d.pathOf(name), f}, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return nil, fs.ErrNotExist
}

// walker makes a walker, as in config but for where it starts, that has seen the
// segment's last record begin and stands at the segment's end. It is nil when no
// record begins there, as the segment is all inside of a longer one.
func (s *sealedFile) walker(ctx context.Context, config wal.WalkerConfig) (*wal.Walker, error) {
	offset := int64(0)
	if s.suffix == "" { // a compressed one is read once, from its beginning
		var err error
		if offset, err = s.lastBeginning(ctx); err != nil || offset < 0 {
			return nil, err
		}
	}
	config.Start = s.Start + wal.LSN(offset)
	walker := wal.NewWalker(config)
	if err := s.feed(ctx, walker, offset); err != nil || walker.ProvenFrom() == s.End() {
		return nil, err
	}
	return walker, nil
}

// lastBeginning is the offset of the last page in which a record begins: usually
// the last one, much earlier when a large record goes on into the next segment,
// or after a switch of WAL; -1: there is none. The segment is not compressed.
func (s *sealedFile) lastBeginning(ctx context.Context) (int64, error) {
	page := make([]byte, wal.PageSize)
	for offset := int64(s.Size) - wal.PageSize; offset >= 0; offset -= wal.PageSize {
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		if _, err := s.file.ReadAt(page, offset); err != nil {
			return 0, fmt.Errorf("reading %s: %w", s.path, err)
		}
		if wal.RecordBegins(page) {
			return offset, nil
		}
	}
	return -1, nil
}

// feed gives what the segment has from offset on, 0 in a compressed one, to the
// walker.
func (s *sealedFile) feed(ctx context.Context, walker *wal.Walker, offset int64) error {
	r, err := decompress(from(s.file, offset), s.suffix)
	if err != nil {
		return s.damaged(err)
	}
	defer r.Close()
	err = feed(ctx, walker, r, int64(s.Size)-offset)
	if corrupt := new(wal.CorruptError); errors.As(err, &corrupt) || s.suffix != "" && err != nil && ctx.Err() == nil {
		return s.damaged(err)
	}
	return err
}

// damaged is the error for a sealed segment that has other bytes than the
// server had.
func (s *sealedFile) damaged(err error) error {
	if isDiskError(err) { // the disk's fault; it may read well next time
		return fmt.Errorf("reading %s: %w", s.path, err)
	}
	return &FileError{s.path, fmt.Sprintf("is damaged: %v; move it away and the server sends the segment again, if it still has it", err)}
}

// sealBefore seals what a stop inside a record that crosses a segment's end has
// left, when pg_receivewal went on after that: it takes the last segment that was
// begun for the one to go on with, and leaves those before it as they are. They are
// complete if the record is, with what is sealed after them.
func (w *Writer) sealBefore(ctx context.Context) error {
	c, err := w.dir.scan(w.id.SegmentSize)
	if err != nil {
		return err
	}
	left := func(s wal.Segment) bool {
		return s.Timeline == w.timeline && s.End() > w.dir.restarts()[s.Timeline] && c.plain[s.Name()+partialSuffix] && !c.sealed[s]
	}
	for last := range c.partial {
		if !left(last) || !c.sealed[last.Next()] {
			continue
		}
		first := last
		for before := w.id.SegmentSize.Segment(w.timeline, first.Start-1); left(before); before = w.id.SegmentSize.Segment(w.timeline, first.Start-1) {
			first = before
		}
		if err := w.sealProven(ctx, first, last); err != nil {
			return err
		}
	}
	return nil
}

// sealProven seals the partial files from first to last, with what came after them
// as the proof that they are complete. When they contradict each other that is an
// error. When nothing speaks for them, or against, they stay as they are, and
// Unsound names the first one; so they do while the record that goes on after them
// has not come to its end.
func (w *Writer) sealProven(ctx context.Context, first, last wal.Segment) error {
	walker, err := w.walkerBefore(ctx, first.Start, true)
	if err != nil {
		return err
	}
	path := w.dir.pathOf(first.Name() + partialSuffix)
	corrupt := new(wal.CorruptError)
	for s := first; err == nil && walker.Boundary() < last.End(); s = s.Next() {
		var partial bool
		partial, err = w.proceed(ctx, walker, s, s.Start <= last.Start)
		if walker.Boundary() >= last.End() {
			err = nil // what comes after the record is not asked about
		} else if s.Start > last.Start && partial && (errors.Is(err, fs.ErrNotExist) || errors.As(err, &corrupt)) { // the end of what it has
			w.unsound = &FileError{path, fmt.Sprintf("stays partial, although %s is sealed, until the record that goes on after that has come as a whole", last.Next().Name())}
			return nil
		}
	}
	abandoned, _ := walker.Abandoned() // whose bytes no CRC speaks for
	switch {
	case err != nil && !errors.As(err, &corrupt) && !errors.As(err, new(*FileError)):
		return err
	case err != nil || abandoned != 0 && abandoned < last.End():
		if err == nil {
			err = fmt.Errorf("the server gave up the record at %s", abandoned)
		}
		return &FileError{path, fmt.Sprintf("is not complete, although %s is sealed: %v; move it away if it is left over from before, "+
			"else what comes after it too, and the server sends that again, if it still has it", last.Next().Name(), err)}
	case walker.ProvenFrom() > first.Start:
		w.unsound = &FileError{path, fmt.Sprintf("stays partial, although %s is sealed: it begins inside a record whose beginning cannot be read here, "+
			"so that nothing proves its first bytes; compare it with the server's", last.Next().Name())}
		return nil
	}
	for s := first; s.Start <= last.Start; s = s.Next() {
		if err := w.dir.disk.Rename(s.Name()+partialSuffix, s.Name()); err != nil {
			return fmt.Errorf("sealing %s: %w", s.Name(), err)
		}
	}
	return w.dir.disk.Sync()
}

// proceed gives the walker a segment: its partial file, settled, where unsealed says
// that it is that, or no sealed one is there. It tells which one it was.
func (w *Writer) proceed(ctx context.Context, walker *wal.Walker, s wal.Segment, unsealed bool) (partial bool, err error) {
	if !unsealed {
		sealed, err := w.dir.openSealed(s)
		if err == nil {
			return false, errors.Join(sealed.feed(ctx, walker, 0), sealed.file.Close())
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return false, err
		}
	}
	name := s.Name() + partialSuffix
	f, err := w.dir.disk.OpenWrite(name)
	if err != nil {
		return true, err
	}
	defer f.Close()
	if err := settle(w.dir.disk, f); err != nil {
		w.dir.distrust(name)
		return true, err
	}
	err = feed(ctx, walker, from(f, 0), int64(s.Size))
	if errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = &FileError{w.dir.pathOf(name), "is too short"}
	}
	return true, err
}
