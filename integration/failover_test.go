package integration

import (
	"context"
	"fmt"
	"strings"
	"testing"

	"github.com/testcontainers/testcontainers-go"
	tcnetwork "github.com/testcontainers/testcontainers-go/network"

	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// startTrio starts a primary, a and b, with segments of 1 MB: b follows a, which follows the primary.
func startTrio(t *testing.T, image string) (primary, a, b *server) {
	t.Helper()
	network, err := tcnetwork.New(t.Context())
	testcontainers.CleanupNetwork(t, network)
	if err != nil {
		t.Fatal(err)
	}
	start := func(alias, of string) *server {
		return startServer(t, serverOptions{image: image, segment: megabyte, network: network, alias: alias, standbyOf: of})
	}
	return start("primary", ""), start("a", "primary"), start("b", "a")
}

func conninfoOf(servers ...*server) string {
	var hosts, ports []string
	for _, s := range servers {
		hosts, ports = append(hosts, host), append(ports, fmt.Sprint(s.port))
	}
	return servers[0].conninfo("host="+strings.Join(hosts, ","), "port="+strings.Join(ports, ","))
}

// awaitReplica waits until a standby has everything before lsn.
func (s *server) awaitReplica(t testing.TB, lsn wal.LSN) {
	t.Helper()
	await(t, patience, "the standby has WAL up to "+lsn.String(), func() (bool, string) {
		have := s.lsn(t, "SELECT pg_last_wal_replay_lsn()")
		return have >= lsn, have.String()
	})
}

// TestFollowsCascadeOfPromotions has a primary and two standbys, which are promoted one after the other: walfleet goes
// from one to the next and makes the slot that the new one lacks. One cluster sees each promotion, another one
// neither: it was away.
func TestFollowsCascadeOfPromotions(t *testing.T) {
	t.Parallel()
	for _, image := range []string{"postgres:13", "postgres:18"} {
		t.Run(image, func(t *testing.T) {
			t.Parallel()
			followCascade(t, image)
		})
	}
}

func followCascade(t *testing.T, image string) {
	primary, a, b := startTrio(t, image)
	conninfo := conninfoOf(b, primary, a)
	dir := t.TempDir()
	watches := cluster("watches", conninfo, `slot = "watches"`)
	away := cluster("away", conninfo, `slot = "away"`)
	d := startDaemon(t, configText(dir, watches, away))
	primary.write(t, 2)
	d.awaitFlushed(t, "away", primary.end(t))
	d.awaitFlushed(t, "watches", primary.end(t))
	d.stop(t)

	d = startDaemon(t, configText(dir, watches))
	from := origins{1: primary}
	for tli, next := range []*server{a, b} {
		old := []*server{primary, a}[tli]
		old.write(t, 2)
		end := old.end(t)
		next.awaitReplica(t, end)
		d.awaitFlushed(t, "watches", end)
		old.kill(t)
		d.awaitState(t, "watches", receiver.Backoff, "standby")
		if n := next.value(t, "SELECT count(*) FROM pg_replication_slots WHERE slot_name = 'watches'"); n != "0" {
			t.Fatalf("the standby has %s slots of ours", n)
		}
		next.promote(t)
		next.write(t, 2)
		timeline := wal.Timeline(tli + 2)
		d.await(t, "watches", fmt.Sprint("streaming timeline ", timeline), func(st receiver.Status) bool {
			return st.State == receiver.Streaming && st.Timeline == timeline
		})
		d.awaitFlushed(t, "watches", next.end(t))
		from[timeline] = next
	}
	d.log.await(t, "replication slot created", "slot=watches")
	st := d.archived(t, "watches", b)
	checkSlotFollows(t, b, "watches", st)
	late := startDaemon(t, configText(dir, away))
	lateStatus := late.archived(t, "away", b)

	primary.start(t) // to be compared with
	a.start(t)
	from[1] = primary
	compareArchive(t, d.clusterDir("watches"), st, from)
	compareArchive(t, late.clusterDir("away"), lateStatus, from)
	if lateStatus.Timeline != 3 || st.Timeline != 3 {
		t.Errorf("timelines %d and %d, want 3", st.Timeline, lateStatus.Timeline)
	}
	segments, histories := listArchive(t, late.clusterDir("away"), b.size)
	for _, tli := range []wal.Timeline{1, 2} {
		end, ok := histories[3].End(tli)
		if last := lastOf(segments, tli); !ok || last.End() < end {
			t.Errorf("timeline %d ends with %s in the archive, its end is %s", tli, last, end)
		}
	}
}

func lastOf(segments []stored, tli wal.Timeline) (last stored) {
	for _, s := range segments {
		if s.Timeline == tli {
			last = s
		}
	}
	return last
}

// remove ends a server for good: its container is gone, and its port free.
func (s *server) remove(t testing.TB) {
	t.Helper()
	if err := s.ctr.Terminate(context.Background(), testcontainers.StopTimeout(0)); err != nil {
		t.Fatal(err)
	}
}

// TestFailback has a primary that comes back as a standby of its successor, from a new base backup, and is promoted
// again: to timeline 3, at the address that timeline 1 was archived from.
func TestFailback(t *testing.T) {
	t.Parallel()
	const image = "postgres:15"
	network, err := tcnetwork.New(t.Context())
	testcontainers.CleanupNetwork(t, network)
	if err != nil {
		t.Fatal(err)
	}
	port := freePort(t)
	primary := startServer(t, serverOptions{image: image, segment: megabyte, network: network, alias: "primary", port: port})
	standby := startServer(t, serverOptions{image: image, segment: megabyte, network: network, alias: "standby", standbyOf: "primary"})
	d := startDaemon(t, configText(t.TempDir(), cluster("orders", conninfoOf(primary, standby))))
	primary.write(t, 2)
	first := primary.end(t)
	d.awaitFlushed(t, "orders", first)
	standby.awaitReplica(t, first)
	// What timeline 1 is compared with is the standby's, which has all of it.
	primary.remove(t)
	d.awaitState(t, "orders", receiver.Backoff, "standby")
	standby.promote(t)
	standby.write(t, 2)
	d.awaitFlushed(t, "orders", standby.end(t))

	back := startServer(t, serverOptions{image: image, segment: megabyte, network: network, alias: "back", standbyOf: "standby", port: port})
	standby.write(t, 2)
	second := standby.end(t)
	back.awaitReplica(t, second)
	if st := d.awaitFlushed(t, "orders", second); st.Timeline != 2 {
		t.Errorf("timeline %d before the failback", st.Timeline)
	}
	standby.kill(t)
	back.promote(t)
	back.write(t, 3)
	d.awaitFlushed(t, "orders", back.end(t))
	st := d.archived(t, "orders", back)
	if st.Timeline != 3 || !strings.HasSuffix(st.Host, fmt.Sprint(":", port)) {
		t.Errorf("timeline %d from %s", st.Timeline, st.Host)
	}
	standby.start(t)
	compareArchive(t, d.clusterDir("orders"), st, origins{1: standby, 2: standby, 3: back})
}
