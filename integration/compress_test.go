package integration

import (
	"compress/gzip"
	"fmt"
	"io"
	"maps"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/walfleet/walfleet/internal/wal"
)

// decompressors read compressed segments, by their files' suffixes; that of gzip is another library than the one
// that compresses.
var decompressors = map[string]func(io.Reader) (io.Reader, error){
	".gz":  func(r io.Reader) (io.Reader, error) { return gzip.NewReader(r) },
	".lz4": func(r io.Reader) (io.Reader, error) { return lz4.NewReader(r), nil },
	".zst": func(r io.Reader) (io.Reader, error) { return zstd.NewReader(r, zstd.WithDecoderConcurrency(1)) },
}

// sealedFiles are the sealed segments in a directory by their files' names, and the compressed files that are not
// finished.
func sealedFiles(t testing.TB, dir string, size wal.SegmentSize) (sealed map[string]stored, temporary []string) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	sealed = map[string]stored{}
	for _, entry := range entries {
		name := entry.Name()
		suffix := filepath.Ext(name)
		if suffix == ".tmp" && decompressors[filepath.Ext(strings.TrimSuffix(name, suffix))] != nil {
			temporary = append(temporary, name)
		}
		segment, err := wal.ParseSegment(strings.TrimSuffix(name, suffix), size)
		if err == nil && (suffix == "" || decompressors[suffix] != nil) {
			sealed[name] = stored{segment, filepath.Join(dir, name), suffix, true}
		}
	}
	return sealed, temporary
}

// awaitStored waits until n sealed segments are there, and all of them as they are to be stored, but for the old
// ones, which stay as they were.
func awaitStored(t testing.TB, dir string, size wal.SegmentSize, n int, suffix string, old map[string]stored) map[string]stored {
	t.Helper()
	var have map[string]stored
	await(t, patience, fmt.Sprintf("%d sealed segments, the last ones with the suffix %q", n, suffix), func() (bool, string) {
		var temporary []string
		have, temporary = sealedFiles(t, dir, size)
		done := len(have) == n && len(temporary) == 0
		for name, s := range have {
			done = done && (s.suffix == suffix || old[name] == s)
		}
		return done, fmt.Sprint(slices.Sorted(maps.Keys(have)), temporary)
	})
	for name := range old {
		if _, still := have[name]; !still {
			t.Errorf("%s was stored, and is no longer there", name)
		}
	}
	return have
}

// TestCompressesSealedSegments goes through the methods, one process after the other, each of which is stopped in the
// middle of compressing and leaves that to the next one. What was stored before stays as it was.
func TestCompressesSealedSegments(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{})
	dir := t.TempDir()
	orders := filepath.Join(dir, "orders")
	segment := func() {
		s.write(t, 8)
		s.switchWAL(t)
	}
	finished := map[string]stored{} // stored as they are to stay
	there, stopped := 0, 0          // sealed segments; processes that were stopped while they compressed
	for _, tt := range []struct{ method, suffix string }{
		{"gzip:9", ".gz"}, {"lz4:12", ".lz4"}, {"zstd:22", ".zst"}, {"none", ""},
	} {
		p := startProgram(t, configText(dir, cluster("orders", s.conninfo(), fmt.Sprintf("compress = %q", tt.method))))
		p.stderr.await(t, "caught up, streaming")
		segment()
		finished = awaitStored(t, orders, s.size, there+1, tt.suffix, finished)

		segment()
		if tt.method == "none" {
			awaitSlotFlushed(t, s, "walfleet", s.size.Start(s.end(t)))
		}
		// No sleep: what is waited for is over in milliseconds.
		for begun := time.Now(); tt.method != "none" && time.Since(begun) < patience; {
			have, temporary := sealedFiles(t, orders, s.size)
			if len(temporary) > 0 || len(have) > len(finished) && !anyPlain(have) {
				break // it is being compressed, or was so fast
			}
		}
		p.signal(t, syscall.SIGTERM)
		if status := p.exit(t); status != 0 { // 1 when the shutdown took too long
			t.Errorf("%s: exit status %d", tt.method, status)
		}
		have, temporary := sealedFiles(t, orders, s.size)
		if len(temporary) > 0 {
			t.Errorf("%s: a process that was stopped left %s", tt.method, temporary)
		}
		there = len(have)
		if tt.method != "none" && anyPlain(have) {
			stopped++
		}
		maps.DeleteFunc(have, func(_ string, f stored) bool { return f.suffix == "" }) // the next one's work
		finished = have
	}
	t.Logf("%d of 3 processes were stopped while they compressed", stopped)
	found := map[string]int{}
	for _, segment := range compareStopped(t, orders, s, "walfleet") {
		if segment.sealed {
			found[segment.suffix]++
		}
	}
	if found[".gz"] == 0 || found[".lz4"] == 0 || found[".zst"] == 0 || found[""] == 0 {
		t.Errorf("sealed segments by their suffixes: %v", found)
	}
}

// TestKilledWhileCompressing kills the daemon with SIGKILL while it writes a compressed file, reads it back, or lets
// it take the plain one's place. Every segment is there at any time, and as the server has it; in the end they are
// all compressed, and nothing else is left.
func TestKilledWhileCompressing(t *testing.T) {
	t.Parallel()
	random := newRandom(t)
	s := startServer(t, serverOptions{})
	dir := t.TempDir()
	orders := filepath.Join(dir, "orders")
	methods := []struct{ method, suffix string }{{"gzip:6", ".gz"}, {"lz4:9", ".lz4"}, {"zstd:7", ".zst"}}
	config := func(n int) string {
		return configText(dir, cluster("orders", s.conninfo(), fmt.Sprintf("compress = %q", methods[n%3].method)))
	}

	kills := rounds(6, 50)
	written, both, other := 0, 0, 0 // kills while a file was written, while both files were there, and otherwise
	checked := map[string]bool{}
	sealed := map[wal.Segment]bool{} // at any time
	for n := 0; n < kills || written == 0 && n < 10*kills; n++ {
		p := startProgram(t, config(n))
		p.stderr.await(t, "caught up, streaming")
		s.write(t, 8)
		s.switchWAL(t)
		// No sleep: what is waited for is over in milliseconds.
		begun := time.Now()
		for seen := false; time.Since(begun) < 15*time.Second; {
			_, temporary := sealedFiles(t, orders, s.size)
			if len(temporary) > 0 && n%3 > 0 || len(temporary) == 0 && seen {
				break // it is being written, or has just got its name
			}
			seen = len(temporary) > 0
		}
		if n%3 == 1 {
			moment(random, 100*time.Millisecond)
		}
		p.signal(t, syscall.SIGKILL)
		p.exit(t)

		have, temporary := sealedFiles(t, orders, s.size)
		switch {
		case len(temporary) > 0:
			written++
		case len(twice(have)) > 0:
			both++
		default:
			other++
		}
		for _, f := range have {
			sealed[f.Segment] = true
		}
		there := map[wal.Segment]bool{}
		var pieces []piece
		for name, f := range have {
			there[f.Segment] = true
			if f.suffix == "" || !checked[name] {
				pieces = append(pieces, piece{f, int64(s.size)})
				checked[name] = true
			}
		}
		s.comparePieces(t, pieces)
		for segment := range sealed {
			if !there[segment] {
				t.Fatalf("%s is lost; there are %s", segment, slices.Sorted(maps.Keys(have)))
			}
		}
	}
	t.Logf("kills: %d while a file was written or read back, %d while it had its name and the plain one was there, %d at other times", written, both, other)
	if written == 0 {
		t.Error("no kill came while a file was written")
	}

	p := startProgram(t, config(0))
	awaitSlotFlushed(t, s, "walfleet", s.end(t))
	await(t, patience, "no segment is plain", func() (bool, string) {
		have, temporary := sealedFiles(t, orders, s.size)
		plain := slices.Collect(maps.Keys(have))
		plain = slices.DeleteFunc(plain, func(name string) bool { return have[name].suffix != "" })
		return len(plain)+len(temporary) == 0, fmt.Sprint(plain, temporary)
	})
	p.signal(t, syscall.SIGTERM)
	if status := p.exit(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	compareStopped(t, orders, s, "walfleet")
}

func anyPlain(files map[string]stored) bool {
	for _, f := range files {
		if f.suffix == "" {
			return true
		}
	}
	return false
}

// twice are the segments that are there in more than one file.
func twice(files map[string]stored) (found []wal.Segment) {
	n := map[wal.Segment]int{}
	for _, f := range files {
		if n[f.Segment]++; n[f.Segment] == 2 {
			found = append(found, f.Segment)
		}
	}
	return found
}
