package integration

import (
	"fmt"
	"path/filepath"
	"testing"

	"github.com/testcontainers/testcontainers-go"
	tcnetwork "github.com/testcontainers/testcontainers-go/network"

	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// startPair starts a primary and its standby, with segments of 1 MB.
func startPair(t *testing.T, image string) (primary, standby *server) {
	t.Helper()
	network, err := tcnetwork.New(t.Context())
	testcontainers.CleanupNetwork(t, network)
	if err != nil {
		t.Fatal(err)
	}
	primary = startServer(t, serverOptions{image: image, segment: megabyte, network: network, alias: "primary"})
	standby = startServer(t, serverOptions{image: image, segment: megabyte, network: network, alias: "standby", standbyOf: "primary"})
	return primary, standby
}

// TestFollowsPromotionWhileStreaming streams from a standby that becomes the primary.
func TestFollowsPromotionWhileStreaming(t *testing.T) {
	for _, image := range []string{"postgres:13", "postgres:18"} {
		t.Run(image, func(t *testing.T) {
			t.Parallel()
			followPromotion(t, image)
		})
	}
}

func followPromotion(t *testing.T, image string) {
	primary, standby := startPair(t, image)
	d := startDaemon(t, configText(t.TempDir(),
		cluster("any", standby.conninfo(), `slot = "any"`, `source = "any"`),
		cluster("waits", standby.conninfo(), `slot = "waits"`)))
	d.awaitState(t, "any", receiver.Streaming)
	d.awaitState(t, "waits", receiver.Backoff, "standby", `source = "primary"`)
	load := startLoad(t, primary)
	d.await(t, "any", "sealed segments", func(st receiver.Status) bool { return st.SegmentsSealed >= 3 })
	standby.promote(t)
	load.stop()
	load = startLoad(t, standby)
	load.await(t, 200)
	d.await(t, "any", "timeline 2", func(st receiver.Status) bool { return st.Timeline == 2 })
	load.stop()
	d.awaitFlushed(t, "waits", standby.end(t))
	st := d.archived(t, "any", standby)
	if st.Timeline != 2 || st.Reconnects != 0 {
		t.Errorf("timeline %d after %d reconnects, want timeline 2 on the same connection", st.Timeline, st.Reconnects)
	}
	segments := compareArchive(t, d.clusterDir("any"), st, origins{1: primary, 2: standby})
	checkFork(t, d.clusterDir("any"), segments)
	// What was refused as a standby is archived as a primary, from its slot on.
	compareArchive(t, d.clusterDir("waits"), d.status(t, "waits"), origins{1: primary, 2: standby})
}

// checkFork makes sure that timeline 2 begins with the whole segment in which it forks, has a sealed segment,
// and that the unsealed one of timeline 1 stayed. It returns where timeline 1 ends.
func checkFork(t *testing.T, dir string, segments []stored) wal.LSN {
	t.Helper()
	history, err := wal.ParseHistory(2, readFile(t, filepath.Join(dir, "00000002.history")))
	if err != nil {
		t.Fatal(err)
	}
	fork, _ := history.End(1)
	var old, young []stored
	for _, s := range segments {
		if s.Timeline == 1 {
			old = append(old, s)
		} else {
			young = append(young, s)
		}
	}
	switch {
	case len(old) == 0 || len(young) == 0:
		t.Fatalf("%d segments of timeline 1, %d of timeline 2", len(old), len(young))
	case young[0].Start != young[0].Size.Start(fork):
		t.Errorf("timeline 2 begins with %s in the archive, it forks at %s", young[0], fork)
	case countSealed(young) == 0:
		t.Error("no sealed segment of timeline 2")
	case old[len(old)-1].sealed && old[len(old)-1].End() < fork:
		t.Errorf("timeline 1 ends with %s in the archive, it forks at %s", old[len(old)-1], fork)
	}
	return fork
}

// TestGoesOnWithNewPrimary has two hosts in its conninfo. The primary dies with WAL that only walfleet has
// received; the standby is promoted; then the old primary comes back.
func TestGoesOnWithNewPrimary(t *testing.T) {
	t.Parallel()
	primary, standby := startPair(t, defaultImage)
	conninfo := primary.conninfo(fmt.Sprintf("host=%s,%s port=%d,%d", host, host, primary.port, standby.port))
	d := startDaemon(t, configText(t.TempDir(), cluster("orders", conninfo)))
	d.awaitState(t, "orders", receiver.Streaming)
	primary.write(t, 4)
	both := primary.end(t)
	d.awaitFlushed(t, "orders", both)
	await(t, patience, "the standby has the same", func() (bool, string) {
		lsn := standby.lsn(t, "SELECT pg_last_wal_receive_lsn()")
		return lsn >= both, lsn.String()
	})

	standby.stop(t)
	primary.write(t, 3)
	lost := primary.end(t)
	d.awaitFlushed(t, "orders", lost)
	primary.kill(t)
	standby.start(t)
	d.awaitState(t, "orders", receiver.Backoff, "standby")
	standby.promote(t)
	standby.write(t, 1)
	st := d.await(t, "orders", "timeline 2", func(st receiver.Status) bool {
		return st.State == receiver.Streaming && st.Timeline == 2
	})
	d.log.await(t, "WAL that the new timeline does not contain")
	d.awaitFlushed(t, "orders", standby.end(t))
	if end := standby.end(t); st.Flushed >= lost || standby.sender(t, "walfleet").flush > end {
		t.Errorf("flushed is %s, %s on the server, whose WAL ends at %s: WAL up to %s was lost with the old primary",
			st.Flushed, standby.sender(t, "walfleet").flush, end, lost)
	}
	standby.write(t, 5)
	d.awaitFlushed(t, "orders", standby.end(t))

	t.Run("and passes over the old one", func(t *testing.T) {
		primary.start(t) // nobody has told it
		primary.write(t, 1)
		before := d.status(t, "orders")
		standby.query(t, "SELECT pg_terminate_backend(active_pid) FROM pg_replication_slots WHERE slot_name = 'walfleet'")
		d.await(t, "orders", "streaming from the new primary again", func(st receiver.Status) bool {
			return st.State == receiver.Streaming && st.Reconnects > before.Reconnects && st.Timeline == 2
		})
	})
	if t.Failed() {
		return
	}
	standby.write(t, 1)
	st = d.archived(t, "orders", standby)

	// The segments that died with the old primary stay in the archive, on their timeline.
	segments := compareArchive(t, d.clusterDir("orders"), st, origins{1: primary, 2: standby})
	fork := checkFork(t, d.clusterDir("orders"), segments)
	kept := false
	for _, s := range segments {
		kept = kept || s.Timeline == 1 && s.sealed && s.Start >= fork
	}
	if !kept || fork >= lost {
		t.Errorf("timeline 1 forks at %s, the old primary had WAL up to %s; is it kept? %t", fork, lost, kept)
	}
}
