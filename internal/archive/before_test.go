package archive_test

import (
	"bytes"
	"context"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// compressors are by the suffixes of the files that they make.
var compressors = map[string]func(io.Writer) io.WriteCloser{
	".gz":  func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) },
	".lz4": func(w io.Writer) io.WriteCloser { return lz4.NewWriter(w) },
	".zst": func(w io.Writer) io.WriteCloser { z, _ := zstd.NewWriter(w); return z },
}

func compressed(t testing.TB, suffix string, data []byte) []byte {
	t.Helper()
	var buf bytes.Buffer
	z := compressors[suffix](&buf)
	if _, err := z.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return buf.Bytes()
}

func put(t testing.TB, path, name string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(path, name), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

// compressFile replaces a file by a compressed one.
func compressFile(t testing.TB, path, name, suffix string) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(path, name))
	if err != nil {
		t.Fatal(err)
	}
	put(t, path, name+suffix, compressed(t, suffix, data))
	if err := os.Remove(filepath.Join(path, name)); err != nil {
		t.Fatal(err)
	}
}

// longRecordWAL has a record that begins in the first segment, and ends in the
// fourth, and some records after it, up to end.
func longRecordWAL() (g *pgtest.WAL, end wal.LSN) {
	g = walTo(begin + mb - 20<<10)
	g.Append(bytes.Repeat([]byte("long"), (2*mb+400<<10)/4))
	for range 20 {
		g.Append(bytes.Repeat([]byte("after"), 1000))
	}
	return g, g.End()
}

// TestRecordLongerThanASegmentIsGoneOnWith restarts in the segment in which a
// record ends that began three segments before, whether those are compressed or
// not: nothing of it is received again.
func TestRecordLongerThanASegmentIsGoneOnWith(t *testing.T) {
	for _, suffixes := range [][3]string{{}, {".gz", ".gz", ".gz"}, {"", ".lz4", ""}, {".zst", "", ".gz"}} {
		g, end := longRecordWAL()
		path := t.TempDir()
		d := open(t, path)
		w := openTail(t, d)
		write(t, w, g, 100_000, end)
		if n := len(flush(t, w)); n != 3 {
			t.Fatalf("%d segments were sealed, want 3", n)
		}
		for i, suffix := range suffixes {
			if suffix != "" {
				compressFile(t, path, name(1, i), suffix)
			}
		}
		w = reopen(t, d)
		if again := end - w.Pos(); w.Durable() != end || again > 2*wal.PageSize {
			t.Errorf("%q: durable up to %s, and %d bytes come again; want %s, and two pages at most", suffixes, w.Durable(), again, end)
		}
		write(t, w, g, 1000, end)
	}
}

// reopen opens a directory again, as the next process does.
func reopen(t testing.TB, d *archive.Dir) *archive.Writer {
	t.Helper()
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	return openTail(t, open(t, d.Path()))
}

// TestWALThatDoesNotContinueACompressedSegmentIsRefused as it is with a plain
// one, also in the first record of the next segment.
func TestWALThatDoesNotContinueACompressedSegmentIsRefused(t *testing.T) {
	for suffix := range compressors {
		path := t.TempDir()
		d := open(t, path)
		w := openTail(t, d)
		write(t, w, walTo(begin+mb), 100_000, begin+mb)
		flush(t, w)
		compressFile(t, path, name(1, 0), suffix)

		other := newWAL()
		other.FillTo(begin + mb) // another last record
		other.FillTo(begin + mb + 8192)
		w = reopen(t, d)
		if err := w.Write(w.Pos(), other.Bytes(begin+mb, begin+mb+8192)); !isDivergence(err) {
			t.Errorf("%s: %v, want a divergence", suffix, err)
		}
	}
}

// TestDamagedCompressedSegmentIsNamedAndGoneOnFrom has a segment that cannot be
// read, right before the place where the archive goes on. What it would tell is not
// known then; what comes is archived.
func TestDamagedCompressedSegmentIsNamedAndGoneOnFrom(t *testing.T) {
	for suffix := range compressors {
		for what, spoil := range map[string]func([]byte) []byte{
			"cut short": func(p []byte) []byte { return p[:len(p)/2] },
			"empty":     func([]byte) []byte { return nil },
			"changed":   func(p []byte) []byte { p[len(p)/2] ^= 0x55; return p },
		} {
			path := t.TempDir()
			d := open(t, path)
			w := openTail(t, d)
			g := walTo(begin + mb)
			for range 20 {
				g.Append(make([]byte, 1000))
			}
			write(t, w, g, 100_000, begin+mb)
			flush(t, w)
			compressFile(t, path, name(1, 0), suffix)
			data, err := os.ReadFile(filepath.Join(path, name(1, 0)+suffix))
			if err != nil {
				t.Fatal(err)
			}
			put(t, path, name(1, 0)+suffix, spoil(data))
			w, err = d.OpenWriter(context.Background(), identity, 1, begin+mb)
			if err != nil {
				t.Fatalf("%s %s: %v", suffix, what, err)
			}
			if err := w.Unsound(); !isFileError(err) || !bytes.Contains([]byte(err.Error()), []byte(name(1, 0)+suffix)) {
				t.Errorf("%s %s: %v; want an error that names the file", suffix, what, err)
			}
			write(t, w, g, 10_000, g.End())
			flush(t, w)
			if w.Durable() != g.End() {
				t.Errorf("%s %s: durable up to %s, want %s", suffix, what, w.Durable(), g.End())
			}
			w.Close()
		}
	}
}

// TestPartialThatPgReceivewalCompressedIsGoneOnWith has what pg_receivewal leaves
// of a segment that it was compressing when it was stopped, or killed.
func TestPartialThatPgReceivewalCompressedIsGoneOnWith(t *testing.T) {
	g := walTo(begin + mb + 600<<10)
	end := g.End()
	content := append(bytes.Clone(g.Bytes(begin+mb, end)), make([]byte, begin+2*mb-end)...)
	half := wal.LSN(300 << 10)
	for suffix := range compressors {
		for what, test := range map[string]struct {
			plain  wal.LSN // how much the plain file has; 0: there is none
			file   []byte  // the compressed one
			atMost wal.LSN // how much may come again
		}{
			"whole":            {0, compressed(t, suffix, content), 16 << 10},
			"up to its end":    {0, compressed(t, suffix, content[:end-begin-mb]), 16 << 10},
			"garbage after it": {0, append(compressed(t, suffix, content[:end-begin-mb]), "garbage"...), 16 << 10},
			"killed":           {0, compressed(t, suffix, content)[:200], 640 << 10},
			"empty":            {0, nil, 640 << 10},
			"no such file":     {0, bytes.Repeat([]byte("garbage"), 100), 640 << 10},
			"plain has more":   {end - begin - mb, compressed(t, suffix, content[:half]), 16 << 10},
			"plain has less":   {half, compressed(t, suffix, content), 16 << 10},
		} {
			t.Run(what+" "+suffix, func(t *testing.T) {
				path := t.TempDir()
				d := open(t, path)
				w := openTail(t, d)
				write(t, w, g, 100_000, begin+mb+max(test.plain, 1))
				flush(t, w)
				partial := name(1, 1) + ".partial"
				if test.plain == 0 {
					if err := os.Remove(filepath.Join(path, partial)); err != nil {
						t.Fatal(err)
					}
				}
				put(t, path, name(1, 1)+suffix+".partial", test.file)
				w = reopen(t, d)
				if again := end - w.Pos(); again > test.atMost {
					t.Errorf("%d bytes come again, want at most %d", again, test.atMost)
				}
				write(t, w, g, 1000, end)
				flush(t, w)
				wantContent(t, path, g, end, end)
				if _, err := os.Stat(filepath.Join(path, name(1, 1)+suffix+".partial")); err == nil {
					t.Error("the compressed file is still there")
				}
			})
		}
	}
}

// TestPartialWithOtherWALIsNotTakenOver: neither of two files that contradict
// each other is touched.
func TestPartialWithOtherWALIsNotTakenOver(t *testing.T) {
	g := walTo(begin + 200<<10)
	path := t.TempDir()
	d := open(t, path)
	w := openTail(t, d)
	write(t, w, g, 100_000, g.End())
	flush(t, w)
	other := newWAL()
	for other.End() < begin+400<<10 {
		other.Append(make([]byte, 500))
	}
	put(t, path, name(1, 0)+".gz.partial", compressed(t, ".gz", other.Bytes(begin, other.End())))
	before := files(t, path)
	if _, err := d.OpenWriter(context.Background(), identity, 1, begin); !isFileError(err) {
		t.Errorf("%v; want an error that names the files", err)
	}
	if after := files(t, path); len(after) != len(before) || after[name(1, 0)+".partial"] != before[name(1, 0)+".partial"] {
		t.Errorf("files were changed: %v, then %v", before, after)
	}
}

// TestPartialOfAnotherClusterIsNotTakenOver: it may be all that there is of that.
func TestPartialOfAnotherClusterIsNotTakenOver(t *testing.T) {
	other := pgtest.NewWAL(pgtest.WALConfig{SystemID: systemID + 1, Size: mb, Start: begin})
	other.FillTo(begin + 300<<10)
	d := open(t, t.TempDir())
	bind(t, d, begin)
	put(t, d.Path(), name(1, 0)+".gz.partial", compressed(t, ".gz", other.Bytes(begin, other.End())))
	before := files(t, d.Path())
	if _, err := d.OpenWriter(context.Background(), identity, 1, begin); !isIdentityError(err) {
		t.Errorf("%v; want an error that says whose it is", err)
	}
	if after := files(t, d.Path()); !maps.Equal(before, after) {
		t.Errorf("files were changed: %v, then %v", before, after)
	}
}

// TestCompressedDirectoryOfPgReceivewalIsJudgedByItsHeaders has no plain file.
func TestCompressedDirectoryOfPgReceivewalIsJudgedByItsHeaders(t *testing.T) {
	g := walTo(begin + 2*mb)
	for _, file := range []string{name(1, 0) + ".gz", name(1, 0) + ".lz4", name(1, 0) + ".gz.partial"} {
		path := t.TempDir()
		suffix := filepath.Ext(file)
		if suffix == ".partial" {
			suffix = ".gz"
		}
		put(t, path, file, compressed(t, suffix, g.Bytes(begin, begin+mb)))
		d := open(t, path)
		if err := d.Check(identity); err != nil {
			t.Errorf("%s: %v", file, err)
		}
		if err := d.Check(archive.Identity{SystemID: systemID + 1, SegmentSize: mb}); !isIdentityError(err) {
			t.Errorf("%s: of another cluster: %v", file, err)
		}
		want := begin + mb
		if suffix != filepath.Ext(file) {
			want = begin
		}
		if tail, ok, err := d.Tail(mb); err != nil || !ok || tail.Start != want {
			t.Errorf("%s: the archive ends at %v, %v, %v; want %s", file, tail, ok, err, want)
		}
	}
}

// leftBehind is an archive that was stopped inside a record that crosses several segments' ends, and in which a
// pg_receivewal has completed the last of them since.
func leftBehind(t *testing.T, suffix string) (d *archive.Dir, g *pgtest.WAL, end wal.LSN) {
	g, _ = longRecordWAL()
	path := t.TempDir()
	d = open(t, path)
	w := openTail(t, d)
	write(t, w, g, 100_000, begin+3*mb+100<<10)
	if n := len(flush(t, w)); n != 0 {
		t.Fatalf("%d segments were sealed, want none", n)
	}
	g.FillTo(begin + 4*mb)
	end = g.End()
	if err := os.Remove(filepath.Join(path, name1(3))); err != nil {
		t.Fatal(err)
	}
	last := g.Bytes(begin+3*mb, end)
	if suffix != "" {
		last = compressed(t, suffix, last)
	}
	put(t, path, name(1, 3)+suffix, last)
	return d, g, end
}

func TestSegmentsThatAreCompleteWithWhatCameAfterThemAreSealed(t *testing.T) {
	for _, suffix := range []string{"", ".gz"} {
		d, g, end := leftBehind(t, suffix)
		w := reopen(t, d)
		if w.Durable() != end {
			t.Errorf("durable up to %s, want %s", w.Durable(), end)
		}
		wantContent(t, d.Path(), g, begin+3*mb, end)
	}
}

func TestSegmentThatIsNotCompleteBehindASealedOneIsNamed(t *testing.T) {
	d, _, end := leftBehind(t, "")
	f, err := os.OpenFile(filepath.Join(d.Path(), name1(1)), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt([]byte("changed"), 500<<10); err != nil {
		t.Fatal(err)
	}
	f.Close()
	before := files(t, d.Path())
	if _, err := d.OpenWriter(context.Background(), identity, 1, end); !isFileError(err) || !bytes.Contains([]byte(err.Error()), []byte(name1(0))) {
		t.Errorf("%v; want an error that names the first of them", err)
	}
	if after := files(t, d.Path()); !maps.Equal(before, after) {
		t.Errorf("files were changed: %v, then %v", before, after)
	}
}

// What a stop leaves is what pg_receivewal goes on with: one segment that is not sealed, behind all others.
func TestTrimLeavesOneSegmentToGoOnWith(t *testing.T) {
	g, end := longRecordWAL()
	d := open(t, t.TempDir())
	w := openTail(t, d)
	write(t, w, g, 100_000, begin+3*mb+100<<10)
	flush(t, w)
	durable := w.Durable()
	if err := w.Trim(); err != nil {
		t.Fatal(err)
	}
	if have := slices.Sorted(maps.Keys(files(t, d.Path()))); !slices.Equal(have, []string{".lock", name1(0)}) {
		t.Errorf("there are %v", have)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	w = reopen(t, d)
	if w.Durable() != durable {
		t.Errorf("durable up to %s, was %s", w.Durable(), durable)
	}
	write(t, w, g, 100_000, end)
	flush(t, w)
	wantContent(t, d.Path(), g, end, end)
}

// segmentOf is what a segment's file has of g, up to end.
func segmentOf(g *pgtest.WAL, n int, end wal.LSN) []byte {
	content := make([]byte, mb)
	start := begin + wal.LSN(n)*mb
	copy(content, g.Bytes(start, min(end, start+mb)))
	return content
}

// insideWAL begins before begin: there a record goes on into the archive's first segment. Another one crosses the end
// of that.
func insideWAL() *pgtest.WAL {
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: systemID, Size: mb, Start: begin - mb})
	g.FillTo(begin - 20<<10)
	g.Append(bytes.Repeat([]byte("into"), 20<<10))
	g.FillTo(begin + mb - 20<<10)
	g.Append(bytes.Repeat([]byte("over"), 20<<10))
	for g.End() < begin+mb+300<<10 {
		g.Append(bytes.Repeat([]byte{7}, 4000))
	}
	return g
}

// What may have been acknowledged stays, for a first segment that has not been compared yet, and for records behind
// one that the server gave up.
func TestTrimRemovesNothingThatMayHaveBeenAcknowledged(t *testing.T) {
	inside := insideWAL()
	given := walTo(begin + mb - 20000)
	given.Abort(bytes.Repeat([]byte("torn"), 20000), 6)
	for given.End() < begin+mb+300<<10 {
		given.Append(bytes.Repeat([]byte{3}, 4000))
	}
	for what, g := range map[string]*pgtest.WAL{"not compared": inside, "behind a record that was given up": given} {
		d := open(t, t.TempDir())
		put(t, d.Path(), name1(0), segmentOf(g, 0, g.End()))
		put(t, d.Path(), name1(1), segmentOf(g, 1, g.End()))
		w := openTail(t, d)
		durable, promised := w.Durable(), w.Promised()
		if promised <= begin+mb {
			t.Fatalf("%s: nothing is promised in the second segment", what)
		}
		end := begin + 100<<10
		if what != "not compared" {
			end = begin + mb + 8192
		}
		write(t, w, g, 8192, end)
		flush(t, w)
		if err := w.Trim(); err != nil {
			t.Fatal(err)
		}
		if err := w.Close(); err != nil {
			t.Fatal(err)
		}
		if w = reopen(t, d); w.Durable() < durable || w.Promised() < promised {
			t.Errorf("%s: durable %s and promised %s, before the stop %s and %s", what, w.Durable(), w.Promised(), durable, promised)
		}
	}
}

// No CRC speaks for a record that the server gave up, so nothing is sealed with one that was not received again.
func TestSegmentThatEndsInARecordThatWasGivenUpIsNotSealedUnread(t *testing.T) {
	g := walTo(begin + mb - 40000)
	g.Abort(bytes.Repeat([]byte("torn"), 20000), 5)
	g.FillTo(begin + 2*mb)
	d := open(t, t.TempDir())
	lost := segmentOf(g, 0, g.End())
	copy(lost[mb-12288:], make([]byte, 2048)) // sectors that a power loss took
	put(t, d.Path(), name1(0), lost)
	put(t, d.Path(), name(1, 1), segmentOf(g, 1, g.End()))
	if _, err := d.OpenWriter(context.Background(), identity, 1, begin+2*mb); !isFileError(err) {
		t.Errorf("%v; want an error that names the file", err)
	}
	if _, err := os.Stat(filepath.Join(d.Path(), name(1, 0))); err == nil {
		t.Error("it was sealed")
	}
}

// A first segment that begins inside a record has bytes that no CRC speaks for. Nor does anything speak for what comes
// after a compressed segment that cannot be read. It is not sealed then, and the archive goes on all the same.
func TestSegmentThatCannotBeProvenStaysPartialAndIsNamed(t *testing.T) {
	for _, damaged := range []bool{false, true} {
		g, n := insideWAL(), 0
		if damaged {
			g, n = walTo(begin+mb-20<<10), 1
			g.Append(bytes.Repeat([]byte("into"), 20<<10))
			g.FillTo(begin + 2*mb - 20<<10)
			g.Append(bytes.Repeat([]byte("over"), 20<<10))
		}
		end := begin + wal.LSN(n+2)*mb
		g.FillTo(end)
		d := open(t, t.TempDir())
		if damaged {
			put(t, d.Path(), name(1, 0)+".gz", compressed(t, ".gz", segmentOf(g, 0, end))[:5000])
		}
		put(t, d.Path(), name1(n), segmentOf(g, n, end))
		put(t, d.Path(), name(1, n+1), segmentOf(g, n+1, end))
		w, err := d.OpenWriter(context.Background(), identity, 1, end)
		if err != nil {
			t.Fatalf("damaged %v: %v", damaged, err)
		}
		if err := w.Unsound(); !isFileError(err) || !bytes.Contains([]byte(err.Error()), []byte(name1(n))) {
			t.Errorf("damaged %v: %v; want an error that names the file", damaged, err)
		}
		if _, err := os.Stat(filepath.Join(d.Path(), name1(n))); err != nil {
			t.Errorf("damaged %v: %v", damaged, err)
		}
		g.Append(make([]byte, 5000))
		write(t, w, g, 1000, g.End())
		flush(t, w)
		w.Close()
	}
}

// The record that crosses the sealed segment, too, ends in the partial file after that, or has not ended yet.
func TestSegmentIsSealedOnceTheRecordThatGoesOnAfterItHasEnded(t *testing.T) {
	g := walTo(begin + mb - 20<<10)
	_, recordEnd := g.Append(bytes.Repeat([]byte("long"), (mb+200<<10)/4))
	for g.End() < begin+2*mb+600<<10 {
		g.Append(bytes.Repeat([]byte{3}, 4000))
	}
	d := open(t, t.TempDir())
	put(t, d.Path(), name1(0), segmentOf(g, 0, g.End()))
	put(t, d.Path(), name(1, 1), segmentOf(g, 1, g.End()))
	exists := func(name string) bool {
		_, err := os.Stat(filepath.Join(d.Path(), name))
		return err == nil
	}
	for _, end := range []wal.LSN{begin + 2*mb, recordEnd - 8, g.End()} {
		if end > begin+2*mb {
			put(t, d.Path(), name1(2), segmentOf(g, 2, end))
		}
		w, err := d.OpenWriter(context.Background(), identity, 1, begin+2*mb)
		if err != nil {
			t.Fatalf("up to %s: %v", end, err)
		}
		if whole := end == g.End(); exists(name(1, 0)) != whole || exists(name1(0)) == whole || (w.Unsound() == nil) != whole {
			t.Errorf("up to %s: %v, %v", end, slices.Sorted(maps.Keys(files(t, d.Path()))), w.Unsound())
		}
		w.Close()
	}
	wantContent(t, d.Path(), g, begin+mb, g.End())
}

// A file that has nothing is no segment, and the only sign of one that is missing.
func TestEmptyPartialBehindASealedSegmentIsNamedAndStays(t *testing.T) {
	d, _, end := leftBehind(t, "")
	put(t, d.Path(), name1(1), nil)
	before := files(t, d.Path())
	for range 2 {
		if _, err := d.OpenWriter(context.Background(), identity, 1, end); !isFileError(err) || !bytes.Contains([]byte(err.Error()), []byte(name1(1))) {
			t.Errorf("%v; want an error that names the file", err)
		}
	}
	if after := files(t, d.Path()); !maps.Equal(before, after) {
		t.Errorf("files were changed: %v, then %v", before, after)
	}
}
