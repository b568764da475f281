package archive_test

import (
	"bytes"
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"maps"
	"math/rand/v2"
	"os"
	"path/filepath"
	"testing"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

const (
	mb       = 1 << 20
	begin    = wal.LSN(64 * mb) // of all WAL here
	systemID = 4242
)

var identity = archive.Identity{SystemID: systemID, SegmentSize: mb}

func newWAL() *pgtest.WAL {
	return pgtest.NewWAL(pgtest.WALConfig{SystemID: systemID, Size: mb, Start: begin})
}

// walTo is WAL of records of some length that ends at end.
func walTo(end wal.LSN) *pgtest.WAL {
	w := newWAL()
	for w.End()+8<<10 < end {
		w.Append(bytes.Repeat([]byte{byte(w.End() >> 8)}, 4000))
	}
	w.FillTo(end)
	return w
}

// name is the file name of the segment that begins n segments after begin.
func name(tli wal.Timeline, n int) string {
	return wal.SegmentSize(mb).Segment(tli, begin+wal.LSN(n)*mb).Name()
}

// open opens a directory, until the test ends.
func open(t testing.TB, path string) *archive.Dir {
	t.Helper()
	d, err := archive.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	return d
}

// openTail opens the writer at the archive's tail, as a process that is started does.
func openTail(t testing.TB, d *archive.Dir) *archive.Writer {
	t.Helper()
	tail, ok, err := d.Tail(mb)
	if err != nil {
		t.Fatal(err)
	}
	if !ok {
		tail.Timeline, tail.Start = 1, begin
	}
	w, err := d.OpenWriter(context.Background(), identity, tail.Timeline, tail.Start)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.Close() })
	return w
}

// write writes g from where the writer stands up to end, in pieces of size bytes.
func write(t testing.TB, w *archive.Writer, g *pgtest.WAL, size int, end wal.LSN) {
	t.Helper()
	for w.Pos() < end {
		to := min(w.Pos()+wal.LSN(size), end)
		if err := w.Write(w.Pos(), g.Bytes(w.Pos(), to)); err != nil {
			t.Fatal(err)
		}
	}
}

func flush(t testing.TB, w *archive.Writer) []wal.Segment {
	t.Helper()
	sealed, err := w.Flush()
	if err != nil {
		t.Fatal(err)
	}
	return sealed
}

// complete is the end of the last record of g that ends at or before l.
func complete(g *pgtest.WAL, l wal.LSN) wal.LSN {
	last := begin
	for _, end := range g.Boundaries() {
		if end <= l {
			last = end
		}
	}
	return last
}

// wantContent expects the archive's files to have what g has, up to end, and exactly the segments that end at or
// before complete to be sealed.
func wantContent(t testing.TB, path string, g *pgtest.WAL, end, complete wal.LSN) {
	t.Helper()
	for s := wal.SegmentSize(mb).Segment(1, begin); s.Start < end; s = s.Next() {
		file := s.Name()
		if s.End() > complete {
			file += ".partial"
		}
		data, err := os.ReadFile(filepath.Join(path, file))
		if n := min(end, s.End()) - s.Start; err != nil || len(data) != mb || !bytes.Equal(data[:n], g.Bytes(s.Start, s.Start+n)) {
			t.Errorf("%s: %d bytes, %v; not the WAL up to %s", file, len(data), err, end)
		}
	}
}

// files are digests of all files of a directory.
func files(t testing.TB, path string) map[string]string {
	t.Helper()
	all := map[string]string{}
	entries, err := os.ReadDir(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		data, err := os.ReadFile(filepath.Join(path, e.Name()))
		if err != nil {
			t.Fatal(err)
		}
		all[e.Name()] = fmt.Sprintf("%d bytes, %x", len(data), sha256.Sum256(data))
	}
	return all
}

func TestWriterAroundPageAndSegmentBoundaries(t *testing.T) {
	ends := []wal.LSN{40 + 24, wal.PageSize - 8, wal.PageSize, wal.PageSize + 24 + 24, mb - wal.PageSize, mb - 8, mb, mb + 40 + 24, 2*mb + 5000}
	for _, size := range []int{7, wal.PageSize - 1, wal.PageSize, 128 << 10, mb - 1, mb + 1} {
		for _, end := range ends {
			if size < 8 && end > 2*wal.PageSize {
				continue
			}
			t.Run(fmt.Sprintf("%d bytes at once to %d", size, end), func(t *testing.T) {
				g := walTo(begin + end)
				path := t.TempDir()
				d := open(t, path)
				w := openTail(t, d)
				write(t, w, g, size, g.End())
				sealed := flush(t, w)
				if w.Written() != g.End() || w.Durable() != g.End() || len(sealed) != int(end/mb) || w.SealDue() {
					t.Errorf("written %s, durable %s, want %s; sealed %v", w.Written(), w.Durable(), g.End(), sealed)
				}
				wantContent(t, path, g, g.End(), g.End())
				w = openTail(t, d)
				if w.Durable() != g.End() || w.Pos() > g.End() || g.End()-w.Pos() > 2*wal.PageSize {
					t.Errorf("opened again: durable %s, goes on at %s, want %s", w.Durable(), w.Pos(), g.End())
				}
				g.Append(make([]byte, 100))
				write(t, w, g, size, g.End())
				flush(t, w)
				wantContent(t, path, g, g.End(), g.End())
			})
		}
	}
}

// A position in the middle of a record is never durable, wherever the pieces and the flushes end.
func TestDurableIsWhereARecordEnds(t *testing.T) {
	g := newWAL()
	for _, n := range []int{100, 20000, 1, 8100, 8150, 900000, 300000, 50} {
		g.Append(make([]byte, n))
	}
	switched := g.End() + 24 // its record ends there, and WAL goes on in the next segment
	g.Switch()
	g.Append(make([]byte, 1000))
	w := openTail(t, open(t, t.TempDir()))
	const step = 10007
	for at := begin + step; w.Written() < g.End(); at += step {
		durable := w.Durable()
		write(t, w, g, step, min(at, g.End()))
		if w.Durable() != durable {
			t.Fatalf("durable moved from %s to %s without a flush", durable, w.Durable())
		}
		flush(t, w)
		want := complete(g, w.Written())
		if w.Written() >= switched {
			want = max(want, switched)
		}
		if got := w.Durable(); got != want {
			t.Fatalf("written %s: durable %s, want %s", w.Written(), got, want)
		}
	}
}

func TestWriterRefuses(t *testing.T) {
	for name, tt := range map[string]struct {
		write func(w *archive.Writer, g *pgtest.WAL) error
		want  any // type of the error
	}{
		"another position": {func(w *archive.Writer, g *pgtest.WAL) error { return w.Write(w.Pos()+8, make([]byte, 8)) }, nil},
		"corrupt WAL":      {func(w *archive.Writer, g *pgtest.WAL) error { return w.Write(w.Pos(), make([]byte, 100)) }, new(*wal.CorruptError)},
		"a page of another system": {func(w *archive.Writer, g *pgtest.WAL) error {
			o := pgtest.NewWAL(pgtest.WALConfig{SystemID: 1, Size: mb, Start: begin})
			o.FillTo(begin + 2*mb)
			if err := w.Write(w.Pos(), g.Bytes(w.Pos(), begin+mb)); err != nil {
				return err
			}
			return w.Write(w.Pos(), o.Bytes(begin+mb, begin+mb+8192))
		}, new(*wal.CorruptError)},
	} {
		t.Run(name, func(t *testing.T) {
			g := walTo(begin + 100<<10)
			path := t.TempDir()
			w := openTail(t, open(t, path))
			write(t, w, g, 9000, g.End())
			flush(t, w)
			g.FillTo(begin + mb)
			before := files(t, path)
			err := tt.write(w, g)
			if err == nil || tt.want != nil && !errors.As(err, tt.want) {
				t.Errorf("%T: %v", err, err)
			}
			if name != "a page of another system" && !maps.Equal(before, files(t, path)) {
				t.Error("the archive changed")
			}
		})
	}
}

func TestOverlapIsCompared(t *testing.T) {
	torn := func() *pgtest.WAL {
		g := walTo(begin + 20000)
		g.Append(make([]byte, 30000))
		return g
	}
	path := t.TempDir()
	d := open(t, path)
	w := openTail(t, d)
	g := torn()
	record, end := begin+20000, begin+4*wal.PageSize
	write(t, w, g, 1000, end)
	flush(t, w)
	if w.Durable() != record || w.Written() != end {
		t.Fatalf("durable %s, written %s", w.Durable(), w.Written())
	}
	before := files(t, path)

	if pos := w.Rewind(); pos != begin+wal.PageSize || pos != w.Pos() {
		t.Errorf("goes on at %s", pos)
	}
	write(t, w, g, 777, end) // the same again
	if w.Written() != end || !maps.Equal(before, files(t, path)) {
		t.Error("an equal overlap changed something")
	}

	for _, at := range []wal.LSN{begin + wal.PageSize, record - 1, record, end - 1} {
		pos := w.Rewind()
		p := g.Bytes(pos, end)
		p[at-pos] ^= 1
		err := w.Write(pos, p)
		var diverged *archive.DivergenceError
		var aborted *archive.AbortedRecordError
		switch {
		case at < record && errors.As(err, &diverged):
			if diverged.Timeline != 1 || diverged.LSN != at {
				t.Errorf("%+v, want %s", diverged, at)
			}
		case at >= record && errors.As(err, &aborted):
			if aborted.Timeline != 1 || aborted.LSN != at || aborted.Record != record {
				t.Errorf("%+v, want %s in %s", aborted, at, record)
			}
		default:
			t.Errorf("differs at %s: %v", at, err)
		}
		if !maps.Equal(before, files(t, path)) {
			t.Fatal("the archive changed")
		}
	}

	// Opened again it goes on after the last complete record, with other WAL.
	other := walTo(begin + 20000)
	other.Append([]byte("instead"))
	other.FillTo(begin + mb + 3000)
	w = openTail(t, d)
	write(t, w, other, 5000, other.End())
	flush(t, w)
	wantContent(t, path, other, other.End(), other.End())
}

// A process that was killed leaves what it wrote in the page cache; a power loss leaves zeros or other bytes where
// nothing was synced. Neither loses anything that was durable.
func TestReopenFindsWhatWasDurable(t *testing.T) {
	for seed := range uint64(20) {
		t.Run(fmt.Sprintf("seed=%d", seed), func(t *testing.T) {
			r := rand.New(rand.NewPCG(seed, 0))
			g := newWAL()
			for g.End() < begin+3*mb {
				if g.Append(make([]byte, []int{r.IntN(300), r.IntN(20000), r.IntN(200000)}[r.IntN(3)])); r.IntN(40) == 0 {
					g.Switch()
				}
			}
			path := t.TempDir()
			d := open(t, path)
			var durable wal.LSN
			for durable < g.End() {
				w := openTail(t, d)
				if w.Durable() < durable {
					t.Fatalf("durable is %s, was %s", w.Durable(), durable)
				}
				write(t, w, g, 1+r.IntN(200000), min(w.Pos()+wal.LSN(r.IntN(2*mb)), g.End()))
				flush(t, w)
				durable = max(durable, w.Durable())
				synced := w.Written()
				write(t, w, g, 1+r.IntN(200000), min(w.Pos()+wal.LSN(r.IntN(mb)), g.End()))
				wantContent(t, path, g, w.Written(), durable)
				// No Close: the process is gone.
				d.Close()
				if r.IntN(2) == 0 {
					damage(t, r, path, synced, w.Written())
				}
				d = open(t, path)
			}
			wantContent(t, path, g, g.End(), g.End())
		})
	}
}

// damage overwrites a part of the bytes from from to to, which no file had synced.
func damage(t *testing.T, r *rand.Rand, path string, from, to wal.LSN) {
	t.Helper()
	if from == to {
		return
	}
	from += wal.LSN(r.Uint64N(uint64(to - from)))
	for garbage := r.IntN(2) == 0; from < to; from++ {
		s := wal.SegmentSize(mb).Segment(1, from)
		f, err := os.OpenFile(filepath.Join(path, s.Name()+".partial"), os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		p := make([]byte, min(to, s.End())-from)
		for i := range p {
			if garbage {
				p[i] = byte(r.Uint32())
			}
		}
		_, err = f.WriteAt(p, int64(from-s.Start))
		if err := errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		from += wal.LSN(len(p)) - 1
	}
}

// The first bytes of an archive can belong to a record that began before it. No CRC speaks for them: after a crash
// they are received again and compared, before their segment is sealed.
func TestSegmentIsNotSealedBeforeItsUnprovenBytesWereCompared(t *testing.T) {
	for what, lost := range map[string]struct{ from, n int64 }{
		"nothing lost":            {0, 0},
		"a page lost":             {0, wal.PageSize},
		"a sector lost":           {1024, 512},
		"half a page not updated": {1000, 4096 - 1000},
	} {
		t.Run(what, func(t *testing.T) {
			g := walTo(begin + mb - 3000)
			g.Append(bytes.Repeat([]byte("across"), 10000))
			g.FillTo(begin + 2*mb + 6000)
			path := t.TempDir()
			d := open(t, path)
			w, err := d.OpenWriter(t.Context(), identity, 1, begin+mb)
			if err != nil {
				t.Fatal(err)
			}
			write(t, w, g, 50000, g.End()) // and then the process is gone
			f, err := os.OpenFile(filepath.Join(path, name(1, 1)+".partial"), os.O_RDWR, 0)
			if err != nil {
				t.Fatal(err)
			}
			if _, err := f.WriteAt(make([]byte, lost.n), 2*wal.PageSize+lost.from); err != nil {
				t.Fatal(err)
			}
			f.Close()

			w = openTail(t, d)
			if _, ok := files(t, path)[name(1, 1)]; ok || w.Pos() != begin+mb {
				t.Errorf("sealed is %v, goes on at %s", ok, w.Pos())
			}
			write(t, w, g, 50000, g.End())
			flush(t, w)
			data, err := os.ReadFile(filepath.Join(path, name(1, 1)))
			if err != nil || !bytes.Equal(data, g.Bytes(begin+mb, begin+2*mb)) {
				t.Errorf("the sealed segment is not what the server had, %v", err)
			}
		})
	}
}

func TestPartialThatIsEmptyCountsAsMissing(t *testing.T) {
	path := t.TempDir()
	if err := os.WriteFile(filepath.Join(path, name(1, 0)+".partial"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	g := walTo(begin + 50000)
	w := openTail(t, open(t, path))
	write(t, w, g, 10000, g.End())
	flush(t, w)
	wantContent(t, path, g, g.End(), g.End())
}

func TestPartialThatIsTooLongIsLeftAlone(t *testing.T) {
	for _, size := range []int{mb + 1, 16 * mb} {
		path := t.TempDir()
		file := filepath.Join(path, name(1, 0)+".partial")
		if err := os.WriteFile(file, make([]byte, size), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := open(t, path).OpenWriter(t.Context(), identity, 1, begin)
		var fe *archive.FileError
		if !errors.As(err, &fe) || fe.Path != file {
			t.Errorf("%d bytes: %v", size, err)
		}
		if info, err := os.Stat(file); err != nil || info.Size() != int64(size) {
			t.Errorf("the file changed: %v, %v", info.Size(), err)
		}
	}
}

// A pg_receivewal that was killed while it filled a file with zeros leaves a short one, and so does a copy that was
// cut short: what it has counts.
func TestPartialThatIsTooShortGetsItsSize(t *testing.T) {
	g := walTo(begin + 600<<10)
	for _, size := range []int{1, 8192, 300 << 10, mb - 1} {
		path := t.TempDir()
		content := make([]byte, mb)
		copy(content, g.Bytes(begin, g.End()))
		put(t, path, name(1, 0)+".partial", content[:size])
		w := openTail(t, open(t, path))
		if again := begin + wal.LSN(min(size, 600<<10)) - w.Pos(); again > 3*wal.PageSize {
			t.Errorf("%d bytes: %d come again", size, again)
		}
		write(t, w, g, 10_000, g.End())
		flush(t, w)
		wantContent(t, path, g, g.End(), g.End())
	}
}

func TestSegmentThatIsThereIsNeverReplaced(t *testing.T) {
	for _, when := range []string{"before it is begun", "compressed", "while it is written"} {
		path := t.TempDir()
		file := filepath.Join(path, name(1, 1))
		if when == "compressed" {
			file += ".lz4"
		}
		g := walTo(begin + 2*mb)
		d := open(t, path)
		w := openTail(t, d)
		end := begin + mb
		if when == "while it is written" {
			end += 5000
		}
		write(t, w, g, 100000, end)
		flush(t, w)
		if err := os.WriteFile(file, []byte("foreign"), 0o600); err != nil {
			t.Fatal(err)
		}
		var err error
		for err == nil && w.Pos() < g.End() {
			err = w.Write(w.Pos(), g.Bytes(w.Pos(), min(w.Pos()+1000, g.End())))
		}
		if err == nil {
			_, err = w.Flush()
		}
		if err == nil || w.Durable() >= g.End() {
			t.Errorf("%s: %v, durable %s", when, err, w.Durable())
		}
		if data, err := os.ReadFile(file); string(data) != "foreign" {
			t.Errorf("%s: it was replaced: %d bytes, %v", when, len(data), err)
		}
	}
}

// The zeros that are written ahead never take the place of WAL, and end with the segment.
func TestZerosAheadTakeNothingAway(t *testing.T) {
	for _, size := range []int{3000, 70 << 10, 3 * mb} {
		g := walTo(begin + 2*mb + 5000)
		path := t.TempDir()
		d := open(t, path)
		w := openTail(t, d)
		w.Prepare() // there is no segment yet
		for w.Pos() < g.End() {
			write(t, w, g, size, min(w.Pos()+wal.LSN(size), g.End()))
			w.Prepare()
			flush(t, w)
			w.Prepare()
		}
		wantContent(t, path, g, g.End(), g.End())
		openTail(t, d).Prepare()
		wantContent(t, path, g, g.End(), g.End())
	}
}

// A damaged byte ends what an archive has, for the walker. The acknowledged WAL behind it stays in the file while it
// is received again in small pieces, whether that comes to its end or not.
func TestZerosAheadSpareWhatFollowsADamagedByte(t *testing.T) {
	g := walTo(begin + 900<<10)
	path := t.TempDir()
	d := open(t, path)
	w := openTail(t, d)
	write(t, w, g, 3000, g.End())
	flush(t, w)
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	const damaged = begin + 200<<10 + 100
	f, err := os.OpenFile(filepath.Join(path, name(1, 0)+".partial"), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if _, err := f.WriteAt([]byte{^g.Bytes(damaged, damaged+1)[0]}, int64(damaged-begin)); err != nil {
		t.Fatal(err)
	}

	w = openTail(t, d)
	if w.Written() >= damaged {
		t.Fatalf("the archive goes on at %s, behind the damaged byte at %s", w.Written(), damaged)
	}
	for end := begin + 400<<10; w.Pos() < end; {
		write(t, w, g, 3000, min(w.Pos()+3000, end))
		flush(t, w)
		w.Prepare()
	}
	wantContent(t, path, g, g.End(), begin)
}

// BenchmarkWriter writes and flushes pieces of a size; the file system counts as well.
func BenchmarkWriter(b *testing.B) {
	for _, size := range []int{256, 8 << 10, 128 << 10, 1 << 20} {
		for _, every := range []int{1, 0} { // flushes: with each piece, at the end of a segment
			b.Run(fmt.Sprintf("size=%d/flush=%d", size, every), func(b *testing.B) {
				const segment = 16 * mb
				g := pgtest.NewWAL(pgtest.WALConfig{SystemID: systemID, Size: segment, Start: begin})
				for g.End() < begin+segment {
					g.Append(make([]byte, 200))
				}
				p := g.Bytes(begin, begin+segment)
				id := archive.Identity{SystemID: systemID, SegmentSize: segment}
				b.SetBytes(int64(size))
				b.ReportAllocs()
				var d *archive.Dir
				var w *archive.Writer
				at := len(p)
				for b.Loop() {
					if at == len(p) { // the same segment again, in another directory
						b.StopTimer()
						if w != nil {
							w.Close()
							d.Close()
						}
						d = open(b, b.TempDir())
						var err error
						if w, err = d.OpenWriter(context.Background(), id, 1, begin); err != nil {
							b.Fatal(err)
						}
						at = 0
						b.StartTimer()
					}
					if err := w.Write(begin+wal.LSN(at), p[at:at+size]); err != nil {
						b.Fatal(err)
					}
					if at += size; every > 0 || at == len(p) {
						if _, err := w.Flush(); err != nil {
							b.Fatal(err)
						}
					}
				}
			})
		}
	}
}

// No CRC speaks for the bytes of a record that the server gave up (XLOG_OVERWRITE_CONTRECORD), so a power
// loss that took some of them shows only when they come again.
func TestAbandonedRecordComesAgainAfterARestart(t *testing.T) {
	for _, fill := range []wal.LSN{begin + 300<<10, begin + mb + 5000} {
		g := walTo(begin + 100<<10)
		_, page := g.Abort(bytes.Repeat([]byte("torn"), 10000), 4)
		g.FillTo(fill)
		path := t.TempDir()
		d := open(t, path)
		write(t, openTail(t, d), g, 50000, g.End()) // and a crash before anything is synced
		partial := filepath.Join(path, name(1, 0)+".partial")
		f, err := os.OpenFile(partial, os.O_WRONLY, 0)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt(make([]byte, 2048), int64(page-begin)-6144); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}

		w := openTail(t, d)
		write(t, w, g, 50000, g.End())
		flush(t, w)
		wantContent(t, path, g, g.End(), g.End())
	}
}

// A record that crosses the end of the last sealed segment has its beginning before all that is still to
// come: WAL is asked for from the segment's start on, not from the record's.
func TestWriterDoesNotGoBackIntoASealedSegment(t *testing.T) {
	g := walTo(begin + mb - 20000)
	g.Append(make([]byte, 60000))
	g.FillTo(begin + mb + 200<<10)
	path := t.TempDir()
	d := open(t, path)
	w := openTail(t, d)
	write(t, w, g, 50000, g.End())
	flush(t, w)
	if err := os.Remove(filepath.Join(path, name(1, 1)+".partial")); err != nil {
		t.Fatal(err)
	}
	w = openTail(t, d)
	if w.Pos() != begin+mb || w.Durable() != begin+mb {
		t.Errorf("goes on at %s, durable up to %s, want both at the segment's start %s", w.Pos(), w.Durable(), begin+mb)
	}
	write(t, w, g, 50000, g.End())
	flush(t, w)
	wantContent(t, path, g, g.End(), g.End())
}

// A record that was given up before the first segment that is not sealed is no reason to receive that one again.
func TestAbandonedRecordInASealedSegmentDoesNotCount(t *testing.T) {
	g := walTo(begin + mb - 20000)
	if _, page := g.Abort(bytes.Repeat([]byte("torn"), 10000), 3); page != begin+mb {
		t.Fatalf("given up at %s, not where the segment ends", page)
	}
	g.FillTo(begin + mb + 200<<10)
	path := t.TempDir()
	d := open(t, path)
	w := openTail(t, d)
	write(t, w, g, 50000, g.End())
	flush(t, w)
	w = openTail(t, d)
	if w.Durable() != g.End() || g.End()-w.Pos() > 2*wal.PageSize {
		t.Errorf("durable %s, goes on at %s, want %s", w.Durable(), w.Pos(), g.End())
	}
}
