package archive

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"

	"github.com/walfleet/walfleet/internal/wal"
)

// Compressing a sealed segment is: write NAME.gz.tmp, sync it, read it back from
// the disk and compare it with NAME, rename it to NAME.gz, sync the directory,
// remove NAME. After a crash at any moment the segment is there as NAME, or as a
// NAME.gz that was compared with it; when both are there, the comparison is made
// again before NAME goes.

// Plain lists the sealed segments that are not compressed, or still have their
// plain file beside the compressed one, oldest first. Another goroutine than the
// one that uses d may call it, and Compress too.
func (d *Dir) Plain(size wal.SegmentSize) ([]wal.Segment, error) {
	names, err := d.disk.Names()
	if err != nil {
		return nil, fmt.Errorf("archive directory: %w", err)
	}
	var plain []wal.Segment
	for _, name := range names {
		if s, err := wal.ParseSegment(name, size); err == nil {
			plain = append(plain, s)
		}
	}
	slices.SortFunc(plain, func(a, b wal.Segment) int {
		return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(a.Timeline, b.Timeline))
	})
	return plain, nil
}

// Compress replaces a sealed segment's plain file by a compressed one, and
// returns that one's size in bytes. One that is there already, whatever its
// method, is kept if it has the same bytes. The plain file stays when anything
// goes wrong, and when ctx is done.
func (d *Dir) Compress(ctx context.Context, s wal.Segment, c Compression) (size int64, err error) {
	plain, err := d.disk.Open(s.Name())
	if err != nil {
		return 0, fmt.Errorf("compressing %s: %w", d.pathOf(s.Name()), err)
	}
	defer plain.Close()
	if have, err := plain.Size(); err != nil || have != int64(s.Size) {
		return 0, errors.Join(err, &FileError{d.pathOf(s.Name()), fmt.Sprintf("has %d bytes, a complete segment has %d: it is not compressed", have, s.Size)})
	}
	name, err := d.compressedName(s)
	if err == nil && name == "" {
		name = s.Name() + c.suffix()
		err = d.writeCompressed(ctx, name, plain, s, c)
	} else if err == nil {
		err = d.checkCompressed(ctx, name, plain, s)
	}
	if err != nil {
		return 0, fmt.Errorf("compressing %s: %w", d.pathOf(s.Name()), err)
	}
	f, err := d.disk.Open(name)
	if err != nil {
		return 0, err
	}
	size, err = f.Size()
	return size, errors.Join(err, f.Close())
}

// compressedName is the name of the file that has a segment compressed; "": there
// is none.
func (d *Dir) compressedName(s wal.Segment) (string, error) {
	for _, suffix := range compressedSuffixes() {
		if there, err := exists(d.disk, s.Name()+suffix); err != nil || there {
			return s.Name() + suffix, err
		}
	}
	return "", nil
}

// writeCompressed makes the compressed file, and removes the plain one.
func (d *Dir) writeCompressed(ctx context.Context, name string, plain file, s wal.Segment, c Compression) error {
	f, err := writeTemp(d.disk, name, d.fileMode(), func(f file) error {
		buf := bufio.NewWriterSize(io.NewOffsetWriter(f, 0), 4*copyBuffer)
		z, err := compressTo(buf, c)
		if err != nil {
			return err
		}
		_, err = io.CopyN(z, readerOf(ctx, plain), int64(s.Size))
		return cmp.Or(err, z.Close(), buf.Flush())
	})
	if err != nil {
		return err
	}
	err = compareWith(ctx, f, c.suffix(), plain, s)
	if err = errors.Join(err, f.Close()); err != nil {
		return errors.Join(err, d.disk.Remove(name+tempSuffix))
	}
	d.names.Lock()
	defer d.names.Unlock()
	if there, err := exists(d.disk, s.Name()); err != nil || !there { // it was pruned, and is not to come back
		return errors.Join(cmp.Or[error](err, fs.ErrNotExist), d.disk.Remove(name+tempSuffix))
	}
	if err := publish(d.disk, name, d.disk.Rename); err != nil {
		return err
	}
	return d.disk.Remove(s.Name())
}

// checkCompressed removes the plain file of a segment that a file of another
// process, or of a moment before a crash, has compressed.
func (d *Dir) checkCompressed(ctx context.Context, name string, plain file, s wal.Segment) error {
	f, err := d.disk.Open(name)
	if err != nil {
		return err
	}
	defer f.Close()
	if err := settle(d.disk, f); err != nil {
		return err
	}
	if err := compareWith(ctx, f, name[len(s.Name()):], plain, s); err != nil {
		if !isDiskError(err) && ctx.Err() == nil {
			err = &FileError{d.pathOf(name), fmt.Sprintf("is not what %s has (%v): both are kept; check them with pg_waldump and move the wrong one away", s.Name(), err)}
		}
		return err
	}
	d.names.Lock()
	defer d.names.Unlock()
	return d.disk.Remove(s.Name())
}

// compareWith reads what a synced file has from the disk, decompresses it, and
// makes sure that it is what the plain one has, and nothing more.
func compareWith(ctx context.Context, f file, suffix string, plain file, s wal.Segment) error {
	if err := f.DropCache(); err != nil {
		return err
	}
	z, err := decompress(readerOf(ctx, f), suffix)
	if err != nil {
		return fmt.Errorf("reading the compressed file back: %w", err)
	}
	defer z.Close()
	at, err := firstDifference(from(plain, 0), z, int64(s.Size))
	if err != nil {
		return fmt.Errorf("reading the compressed file back: %w", err)
	}
	if at >= 0 {
		return fmt.Errorf("the compressed file has other bytes at offset %d of the segment", at)
	}
	if n, err := io.ReadFull(z, make([]byte, 1)); n > 0 || err != io.EOF { // the end is where checksums are
		return fmt.Errorf("reading the compressed file's end back: %d bytes more, %w", n, err)
	}
	return nil
}

// firstDifference is about where the next n bytes of two readers differ; below 0:
// they do not. Readers that have less are an error.
func firstDifference(a, b io.Reader, n int64) (int64, error) {
	x, y := make([]byte, copyBuffer), make([]byte, copyBuffer)
	for at := int64(0); at < n; at += copyBuffer {
		length := min(copyBuffer, n-at)
		_, err1 := io.ReadFull(a, x[:length])
		_, err2 := io.ReadFull(b, y[:length])
		if err := errors.Join(err1, err2); err != nil {
			return 0, fmt.Errorf("at offset %d: %w", at, err)
		}
		if !bytes.Equal(x[:length], y[:length]) {
			return at, nil
		}
	}
	return -1, nil
}

const copyBuffer = 64 << 10 // bytes

// readerOf reads a file from its beginning until ctx is done.
func readerOf(ctx context.Context, f file) io.Reader {
	return &cancellable{ctx, from(f, 0)}
}

type cancellable struct {
	ctx context.Context
	r   io.Reader
}

func (c *cancellable) Read(p []byte) (int, error) {
	if err := c.ctx.Err(); err != nil {
		return 0, err
	}
	return c.r.Read(p[:min(len(p), copyBuffer)])
}
