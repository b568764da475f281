package integration

import (
	"bytes"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/verify"
	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// origins tells on which server the WAL of a timeline was written.
type origins map[wal.Timeline]*server

// stored is a segment's file in an archive.
type stored struct {
	wal.Segment
	path   string
	suffix string // of its compression
	sealed bool
}

// piece is the beginning of a WAL file.
type piece struct {
	stored
	length int64 // in bytes
}

// compareArchive fails the test unless the archive of a stopped receiver is what the servers have in
// pg_wal: sealed segments and histories byte for byte, unsealed segments as far as walfleet acknowledged
// them, or up to where the next timeline forks; without a hole, and readable for their owner alone. It
// returns the archive's segments in order.
func compareArchive(t testing.TB, dir string, st receiver.Status, from origins) []stored {
	t.Helper()
	segments, histories := listArchive(t, dir, st.SegmentSize)
	checkHoles(t, segments, st)
	wanted := map[wal.Timeline][]piece{}
	for _, s := range segments {
		length := int64(s.Size)
		if !s.sealed {
			end := st.Flushed
			if s.Timeline < st.Timeline {
				end, _ = histories[st.Timeline].End(s.Timeline)
			}
			length = int64(min(max(end, s.Start), s.End()) - s.Start)
		} else if s.Timeline == st.Timeline && s.End() > st.Flushed {
			t.Errorf("%s is sealed, but acknowledged is WAL up to %s only", s, st.Flushed)
		}
		wanted[s.Timeline] = append(wanted[s.Timeline], piece{s, length})
	}
	for tli, pieces := range wanted {
		if from[tli] == nil {
			t.Fatalf("timeline %d in the archive", tli)
		}
		from[tli].comparePieces(t, pieces)
	}
	for tli := range histories {
		if server := from[tli]; server != nil {
			name := wal.HistoryName(tli)
			theirs := server.shell(t, `cat "$1"`, path.Join(server.data, "pg_wal", name))
			if ours := strings.TrimSpace(string(readFile(t, filepath.Join(dir, name)))); ours != theirs {
				t.Errorf("%s: %q in the archive, %q on the server", name, ours, theirs)
			}
		}
	}
	verifyArchive(t, dir, verify.Options{}) // which knows nothing of the servers
	return segments
}

// listArchive reads an archive's directory. It fails the test for a name or a mode that does not belong
// there.
func listArchive(t testing.TB, dir string, size wal.SegmentSize) (segments []stored, histories map[wal.Timeline]wal.History) {
	t.Helper()
	histories = map[wal.Timeline]wal.History{}
	info, err := os.Stat(dir)
	if err != nil {
		t.Fatal(err)
	}
	if info.Mode() != os.ModeDir|0o700 {
		t.Errorf("%s: mode %v, want 0700", dir, info.Mode())
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		name := filepath.Join(dir, entry.Name())
		info, err := entry.Info()
		if err != nil {
			t.Fatal(err)
		}
		if info.Mode() != 0o600 {
			t.Errorf("%s: mode %v, want 0600", entry.Name(), info.Mode())
		}
		if entry.Name() == ".lock" || entry.Name() == "archive.json" {
			continue
		}
		if tli, err := wal.ParseHistoryName(entry.Name()); err == nil {
			if histories[tli], err = wal.ParseHistory(tli, readFile(t, name)); err != nil {
				t.Error(err)
			}
			continue
		}
		base, partial := strings.CutSuffix(entry.Name(), ".partial")
		suffix := filepath.Ext(base)
		if partial || decompressors[suffix] == nil {
			suffix = ""
		}
		segment, err := wal.ParseSegment(strings.TrimSuffix(base, suffix), size)
		if err != nil {
			t.Errorf("%s does not belong into an archive", entry.Name())
			continue
		}
		if suffix == "" && info.Size() != int64(size) {
			t.Errorf("%s has %d bytes, want %d", entry.Name(), info.Size(), size)
		}
		segments = append(segments, stored{segment, name, suffix, !partial})
	}
	slices.SortFunc(segments, func(a, b stored) int { return strings.Compare(a.path, b.path) })
	return segments, histories
}

// checkHoles fails the test unless each timeline's segments follow each other, all sealed before the one that walfleet
// has acknowledged last, and the last one of all is the one that it is at.
func checkHoles(t testing.TB, segments []stored, st receiver.Status) {
	t.Helper()
	for i, s := range segments {
		if i+1 == len(segments) {
			if s.Timeline != st.Timeline || s.End() < st.Flushed {
				t.Errorf("the archive ends with %s, but acknowledged is WAL up to timeline %d, %s", s, st.Timeline, st.Flushed)
			}
			return
		}
		next := segments[i+1]
		switch {
		case next.Segment == s.Segment:
			t.Errorf("%s is there twice", s)
		case next.Timeline == s.Timeline && next.Start != s.End():
			t.Errorf("%s is followed by %s", s, next)
		case next.Timeline == s.Timeline && !s.sealed && s.End() <= st.Flushed: // else the record that crosses its end is not complete
			t.Errorf("%s is not sealed, and acknowledged is WAL up to %s", s, st.Flushed)
		case next.Timeline != s.Timeline && next.Start > s.End():
			t.Errorf("%s is followed by %s", s, next)
		}
	}
	if len(segments) == 0 {
		t.Error("the archive is empty")
	}
}

// comparePieces compares checksums, made by the container and by us; large segments stay where they are.
func (s *server) comparePieces(t testing.TB, pieces []piece) {
	t.Helper()
	args := []string{path.Join(s.data, "pg_wal")}
	for _, p := range pieces {
		args = append(args, p.Name(), strconv.FormatInt(p.length, 10))
	}
	const script = `cd "$1"; shift
		while [ $# -gt 0 ]; do
			if [ -f "$1" ]; then head -c "$2" "$1" | sha256sum; else echo missing; fi
			shift 2
		done`
	sums := strings.Split(s.shell(t, script, args...), "\n")
	if len(sums) != len(pieces) {
		t.Fatalf("%d checksums of %d pieces", len(sums), len(pieces))
	}
	for i, p := range pieces {
		theirs, _, _ := strings.Cut(sums[i], " ")
		if ours := checksum(t, p); ours != theirs {
			t.Errorf("%s: the first %d bytes differ from the server's: SHA-256 %s, the server's %s%s", filepath.Base(p.path), p.length, ours, theirs, s.difference(t, p))
		}
	}
}

// checksum is of the piece's content, decompressed. A compressed file must hold a whole segment and nothing more.
func checksum(t testing.TB, p piece) string {
	t.Helper()
	f, err := os.Open(p.path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	content := io.Reader(f)
	if p.suffix != "" {
		if content, err = decompressors[p.suffix](f); err != nil {
			t.Fatalf("%s: %v", p.path, err)
		}
	}
	h := sha256.New()
	if _, err := io.CopyN(h, content, p.length); err != nil {
		t.Fatalf("%s: %v", p.path, err)
	}
	if p.suffix != "" {
		if more, err := io.Copy(io.Discard, content); more > 0 || err != nil || p.length != int64(p.Size) {
			t.Errorf("%s holds %d bytes and %d more, a segment has %d; %v", p.path, p.length, more, p.Size, err)
		}
	}
	return hex.EncodeToString(h.Sum(nil))
}

// difference says where a small segment differs.
func (s *server) difference(t testing.TB, p piece) string {
	if p.Size > 16*megabyte || p.suffix != "" {
		return ""
	}
	f, err := s.ctr.CopyFileFromContainer(t.Context(), path.Join(s.data, "pg_wal", p.Name()))
	if err != nil {
		return ""
	}
	defer f.Close()
	theirs, err := io.ReadAll(io.LimitReader(f, p.length))
	if err != nil {
		return ""
	}
	ours := readFile(t, p.path)[:len(theirs)]
	for i := range ours {
		if ours[i] != theirs[i] {
			return fmt.Sprintf("; the first different byte is %d (%s): %s", i, p.Start+wal.LSN(i), excerpt(ours[i:], theirs[i:]))
		}
	}
	return ""
}

func excerpt(a, b []byte) string {
	n := min(len(a), 16)
	if bytes.Equal(a[:n], make([]byte, n)) {
		return "zeros in the archive"
	}
	return fmt.Sprintf("%x in the archive, %x on the server", a[:n], b[:n])
}

func readFile(t testing.TB, name string) []byte {
	t.Helper()
	data, err := os.ReadFile(name)
	if err != nil {
		t.Fatal(err)
	}
	return data
}

// countSealed is the number of segments that have their final name.
func countSealed(segments []stored) int {
	n := 0
	for _, s := range segments {
		if s.sealed {
			n++
		}
	}
	return n
}

// listing is what can be seen of a directory's files from outside: equal listings mean that nothing has
// changed.
func listing(t testing.TB, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var b strings.Builder
	for _, entry := range entries {
		info, err := entry.Info()
		if err != nil {
			t.Fatal(err)
		}
		fmt.Fprintf(&b, "%s %d %s\n", info.Name(), info.Size(), info.ModTime().Format(time.RFC3339Nano))
	}
	return b.String()
}
