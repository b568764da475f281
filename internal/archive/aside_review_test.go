package archive_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

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
