package integration

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/moby/moby/client"
	"github.com/testcontainers/testcontainers-go"

	"github.com/walfleet/walfleet/internal/wal"
)

// A leg is one program's turn to archive into a directory that it shares with others.
type leg struct {
	run    func(h *handOver) *process
	signal string // that ends it
	damage string // what happens to the directory then, in the shell, with the last partial file as $1
}

// handOver is a directory and a slot that go from one program to the next while the server is written to.
type handOver struct {
	t         *testing.T
	s         *server
	slot, dir string
	compress  string // of -Z
}

// receivewal archives with a pg_receivewal.
func receivewal(tool tool, args ...string) func(*handOver) *process {
	return func(h *handOver) *process {
		return h.s.launch(h.t, tool, false, []string{"PGUSER=walfleet"}, append([]string{"pg_receivewal",
			"-n", "-v", "-s", "1", "-S", h.slot, "-D", h.dir, "-Z", h.compress}, args...)...)
	}
}

// daemonized archives with "walfleet run".
func daemonized(h *handOver) *process {
	settings := []string{fmt.Sprintf("slot = %q", h.slot)}
	if h.compress != "none" {
		settings = append(settings, fmt.Sprintf("compress = %q", h.compress))
	}
	config := configText(path.Dir(h.dir), cluster(path.Base(h.dir), "host=/var/run/postgresql user=walfleet", settings...))
	file := h.dir + ".toml"
	runtime := h.s.directory(h.t, h.slot+"_run") // one control socket each
	h.s.shell(h.t, `printf %s "$2" >"$1"`, file, fmt.Sprintf("runtime_dir = %q\n", runtime)+config)
	return h.s.launch(h.t, ours, false, nil, "walfleet", "run", "-c", file)
}

// TestHandOver lets the original, ours and the daemon archive into one directory by turns, each beginning in the middle
// of the segment in which the one before was stopped or killed. Nothing is missing from what they leave, and no byte
// differs.
func TestHandOver(t *testing.T) {
	t.Parallel()
	s := receivewalServer(t, serverOptions{})
	load := startLoadOnDemand(t, s)
	their, our := receivewal(original), receivewal(ours)
	for _, tt := range []struct {
		name string
		legs []leg
	}{
		{"by turns", []leg{{their, "TERM", ""}, {our, "TERM", ""}, {their, "KILL", ""}, {our, "KILL", ""}, {their, "INT", ""}, {our, "INT", ""}}},
		{"ours first", []leg{{our, "KILL", ""}, {their, "KILL", ""}, {our, "TERM", ""}, {their, "TERM", ""}}},
		{"the daemon", []leg{{their, "TERM", ""}, {daemonized, "TERM", ""}, {their, "KILL", ""}, {daemonized, "KILL", ""}, {our, "KILL", ""}, {daemonized, "TERM", ""}, {their, "TERM", ""}}},
	} {
		for _, compress := range []string{"none", "gzip", "lz4"} {
			t.Run(tt.name+", "+compress, func(t *testing.T) {
				t.Parallel()
				s.handOver(t, load, compress, tt.legs)
			})
		}
	}
	t.Run("ours and the daemon, zstd", func(t *testing.T) {
		t.Parallel()
		s.handOver(t, load, "zstd", []leg{{our, "TERM", ""}, {daemonized, "KILL", ""}, {our, "KILL", ""}, {daemonized, "TERM", ""}})
	})
	for _, tt := range []struct{ name, compress, damage string }{
		{"with garbage at its end", "gzip", `printf garbage >>"$1"`},
		{"cut off", "gzip", `truncate -s 200 "$1"`},
		{"empty", "gzip", `truncate -s 0 "$1"`},
		{"with garbage at its end", "lz4", `printf garbage >>"$1"`},
		{"cut off", "lz4", `truncate -s 200 "$1"`},
		{"empty", "lz4", `truncate -s 0 "$1"`},
		{"cut off", "none", `truncate -s 100000 "$1"`},
		{"empty", "none", `truncate -s 0 "$1"`},
	} {
		t.Run("after a partial file "+tt.name+", "+tt.compress, func(t *testing.T) {
			t.Parallel()
			s.handOver(t, load, tt.compress, []leg{{their, "TERM", tt.damage}, {our, "TERM", ""}})
		})
	}
}

// loadOnDemand writes about a megabyte a second while somebody waits for WAL, so that a slow machine has no more to
// archive than a fast one.
type loadOnDemand struct {
	wanted atomic.Uint64
}

// want has WAL written up to lsn, and a segment more: a program is ended while there is still some to receive.
func (l *loadOnDemand) want(lsn wal.LSN) {
	for {
		wanted := l.wanted.Load()
		if wanted >= uint64(lsn) || l.wanted.CompareAndSwap(wanted, uint64(lsn)) {
			return
		}
	}
}

// startLoadOnDemand starts a load that lives until the end of the test.
func startLoadOnDemand(t testing.TB, s *server) *loadOnDemand {
	t.Helper()
	s.query(t, "CREATE TABLE paced (i bigint, t text)")
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	conn, err := s.connect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	l := new(loadOnDemand)
	go func() {
		defer close(ended)
		defer conn.Close(context.WithoutCancel(ctx))
		pace := time.NewTicker(50 * time.Millisecond)
		defer pace.Stop()
		for n := 0; ; n++ {
			select {
			case <-ctx.Done():
				return
			case <-pace.C:
			}
			sql := "INSERT INTO paced SELECT i, repeat(md5(i::text), 5) FROM generate_series(1, 200) i"
			if n%5 == 0 { // spans several pages
				sql = "SELECT pg_logical_emit_message(true, 'walfleet', repeat('large ', 10000))"
			}
			stop := wal.LSN(l.wanted.Load()) + wal.LSN(s.size)
			_, err := conn.Exec(ctx, fmt.Sprintf("%s WHERE pg_current_wal_insert_lsn() < '%s'", sql, stop)).ReadAll()
			if err != nil && ctx.Err() == nil {
				t.Errorf("the load: %v", err)
				return
			}
		}
	}()
	t.Cleanup(func() {
		cancel()
		<-ended
	})
	return l
}

func (s *server) handOver(t *testing.T, load *loadOnDemand, compress string, legs []leg) {
	slot := fmt.Sprintf("hand_over_%d", processes.Add(1))
	s.query(t, "SELECT pg_create_physical_replication_slot('"+slot+"', true)")
	start := s.lsn(t, "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = '"+slot+"'")
	h := &handOver{t: t, s: s, slot: slot, dir: s.directory(t, slot), compress: compress}
	inSegment, oursLast := 0, false
	for i, leg := range legs {
		acknowledged(t, s, slot)
		target := s.end(t) + wal.LSN(s.size)/4
		if i+1 == len(legs) {
			target = s.end(t) + 2*wal.LSN(s.size)
		}
		load.want(target)
		p := leg.run(h)
		oursLast = p.tool == ours
		p.slot = slot
		p.awaitWritten(t, target)
		p.signal(t, leg.signal)
		if status := p.wait(t); status != 0 && leg.signal != "KILL" {
			t.Errorf("leg %d: exit status %d", i, status)
		}
		partials := strings.Fields(s.shell(t, `cd "$1"; ls | grep partial$ || true`, h.dir))
		if len(partials) > 0 {
			inSegment++
			if leg.damage != "" {
				s.shell(t, `cd "$1"; set -- "$2"; `+leg.damage, h.dir, partials[len(partials)-1])
			}
		}
	}
	if inSegment == 0 {
		t.Error("no program was stopped in the middle of a segment")
	}
	s.compareHandedOver(t, h, start, oursLast)
}

// compareHandedOver compares the archive of a hand-over with the server's own WAL, from the start of the slot on.
func (s *server) compareHandedOver(t *testing.T, h *handOver, start wal.LSN, oursLast bool) {
	t.Helper()
	dir := s.fetch(t, h.dir)
	segments := decompress(t, dir, s.size)
	next := s.size.Start(start)
	var sealed []piece
	for _, segment := range segments {
		if !segment.sealed {
			continue
		}
		if segment.Start != next {
			t.Errorf("%s follows WAL up to %s", segment, next)
		}
		next = segment.End()
		sealed = append(sealed, piece{segment, int64(s.size)})
	}
	complete := map[wal.LSN]bool{}
	for _, piece := range sealed {
		complete[piece.Start] = true
	}
	for _, segment := range segments { // the original leaves the plain partial files that it does not go on with
		if !segment.sealed && segment.Start < next && (!oursLast || complete[segment.Start]) {
			continue
		}
		if !segment.sealed && segment.Start != next {
			t.Errorf("%s is partial, sealed is WAL up to %s", filepath.Base(segment.path), next)
		}
	}
	if next < start+wal.LSN(s.size) {
		t.Fatalf("sealed is WAL up to %s only, of a slot that began at %s", next, start)
	}
	s.comparePieces(t, sealed)

	// A reader that is neither of ours follows the records, to the last one that is complete in sealed segments.
	plain := path.Join("/tmp/plain", h.slot)
	s.push(t, dir, plain)
	out := s.shell(t, `
		# The last complete record begins before the end that pg_waldump complains about, and only there may it.
		pg_waldump --quiet --path="$1" --start="$2" --end="$3" 2>&1 || true`, plain, start.String(), (next - 1).String())
	if strings.Count(out, "\n") > 0 || out != "" && !strings.Contains(out, next.String()) && !strings.Contains(out, "could not find file") {
		t.Errorf("pg_waldump: %s", out)
	}
}

// fetch copies a directory out of the container.
func (s *server) fetch(t testing.TB, dir string) string {
	t.Helper()
	local := t.TempDir()
	s.engine(t, func(ctx context.Context, c *testcontainers.DockerClient, id string) error {
		copied, err := c.CopyFromContainer(ctx, id, client.CopyFromContainerOptions{SourcePath: dir})
		if err != nil {
			return err
		}
		defer copied.Content.Close()
		files := tar.NewReader(copied.Content)
		for {
			header, err := files.Next()
			if errors.Is(err, io.EOF) {
				return nil
			}
			if err != nil {
				return err
			}
			if header.Typeflag != tar.TypeReg {
				continue
			}
			data, err := io.ReadAll(files)
			if err != nil {
				return err
			}
			if err := os.WriteFile(filepath.Join(local, path.Base(header.Name)), data, 0o600); err != nil {
				return err
			}
		}
	})
	return local
}

// push copies the files of a directory into a new one in the container, without holding them all in memory.
func (s *server) push(t testing.TB, local, dir string) {
	t.Helper()
	s.shell(t, `mkdir -p "$1"`, dir)
	s.pushInto(t, local, dir)
}

// pushInto is push into a directory that is there, also while the container is stopped.
func (s *server) pushInto(t testing.TB, local, dir string) {
	t.Helper()
	r, w := io.Pipe()
	packed := make(chan error, 1)
	go func() {
		err := pack(w, local)
		w.CloseWithError(err)
		packed <- err
	}()
	s.engine(t, func(ctx context.Context, c *testcontainers.DockerClient, id string) error {
		_, err := c.CopyToContainer(ctx, id, client.CopyToContainerOptions{DestinationPath: dir, Content: r})
		return errors.Join(err, r.Close(), <-packed)
	})
}

// pack writes the files of a directory as a tar archive.
func pack(w io.Writer, dir string) error {
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	files := tar.NewWriter(w)
	for _, entry := range entries {
		data, err := os.ReadFile(filepath.Join(dir, entry.Name()))
		if err != nil {
			return err
		}
		if err := files.WriteHeader(&tar.Header{Name: entry.Name(), Mode: 0o644, Size: int64(len(data))}); err != nil {
			return err
		}
		if _, err := files.Write(data); err != nil {
			return err
		}
	}
	return files.Close()
}

// decompress replaces compressed segments by plain ones, and lists the segments in a directory. Compressed partial
// files, which the original leaves, count as partial.
func decompress(t testing.TB, dir string, size wal.SegmentSize) (segments []stored) {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	for _, entry := range entries {
		name, suffix, _ := strings.Cut(entry.Name(), ".")
		segment, err := wal.ParseSegment(name, size)
		if err != nil {
			if entry.Name() != ".lock" && entry.Name() != "archive.json" {
				t.Errorf("%s does not belong into an archive", entry.Name())
			}
			continue
		}
		file := filepath.Join(dir, entry.Name())
		if strings.HasSuffix(suffix, "partial") {
			segments = append(segments, stored{segment, file, "", false})
			continue
		}
		data := readFile(t, file)
		if suffix != "" {
			open := decompressors["."+suffix]
			if open == nil {
				t.Errorf("%s: an unknown suffix", entry.Name())
				continue
			}
			r, err := open(bytes.NewReader(data))
			if err == nil {
				data, err = io.ReadAll(r)
			}
			if err != nil {
				t.Errorf("%s: %v", entry.Name(), err)
				continue
			}
			os.Remove(file)
			file = filepath.Join(dir, name)
			if err := os.WriteFile(file, data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		if len(data) != int(size) {
			t.Errorf("%s has %d bytes", entry.Name(), len(data))
			continue
		}
		segments = append(segments, stored{segment, file, "", true})
	}
	slices.SortFunc(segments, func(a, b stored) int { return strings.Compare(a.path, b.path) })
	return segments
}
