package archive

import (
	"cmp"
	"context"
	"fmt"
	"os"
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
	Oldest   time.Time        // when the first complete segment was written to last
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

	c, err := ReadCatalogue(ctx, path)
	h.Identity, h.Bound, h.Origin, h.Gaps, h.Divergences, h.Aside = c.Identity, c.Bound, c.Origin, c.Gaps, c.Divergences, len(c.Aside)
	for _, tli := range c.Histories {
		h.Timeline = max(h.Timeline, tli)
	}
	for i, f := range c.Files {
		h.Timeline = max(h.Timeline, f.Timeline)
		if f.Modified.After(h.Modified) {
			h.Modified = f.Modified
		}
		if f.Partial {
			h.Partial = append(h.Partial, PartialSegment{f.Segment, f.Bytes, f.Modified})
			continue
		}
		h.Bytes += f.Bytes
		if f.Method != "" {
			h.Compressed++
		}
		if i > 0 && !c.Files[i-1].Partial && c.Files[i-1].Segment == f.Segment {
			if c.Files[i-1].Method == "" && f.Method != "" { // has a plain file still
				h.Compressed--
			}
			continue
		}
		h.Segments++
		if h.First.Size == 0 {
			h.First, h.Oldest = f.Segment, f.Modified
		}
		if cmp.Or(cmp.Compare(f.Timeline, h.Last.Timeline), cmp.Compare(f.Start, h.Last.Start)) > 0 {
			h.Last = f.Segment
		}
	}
	return h, err
}
