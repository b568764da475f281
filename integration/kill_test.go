package integration

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walfleet/walfleet/internal/wal"
)

// rounds is how often a fault is made: "make torture" sets the variable.
func rounds(usually, torture int) int {
	if os.Getenv("WALFLEET_TORTURE") != "" {
		return torture
	}
	return usually
}

// newRandom returns the source of a test's random moments, and puts its seed into the test's log.
func newRandom(t testing.TB) *rand.Rand {
	seed := rand.Uint64()
	t.Logf("seed %d", seed)
	return rand.New(rand.NewPCG(seed, 0))
}

// moment waits for up to limit. It stands for the instant at which something goes wrong: nothing is expected to
// have happened by then.
func moment(r *rand.Rand, limit time.Duration) {
	time.Sleep(time.Duration(r.Int64N(int64(limit))))
}

// acknowledged waits until no walsender uses a slot any more, and returns the flush position that the last one was
// told, which is where the slot stands.
func acknowledged(t testing.TB, s *server, slot string) wal.LSN {
	t.Helper()
	await(t, patience, "slot "+slot+" is free", func() (bool, string) {
		rows := s.query(t, "SELECT active_pid FROM pg_replication_slots WHERE slot_name = '"+slot+"'")
		free := len(rows) == 0 || rows[0][0] == ""
		return free, fmt.Sprint(rows)
	})
	rows := s.query(t, "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = '"+slot+"'")
	if len(rows) == 0 {
		return 0
	}
	return parseLSN(t, rows[0][0])
}

// agreesUntil compares an archive with the server's pg_wal from a position on, and returns the first one at which
// they differ: where the archive's WAL ends, if it has no wrong byte.
func agreesUntil(t testing.TB, dir string, s *server, from wal.LSN) wal.LSN {
	t.Helper()
	end := s.end(t)
	conn, err := s.connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for from < end {
		segment := s.size.Segment(1, from)
		n := int(min(megabyte, segment.End()-from, end-from))
		theirs := walAt(t, conn, segment, s.size.Offset(from), n)
		ours := archivedAt(t, dir, segment, s.size.Offset(from), n)
		same := commonPrefix(ours, theirs)
		from += wal.LSN(same)
		if same < n {
			break
		}
	}
	return from
}

// checkAcknowledged fails the test unless an archive, whatever ended its program, has all WAL that the server of its slot
// was told is flushed. It returns that position, and where the archive's WAL ends; what is before checked is known.
func checkAcknowledged(t testing.TB, dir string, s *server, slot string, checked wal.LSN) (promised, have wal.LSN) {
	t.Helper()
	promised = acknowledged(t, s, slot)
	have = agreesUntil(t, dir, s, checked)
	if have < promised {
		t.Fatalf("acknowledged is WAL up to %s, the archive has the server's up to %s", promised, have)
	}
	return promised, have
}

func commonPrefix(a, b []byte) int {
	if bytes.Equal(a, b) {
		return len(a)
	}
	n := 0
	for n < min(len(a), len(b)) && a[n] == b[n] {
		n++
	}
	return n
}

// walAt reads bytes of a segment in a server's pg_wal.
func walAt(t testing.TB, conn *pgconn.PgConn, segment wal.Segment, offset int64, n int) []byte {
	t.Helper()
	sql := fmt.Sprintf("SELECT pg_read_binary_file('pg_wal/%s', %d, %d)", segment, offset, n)
	binary := []int16{1}
	result := conn.ExecParams(t.Context(), sql, nil, nil, nil, binary).Read()
	if result.Err != nil || len(result.Rows) != 1 || len(result.Rows[0][0]) != n {
		t.Fatalf("%s: %d rows, error: %v", sql, len(result.Rows), result.Err)
	}
	return result.Rows[0][0]
}

// archivedAt reads bytes of a segment in an archive, sealed or not; nil when it is not there.
func archivedAt(t testing.TB, dir string, segment wal.Segment, offset int64, n int) []byte {
	t.Helper()
	name := filepath.Join(dir, segment.Name())
	f, err := os.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = os.Open(name + ".partial")
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	data := make([]byte, n)
	if _, err := f.ReadAt(data, offset); err != nil {
		t.Fatal(err)
	}
	return data
}

// lastRecordEnd is the end of the last complete record in an archive whose WAL ends at end. A record must begin
// in the megabyte before.
func lastRecordEnd(t testing.TB, dir string, size wal.SegmentSize, end wal.LSN) wal.LSN {
	t.Helper()
	start := end - end%wal.PageSize
	for range megabyte / wal.PageSize {
		previous := start - wal.PageSize
		if archivedAt(t, dir, size.Segment(1, previous), size.Offset(previous), wal.PageSize) == nil {
			break
		}
		start = previous
	}
	walker := wal.NewWalker(wal.WalkerConfig{Start: start, Timeline: 1, Size: size, CheckCRC: true})
	for pos := start; pos < end; {
		n := min(wal.PageSize, end-pos)
		if err := walker.Feed(archivedAt(t, dir, size.Segment(1, pos), size.Offset(pos), int(n))); err != nil {
			t.Fatal(err)
		}
		pos += n
	}
	return walker.Boundary()
}

var startedAt = regexp.MustCompile(`streaming started.* lsn=([0-9A-F]+/[0-9A-F]+)`)

// streamingFrom is where a program asked for WAL first; 0 when it has not yet.
func streamingFrom(t testing.TB, p *program) wal.LSN {
	t.Helper()
	found := startedAt.FindStringSubmatch(p.stderr.String())
	if found == nil {
		return 0
	}
	return parseLSN(t, found[1])
}

// TestKilledAtAnyMoment kills the daemon with SIGKILL at random moments under load, from its start on. What it had
// acknowledged is in the archive when it is dead, and it does not ask for more again than it must.
func TestKilledAtAnyMoment(t *testing.T) {
	for _, tt := range []struct {
		name  string
		size  wal.SegmentSize
		kills int
	}{
		{"16 MB segments", 16 * megabyte, rounds(8, 50)},
		{"1 GB segments", 1024 * megabyte, rounds(2, 10)},
	} {
		t.Run(tt.name, func(t *testing.T) {
			t.Parallel()
			killOften(t, tt.size, tt.kills)
		})
	}
}

func killOften(t *testing.T, size wal.SegmentSize, kills int) {
	random := newRandom(t)
	s := startServer(t, serverOptions{segment: size})
	dir := t.TempDir()
	config, orders := configText(dir, cluster("orders", s.conninfo())), filepath.Join(dir, "orders")
	p := startProgram(t, config)
	p.stderr.await(t, "streaming started")
	checked := s.size.Start(streamingFrom(t, p))

	const usual, early = 1200 * time.Millisecond, 100 * time.Millisecond // within which a kill comes
	limit := usual
	var again []int // bytes received again, of the starts that streamed
	for n := range kills {
		load := startLoad(t, s)
		moment(random, limit)
		sampled := s.sender(t, "walfleet").flush
		p.signal(t, syscall.SIGKILL)
		p.exit(t)
		load.stop()
		promised, have := checkAcknowledged(t, orders, s, "walfleet", checked)
		if promised < sampled {
			t.Errorf("the slot is at %s, flush_lsn was %s before the kill", promised, sampled)
		}
		complete := lastRecordEnd(t, orders, size, have)
		checked = promised

		p = startProgram(t, config)
		if n%4 == 3 {
			limit = early // the next kill comes while it begins
			continue
		}
		limit = usual
		p.stderr.await(t, "streaming started")
		from := streamingFrom(t, p)
		again = append(again, int(have-from))
		if from > complete || complete-from > 16<<10 {
			t.Errorf("streaming goes on at %s, the last complete record ends at %s, and WAL at %s", from, complete, have)
		}
	}
	slices.Sort(again)
	t.Logf("%d kills; in %d starts that streamed, the median received %d bytes again, the worst %d",
		kills, len(again), again[len(again)/2], again[len(again)-1])
	awaitSlotFlushed(t, s, "walfleet", s.end(t))
	p.signal(t, syscall.SIGTERM)
	if status := p.exit(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	compareStopped(t, orders, s, "walfleet")
}
