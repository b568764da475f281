package archive

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/walfleet/walfleet/internal/wal"
)

// Holdings is what an archive's directory holds, as somebody sees it who does not
// archive into it. What is not known is zero.
type Holdings struct {
	Identity    Identity     // of archive.json, or of a segment's header where there is none
	Bound       bool         // there is an archive.json
	Origin      Origin       // where the archive began; only when Bound
	Gaps        []Gap        // as they were recorded
	Divergences []Divergence // as they were accepted

	Segments   int         // complete segments, each counted once
	Compressed int         // those of them that have no plain file any more
	Bytes      int64       // of all files of complete segments, as they are stored
	First      wal.Segment // the oldest complete one
	Last       wal.Segment // the newest complete one: of the highest timeline, the highest

	Partial  []PartialSegment // in progress, or left by a change of timeline; oldest first
	Aside    int              // files that are kept aside, *.aborted and *.diverged
	Timeline wal.Timeline     // the highest that a segment, complete or not, or a history is of
	Modified time.Time        // the latest modification of a segment, complete or not

	Free  int64 // bytes of the file system that this user may still use
	Total int64 // bytes of the file system
}

// PartialSegment is a segment that is not complete. How much of it is WAL only its
// records tell, which are not read here.
type PartialSegment struct {
	wal.Segment
	Bytes    int64 // the file's size; the whole segment's, as walfleet writes it
	Modified time.Time
}

// Sealed is the exclusive end of the complete segments on the highest timeline that
// has one; 0: there is none. What is in partial segments comes on top.
func (h Holdings) Sealed() wal.LSN {
	if h.Segments == 0 {
		return 0
	}
	return h.Last.End()
}

// Peek looks into an archive's directory without locking or changing anything in
// it, whether or not somebody archives into it at the time. It reads archive.json
// and the names, sizes and times of files, not what is in segments.
//
// The error is fs.ErrNotExist when there is no such directory, a *FileError when
// archive.json makes no sense (the rest of the Holdings is filled in all the same),
// or what the file system said. ctx is looked at between two files; nothing can
// interrupt a disk that does not answer, so a caller that must not wait for one
// calls Peek in a goroutine of its own.
func Peek(ctx context.Context, path string) (Holdings, error) {
	var h Holdings
	var st unix.Statfs_t
	if err := unix.Statfs(path, &st); err != nil {
		return h, fmt.Errorf("archive directory: %w", &os.PathError{Op: "statfs", Path: path, Err: err})
	}
	h.Free, h.Total = int64(st.Bavail)*int64(st.Bsize), int64(st.Blocks)*int64(st.Bsize)

	d := &Dir{path: path, disk: osDisk(path)} // not locked: only for what reads
	metaErr := d.readMeta()
	if metaErr != nil && !errors.As(metaErr, new(*FileError)) {
		return h, fmt.Errorf("archive directory: %w", metaErr)
	}
	if d.meta != nil {
		id, _ := strconv.ParseUint(d.meta.SystemID, 10, 64) // checked when it was read
		h.Bound, h.Identity = true, Identity{id, d.SegmentSize()}
		h.Origin.Timeline, h.Origin.LSN, _ = d.Origin()
		h.Origin.Source, h.Origin.Time = d.meta.Origin.Source, d.meta.Origin.Time
		h.Gaps, h.Divergences = d.Gaps(), d.Divergences()
	} else if err := h.identify(ctx, d); err != nil {
		return h, err
	}
	// A file that is renamed while names are read may be missed under both of its
	// names, or be gone under the one that was seen.
	for attempt := 1; ; attempt++ {
		err := h.count(ctx, d)
		if !errors.Is(err, fs.ErrNotExist) || attempt == peekAttempts {
			return h, errors.Join(metaErr, err)
		}
	}
}

// peekAttempts bounds how often names are read again because files went away
// meanwhile.
const peekAttempts = 5

// identify reads whose segments these are off the first one that tells.
func (h *Holdings) identify(ctx context.Context, d *Dir) error {
	c, err := d.scan(smallestSegment) // whose names are all others' too
	if err != nil {
		return fmt.Errorf("archive directory: %w", err)
	}
	for name := range c.files {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		id, ok, err := d.readIdentity(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("archive directory: %w", err)
		}
		if ok {
			h.Identity = id
			return nil
		}
	}
	return nil
}

// count fills in what the files say.
func (h *Holdings) count(ctx context.Context, d *Dir) error {
	h.Segments, h.Compressed, h.Bytes, h.Aside = 0, 0, 0, 0
	h.First, h.Last, h.Partial, h.Timeline, h.Modified = wal.Segment{}, wal.Segment{}, nil, 0, time.Time{}

	names, err := d.disk.Names()
	if err != nil {
		return fmt.Errorf("archive directory: %w", err)
	}
	for _, name := range names {
		if tli, err := wal.ParseHistoryName(name); err == nil {
			h.Timeline = max(h.Timeline, tli)
		}
		if ext := filepath.Ext(name); ext == abortedSuffix || ext == divergedSuffix {
			h.Aside++
		}
	}
	size := h.Identity.SegmentSize
	if !size.Valid() {
		return nil // no segment either, or none that tells
	}
	c, err := d.scan(size)
	if err != nil {
		return fmt.Errorf("archive directory: %w", err)
	}
	for name, s := range c.files {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		info, err := os.Lstat(d.pathOf(name))
		if err != nil {
			return err
		}
		h.Timeline = max(h.Timeline, s.Timeline)
		if t := info.ModTime(); t.After(h.Modified) {
			h.Modified = t
		}
		if filepath.Ext(name) == partialSuffix {
			h.Partial = append(h.Partial, PartialSegment{s, info.Size(), info.ModTime()})
		} else {
			h.Bytes += info.Size()
		}
	}
	h.Segments = len(c.sealed)
	for s := range c.sealed {
		if !c.plain[s.Name()] {
			h.Compressed++
		}
		if h.First.Size == 0 || olderSegment(s, h.First) < 0 {
			h.First = s
		}
		if cmp.Or(cmp.Compare(s.Timeline, h.Last.Timeline), cmp.Compare(s.Start, h.Last.Start)) > 0 {
			h.Last = s
		}
	}
	slices.SortFunc(h.Partial, func(a, b PartialSegment) int { return olderSegment(a.Segment, b.Segment) })
	return nil
}

// olderSegment orders segments by their WAL.
func olderSegment(a, b wal.Segment) int {
	return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(a.Timeline, b.Timeline))
}
