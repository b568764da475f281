package archive

import (
	"context"
	"errors"
	"fmt"
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
	var inside []*sealedFile // in which no record begins, last one first
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
		offset, err := s.lastBeginning(ctx)
		if err != nil {
			return nil, err
		}
		if offset < 0 {
			continue
		}
		config.Start = s.Start + wal.LSN(offset)
		walker := wal.NewWalker(config)
		for _, s := range slices.Backward(inside) {
			if err := s.feed(ctx, walker, offset); err != nil {
				return nil, err
			}
			offset = 0
		}
		return walker, nil
	}
}

// sealedFile is a sealed segment that is open for reading.
type sealedFile struct {
	wal.Segment
	path string // for errors
	file file
}

// openSealedBefore opens the sealed segment that ends at at, of this timeline or
// of the ancestor that has it; nil when there is none that can be read as it is.
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
		s := w.id.SegmentSize.Segment(tli, at-1)
		f, err := w.dir.disk.Open(s.Name())
		if err == nil {
			return &sealedFile{s, w.dir.pathOf(s.Name()), f}, nil
		}
		if !errors.Is(err, fs.ErrNotExist) {
			return nil, err
		}
	}
	return nil, nil
}

// lastBeginning is the offset of the last page in which a record begins: usually
// the last one, much earlier when a large record goes on into the next segment,
// or after a switch of WAL. It is -1 when the whole segment is inside of one
// record.
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

// feed gives what the segment has from offset on to the walker.
func (s *sealedFile) feed(ctx context.Context, walker *wal.Walker, offset int64) error {
	err := feed(ctx, walker, s.file, offset, int64(s.Size))
	if corrupt := new(wal.CorruptError); errors.As(err, &corrupt) {
		return &FileError{s.path, corrupt.Error() + "; move it away and the server sends the segment again, if it still has it"}
	}
	return err
}
