package integration

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// configText is the text of a configuration file. Its lines count from archive_dir on; tests run side by side, and
// none listens.
func configText(archiveDir string, clusters ...string) string {
	return fmt.Sprintf("archive_dir = %q\n", archiveDir) + strings.Join(clusters, "") + "\n[http]\nlisten = \"\"\n"
}

// cluster is one [[cluster]] of a configuration file; settings are lines such as `slot = "a"`.
func cluster(name, conninfo string, settings ...string) string {
	return fmt.Sprintf("\n[[cluster]]\nname = %q\nconninfo = %q\n%s\n", name, conninfo, strings.Join(settings, "\n"))
}

// daemon is a fleet that runs in this process.
type daemon struct {
	fleet *fleet.Fleet
	dir   string // archive_dir
	log   logBuffer

	cancel context.CancelFunc
	ended  chan struct{}
	err    error // of Run, once ended is closed
}

// startDaemon runs a fleet until the end of the test, if it is not stopped before.
func startDaemon(t testing.TB, config string) *daemon {
	t.Helper()
	cfg, err := fleet.Parse("walfleet.toml", []byte(config))
	if err != nil {
		t.Fatal(err)
	}
	d := &daemon{dir: cfg.ArchiveDir, ended: make(chan struct{})}
	logger := slog.New(slog.NewTextHandler(io.MultiWriter(&d.log, t.Output()), &slog.HandlerOptions{Level: slog.LevelDebug}))
	d.fleet = fleet.New(cfg, logger)
	ctx, cancel := context.WithCancel(context.Background())
	d.cancel = cancel
	go func() {
		defer close(d.ended)
		d.err = d.fleet.Run(ctx)
	}()
	t.Cleanup(func() { d.stop(t) })
	return d
}

// stop stops the fleet as SIGTERM does. Its status and its log stay.
func (d *daemon) stop(t testing.TB) {
	t.Helper()
	d.cancel()
	<-d.ended
	if d.err != nil {
		t.Errorf("the fleet ended with: %v", d.err)
	}
}

// clusterDir is the directory of a cluster's archive.
func (d *daemon) clusterDir(name string) string { return filepath.Join(d.dir, name) }

func (d *daemon) status(t testing.TB, name string) receiver.Status {
	t.Helper()
	for _, c := range d.fleet.Status() {
		if c.Name == name {
			return c.Status
		}
	}
	t.Fatalf("no cluster %q in the fleet's status", name)
	return receiver.Status{}
}

// await waits until a cluster's status fulfils the condition, and returns it.
func (d *daemon) await(t testing.TB, name, what string, condition func(receiver.Status) bool) (st receiver.Status) {
	t.Helper()
	await(t, patience, name+": "+what, func() (bool, string) {
		st = d.status(t, name)
		return condition(st), fmt.Sprintf("%+v", st)
	})
	return st
}

// awaitState waits for a state whose reason contains all the texts.
func (d *daemon) awaitState(t testing.TB, name string, state receiver.State, texts ...string) receiver.Status {
	t.Helper()
	return d.await(t, name, fmt.Sprintf("state %s, reason with %q", state, texts), func(st receiver.Status) bool {
		return st.State == state && containsAll(st.Reason, texts)
	})
}

func containsAll(s string, texts []string) bool {
	for _, text := range texts {
		if !strings.Contains(s, text) {
			return false
		}
	}
	return true
}

// awaitFlushed waits until a cluster streams, and everything before lsn is synced.
func (d *daemon) awaitFlushed(t testing.TB, name string, lsn wal.LSN) receiver.Status {
	t.Helper()
	return d.await(t, name, fmt.Sprintf("streaming, and flushed up to %s", lsn), func(st receiver.Status) bool {
		return st.State == receiver.Streaming && st.Flushed >= lsn
	})
}

// archived stops the load of a test: it waits until all that the server has is archived, stops the daemon
// and returns the cluster's last status.
func (d *daemon) archived(t testing.TB, name string, s *server) receiver.Status {
	t.Helper()
	d.awaitFlushed(t, name, s.end(t))
	d.stop(t)
	st := d.status(t, name)
	if st.State != receiver.Stopped {
		t.Errorf("%s: state %s after the stop", name, st.State)
	}
	return st
}

// logBuffer collects log lines. Any goroutine may use it.
type logBuffer struct {
	mu   sync.Mutex
	text strings.Builder
}

func (b *logBuffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.Write(p)
}

func (b *logBuffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.text.String()
}

// await waits for a line that contains all the texts, and returns it.
func (b *logBuffer) await(t testing.TB, texts ...string) (found string) {
	t.Helper()
	await(t, patience, fmt.Sprintf("a log line with %q", texts), func() (bool, string) {
		for line := range strings.Lines(b.String()) {
			if containsAll(line, texts) {
				found = line
				return true, ""
			}
		}
		return false, ""
	})
	return found
}
