package integration

import (
	"encoding/json"
	"fmt"
	"path/filepath"
	"strings"
	"testing"

	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// TestArchivesEveryVersion goes through the life of an archive on each version of the server.
func TestArchivesEveryVersion(t *testing.T) {
	for _, image := range images() {
		t.Run(image, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, serverOptions{image: image})
			t.Run("from nothing, and again without a gap", func(t *testing.T) { archiveAndGoOn(t, s) })
			t.Run("from the WAL that a slot retained", func(t *testing.T) { archiveFromSlot(t, s) })
			t.Run("with a role that no database admits", func(t *testing.T) { archiveWithoutSlotRights(t, s) })
		})
	}
}

func archiveAndGoOn(t *testing.T, s *server) {
	config := configText(t.TempDir(), cluster("orders", s.conninfo()))

	d := startDaemon(t, config)
	d.awaitState(t, "orders", receiver.Streaming)
	if got := s.query(t, "SELECT slot_type, active, restart_lsn IS NOT NULL FROM pg_replication_slots"); fmt.Sprint(got) != "[[physical t t]]" {
		t.Errorf("slots (type, active, WAL reserved): %v", got)
	}
	load := startLoad(t, s)
	load.await(t, 50)
	for range 2 {
		s.write(t, 4)
		s.switchWAL(t)
	}
	s.write(t, 40) // one record spans a segment
	load.await(t, 50)
	load.stop()
	first := d.archived(t, "orders", s)
	segments := compareArchive(t, d.clusterDir("orders"), first, origins{1: s})
	if n := countSealed(segments); n < 4 || int64(n) != first.SegmentsSealed {
		t.Errorf("%d sealed segments, status says %d; want at least 4", n, first.SegmentsSealed)
	}
	checkOrigin(t, d.clusterDir("orders"), s, segments[0], "slot")
	checkSlotFollows(t, s, "walfleet", first)

	s.write(t, 20) // nobody receives this now
	d = startDaemon(t, config)
	last := d.archived(t, "orders", s)
	compareArchive(t, d.clusterDir("orders"), last, origins{1: s})
	if again := last.ReceivedBytes - int64(last.Written-first.Flushed); again < 0 || again > 16<<10 {
		t.Errorf("%d bytes were received again, want at most 16 KB", again)
	}
	checkSlotFollows(t, s, "walfleet", last)
}

// checkOrigin checks archive.json: whose archive it is, and where it began.
func checkOrigin(t *testing.T, dir string, s *server, first stored, source string) {
	t.Helper()
	var got struct {
		SystemID    string `json:"system_identifier"`
		SegmentSize int64  `json:"segment_size"`
		Origin      struct {
			Timeline wal.Timeline `json:"timeline"`
			LSN      string       `json:"lsn"`
			Source   string       `json:"source"`
		} `json:"origin"`
	}
	if err := json.Unmarshal(readFile(t, filepath.Join(dir, "archive.json")), &got); err != nil {
		t.Fatal(err)
	}
	want := got
	want.SystemID = s.value(t, "SELECT system_identifier FROM pg_control_system()")
	want.SegmentSize = int64(s.size)
	want.Origin.Timeline, want.Origin.LSN, want.Origin.Source = first.Timeline, first.Start.String(), source
	if got != want {
		t.Errorf("archive.json is %+v, want %+v", got, want)
	}
}

// checkSlotFollows makes sure that the slot keeps what the archive does not have, and nothing else.
func checkSlotFollows(t *testing.T, s *server, slot string, st receiver.Status) {
	t.Helper()
	restart := s.lsn(t, "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = '"+slot+"'")
	if restart != st.Flushed {
		t.Errorf("the slot's restart_lsn is %s after the stop, flushed was %s", restart, st.Flushed)
	}
}

func archiveFromSlot(t *testing.T, s *server) {
	s.query(t, "SELECT pg_create_physical_replication_slot('older', true)")
	restart := s.lsn(t, "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'older'")
	for range 2 {
		s.write(t, 2)
		s.switchWAL(t)
	}
	s.write(t, 2)

	d := startDaemon(t, configText(t.TempDir(), cluster("late", s.conninfo(), `slot = "older"`)))
	st := d.archived(t, "late", s)
	segments := compareArchive(t, d.clusterDir("late"), st, origins{1: s})
	if first := segments[0]; first.Start != s.size.Start(restart) {
		t.Errorf("the archive begins with %s, the slot retained WAL from %s on", first, restart)
	}
	checkOrigin(t, d.clusterDir("late"), s, segments[0], "slot")
}

// archiveWithoutSlotRights has a role that cannot connect to any database, which PostgreSQL 13 and 14 need
// to say where a slot begins.
func archiveWithoutSlotRights(t *testing.T, s *server) {
	s.query(t, `CREATE ROLE narrow LOGIN REPLICATION PASSWORD '`+password+`';
		REVOKE CONNECT ON DATABASE postgres FROM PUBLIC;
		SELECT pg_create_physical_replication_slot('retains', true)`)
	needsDatabase := s.value(t, "SELECT current_setting('server_version_num')::int < 150000") == "t"
	s.switchWAL(t)
	s.write(t, 1)
	before := s.end(t)
	d := startDaemon(t, configText(t.TempDir(),
		cluster("made", s.conninfo("user=narrow"), `slot = "made"`),
		cluster("found", s.conninfo("user=narrow"), `slot = "retains"`)))

	d.awaitState(t, "made", receiver.Streaming)
	if needsDatabase {
		// Starting at the current position would skip over the WAL that the slot retains.
		st := d.awaitState(t, "found", receiver.Halted, `slot "retains"`, "cannot be read", "connect to a database")
		if strings.Contains(st.Reason, password) {
			t.Error("the reason shows the password")
		}
	} else {
		d.awaitState(t, "found", receiver.Streaming)
	}
	s.write(t, 1)
	made := d.archived(t, "made", s)
	segments := compareArchive(t, d.clusterDir("made"), made, origins{1: s})
	if segments[0].Start > before {
		t.Errorf("the archive begins with %s, after its start at %s", segments[0], before)
	}
	if needsDatabase {
		checkOrigin(t, d.clusterDir("made"), s, segments[0], "current position")
		return
	}
	compareArchive(t, d.clusterDir("found"), d.status(t, "found"), origins{1: s})
}

// TestArchivesSegmentSizesSideBySide has one fleet of clusters with 16 MB and with 1 GB segments.
func TestArchivesSegmentSizesSideBySide(t *testing.T) {
	t.Parallel()
	sizes := map[string]wal.SegmentSize{"small": 16 * megabyte, "large": 1024 * megabyte}
	servers := map[string]*server{}
	var clusters []string
	for name, size := range sizes {
		servers[name] = startServer(t, serverOptions{segment: size})
		clusters = append(clusters, cluster(name, servers[name].conninfo()))
	}
	dir := t.TempDir()
	d := startDaemon(t, configText(dir, clusters...))
	for _, s := range servers {
		s.write(t, 4)
		s.switchWAL(t)
		s.write(t, 4)
	}
	for name, s := range servers {
		d.awaitFlushed(t, name, s.end(t))
	}
	d.stop(t)
	for name, s := range servers {
		st := d.status(t, name)
		if st.SegmentSize != sizes[name] {
			t.Errorf("%s: segments of %d bytes, want %d", name, st.SegmentSize, sizes[name])
		}
		if n := countSealed(compareArchive(t, d.clusterDir(name), st, origins{1: s})); n < 1 {
			t.Errorf("%s: no sealed segment", name)
		}
	}

	t.Run("and keeps each to its own directory", func(t *testing.T) {
		before := map[string]string{}
		for name := range servers {
			before[name] = listing(t, filepath.Join(dir, name))
		}
		d := startDaemon(t, configText(dir, cluster("small", servers["large"].conninfo()), cluster("large", servers["small"].conninfo())))
		for name := range servers {
			d.awaitState(t, name, receiver.Halted, "belongs to the cluster with system identifier")
		}
		d.stop(t)
		for name := range servers {
			if after := listing(t, filepath.Join(dir, name)); after != before[name] {
				t.Errorf("%s: the archive of another cluster has changed from\n%sto\n%s", name, before[name], after)
			}
		}
	})
}
