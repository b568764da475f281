package archive_test

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
)

func peek(t *testing.T, path string) archive.Holdings {
	t.Helper()
	h, err := archive.Peek(t.Context(), path)
	if err != nil {
		t.Fatal(err)
	}
	return h
}

// listing is everything about a directory that a reader must leave as it is.
func listing(t *testing.T, path string) string {
	t.Helper()
	var b strings.Builder
	entries, err := os.ReadDir(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintln(&b, info.Name(), info.Mode(), info.Size(), info.ModTime())
	}
	return b.String()
}

func TestPeekTellsWhatADirectoryHolds(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	origin := archive.Origin{Timeline: 1, LSN: begin, Source: "slot", Time: time.Now().UTC().Truncate(time.Second)}
	if err := d.Bind(identity, origin); err != nil {
		t.Fatal(err)
	}
	gap := archive.Gap{Timeline: 1, From: begin + 5, To: begin + 4*mb, Reason: "removed", Time: origin.Time}
	if err := d.RecordGap(gap); err != nil {
		t.Fatal(err)
	}
	put := func(file string, size int64, age time.Duration) {
		t.Helper()
		file = filepath.Join(path, file)
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := os.Truncate(file, size); err != nil {
			t.Fatal(err)
		}
		if at := origin.Time.Add(-age); os.Chtimes(file, at, at) != nil {
			t.Fatal("no times of files")
		}
	}
	put(name(1, 0), mb, time.Hour)
	put(name(1, 4)+".gz", 1000, time.Hour) // compressed, and its plain file still there
	put(name(1, 4), mb, time.Hour)
	put(name(1, 5)+".zst", 2000, time.Hour)
	put(name(1, 9)+".partial", mb, time.Hour) // of before the change of timeline
	put(name(2, 6), mb, time.Minute)
	put(name(2, 7)+".partial", mb, 0)
	put(name(2, 7)+".00001000.aborted", 10, 0)
	put(name(1, 9)+".diverged", 10, 0)
	put("00000003.history", 10, 0)
	put("somebody's notes", 10, 0)

	before := listing(t, path)
	h := peek(t, path)
	if after := listing(t, path); after != before {
		t.Errorf("the directory was changed, from\n%s to\n%s", before, after)
	}
	if !h.Bound || h.Identity != identity || h.Origin != origin || len(h.Gaps) != 1 || h.Gaps[0] != gap {
		t.Errorf("archive.json: %+v", h)
	}
	if h.Segments != 4 || h.Compressed != 1 || h.Bytes != 3*mb+3000 || h.Aside != 2 || h.Timeline != 3 {
		t.Errorf("segments: %+v", h)
	}
	if h.First.Name() != name(1, 0) || h.Last.Name() != name(2, 6) || h.Sealed() != begin+7*mb {
		t.Errorf("from %s to %s, %s", h.First, h.Last, h.Sealed())
	}
	if len(h.Partial) != 2 || h.Partial[0].Name() != name(2, 7) || h.Partial[1].Name() != name(1, 9) || h.Partial[0].Bytes != mb {
		t.Errorf("partial: %+v", h.Partial)
	}
	if !h.Modified.Equal(origin.Time) {
		t.Errorf("modified %s, want %s", h.Modified, origin.Time)
	}
	if h.Free <= 0 || h.Total < h.Free {
		t.Errorf("%d bytes free of %d", h.Free, h.Total)
	}
}

// Segments that another program put there are counted by what their headers say.
func TestPeekWithoutAnArchiveJSON(t *testing.T) {
	path := place(t)
	if h := peek(t, path); h.Bound || h.Segments != 0 || h.Sealed() != 0 || h.Timeline != 0 {
		t.Errorf("an empty directory: %+v", h)
	}
	g := walTo(begin + mb)
	if err := os.WriteFile(filepath.Join(path, name(1, 0)), g.Bytes(begin, begin+mb), 0o600); err != nil {
		t.Fatal(err)
	}
	if h := peek(t, path); h.Bound || h.Identity != identity || h.Segments != 1 || h.Sealed() != begin+mb {
		t.Errorf("a segment of pg_receivewal's: %+v", h)
	}
}

func TestPeekSaysWhyItSeesNothing(t *testing.T) {
	if _, err := archive.Peek(t.Context(), filepath.Join(t.TempDir(), "none")); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("no directory: %v", err)
	}
	path := place(t, "archive.json = {", name(1, 0)+" = "+string(walTo(begin+mb).Bytes(begin, begin+mb)))
	h, err := archive.Peek(t.Context(), path)
	if !isFileError(err) || h.Bound || h.Segments != 1 {
		t.Errorf("a damaged archive.json: %v, %+v", err, h)
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := archive.Peek(ctx, path); !errors.Is(err, context.Canceled) {
		t.Errorf("canceled: %v", err)
	}
}

// It takes no lock, and none is in its way; what the writer renames meanwhile is no error.
func TestPeekWhileSomebodyArchives(t *testing.T) {
	path := t.TempDir()
	d := open(t, path)
	if err := d.Bind(identity, archive.Origin{Timeline: 1, LSN: begin}); err != nil {
		t.Fatal(err)
	}
	w, g := openTail(t, d), walTo(begin+20*mb)
	var wait sync.WaitGroup
	done := make(chan struct{})
	wait.Go(func() {
		defer close(done)
		data := g.Bytes(begin, g.End())
		for pos := begin; pos < g.End(); pos += 256 << 10 {
			n := min(int(g.End()-pos), 256<<10)
			if err := w.Write(pos, data[pos-begin:][:n]); err != nil {
				t.Error(err)
				return
			}
			if _, err := w.Flush(); err != nil {
				t.Error(err)
				return
			}
		}
	})
	for ended := false; !ended; {
		select {
		case <-done:
			ended = true
		default:
		}
		peek(t, path)
	}
	wait.Wait()
	if h := peek(t, path); h.Segments < 19 {
		t.Errorf("in the end: %+v", h)
	}
}
