package archive

import (
	"context"
	"os"
	"path/filepath"
	"testing"

	"github.com/walfleet/walfleet/internal/pgtest"
)

// watchedDisk notes writes to files that were there before, and have not been synced and forgotten by the page
// cache since they were opened.
type watchedDisk struct {
	disk
	early []string
}

type watchedFile struct {
	file
	disk            *watchedDisk
	name            string
	synced, settled bool
}

func (d *watchedDisk) OpenWrite(name string) (file, error) {
	f, err := d.disk.OpenWrite(name)
	if err != nil {
		return nil, err
	}
	return &watchedFile{file: f, disk: d, name: name}, nil
}

func (f *watchedFile) Sync() error {
	f.synced = true
	return f.file.Sync()
}

func (f *watchedFile) DropCache() error {
	f.settled = f.synced
	return f.file.DropCache()
}

func (f *watchedFile) WriteAt(p []byte, offset int64) (int, error) {
	if !f.settled {
		f.disk.early = append(f.disk.early, f.name)
	}
	return f.file.WriteAt(p, offset)
}

// A failed sync can leave pages in the cache that pass for written. A file that is gone on with is free of them, a
// later segment's too.
func TestFileThatIsThereIsSettledBeforeItIsWritten(t *testing.T) {
	const size, begin = 1 << 20, 64 << 20
	id := Identity{SystemID: 1, SegmentSize: size}
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: 1, Size: size, Start: begin})
	g.FillTo(begin + size + 3000)
	path := t.TempDir()
	for _, s := range []string{id.SegmentSize.Segment(1, begin).Name(), id.SegmentSize.Segment(1, begin+size).Name()} {
		if err := os.WriteFile(filepath.Join(path, s+partialSuffix), make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	d, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	watched := &watchedDisk{disk: d.disk}
	d.disk = watched
	w, err := d.OpenWriter(context.Background(), id, 1, begin)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := w.Write(begin, g.Bytes(begin, g.End())); err != nil {
		t.Fatal(err)
	}
	if _, err := w.Flush(); err != nil {
		t.Fatal(err)
	}
	if w.Durable() != g.End() {
		t.Errorf("durable is %s, want %s", w.Durable(), g.End())
	}
	for _, name := range watched.early {
		t.Errorf("%s was written before it was settled", name)
	}
}
