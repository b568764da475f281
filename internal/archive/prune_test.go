package archive

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

const (
	pruneSegment = wal.SegmentSize(1 << 20)
	pruneBegin   = wal.LSN(64 << 20)
)

var (
	pruneIdentity = Identity{SystemID: 4242, SegmentSize: pruneSegment}
	pruneNow      = time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
)

// madeUp is an archive whose segments have a commit each, and no more: hour n's segment is n hours old.
type madeUp struct {
	dir   *Dir
	hours map[wal.Segment]int // age of the commit in it, and of its file
	ends  map[wal.Timeline]wal.LSN
}

// store makes a segment's file, of an age in hours, with its own commit.
func (m *madeUp) store(t *testing.T, s wal.Segment, hours int, c Compression, partial bool) {
	t.Helper()
	when := pruneNow.Add(-time.Duration(hours) * time.Hour)
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: pruneIdentity.SystemID, Size: pruneSegment, Start: s.Start, Timeline: s.Timeline})
	g.Commit(when.Add(-time.Minute))
	g.Commit(when)
	g.Switch()
	content, name := g.Bytes(s.Start, s.End()), s.Name()
	if c.Method != "" {
		content, name = pack(c, content), name+c.suffix()
	}
	if partial {
		name += partialSuffix
	}
	path := m.dir.pathOf(name)
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(path, when, when); err != nil {
		t.Fatal(err)
	}
	m.hours[s] = hours
}

// newMadeUp makes an archive with forks, gaps, compressed and partial files.
func newMadeUp(t *testing.T, r *rand.Rand) *madeUp {
	t.Helper()
	d, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	if err := d.Bind(pruneIdentity, Origin{Timeline: 1, LSN: pruneBegin, Source: "slot", Time: pruneNow}); err != nil {
		t.Fatal(err)
	}
	m := &madeUp{dir: d, hours: map[wal.Segment]int{}, ends: map[wal.Timeline]wal.LSN{}}
	hours, history := 400, ""
	start := pruneBegin
	timelines := wal.Timeline(1 + r.IntN(3))
	for tli := wal.Timeline(1); tli <= timelines; tli++ {
		end := start + wal.LSN(3+r.IntN(8))*wal.LSN(pruneSegment)
		for at := start; at < end; at += wal.LSN(pruneSegment) {
			s := pruneSegment.Segment(tli, at)
			hours -= r.IntN(12)
			if at > start && r.IntN(8) == 0 && at+wal.LSN(pruneSegment) < end { // a gap instead
				if err := d.RecordGap(Gap{tli, at, s.End(), "removed", pruneNow}); err != nil {
					t.Fatal(err)
				}
				continue
			}
			c := Compression{}
			if n := r.IntN(6); n < len(methods) {
				c.Method = methods[n].name
			}
			m.store(t, s, hours, c, false)
			if r.IntN(10) == 0 { // in both forms, as after a crash
				m.store(t, s, hours, Compression{}, false)
			}
		}
		m.store(t, pruneSegment.Segment(tli, end), hours, Compression{}, true)
		m.ends[tli] = end
		if tli < timelines { // a fork, maybe far back
			fork := start + wal.LSN(r.Uint64N(uint64(end-start)))&^7 + 8
			history += fmt.Sprintf("%d\t%s\tno recovery target specified\n", tli, fork)
			if _, err := d.StoreHistory(tli+1, []byte(history)); err != nil {
				t.Fatal(err)
			}
			start = pruneSegment.Start(fork)
		}
	}
	return m
}

// names are all files of the archive but those that no prune may touch and no test changes.
func (m *madeUp) names(t *testing.T) []string {
	t.Helper()
	names, err := m.dir.disk.Names()
	if err != nil {
		t.Fatal(err)
	}
	slices.Sort(names)
	return names
}

func readCatalogue(t *testing.T, d *Dir) Catalogue {
	t.Helper()
	c, err := ReadCatalogue(t.Context(), d.path)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// recoverable lists each position, by segment, from which on a window goes to its end.
func recoverable(c Catalogue) map[string]wal.LSN {
	ends := map[string]wal.LSN{}
	for _, w := range c.Lineage(c.ReadHistories()).Windows {
		for _, s := range w.Segments {
			ends[fmt.Sprintf("to timeline %d from %s", w.Timeline, s)] = w.To + wal.LSN(len(w.Partials))*wal.LSN(pruneSegment)
		}
	}
	return ends
}

func holesOf(c Catalogue) string {
	var all []string
	for _, h := range c.Lineage(c.ReadHistories()).Holes {
		if h.To > c.Pruned.LSN {
			all = append(all, fmt.Sprintf("%d: %s to %s, %v", h.Timeline, h.From, h.To, h.Gap != nil))
		}
	}
	return strings.Join(all, "; ")
}

// Whatever the archive and the rule: only a prefix goes, by position; all that a kept backup can be recovered to
// stays; nothing gets a hole; and archiving goes on where it would have.
func TestPruneRemovesOnlyWhatNobodyNeeds(t *testing.T) {
	first := fromEnvironment(t, "WALFLEET_PRUNE_SEED", rand.Int64N(1<<40))
	runs := fromEnvironment(t, "WALFLEET_PRUNE_RUNS", 30)
	pruned := 0
	for seed := first; seed < first+runs; seed++ {
		r := rand.New(rand.NewPCG(uint64(seed), 'x'))
		m := newMadeUp(t, r)
		fail := func(format string, args ...any) {
			t.Helper()
			t.Fatalf("WALFLEET_PRUNE_SEED=%d: %s", seed, fmt.Sprintf(format, args...))
		}
		before, names := readCatalogue(t, m.dir), m.names(t)
		tail, _, err := m.dir.Tail(pruneSegment)
		if err != nil {
			fail("%v", err)
		}
		var rule PruneRule
		if r.IntN(2) == 0 {
			rule.OlderThan = pruneNow.Add(-time.Duration(r.IntN(400)) * time.Hour)
		}
		if r.IntN(2) == 0 {
			rule.KeepSize = 1 + r.Int64N(20<<20)
		}
		if r.IntN(3) == 0 {
			rule.Before = pruneBegin + wal.LSN(r.IntN(30<<20))
		}
		for range r.IntN(3) {
			tli := wal.Timeline(1 + r.IntN(len(m.ends)))
			rule.Backups = append(rule.Backups, Backup{"b", tli, pruneBegin + wal.LSN(r.IntN(int(m.ends[tli]-pruneBegin)))})
		}
		plan, err := before.PlanPrune(t.Context(), rule)
		if err != nil {
			fail("%v", err)
		}
		if !slices.Equal(m.names(t), names) {
			fail("planning changed the directory")
		}
		removed, err := m.dir.Prune(t.Context(), plan.Limit)
		if err != nil {
			fail("%v", err)
		}
		after := readCatalogue(t, m.dir)
		var planned, want []string
		for _, f := range plan.Files {
			planned = append(planned, f.File)
		}
		for _, f := range before.Files {
			if f.End() <= plan.Limit {
				want = append(want, f.File)
			}
		}
		slices.Sort(removed)
		for _, list := range [][]string{planned, want} {
			slices.Sort(list)
			if !slices.Equal(list, removed) {
				fail("removed %q, want %q", removed, list)
			}
		}
		gone := func(name string) bool { return slices.Contains(removed, name) }
		if left := slices.DeleteFunc(slices.Clone(names), gone); !slices.Equal(left, m.names(t)) {
			fail("there was %q, %q was removed, now there is %q", names, removed, m.names(t))
		}
		if len(removed) > 0 && after.Pruned.LSN != plan.Limit {
			fail("archive.json has %+v as pruned, want %s", after.Pruned, plan.Limit)
		}
		ends, old := recoverable(after), recoverable(before)
		for from, end := range old {
			s, _ := wal.ParseSegment(from[len(from)-24:], pruneSegment)
			if kept, ok := ends[from]; s.End() > plan.Limit && (!ok || kept != end) {
				fail("%s could be recovered to %s, and after pruning before %s to %s", from, end, plan.Limit, kept)
			}
		}
		for _, b := range rule.Backups {
			if plan.Limit > b.Start {
				fail("a backup begins at %s, and WAL before %s is gone", b.Start, plan.Limit)
			}
		}
		if a, b := holesOf(before.Without(plan)), holesOf(after); a != b {
			fail("missing is %s, by the plan %s", b, a)
		}
		for from := range ends {
			if old[from] != ends[from] {
				fail("%s can be recovered to %s, and before only to %s", from, ends[from], old[from])
			}
		}
		if again, _, err := m.dir.Tail(pruneSegment); err != nil || again.Start != tail.Start || again.Timeline != tail.Timeline {
			fail("the tail was %+v, and is %+v, %v", tail, again, err)
		}
		if rule.KeepSize == 0 && rule.Before == 0 {
			for _, f := range plan.Files {
				if !pruneNow.Add(-time.Duration(m.hours[f.Segment]) * time.Hour).Before(rule.OlderThan) {
					fail("%s is %d hours old, and went with what is older than %s", f.File, m.hours[f.Segment], rule.OlderThan)
				}
			}
		}
		pruned += min(1, len(removed))
	}
	if pruned < int(runs)/5 {
		t.Errorf("only %d of %d runs pruned anything", pruned, runs)
	}
}

// row is an archive of ten segments, an hour each, the last one a hour old, and one in progress.
func row(t *testing.T) *madeUp {
	t.Helper()
	d, err := Open(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	if err := d.Bind(pruneIdentity, Origin{Timeline: 1, LSN: pruneBegin, Source: "slot", Time: pruneNow}); err != nil {
		t.Fatal(err)
	}
	m := &madeUp{dir: d, hours: map[wal.Segment]int{}}
	for n := range 10 {
		m.store(t, nth(n), 10-n, Compression{}, false)
	}
	m.store(t, nth(10), 0, Compression{}, true)
	return m
}

func nth(n int) wal.Segment {
	return pruneSegment.Segment(1, pruneBegin+wal.LSN(n)*wal.LSN(pruneSegment))
}

func TestPlanPrune(t *testing.T) {
	m := row(t)
	// The host's clock was wrong while it wrote these two: their commits tell.
	for _, n := range []int{5, 6} {
		if err := os.Chtimes(m.dir.pathOf(nth(n).Name()), time.Unix(0, 0), time.Unix(0, 0)); err != nil {
			t.Fatal(err)
		}
	}
	c := readCatalogue(t, m.dir)
	hours := func(n int) time.Time { return pruneNow.Add(-time.Duration(n)*time.Hour - time.Minute) }
	for _, row := range []struct {
		name string
		rule PruneRule
		gone int // segments
		held string
	}{
		{"nothing asked for", PruneRule{}, 0, ""},
		{"older than all", PruneRule{OlderThan: hours(11)}, 0, ""},
		{"older than seven hours", PruneRule{OlderThan: hours(7)}, 3, ""},
		{"older than five hours, with a clock that was wrong", PruneRule{OlderThan: hours(5)}, 5, ""},
		{"older than nothing", PruneRule{OlderThan: pruneNow.Add(time.Hour)}, 9, "archived last"},
		{"a size", PruneRule{KeepSize: 7 << 20}, 4, ""},
		{"a size that is not reached", PruneRule{KeepSize: 11 << 20}, 0, ""},
		{"one byte", PruneRule{KeepSize: 1}, 9, "archived last"},
		{"the age takes more than the size", PruneRule{KeepSize: 9 << 20, OlderThan: hours(6)}, 4, ""},
		{"before a segment", PruneRule{Before: nth(3).Start}, 3, ""},
		{"before a position in it", PruneRule{Before: nth(3).Start + 4000}, 3, ""},
		{"a backup holds it", PruneRule{KeepSize: 1, Backups: []Backup{{"/b/1", 1, nth(2).Start + 40}, {"/b/2", 1, nth(8).Start}}}, 2, `"/b/1" needs WAL from 0/4200028 on`},
		{"a backup of later holds nothing", PruneRule{Before: nth(2).Start, Backups: []Backup{{"/b/2", 1, nth(8).Start}}}, 2, ""},
		{"a backup of long ago", PruneRule{KeepSize: 1, Backups: []Backup{{"/b/0", 1, 4000}}}, 0, `"/b/0"`},
	} {
		p, err := c.PlanPrune(t.Context(), row.rule)
		if err != nil || len(p.Files) != row.gone || (p.Limit == 0) != (row.gone == 0) || row.gone > 0 && p.Limit != nth(row.gone).Start {
			t.Errorf("%s: %d files before %s, %v, want %d", row.name, len(p.Files), p.Limit, err, row.gone)
		}
		if held := strings.Join(p.Held, "; "); (held == "") != (row.held == "") || !strings.Contains(held, row.held) {
			t.Errorf("%s: held by %q, want %q", row.name, held, row.held)
		}
	}
	c.Bound = false
	if _, err := c.PlanPrune(t.Context(), PruneRule{KeepSize: 1}); err == nil || !strings.Contains(err.Error(), "pg_archivecleanup") {
		t.Errorf("without archive.json: %v", err)
	}
}

// Whatever is asked for, the segments in progress and the one before them stay, also where a gap or a new timeline
// has just begun.
func TestPruneLeavesWhatArchivingGoesOnWith(t *testing.T) {
	const all = ^wal.LSN(0)
	m := row(t)
	prune := func(want ...string) {
		t.Helper()
		if _, err := m.dir.Prune(t.Context(), all); err != nil {
			t.Fatal(err)
		}
		have := slices.DeleteFunc(m.names(t), func(name string) bool { return name == lockName || name == metaName })
		slices.Sort(want)
		if !slices.Equal(have, want) {
			t.Errorf("there is %q, want %q", have, want)
		}
	}
	progress := nth(10).Name() + partialSuffix
	prune(nth(9).Name(), progress)
	// A timeline that has just forked off, with the segment in which it did.
	if _, err := m.dir.StoreHistory(2, []byte("1\t"+(nth(10).Start+8).String()+"\tbecause\n")); err != nil {
		t.Fatal(err)
	}
	s := pruneSegment.Segment(2, nth(10).Start)
	m.store(t, s, 0, Compression{}, true)
	prune(wal.HistoryName(2), nth(9).Name(), progress, s.Name()+partialSuffix)
	// It went on: the old one's file is of the past.
	m.store(t, s.Next(), 0, Compression{}, false)
	m.store(t, s, 0, Compression{}, false)
	prune(wal.HistoryName(2), s.Next().Name())
	if err := m.dir.RecordGap(Gap{2, s.Next().End(), s.Next().End() + wal.LSN(4*pruneSegment), "removed", pruneNow}); err != nil {
		t.Fatal(err)
	}
	prune(wal.HistoryName(2))
	if tail, ok, err := m.dir.Tail(pruneSegment); !ok || err != nil || tail.Start != s.Next().End()+wal.LSN(4*pruneSegment) {
		t.Errorf("the tail is %+v, %v, %v", tail, ok, err)
	}
}

// A segment that a prune removes while it is compressed does not come back.
func TestPrunedSegmentIsNotCompressed(t *testing.T) {
	g := row(t)
	d := g.dir
	for n, moment := range []string{"create", "rename"} {
		s := nth(n)
		hooked := &hookDisk{disk: d.disk, before: map[string]func(){}}
		hooked.before[moment] = func() {
			hooked.before = nil
			if _, err := d.Prune(t.Context(), s.End()); err != nil {
				t.Error(err)
			}
		}
		if moment == "rename" { // what comes after the last look holds the names
			hooked.before = map[string]func(){"drop": hooked.before[moment]}
		}
		d.disk = hooked
		_, err := d.Compress(t.Context(), s, Compression{Method: "gzip", Level: 1})
		d.disk = hooked.disk
		if !errors.Is(err, fs.ErrNotExist) {
			t.Errorf("%s: compressed all the same: %v", moment, err)
		}
	}
	for _, name := range g.names(t) {
		if strings.Contains(name, ".gz") || name == nth(0).Name() || name == nth(1).Name() {
			t.Errorf("%s is there", name)
		}
	}
}

// hookDisk calls something before an operation.
type hookDisk struct {
	disk
	before map[string]func()
}

func (d *hookDisk) call(what string) {
	if f := d.before[what]; f != nil {
		f()
	}
}

func (d *hookDisk) Create(name string, mode fs.FileMode) (file, error) {
	d.call("create")
	f, err := d.disk.Create(name, mode)
	return hookFile{f, d}, err
}

type hookFile struct {
	file
	d *hookDisk
}

func (f hookFile) DropCache() error {
	f.d.call("drop")
	return f.file.DropCache()
}

// archive.json keeps what a prune and the receiver write at the same time.
func TestPruneAndGapAreBothWrittenDown(t *testing.T) {
	m := row(t)
	done := make(chan error, 1)
	go func() {
		var err error
		for n := 1; n < 9 && err == nil; n++ {
			_, err = m.dir.Prune(context.Background(), nth(n).Start)
		}
		done <- err
	}()
	gap := func(n int) {
		from := pruneBegin + wal.LSN(100+n)*wal.LSN(pruneSegment)
		if err := m.dir.RecordGap(Gap{1, from, from + wal.LSN(pruneSegment), "removed", pruneNow}); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 20 {
		gap(n)
	}
	if err := <-done; err != nil {
		t.Fatal(err)
	}
	gap(20) // whichever came last
	c := readCatalogue(t, m.dir)
	if len(c.Gaps) != 21 || c.Pruned.LSN != nth(8).Start || c.Sealed()[0] != nth(8) {
		t.Errorf("%d gaps, pruned before %s, begins with %s", len(c.Gaps), c.Pruned.LSN, c.Sealed()[0])
	}
}

const label = `START WAL LOCATION: 0/4200028 (file 000000010000000000000042)
CHECKPOINT LOCATION: 0/4200060
BACKUP METHOD: streamed
BACKUP FROM: primary
START TIME: 2026-01-31 12:00:00 UTC
LABEL: pg_basebackup base backup
START TIMELINE: 1
`

const manifest = `{ "PostgreSQL-Backup-Manifest-Version": 1, "Files": [ { "Path": "PG_VERSION", "Size": 3 } ],
"WAL-Ranges": [ { "Timeline": 3, "Start-LSN": "0/4500028", "End-LSN": "0/4600000" }, { "Timeline": 2, "Start-LSN": "0/4400028", "End-LSN": "0/4500028" } ],
"Manifest-Checksum": "x" }`

func TestFindBackups(t *testing.T) {
	dir := t.TempDir()
	put := func(name string, data []byte) {
		t.Helper()
		path := filepath.Join(dir, name)
		if err := errors.Join(os.MkdirAll(filepath.Dir(path), 0o700), os.WriteFile(path, data, 0o600)); err != nil {
			t.Fatal(err)
		}
	}
	find := func() (found string, err error) {
		all, err := FindBackups(t.Context(), dir)
		for _, b := range all {
			found += fmt.Sprintf("%s: %d, %s\n", filepath.Base(b.Path), b.Timeline, b.Start)
		}
		return found, err
	}
	if _, err := find(); err == nil || !strings.Contains(err.Error(), "there is none in") {
		t.Errorf("an empty directory: %v", err)
	}
	put("notes", nil)
	put("plain/backup_label", []byte(label))
	put("plain/base/backup_label", []byte("of a database's directory, which is not looked into"))
	put("2026/01/manifest/backup_manifest", []byte(manifest))
	put("2026/01/manifest/backup_label", []byte(label)) // of a chain, say
	for _, c := range []Compression{{}, {Method: "gzip"}, {Method: "lz4"}, {Method: "zstd"}} {
		data := tarOf(t, "backup_label", label)
		if c.Method != "" {
			data = pack(c, data)
		}
		put("tar"+c.Method+"/base.tar"+c.suffix(), data)
	}
	want := "plain: 1, 0/4200028\ntar: 1, 0/4200028\ntargzip: 1, 0/4200028\ntarlz4: 1, 0/4200028\ntarzstd: 1, 0/4200028\nmanifest: 2, 0/4400028\n"
	if got, err := find(); err != nil || got != want {
		t.Errorf("found\n%s, %v, want\n%s", got, err, want)
	}
	if err := errors.Join(os.Symlink("..", filepath.Join(dir, "2026", "up")), os.Symlink("2026/01/manifest", filepath.Join(dir, "latest"))); err != nil {
		t.Fatal(err)
	}
	if got, err := find(); err != nil || got != want {
		t.Errorf("with links found\n%s, %v, want\n%s", got, err, want)
	}
	for name, data := range map[string]string{
		"bad/backup_label": "LABEL: x\n", "bad/backup_manifest": "{", "bad/base.tar": "no tar", "bad/base.tar.gz": "no gzip",
		"bad/base.tar.zst": string(pack(Compression{Method: "zstd"}, tarOf(t, "PG_VERSION", "15"))),
	} {
		put(name, []byte(data))
		if _, err := find(); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
		if err := os.RemoveAll(filepath.Join(dir, "bad")); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Symlink("/nowhere/at/all", filepath.Join(dir, "away")); err != nil {
		t.Fatal(err)
	}
	if _, err := find(); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("a link to what is away: %v", err)
	}
}

func TestParseBefore(t *testing.T) {
	dir := t.TempDir()
	for name, data := range map[string]string{"backup_label": label, "000000010000000000000042.00000028.backup": label, "backup_manifest": manifest} {
		if err := os.WriteFile(filepath.Join(dir, name), []byte(data), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for text, want := range map[string]wal.LSN{
		"000000010000000000000042":                        0x4200000,
		"000000010000000000000042.partial":                0x4200000,
		"000000010000000000000042.00000028.backup":        0x4200000,
		dir + "/000000010000000000000042.00000028.backup": 0x4200000,
		dir + "/backup_label":                             0x4200028,
		dir + "/backup_manifest":                          0x4400028,
		dir:                                               0x4400028,
		"00000001000000000000FFFF":                        0, // no segment of 1 MB
		"000000010000000000000042.gz":                     0,
		dir + "/nothing":                                  0,
		filepath.Dir(dir):                                 0,
		"":                                                0,
	} {
		got, err := ParseBefore(text, pruneSegment)
		if got != want || (err == nil) != (want != 0) {
			t.Errorf("%q: %s, %v, want %s", text, got, err, want)
		}
	}
}

func tarOf(t *testing.T, name, content string) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	err := w.WriteHeader(&tar.Header{Name: name, Size: int64(len(content)), Mode: 0o600})
	if _, werr := io.WriteString(w, content); errors.Join(err, werr, w.Close()) != nil {
		t.Fatal(err, werr)
	}
	return b.Bytes()
}

// An archive that stands still does not get older, and a clock that jumped ahead makes nothing old.
func TestAgesCountFromWhenTheArchiveWasWrittenTo(t *testing.T) {
	c := readCatalogue(t, row(t).dir)
	for _, tt := range []struct{ now, want time.Time }{
		{pruneNow.Add(1000 * time.Hour), pruneNow},
		{pruneNow.Add(-time.Hour), pruneNow.Add(-time.Hour)},
	} {
		if got := c.Newest(tt.now); !got.Equal(tt.want) {
			t.Errorf("at %s ages count from %s, not %s", tt.now, got, tt.want)
		}
	}
}

// The host's clock was wrong while it wrote some segments, of which the last has no commit: the one before tells.
func TestAnIdleSegmentDoesNotHideAWrongClock(t *testing.T) {
	m := row(t)
	idle := nth(6)
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: pruneIdentity.SystemID, Size: pruneSegment, Start: idle.Start, Timeline: 1})
	g.Append([]byte("no commit"))
	g.Switch()
	if err := os.WriteFile(m.dir.pathOf(idle.Name()), g.Bytes(idle.Start, idle.End()), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, n := range []int{5, 6} {
		if err := os.Chtimes(m.dir.pathOf(nth(n).Name()), time.Unix(0, 0), time.Unix(0, 0)); err != nil {
			t.Fatal(err)
		}
	}
	p, err := readCatalogue(t, m.dir).PlanPrune(t.Context(), PruneRule{OlderThan: pruneNow.Add(-5*time.Hour - time.Minute)})
	if err != nil || p.Limit != nth(5).Start {
		t.Errorf("what is before %s goes, want %s, where a commit is of five hours ago: %v", p.Limit, nth(5).Start, err)
	}
}
