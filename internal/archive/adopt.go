package archive

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"

	"github.com/walfleet/walfleet/internal/wal"
)

// pg_receivewal with --compress writes a segment that is not complete into
// NAME.gz.partial or NAME.lz4.partial. Such a file cannot be gone on with to the
// byte, so what it has becomes a plain partial file.

// adopt makes a segment's plain partial file of what compressed ones have, if
// that is more than the plain one has, and removes those. What they have behind
// the last complete record, or cannot be decompressed, does not count.
func (w *Writer) adopt(ctx context.Context, s wal.Segment) error {
	for _, suffix := range compressedSuffixes() {
		name := s.Name() + suffix + partialSuffix
		err := w.adoptFile(ctx, s, name, suffix)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("taking over %s: %w", w.dir.pathOf(name), err)
		}
	}
	return nil
}

func (w *Writer) adoptFile(ctx context.Context, s wal.Segment, name, suffix string) error {
	compressed, err := w.dir.disk.Open(name)
	if err != nil {
		return err
	}
	defer compressed.Close()
	if id, ok, err := w.dir.readIdentity(name); err != nil || ok {
		if err = cmp.Or(err, compareIdentity(w.dir.pathOf(name), id, w.id)); err != nil {
			return err
		}
	}
	plain := s.Name() + partialSuffix
	have, err := w.durableUpTo(ctx, s, plain)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	publishing := w.dir.disk.Replace
	if err != nil {
		publishing = w.dir.disk.Rename
	}
	f, err := writeTemp(w.dir.disk, plain, w.dir.fileMode(), func(f file) error {
		if err := f.Allocate(int64(s.Size)); err != nil {
			return err
		}
		return decompressInto(ctx, f, compressed, suffix, int64(s.Size))
	})
	if err != nil {
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	got, err := w.completeUpTo(ctx, s, plain+tempSuffix)
	if err == nil && have > s.Start {
		err = w.sameUpTo(ctx, plain, plain+tempSuffix, int64(min(have, got)-s.Start))
	}
	if err == nil && have < got && got > s.Start {
		delete(w.dir.distrusted, plain)
		err = publish(w.dir.disk, plain, publishing)
	} else {
		err = errors.Join(err, w.dir.disk.Remove(plain+tempSuffix))
	}
	if err != nil {
		return err
	}
	return w.dir.disk.Remove(name)
}

// durableUpTo is completeUpTo for a file that may not be synced yet: it is made
// durable, and read back from the disk.
func (w *Writer) durableUpTo(ctx context.Context, s wal.Segment, name string) (wal.LSN, error) {
	f, err := w.openPartial(s)
	if err != nil {
		return 0, err
	}
	if err := settle(w.dir.disk, f); err != nil {
		w.dir.distrust(name)
		return 0, errors.Join(err, f.Close())
	}
	if err := f.Close(); err != nil {
		return 0, err
	}
	return w.completeUpTo(ctx, s, name)
}

// sameUpTo makes sure that the first n bytes of two files are the same.
func (w *Writer) sameUpTo(ctx context.Context, plain, other string, n int64) error {
	a, err := w.dir.disk.Open(plain)
	if err != nil {
		return err
	}
	defer a.Close()
	b, err := w.dir.disk.Open(other)
	if err != nil {
		return err
	}
	defer b.Close()
	if at, err := firstDifference(from(a, 0), readerOf(ctx, b), n); err != nil || at < 0 {
		return err
	}
	return &FileError{w.dir.pathOf(plain), "has other WAL than the compressed one; move away the one of the two that is not this cluster's"}
}

// completeUpTo is where the last complete record ends that a file of a segment
// has.
func (w *Writer) completeUpTo(ctx context.Context, s wal.Segment, name string) (wal.LSN, error) {
	f, err := w.dir.disk.Open(name)
	if err != nil {
		return 0, err
	}
	defer f.Close()
	walker := wal.NewWalker(wal.WalkerConfig{Start: s.Start, Timeline: w.timeline, Size: s.Size, SystemID: w.id.SystemID, CheckCRC: true})
	err = feed(ctx, walker, from(f, 0), int64(s.Size))
	if corrupt := new(wal.CorruptError); errors.As(err, &corrupt) || errors.Is(err, io.EOF) || errors.Is(err, io.ErrUnexpectedEOF) {
		err = nil // the end of what the file has
	}
	return walker.Boundary(), err
}

// decompressInto writes to f what a compressed file has, up to its end, to where
// it cannot be decompressed, or to n bytes.
func decompressInto(ctx context.Context, f, compressed file, suffix string, n int64) error {
	z, err := decompress(from(compressed, 0), suffix)
	if err != nil {
		return onlyDiskErrors(err)
	}
	defer z.Close()
	buf := make([]byte, 64<<10)
	for at := int64(0); at < n; {
		if err := ctx.Err(); err != nil {
			return err
		}
		got, err := z.Read(buf[:min(int64(len(buf)), n-at)])
		if _, err := f.WriteAt(buf[:got], at); err != nil {
			return err
		}
		at += int64(got)
		if err != nil {
			return onlyDiskErrors(err)
		}
	}
	return nil
}
