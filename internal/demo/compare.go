package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/walfleet/walfleet/internal/wal"
)

// walSource is where the original of a segment can be read.
type walSource interface {
	openWAL(ctx context.Context, name string) (io.ReadCloser, error)
}

// expected is what the archive of one cluster has to hold, on timeline 1.
type expected struct {
	dir     string // the cluster's directory in the archive
	size    wal.SegmentSize
	first   wal.LSN // the segment that contains it is archived, and all that follow
	sealed  wal.LSN // exclusive: segments that end here or before are sealed
	flushed wal.LSN // exclusive: the end of the WAL that walfleet acknowledged
}

// compared counts what was compared.
type compared struct {
	segments int   // sealed or not
	sealed   int   // those without a suffix
	bytes    int64 // of the archive, each equal to the server's
}

// compare reads every segment of an archive beside the server's own. All that
// is missing, different or too much becomes part of the error.
func compare(ctx context.Context, e expected, server walSource) (compared, error) {
	var c compared
	entries, err := os.ReadDir(e.dir)
	if err != nil {
		return c, err
	}
	files := make(map[wal.Segment][]string)
	for _, entry := range entries {
		if s, err := wal.ParseSegment(strings.TrimSuffix(entry.Name(), partialSuffix), e.size); err == nil {
			files[s] = append(files[s], entry.Name())
		}
	}
	segments := slices.Collect(maps.Keys(files))
	for s := e.size.Segment(1, e.first); s.Start < e.flushed; s = s.Next() {
		if files[s] == nil {
			segments = append(segments, s)
		}
	}
	slices.SortFunc(segments, func(a, b wal.Segment) int { return strings.Compare(a.Name(), b.Name()) })

	var errs []error
	for _, s := range segments {
		n, err := compareSegment(ctx, e, s, files[s], server)
		if err != nil {
			errs = append(errs, fmt.Errorf("segment %s: %w", s, err))
			continue
		}
		if n > 0 {
			c.segments++
			c.bytes += n
		}
		if n == int64(s.Size) && files[s][0] == s.Name() {
			c.sealed++
		}
	}
	return c, errors.Join(errs...)
}

// partialSuffix marks a segment that is not sealed.
const partialSuffix = ".partial"

// compareSegment compares segment s, of which the archive has the files names,
// and returns how many bytes were compared.
func compareSegment(ctx context.Context, e expected, s wal.Segment, names []string, server walSource) (int64, error) {
	n := int64(s.Size)
	switch {
	case len(names) == 0:
		return 0, errors.New("missing in the archive")
	case len(names) > 1:
		return 0, fmt.Errorf("stored more than once: %s", strings.Join(names, ", "))
	case names[0] == s.Name() && s.End() > e.flushed:
		return 0, fmt.Errorf("sealed, but walfleet acknowledged WAL up to %s only", e.flushed)
	case names[0] == s.Name():
	case s.End() <= e.sealed:
		return 0, errors.New("not sealed, though WAL after it was acknowledged")
	case s.Start >= e.flushed:
		return 0, nil // opened, nothing acknowledged yet
	case s.End() > e.flushed:
		n = e.size.Offset(e.flushed)
	}

	ours, err := os.Open(filepath.Join(e.dir, names[0]))
	if err != nil {
		return 0, err
	}
	defer func() { _ = ours.Close() }()
	info, err := ours.Stat()
	if err != nil {
		return 0, err
	}
	if info.Size() != int64(s.Size) {
		return 0, fmt.Errorf("%s has %d bytes instead of %d", names[0], info.Size(), s.Size)
	}
	theirs, err := server.openWAL(ctx, s.Name())
	if err != nil {
		return 0, fmt.Errorf("the server's own: %w", err)
	}
	defer func() { _ = theirs.Close() }()
	return n, compareBytes(ctx, s.Start, n, ours, theirs)
}

// compareBytes reads n bytes of WAL that starts at start from both readers.
func compareBytes(ctx context.Context, start wal.LSN, n int64, ours, theirs io.Reader) error {
	a, b := make([]byte, 1<<20), make([]byte, 1<<20)
	for done := int64(0); done < n; {
		if err := ctx.Err(); err != nil {
			return context.Cause(ctx)
		}
		size := min(n-done, int64(len(a)))
		a, b := a[:size], b[:size]
		if _, err := io.ReadFull(ours, a); err != nil {
			return fmt.Errorf("reading the archive: %w", err)
		}
		if _, err := io.ReadFull(theirs, b); err != nil {
			return fmt.Errorf("reading the server's own: %w", err)
		}
		if !bytes.Equal(a, b) {
			i := 0
			for a[i] == b[i] {
				i++
			}
			at := done + int64(i)
			return fmt.Errorf("byte %d (WAL position %s) is %02x in the archive, %02x on the server", at, start+wal.LSN(at), a[i], b[i])
		}
		done += size
	}
	return nil
}
