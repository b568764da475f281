package archive_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// lsnOf is a position as a number of segments and bytes.
func lsnOf(n int, offset wal.LSN) wal.LSN { return begin + wal.LSN(n)*mb + offset }

// short is a position as segments and bytes from the archive's beginning.
func short(l wal.LSN) string {
	if rest := l % mb; rest != 0 {
		return fmt.Sprintf("%d+%d", (l-begin)/mb, rest)
	}
	return fmt.Sprint(int64(l-begin) / mb)
}

// show writes a lineage down in few words.
func show(l archive.Lineage) string {
	var b strings.Builder
	for _, br := range l.Branches {
		fmt.Fprintf(&b, "%d", br.Timeline)
		if br.Parent != 0 {
			fmt.Fprintf(&b, " left %d at %s", br.Parent, short(br.Fork))
		}
		if br.Problem != nil {
			b.WriteString(" (no history)")
		}
		for _, r := range br.Ranges {
			fmt.Fprintf(&b, " %s-%s", short(r.Start), short(r.End))
		}
		for _, p := range br.Partials {
			fmt.Fprintf(&b, " ~%s", short(p.Start))
		}
		b.WriteString("\n")
	}
	for _, w := range l.Windows {
		fmt.Fprintf(&b, "to %d: %s on %d to %s", w.Timeline, short(w.From), w.FromTimeline, short(w.To))
		for _, p := range w.Partials {
			fmt.Fprintf(&b, " ~%s on %d", short(p.Start), p.Timeline)
		}
		if w.Continued != 0 {
			fmt.Fprintf(&b, ", goes on elsewhere at %s", short(w.Continued))
		}
		b.WriteString("\n")
	}
	for _, h := range l.Holes {
		kind := "hole"
		switch {
		case h.Gap != nil:
			kind = "gap"
		case h.Divergence != nil:
			kind = "divergence"
		}
		fmt.Fprintf(&b, "%s on %d: %s to %s\n", kind, h.Timeline, short(h.From), short(h.To))
	}
	return b.String()
}

func TestLineage(t *testing.T) {
	all := func(tli wal.Timeline, from, to int) (names []string) {
		for n := from; n < to; n++ {
			names = append(names, name(tli, n))
		}
		return names
	}
	partial := func(tli wal.Timeline, n int) string { return name(tli, n) + ".partial" }
	history := func(forks ...any) (text string) {
		for i := 0; i < len(forks); i += 2 {
			text += fmt.Sprintf("%d\t%s\tbecause\n", forks[i], forks[i+1])
		}
		return text
	}
	for _, row := range []struct {
		name      string
		files     [][]string
		histories map[wal.Timeline]string
		gaps      []archive.Gap
		pruned    wal.LSN
		want      string
	}{
		{name: "one timeline, of which the last two are not complete", files: [][]string{all(1, 0, 4), {partial(1, 4), partial(1, 5)}}, want: `
1 0-4 ~4 ~5
to 1: 0 on 1 to 4 ~4 on 1 ~5 on 1
`},
		{name: "nothing is complete", files: [][]string{{partial(1, 0)}}, want: `
1 ~0
to 1: 0 on 1 to 0 ~0 on 1
`},
		{name: "a gap, which begins in a segment, and a hole", files: [][]string{all(1, 0, 3), {partial(1, 3)}, all(1, 6, 8), all(1, 9, 10), {partial(1, 10)}},
			gaps: []archive.Gap{{Timeline: 1, From: lsnOf(3, 500), To: lsnOf(6, 0), Reason: "removed"}}, want: `
1 0-3 6-8 9-10 ~3 ~10
to 1: 0 on 1 to 3 ~3 on 1
to 1: 6 on 1 to 8
to 1: 9 on 1 to 10 ~10 on 1
gap on 1: 3+500 to 6
hole on 1: 8 to 9
`},
		{name: "more is gone than the gap says", files: [][]string{all(1, 0, 2), {partial(1, 6)}},
			gaps: []archive.Gap{{Timeline: 1, From: lsnOf(4, 500), To: lsnOf(6, 0), Reason: "removed"}}, want: `
1 0-2 ~6
to 1: 0 on 1 to 2
to 1: 6 on 1 to 6 ~6 on 1
hole on 1: 2 to 4
gap on 1: 4+500 to 6
`},
		{name: "files of the beginning and before the partial one are gone", files: [][]string{all(1, 2, 4), {partial(1, 5)}}, want: `
1 2-4 ~5
to 1: 2 on 1 to 4
to 1: 5 on 1 to 5 ~5 on 1
hole on 1: 0 to 2
hole on 1: 4 to 5
`},
		{name: "they were pruned", files: [][]string{all(1, 2, 4)}, pruned: lsnOf(2, 0), want: `
1 2-4
to 1: 2 on 1 to 4
`},
		{name: "a prune was cut off", files: [][]string{all(1, 1, 2), all(1, 3, 4)}, pruned: lsnOf(3, 0), want: `
1 1-2 3-4
to 1: 1 on 1 to 2
to 1: 3 on 1 to 4
`},
		{name: "files behind what was pruned are gone", files: [][]string{all(1, 1, 2), all(1, 6, 7)}, pruned: lsnOf(3, 0), want: `
1 1-2 6-7
to 1: 1 on 1 to 2
to 1: 6 on 1 to 7
hole on 1: 3 to 6
`},
		{name: "a promotion in a segment", files: [][]string{all(1, 0, 3), {partial(1, 3)}, all(2, 3, 5), {partial(2, 5)}},
			histories: map[wal.Timeline]string{2: history(1, lsnOf(3, 800))}, want: `
1 0-3 ~3
2 left 1 at 3+800 3-5 ~5
to 1: 0 on 1 to 3 ~3 on 1, goes on elsewhere at 3+800
to 2: 0 on 1 to 5 ~5 on 2
`},
		{name: "a promotion at a segment's end", files: [][]string{all(1, 0, 3), all(2, 3, 4)},
			histories: map[wal.Timeline]string{2: history(1, lsnOf(3, 0))}, want: `
1 0-3
2 left 1 at 3 3-4
to 2: 0 on 1 to 4
`},
		{name: "a promotion that is not archived yet", files: [][]string{all(1, 0, 3), {partial(1, 3), partial(2, 3)}},
			histories: map[wal.Timeline]string{2: history(1, lsnOf(3, 800))}, want: `
1 0-3 ~3
2 left 1 at 3+800 ~3
to 1: 0 on 1 to 3 ~3 on 1, goes on elsewhere at 3+800
to 2: 0 on 1 to 3 ~3 on 2
`},
		{name: "recovery to an earlier time, twice", files: [][]string{all(1, 0, 6), all(2, 2, 5), all(3, 3, 4)},
			histories: map[wal.Timeline]string{2: history(1, lsnOf(2, 8)), 3: history(1, lsnOf(2, 8), 2, lsnOf(3, 8))}, want: `
1 0-6
2 left 1 at 2+8 2-5
3 left 2 at 3+8 3-4
to 1: 0 on 1 to 6
to 2: 0 on 1 to 5
to 3: 0 on 1 to 4
`},
		{name: "the old timeline ends before the fork", files: [][]string{all(1, 0, 2), all(2, 4, 5)},
			histories: map[wal.Timeline]string{2: history(1, lsnOf(4, 8))}, want: `
1 0-2
2 left 1 at 4+8 4-5
to 2: 0 on 1 to 2
to 2: 4 on 2 to 5
hole on 2: 2 to 4
`},
		{name: "a history is gone", files: [][]string{all(1, 0, 3), all(2, 3, 5)}, want: `
1 0-3
2 (no history) 3-5
to 1: 0 on 1 to 3
to 2: 3 on 2 to 5
`},
		{name: "a history that makes no sense", files: [][]string{all(1, 0, 3)}, histories: map[wal.Timeline]string{2: "x"}, want: `
1 0-3
2 (no history)
to 1: 0 on 1 to 3
`},
	} {
		t.Run(row.name, func(t *testing.T) {
			path := t.TempDir()
			d := open(t, path)
			if err := d.Bind(identity, archive.Origin{Timeline: 1, LSN: begin, Source: "slot", Time: time.Now()}); err != nil {
				t.Fatal(err)
			}
			for _, names := range row.files {
				for _, file := range names {
					if err := os.WriteFile(filepath.Join(path, file), nil, 0o600); err != nil {
						t.Fatal(err)
					}
				}
			}
			for tli, text := range row.histories {
				if err := os.WriteFile(filepath.Join(path, wal.HistoryName(tli)), []byte(text), 0o600); err != nil {
					t.Fatal(err)
				}
			}
			for _, g := range row.gaps {
				if err := d.RecordGap(g); err != nil {
					t.Fatal(err)
				}
			}
			c, err := archive.ReadCatalogue(t.Context(), path)
			if err != nil {
				t.Fatal(err)
			}
			c.Pruned.LSN = row.pruned
			if got, want := show(c.Lineage(c.ReadHistories())), strings.TrimPrefix(row.want, "\n"); got != want {
				t.Errorf("it is\n%s, want\n%s", got, want)
			}
		})
	}
}

// Where the server's WAL does not continue what is before it, by a person's decision, no recovery passes.
func TestLineageEndsAtADivergence(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	if err := d.Bind(identity, archive.Origin{Timeline: 1, LSN: begin, Source: "slot", Time: time.Now()}); err != nil {
		t.Fatal(err)
	}
	for n := range 3 {
		if err := os.WriteFile(filepath.Join(path, name(1, n)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for _, at := range []wal.LSN{lsnOf(2, 4000), lsnOf(2, 0)} { // the first one goes on with what is before
		if _, err := d.AcceptDivergence(1, at, "differs"); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(path, name(1, 2)), nil, 0o600); err != nil {
			t.Fatal(err)
		}
		c, err := archive.ReadCatalogue(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		want := "1 0-3\nto 1: 0 on 1 to 3\n"
		if at == lsnOf(2, 0) {
			want = "1 0-3\nto 1: 0 on 1 to 2\nto 1: 2 on 1 to 3\ndivergence on 1: 2 to 2\n"
		}
		if got := show(c.Lineage(c.ReadHistories())); got != want {
			t.Errorf("after a divergence at %s it is\n%s, want\n%s", short(at), got, want)
		}
	}
}

// Times are found at both ends, in plain and compressed segments, and in what is not complete up to its last record.
func TestCommitTimesAndPartialEnds(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	if err := d.Bind(identity, archive.Origin{Timeline: 1, LSN: begin, Source: "slot", Time: time.Now()}); err != nil {
		t.Fatal(err)
	}
	when := func(n int) time.Time { return time.Date(2026, 1, 31, 12, n, 0, 0, time.UTC) }
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: identity.SystemID, Size: mb, Start: begin})
	g.Append(make([]byte, 700<<10)) // far from the beginning
	g.Commit(when(1))
	g.FillTo(lsnOf(1, 8192))
	g.Commit(when(2))
	g.Append(make([]byte, 700<<10)) // far from the end
	g.FillTo(lsnOf(3, 16000))
	_, fork := g.Commit(when(3))
	g.Append(make([]byte, 5000))
	_, last := g.Commit(when(4))
	_, end := g.Append(make([]byte, 20000)) // goes on
	store := func(n int, suffix string, to wal.LSN) {
		t.Helper()
		content := make([]byte, mb)
		copy(content, g.Bytes(lsnOf(n, 0), min(to, lsnOf(n+1, 0))))
		if err := os.WriteFile(filepath.Join(path, name(1, n)+suffix), content, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	for n := range 3 {
		store(n, "", end)
	}
	store(3, ".partial", end-9000)
	check := func(first, last time.Time, u archive.Unfinished, w int) {
		t.Helper()
		c, err := archive.ReadCatalogue(t.Context(), path)
		if err != nil {
			t.Fatal(err)
		}
		windows := c.Lineage(c.ReadHistories()).Windows
		a, err1 := c.FirstCommit(t.Context(), windows[w].Segments)
		b, err2 := c.LastCommit(t.Context(), windows[w].Segments)
		v, err3 := c.ReadPartials(t.Context(), windows[w])
		if err1 != nil || err2 != nil || err3 != nil || !a.Time.Equal(first) || !b.Time.Equal(last) || v.End != u.End || !v.Last.Time.Equal(u.Last.Time) {
			t.Errorf("first %v, last %v, %v, %v, %v; then up to %s, %v; want %v, %v, %s, %v", a.Time, b.Time, err1, err2, err3, v.End, v.Last.Time, first, last, u.End, u.Last.Time)
		}
	}
	check(when(1), when(2), archive.Unfinished{End: last, Last: wal.Commit{Time: when(4)}}, 0)
	for n := range 3 {
		if _, err := d.Compress(t.Context(), wal.Segment{Timeline: 1, Start: lsnOf(n, 0), Size: mb}, archive.Compression{Method: "lz4", Level: 1}); err != nil {
			t.Fatal(err)
		}
	}
	check(when(1), when(2), archive.Unfinished{End: last, Last: wal.Commit{Time: when(4)}}, 0)
	// Timeline 2 left before the last commit, and is archived from a later segment on.
	if _, err := d.StoreHistory(2, []byte("1\t"+fork.String()+"\tbecause\n")); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(path, name(2, 5)), make([]byte, mb), 0o600); err != nil {
		t.Fatal(err)
	}
	check(when(1), when(2), archive.Unfinished{End: last, Last: wal.Commit{Time: when(4)}}, 0) // what timeline 2 has not
	check(when(1), when(2), archive.Unfinished{End: fork, Last: wal.Commit{Time: when(3)}}, 1)
}
