package fleet

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

const listSegment = 1 << 20

// listArchive is an archive with two timelines, a gap, a hole and WAL in progress, and hostile text.
func listArchive(t *testing.T) (dir string) {
	t.Helper()
	dir = t.TempDir()
	d, err := archive.Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { d.Close() })
	at := func(n int) wal.LSN { return wal.LSN(n) * listSegment }
	when := func(n int) time.Time { return time.Date(2026, 1, 31, 12, n, 0, 500e6, time.UTC) }
	id := archive.Identity{SystemID: 42, SegmentSize: listSegment}
	if err := d.Bind(id, archive.Origin{Timeline: 1, LSN: at(1), Source: "slot", Time: when(0)}); err != nil {
		t.Fatal(err)
	}
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: 42, Size: listSegment, Start: at(1)})
	for n := 1; n <= 9; n++ {
		g.Commit(when(n))
		if n < 9 {
			g.FillTo(at(n + 1))
		}
	}
	fork := g.End()
	next := g.Fork(fork, 2)
	next.Commit(when(20))
	store := func(g *pgtest.WAL, tli wal.Timeline, n int, suffix string) {
		t.Helper()
		s := wal.SegmentSize(listSegment).Segment(tli, at(n))
		if err := os.WriteFile(filepath.Join(dir, s.Name()+suffix), g.Bytes(s.Start, s.End()), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range []int{1, 2, 5, 7, 8} {
		store(g, 1, n, "")
	}
	store(g, 1, 9, ".partial")
	store(next, 2, 9, ".partial")
	if err := d.RecordGap(archive.Gap{Timeline: 1, From: at(3), To: at(5), Reason: "gone\x1b[31m\n", Time: when(1)}); err != nil {
		t.Fatal(err)
	}
	if _, err := d.StoreHistory(2, []byte("1\t"+fork.String()+"\tbecause\x1b[2J\n")); err != nil {
		t.Fatal(err)
	}
	return dir
}

func TestListForPeople(t *testing.T) {
	dir := listArchive(t)
	c, err := ReadContents(t.Context(), "orders", dir)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := c.Write(&b); err != nil {
		t.Fatal(err)
	}
	want := "orders  " + dir + `
system identifier 42, segments of 1MB
begun at 0/100000 on 2026-01-31 12:00:00.500Z ("slot")
5 complete segments, 5.0 MB of WAL in 5.0 MB

TIMELINE  FROM      TO        SEGMENTS  WAL     STORED  FIRST COMMIT              LAST COMMIT               NOTE
1         0/100000  0/300000  2         2.0 MB  2.0 MB  2026-01-31 12:01:00.500Z  2026-01-31 12:02:00.500Z
          0/500000  0/600000  1         1.0 MB  1.0 MB  2026-01-31 12:05:00.500Z  2026-01-31 12:05:00.500Z
          0/700000  0/900000  2         2.0 MB  2.0 MB  2026-01-31 12:07:00.500Z  2026-01-31 12:08:00.500Z
          -         -         -         -       -       -                         -                         in progress: 000000010000000000000009.partial
  2       -         -         -         -       -       -                         -                         left 1 at 0/900050: "because\x1b[2J"; in progress: 000000020000000000000009.partial

Missing, and no recovery passes it:
  TIMELINE  FROM      TO
  1         0/300000  0/500000  gap, recorded on 2026-01-31 12:01:00.500Z: "gone\x1b[31m\n"
  1         0/600000  0/700000  A HOLE THAT NOBODY RECORDED: files are gone

What can be recovered, with a base backup that begins there or later:
  TIMELINE  BACKUP FROM    FIRST COMMIT              UP TO     LAST COMMIT               WITH .partial  LAST COMMIT
  2         0/100000 on 1  2026-01-31 12:01:00.500Z  0/300000  2026-01-31 12:02:00.500Z  -              -
  2         0/500000 on 1  2026-01-31 12:05:00.500Z  0/600000  2026-01-31 12:05:00.500Z  -              -
  2         0/700000 on 1  2026-01-31 12:07:00.500Z  0/900000  2026-01-31 12:08:00.500Z  0/900078       2026-01-31 12:20:00.500Z
`
	if b.String() != want {
		t.Errorf("it is\n%s\nwant\n%s", b.String(), want)
	}
}

func TestListOfWhatIsDamagedOrNotThere(t *testing.T) {
	dir := listArchive(t)
	if _, err := ReadContents(t.Context(), "", filepath.Join(dir, "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	for file, content := range map[string]string{"archive.json": "{", "00000002.history": "x", "000000010000000000000005": "short"} {
		if err := os.WriteFile(filepath.Join(dir, file), []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	c, err := ReadContents(t.Context(), "", dir)
	if err != nil || !strings.Contains(c.Error, "archive.json") || c.Segments != 5 {
		t.Errorf("%+v, %v", c, err)
	}
	if p := c.Timelines[1].Problem; !strings.Contains(p, "00000002.history") {
		t.Errorf("the history: %q", p)
	}
	if p := c.Timelines[0].Ranges[1].Problem; !strings.Contains(p, "000000010000000000000005") {
		t.Errorf("the segment: %q", p)
	}
}

func TestPruningForPeople(t *testing.T) {
	dir := listArchive(t)
	p, err := PlanPruning(t.Context(), "orders", dir, archive.PruneRule{Before: 8 * listSegment, Backups: []archive.Backup{{Path: "/b/\x1b", Timeline: 1, Start: 5*listSegment + 40}}})
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	if err := p.Write(&b); err != nil {
		t.Fatal(err)
	}
	want := `would be removed: 000000010000000000000001
would be removed: 000000010000000000000002
orders: WAL from 0/100000 to 0/500000 would be removed: 2 segments in 2 files, 2.0 MB
held: the base backup "/b/\x1b" needs WAL from 0/500028 on

What could be recovered before, with a base backup that begins there or later:
  TIMELINE  BACKUP FROM    FIRST COMMIT              UP TO     LAST COMMIT               WITH .partial  LAST COMMIT
  2         0/100000 on 1  2026-01-31 12:01:00.500Z  0/300000  2026-01-31 12:02:00.500Z  -              -
  2         0/500000 on 1  2026-01-31 12:05:00.500Z  0/600000  2026-01-31 12:05:00.500Z  -              -
  2         0/700000 on 1  2026-01-31 12:07:00.500Z  0/900000  2026-01-31 12:08:00.500Z  0/900078       2026-01-31 12:20:00.500Z

And after:
  TIMELINE  BACKUP FROM    FIRST COMMIT              UP TO     LAST COMMIT               WITH .partial  LAST COMMIT
  2         0/500000 on 1  2026-01-31 12:05:00.500Z  0/600000  2026-01-31 12:05:00.500Z  -              -
  2         0/700000 on 1  2026-01-31 12:07:00.500Z  0/900000  2026-01-31 12:08:00.500Z  0/900078       2026-01-31 12:20:00.500Z
`
	if b.String() != want {
		t.Errorf("it is\n%s\nwant\n%s", b.String(), want)
	}
}
