package integration

import (
	"fmt"
	"testing"

	"github.com/testcontainers/testcontainers-go"
	tcnetwork "github.com/testcontainers/testcontainers-go/network"

	"github.com/walfleet/walfleet/receiver"
)

// follow makes a standby receive from the server of that alias.
func (s *server) follow(t *testing.T, alias string) {
	t.Helper()
	s.query(t, fmt.Sprintf("ALTER SYSTEM SET primary_conninfo = 'host=%s user=walfleet password=%s'", alias, password))
	s.query(t, "SELECT pg_reload_conf()")
}

// awaitReplica waits until a standby has all that its primary has.
func awaitReplica(t *testing.T, standby, primary *server) {
	t.Helper()
	end := primary.end(t)
	await(t, patience, "the standby has WAL up to "+end.String(), func() (bool, string) {
		lsn := standby.lsn(t, "SELECT pg_last_wal_replay_lsn()")
		return lsn >= end, lsn.String()
	})
}

// TestCascadeOfPromotionsAndFailback has a cluster whose primary dies twice, and then comes back, made anew, and is
// promoted again while the one that it replaces goes on as if nothing had happened. No new primary has the slot, and
// nobody tells walfleet anything.
func TestCascadeOfPromotionsAndFailback(t *testing.T) {
	for _, image := range []string{"postgres:13", "postgres:18"} {
		t.Run(image, func(t *testing.T) {
			t.Parallel()
			cascade(t, image)
		})
	}
}

func cascade(t *testing.T, image string) {
	network, err := tcnetwork.New(t.Context())
	testcontainers.CleanupNetwork(t, network)
	if err != nil {
		t.Fatal(err)
	}
	start := func(alias, standbyOf string, port int) *server {
		return startServer(t, serverOptions{image: image, segment: megabyte, network: network, alias: alias, standbyOf: standbyOf, port: port})
	}
	a := start("a", "", 0)
	b, c := start("b", "a", 0), start("c", "a", 0)
	d := startDaemon(t, configText(t.TempDir(), cluster("orders", a.conninfo(
		fmt.Sprintf("host=%s,%s,%s port=%d,%d,%d", host, host, host, a.port, b.port, c.port)))))
	d.awaitState(t, "orders", receiver.Streaming)
	goOn := func(s *server, timeline int) {
		t.Helper()
		s.write(t, 3)
		d.await(t, "orders", fmt.Sprintf("timeline %d of the new primary", timeline), func(st receiver.Status) bool {
			return int(st.Timeline) == timeline && st.Host == fmt.Sprintf("%s:%d", host, s.port)
		})
		d.awaitFlushed(t, "orders", s.end(t))
		if told := s.sender(t, "walfleet").flush; told > s.end(t) {
			t.Errorf("timeline %d: the server was told %s, its WAL ends at %s", timeline, told, s.end(t))
		}
	}
	goOn(a, 1)
	awaitReplica(t, b, a)
	awaitReplica(t, c, a)

	a.kill(t)
	b.promote(t)
	c.follow(t, "b")
	goOn(b, 2)
	awaitReplica(t, c, b)

	b.kill(t)
	c.promote(t)
	goOn(c, 3)

	if err := testcontainers.TerminateContainer(a.ctr); err != nil {
		t.Fatal(err)
	}
	again := start("again", "c", a.port)
	awaitReplica(t, again, c)
	again.promote(t)
	c.write(t, 1) // goes nowhere
	goOn(again, 4)
	again.query(t, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'walfleet'")
	goOn(again, 4)

	st := d.archived(t, "orders", again)
	b.start(t)
	compareArchive(t, d.clusterDir("orders"), st, origins{1: b, 2: b, 3: c, 4: again})
}
