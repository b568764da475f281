package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/receiver"
)

// cluster is a scripted server behind a unix socket, and how to archive it.
type cluster struct {
	*pgtest.Server
	wal *pgtest.WAL
	cfg receiver.Config
}

func newCluster(t *testing.T, name string) *cluster {
	t.Helper()
	dir, err := os.MkdirTemp("", "walfleet") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	c := &cluster{pgtest.NewServer(t, pgtest.State{}), pgtest.NewWAL(pgtest.WALConfig{SystemID: 42}), defaultCluster()}
	c.wal.Append(make([]byte, 1000))
	c.Publish(c.wal)
	ln, err := net.Listen("unix", filepath.Join(dir, ".s.PGSQL.5432"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { ln.Close() })
	go func() {
		for {
			client, err := ln.Accept()
			if err != nil {
				return
			}
			server, err := c.Dial(t.Context(), "", "")
			if err != nil {
				client.Close()
				continue
			}
			for _, ends := range [][2]net.Conn{{client, server}, {server, client}} {
				go func() {
					_, _ = io.Copy(ends[0], ends[1])
					ends[0].Close()
				}()
			}
		}
	}()
	c.cfg.Name, c.cfg.Dir, c.cfg.Conninfo = name, filepath.Join(t.TempDir(), name), "user=archiver host="+dir
	return c
}

// patience bounds what the tests wait for, on a machine that has other things to do.
const patience = time.Minute

// running is a fleet that runs until the test ends.
type running struct {
	*Fleet
	t      *testing.T
	cancel context.CancelFunc
	ended  chan error
	log    *log
}

type log struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *log) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *log) has(words string) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return strings.Contains(l.b.String(), words)
}

func config(timeout time.Duration, clusters ...receiver.Config) *Config {
	return &Config{ShutdownTimeout: timeout, Clusters: clusters}
}

func run(t *testing.T, cfg *Config) *running {
	l := &log{}
	ctx, cancel := context.WithCancel(context.Background())
	r := &running{New(cfg, slog.New(slog.NewTextHandler(l, nil))), t, cancel, make(chan error, 1), l}
	go func() { r.ended <- r.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if !t.Failed() {
			return
		}
		t.Logf("log:\n%s", &l.b)
	})
	return r
}

// wait waits for a state of each cluster, in their order.
func (r *running) wait(want ...string) {
	r.t.Helper()
	var got []string
	for begun := time.Now(); time.Since(begun) < patience; time.Sleep(5 * time.Millisecond) {
		got = nil
		for _, s := range r.Status() {
			got = append(got, fmt.Sprintf("%s %s", s.Name, s.State))
		}
		if strings.Join(got, ", ") == strings.Join(want, ", ") {
			return
		}
	}
	r.t.Fatalf("clusters are %q, want %q", got, want)
}

func (r *running) receiver(name string) *receiver.Receiver {
	r.mu.Lock()
	defer r.mu.Unlock()
	return r.members[name].receiver
}

func (r *running) stop() error {
	r.cancel()
	return <-r.ended
}

func TestReloadDoesNotTouchAnEqualCluster(t *testing.T) {
	a, b := newCluster(t, "a"), newCluster(t, "b")
	r := run(t, config(patience, a.cfg, b.cfg))
	r.wait("a streaming", "b streaming")
	kept, replaced, first := r.receiver("a"), r.receiver("b"), b.Streams()[0]

	for i := range 3 {
		b.cfg.ApplicationName += "x"
		plan, err := r.Reload(t.Context(), config(patience, b.cfg, a.cfg))
		if err != nil || plan.String() != "restarted b; kept 1" {
			t.Fatalf("%s, %v", plan, err)
		}
		r.wait("b streaming", "a streaming") // in the new file's order
		if n := len(b.Streams()); n != i+2 {
			t.Errorf("b had %d streams", n)
		}
	}
	if r.receiver("a") != kept || len(a.Streams()) != 1 || a.Streams()[0].Ended().Gone {
		t.Error("the cluster that did not change was touched")
	}
	if r.receiver("b") == replaced || !first.Ended().CopyDone {
		t.Error("the cluster that changed was not stopped in good order")
	}
	if r.log.has("locked by another") || r.log.has("is active for PID") {
		t.Error("the replacement was started before the old one had stopped")
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
}

func TestReloadStartsAndStops(t *testing.T) {
	a, b, c := newCluster(t, "a"), newCluster(t, "b"), newCluster(t, "c")
	r := run(t, config(patience, a.cfg, b.cfg))
	r.wait("a streaming", "b streaming")
	plan, err := r.Reload(t.Context(), config(patience, c.cfg, b.cfg))
	if err != nil || plan.String() != "started c; stopped a; kept 1" {
		t.Fatalf("%s, %v", plan, err)
	}
	r.wait("c streaming", "b streaming")
	if !a.Streams()[0].Ended().CopyDone || !r.log.has(`msg="cluster removed: its files stay`) {
		t.Error("the removed cluster was not stopped in good order, or without a warning")
	}
	a.Do(func(s *pgtest.State) {
		if s.Slots["walfleet"] == nil {
			t.Error("the removed cluster's slot was dropped")
		}
	})
	if _, err := os.Stat(filepath.Join(a.cfg.Dir, "archive.json")); err != nil {
		t.Error(err)
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
}

// A cluster that needs a person, and one that is down, are no concern of the others.
func TestClustersAreIsolated(t *testing.T) {
	a, halted, down := newCluster(t, "a"), newCluster(t, "halted"), newCluster(t, "down")
	halted.cfg.Conninfo = "host=x keepalives=what"
	down.cfg.Conninfo = "user=archiver host=" + t.TempDir()
	r := run(t, config(patience, halted.cfg, a.cfg, down.cfg))
	r.wait("halted halted", "a streaming", "down backoff")
	if err := r.stop(); err != nil {
		t.Error(err)
	}
}

// stuck makes a cluster that no context stops: it reads its password from a pipe into which nobody writes. wait returns
// when it does that, and release lets it go on, with no password.
func stuck(t *testing.T, name string) (c *cluster, wait, release func()) {
	t.Helper()
	c = newCluster(t, name)
	c.cfg.PasswordFile = filepath.Join(t.TempDir(), "pipe")
	if err := syscall.Mkfifo(c.cfg.PasswordFile, 0o600); err != nil {
		t.Skip(err)
	}
	var pipe *os.File // the end to write to, which a pipe without a reader does not give
	wait = func() {
		t.Helper()
		for begun := time.Now(); time.Since(begun) < patience; time.Sleep(5 * time.Millisecond) {
			var err error
			if pipe, err = os.OpenFile(c.cfg.PasswordFile, os.O_WRONLY|syscall.O_NONBLOCK, 0); err == nil {
				return
			}
		}
		t.Fatalf("%s does not read its password", name)
	}
	release = sync.OnceFunc(func() {
		empty := c.cfg.PasswordFile + ".empty"
		if err := os.WriteFile(empty, nil, 0o600); err != nil {
			t.Error(err)
		}
		if err := os.Rename(empty, c.cfg.PasswordFile); err != nil {
			t.Error(err)
		}
		pipe.Close() // nil when wait has failed
	})
	t.Cleanup(release)
	return c, wait, release
}

func TestReloadReportsAClusterThatDoesNotStop(t *testing.T) {
	const short = 200 * time.Millisecond
	c, wait, release := stuck(t, "c")
	a := newCluster(t, "a")
	r := run(t, config(patience, c.cfg, a.cfg))
	r.wait("c connecting", "a streaming")
	wait()
	old := r.receiver("c")

	changed := c.cfg
	changed.ApplicationName = "another"
	for _, cfg := range []receiver.Config{changed, c.cfg, changed} { // told to stop, nothing is as it was, even when the file is
		plan, err := r.Reload(t.Context(), config(short, cfg, a.cfg))
		var stuck *StuckError
		if !errors.As(err, &stuck) || !slices.Equal(stuck.Names, []string{"c"}) || plan.String() != "kept 1" {
			t.Errorf("%s, %v", plan, err)
		}
		if r.receiver("c") != old || r.Status()[0].Stopping.IsZero() {
			t.Error("another receiver was started on top of it, or nothing says that it has been told to stop")
		}
	}
	// It is not forgotten: what the last file said follows by itself.
	release()
	r.wait("c streaming", "a streaming")
	if r.receiver("c") == old || !r.Status()[0].Stopping.IsZero() || c.Streams()[0].Startup()["application_name"] != "another" {
		t.Errorf("not replaced: %+v", r.Status()[0])
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
}

// A cluster that is removed, and put back before it has stopped, has one receiver all the time.
func TestStuckClusterThatIsRemovedAndComesBack(t *testing.T) {
	const short = 100 * time.Millisecond
	c, wait, release := stuck(t, "c")
	a := newCluster(t, "a")
	r := run(t, config(patience, c.cfg, a.cfg))
	wait()
	for _, clusters := range [][]receiver.Config{{a.cfg}, {a.cfg, c.cfg}, {a.cfg}} {
		if _, err := r.Reload(t.Context(), config(short, clusters...)); !errors.As(err, new(*StuckError)) {
			t.Errorf("%v", err)
		}
	}
	r.wait("a streaming", "c connecting") // told to stop, and still there
	release()
	r.wait("a streaming")
	if err := r.stop(); err != nil {
		t.Error(err)
	}
}

// A change that a running receiver can take costs no connection, and ends what it was about.
func TestReloadAdjustsWithoutAReconnect(t *testing.T) {
	a := newCluster(t, "a")
	r := run(t, config(patience, a.cfg))
	r.wait("a streaming")
	same := r.receiver("a")
	full := a.cfg
	full.MinFree = 1 << 60
	for _, step := range []struct {
		cfg  receiver.Config
		want string
	}{{full, "a blocked"}, {a.cfg, "a streaming"}} {
		plan, err := r.Reload(t.Context(), config(patience, step.cfg))
		if err != nil || plan.String() != "adjusted a; kept 0" {
			t.Fatalf("%s, %v", plan, err)
		}
		r.wait(step.want)
	}
	if r.receiver("a") != same || len(a.Streams()) != 1 || a.Streams()[0].Ended().Gone {
		t.Error("the connection was made anew")
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
}

// Whoever reloads may have mended something beside the file.
func TestReloadLooksAgainAtAHaltedCluster(t *testing.T) {
	a := newCluster(t, "a")
	if err := os.MkdirAll(a.cfg.Dir, 0o700); err != nil {
		t.Fatal(err)
	}
	meta := filepath.Join(a.cfg.Dir, "archive.json")
	if err := os.WriteFile(meta, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	r := run(t, config(patience, a.cfg))
	r.wait("a halted")
	halted := r.Status()[0].Since
	if err := os.Remove(meta); err != nil {
		t.Fatal(err)
	}
	plan, err := r.Reload(t.Context(), config(patience, a.cfg))
	if err != nil || plan.String() != "kept 1" {
		t.Fatalf("%s, %v", plan, err)
	}
	r.wait("a streaming")
	if took := r.Status()[0].Since.Sub(halted); took >= 30*time.Second {
		t.Errorf("streaming after %s, when it would have been looked at without the reload", took)
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
}

func TestRunReturnsAfterAllHaveEnded(t *testing.T) {
	a, b := newCluster(t, "a"), newCluster(t, "b")
	r := run(t, config(patience, a.cfg, b.cfg))
	r.wait("a streaming", "b streaming")
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	for _, s := range r.Status() {
		if s.State != receiver.Stopped {
			t.Errorf("%s is %s", s.Name, s.State)
		}
	}
	for _, c := range []*cluster{a, b} {
		d, err := archive.Open(c.cfg.Dir)
		if err != nil {
			t.Fatal(err)
		}
		d.Close()
		if !c.Streams()[0].Ended().CopyDone {
			t.Error("no good-bye")
		}
	}
}

func TestRunNamesThoseThatDoNotEnd(t *testing.T) {
	const short = 5 * time.Second // long enough for one that ends
	a, waitA, releaseA := stuck(t, "a")
	c, waitC, releaseC := stuck(t, "c")
	b := newCluster(t, "b")
	r := run(t, config(short, c.cfg, b.cfg, a.cfg))
	r.wait("c connecting", "b streaming", "a connecting")
	waitA()
	waitC()
	begun := time.Now()
	err := r.stop()
	if err == nil || !strings.Contains(err.Error(), ": a, c;") {
		t.Errorf("%v", err)
	}
	if took := time.Since(begun); took < short {
		t.Errorf("took %s", took)
	}
	r.wait("c connecting", "b stopped", "a connecting")
	releaseA()
	releaseC()
	r.wait("c stopped", "b stopped", "a stopped")
}

func TestReloadOfAFleetThatDoesNotRunIsRefused(t *testing.T) {
	a := newCluster(t, "a")
	f := New(config(time.Second, a.cfg), slog.New(slog.DiscardHandler))
	if _, err := f.Reload(t.Context(), config(time.Second)); err == nil {
		t.Error("before Run: no error")
	}
	r := run(t, config(patience, a.cfg))
	r.wait("a streaming")
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	b := newCluster(t, "b")
	if _, err := r.Reload(t.Context(), config(time.Second, a.cfg, b.cfg)); err == nil {
		t.Error("after Run: no error")
	}
	if s := r.Status(); len(s) != 1 || s[0].State != receiver.Stopped {
		t.Errorf("%+v", s)
	}
	if len(b.Streams()) != 0 {
		t.Error("a receiver was started after the end")
	}
}

// Reloads and a shutdown at the same time neither deadlock nor leave a receiver behind.
func TestReloadsDuringShutdown(t *testing.T) {
	a, b := newCluster(t, "a"), newCluster(t, "b")
	r := run(t, config(patience, a.cfg))
	r.wait("a streaming")
	var wg sync.WaitGroup
	for i := range 6 {
		wg.Go(func() {
			changed := a.cfg
			changed.ApplicationName = fmt.Sprint(i)
			_, _ = r.Reload(t.Context(), config(patience, changed, b.cfg))
		})
	}
	time.Sleep(20 * time.Millisecond) // some reloads come before the end, and some after it
	if err := r.stop(); err != nil {
		t.Error(err)
	}
	wg.Wait()
	for _, s := range r.Status() {
		if s.State != receiver.Stopped && s.State != receiver.Connecting {
			t.Errorf("%s is %s", s.Name, s.State)
		}
	}
}

// The clusters of a fleet share one limit on attempts to connect.
func TestClustersConnectInTurns(t *testing.T) {
	dir, err := os.MkdirTemp("", "walfleet")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	ln, err := net.Listen("unix", filepath.Join(dir, ".s.PGSQL.5432"))
	if err != nil {
		t.Fatal(err)
	}
	const n = connectAttempts + 5
	came := make(chan time.Time, 10*n)
	served := make(chan struct{})
	go func() {
		defer close(served)
		var all []net.Conn // and nobody is answered
		for {
			c, err := ln.Accept()
			if err != nil {
				break
			}
			came <- time.Now()
			all = append(all, c)
		}
		for _, c := range all {
			c.Close()
		}
	}()
	t.Cleanup(func() { ln.Close(); <-served })
	var clusters []receiver.Config
	for i := range n {
		c := defaultCluster()
		c.Name, c.Monitor = fmt.Sprintf("c%d", i), false // the monitor has connections of its own
		c.Dir, c.Conninfo = filepath.Join(t.TempDir(), c.Name), "user=archiver host="+dir
		clusters = append(clusters, c)
	}
	r := run(t, config(patience, clusters...))
	var times []time.Time
	for len(times) < n {
		select {
		case at := <-came:
			times = append(times, at)
		case <-time.After(patience):
			t.Fatalf("only %d clusters of %d had a turn", len(times), n)
		}
	}
	// A place whose host does not answer is given to the next after a second.
	if d := times[connectAttempts].Sub(times[0]); d < 800*time.Millisecond {
		t.Errorf("more than %d clusters connected within %s", connectAttempts, d)
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
}

// A cluster that did not stop in its time can end between the next reload's plan, which removes it, and its turn.
func TestClusterEndsWhileItsRemovalIsPlanned(t *testing.T) {
	r := run(t, config(patience))
	<-r.Started()
	if !r.replace(t.Context(), "gone", nil, time.Second) {
		t.Error("a cluster that has ended did not stop in time")
	}
	if all := r.Status(); len(all) != 0 {
		t.Errorf("clusters of none: %v", all)
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
}
