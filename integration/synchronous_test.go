package integration

import (
	"context"
	"fmt"
	"slices"
	"testing"
	"time"

	"github.com/walfleet/walfleet/receiver"
)

// TestSynchronousStandby is a server that does not commit without walfleet.
func TestSynchronousStandby(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{})
	s.query(t, "CREATE TABLE ticks (i int)")
	// No commit waits for a status that is due only, or that the server asks for after half a minute.
	config := configText(t.TempDir(), cluster("orders", s.conninfo(), `status_interval = "1h"`))
	d := startDaemon(t, config)
	d.awaitState(t, "orders", receiver.Streaming)
	s.set(t, "synchronous_standby_names", "walfleet")
	await(t, patience, "walfleet is the synchronous standby", func() (bool, string) {
		got := s.sender(t, "walfleet")
		return got.sync == "sync", fmt.Sprintf("%+v", got)
	})

	conn, err := s.connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	soon, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	var times []time.Duration
	for n := range 50 {
		begin := time.Now()
		if _, err := conn.Exec(soon, "INSERT INTO ticks VALUES (1)").ReadAll(); err != nil {
			t.Fatalf("after %d commits: %v", n, err)
		}
		times = append(times, time.Since(begin))
	}
	slices.Sort(times)
	t.Logf("50 commits: median %s, longest %s", times[25], times[49])

	d.stop(t)
	committed := make(chan error, 1)
	go func() {
		_, err := conn.Exec(context.Background(), "INSERT INTO ticks VALUES (2)").ReadAll()
		committed <- err
	}()
	await(t, patience, "the commit waits", func() (bool, string) {
		v := fmt.Sprint(s.query(t, fmt.Sprintf("SELECT wait_event FROM pg_stat_activity WHERE pid = %d", conn.PID())))
		return v == "[[SyncRep]]", v
	})
	select {
	case err := <-committed:
		t.Fatalf("committed without walfleet (error: %v)", err)
	default:
	}

	begin := time.Now()
	d = startDaemon(t, config)
	select {
	case err := <-committed:
		if err != nil {
			t.Errorf("the commit that waited: %v", err)
		}
		t.Logf("the commit that waited returned %s after the start", time.Since(begin))
	case <-time.After(patience):
		t.Fatal("the commit waits although walfleet runs again")
	}
	st := d.archived(t, "orders", s)
	compareArchive(t, d.clusterDir("orders"), st, origins{1: s})
}

// sampleSender looks at a walsender's row again and again until the last sample will do, and fails the test when
// a position contradicts what walfleet promises. It returns the samples.
func sampleSender(t *testing.T, s *server, d *daemon, name string, enough func(sender) bool) (samples []sender) {
	t.Helper()
	await(t, patience, name+": enough samples of pg_stat_replication", func() (bool, string) {
		got := s.sender(t, name)
		last := got
		if len(samples) > 0 {
			last = samples[len(samples)-1]
		}
		switch {
		case got.apply != 0:
			t.Errorf("replay_lsn is %s, nothing is replayed here", got.apply)
		case got.flush > got.write || got.write > got.sent:
			t.Errorf("flush_lsn %s, write_lsn %s, sent_lsn %s: not in this order", got.flush, got.write, got.sent)
		case got.flush < last.flush || got.write < last.write:
			t.Errorf("flush_lsn went from %s to %s, write_lsn from %s to %s", last.flush, got.flush, last.write, got.write)
		}
		// The status is published a moment after the server was told.
		await(t, 10*time.Second, fmt.Sprintf("synced up to flush_lsn %s", got.flush), func() (bool, string) {
			flushed := d.status(t, name).Flushed
			return flushed >= got.flush, flushed.String()
		})
		samples = append(samples, got)
		return enough(got), fmt.Sprintf("%+v", got)
	})
	return samples
}

// TestFlushPositionIsSynced watches from the server's side what it is told.
func TestFlushPositionIsSynced(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{segment: megabyte})

	t.Run("synchronous", func(t *testing.T) {
		d := startDaemon(t, configText(t.TempDir(), cluster("sync", s.conninfo(), `slot = "sync"`)))
		d.awaitState(t, "sync", receiver.Streaming)
		load := startLoad(t, s)
		samples := sampleSender(t, s, d, "sync", func(sender) bool { return load.commits.Load() > 300 })
		load.stop()
		if first, last := samples[0], samples[len(samples)-1]; last.flush <= first.flush {
			t.Errorf("flush_lsn stayed at %s under load", last.flush)
		}
		st := d.archived(t, "sync", s)
		compareArchive(t, d.clusterDir("sync"), st, origins{1: s})
	})

	t.Run("not synchronous", func(t *testing.T) {
		d := startDaemon(t, configText(t.TempDir(), cluster("lazy", s.conninfo(), `slot = "lazy"`,
			`synchronous = false`, `flush_interval = "3s"`, `status_interval = "100ms"`)))
		d.awaitState(t, "lazy", receiver.Streaming)
		s.query(t, "CREATE TABLE little (i int)")
		awaitSlotFlushed(t, s, "lazy", s.end(t)) // the next byte begins a new interval

		s.query(t, "INSERT INTO little VALUES (1)")
		end := s.end(t)
		behind := 0
		for _, sample := range sampleSender(t, s, d, "lazy", func(last sender) bool { return last.flush >= end }) {
			if sample.write >= end && sample.flush < end {
				behind++
			}
		}
		if behind == 0 {
			t.Errorf("flush_lsn was never behind write_lsn on its way to %s; flush_interval is 3 s", end)
		}
		d.stop(t)
		compareArchive(t, d.clusterDir("lazy"), d.status(t, "lazy"), origins{1: s})
	})
}
