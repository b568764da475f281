package verify_test

import (
	"bytes"
	"encoding/binary"
	"encoding/json"
	"flag"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/verify"
	"github.com/walfleet/walfleet/internal/wal"
)

const (
	size     = 1 << 20
	systemID = 7710980023744152150
)

// source is WAL with all that a server writes: short and long records, one over several segments, a switch, a record
// that was given up, padding of every length, and a second timeline.
type source struct {
	one, two *pgtest.WAL
	switched wal.LSN // exclusive end of the switch's record
	given    [2]wal.LSN
	fork     wal.LSN
}

func newSource(id uint64) source {
	var s source
	r := rand.New(rand.NewPCG(1, 2))
	s.one = pgtest.NewWAL(pgtest.WALConfig{SystemID: id})
	fill := func(w *pgtest.WAL, to wal.LSN) {
		for w.End() < to {
			p := make([]byte, r.IntN(400))
			if r.IntN(50) == 0 {
				p = make([]byte, r.IntN(20000))
			}
			for i := range p {
				p[i] = byte(r.Uint32())
			}
			w.Append(p)
		}
	}
	fill(s.one, 2*size-100)             // segment 1
	s.one.Append(make([]byte, 2500000)) // crosses 2, ends in 4
	fill(s.one, 4*size+600<<10)
	s.one.Append([]byte("before the switch"))
	s.switched = s.one.End() + 24
	s.one.Switch() // 5 begins
	fill(s.one, 5*size+300<<10)
	s.given[0], s.given[1] = s.one.Abort(make([]byte, 100000), 5)
	fill(s.one, 6*size+400<<10)
	s.fork = s.one.End()
	s.two = s.one.Fork(s.fork, 2)
	fill(s.one, 6*size+500<<10) // the lost tail
	fill(s.two, 8*size+100<<10)
	return s
}

// archiveOf writes an archive: timeline 1 from segment 1 to 5 sealed and 6 partial, timeline 2 from 6 to 7 sealed and
// 8 partial.
func archiveOf(t testing.TB, s source) (dir string) {
	t.Helper()
	dir = t.TempDir()
	for n := wal.LSN(1); n <= 6; n++ {
		writeSegment(t, dir, s.one, 1, n, n == 6)
	}
	for n := wal.LSN(6); n <= 8; n++ {
		writeSegment(t, dir, s.two, 2, n, n == 8)
	}
	put(t, dir, "00000002.history", fmt.Appendf(nil, "1\t%s\tno recovery target specified\n", s.fork))
	put(t, dir, "archive.json", fmt.Appendf(nil, `{"format": 1, "system_identifier": "%d", "segment_size": %d,
		"origin": {"timeline": 1, "lsn": "0/100000", "source": "slot", "time": "2026-01-31T09:30:00Z"}}`, uint64(systemID), size))
	return dir
}

func name(tli wal.Timeline, n wal.LSN) string {
	return wal.Segment{Timeline: tli, Start: n * size, Size: size}.Name()
}

func writeSegment(t testing.TB, dir string, w *pgtest.WAL, tli wal.Timeline, n wal.LSN, partial bool) {
	t.Helper()
	file := name(tli, n)
	if partial {
		file += ".partial"
	}
	put(t, dir, file, w.Bytes(n*size, (n+1)*size))
}

func put(t testing.TB, dir, file string, data []byte) {
	t.Helper()
	if err := os.WriteFile(filepath.Join(dir, file), data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func get(t testing.TB, dir, file string) []byte {
	t.Helper()
	data, err := os.ReadFile(filepath.Join(dir, file))
	if err != nil {
		t.Fatal(err)
	}
	return data
}

func move(t testing.TB, dir, from, to string) {
	t.Helper()
	if err := os.Rename(filepath.Join(dir, from), filepath.Join(dir, to)); err != nil {
		t.Fatal(err)
	}
}

func remove(t testing.TB, dir, file string) {
	t.Helper()
	if err := os.Remove(filepath.Join(dir, file)); err != nil {
		t.Fatal(err)
	}
}

// compress replaces a segment by a compressed one.
func compress(t testing.TB, dir, file, suffix string) {
	t.Helper()
	data := get(t, dir, file)
	put(t, dir, file+suffix, compressed(t, data, suffix))
	remove(t, dir, file)
}

func compressed(t testing.TB, data []byte, suffix string) []byte {
	t.Helper()
	var b bytes.Buffer
	var w interface {
		Write([]byte) (int, error)
		Close() error
	}
	switch suffix {
	case ".gz":
		w = gzip.NewWriter(&b)
	case ".lz4":
		z := lz4.NewWriter(&b)
		if err := z.Apply(lz4.ChecksumOption(true), lz4.BlockSizeOption(lz4.Block64Kb)); err != nil {
			t.Fatal(err)
		}
		w = z
	case ".zst":
		z, err := zstd.NewWriter(&b, zstd.WithEncoderCRC(true))
		if err != nil {
			t.Fatal(err)
		}
		w = z
	}
	if _, err := w.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func run(t testing.TB, dir string, o verify.Options) verify.Report {
	t.Helper()
	o.Jobs = 2
	r, err := verify.Run(t.Context(), dir, o)
	if err != nil {
		t.Fatal(err)
	}
	return r
}

// found is the faults as text, one a line.
func found(r verify.Report) string {
	var b strings.Builder
	for _, f := range r.Faults {
		fmt.Fprintf(&b, "%s %s %d %s-%s: %s\n", f.Kind, f.File, f.Offset, f.LSN, f.End, f.Text)
		if f.Hint == "" || f.Text == "" {
			fmt.Fprintf(&b, "this one has no hint, or no text\n")
		}
	}
	return b.String()
}

// An archive without a fault is whole, whatever it is compressed with, and the report tells what it has.
func TestWhole(t *testing.T) {
	s := newSource(systemID)
	for _, suffix := range []string{"", ".gz", ".lz4", ".zst"} {
		t.Run("compressed"+suffix, func(t *testing.T) {
			dir := archiveOf(t, s)
			if suffix != "" {
				for _, file := range []string{name(1, 1), name(1, 2), name(1, 4), name(2, 6), name(2, 7)} {
					compress(t, dir, file, suffix)
				}
			}
			r := run(t, dir, verify.Options{})
			if !r.Whole || len(r.Faults) > 0 {
				t.Errorf("whole is %t, faults:\n%s", r.Whole, found(r))
			}
			if r.Segments != 7 || r.Bytes != 7*size {
				t.Errorf("%d segments, %d bytes", r.Segments, r.Bytes)
			}
			// The two records that no checksum vouches for, the given up one in every segment that has it.
			if len(r.Unproven) != 1 || r.Unproven[0].LSN != s.given[0].String() || r.Unproven[0].End != s.given[1].String() || r.Unproven[0].File != name(1, 5) {
				t.Errorf("unproven: %+v", r.Unproven)
			}
			want := []verify.PartialFile{{File: name(1, 6) + ".partial", End: s.one.End().String()}, {File: name(2, 8) + ".partial", End: s.two.End().String()}}
			if !slices.Equal(r.Partial, want) {
				t.Errorf("partial: %v, want %v", r.Partial, want)
			}
		})
	}
}

// damage is one way to spoil an archive, and the faults that must come of it, each as "KIND FILE LSN".
type damage struct {
	name string
	do   func(t *testing.T, dir string, s source)
	want []string
}

func flip(t testing.TB, dir, file string, offset int64, mask byte) {
	t.Helper()
	data := get(t, dir, file)
	data[offset] ^= mask
	put(t, dir, file, data)
}

// flipped flips a bit of a segment.
func flipped(tli wal.Timeline, n wal.LSN, offset int64, mask byte) func(*testing.T, string, source) {
	return func(t *testing.T, dir string, _ source) { flip(t, dir, name(tli, n), offset, mask) }
}

func at(tli wal.Timeline, n wal.LSN, kind string, offset int) string {
	return fmt.Sprintf("%s %s %s", kind, name(tli, n), n*size+wal.LSN(offset))
}

func TestDamage(t *testing.T) {
	s := newSource(systemID)
	starts, ends := boundaries(s.one)
	// The second whole record behind the first page of segment 1.
	i, _ := slices.BinarySearch(starts, size+wal.PageSize)
	for starts[i]%wal.PageSize > 7000 || len(s.one.Bytes(starts[i], ends[i])) > 400 || padding(s, starts[i], ends[i]) == 0 {
		i++
	}
	record, padded := int64(starts[i]-size), int64(ends[i]-1-size)
	in := func(offset int64) func(*testing.T, string, source) { return flipped(1, 1, offset, 0x04) }
	page := int64(3 * wal.PageSize)
	rec := at(1, 1, "record", int(record))
	pag := at(1, 1, "page", int(page))
	sum := at(1, 1, "checksum", int(record))

	tests := []damage{
		{"magic", in(page), []string{pag}},
		{"magic, version", flipped(1, 1, page, 0x01), []string{pag}},
		{"magic, high", in(page + 1), []string{pag}},
		{"unknown flag", in(page + 3), []string{pag}},
		{"contrecord flag", flipped(1, 1, page+2, 0x01), []string{pag}},
		{"long header flag", flipped(1, 1, page+2, 0x02), []string{pag}},
		{"overwrite flag", flipped(1, 1, page+2, 0x08), []string{pag}},
		{"timeline", in(page + 4), []string{at(1, 1, "timeline", int(page))}},
		{"address", in(page + 9), []string{pag}},
		{"rest", in(page + 16), []string{pag}},
		{"header padding", in(page + 21), []string{at(1, 1, "zeros", int(page))}},
		{"system identifier", in(24), []string{at(1, 1, "identity", 0)}},
		{"segment size", in(33), []string{at(1, 1, "identity", 0)}},
		{"page size", in(37), []string{at(1, 1, "identity", 0)}},
		{"length", in(record), nil}, // any of two
		{"xid", in(record + 4), []string{sum}},
		{"prev", in(record + 8), []string{rec}},
		{"info", in(record + 16), []string{sum}},
		{"resource manager", in(record + 17), []string{sum}},
		{"record header padding", in(record + 18), []string{sum}},
		{"crc", in(record + 20), []string{sum}},
		{"data", in(record + 24), []string{sum}},
		{"padding", in(padded), []string{at(1, 1, "zeros", int(padded))}},
		{"after the switch", flipped(1, 4, int64(s.switched-4*size)+5000, 1), []string{at(1, 4, "zeros", int(s.switched-4*size)+5000)}},
		{"a page after the switch", flipped(1, 4, size-1, 1), []string{at(1, 4, "zeros", size-1)}},
		{"in a record that crosses", flipped(1, 3, size/2+100, 1), []string{"checksum " + name(1, 1) + " " + crossing(s).String()}},
		{"page of a record that crosses", flipped(1, 3, size/2+16, 1), []string{at(1, 3, "page", size/2)}},
		{"first page of the next", flipped(1, 2, 16, 1), []string{at(1, 2, "page", 0), at(1, 2, "page", wal.PageSize)}},
		{"flag of the page that gives a record up", func(t *testing.T, dir string, s source) {
			flip(t, dir, name(1, 5), int64(s.given[1]-5*size)+2, 0x08)
		}, []string{at(1, 5, "page", int(s.given[1]-5*size))}},
		{"zero page", func(t *testing.T, dir string, _ source) {
			data := get(t, dir, name(1, 1))
			clear(data[page : page+wal.PageSize])
			put(t, dir, name(1, 1), data)
		}, []string{pag}},
		{"zeros", func(t *testing.T, dir string, _ source) { put(t, dir, name(1, 5), make([]byte, size)) }, []string{at(1, 5, "page", 0)}},
		{"another timeline's after the fork", func(t *testing.T, dir string, s source) {
			put(t, dir, name(2, 6), s.one.Bytes(6*size, 7*size))
		}, nil},

		{"truncated", func(t *testing.T, dir string, _ source) { truncate(t, dir, name(1, 5), 500000) }, []string{at(1, 5, "size", 500000)}},
		{"empty", func(t *testing.T, dir string, _ source) { truncate(t, dir, name(1, 5), 0) }, []string{at(1, 5, "size", 0)}},
		{"longer", func(t *testing.T, dir string, _ source) { truncate(t, dir, name(1, 5), size+1) }, []string{at(1, 5, "size", 0)}},
		{"swapped", func(t *testing.T, dir string, _ source) {
			move(t, dir, name(1, 4), "x")
			move(t, dir, name(1, 5), name(1, 4))
			move(t, dir, "x", name(1, 5))
		}, []string{at(1, 4, "page", 0), at(1, 5, "page", 0)}},
		{"missing", func(t *testing.T, dir string, _ source) { remove(t, dir, name(1, 4)) }, []string{at(1, 4, "missing", 0)}},
		{"two missing", func(t *testing.T, dir string, _ source) { remove(t, dir, name(1, 4)); remove(t, dir, name(1, 5)) },
			[]string{at(1, 4, "missing", 0)}},
		{"renamed", func(t *testing.T, dir string, _ source) { move(t, dir, name(1, 3), name(1, 20)) },
			[]string{at(1, 3, "missing", 0), "partial " + name(1, 6) + ".partial 0/600000", "missing " + name(1, 7) + " 0/700000", at(1, 20, "page", 0)}},
		{"first one of a timeline missing", func(t *testing.T, dir string, _ source) { remove(t, dir, name(2, 6)) },
			[]string{at(2, 6, "missing", 0)}},
		{"history missing", func(t *testing.T, dir string, _ source) { remove(t, dir, "00000002.history") },
			[]string{"history 00000002.history 0/600000"}},
		{"history of an ancestor without WAL missing", func(t *testing.T, dir string, s source) {
			put(t, dir, "00000004.history", fmt.Appendf(nil, "1\t%s\n2\t0/900000\n3\t0/900000\n", s.fork))
		}, []string{"history 00000003.history 0/900000"}},
		{"history is text", func(t *testing.T, dir string, _ source) { put(t, dir, "00000002.history", []byte("hello")) },
			[]string{"history 00000002.history "}},
		{"history with another fork", func(t *testing.T, dir string, s source) {
			put(t, dir, "00000002.history", fmt.Appendf(nil, "1\t%s\n", s.fork-8))
		}, []string{"history 00000002.history " + (s.fork - 8).String()}},
		{"histories that contradict", func(t *testing.T, dir string, s source) {
			put(t, dir, "00000003.history", fmt.Appendf(nil, "1\t%s\n2\t0/900000\n", s.fork+8))
		}, []string{"history 00000003.history 0/900000"}},
		{"of before its timeline", func(t *testing.T, dir string, _ source) { put(t, dir, name(2, 5), get(t, dir, name(1, 5))) },
			[]string{at(2, 5, "timeline", 0)}},
		{"old timeline differs", func(t *testing.T, dir string, _ source) { flip(t, dir, name(1, 6)+".partial", 70000, 1) },
			[]string{"timeline " + name(1, 6) + ".partial " + wal.LSN(6*size+70000).String()}},
		{"another cluster's", func(t *testing.T, dir string, _ source) {
			put(t, dir, name(1, 5), newSource(1).one.Bytes(5*size, 6*size))
		}, []string{at(1, 5, "identity", 0)}},
		{"another cluster's partial", func(t *testing.T, dir string, _ source) {
			put(t, dir, name(2, 8)+".partial", newSource(1).two.Bytes(8*size, 9*size))
		}, []string{"identity " + name(2, 8) + ".partial 0/800000"}},
		{"partial left behind", func(t *testing.T, dir string, _ source) { move(t, dir, name(1, 4), name(1, 4)+".partial") },
			[]string{"partial " + name(1, 4) + ".partial 0/400000"}},
		{"strange file", func(t *testing.T, dir string, _ source) { put(t, dir, "core", nil) }, []string{"name core "}},
		{"strange names", func(t *testing.T, dir string, _ source) {
			put(t, dir, strings.ToLower(name(1, 10)), nil)
			put(t, dir, name(1, 5)+".bak", nil)
			if err := os.Mkdir(filepath.Join(dir, name(1, 11)), 0o700); err != nil {
				t.Fatal(err)
			}
		}, []string{"name " + name(1, 5) + ".bak ", "name " + name(1, 11) + " ", "name " + strings.ToLower(name(1, 10)) + " "}},
		{"two files that differ", func(t *testing.T, dir string, s source) {
			data := s.one.Bytes(5*size, 6*size)
			data[100000] ^= 1
			put(t, dir, name(1, 5)+".gz", compressed(t, data, ".gz"))
		}, []string{"duplicate " + name(1, 5) + ".gz " + wal.LSN(5*size+100000).String()}},
		{"archive.json missing", func(t *testing.T, dir string, _ source) { remove(t, dir, "archive.json") }, []string{"metadata archive.json "}},
		{"archive.json broken", func(t *testing.T, dir string, _ source) { put(t, dir, "archive.json", []byte("{")) }, []string{"metadata archive.json "}},
		{"gap where there is none", func(t *testing.T, dir string, _ source) { addGap(t, dir, 1, "0/310000", "0/500000") },
			[]string{at(1, 3, "gap", 0), at(1, 4, "gap", 0)}},
		{"more is missing than the gap", func(t *testing.T, dir string, _ source) {
			addGap(t, dir, 1, "0/410000", "0/500000")
			remove(t, dir, name(1, 4))
			remove(t, dir, name(1, 3))
		}, []string{at(1, 3, "missing", 0)}},
		{"aborted file", func(t *testing.T, dir string, _ source) {
			m := meta(t, dir)
			m["aborted"] = []any{map[string]any{"timeline": 2, "lsn": "0/610000", "end": "0/612000", "file": name(2, 6) + ".00010000.aborted", "time": time.Now()}}
			setMeta(t, dir, m)
			put(t, dir, name(2, 6)+".00010000.aborted", make([]byte, 8000))
		}, []string{"aside " + name(2, 6) + ".00010000.aborted 0/610000"}},
	}
	for _, suffix := range []string{".gz", ".lz4", ".zst"} {
		file := name(1, 5)
		spoil := func(how func([]byte) []byte) func(*testing.T, string, source) {
			return func(t *testing.T, dir string, _ source) {
				compress(t, dir, file, suffix)
				put(t, dir, file+suffix, how(get(t, dir, file+suffix)))
			}
		}
		compressedAt := "compressed " + file + suffix
		tests = append(tests,
			damage{"garbage after" + suffix, spoil(func(b []byte) []byte { return append(b, "garbage"...) }), []string{compressedAt}},
			damage{"short" + suffix, spoil(func(b []byte) []byte { return b[:len(b)-1] }), []string{compressedAt}},
			damage{"half" + suffix, spoil(func(b []byte) []byte { return b[:len(b)/2] }), []string{compressedAt}},
			damage{"checksum" + suffix, spoil(func(b []byte) []byte { b[len(b)-5-btoi(suffix != ".gz")*-2] ^= 1; return b }), nil},
			damage{"beginning" + suffix, spoil(func(b []byte) []byte { b[0] ^= 1; return b }), []string{compressedAt}},
			damage{"empty" + suffix, spoil(func([]byte) []byte { return nil }), nil},
			damage{"another's" + suffix, spoil(func([]byte) []byte { return compressed(t, make([]byte, 1000), suffix) }), nil},
		)
	}
	for _, d := range tests {
		t.Run(d.name, func(t *testing.T) {
			dir := archiveOf(t, s)
			d.do(t, dir, s)
			r := run(t, dir, verify.Options{})
			if r.Whole || len(r.Faults) == 0 {
				t.Fatal("the damage was not found")
			}
			var got []string
			for _, f := range r.Faults {
				got = append(got, strings.TrimSuffix(fmt.Sprintf("%s %s %s", f.Kind, f.File, f.LSN), "\x00"))
				if !strings.HasPrefix(f.File, "0") {
					continue
				}
				if l, err := wal.ParseLSN(f.LSN); err == nil && f.Kind != verify.History && f.Kind != verify.Aside && f.Offset < size && f.Offset != int64(l%size) {
					t.Errorf("offset %d of %s", f.Offset, f.LSN)
				}
			}
			for i, w := range d.want {
				if len(got) != len(d.want) || !strings.HasPrefix(got[i], w) {
					t.Errorf("found:\n%swant: %q", found(r), d.want)
					break
				}
			}
			if d.want == nil && len(r.Faults) > 2 {
				t.Errorf("found:\n%s", found(r))
			}
		})
	}
}

func btoi(b bool) int {
	if b {
		return 1
	}
	return 0
}

func truncate(t testing.TB, dir, file string, n int64) {
	t.Helper()
	if err := os.Truncate(filepath.Join(dir, file), n); err != nil {
		t.Fatal(err)
	}
}

func meta(t testing.TB, dir string) (m map[string]any) {
	t.Helper()
	if err := json.Unmarshal(get(t, dir, "archive.json"), &m); err != nil {
		t.Fatal(err)
	}
	return m
}

func setMeta(t testing.TB, dir string, m map[string]any) {
	t.Helper()
	data, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	put(t, dir, "archive.json", data)
}

func addGap(t testing.TB, dir string, tli int, from, to string) {
	t.Helper()
	m := meta(t, dir)
	m["gaps"] = []any{map[string]any{"timeline": tli, "from": from, "to": to, "time": time.Now(), "reason": "removed"}}
	setMeta(t, dir, m)
}

// boundaries are the starts and ends of the records of w that are on one page each.
func boundaries(w *pgtest.WAL) (starts, ends []wal.LSN) {
	all := w.Boundaries()
	for i, end := range all[1:] {
		if start := all[i]; start%wal.PageSize != 0 && start/wal.PageSize == (end-1)/wal.PageSize {
			starts, ends = append(starts, start), append(ends, end)
		}
	}
	return starts, ends
}

// padding is how many bytes of it a record has.
func padding(s source, start, end wal.LSN) int {
	return int(end-start) - int(binary.LittleEndian.Uint32(s.one.Bytes(start, start+4)))
}

// crossing is the start of the record that goes on from segment 1 into the ones after it.
func crossing(s source) wal.LSN {
	all := s.one.Boundaries()
	i, _ := slices.BinarySearch(all, 2*size)
	return all[i-1]
}

var seed = flag.Uint64("seed", 0, "of the sweep; 0: a random one")

// Every bit that is flipped anywhere in the archive's WAL is found, unless servers guarantee nothing about it: the
// flag XLP_BKP_REMOVABLE, a record that was given up, and a partial file. What is found begins where the bit is, or
// at the record or page that it is in.
func TestEveryFlippedBitIsFound(t *testing.T) {
	if *seed == 0 {
		*seed = rand.Uint64()
	}
	t.Logf("-seed=%d", *seed)
	r := rand.New(rand.NewPCG(*seed, 0))
	s := newSource(systemID)
	dir := archiveOf(t, s)
	var files []string
	for n := wal.LSN(1); n <= 5; n++ {
		files = append(files, name(1, n))
	}
	files = append(files, name(2, 6), name(2, 7))
	rounds := 400
	if testing.Short() {
		rounds = 50
	}
	for range rounds {
		file := files[r.IntN(len(files))]
		offset := r.IntN(size)
		if r.IntN(2) == 0 { // headers of pages are rare
			offset = offset/wal.PageSize*wal.PageSize + r.IntN(64)
		}
		bit := byte(1) << r.IntN(8)
		segment, _ := wal.ParseSegment(file, size)
		lsn := segment.Start + wal.LSN(offset)
		flip(t, dir, file, int64(offset), bit)
		report := run(t, dir, verify.Options{})
		flip(t, dir, file, int64(offset), bit)
		var free bool
		if offset%wal.PageSize == 2 && bit == 0x04 {
			free = true // XLP_BKP_REMOVABLE
		}
		if lsn >= s.given[0] && lsn < s.given[1] && lsn%wal.PageSize >= 24 {
			free = true
		}
		if free {
			continue
		}
		if len(report.Faults) == 0 {
			t.Errorf("bit %02X at offset %d of %s (%s) was not found", bit, offset, file, lsn)
			continue
		}
		first, err := wal.ParseLSN(report.Faults[0].LSN)
		if err != nil || first > lsn && first-lsn > wal.PageSize {
			t.Errorf("bit %02X at %s was found as:\n%s", bit, lsn, found(report))
		}
	}
	if r := run(t, dir, verify.Options{}); !r.Whole {
		t.Errorf("the archive is not whole afterwards:\n%s", found(r))
	}
}
