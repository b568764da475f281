package archive

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

var (
	packedSegment = crashSegment.Segment(1, crashBegin)
	packedMethods = []Compression{{"gzip", 6}, {"lz4", 1}, {"zstd", 3}}
)

// segmentContent is the WAL of a whole segment.
func segmentContent() []byte {
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: crashIdentity.SystemID, Size: crashSegment, Start: crashBegin})
	for g.End() < crashBegin+wal.LSN(crashSegment)-20<<10 {
		g.Append(filler()[:5000])
	}
	g.FillTo(crashBegin + wal.LSN(crashSegment))
	return g.Bytes(crashBegin, g.End())
}

// oneSegment is an archive of one plain segment, on a disk that has all of it.
func oneSegment(t *testing.T) (*Dir, *memDisk) {
	t.Helper()
	disk := newMemDisk()
	if err := storeFile(disk, packedSegment.Name(), segmentContent(), 0o600, disk.Rename); err != nil {
		t.Fatal(err)
	}
	return &Dir{path: "archive", disk: disk}, disk
}

func names(d disk) string {
	all, _ := d.Names()
	return strings.Join(all, " ")
}

// The order in which a power loss at any moment leaves the segment.
func TestCompressingIsSyncCompareRenameSyncRemove(t *testing.T) {
	for _, c := range packedMethods {
		d, disk := oneSegment(t)
		plain, packed := packedSegment.Name(), packedSegment.Name()+c.suffix()
		var got []string
		disk.before = func(kind, name string) {
			if kind != "write" {
				got = append(got, kind+" "+name)
			}
		}
		if _, err := d.Compress(t.Context(), packedSegment, c); err != nil {
			t.Fatal(err)
		}
		want := []string{"create " + packed + tempSuffix, "sync " + packed + tempSuffix, "rename " + packed + tempSuffix, "sync .", "remove " + plain}
		if !slices.Equal(got, want) {
			t.Errorf("%s: operations %q, want %q", c, got, want)
		}

		// The same once more, as after a crash before the last step.
		if err := storeFile(disk, plain, segmentContent(), 0o600, disk.Rename); err != nil {
			t.Fatal(err)
		}
		got = nil
		if _, err := d.Compress(t.Context(), packedSegment, Compression{"gzip", 1}); err != nil {
			t.Fatal(err)
		}
		if want := []string{"sync " + packed, "sync .", "remove " + plain}; !slices.Equal(got, want) {
			t.Errorf("%s is there: operations %q, want %q", packed, got, want)
		}
		if disk.open != 0 || names(disk) != packed {
			t.Errorf("%s: in the end there are %s, and %d files are open", c, names(disk), disk.open)
		}
	}
}

// spoilingDisk changes a compressed file between its sync and the reading of it.
type spoilingDisk struct{ *memDisk }

func (d spoilingDisk) Create(name string, mode os.FileMode) (file, error) {
	f, err := d.memDisk.Create(name, mode)
	return spoiledFile{f}, err
}

type spoiledFile struct{ file }

func (f spoiledFile) DropCache() error {
	size, err := f.Size()
	if err != nil {
		return err
	}
	b := make([]byte, 1)
	if _, err := f.ReadAt(b, size/2); err != nil {
		return err
	}
	b[0] ^= 0x10
	_, err = f.WriteAt(b, size/2)
	return err
}

func TestPlainSegmentStaysWhenTheCompressedOneReadsBackOtherwise(t *testing.T) {
	for _, c := range packedMethods {
		d, disk := oneSegment(t)
		d.disk = spoilingDisk{disk}
		if _, err := d.Compress(t.Context(), packedSegment, c); err == nil || isDiskError(err) {
			t.Errorf("%s: %v", c, err)
		}
		if names(disk) != packedSegment.Name() {
			t.Errorf("%s: there are %s", c, names(disk))
		}
	}
}

// pack compresses p into memory.
func pack(c Compression, p []byte) []byte {
	var buf bytes.Buffer
	z, err := compressTo(&buf, c)
	if err == nil {
		_, err = z.Write(p)
	}
	if err = errors.Join(err, z.Close()); err != nil {
		panic(err)
	}
	return buf.Bytes()
}

// A compressed file that is there already is nothing that may be lost, and nothing to rely on.
func TestCompressedFileThatIsThereIsComparedAndNeverReplaced(t *testing.T) {
	content := segmentContent()
	other := bytes.Clone(content)
	other[len(other)-1] ^= 1
	for _, c := range packedMethods {
		for what, file := range map[string][]byte{
			"other bytes":   pack(c, other),
			"fewer bytes":   pack(c, content[:len(content)-1]),
			"more bytes":    pack(c, append(bytes.Clone(content), 0)),
			"cut short":     pack(c, content)[:1000],
			"without end":   pack(c, content)[:len(pack(c, content))-1],
			"empty":         {},
			"nothing of it": []byte("this is no such file, by far"),
		} {
			d, disk := oneSegment(t)
			name := packedSegment.Name() + c.suffix()
			if err := storeFile(disk, name, file, 0o600, disk.Rename); err != nil {
				t.Fatal(err)
			}
			_, err := d.Compress(t.Context(), packedSegment, Compression{"lz4", 1})
			if !errors.As(err, new(*FileError)) || !strings.Contains(err.Error(), name) {
				t.Errorf("%s, %s: %v; want an error that names the file", c, what, err)
			}
			if i := disk.names[name]; i == nil || !has(i.cache, 0, file) || names(disk) != packedSegment.Name()+" "+name {
				t.Errorf("%s, %s: there are %s, or the file has changed", c, what, names(disk))
			}
		}
	}
}

func TestCompressingEndsWhenItIsTold(t *testing.T) {
	d, disk := oneSegment(t)
	for at := 1; at <= 3; at++ {
		ctx, cancel := context.WithCancel(t.Context())
		writes := 0
		disk.before = func(kind, _ string) {
			if writes++; writes == at {
				cancel()
			}
		}
		if _, err := d.Compress(ctx, packedSegment, Compression{"gzip", 1}); !errors.Is(err, context.Canceled) {
			t.Errorf("told at operation %d: %v", at, err)
		}
		if names(disk) != packedSegment.Name() || disk.open != 0 {
			t.Errorf("told at operation %d: there are %s, and %d files are open", at, names(disk), disk.open)
		}
	}
}

func TestSegmentOfAnotherSizeIsNotCompressed(t *testing.T) {
	disk := newMemDisk()
	if err := storeFile(disk, packedSegment.Name(), segmentContent()[:5000], 0o600, disk.Rename); err != nil {
		t.Fatal(err)
	}
	d := &Dir{path: "archive", disk: disk}
	if _, err := d.Compress(t.Context(), packedSegment, Compression{"gzip", 1}); !errors.As(err, new(*FileError)) {
		t.Errorf("%v", err)
	}
	if names(disk) != packedSegment.Name() {
		t.Errorf("there are %s", names(disk))
	}
}

func TestFullDiskLeavesThePlainSegment(t *testing.T) {
	d, disk := oneSegment(t)
	disk.faults = &memFaults{r: nil, first: disk.ops + 1, last: 1 << 30, errno: syscall.ENOSPC}
	if _, err := d.Compress(t.Context(), packedSegment, Compression{"lz4", 1}); !errors.Is(err, syscall.ENOSPC) {
		t.Errorf("%v", err)
	}
	if disk.names[packedSegment.Name()] == nil {
		t.Errorf("there are %s", names(disk))
	}
}

// A listing of a directory is no snapshot: it could miss the plain file because that is gone already, and the
// compressed one because it was not there yet. So no listing is made while the one takes the other's place.
func TestNoListingIsMadeWhileACompressedFileTakesItsPlace(t *testing.T) {
	d, disk := oneSegment(t)
	held := func() bool {
		free := d.names.TryLock()
		if free {
			d.names.Unlock()
		}
		return !free
	}
	d.disk = listedDisk{disk, func() {
		if !held() {
			t.Error("a listing is made that excludes nothing")
		}
	}}
	changes := 0
	disk.before = func(kind, name string) {
		if kind == "rename" || kind == "remove" || kind == "sync" && name == "." {
			if changes++; !held() {
				t.Errorf("%s %s, and a listing could be made", kind, name)
			}
		}
	}
	if _, _, err := d.Tail(crashSegment); err != nil {
		t.Fatal(err)
	}
	if _, err := d.Compress(t.Context(), packedSegment, Compression{"lz4", 1}); err != nil || changes != 3 {
		t.Errorf("%v, %d changes of names", err, changes)
	}
}

type listedDisk struct {
	*memDisk
	listing func()
}

func (d listedDisk) Names() ([]string, error) {
	d.listing()
	return d.memDisk.Names()
}

func TestCompressedFilesHaveTheModeOfTheOthers(t *testing.T) {
	for _, group := range []bool{false, true} {
		d, err := Open(t.TempDir())
		if err != nil {
			t.Fatal(err)
		}
		defer d.Close()
		d.SetGroupReadable(group)
		if err := os.WriteFile(filepath.Join(d.path, packedSegment.Name()), segmentContent(), 0o600); err != nil {
			t.Fatal(err)
		}
		size, err := d.Compress(t.Context(), packedSegment, Compression{"zstd", 3})
		if err != nil {
			t.Fatal(err)
		}
		info, err := os.Stat(filepath.Join(d.path, packedSegment.Name()+".zst"))
		if err != nil || fmt.Sprintf("%o", info.Mode().Perm()) != map[bool]string{false: "600", true: "640"}[group] || info.Size() != size {
			t.Errorf("group %v: %v, %d bytes were reported, %v", group, info, size, err)
		}
	}
}

// openingDisk does something ahead of the next opening of a file.
type openingDisk struct {
	*memDisk
	do func()
}

func (d *openingDisk) Open(name string) (file, error) {
	if f := d.do; f != nil {
		d.do = nil
		f()
	}
	return d.memDisk.Open(name)
}

// The last sealed segment may be compressed while a session finds out where the archive ends.
func TestTailIsFoundWhileTheLastSegmentIsCompressed(t *testing.T) {
	d, disk := oneSegment(t)
	other := &Dir{path: d.path, disk: disk}
	compressed := false
	d.disk = &openingDisk{disk, func() {
		_, err := other.Compress(t.Context(), packedSegment, Compression{"lz4", 1})
		compressed = err == nil
	}}
	tail, ok, err := d.Tail(crashSegment)
	if want := (Tail{1, packedSegment.End(), packedSegment}); tail != want || !ok || err != nil {
		t.Errorf("the tail is %+v, %v, %v; want %+v", tail, ok, err, want)
	}
	if !compressed || names(disk) != packedSegment.Name()+".lz4" {
		t.Errorf("there are %s", names(disk))
	}
}
