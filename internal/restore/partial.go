package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

// partial restores what complete records prove of a segment that is not complete,
// with zeros behind that. The server prefers what it gets here to its own copy of
// the segment, and puts it in that one's place, so its own must not be fuller.
//
// later is a complete segment that only a server which has replayed all of s comes
// to; nil: there is none.
func (r Request) partial(ctx context.Context, c archive.Catalogue, s wal.Segment, files []archive.StoredFile, later *wal.Segment) error {
	out, end, err := r.fullest(ctx, c, s, files)
	if err != nil {
		return err
	}
	err = r.better(ctx, c, s, end, later)
	if err == nil { // exactly that, and a full segment
		err = errors.Join(out.Truncate(int64(min(end, s.End())-s.Start)), out.Truncate(int64(s.Size)))
	}
	if err != nil {
		return errors.Join(err, out.discard())
	}
	return out.publish()
}

// better is nil when the archive's WAL of s, up to end, is what recovery should go on with.
func (r Request) better(ctx context.Context, c archive.Catalogue, s wal.Segment, end wal.LSN, later *wal.Segment) error {
	if later != nil && end < s.End() {
		return r.unlessOwn(ctx, c, s, holeError(c, s, *later))
	}
	if end <= s.Start {
		return &NotFoundError{Reason: "the archive has nothing of it yet"}
	}
	own, err := validEnd(ctx, c, s, func(s wal.Segment) (io.ReadCloser, error) { return os.Open(r.own(s.Name())) })
	if err != nil {
		return err
	}
	if own >= end {
		return &NotFoundError{Reason: fmt.Sprintf("the archive has it up to %s, and this server up to %s", end, own)}
	}
	return nil
}

// fullest copies the file that has most of the segment, and tells where the valid
// WAL in the copy ends. Whoever archives may go on writing into the file itself.
func (r Request) fullest(ctx context.Context, c archive.Catalogue, s wal.Segment, files []archive.StoredFile) (best *output, end wal.LSN, err error) {
	for _, file := range files {
		out, err := createOutput(r.Path)
		if err != nil {
			return nil, 0, errors.Join(err, discard(best))
		}
		err = copyPartial(ctx, out, c, file)
		var upTo wal.LSN
		if err == nil {
			upTo, err = validEnd(ctx, c, s, func(of wal.Segment) (io.ReadCloser, error) {
				if of == s {
					return io.NopCloser(io.NewSectionReader(out, 0, int64(s.Size))), nil
				}
				return openAny(c, of)
			})
		}
		if err != nil {
			return nil, 0, errors.Join(err, out.discard(), discard(best))
		}
		worse := out
		if best == nil || upTo > end {
			best, end, worse = out, upTo, best
		}
		if err := discard(worse); err != nil {
			return nil, 0, errors.Join(err, discard(best))
		}
	}
	return best, end, nil
}

func discard(o *output) error {
	if o == nil {
		return nil
	}
	return o.discard()
}

// copyPartial copies what a partial file has, as far as it can be decompressed.
func copyPartial(ctx context.Context, out io.Writer, c archive.Catalogue, file archive.StoredFile) error {
	in, err := c.OpenFile(file.File)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return errNoSegment // it was sealed
	case errors.As(err, new(*archive.FileError)):
		return nil // nothing of it can be decompressed
	case err != nil:
		return err
	}
	defer in.Close()
	buf := make([]byte, copyBuffer)
	for left := int64(file.Size); left > 0; {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := in.Read(buf[:min(copyBuffer, left)])
		if _, err := out.Write(buf[:n]); err != nil {
			return err
		}
		left -= int64(n)
		if err == io.EOF || err != nil && file.Method != "" {
			return nil // it ends in the middle of what pg_receivewal had not written yet
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// source opens a segment where it is to be had; fs.ErrNotExist where it is not.
type source func(wal.Segment) (io.ReadCloser, error)

// openAny opens a segment of an archive, complete or not.
func openAny(c archive.Catalogue, s wal.Segment) (io.ReadCloser, error) {
	in, err := c.Open(s)
	if errors.Is(err, fs.ErrNotExist) {
		in, err = c.OpenFile(s.Name() + ".partial")
	}
	if err != nil {
		return nil, err
	}
	return in, nil
}

// validEnd is the exclusive end of the WAL in s, of a source, that complete records
// prove; s.Start or less when they prove nothing. It is beyond s when the record
// that crosses the end of s is complete in what comes after s in that source.
func validEnd(ctx context.Context, c archive.Catalogue, s wal.Segment, from source) (wal.LSN, error) {
	walker, err := walkerBefore(ctx, c, s)
	if err != nil {
		return 0, err
	}
	for at := s; walker.Boundary() < s.End(); at = at.Next() {
		in, err := from(at)
		if err == nil {
			err = errors.Join(feed(ctx, walker, in, s.Size), in.Close())
		}
		if err != nil {
			if ctx.Err() != nil {
				return 0, err
			}
			break // whatever is wrong there, valid WAL has ended
		}
	}
	return walker.Boundary(), nil
}

// walkerBefore makes a walker that stands at the start of s. Where the archive has
// what is before, it has seen the last record before s begin.
func walkerBefore(ctx context.Context, c archive.Catalogue, s wal.Segment) (*wal.Walker, error) {
	config := wal.WalkerConfig{Start: s.Start, Timeline: s.Timeline, Size: s.Size, SystemID: c.Identity.SystemID, CheckCRC: true}
	h, err := c.History(s.Timeline)
	if errors.Is(err, fs.ErrNotExist) {
		h, err = wal.History{Timeline: s.Timeline}, nil
	}
	if err != nil {
		return nil, err
	}
	for config.Start >= wal.LSN(s.Size) { // a record can be longer than a segment
		config.Start -= wal.LSN(s.Size)
		walker := wal.NewWalker(config)
		for at := config.Start; err == nil && at < s.Start; at += wal.LSN(s.Size) {
			var in io.ReadCloser
			if in, err = openAny(c, s.Size.Segment(h.At(at), at)); err == nil {
				err = errors.Join(feed(ctx, walker, in, s.Size), in.Close())
			}
		}
		if ctx.Err() != nil {
			return nil, ctx.Err()
		}
		if err != nil {
			break
		}
		if walker.ProvenFrom() < s.Start {
			return walker, nil
		}
	}
	config.Start = s.Start
	return wal.NewWalker(config), nil
}
