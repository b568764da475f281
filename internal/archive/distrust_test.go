package archive

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"syscall"
	"testing"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// failingDisk is a disk whose files can lose a write that they were to sync, or to begin with, once: that fails, and
// later syncs say that all is well.
type failingDisk struct {
	disk
	fail  bool // the next sync of a file's data
	early bool // the next beginning of that
}

func (d *failingDisk) OpenWrite(name string) (file, error) { return d.wrap(d.disk.OpenWrite(name)) }
func (d *failingDisk) Create(name string, mode os.FileMode) (file, error) {
	return d.wrap(d.disk.Create(name, mode))
}

func (d *failingDisk) wrap(f file, err error) (file, error) {
	if err != nil {
		return nil, err
	}
	return &failingFile{f, d}, nil
}

type failingFile struct {
	file
	disk *failingDisk
}

func (f *failingFile) SyncData() error { return f.sync(f.file.SyncData) }
func (f *failingFile) Sync() error     { return f.sync(f.file.Sync) }

func (f *failingFile) WriteBack(offset, n int64) error {
	if f.disk.early {
		f.disk.early = false
		return &os.PathError{Op: "sync_file_range", Err: syscall.EIO}
	}
	return f.file.WriteBack(offset, n)
}

func (f *failingFile) sync(sync func() error) error {
	if f.disk.fail {
		f.disk.fail = false
		return &os.PathError{Op: "fsync", Err: syscall.EIO}
	}
	return sync()
}

// A file whose sync failed is not synced again, it is replaced: what records prove goes into a new file, under the
// same name, and the rest is received again.
func TestFileWhoseSyncFailedIsReplaced(t *testing.T) {
	const size = wal.SegmentSize(1 << 20)
	const begin = wal.LSN(64 << 20)
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: 1, Size: size, Start: begin})
	for g.End() < begin+wal.LSN(size)/2 {
		g.Append(bytes.Repeat([]byte("x"), 3000))
	}
	end := g.End()
	g.FillTo(begin + wal.LSN(size) + 9000)

	for what, tt := range map[string]struct {
		more  wal.LSN
		early bool
	}{
		"in the middle of a segment": {0, false},
		"in its end":                 {wal.LSN(size) / 2, false},
		"when it was begun early":    {wal.LSN(size) / 4, true},
	} {
		path := t.TempDir()
		d, err := Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		fd := &failingDisk{disk: d.disk}
		d.disk = fd
		w, err := d.OpenWriter(context.Background(), Identity{SystemID: 1, SegmentSize: size}, 1, begin)
		if err != nil {
			t.Fatal(err)
		}
		if err := w.Write(begin, g.Bytes(begin, end-100)); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Flush(); err != nil {
			t.Fatal(err)
		}
		durable := w.Durable()
		name := filepath.Join(path, size.Segment(1, begin).Name()+".partial")
		old, err := os.Stat(name)
		if err != nil {
			t.Fatal(err)
		}

		fd.early = tt.early
		err = w.Write(w.Pos(), g.Bytes(w.Pos(), end+tt.more))
		if err == nil && !tt.early {
			fd.fail = true
			_, err = w.Flush()
		}
		if !errors.Is(err, syscall.EIO) || w.Durable() != durable {
			t.Fatalf("%s: a sync failed: %v, durable %s, was %s", what, err, w.Durable(), durable)
		}
		w.Close()

		if w, err = d.OpenWriter(context.Background(), Identity{SystemID: 1, SegmentSize: size}, 1, begin); err != nil {
			t.Fatal(err)
		}
		if now, err := os.Stat(name); err != nil || os.SameFile(old, now) || now.Size() != int64(size) || w.Durable() < durable {
			t.Errorf("%s: the file was not replaced: %v, %v; durable %s, was %s", what, now, err, w.Durable(), durable)
		}
		if err := w.Write(w.Pos(), g.Bytes(w.Pos(), g.End())); err != nil {
			t.Fatal(err)
		}
		if _, err := w.Flush(); err != nil || w.Durable() != g.End() {
			t.Fatalf("%s: %v, durable %s", what, err, w.Durable())
		}
		w.Close()
		data, err := os.ReadFile(filepath.Join(path, size.Segment(1, begin).Name()))
		if err != nil || !bytes.Equal(data, g.Bytes(begin, begin+wal.LSN(size))) {
			t.Errorf("%s: the sealed segment is not the server's: %v", what, err)
		}
		if len(d.distrusted) != 0 {
			t.Errorf("%s: still distrusted: %v", what, d.distrusted)
		}
	}
}

// Records behind one that the server gave up may have been acknowledged, and are received again all the same, since
// no CRC speaks for the one before them. Until they have come they stay where they are.
func TestReplacedFileKeepsWhatWasAcknowledged(t *testing.T) {
	const size = wal.SegmentSize(1 << 20)
	const begin = wal.LSN(64 << 20)
	id := Identity{SystemID: 1, SegmentSize: size}
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: 1, Size: size, Start: begin})
	g.Append(make([]byte, 3000))
	g.Abort(bytes.Repeat([]byte("torn"), 10000), 3)
	for range 20 {
		g.Append(bytes.Repeat([]byte("x"), 3000))
	}
	acknowledged := g.End()
	g.Append(bytes.Repeat([]byte("y"), 9000))
	path := t.TempDir()
	d, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	fd := &failingDisk{disk: d.disk}
	d.disk = fd
	w, err := d.OpenWriter(context.Background(), id, 1, begin)
	if err != nil {
		t.Fatal(err)
	}
	for _, end := range []wal.LSN{acknowledged, g.End()} {
		if err := w.Write(w.Pos(), g.Bytes(w.Pos(), end)); err != nil {
			t.Fatal(err)
		}
		fd.fail = end > acknowledged
		if _, err := w.Flush(); (err != nil) != fd.fail && w.Durable() != acknowledged {
			t.Fatalf("%v, durable %s", err, w.Durable())
		}
	}
	w.Close()
	fd.fail = false
	if w, err = d.OpenWriter(context.Background(), id, 1, begin); err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if len(d.distrusted) != 0 || w.Promised() < acknowledged || w.Durable() > acknowledged {
		t.Errorf("distrusted %v, promised %s, durable %s, acknowledged was %s", d.distrusted, w.Promised(), w.Durable(), acknowledged)
	}
	data, err := os.ReadFile(filepath.Join(path, size.Segment(1, begin).Name()+".partial"))
	if err != nil || !bytes.Equal(data[:acknowledged-begin], g.Bytes(begin, acknowledged)) {
		t.Errorf("acknowledged WAL is not in the file any more: %v", err)
	}
}
