package integration

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// recordedGap is a gap as archive.json has it.
type recordedGap struct {
	Timeline wal.Timeline `json:"timeline"`
	From     string       `json:"from"`
	To       string       `json:"to"`
	Reason   string       `json:"reason"`
}

func readGaps(t *testing.T, dir string) []recordedGap {
	t.Helper()
	var meta struct {
		Gaps []recordedGap `json:"gaps"`
	}
	if err := json.Unmarshal(readFile(t, filepath.Join(dir, "archive.json")), &meta); err != nil {
		t.Fatal(err)
	}
	return meta.Gaps
}

// TestGapIsAPersonsDecision has slots that the server invalidated, and threw away what the archive needs next. The
// cluster halts and says what is missing; accept-gap writes that down, and the archive goes on.
func TestGapIsAPersonsDecision(t *testing.T) {
	for _, image := range images() {
		t.Run(image, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, serverOptions{image: image, segment: megabyte,
				settings: []string{"min_wal_size = 2MB", "max_wal_size = 2MB", "wal_keep_size = 0", "max_slot_wal_keep_size = 2MB"}})
			config := configText(t.TempDir(), cluster("orders", s.conninfo()))
			d := startDaemon(t, config)
			s.write(t, 2)
			first := d.archived(t, "orders", s)
			await(t, patience, "the slot is invalidated", func() (bool, string) {
				s.write(t, 2)
				s.query(t, "CHECKPOINT")
				v := s.value(t, "SELECT wal_status FROM pg_replication_slots")
				return v == "lost", v
			})

			p := startProgram(t, config)
			line := p.stderr.await(t, "not archiving", "state=halted", "no longer has the WAL that comes next", "timeline 1 from "+first.Flushed.String()+" to ")
			if !strings.Contains(line, "walfleet accept-gap") {
				t.Errorf("no hint: %s", line)
			}
			dir := filepath.Join(d.dir, "orders")
			if gaps := readGaps(t, dir); len(gaps) != 0 {
				t.Errorf("gaps that nobody accepted: %+v", gaps)
			}
			out, err := command(t, "accept-divergence", "orders", "-c", p.config).CombinedOutput()
			if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 1 || !strings.Contains(string(out), "halted by something else") {
				t.Errorf("accept-divergence: %v: %s", err, out)
			}
			out, err = command(t, "accept-gap", "orders", "-c", p.config).CombinedOutput()
			if err != nil || !strings.Contains(string(out), "gap recorded: WAL from "+first.Flushed.String()) {
				t.Fatalf("accept-gap: %v: %s", err, out)
			}
			s.set(t, "wal_keep_size", "64MB") // to compare with
			s.write(t, 2)
			awaitSlotFlushed(t, s, "walfleet", s.end(t))
			p.signal(t, syscall.SIGTERM)
			if status := p.exit(t); status != 0 {
				t.Errorf("exit status %d", status)
			}

			gaps := readGaps(t, dir)
			if len(gaps) != 1 || gaps[0].From != first.Flushed.String() || gaps[0].Timeline != 1 || !strings.Contains(gaps[0].Reason, "already been removed") {
				t.Fatalf("gaps: %+v", gaps)
			}
			var after []piece
			segments, _ := listArchive(t, dir, s.size)
			for _, segment := range segments {
				if segment.Start >= parseLSN(t, gaps[0].To) && segment.sealed {
					after = append(after, piece{segment, int64(s.size)})
				}
			}
			if len(after) == 0 {
				t.Error("no sealed segment after the gap")
			}
			s.comparePieces(t, after)
		})
	}
}

// TestSlotInvalidatedWithItsWALStillThere is PostgreSQL 18's idle_replication_slot_timeout: the slot retains nothing
// any more, but nothing is lost yet.
func TestSlotInvalidatedWithItsWALStillThere(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{image: "postgres:18", segment: megabyte})
	config := configText(t.TempDir(), cluster("orders", s.conninfo()))
	d := startDaemon(t, config)
	s.write(t, 2)
	d.archived(t, "orders", s)
	s.set(t, "idle_replication_slot_timeout", "1s")
	await(t, patience, "the slot is invalidated", func() (bool, string) {
		s.write(t, 1)
		s.query(t, "CHECKPOINT")
		v := fmt.Sprint(s.query(t, "SELECT wal_status, invalidation_reason FROM pg_replication_slots"))
		return strings.Contains(v, "idle_timeout"), v
	})
	s.set(t, "idle_replication_slot_timeout", "0")
	d = startDaemon(t, config)
	d.awaitState(t, "orders", receiver.Streaming)
	d.log.await(t, "was invalidated", "made anew")
	s.write(t, 2)
	st := d.archived(t, "orders", s)
	compareArchive(t, d.clusterDir("orders"), st, origins{1: s})
	if got := s.value(t, "SELECT wal_status FROM pg_replication_slots"); got != "reserved" {
		t.Errorf("wal_status %s", got)
	}
	checkSlotFollows(t, s, "walfleet", st)
}
