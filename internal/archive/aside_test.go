package archive_test

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// tear archives records up to record, and then a part of one more, of which the archive has the bytes up to end.
// The process is gone then.
func tear(t *testing.T, path string, record, end wal.LSN) (torn *pgtest.WAL) {
	t.Helper()
	torn = walTo(record)
	torn.Append(bytes.Repeat([]byte("torn"), 1<<20))
	d := open(t, path)
	bind(t, d, begin)
	w := openTail(t, d)
	write(t, w, torn, 50000, end)
	flush(t, w)
	d.Close()
	return torn
}

// A record that the server replaces after a crash is kept beside the archive, from its start to where the archive
// had it, in however many segments that is; the archive gets the server's bytes.
func TestReplacedRecordIsKeptAside(t *testing.T) {
	for name, tt := range map[string]struct {
		record, end wal.LSN
		lost        wal.LSN // a page of the torn record that a power loss took; 0: none
		kept        bool
		other       func(g *pgtest.WAL) // what the server wrote instead
	}{
		"another record": {begin + 20000, begin + 100<<10, 0, true, func(g *pgtest.WAL) { g.Append([]byte("instead")) }},
		"segments later": {begin + mb - 30000, begin + 3*mb - 4096, 0, true, func(g *pgtest.WAL) { g.Append([]byte("instead")) }},
		"given up":       {begin + 20000, begin + 100<<10, 0, true, func(g *pgtest.WAL) { g.Abort(bytes.Repeat([]byte("torn"), 1<<20), 4) }},
		"the same":       {begin + 20000, begin + 100<<10, 0, false, func(g *pgtest.WAL) { g.Append(bytes.Repeat([]byte("torn"), 1<<20)) }},
		"the same, lost": {begin + 20000, begin + 100<<10, begin + 9*wal.PageSize, false, func(g *pgtest.WAL) { g.Append(bytes.Repeat([]byte("torn"), 1<<20)) }},
	} {
		t.Run(name, func(t *testing.T) {
			path := t.TempDir()
			torn := tear(t, path, tt.record, tt.end)
			if tt.lost != 0 {
				f, err := os.OpenFile(filepath.Join(path, name1(0)), os.O_WRONLY, 0)
				if err != nil {
					t.Fatal(err)
				}
				defer f.Close()
				if _, err := f.WriteAt(make([]byte, wal.PageSize), int64(tt.lost-begin)); err != nil {
					t.Fatal(err)
				}
			}
			g := walTo(tt.record)
			tt.other(g)
			g.FillTo(g.End() + mb + 8)
			d := open(t, path)
			w := openTail(t, d)
			var taken *archive.Aborted
			for w.Pos() < g.End() {
				write(t, w, g, 7777, min(w.Pos()+7777, g.End()))
				if a := w.TakeAborted(); a != nil {
					taken = a
				}
			}
			flush(t, w)
			wantContent(t, path, g, g.End(), g.End())

			all := d.Aborted()
			if !tt.kept {
				if taken != nil || len(all) != 0 {
					t.Errorf("kept aside: %+v, %+v", taken, all)
				}
				return
			}
			if len(all) != 1 || taken == nil || *taken != all[0] {
				t.Fatalf("kept aside: %+v, %+v", taken, all)
			}
			a := all[0]
			if a.Timeline != 1 || a.LSN != tt.record || a.End < tt.end || a.End-tt.end > wal.PageSize {
				t.Errorf("%+v, want from %s to %s", a, tt.record, tt.end)
			}
			data, err := os.ReadFile(filepath.Join(path, a.File))
			if err != nil || !bytes.Equal(data[:tt.end-tt.record], torn.Bytes(tt.record, tt.end)) {
				t.Errorf("%s: %d bytes, %v: not what the archive had", a.File, len(data), err)
			}
			d.Close()
			if again := open(t, path).Aborted(); !slices.Equal(again, all) {
				t.Errorf("after a restart: %+v, want %+v", again, all)
			}
		})
	}
}

// The first of a record's segments can be sealed by the time at which a later one shows what the server wrote instead.
func TestRecordIsKeptAsideFromTheFirstSegmentThatIsNotSealed(t *testing.T) {
	base := func() *pgtest.WAL {
		g := walTo(begin + mb - 30000)
		g.Abort(bytes.Repeat([]byte("given up"), 1<<17), 6) // into the second segment
		g.Append([]byte("common"))
		return g
	}
	g, other := base(), base()
	common := g.End()
	g.Append(bytes.Repeat([]byte("torn"), 20000))
	other.Append(bytes.Repeat([]byte("other"), 20000))
	path := t.TempDir()
	d := open(t, path)
	bind(t, d, begin)
	write(t, openTail(t, d), g, 50000, common+40000) // and then the process is gone

	w := openTail(t, d)
	write(t, w, other, 5000, common)
	if sealed := flush(t, w); len(sealed) != 1 {
		t.Fatalf("sealed: %v", sealed)
	}
	write(t, w, other, 5000, other.End())
	flush(t, w)
	wantContent(t, path, other, other.End(), other.End())
	all := d.Aborted()
	if len(all) != 1 || all[0].LSN != begin+mb {
		t.Fatalf("%+v", all)
	}
	data, err := os.ReadFile(filepath.Join(path, all[0].File))
	if err != nil || !bytes.HasPrefix(data, g.Bytes(begin+mb, common+40000)) {
		t.Errorf("%d bytes, %v: not what the archive had", len(data), err)
	}
}

func name1(n int) string { return name(1, n) + ".partial" }

// Two records of one place, torn one after the other, are both kept.
func TestRecordThatIsReplacedTwiceIsKeptTwice(t *testing.T) {
	path := t.TempDir()
	record := begin + 20000
	tear(t, path, record, begin+100<<10)
	for i := range 2 {
		g := walTo(record)
		g.Append(bytes.Repeat([]byte{byte(i), 7}, 1<<20))
		d := open(t, path)
		w := openTail(t, d)
		write(t, w, g, 50000, begin+200<<10)
		flush(t, w)
		d.Close()
	}
	d := open(t, path)
	prefix := name(1, 0) + ".00004E20"
	if all := d.Aborted(); len(all) != 2 || all[0].File != prefix+".aborted" || all[1].File != prefix+".2.aborted" {
		t.Errorf("%+v", all)
	}
}

// Accepting a divergence keeps everything from its segment on under other names, and the archive goes on there.
func TestAcceptedDivergenceKeepsTheOldFiles(t *testing.T) {
	for what, at := range map[string]wal.LSN{"in the last segment": begin + 2*mb + 70000, "segments before": begin + mb + 5000, "in the first": begin + 100} {
		t.Run(what, func(t *testing.T) {
			path := t.TempDir()
			d := open(t, path)
			bind(t, d, begin)
			w := openTail(t, d)
			old := walTo(begin + 2*mb + 100<<10)
			write(t, w, old, 50000, old.End())
			flush(t, w)
			w.Close()
			before := files(t, path)

			v, err := d.AcceptDivergence(1, at, "the reason")
			if err != nil {
				t.Fatal(err)
			}
			restart := wal.SegmentSize(mb).Start(at)
			if v.Restart != restart || v.LSN != at || len(v.Kept) != int((begin+3*mb-restart)/mb) {
				t.Errorf("%+v", v)
			}
			after := files(t, path)
			for _, k := range v.Kept {
				if after[k.File] != before[k.Name] || !strings.HasSuffix(k.File, ".diverged") || after[k.Name] != "" {
					t.Errorf("%+v: %q, want %q", k, after[k.File], before[k.Name])
				}
			}

			other := newWAL() // the same up to the last record before the divergence
			for other.End() < complete(old, at) {
				other.Append(bytes.Repeat([]byte{byte(other.End() >> 8)}, 4000))
			}
			other.Append([]byte("the server's"))
			other.FillTo(begin + 3*mb + 9000)
			w = openTail(t, d)
			if w.Pos() != restart {
				t.Errorf("goes on at %s, want %s", w.Pos(), restart)
			}
			write(t, w, other, 50000, other.End())
			flush(t, w)
			wantContent(t, path, other, other.End(), other.End())
			d.Close()
			d = open(t, path)
			if all := d.Divergences(); len(all) != 1 || all[0].Reason != "the reason" || !slices.Equal(all[0].Kept, v.Kept) {
				t.Errorf("after a restart: %+v", all)
			}
			wantContent(t, path, other, other.End(), other.End())
		})
	}
}

// A crash in the middle of putting files aside is made good when the directory is opened; files that came later
// under the same names are left alone.
func TestInterruptedAcceptanceIsFinished(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	bind(t, d, begin)
	w := openTail(t, d)
	g := walTo(begin + 2*mb + 9000)
	write(t, w, g, 50000, g.End())
	flush(t, w)
	w.Close()
	before := files(t, path)
	v, err := d.AcceptDivergence(1, begin+100, "")
	if err != nil {
		t.Fatal(err)
	}
	d.Close()

	meta := filepath.Join(path, "archive.json")
	done, err := os.ReadFile(meta)
	if err != nil {
		t.Fatal(err)
	}
	var m map[string]any
	if err := json.Unmarshal(done, &m); err != nil {
		t.Fatal(err)
	}
	m["divergences"].([]any)[0].(map[string]any)["pending"] = true
	pending, err := json.Marshal(m)
	if err != nil {
		t.Fatal(err)
	}
	for n := range len(v.Kept) + 1 { // files that have their new names
		if err := os.WriteFile(meta, pending, 0o600); err != nil {
			t.Fatal(err)
		}
		for _, k := range v.Kept[n:] {
			if err := os.Rename(filepath.Join(path, k.File), filepath.Join(path, k.Name)); err != nil {
				t.Fatal(err)
			}
		}
		open(t, path).Close()
		after := files(t, path)
		for _, k := range v.Kept {
			if after[k.File] != before[k.Name] || after[k.Name] != "" {
				t.Errorf("%d of %d done: %s is %q, want %q", n, len(v.Kept), k.File, after[k.File], before[k.Name])
			}
		}
	}

	// The kept files are gone, and new ones are there: nothing is put aside again.
	for _, k := range v.Kept {
		if err := os.Rename(filepath.Join(path, k.File), filepath.Join(path, k.Name)); err != nil {
			t.Fatal(err)
		}
	}
	open(t, path).Close()
	if after := files(t, path); after[v.Kept[0].Name] != before[v.Kept[0].Name] {
		t.Error("a newer file was put aside")
	}
}

func bind(t *testing.T, d *archive.Dir, start wal.LSN) {
	t.Helper()
	if err := d.Bind(identity, archive.Origin{Timeline: 1, LSN: start, Source: "slot"}); err != nil {
		t.Fatal(err)
	}
}

// After a divergence was accepted the archive goes on where the decision says, wherever that is.
func TestAcceptedDivergenceGoesOnWhereItSays(t *testing.T) {
	t.Run("before a gap", func(t *testing.T) {
		d := open(t, t.TempDir())
		bind(t, d, begin)
		g := walTo(begin + 6*mb + 9000)
		w := openTail(t, d)
		write(t, w, g, 50000, begin+2*mb+5000)
		flush(t, w)
		from := w.Durable()
		w.Close()
		if err := d.RecordGap(archive.Gap{Timeline: 1, From: from, To: begin + 4*mb}); err != nil {
			t.Fatal(err)
		}
		w = openTail(t, d)
		write(t, w, g, 50000, g.End())
		flush(t, w)
		w.Close()
		// The server was put back to a time before the gap.
		v, err := d.AcceptDivergence(1, begin+mb+777, "ends there")
		if err != nil {
			t.Fatal(err)
		}
		if tail, ok, err := d.Tail(mb); err != nil || !ok || tail.Start != v.Restart {
			t.Errorf("the archive goes on at %s (%v, %v), and was to go on at %s", tail.Start, ok, err, v.Restart)
		}
	})
	t.Run("older segments were pruned", func(t *testing.T) {
		path := t.TempDir()
		d := open(t, path)
		bind(t, d, begin)
		g := walTo(begin + 5*mb + 9000)
		w := openTail(t, d)
		write(t, w, g, 50000, g.End())
		flush(t, w)
		w.Close()
		for n := range 3 { // as pg_archivecleanup does
			if err := os.Remove(filepath.Join(path, name(1, n))); err != nil {
				t.Fatal(err)
			}
		}
		v, err := d.AcceptDivergence(1, begin+3*mb+777, "ends there")
		if err != nil {
			t.Fatal(err)
		}
		tail, ok, err := d.Tail(mb)
		if err != nil || !ok || tail.Start != v.Restart {
			t.Errorf("the archive goes on at %s (%v, %v), and was to go on at %s", tail.Start, ok, err, v.Restart)
		}
	})
}

// A divergence that was accepted at a segment's start is accepted for a timeline that forks off in that segment, too.
func TestAcceptedDivergenceHoldsForTheNextTimeline(t *testing.T) {
	d := open(t, t.TempDir())
	bind(t, d, begin)
	old := walTo(begin + mb)
	w := openTail(t, d)
	write(t, w, old, 50000, begin+mb)
	flush(t, w)
	w.Close()
	if _, err := d.AcceptDivergence(1, begin+mb, "differs"); err != nil {
		t.Fatal(err)
	}
	other := newWAL()
	other.Append([]byte("the other's"))
	other.FillTo(begin + mb)
	other.Append([]byte("goes on"))
	w = openTail(t, d)
	write(t, w, other, 50000, other.End())
	flush(t, w)
	w.Close()
	next := other.Fork(other.End(), 2)
	next.Append([]byte("of timeline 2"))
	if _, err := d.StoreHistory(2, fmt.Appendf(nil, "1\t%s\tno reason\n", other.End())); err != nil {
		t.Fatal(err)
	}
	w, err := d.OpenWriter(context.Background(), identity, 2, begin+mb)
	if err != nil {
		t.Fatal(err)
	}
	defer w.Close()
	if err := w.Write(w.Pos(), next.Bytes(w.Pos(), next.End())); err != nil {
		t.Errorf("a person's word is needed again: %v", err)
	}
}

// What complete records after one that was given up prove was acknowledged, and is compared like all other WAL.
func TestDivergenceAfterARecordThatWasGivenUpIsNoAbortedRecord(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	bind(t, d, begin)
	base := func() *pgtest.WAL {
		g := walTo(begin + 20000)
		g.Abort(bytes.Repeat([]byte("torn"), 1<<20), 4)
		g.Append([]byte("common"))
		return g
	}
	g := base()
	for range 10 {
		g.Append(bytes.Repeat([]byte("ours"), 2000))
	}
	w := openTail(t, d)
	write(t, w, g, 50000, g.End())
	flush(t, w)
	acknowledged := w.Durable()
	if acknowledged != g.End() {
		t.Fatalf("durable %s, want %s", acknowledged, g.End())
	}
	w.Close()
	before := files(t, path)[name1(0)]

	other := base()
	for range 10 {
		other.Append(bytes.Repeat([]byte("them"), 2000))
	}
	w = openTail(t, d)
	t.Logf("acknowledged %s; opened again: durable %s, goes on at %s", acknowledged, w.Durable(), w.Pos())
	err := error(nil)
	for err == nil && w.Pos() < other.End() {
		err = w.Write(w.Pos(), other.Bytes(w.Pos(), min(w.Pos()+5000, other.End())))
	}
	var diverged *archive.DivergenceError
	if !errors.As(err, &diverged) {
		t.Errorf("other WAL below the acknowledged %s: error %v, kept as an aborted record: %+v", acknowledged, err, w.TakeAborted())
	}
	if after := files(t, path)[name1(0)]; after != before {
		t.Error("acknowledged bytes were overwritten without a decision")
	}
}

// No CRC speaks for a record that was given up: where a power loss brought back what was there before, that is no
// divergence.
func TestOldBytesInARecordThatWasGivenUpAreReplaced(t *testing.T) {
	path := t.TempDir()
	g := walTo(begin + 20000)
	g.Abort(bytes.Repeat([]byte("torn"), 1<<20), 6)
	for range 10 {
		g.Append(bytes.Repeat([]byte("ours"), 2000))
	}
	d := open(t, path)
	bind(t, d, begin)
	write(t, openTail(t, d), g, 50000, g.End()) // and then the power is gone
	f, err := os.OpenFile(filepath.Join(path, name1(0)), os.O_WRONLY, 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := f.WriteAt(bytes.Repeat([]byte{7}, 1024), 42<<10); err != nil {
		t.Fatal(err)
	}
	f.Close()

	w := openTail(t, d)
	write(t, w, g, 5000, g.End())
	flush(t, w)
	wantContent(t, path, g, g.End(), g.End())
	if all := d.Aborted(); len(all) != 1 || all[0].LSN != begin+20000 {
		t.Errorf("kept aside: %+v", all)
	}
}

// Readers that are in the group can still read archive.json after a decision.
func TestArchiveJSONStaysGroupReadable(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	d.SetGroupReadable(true)
	bind(t, d, begin)
	w := openTail(t, d)
	g := walTo(begin + 9000)
	write(t, w, g, 50000, g.End())
	flush(t, w)
	w.Close()
	d.Close()
	before, err := os.Stat(filepath.Join(path, "archive.json"))
	if err != nil {
		t.Fatal(err)
	}
	d = open(t, path) // as acceptDivergence does
	if _, err := d.AcceptDivergence(1, begin+100, ""); err != nil {
		t.Fatal(err)
	}
	if after, err := os.Stat(filepath.Join(path, "archive.json")); err != nil || after.Mode() != before.Mode() {
		t.Errorf("mode %v, was %v (%v)", after.Mode(), before.Mode(), err)
	}
}
