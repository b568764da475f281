package restore_test

import (
	"bytes"
	"compress/gzip"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
	"golang.org/x/sync/errgroup"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/restore"
	"github.com/walfleet/walfleet/internal/wal"
)

const (
	mb       = 1 << 20
	systemID = 7710980023744152150
	begin    = wal.LSN(mb) // of all WAL here
)

// place is an archive and a server's data directory beside it.
type place struct {
	t             testing.TB
	archive, data string
}

func newPlace(t testing.TB) place {
	t.Helper()
	p := place{t, filepath.Join(t.TempDir(), "orders"), filepath.Join(t.TempDir(), "data")}
	for _, dir := range []string{p.archive, filepath.Join(p.data, "pg_wal"), filepath.Join(p.data, "global")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	p.write(filepath.Join(p.data, "global", "pg_control"), binary.LittleEndian.AppendUint64(nil, systemID))
	d, err := archive.Open(p.archive)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	err = d.Bind(archive.Identity{SystemID: systemID, SegmentSize: mb}, archive.Origin{Timeline: 1, LSN: begin, Source: "slot", Time: time.Now()})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func (p place) write(path string, data []byte) {
	p.t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		p.t.Fatal(err)
	}
}

// path is %p for a segment.
func (p place) path() string { return filepath.Join(p.data, "pg_wal", "RECOVERYXLOG") }

// own is a file of the server's pg_wal.
func (p place) own(name string) string { return filepath.Join(p.data, "pg_wal", name) }

// store puts segment n of w (0 is the first) into the archive, up to its end or that of the WAL, under its name with a
// suffix, by which it is compressed.
func (p place) store(w *pgtest.WAL, tli wal.Timeline, n int, suffix string) string {
	p.t.Helper()
	file := filepath.Join(p.archive, name(tli, n)+suffix)
	p.write(file, compress(p.t, bytesOf(w, n), strings.TrimSuffix(suffix, ".partial")))
	return file
}

func name(tli wal.Timeline, n int) string {
	return wal.SegmentSize(mb).Segment(tli, begin+wal.LSN(n)*mb).Name()
}

func bytesOf(w *pgtest.WAL, n int) []byte {
	return w.Bytes(begin+wal.LSN(n)*mb, begin+wal.LSN(n+1)*mb)
}

func compress(t testing.TB, data []byte, suffix string) []byte {
	t.Helper()
	var b bytes.Buffer
	var z io.WriteCloser
	switch suffix {
	case "":
		return data
	case ".gz":
		z = gzip.NewWriter(&b)
	case ".lz4":
		l := lz4.NewWriter(&b)
		if err := l.Apply(lz4.ChecksumOption(true)); err != nil {
			t.Fatal(err)
		}
		z = l
	case ".zst":
		var err error
		if z, err = zstd.NewWriter(&b); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := z.Write(data); err != nil {
		t.Fatal(err)
	}
	if err := z.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

// run restores a file as a server would, and returns what it gets; nil: nothing.
func (p place) run(name string, change func(*restore.Request)) ([]byte, error) {
	p.t.Helper()
	before := listing(p.t, p.archive)
	r := restore.Request{Archive: p.archive, Name: name, Path: p.path()}
	if change != nil {
		change(&r)
	}
	os.Remove(p.path())
	err := restore.Run(p.t.Context(), r)
	if after := listing(p.t, p.archive); after != before {
		p.t.Errorf("restoring %s changed the archive from\n%sto\n%s", name, before, after)
	}
	data, readErr := os.ReadFile(p.path())
	if (err == nil) != (readErr == nil) {
		p.t.Errorf("restoring %s: %v, and reading it then: %v", name, err, readErr)
	}
	if left, _ := filepath.Glob(p.own("pgsql_tmp*RECOVERY*")); len(left) > 0 {
		p.t.Errorf("restoring %s left %s", name, left)
	}
	return data, err
}

func listing(t testing.TB, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&b, e.Name(), info.Size(), info.ModTime())
	}
	return b.String()
}

func notFound(err error) bool { return errors.As(err, new(*restore.NotFoundError)) }

// load is n segments of WAL, with records that cross their ends, and the last one a bit short of its end.
func load(n int) *pgtest.WAL {
	w := pgtest.NewWAL(pgtest.WALConfig{SystemID: systemID})
	extend(w, n)
	return w
}

func extend(w *pgtest.WAL, n int) {
	for i := 0; w.End() < begin+wal.LSN(n)*mb-20000; i++ {
		w.Append(bytes.Repeat([]byte{byte(i)}, 100+i*7919%9000))
	}
}

// full is n segments and the beginning of the next one.
func full(n int) *pgtest.WAL {
	w := load(n)
	w.Append(make([]byte, 50000))
	w.Append([]byte("behind"))
	return w
}

func TestRestoresWhatIsThere(t *testing.T) {
	w := full(4)
	w.Switch()
	w.Append([]byte("in the next segment"))
	p := newPlace(t)
	for n, suffix := range []string{"", ".gz", ".lz4", ".zst", ""} { // the last one is zeros after a switch
		p.store(w, 1, n, suffix)
	}
	history := []byte("1\t0/200000\tno recovery target specified\n")
	p.write(filepath.Join(p.archive, "00000002.history"), history)
	for n := range 5 {
		if data, err := p.run(name(1, n), nil); err != nil || !bytes.Equal(data, bytesOf(w, n)) {
			t.Errorf("segment %d: %d bytes, %v", n, len(data), err)
		}
	}
	if data, err := p.run("00000002.history", nil); err != nil || !bytes.Equal(data, history) {
		t.Errorf("history: %q, %v", data, err)
	}
	for _, name := range []string{name(1, 5), name(2, 0), name(2, 4), name(3, 3), "00000003.history", "00000001.history",
		name(1, 0) + ".00000028.backup", name(1, 5) + ".partial"} {
		if _, err := p.run(name, nil); !notFound(err) {
			t.Errorf("%s, which is not there: %v", name, err)
		}
	}
}

// What ends recovery without need, when it is taken for the end of all WAL, is an error; what is the end, or another
// timeline's business, is none.
func TestTellsTheEndFromAHole(t *testing.T) {
	w := full(6)
	at := w.Boundaries()[slices.IndexFunc(w.Boundaries(), func(l wal.LSN) bool { return l > begin+3*mb+mb/2 })] // in segment 3
	young := w.Fork(at, 2)
	extend(young, 6)
	young.Append(make([]byte, 50000))
	history := fmt.Sprintf("1\t%s\tno recovery target specified\n", at)

	promoted := func(p place) {
		p.write(filepath.Join(p.archive, "00000002.history"), []byte(history))
		for _, n := range []int{0, 1, 2} {
			p.store(w, 1, n, ".zst")
		}
		p.store(w, 1, 3, ".partial")
		p.store(young, 2, 3, "")
		p.store(young, 2, 4, "")
	}
	remove := func(p place, file string) {
		if err := os.Remove(filepath.Join(p.archive, file)); err != nil {
			t.Fatal(err)
		}
	}
	hole := func(p place) {
		for _, n := range []int{0, 1, 3, 4} {
			p.store(w, 1, n, "")
		}
	}
	for _, tt := range []struct {
		what  string
		setUp func(p place)
		name  string
		says  string // "": not in the archive
	}{
		{"the end", func(p place) { p.store(w, 1, 0, "") }, name(1, 1), ""},
		{"an archive without segments", func(place) {}, name(1, 1), ""},
		{"a hole", hole, name(1, 2), "which has " + name(1, 3)},
		{"a hole that a partial file is in", func(p place) { hole(p); p.store(w, 1, 2, ".partial") }, name(1, 2), "which has " + name(1, 3)},
		{"a hole that the server fills", func(p place) { hole(p); p.write(p.own(name(1, 2)), bytesOf(w, 2)) }, name(1, 2), ""},
		{"a hole that the server does not fill", func(p place) {
			hole(p)
			p.write(p.own(name(1, 2)), append(bytesOf(w, 2)[:mb/2], make([]byte, mb/2)...))
		}, name(1, 2), "which has"},
		{"a hole and a recycled segment", func(p place) { hole(p); p.write(p.own(name(1, 2)), bytesOf(w, 1)) }, name(1, 2), "which has"},
		{"before the archive", func(p place) { p.store(w, 1, 3, "") }, name(1, 1), "base backup is too old"},
		{"before the archive, with a backup that has it", func(p place) {
			p.store(w, 1, 3, "")
			p.write(p.own(name(1, 1)), bytesOf(w, 1))
		}, name(1, 1), ""},

		{"before what was pruned, of which some is left", func(p place) {
			p.store(w, 1, 0, "")
			p.store(w, 1, 3, "")
			meta, err := os.ReadFile(filepath.Join(p.archive, "archive.json"))
			if err != nil {
				t.Fatal(err)
			}
			p.write(filepath.Join(p.archive, "archive.json"), bytes.Replace(meta, []byte("{"),
				fmt.Appendf(nil, `{"pruned": {"lsn": "%s", "time": "2026-01-31T09:30:00Z"},`, begin+3*mb), 1))
		}, name(1, 1), "was pruned up to"},

		{"the newest timeline is asked first", promoted, name(2, 2), ""},
		{"so is its next one", promoted, name(3, 2), ""},
		{"the end of an old timeline", promoted, name(1, 3), ""},
		{"behind the end of an old timeline", promoted, name(1, 4), ""},
		{"a hole in an ancestor", func(p place) { promoted(p); remove(p, name(1, 2)+".zst") }, name(1, 2), "which has " + name(2, 3)},
		{"a hole where a timeline begins", func(p place) { promoted(p); remove(p, name(2, 3)) }, name(2, 3), "which has " + name(2, 4)},
		{"the end of a young timeline", promoted, name(2, 5), ""},
		{"a history that is lost", func(p place) { promoted(p); remove(p, "00000002.history") }, "00000002.history", "lost its history"},
		{"a history that the server has", func(p place) {
			promoted(p)
			remove(p, "00000002.history")
			p.write(p.own("00000002.history"), []byte(history))
		}, "00000002.history", ""},
		{"a history that makes no sense", func(p place) { p.write(filepath.Join(p.archive, "00000002.history"), []byte("2\n")) }, "00000002.history", "00000002.history"},
		{"a history of no timeline", promoted, "00000003.history", ""},

		{"arguments that changed places", promoted, "pg_wal/RECOVERYXLOG", "needs this cluster's archive, %f, and %p"},
		{"segments of another size", promoted, "000000010000000000001000", "no name of a history, or of a segment of 1 MB"},
		{"another cluster's server", func(p place) {
			promoted(p)
			p.write(filepath.Join(p.data, "global", "pg_control"), []byte("12345678"))
		}, name(1, 0), "correct the restore_command"},
		{"an archive that is not mounted", func(p place) { remove(p, "archive.json") }, name(1, 0), "not mounted"},
		{"an archive.json that makes no sense", func(p place) { p.write(filepath.Join(p.archive, "archive.json"), []byte("{")) }, name(1, 0), "is damaged"},
	} {
		t.Run(tt.what, func(t *testing.T) {
			p := newPlace(t)
			tt.setUp(p)
			_, err := p.run(tt.name, nil)
			if tt.says == "" && !notFound(err) || tt.says != "" && (err == nil || notFound(err) || !strings.Contains(err.Error(), tt.says)) {
				t.Errorf("%v, want an error that says %q", err, tt.says)
			}
		})
	}
}

func TestTellsWhereThePathIsWrong(t *testing.T) {
	w := full(1)
	p := newPlace(t)
	file := p.store(w, 1, 0, "")
	for _, path := range []string{filepath.Join(p.archive, "x"), file, filepath.Join(p.data, "nowhere", "x")} {
		err := restore.Run(t.Context(), restore.Request{Archive: p.archive, Name: name(1, 0), Path: path})
		if err == nil || notFound(err) {
			t.Errorf("restoring to %s: %v", path, err)
		}
	}
	if _, err := p.run(name(1, 0), func(r *restore.Request) { r.Archive += ".elsewhere" }); err == nil || notFound(err) {
		t.Errorf("from nowhere: %v", err)
	}
}

func TestNeverServesAcrossAGap(t *testing.T) {
	w := full(8)
	p := newPlace(t)
	for _, n := range []int{0, 1, 5, 6} {
		p.store(w, 1, n, "")
	}
	p.store(w, 1, 2, ".partial")
	d, err := archive.Open(p.archive)
	if err != nil {
		t.Fatal(err)
	}
	gap := archive.Gap{Timeline: 1, From: begin + 2*mb + mb/2, To: begin + 5*mb, Time: time.Now()}
	if err := errors.Join(d.RecordGap(gap), d.Close()); err != nil {
		t.Fatal(err)
	}
	partial := func(r *restore.Request) { r.Partial = true }
	for n, found := range []bool{0: true, 1: true, 2: false, 3: false, 4: false, 5: true, 6: true} {
		data, err := p.run(name(1, n), partial)
		if found && (err != nil || !bytes.Equal(data, bytesOf(w, n))) {
			t.Errorf("segment %d, outside of the gap: %v", n, err)
		}
		if !found && (err == nil || notFound(err) || !strings.Contains(err.Error(), "from "+gap.From.String()+" to "+gap.To.String())) {
			t.Errorf("segment %d, in the gap: %v", n, err)
		}
	}
	p.store(w, 1, 4, "") // somebody's, of whom the archive knows nothing
	if _, err := p.run(name(1, 4), nil); err == nil || notFound(err) {
		t.Errorf("a segment in the gap: %v", err)
	}
	p.write(p.own(name(1, 3)), bytesOf(w, 3))
	if _, err := p.run(name(1, 3), nil); !notFound(err) {
		t.Errorf("a segment in the gap that the server has: %v", err)
	}
}

func TestRefusesDamage(t *testing.T) {
	w := full(3)
	other := pgtest.NewWAL(pgtest.WALConfig{SystemID: systemID + 1})
	extend(other, 2)
	other.Append(make([]byte, 50000))
	young := w.Fork(w.Boundaries()[3], 2)
	extend(young, 2)
	young.Append(make([]byte, 50000))
	good := bytesOf(w, 1)
	change := func(at int, b ...byte) []byte {
		data := bytes.Clone(good)
		copy(data[at:], b)
		return data
	}
	header := 8192*40 + 8 // a page's address
	for what, data := range map[string][]byte{
		"cut short":               good[:mb-8192],
		"empty":                   nil,
		"too long":                append(bytes.Clone(good), 0),
		"another segment":         bytesOf(w, 0),
		"another cluster's":       bytesOf(other, 1),
		"a later timeline's":      bytesOf(young, 1),
		"with another's page":     change(header, 1, 2, 3),
		"with a page of zeros":    change(8192*40, make([]byte, 8192)...),
		"with zeros at its end":   change(mb/2, make([]byte, mb/2)...),
		"with a bit of a record":  change(mb/2+123, good[mb/2+123]^1),
		"with a record too short": change(8192*40+24+int(binary.LittleEndian.Uint32(good[8192*40+16:])+7)&^7, 1, 0, 0, 0),
	} {
		for _, suffix := range []string{"", ".zst"} {
			p := newPlace(t)
			p.write(filepath.Join(p.archive, name(1, 1)+suffix), compress(t, data, suffix))
			if _, err := p.run(name(1, 1), nil); err == nil || notFound(err) || !strings.Contains(err.Error(), name(1, 1)+suffix+" in the archive is damaged") {
				t.Errorf("a segment%s that is %s: %v", suffix, what, err)
			}
		}
	}
	for _, suffix := range []string{".gz", ".lz4", ".zst"} {
		whole := compress(t, good, suffix)
		flipped := bytes.Clone(whole)
		flipped[len(flipped)/2] ^= 0x10
		for what, data := range map[string][]byte{
			"ends early":              whole[:len(whole)/2],
			"lacks its end":           whole[:len(whole)-1],
			"has garbage behind it":   append(bytes.Clone(whole), "garbage"...),
			"has zeros behind it":     append(bytes.Clone(whole), 0, 0, 0, 0, 0, 0, 0, 0),
			"is there twice":          append(bytes.Clone(whole), whole...),
			"has a bit that changed":  flipped,
			"is not compressed":       good,
			"has nothing in it":       nil,
			"is a directory's length": make([]byte, 4096),
		} {
			p := newPlace(t)
			p.write(filepath.Join(p.archive, name(1, 1)+suffix), data)
			if _, err := p.run(name(1, 1), nil); err == nil || notFound(err) || !strings.Contains(err.Error(), name(1, 1)+suffix) {
				t.Errorf("a %s file that %s: %v", suffix, what, err)
			}
		}
	}
}

// Runs at the same time, to the same place, as a server never does: the place has one whole segment at any time.
func TestRunsAtTheSameTime(t *testing.T) {
	w := full(4)
	p := newPlace(t)
	for n := range 4 {
		p.store(w, 1, n, []string{"", ".gz", ".lz4", ".zst"}[n])
	}
	whole := func() bool {
		data, err := os.ReadFile(p.path())
		return errors.Is(err, fs.ErrNotExist) || slices.ContainsFunc([]int{0, 1, 2, 3}, func(n int) bool { return bytes.Equal(data, bytesOf(w, n)) })
	}
	var g errgroup.Group
	for n := range 4 {
		g.Go(func() error {
			for range 10 {
				if err := restore.Run(t.Context(), restore.Request{Archive: p.archive, Name: name(1, n), Path: p.path()}); err != nil {
					return err
				}
				if !whole() {
					return errors.New("half a segment")
				}
			}
			return nil
		})
	}
	if err := g.Wait(); err != nil {
		t.Error(err)
	}
	if left, _ := filepath.Glob(p.own("pgsql_tmp*")); len(left) > 0 {
		t.Errorf("left: %s", left)
	}
}

// A server that looks for the latest timeline looks no further than one without a history.
func TestHistoryOfAnAncestorIsMissed(t *testing.T) {
	p := newPlace(t)
	p.store(full(2), 1, 0, "")
	p.write(filepath.Join(p.archive, "00000003.history"), []byte("1\t0/180000\tno recovery target specified\n2\t0/190000\tno recovery target specified\n"))
	if _, err := p.run("00000002.history", nil); err == nil || notFound(err) {
		t.Errorf("an ancestor's history: %v", err)
	}
	if _, err := p.run("00000004.history", nil); !notFound(err) {
		t.Errorf("a history of no timeline: %v", err)
	}
}
