package verify

import (
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"os"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

// A complete segment is followed from its start with a walker of its own, so that all can be read at the same time.
// Where it starts inside a record, the rest of that one is skipped by its length. Whoever follows the segment before
// goes on into this one for that: until a record that begins here is complete. So every record's CRC is checked by
// the one who saw it begin, and every link to the record before, too.

// complete checks a complete piece: its first file record by record, and that the others have the same bytes.
func (w *worker) complete(ctx context.Context, p *piece) {
	f := w.open(p)
	if f == nil {
		return
	}
	walker, ok := w.follow(ctx, p, f)
	f.Close()
	if !ok {
		return
	}
	for _, other := range p.files {
		if other.File != f.Name {
			w.sameAs(ctx, p, f.Name, other.File)
		}
	}
	joined := w.goOn(ctx, p, f.Name, walker)
	if ctx.Err() == nil && w.clean && joined {
		w.done.add(p)
	}
}

// follow gives all of a piece's WAL to walkers: a new one after each fault. It returns the one that has come to its
// end; nil: there is none. ok is false when ctx is done.
func (w *worker) follow(ctx context.Context, p *piece, f *archive.Reader) (walker *wal.Walker, ok bool) {
	first := w.walker(p.Timeline, p.Start)
	walker = first
	last := Fault{File: f.Name} // that was found
	for pos := p.Start; ; {
		n, err := w.read(ctx, f, w.buf[:min(bufSize, p.End()-pos)])
		if ctx.Err() != nil {
			return nil, false
		}
		for part := w.buf[:n]; len(part) > 0; {
			if walker == nil {
				walker = w.walker(p.Timeline, pos)
			}
			corrupt := new(wal.CorruptError)
			if !errors.As(walker.Feed(part), &corrupt) {
				pos += wal.LSN(len(part))
				break
			}
			next := nextPage(max(corrupt.LSN+1, pos))
			if last.end != corrupt.LSN || corrupt.LSN != pos {
				w.note(&last)
				last = Fault{File: f.Name, Offset: int64(corrupt.LSN - p.Start), at: corrupt.LSN, Kind: Kind(corrupt.Kind), Text: corrupt.Reason}
			} // else it goes on: one fault is enough for pages in a row
			last.end = next
			walker = nil
			part = part[min(uint64(next-pos), uint64(len(part))):]
			pos = next
		}
		w.progress(int64(n))
		if err != nil {
			w.note(&last)
			w.readFault(p, f.Name, int64(pos-p.Start), err)
			return nil, true
		}
		if pos >= p.End() || n == 0 {
			w.note(&last)
			w.checkEnd(p, f, pos)
			if pos < p.End() {
				walker = nil
			}
			w.mu.Lock()
			w.report.Segments++
			w.walked[p] = walked{first.ProvenFrom(), walker == nil || walker.ProvenFrom() < p.End(), f.Name}
			w.mu.Unlock()
			return walker, true
		}
	}
}

// nextPage is the first start of a page that is not before l.
func nextPage(l wal.LSN) wal.LSN { return (l + wal.PageSize - 1) &^ (wal.PageSize - 1) }

// note notes a fault, if it is one.
func (w *worker) note(f *Fault) {
	if f.Kind != "" {
		w.fault(*f)
	}
}

// readFault notes that a file cannot be read from offset on.
func (w *worker) readFault(p *piece, file string, offset int64, err error) {
	kind := Compressed
	if isSystemError(err) {
		kind = Unreadable
	}
	w.fault(Fault{File: file, Offset: offset, at: p.Start + wal.LSN(offset), end: p.End(), Kind: kind, Text: fmt.Sprintf("%q", err)})
}

func isSystemError(err error) bool {
	return errors.As(err, new(*os.PathError)) || errors.As(err, new(*os.SyscallError))
}

// checkEnd checks that a file ended at pos because the segment does.
func (w *worker) checkEnd(p *piece, f *archive.Reader, pos wal.LSN) {
	if pos < p.End() {
		w.fault(Fault{File: f.Name, Offset: int64(pos - p.Start), at: pos, end: p.End(), Kind: Size,
			Text: fmt.Sprintf("has %d bytes of WAL, a segment has %d", pos-p.Start, p.Size)})
		return
	}
	switch n, err := io.ReadAtLeast(f, make([]byte, 1), 1); {
	case n > 0:
		w.fault(Fault{File: f.Name, Offset: int64(p.Size), at: p.Start, end: p.End(), Kind: Size,
			Text: fmt.Sprintf("has more than the %d bytes of a segment", p.Size)})
	case err != io.EOF:
		w.readFault(p, f.Name, int64(p.Size), err)
	}
}

// sameAs checks that another file of a piece has the same bytes. One that is gone was removed after it was compressed.
func (w *worker) sameAs(ctx context.Context, p *piece, file, other string) {
	a, err := w.c.OpenFile(file)
	if err != nil {
		return
	}
	defer a.Close()
	b, err := w.c.OpenFile(other)
	if errors.Is(err, os.ErrNotExist) {
		return
	}
	if err != nil {
		w.readFault(p, other, 0, err)
		return
	}
	defer b.Close()
	half := bufSize / 2
	for off := int64(0); ; off += int64(half) {
		n, errA := w.read(ctx, a, w.buf[:half])
		m, errB := w.read(ctx, b, w.buf[half:])
		i := firstDifference(w.buf[:n], w.buf[half:half+m])
		switch {
		case ctx.Err() != nil || errA != nil:
			return
		case errB != nil:
			w.readFault(p, other, off+int64(m), errB)
			return
		case i >= 0:
			w.fault(Fault{File: other, Offset: off + int64(i), at: p.Start + wal.LSN(off) + wal.LSN(i), end: p.End(), Kind: Duplicate,
				Text: fmt.Sprintf("differs from %s", file)})
			return
		case n < half:
			return
		}
	}
}

// firstDifference is the index of the first byte that a and b do not have in common; -1: they are the same.
func firstDifference(a, b []byte) int {
	n := min(len(a), len(b))
	if bytes.Equal(a[:n], b[:n]) {
		if len(a) == len(b) {
			return -1
		}
		return n
	}
	for i := range n {
		if a[i] != b[i] {
			return i
		}
	}
	return -1
}

// goOn follows the last record of a piece, and the link to it, into what comes after it. It tells whether that was
// to be had.
func (w *worker) goOn(ctx context.Context, p *piece, file string, walker *wal.Walker) (joined bool) {
	if walker == nil || walker.ProvenFrom() >= p.End() {
		return false // damaged, or whoever saw the record begin does it
	}
	if len(w.after[p]) == 0 {
		if from := walker.Boundary(); from < p.End() {
			w.unproven(file, from, p.End(), "a record begins here, and the archive ends before it does: no checksum vouches for this part of it")
		}
		return false
	}
	joined = true
	for _, q := range w.after[p] {
		joined = w.join(ctx, p, q, walker.Onto(q.Timeline, w.exactly(q.Timeline))) && joined
	}
	return joined
}

// join follows a walker, which has come to the end of p, into q and what comes after it, until a record that begins
// there is complete.
func (w *worker) join(ctx context.Context, p, q *piece, walker *wal.Walker) bool {
	seam := q.Start
	for {
		f := w.open(q)
		if f == nil {
			return false
		}
		err := w.feedUntil(ctx, f, q, walker, seam)
		f.Close()
		switch corrupt := new(wal.CorruptError); {
		case ctx.Err() != nil:
			return false
		case walker.Last() >= seam:
			return true
		case q.partial:
			return w.joinPartial(ctx, p, q, walker, err)
		case errors.As(err, &corrupt):
			w.corrupt(q.Timeline, corrupt, walker.Pos())
			return false
		case err != nil || walker.Pos() < q.End():
			return false // whoever checks q says so
		}
		next := w.after[q]
		if len(next) == 0 {
			from := walker.Boundary()
			w.unproven(w.fileOf(q.Timeline, from), from, q.End(), "a record begins here, and the archive ends before it does: no checksum vouches for this part of it")
			return false
		}
		q = next[0]
		walker = walker.Onto(q.Timeline, w.exactly(q.Timeline))
	}
}

// corrupt notes a fault at the place that the error names.
func (w *worker) corrupt(tli wal.Timeline, e *wal.CorruptError, pos wal.LSN) {
	w.fault(Fault{File: w.fileOf(tli, e.LSN), Offset: w.c.Identity.SegmentSize.Offset(e.LSN), at: e.LSN, end: nextPage(max(e.LSN+1, pos)),
		Kind: Kind(e.Kind), Text: e.Reason})
}

// feedUntil gives the walker what a piece's file has, until a record that begins at seam or later is complete.
func (w *worker) feedUntil(ctx context.Context, f io.Reader, q *piece, walker *wal.Walker, seam wal.LSN) error {
	const step = 64 << 10
	for pos := q.Start; pos < q.End() && walker.Last() < seam; {
		n, err := w.read(ctx, f, w.buf[:step])
		if fed := walker.Feed(w.buf[:n]); fed != nil || err != nil || n == 0 {
			return cmp.Or(fed, err)
		}
		pos += wal.LSN(n)
	}
	return nil
}

// joinPartial judges why a record that begins in p was not seen to go on well in the partial q. WAL may end there
// anywhere; only if a record after it is complete has all of it come.
func (w *worker) joinPartial(ctx context.Context, p, q *piece, walker *wal.Walker, err error) bool {
	corrupt := new(wal.CorruptError)
	if errors.As(err, &corrupt) && corrupt.LSN <= q.Start { // at its start: it goes on with another length
		if f := w.open(q); f != nil {
			own := w.walker(q.Timeline, q.Start)
			_ = w.feedUntil(ctx, f, q, own, q.Start) // what matters is how far it comes
			f.Close()
			if own.Last() != 0 {
				w.corrupt(q.Timeline, corrupt, walker.Pos())
				return false
			}
		}
	}
	if from := walker.Boundary(); from < p.End() && ctx.Err() == nil {
		w.unproven(w.fileOf(p.Timeline, from), from, p.End(), fmt.Sprintf("a record begins here, and is not complete in %s: no checksum vouches for this part of it", q.files[0].File))
	}
	return false
}

// partialFile finds out how far a partial file has complete records. Nothing tells the end of WAL from damage there.
func (w *worker) partialFile(ctx context.Context, p *piece, stored archive.StoredFile) {
	end, ok := w.partialEnd(ctx, p, stored)
	if !ok {
		return
	}
	w.mu.Lock()
	defer w.mu.Unlock()
	w.report.Partial = append(w.report.Partial, PartialFile{stored.File, end.String()})
	if p.files[0].File == stored.File {
		w.partialEnds[p] = end
	}
}

// partialEnd is the exclusive end of the complete records of a partial file; ok is false when there is none, or it
// was not found out.
func (w *worker) partialEnd(ctx context.Context, p *piece, stored archive.StoredFile) (end wal.LSN, ok bool) {
	f, err := w.c.OpenFile(stored.File)
	switch damaged := new(archive.FileError); {
	case errors.Is(err, os.ErrNotExist): // it is complete by now
		return 0, false
	case errors.As(err, &damaged): // nothing of it was written out yet
		return p.Start, true
	case err != nil:
		w.readFault(p, stored.File, 0, err)
		return 0, false
	}
	defer f.Close()
	walker := w.walker(p.Timeline, p.Start)
	for pos := p.Start; pos < p.End(); {
		n, err := w.read(ctx, f, w.buf[:min(bufSize, p.End()-pos)])
		if ctx.Err() != nil {
			return 0, false
		}
		corrupt := new(wal.CorruptError)
		if errors.As(walker.Feed(w.buf[:n]), &corrupt) {
			if corrupt.LSN == p.Start && pos == p.Start && !isZero(w.buf[:min(n, wal.PageSize)]) {
				w.fault(Fault{File: stored.File, at: p.Start, end: p.End(), Kind: Kind(corrupt.Kind), Text: corrupt.Reason})
			}
			break
		}
		if isSystemError(err) {
			w.readFault(p, stored.File, int64(pos-p.Start), err)
		}
		if n == 0 || err != nil {
			break
		}
		pos += wal.LSN(n)
	}
	if stored.Method == "" && stored.Bytes > int64(p.Size) {
		w.fault(Fault{File: stored.File, Offset: int64(p.Size), at: p.Start, end: p.End(), Kind: Size,
			Text: fmt.Sprintf("has %d bytes, a segment has %d", stored.Bytes, p.Size)})
	}
	return walker.Boundary(), true
}

func isZero(p []byte) bool { return len(bytes.TrimLeft(p, "\x00")) == 0 }

// fork checks the first segment of a timeline: it has what its parent has, up to where it was left, and a record
// ends there.
func (w *worker) fork(ctx context.Context, p *piece, h wal.History) {
	at := begin(h)
	child := w.open(p)
	if child == nil {
		return
	}
	defer child.Close()
	var parent *archive.Reader
	var old *piece
	for i := len(h.Forks) - 1; i >= 0 && parent == nil; i-- {
		if old = w.by[p.Size.Segment(h.Forks[i].Timeline, p.Start)]; old != nil {
			parent = w.open(old)
		}
	}
	if parent != nil {
		defer parent.Close()
	}
	walker := w.walker(p.Timeline, p.Start)
	half := bufSize / 2
	for pos := p.Start; pos < at; {
		n, errA := w.read(ctx, child, w.buf[:min(half, int(at-pos))])
		if ctx.Err() != nil || errA != nil || n == 0 || walker.Feed(w.buf[:n]) != nil {
			return // whoever checks it says so; what the partial one lacks was not received yet
		}
		if parent != nil {
			m, _ := w.read(ctx, parent, w.buf[half:half+n])
			i := firstDifference(w.buf[:n], w.buf[half:half+m])
			// The old timeline's segment, if partial, can end earlier: in zeros.
			if i >= 0 && i < m && !(old.partial && isZero(w.buf[half+i:half+min(m, (i/wal.PageSize+1)*wal.PageSize)])) {
				w.fault(Fault{File: parent.Name, Offset: int64(pos-p.Start) + int64(i), at: pos + wal.LSN(i), end: at, Kind: Timeline,
					Text: fmt.Sprintf("differs from %s before %s, where timeline %d began", child.Name, at, p.Timeline)})
			}
			if i >= 0 || m < n {
				parent = nil
			}
		}
		pos += wal.LSN(n)
	}
	if walker.Boundary() != at && at%wal.PageSize != 0 {
		w.fault(Fault{File: wal.HistoryName(p.Timeline), Kind: History, at: at, Text: fmt.Sprintf("says that timeline %d began at %s, where no record of %s ends", p.Timeline, at, child.Name)})
	}
}

func (w *worker) progress(n int64) {
	done := w.bytes.Add(n)
	if w.o.Progress != nil {
		w.o.Progress(done, w.total)
	}
}
