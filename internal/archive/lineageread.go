package archive

import (
	"context"
	"errors"
	"fmt"
	"io"
	"slices"

	"github.com/walfleet/walfleet/internal/wal"
)

// timeBudget bounds how much WAL is read in search of one commit's time, in bytes: an idle
// server writes little else than checkpoints for days. A segment is read in any case.
const timeBudget = 64 << 20

// FirstCommit finds the first commit or abort in segments, which follow each other. It is
// the zero Commit when there is none as far as timeBudget goes. The error is
// fs.ErrNotExist when a segment is not there any more.
func (c Catalogue) FirstCommit(ctx context.Context, segments []wal.Segment) (wal.Commit, error) {
	if len(segments) == 0 {
		return wal.Commit{}, nil
	}
	scan := wal.NewCommitScanner(segments[0].Size, segments[0].Start)
	for budget, i := int64(timeBudget), 0; i < len(segments) && budget > 0; i++ {
		r, err := c.Open(segments[i])
		if err != nil {
			return wal.Commit{}, err
		}
		n := int64(segments[i].Size)
		budget -= n
		if err := scanCommits(ctx, scan, r, n, true); err != nil || scan.First != (wal.Commit{}) {
			return scan.First, err
		}
	}
	return wal.Commit{}, nil
}

// LastCommit finds the last commit or abort in segments, which follow each other. It is
// the zero Commit when there is none as far as timeBudget goes. The error is
// fs.ErrNotExist when a segment is not there any more.
func (c Catalogue) LastCommit(ctx context.Context, segments []wal.Segment) (wal.Commit, error) {
	budget := int64(timeBudget)
	for _, s := range slices.Backward(segments) {
		if budget <= 0 {
			break
		}
		budget -= int64(s.Size)
		last, err := c.lastCommit(ctx, s)
		if err != nil || last != (wal.Commit{}) {
			return last, err
		}
	}
	return wal.Commit{}, nil
}

// lastCommit looks from the segment's end, further back each time; a compressed one can be
// read from its beginning alone.
func (c Catalogue) lastCommit(ctx context.Context, s wal.Segment) (wal.Commit, error) {
	for n := int64(256 << 10); ; n *= 16 {
		r, err := c.Open(s)
		if err != nil {
			return wal.Commit{}, err
		}
		n = min(n, int64(s.Size))
		if r.Name != s.Name() {
			n = int64(s.Size)
		} else if _, err := r.file.Seek(int64(s.Size)-n, io.SeekStart); err != nil {
			return wal.Commit{}, errors.Join(err, r.Close())
		}
		scan := wal.NewCommitScanner(s.Size, s.End()-wal.LSN(n))
		if err := scanCommits(ctx, scan, r, n, false); err != nil || scan.Last != (wal.Commit{}) || n == int64(s.Size) {
			return scan.Last, err
		}
	}
}

// scanCommits gives n bytes of r to scan, or what is enough for the first commit, and
// closes r.
func scanCommits(ctx context.Context, scan *wal.CommitScanner, r *Reader, n int64, first bool) error {
	defer r.Close()
	buf := make([]byte, 32*wal.PageSize)
	for ; n > 0; n -= int64(len(buf)) {
		if err := ctx.Err(); err != nil {
			return err
		}
		buf = buf[:min(n, int64(len(buf)))]
		if _, err := io.ReadFull(r, buf); err != nil {
			return fmt.Errorf("reading %s: %w", r.file.Name(), err)
		}
		if !scan.Feed(buf) || first && scan.First != (wal.Commit{}) {
			break
		}
	}
	return nil
}

// Unfinished is the WAL that a Window's partial files have.
type Unfinished struct {
	End         wal.LSN // exclusive end of the last complete record in them; the Window's To: there is none
	First, Last wal.Commit
}

// ReadPartials follows the records of a Window's partial files, with their CRCs, to their
// end. A file that ends early, or cannot be decompressed to its end, has what comes before.
// The error is fs.ErrNotExist when one is not there any more: it was sealed since.
func (c Catalogue) ReadPartials(ctx context.Context, w Window) (u Unfinished, err error) {
	u.End = w.To
	if len(w.Partials) == 0 {
		return u, nil
	}
	first := w.Partials[0].Segment
	walker := wal.NewWalker(wal.WalkerConfig{Start: first.Start, Timeline: w.Timeline, Size: first.Size, SystemID: c.Identity.SystemID, CheckCRC: true})
	scan := wal.NewCommitScanner(first.Size, first.Start)
	scan.Until = w.limit
	ended := false
	for _, f := range w.Partials {
		if ended {
			break
		}
		if ended, err = c.readPartial(ctx, f, walker, scan); err != nil {
			return u, err
		}
	}
	u.End = max(w.To, min(walker.Boundary(), w.limit))
	u.First, u.Last = scan.First, scan.Last
	return u, nil
}

// readPartial gives a partial file to walker, and what that accepts to scan. ended says
// that the WAL ends in it.
func (c Catalogue) readPartial(ctx context.Context, f StoredFile, walker *wal.Walker, scan *wal.CommitScanner) (ended bool, err error) {
	r, err := c.OpenFile(f.File)
	if damaged := new(FileError); errors.As(err, &damaged) {
		return true, nil
	}
	if err != nil {
		return true, err
	}
	defer r.Close()
	buf := make([]byte, 32*wal.PageSize)
	for left := int64(f.Size); left > 0; left -= int64(len(buf)) {
		if err := ctx.Err(); err != nil {
			return true, err
		}
		buf = buf[:min(left, int64(len(buf)))]
		n, err := io.ReadFull(r, buf)
		if n < len(buf) && isDiskError(err) {
			return true, err
		}
		scan.Feed(buf[:n])
		if walker.Feed(buf[:n]) != nil || n < len(buf) {
			return true, nil
		}
	}
	return false, nil
}
