package archive_test

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

func TestCatalogueListsRangesBetweenGaps(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	if err := d.Bind(identity, archive.Origin{Timeline: 1, LSN: begin, Source: "slot", Time: time.Now().UTC().Truncate(time.Second)}); err != nil {
		t.Fatal(err)
	}
	for _, file := range []string{name(1, 0), name(1, 1) + ".gz", name(1, 1), name(1, 2) + ".lz4", name(1, 4), name(1, 5),
		name(1, 6), name(1, 6) + ".partial", name(2, 6), name(2, 7) + ".zst", name(2, 8) + ".partial",
		name(1, 1) + ".00001000.aborted", "00000002.history", "somebody's notes"} {
		if err := os.WriteFile(filepath.Join(path, file), []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	// Of 4 and 5, which are both there, the archive says that some WAL between them is not.
	if err := d.RecordGap(archive.Gap{Timeline: 1, From: begin + 5*mb - 8, To: begin + 5*mb, Reason: "removed", Time: time.Now()}); err != nil {
		t.Fatal(err)
	}
	before := listing(t, path)
	c, err := archive.ReadCatalogue(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	if after := listing(t, path); after != before {
		t.Errorf("reading changed the directory from\n%sto\n%s", before, after)
	}
	var ranges []string
	for _, r := range c.Ranges() {
		ranges = append(ranges, fmt.Sprintf("%d: %d to %d", r.Timeline, (r.Start-begin)/mb, (r.End-begin)/mb))
	}
	if got, want := strings.Join(ranges, ", "), "1: 0 to 3, 1: 4 to 5, 1: 5 to 7, 2: 6 to 8"; got != want {
		t.Errorf("ranges are %s, not %s", got, want)
	}
	var files []string
	for _, f := range c.Files {
		files = append(files, f.File)
		if f.Partial != strings.HasSuffix(f.File, ".partial") || int(f.Bytes) != len(f.File) {
			t.Errorf("%+v", f)
		}
	}
	if got, want := strings.Join(files, " "), strings.Join([]string{name(1, 0), name(1, 1), name(1, 1) + ".gz", name(1, 2) + ".lz4", name(1, 4),
		name(1, 5), name(1, 6), name(1, 6) + ".partial", name(2, 6), name(2, 7) + ".zst", name(2, 8) + ".partial"}, " "); got != want {
		t.Errorf("files are\n%s, not\n%s", got, want)
	}
	if fmt.Sprint(c.Histories) != "[2]" || len(c.Aside) != 1 || !c.Bound || c.Identity != identity {
		t.Errorf("%+v", c)
	}
	if _, err := c.History(2); !errors.As(err, new(*archive.FileError)) {
		t.Errorf("a history that makes no sense: %v", err)
	}
	if _, err := c.History(3); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a history that is not there: %v", err)
	}
}

func TestCatalogueOpensWhatWasCompressedSince(t *testing.T) {
	path := t.TempDir()
	s := wal.Segment{Timeline: 1, Start: begin, Size: mb}
	c := archive.Catalogue{Path: path}
	if _, err := c.Open(s); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a segment that is not there: %v", err)
	}
	f, err := os.Create(filepath.Join(path, s.Name()+".gz"))
	if err != nil {
		t.Fatal(err)
	}
	z := gzip.NewWriter(f)
	if _, err := io.WriteString(z, "WAL"); err != nil || z.Close() != nil || f.Close() != nil {
		t.Fatal("not written")
	}
	r, err := c.Open(s)
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	if data, err := io.ReadAll(r); err != nil || string(data) != "WAL" || r.Name != s.Name()+".gz" {
		t.Errorf("%s has %q, %v", r.Name, data, err)
	}
	if err := os.WriteFile(filepath.Join(path, s.Next().Name()+".gz"), []byte("garbage"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := c.Open(s.Next()); !errors.As(err, new(*archive.FileError)) {
		t.Errorf("garbage: %v", err)
	}
}
