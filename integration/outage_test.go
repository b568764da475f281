package integration

import (
	"testing"
	"time"

	"github.com/walfleet/walfleet/receiver"
)

// TestGoesOnAfterServerWasKilled kills all processes of a server with SIGKILL under load, twice: what it
// flushed and what it overwrites after crash recovery is archived as the server has it.
func TestGoesOnAfterServerWasKilled(t *testing.T) {
	for _, image := range []string{"postgres:13", "postgres:18"} {
		t.Run(image, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, serverOptions{image: image, segment: megabyte})
			d := startDaemon(t, configText(t.TempDir(), cluster("orders", s.conninfo())))
			d.awaitState(t, "orders", receiver.Streaming)
			load := startLoad(t, s)
			for range 2 {
				load.await(t, 100)
				before := d.status(t, "orders")
				s.kill(t)
				d.awaitState(t, "orders", receiver.Backoff)
				s.start(t)
				load.await(t, 100)
				d.await(t, "orders", "a new connection, and new segments", func(st receiver.Status) bool {
					return st.State == receiver.Streaming && st.Reconnects > before.Reconnects && st.SegmentsSealed > before.SegmentsSealed
				})
			}
			load.stop()
			st := d.archived(t, "orders", s)
			if n := countSealed(compareArchive(t, d.clusterDir("orders"), st, origins{1: s})); n < 3 {
				t.Errorf("%d sealed segments, want more", n)
			}
		})
	}
}

// TestGoesOnAfterServerWasSilent freezes a server's processes: no connection ends, and nothing comes.
func TestGoesOnAfterServerWasSilent(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{segment: megabyte})
	d := startDaemon(t, configText(t.TempDir(),
		cluster("orders", s.conninfo(), `receive_timeout = "2s"`)))
	d.awaitState(t, "orders", receiver.Streaming)
	load := startLoad(t, s)
	load.await(t, 50)
	begin := time.Now()
	s.pause(t)
	d.log.await(t, "not archiving", "receive_timeout") // its state does not last
	if took := time.Since(begin); took > 30*time.Second {
		t.Errorf("silence was noticed after %s, receive_timeout is 2 s, and usually a minute", took)
	}
	s.unpause(t)
	load.await(t, 50)
	d.awaitState(t, "orders", receiver.Streaming)
	load.await(t, 50)
	load.stop()
	st := d.archived(t, "orders", s)
	compareArchive(t, d.clusterDir("orders"), st, origins{1: s})
	if st.Reconnects == 0 {
		t.Error("no reconnect was counted")
	}
}

// TestKeepsIdleConnection has a server that has nothing to say for several times receive_timeout.
func TestKeepsIdleConnection(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{segment: megabyte})
	d := startDaemon(t, configText(t.TempDir(),
		cluster("idle", s.conninfo(), `receive_timeout = "4s"`, `status_interval = "100ms"`),
		cluster("quiet", s.conninfo(), `receive_timeout = "4s"`, `status_interval = "0s"`, `slot = "quiet"`)))
	for _, name := range []string{"idle", "quiet"} {
		begin := d.awaitState(t, name, receiver.Streaming).Since
		d.await(t, name, "12 s of streaming", func(st receiver.Status) bool { return time.Since(begin) > 12*time.Second })
		if st := d.status(t, name); st.State != receiver.Streaming || st.Reconnects != 0 {
			t.Errorf("%s: %+v after an idle time of 12 s with receive_timeout = 4s", name, st)
		}
	}
}

// TestDoesNotHoldUpShutdown stops a server that waits until its WAL senders have said that everything is
// flushed. Everything includes the shutdown's own checkpoint.
func TestDoesNotHoldUpShutdown(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{segment: megabyte})
	d := startDaemon(t, configText(t.TempDir(),
		cluster("sync", s.conninfo(), `slot = "sync"`),
		cluster("lazy", s.conninfo(), `slot = "lazy"`, `synchronous = false`, `flush_interval = "1h"`)))
	names := []string{"sync", "lazy"}
	for _, name := range names {
		d.awaitState(t, name, receiver.Streaming)
	}
	load := startLoad(t, s)
	load.await(t, 100)
	if took := s.stop(t); took > 30*time.Second {
		t.Errorf("the server's shutdown took %s, its wal_sender_timeout is a minute", took)
	}
	atEnd := map[string]receiver.Status{}
	for _, name := range names {
		atEnd[name] = d.awaitState(t, name, receiver.Backoff)
	}
	s.start(t)
	checkpoint := s.lsn(t, "SELECT checkpoint_lsn FROM pg_control_checkpoint()")
	for _, name := range names {
		if st := atEnd[name]; st.Flushed <= checkpoint {
			t.Errorf("%s: the server was down when WAL up to %s was flushed, its shutdown checkpoint is at %s", name, st.Flushed, checkpoint)
		}
	}
	load.await(t, 100)
	load.stop()
	s.switchWAL(t)
	for _, name := range names {
		d.awaitState(t, name, receiver.Streaming)
	}
	for _, name := range names {
		d.await(t, name, "everything received", func(st receiver.Status) bool { return st.Written >= s.end(t) })
	}
	d.stop(t)
	for _, name := range names {
		compareArchive(t, d.clusterDir(name), d.status(t, name), origins{1: s})
	}
}
