package archive

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/walfleet/walfleet/internal/wal"
)

// Catalogue is what an archive's directory holds, for those who read it: by
// archive.json and by the names, sizes and times of its files. What is in the
// segments it does not tell. It is a value: what happens to the directory later
// does not change it.
type Catalogue struct {
	Path        string
	Identity    Identity     // of archive.json, or of a segment's header where there is none; zero: not known
	Bound       bool         // there is an archive.json
	Origin      Origin       // where the archive began; only when Bound
	Pruned      Pruned       // what was removed since; zero: nothing
	Gaps        []Gap        // as they were recorded
	Aborted     []Aborted    // as they were kept aside
	Divergences []Divergence // as they were accepted

	Files     []StoredFile   // of segments: by start, timeline, sealed before partial, plain before compressed
	Histories []wal.Timeline // that have a history file, ascending
	Aside     []string       // names of files that are kept aside, *.aborted and *.diverged, sorted
	Unknown   []string       // names of what neither we nor pg_receivewal put there, sorted
}

// StoredFile is a file that holds a segment, or a part of one. A segment can have
// several: a compressed one beside the plain one for a moment, and what
// pg_receivewal leaves.
type StoredFile struct {
	wal.Segment
	File     string // its name in the directory
	Partial  bool   // not complete: how much of it is WAL only its records tell
	Method   string // of compression: "gzip", "lz4", "zstd"; "": plain
	Bytes    int64  // as stored
	Modified time.Time
}

// Range is WAL without a hole, of one timeline.
type Range struct {
	Timeline wal.Timeline
	Start    wal.LSN // inclusive, the start of a segment
	End      wal.LSN // exclusive, the end of a segment
}

// All lists the segments of a range.
func (r Range) All(size wal.SegmentSize) []wal.Segment {
	var all []wal.Segment
	for s := size.Segment(r.Timeline, r.Start); s.Start < r.End; s = s.Next() {
		all = append(all, s)
	}
	return all
}

// ReadCatalogue reads an archive's directory without locking or changing anything
// in it, whether or not somebody archives into it at the time.
//
// The error is fs.ErrNotExist when there is no such directory, a *FileError when
// archive.json makes no sense (the rest of the Catalogue is filled in all the
// same), or what the file system said. ctx is looked at between two files;
// nothing can interrupt a disk that does not answer, so a caller that must not
// wait for one calls ReadCatalogue in a goroutine of its own.
func ReadCatalogue(ctx context.Context, path string) (Catalogue, error) {
	c, metaErr := ReadMeta(path)
	if metaErr != nil && !errors.As(metaErr, new(*FileError)) {
		return c, metaErr
	}
	d := &Dir{path: path, disk: osDisk(path)} // not locked: only for what reads
	if !c.Bound {
		if err := c.identify(ctx, d); err != nil {
			return c, err
		}
	}
	// A file that is renamed while names are read may be missed under both of its
	// names, or be gone under the one that was seen.
	var before []string
	for attempt := 1; ; attempt++ {
		names, err := d.disk.Names()
		if err != nil {
			return c, errors.Join(metaErr, fmt.Errorf("archive directory: %w", err))
		}
		slices.Sort(names)
		same := attempt > 1 && slices.Equal(names, before)
		before = names
		if !same && attempt < readAttempts {
			continue
		}
		if err := c.list(ctx, d, names); !errors.Is(err, fs.ErrNotExist) || attempt >= readAttempts {
			return c, errors.Join(metaErr, err)
		}
	}
}

// ReadMeta is the part of a Catalogue that archive.json tells, without a look at
// any other file: enough to [Catalogue.Open] a segment by its name, however many
// there are. Bound is false when there is no archive.json, or no such directory.
// The error is a *FileError when it makes no sense, or what the file system said.
func ReadMeta(path string) (Catalogue, error) {
	c := Catalogue{Path: path}
	d := &Dir{path: path, disk: osDisk(path)}
	if err := d.readMeta(); errors.As(err, new(*FileError)) {
		return c, err
	} else if err != nil {
		return c, fmt.Errorf("archive directory: %w", err)
	}
	m := d.meta.Load()
	if m == nil {
		return c, nil
	}
	id, _ := strconv.ParseUint(m.SystemID, 10, 64) // checked when it was read
	c.Bound, c.Identity = true, Identity{id, d.SegmentSize()}
	c.Origin.Timeline, c.Origin.LSN, _ = d.Origin()
	c.Origin.Source, c.Origin.Time = m.Origin.Source, m.Origin.Time
	c.Gaps, c.Divergences, c.Aborted, c.Pruned = d.Gaps(), d.Divergences(), d.Aborted(), d.Pruned()
	return c, nil
}

// readAttempts bounds how often names are read until two times they are the same.
const readAttempts = 5

// identify reads whose segments these are off the first one that tells.
func (c *Catalogue) identify(ctx context.Context, d *Dir) error {
	n, err := d.scan(smallestSegment) // whose names are all others' too
	if err != nil {
		return fmt.Errorf("archive directory: %w", err)
	}
	for name := range n.files {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		id, ok, err := d.readIdentity(name)
		if err != nil && !errors.Is(err, fs.ErrNotExist) {
			return fmt.Errorf("archive directory: %w", err)
		}
		if ok {
			c.Identity = id
			return nil
		}
	}
	return nil
}

// list fills in the files.
func (c *Catalogue) list(ctx context.Context, d *Dir, all []string) error {
	c.Files, c.Histories, c.Aside, c.Unknown = nil, nil, nil, nil
	size := c.Identity.SegmentSize
	var n listing
	if size.Valid() { // else there is no segment either, or none that tells
		n = segmentNames(all, size)
	}
	for _, name := range all {
		tli, noHistory := wal.ParseHistoryName(name)
		_, segment := n.files[name]
		switch ext := filepath.Ext(name); {
		case noHistory == nil:
			c.Histories = append(c.Histories, tli)
		case ext == abortedSuffix || ext == divergedSuffix:
			c.Aside = append(c.Aside, name)
		case segment || name == metaName || name == lockName || slices.Contains(records, name) || isTemporary(name) || name == "lost+found":
		case segmentName(name) && ext == ".backup": // a base backup's, which PostgreSQL archives beside the WAL
		default:
			c.Unknown = append(c.Unknown, name)
		}
	}
	for name, s := range n.files {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		info, err := os.Lstat(d.pathOf(name))
		if err != nil {
			return err
		}
		if info.Mode().Type()&^fs.ModeSymlink != 0 {
			c.Unknown = append(c.Unknown, name) // a directory, say
			continue
		}
		whole, partial := strings.CutSuffix(name, partialSuffix)
		c.Files = append(c.Files, StoredFile{s, name, partial, methodWith(filepath.Ext(whole)), info.Size(), info.ModTime()})
	}
	slices.Sort(c.Unknown)
	slices.SortFunc(c.Files, func(a, b StoredFile) int {
		return cmp.Or(olderSegment(a.Segment, b.Segment), compareBool(a.Partial, b.Partial), cmp.Compare(a.Method, b.Method))
	})
	return nil
}

// listing is what the files' names say.
func (c Catalogue) listing() listing {
	names := make([]string, len(c.Files))
	for i, f := range c.Files {
		names[i] = f.File
	}
	return segmentNames(names, c.Identity.SegmentSize)
}

func (c Catalogue) restarts() map[wal.Timeline]wal.LSN { return restartsOf(c.Divergences, c.Gaps) }

// olderSegment orders segments by their WAL.
func olderSegment(a, b wal.Segment) int {
	return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(a.Timeline, b.Timeline))
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// Sealed lists the complete segments, each once, by start, then timeline.
func (c Catalogue) Sealed() []wal.Segment {
	var sealed []wal.Segment
	for _, f := range c.Files {
		if !f.Partial && (len(sealed) == 0 || sealed[len(sealed)-1] != f.Segment) {
			sealed = append(sealed, f.Segment)
		}
	}
	return sealed
}

// Ranges are the complete segments, joined where one continues the other on the
// same timeline, and no gap was recorded between them. They are ordered by
// timeline, then start.
func (c Catalogue) Ranges() []Range {
	sealed := c.Sealed()
	slices.SortStableFunc(sealed, func(a, b wal.Segment) int { return cmp.Compare(a.Timeline, b.Timeline) })
	var ranges []Range
	for _, s := range sealed {
		if last := len(ranges) - 1; last >= 0 && ranges[last].Timeline == s.Timeline && ranges[last].End == s.Start && c.GapBefore(s) == nil {
			ranges[last].End = s.End()
			continue
		}
		ranges = append(ranges, Range{s.Timeline, s.Start, s.End()})
	}
	return ranges
}

// GapBefore is the recorded gap behind which the archive goes on with s; nil:
// there is none.
func (c Catalogue) GapBefore(s wal.Segment) *Gap {
	for i := range c.Gaps {
		if g := &c.Gaps[i]; g.Timeline == s.Timeline && g.To == s.Start {
			return g
		}
	}
	return nil
}

// History reads a stored history file. The error is fs.ErrNotExist when there is
// none, a *FileError when it makes no sense.
func (c Catalogue) History(tli wal.Timeline) (wal.History, error) {
	d := &Dir{path: c.Path, disk: osDisk(c.Path)}
	h, ok, err := d.History(tli)
	if err == nil && !ok {
		err = &fs.PathError{Op: "open", Path: d.pathOf(wal.HistoryName(tli)), Err: fs.ErrNotExist}
	}
	return h, err
}

// Reader reads the WAL of a stored file: decompressed, from the segment's start.
// How much it yields is not bounded; a damaged file can yield more than a segment.
type Reader struct {
	io.Reader
	Name string // of the file that is read, in the directory
	file *os.File
	z    io.Closer
}

// Stat tells about the file as it is stored.
func (r *Reader) Stat() (fs.FileInfo, error) { return r.file.Stat() }

// Close ends the reading.
func (r *Reader) Close() error { return errors.Join(r.z.Close(), r.file.Close()) }

// Open opens a complete segment for reading: its plain file, or one that is
// compressed. It looks for the files anew, for the archive's owner may have
// compressed the segment since the Catalogue was read. The error is
// fs.ErrNotExist when there is none.
func (c Catalogue) Open(s wal.Segment) (*Reader, error) {
	var none error
	for _, suffix := range sealedSuffixes { // a compressed file is there before the plain one goes
		r, err := c.OpenFile(s.Name() + suffix)
		if !errors.Is(err, fs.ErrNotExist) {
			return r, err
		}
		none = cmp.Or(none, err)
	}
	return nil, none
}

// OpenFile opens a segment's file of that name, which can be a partial one.
func (c Catalogue) OpenFile(name string) (*Reader, error) {
	f, err := os.Open(filepath.Join(c.Path, name))
	if err != nil {
		return nil, err
	}
	suffix := filepath.Ext(strings.TrimSuffix(name, partialSuffix))
	z, err := decompress(f, suffix)
	if err != nil {
		f.Close()
		return nil, &FileError{f.Name(), err.Error()}
	}
	return &Reader{z, name, f, z}, nil
}
