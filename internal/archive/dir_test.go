package archive_test

import (
	"encoding/json"
	"errors"
	"io/fs"
	"maps"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// place puts files into a new directory: a name, or a name and " = " and the content. Segments have their size.
func place(t *testing.T, names ...string) (path string) {
	t.Helper()
	path = t.TempDir()
	for _, n := range names {
		file, content, given := strings.Cut(n, " = ")
		err := os.WriteFile(filepath.Join(path, file), []byte(content), 0o600)
		if _, perr := wal.ParseSegment(strings.TrimSuffix(file, ".partial"), mb); perr == nil && !given {
			err = os.Truncate(filepath.Join(path, file), mb)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	return path
}

func isFileError(err error) bool     { return errors.As(err, new(*archive.FileError)) }
func isIdentityError(err error) bool { return errors.As(err, new(*archive.IdentityError)) }
func isDivergence(err error) bool    { return errors.As(err, new(*archive.DivergenceError)) }

func TestDirectoryHasOneWriter(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a", "b")
	d := open(t, path)
	if _, err := archive.Open(path); !errors.Is(err, archive.ErrLocked) {
		t.Errorf("a second one: %v", err)
	}
	if err := d.Close(); err != nil {
		t.Fatal(err)
	}
	open(t, path)
}

func TestDirectoryThatIsNone(t *testing.T) {
	path := place(t, "file")
	if _, err := archive.Open(filepath.Join(path, "file")); err == nil || !strings.Contains(err.Error(), "not a directory") {
		t.Errorf("a file: %v", err)
	}
	if _, err := archive.Open(filepath.Join(path, "file", "below")); err == nil {
		t.Error("below a file: no error")
	}
}

func TestModesAreThoseOfTheDesign(t *testing.T) {
	defer syscall.Umask(syscall.Umask(0o077))
	for _, group := range []bool{false, true} {
		path := filepath.Join(t.TempDir(), "parent", "blue")
		d := open(t, path)
		d.SetGroupReadable(group)
		if err := d.Bind(identity, archive.Origin{Timeline: 1, LSN: begin}); err != nil {
			t.Fatal(err)
		}
		if _, err := d.StoreHistory(2, []byte("1\t0/5000000\tx\n")); err != nil {
			t.Fatal(err)
		}
		w := openTail(t, d)
		g := walTo(begin + mb + 9000)
		write(t, w, g, 100000, g.End())
		flush(t, w)
		want := map[string]fs.FileMode{
			".lock": 0o600, "archive.json": 0o600, "00000002.history": 0o600, name(1, 0): 0o600, name(1, 1) + ".partial": 0o600,
		}
		for file := range want {
			if group && file != ".lock" {
				want[file] = 0o640
			}
		}
		got := map[string]fs.FileMode{}
		for file := range files(t, path) {
			info, err := os.Stat(filepath.Join(path, file))
			if err != nil {
				t.Fatal(err)
			}
			got[file] = info.Mode()
		}
		if !maps.Equal(got, want) {
			t.Errorf("group readable is %v:\n got %v\nwant %v", group, got, want)
		}
		for _, dir := range []string{path, filepath.Dir(path)} {
			if info, err := os.Stat(dir); err != nil || info.Mode() != fs.ModeDir|0o700 {
				t.Errorf("%s: %v, %v", dir, info.Mode(), err)
			}
		}
	}
}

// A crash leaves unfinished files, and where a rename is a link and a removal, a segment with two names.
func TestOpenMendsWhatACrashLeft(t *testing.T) {
	path := place(t, name(1, 0), name(1, 1), name(1, 1)+".partial", name(1, 2)+".partial", name(1, 3)+".partial.tmp", name(1, 0)+".gz.tmp",
		"archive.json.tmp = {", "00000002.history.tmp = 1", "operators.tmp = mine", "x.partial = mine")
	if err := os.Link(filepath.Join(path, name(1, 0)), filepath.Join(path, name(1, 0)+".partial")); err != nil {
		t.Fatal(err)
	}
	want := files(t, path)
	for _, gone := range []string{name(1, 0) + ".partial", name(1, 3) + ".partial.tmp", name(1, 0) + ".gz.tmp", "archive.json.tmp", "00000002.history.tmp"} {
		delete(want, gone)
	}
	open(t, path)
	got := files(t, path)
	delete(got, ".lock")
	if !maps.Equal(got, want) {
		t.Errorf("left: %v, want %v", got, want)
	}
}

func TestArchiveJSON(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	if d.Bound() {
		t.Error("a new directory is bound")
	}
	if err := d.Check(identity); err != nil {
		t.Errorf("a new directory refuses a cluster: %v", err)
	}
	id := archive.Identity{SystemID: 1<<64 - 1, SegmentSize: mb} // no float could hold it
	origin := archive.Origin{Timeline: 3, LSN: 0x12_3450_0000, Source: "slot", Time: time.Date(2024, 2, 29, 1, 2, 3, 0, time.FixedZone("", 3600))}
	if err := d.Bind(id, origin); err != nil {
		t.Fatal(err)
	}
	if err := d.Bind(identity, origin); err == nil {
		t.Error("bound twice")
	}
	gap := archive.Gap{Timeline: 3, From: 0x12_3450_0028, To: 0x12_3460_0000, Reason: "gone", Time: time.Date(2024, 3, 1, 0, 0, 0, 0, time.UTC)}
	if err := d.RecordGap(gap); err != nil {
		t.Fatal(err)
	}
	d.Close()

	var content map[string]any
	data, err := os.ReadFile(filepath.Join(path, "archive.json"))
	if err := errors.Join(err, json.Unmarshal(data, &content)); err != nil {
		t.Fatal(err)
	}
	want := map[string]any{
		"format": 1.0, "system_identifier": "18446744073709551615", "segment_size": float64(mb),
		"origin": map[string]any{"timeline": 3.0, "lsn": "12/34500000", "source": "slot", "time": "2024-02-29T00:02:03Z"},
		"gaps":   []any{map[string]any{"timeline": 3.0, "from": "12/34500028", "to": "12/34600000", "time": "2024-03-01T00:00:00Z", "reason": "gone"}},
	}
	if !reflect.DeepEqual(content, want) {
		t.Errorf(" got %v\nwant %v", content, want)
	}

	d = open(t, path)
	if tli, lsn, bound := d.Origin(); tli != 3 || lsn != origin.LSN || !bound {
		t.Errorf("origin %d, %s, %v", tli, lsn, bound)
	}
	if gaps := d.Gaps(); len(gaps) != 1 || gaps[0] != gap {
		t.Errorf("gaps %+v", gaps)
	}
	if err := d.Check(id); err != nil {
		t.Errorf("its own cluster is refused: %v", err)
	}
	for _, other := range []archive.Identity{{id.SystemID - 1, mb}, {id.SystemID, 2 * mb}} {
		if err := d.Check(other); !isIdentityError(err) {
			t.Errorf("%+v: %v", other, err)
		}
	}
}

func TestDamagedArchiveJSONIsRefused(t *testing.T) {
	const good = `{"format": 1, "system_identifier": "42", "segment_size": 1048576, "origin": {"timeline": 1, "lsn": "0/4000000", "source": "slot", "time": "2024-02-29T00:02:03Z"}}`
	d := open(t, place(t, "archive.json = "+good))
	if err := d.Check(archive.Identity{SystemID: 42, SegmentSize: mb}); err != nil {
		t.Fatal(err)
	}
	for _, change := range [][2]string{
		{good, ""}, {good, "\x00\x00"}, {good, good[:50]}, {good, "[]"}, {good, "{}"}, {good, strings.Repeat(" ", 17<<20)},
		{`"format": 1`, `"format": 2`}, {`"format": 1`, `"format": 0`},
		{`"42"`, `"x"`}, {`"42"`, `42`}, {`"42"`, `"-42"`}, {`"42"`, `""`},
		{"1048576", "1048577"}, {"1048576", "0"}, {"1048576", "-1"}, {"1048576", "2147483648"},
		{`"timeline": 1`, `"timeline": 0`}, {"0/4000000", "0/4000001"}, {"0/4000000", "4000000"},
		{`}}`, `}, "gaps": [{"timeline": 1, "from": "0/5", "to": "0/5"}]}`},
		{`}}`, `}, "gaps": [{"timeline": 1, "from": "x", "to": "0/4000000"}]}`},
	} {
		path := place(t, "archive.json = "+strings.Replace(good, change[0], change[1], 1))
		before := files(t, path)
		_, err := archive.Open(path)
		if err == nil || !strings.Contains(err.Error(), "archive.json") {
			t.Errorf("%.60q for %.40q: %v", change[1], change[0], err)
		}
		after := files(t, path)
		delete(after, ".lock")
		if !maps.Equal(before, after) {
			t.Errorf("%.60q for %.40q: the directory changed", change[1], change[0])
		}
	}
}

// Segments of a pg_receivewal are taken over when their headers say that they are the cluster's.
func TestDirectoryOfPgReceivewalIsAdopted(t *testing.T) {
	segment := func(g *pgtest.WAL, start wal.LSN, size int) string {
		return string(g.Bytes(start, start+wal.LSN(size)))
	}
	ours := walTo(begin + 2*mb)
	others := pgtest.NewWAL(pgtest.WALConfig{SystemID: 1, Size: mb, Start: begin})
	others.FillTo(begin + mb)
	small := pgtest.NewWAL(pgtest.WALConfig{SystemID: systemID, Size: mb, Start: begin})
	small.FillTo(begin + mb)
	for what, tt := range map[string]struct {
		files []string
		id    archive.Identity
		fits  func(error) bool // nil: it does
	}{
		"empty":                     {nil, identity, nil},
		"foreign files":             {[]string{"README = x", "backup_label = x"}, identity, nil},
		"ours":                      {[]string{name(1, 0) + " = " + segment(ours, begin, mb), name(1, 1) + ".partial"}, identity, nil},
		"ours, partial alone":       {[]string{name(1, 0) + ".partial = " + segment(ours, begin, mb)}, identity, nil},
		"nothing written yet":       {[]string{name(1, 0) + ".partial"}, identity, nil},
		"another cluster's":         {[]string{name(1, 0) + " = " + segment(others, begin, mb)}, identity, isIdentityError},
		"another cluster's partial": {[]string{name(1, 0) + ".partial = " + segment(others, begin, mb)}, identity, isIdentityError},
		"another segment size": {[]string{name(1, 0) + " = " + segment(small, begin, mb)},
			archive.Identity{SystemID: systemID, SegmentSize: 16 * mb}, isIdentityError},
		"another segment size, a name that it does not have": {[]string{name(1, 0) + " = " + segment(small, begin, mb)},
			archive.Identity{SystemID: systemID, SegmentSize: 1 << 30}, isIdentityError},
		"compressed alone": {[]string{name(1, 0) + ".gz = x"}, identity, isFileError},
	} {
		t.Run(what, func(t *testing.T) {
			d := open(t, place(t, tt.files...))
			if err := d.Check(tt.id); (tt.fits == nil) != (err == nil) || tt.fits != nil && !tt.fits(err) {
				t.Errorf("%T: %v", err, err)
			}
		})
	}

	path := place(t, name(1, 0)+" = "+segment(ours, begin, mb), name(1, 1)+".partial = "+segment(ours, begin+mb, mb-8192)+strings.Repeat("\x00", 8192))
	d := open(t, path)
	if err := d.Check(identity); err != nil {
		t.Fatal(err)
	}
	w := openTail(t, d)
	if want := complete(ours, begin+2*mb-8192); w.Durable() != want {
		t.Errorf("durable %s, want %s", w.Durable(), want)
	}
	write(t, w, ours, 10000, ours.End())
	flush(t, w)
	wantContent(t, path, ours, ours.End(), ours.End())
}

func TestTail(t *testing.T) {
	type tail struct {
		tli   wal.Timeline
		start wal.LSN
		first string
	}
	for what, tt := range map[string]struct {
		files []string
		want  tail // zero: the archive is empty
	}{
		"empty":                       {nil, tail{}},
		"foreign files alone":         {[]string{"README", ".lock", "00000002.history", "0000000100000000000000AG", name(1, 1)[:23], strings.ToLower(name(1, 0x0a)), name(1, 1) + ".tmp"}, tail{}},
		"one sealed":                  {[]string{name(1, 0)}, tail{1, begin + mb, name(1, 0)}},
		"one partial":                 {[]string{name(1, 5) + ".partial"}, tail{1, begin + 5*mb, name(1, 5)}},
		"sealed and partial":          {[]string{name(1, 0), name(1, 1), name(1, 2) + ".partial"}, tail{1, begin + 2*mb, name(1, 0)}},
		"a record across partials":    {[]string{name(1, 0), name(1, 1) + ".partial", name(1, 2) + ".partial", name(1, 3) + ".partial"}, tail{1, begin + mb, name(1, 0)}},
		"partials alone":              {[]string{name(1, 2) + ".partial", name(1, 1) + ".partial"}, tail{1, begin + mb, name(1, 1)}},
		"a partial that is behind":    {[]string{name(1, 0) + ".partial", name(1, 3)}, tail{1, begin + 4*mb, name(1, 0)}},
		"compressed":                  {[]string{name(1, 0) + ".gz", name(1, 1) + ".lz4", name(1, 2) + ".zst"}, tail{1, begin + 3*mb, name(1, 0)}},
		"compressed in progress":      {[]string{name(1, 0), name(1, 1) + ".gz.partial"}, tail{1, begin + mb, name(1, 0)}},
		"compressed otherwise":        {[]string{name(1, 0), name(1, 1) + ".bz2", name(1, 1) + ".gz.tmp"}, tail{1, begin + mb, name(1, 0)}},
		"a new timeline":              {[]string{name(1, 0), name(1, 1) + ".partial", name(2, 1) + ".partial"}, tail{2, begin + mb, name(1, 0)}},
		"the old one goes further":    {[]string{name(1, 0), name(1, 1), name(1, 2), name(2, 1)}, tail{2, begin + 2*mb, name(1, 0)}},
		"timelines by number":         {[]string{name(9, 0), name(0x10, 0) + ".partial"}, tail{0x10, begin, name(9, 0)}},
		"upper half of the position":  {[]string{"0000000100000002000000FF", "000000010000000200000FFF"}, tail{1, 0x3_0000_0000, "0000000100000002000000FF"}},
		"segments of another size":    {[]string{name(1, 0), "000000010000000000001000"}, tail{1, begin + mb, name(1, 0)}},
		"partial and compressed both": {[]string{name(1, 0) + ".gz", name(1, 0) + ".partial"}, tail{1, begin + mb, name(1, 0)}},
	} {
		t.Run(what, func(t *testing.T) {
			got, ok, err := open(t, place(t, tt.files...)).Tail(mb)
			if err != nil {
				t.Fatal(err)
			}
			if ok != (tt.want.tli != 0) {
				t.Fatalf("ok is %v", ok)
			}
			if ok && (tail{got.Timeline, got.Start, got.First.Name()}) != tt.want {
				t.Errorf(" got %+v\nwant %+v", got, tt.want)
			}
		})
	}
}

// The last sealed segment decides where the archive goes on: one that was cut short is no segment.
func TestTailRefusesASegmentThatWasCutShort(t *testing.T) {
	for _, content := range []string{"", "x", strings.Repeat("x", mb-1), strings.Repeat("x", mb+1)} {
		path := place(t, name(1, 0), name(1, 1)+" = "+content)
		_, _, err := open(t, path).Tail(mb)
		if !isFileError(err) || !strings.Contains(err.Error(), name(1, 1)) {
			t.Errorf("%d bytes: %v", len(content), err)
		}
	}
}

func TestTailGoesOnBehindAGap(t *testing.T) {
	for _, tt := range []struct {
		files []string
		gap   archive.Gap
		tli   wal.Timeline
		start wal.LSN
	}{
		{[]string{name(1, 0), name(1, 1) + ".partial"}, archive.Gap{Timeline: 1, From: begin + mb + 8, To: begin + 5*mb}, 1, begin + 5*mb},
		{[]string{name(1, 0), name(1, 5)}, archive.Gap{Timeline: 1, From: begin + mb, To: begin + 5*mb}, 1, begin + 6*mb},
		{[]string{name(1, 0), name(1, 5) + ".partial"}, archive.Gap{Timeline: 1, From: begin + mb, To: begin + 5*mb}, 1, begin + 5*mb},
		{[]string{name(1, 0)}, archive.Gap{Timeline: 2, From: begin + mb, To: begin + 2*mb}, 2, begin + 2*mb},
		{[]string{name(1, 0), name(2, 3)}, archive.Gap{Timeline: 1, From: begin + mb, To: begin + 2*mb}, 2, begin + 4*mb},
	} {
		d := open(t, place(t, tt.files...))
		if err := d.Bind(identity, archive.Origin{Timeline: 1, LSN: begin}); err != nil {
			t.Fatal(err)
		}
		if err := d.RecordGap(tt.gap); err != nil {
			t.Fatal(err)
		}
		if got, ok, err := d.Tail(mb); err != nil || !ok || got.Timeline != tt.tli || got.Start != tt.start {
			t.Errorf("%q, %+v: %+v, %v", tt.files, tt.gap, got, err)
		}
	}
}

// What was acknowledged behind the last gap must not be forgotten because nothing was sealed between two of them.
func TestTailGoesOnBehindTheLastOfSeveralGaps(t *testing.T) {
	d := open(t, place(t, name(1, 0)+".partial", name(1, 2)+".partial", name(1, 4)+".partial"))
	if err := d.Bind(identity, archive.Origin{Timeline: 1, LSN: begin}); err != nil {
		t.Fatal(err)
	}
	for _, n := range []wal.LSN{0, 2} {
		if err := d.RecordGap(archive.Gap{Timeline: 1, From: begin + n*mb + 8, To: begin + (n+2)*mb}); err != nil {
			t.Fatal(err)
		}
	}
	if got, ok, err := d.Tail(mb); err != nil || !ok || got.Start != begin+4*mb {
		t.Errorf("%+v, %v", got, err)
	}
}

func TestHistoryIsStoredOnceAndNeverReplaced(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	if _, ok, err := d.History(2); ok || err != nil {
		t.Errorf("none is stored: %v, %v", ok, err)
	}
	const content = "1\t0/5000028\tno recovery target specified\n"
	for range 2 { // the same again is fine
		h, err := d.StoreHistory(2, []byte(content))
		if err != nil || h.Timeline != 2 || len(h.Forks) != 1 || h.Forks[0].End != 0x5000028 {
			t.Fatalf("%+v, %v", h, err)
		}
	}
	if _, err := d.StoreHistory(0x1A, []byte("1\t0/5000028\tx\n2\t0/6000028\tx\n")); err != nil {
		t.Fatal(err)
	}
	before := files(t, path)
	if _, ok := before["0000001A.history"]; !ok {
		t.Errorf("upper case, as PostgreSQL names it: %v", before)
	}
	if _, err := d.StoreHistory(2, []byte(strings.Replace(content, "28", "30", 1))); !isIdentityError(err) {
		t.Errorf("another history: %v", err)
	}
	for _, bad := range []string{"what is this", "2\t0/5000028\tx\n", "1\t0-5\tx\n"} {
		if _, err := d.StoreHistory(2, []byte(bad)); err == nil || isIdentityError(err) {
			t.Errorf("%q: %v", bad, err)
		}
		if _, err := d.StoreHistory(5, []byte(bad)); bad[0] != '2' && err == nil {
			t.Errorf("%q: %v", bad, err)
		}
	}
	delete(before, "00000005.history")
	after := files(t, path)
	delete(after, "00000005.history")
	if !maps.Equal(before, after) {
		t.Error("a stored history changed")
	}
	if h, ok, err := d.History(2); err != nil || !ok || len(h.Forks) != 1 {
		t.Errorf("%+v, %v, %v", h, ok, err)
	}
	d.Close()
	d = open(t, place(t, "00000002.history = nonsense"))
	if _, _, err := d.History(2); !isFileError(err) {
		t.Errorf("a damaged one: %v", err)
	}
}

// A new segment has all its room from the start, and was not filled with zeros for it.
func TestNewSegmentHasItsSize(t *testing.T) {
	path := t.TempDir()
	w := openTail(t, open(t, path))
	g := walTo(begin + 104)
	write(t, w, g, 100, g.End())
	file := filepath.Join(path, name(1, 0)+".partial")
	info, err := os.Stat(file)
	if err != nil || info.Size() != mb {
		t.Fatalf("%v, %v", info.Size(), err)
	}
	if st, ok := info.Sys().(*syscall.Stat_t); ok && st.Blocks*512 < mb {
		t.Logf("%d bytes are allocated: the file system has no fallocate", st.Blocks*512)
	}
	data, err := os.ReadFile(file)
	if err != nil || strings.Trim(string(data[g.End()-begin:]), "\x00") != "" {
		t.Errorf("the rest is not zero, %v", err)
	}
}
