package restore_test

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/restore"
)

// ready lists what is in the directory of what is ready, by the segments' numbers and whatever else is there.
func (p place) ready() string {
	p.t.Helper()
	entries, err := os.ReadDir(p.own("pgsql_tmp.walfleet.ahead"))
	if err != nil && !os.IsNotExist(err) {
		p.t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		segment, rest, _ := strings.Cut(e.Name(), ".")
		for n := range 20 {
			if segment == name(1, n) && len(rest) == 16 {
				segment = string(rune('a' + n))
			}
		}
		names = append(names, segment)
	}
	return strings.Join(names, "")
}

func prefetching(r *restore.Request) { r.Prefetch = 3 }

// behind makes what comes after segment n ready.
func (p place) behind(n int) {
	p.t.Helper()
	if err := restore.Ahead(p.t.Context(), restore.Request{Archive: p.archive, Name: name(1, n), Path: p.path(), Prefetch: 3}); err != nil {
		p.t.Error(err)
	}
}

func (p place) expect(n int, want []byte, readyThen string) {
	p.t.Helper()
	if data, err := p.run(name(1, n), prefetching); err != nil || !bytes.Equal(data, want) {
		p.t.Errorf("segment %d: %d bytes, %v", n, len(data), err)
	}
	if got := p.ready(); got != readyThen {
		p.t.Errorf("after segment %d was asked for, %q are ready, not %q", n, got, readyThen)
	}
}

func TestPrefetch(t *testing.T) {
	w := full(10)
	p := newPlace(t)
	for n := range 10 {
		p.store(w, 1, n, []string{"", ".gz", ".lz4", ".zst"}[n%4])
	}
	p.expect(0, bytesOf(w, 0), "")
	p.behind(0)
	if got := p.ready(); got != "bcd" {
		t.Errorf("%q are ready", got)
	}
	p.expect(1, bytesOf(w, 1), "cd")
	p.expect(2, bytesOf(w, 2), "d")
	p.behind(2)
	p.expect(3, bytesOf(w, 3), "ef")

	// A recovery that begins again elsewhere finds nothing, and what is not of use to it goes.
	p.expect(7, bytesOf(w, 7), "ef")
	p.behind(7)
	p.expect(1, bytesOf(w, 1), "ij")
	p.behind(1)
	p.expect(2, bytesOf(w, 2), "de")

	// At the end there is nothing more, and a server that asks for histories neither begins nor goes on.
	p.behind(8)
	p.expect(9, bytesOf(w, 9), "")
	p.behind(9)
	p.behind(3)
	if _, err := p.run("00000002.history", prefetching); !notFound(err) {
		t.Error(err)
	}
	if _, err := os.Stat(p.own("pgsql_tmp.walfleet.ahead")); !os.IsNotExist(err) {
		t.Errorf("the directory is there after a history was asked for: %v", err)
	}
}

func TestPrefetchTakesNothingElse(t *testing.T) {
	w, other := full(4), load(4)
	other.Append(bytes.Repeat([]byte("other"), 10000))
	p := newPlace(t)
	for n := range 4 {
		p.store(w, 1, n, "")
	}
	dir := p.own("pgsql_tmp.walfleet.ahead")

	// Of an archive that has changed.
	p.behind(0)
	p.store(other, 1, 3, "")
	later := time.Now().Add(time.Second)
	if err := os.Chtimes(filepath.Join(p.archive, name(1, 3)), later, later); err != nil {
		t.Fatal(err)
	}
	p.expect(3, bytesOf(other, 3), "bcd")

	// Of another archive.
	q := p
	q.archive += ".other"
	if err := os.CopyFS(q.archive, os.DirFS(p.archive)); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(filepath.Join(p.archive, name(1, 1)))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(filepath.Join(q.archive, name(1, 1)), info.ModTime(), info.ModTime()); err != nil {
		t.Fatal(err)
	}
	q.expect(1, bytesOf(w, 1), "bcd")

	// Half of one, as no crash leaves it, and what one leaves.
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.Truncate(filepath.Join(dir, entries[0].Name()), mb/2); err != nil {
		t.Fatal(err)
	}
	if err := os.Rename(filepath.Join(dir, entries[1].Name()), filepath.Join(dir, entries[1].Name()+".tmp")); err != nil {
		t.Fatal(err)
	}
	p.write(filepath.Join(dir, "left"), nil)
	for n := 1; n < 3; n++ {
		if data, err := p.run(name(1, n), prefetching); err != nil || !bytes.Equal(data, bytesOf(w, n)) {
			t.Errorf("segment %d: %d bytes, %v", n, len(data), err)
		}
	}
	p.behind(1)
	if got := p.ready(); got != "cd" {
		t.Errorf("%q are ready", got)
	}

	// pg_rewind asks for a file under its own name: nothing is taken, and nothing else is to be made.
	r := restore.Request{Archive: p.archive, Name: name(1, 2), Path: p.own(name(1, 2)), Prefetch: 3}
	if err := restore.Run(t.Context(), r); err != nil || r.More() || p.ready() != "cd" {
		t.Errorf("%v, more: %t, ready: %s", err, r.More(), p.ready())
	}
}

// What is not good, or behind a gap, is for the call that asks for it.
func TestPrefetchStopsAtTrouble(t *testing.T) {
	w := full(6)
	p := newPlace(t)
	for n := range 6 {
		p.store(w, 1, n, "")
	}
	d, err := archive.Open(p.archive)
	if err != nil {
		t.Fatal(err)
	}
	gap := archive.Gap{Timeline: 1, From: begin + 3*mb - 8, To: begin + 3*mb, Time: time.Now()}
	if err := errors.Join(d.RecordGap(gap), d.Close()); err != nil {
		t.Fatal(err)
	}
	p.behind(0)
	if got := p.ready(); got != "b" {
		t.Errorf("%q are ready in front of a gap", got)
	}
	p.write(filepath.Join(p.archive, name(1, 4)), make([]byte, mb))
	err = restore.Ahead(t.Context(), restore.Request{Archive: p.archive, Name: name(1, 3), Path: p.path(), Prefetch: 1})
	if err == nil || p.ready() != "" {
		t.Errorf("%v; %q are ready, of a damaged segment", err, p.ready())
	}
}

// Several that make segments ready, and several that take them, at the same time.
func TestPrefetchAtTheSameTime(t *testing.T) {
	const segments = 12
	w := full(segments)
	p := newPlace(t)
	for n := range segments {
		p.store(w, 1, n, []string{"", ".gz", ".lz4", ".zst"}[n%4])
	}
	var makers errgroup.Group
	for n := range segments {
		if data, err := p.run(name(1, n), prefetching); err != nil || !bytes.Equal(data, bytesOf(w, n)) {
			t.Errorf("segment %d: %d bytes, %v", n, len(data), err)
		}
		for range 2 {
			makers.Go(func() error {
				err := restore.Ahead(t.Context(), restore.Request{Archive: p.archive, Name: name(1, n), Path: p.path(), Prefetch: 3})
				if errors.Is(err, os.ErrNotExist) {
					return nil // it was not the only one for a moment
				}
				return err
			})
		}
	}
	if err := makers.Wait(); err != nil {
		t.Error(err)
	}
}

// A server that is gone, and whose directory may be removed, ends what was to be made ready for it.
func TestPrefetchEndsWithTheServer(t *testing.T) {
	w := full(3)
	p := newPlace(t)
	for n := range 3 {
		p.store(w, 1, n, "")
	}
	pipe := filepath.Join(p.archive, name(1, 1))
	if err := errors.Join(os.Remove(pipe), unix.Mkfifo(pipe, 0o600)); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(pipe, os.O_RDWR|unix.O_NONBLOCK, 0) // so that nothing waits for it to be opened
	if err != nil {
		t.Fatal(err)
	}
	server := exec.Command("sleep", "1000")
	if err := server.Start(); err != nil {
		t.Fatal(err)
	}
	p.write(filepath.Join(p.data, "postmaster.pid"), fmt.Appendf(nil, "%d\n%s\n", server.Process.Pid, p.data))
	var g errgroup.Group
	g.Go(func() error {
		defer f.Close()
		return restore.Ahead(t.Context(), restore.Request{Archive: p.archive, Name: name(1, 0), Path: p.path(), Prefetch: 1})
	})
	g.Go(func() error { // more than a segment, in which it would stop
		server.Process.Kill()
		server.Wait()
		data := bytesOf(w, 1)
		for at := 0; at < mb-1; at += 4096 {
			if _, err := f.Write(data[at:min(at+4096, mb-1)]); err != nil {
				return nil // nobody reads any more
			}
			time.Sleep(time.Millisecond) // it has 50 to see it
		}
		return nil
	})
	if err := g.Wait(); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
}
