package systemd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/receiver"
)

// fakeFleet is a supervisor whose status a test sets.
type fakeFleet struct {
	started chan struct{}

	mu   sync.Mutex
	hold chan struct{} // when not nil: no status is to be had until it is closed
	all  []fleet.ClusterStatus
}

func newFakeFleet(all ...fleet.ClusterStatus) *fakeFleet {
	return &fakeFleet{started: make(chan struct{}), all: all}
}

func (f *fakeFleet) Started() <-chan struct{} { return f.started }

func (f *fakeFleet) Status() []fleet.ClusterStatus {
	f.mu.Lock()
	hold, all := f.hold, f.all
	f.mu.Unlock()
	if hold != nil {
		<-hold
	}
	return all
}

func (f *fakeFleet) set(all ...fleet.ClusterStatus) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.all = all
}

func in(state receiver.State, names ...string) (all []fleet.ClusterStatus) {
	for _, name := range names {
		all = append(all, fleet.ClusterStatus{Name: name, Status: receiver.Status{State: state}})
	}
	return all
}

// heard are the messages that systemd got, with the time since the start.
type heard struct {
	mu   sync.Mutex
	from time.Time
	all  []string
	err  error // what sending returns
}

func (h *heard) send(message string) error {
	h.mu.Lock()
	defer h.mu.Unlock()
	if h.err != nil {
		return h.err
	}
	h.all = append(h.all, fmt.Sprintf("%v %s", time.Since(h.from), strings.ReplaceAll(message, "\n", " ")))
	return nil
}

// take returns the messages since the last time.
func (h *heard) take() []string {
	h.mu.Lock()
	defer h.mu.Unlock()
	all := h.all
	h.all = nil
	return all
}

func expect(t *testing.T, h *heard, want ...string) {
	t.Helper()
	if got := h.take(); !slices.Equal(got, want) {
		t.Errorf("systemd heard %q, want %q", got, want)
	}
}

func TestReadyComesOnceTheReceiversRun(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, h := newFakeFleet(in(receiver.Connecting, "a", "b")...), &heard{from: time.Now()}
		s := &Service{fleet: f, log: slog.New(slog.DiscardHandler), send: h.send}
		ctx, cancel := context.WithCancel(t.Context())
		var wait sync.WaitGroup
		wait.Go(func() { s.Run(ctx) })

		s.Reloading()() // before READY a reload is nobody's business
		time.Sleep(time.Minute)
		expect(t, h)
		close(f.started)
		synctest.Wait()
		expect(t, h, "1m0s READY=1 STATUS=2 connecting")

		time.Sleep(time.Hour + time.Millisecond)
		expect(t, h) // nothing changed
		f.set(append(in(receiver.Streaming, "a"), in(receiver.Halted, "b")...)...)
		time.Sleep(time.Hour)
		expect(t, h, "1h1m1s STATUS=1 streaming, 1 halted: b")

		cancel()
		wait.Wait()
		expect(t, h, "2h1m0.001s STOPPING=1 STATUS=stopping")
		s.Reloading()()
		expect(t, h) // systemd is not told that what stops is ready
	})
}

// A fleet whose lock is stuck gets no further sign of life, and systemd may kill the process.
func TestTheWatchdogIsFedOnlyWhileTheFleetAnswers(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f, h := newFakeFleet(in(receiver.Streaming, "a")...), &heard{from: time.Now()}
		close(f.started)
		s := &Service{fleet: f, log: slog.New(slog.DiscardHandler), send: h.send, watchdog: 60 * time.Second}
		ctx, cancel := context.WithCancel(t.Context())
		defer cancel()
		var wait sync.WaitGroup
		wait.Go(func() { s.Run(ctx) })

		time.Sleep(90*time.Second + time.Millisecond)
		expect(t, h, "0s READY=1 STATUS=1 streaming", "30s WATCHDOG=1", "1m0s WATCHDOG=1", "1m30s WATCHDOG=1")
		hold := make(chan struct{})
		f.mu.Lock()
		f.hold = hold
		f.mu.Unlock()
		time.Sleep(time.Hour)
		expect(t, h)
		close(hold) // it was not for good after all
		synctest.Wait()
		if got := h.take(); len(got) == 0 || !strings.HasSuffix(got[0], "WATCHDOG=1") {
			t.Errorf("systemd heard %q after the fleet answered again", got)
		}
		cancel()
		wait.Wait()
	})
}

func TestAReloadIsAnnouncedWithItsTimeAndEnds(t *testing.T) {
	h := &heard{from: time.Now()}
	s := &Service{log: slog.New(slog.DiscardHandler), send: h.send, running: true}
	before := monotonic()
	first := s.Reloading()
	second := s.Reloading()
	first()
	if n := len(h.take()); n != 2 {
		t.Errorf("%d messages, want the two beginnings: one reload is still under way", n)
	}
	second()
	ready := h.take()
	if len(ready) != 1 || !strings.HasSuffix(ready[0], " READY=1") {
		t.Errorf("systemd heard %q at the end, want READY=1", ready)
	}

	done := s.Reloading()
	begun := h.take()
	done()
	found := regexp.MustCompile(`RELOADING=1 MONOTONIC_USEC=(\d+)$`).FindStringSubmatch(begun[0])
	var usec int64
	if found != nil {
		fmt.Sscan(found[1], &usec)
	}
	if usec < before || usec > monotonic() {
		t.Errorf("systemd heard %q, want RELOADING=1 and a time from %d on, in one message", begun, before)
	}
}

func TestWhatDoesNotArriveIsLoggedOnce(t *testing.T) {
	var log bytes.Buffer
	h := &heard{from: time.Now(), err: errors.New("no such file")}
	s := &Service{log: slog.New(slog.NewTextHandler(&log, nil)), send: h.send, running: true}
	for range 3 {
		s.Reloading()()
	}
	if n := strings.Count(log.String(), "cannot be told"); n != 1 {
		t.Errorf("logged %d times:\n%s", n, log.String())
	}
	h.err = nil
	s.Reloading()()
	if !strings.Contains(log.String(), "can be told again") {
		t.Errorf("the end of it is not logged:\n%s", log.String())
	}
}

// socket listens where a name says, as systemd does.
func socket(t *testing.T, name string) *net.UnixConn {
	t.Helper()
	c, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: name, Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	return c
}

func next(t *testing.T, c *net.UnixConn) string {
	t.Helper()
	buffer := make([]byte, 4096)
	n, err := c.Read(buffer)
	if err != nil {
		t.Fatalf("nothing was sent: %v", err)
	}
	return string(buffer[:n])
}

func TestMessagesReachTheSocketOfTheEnvironment(t *testing.T) {
	names := []string{filepath.Join(t.TempDir(), "notify")}
	if runtime.GOOS == "linux" { // which alone has the abstract namespace
		names = append(names, fmt.Sprintf("@walfleet-test-%d", os.Getpid()))
	}
	for _, name := range names {
		c := socket(t, name)
		t.Setenv("NOTIFY_SOCKET", name)
		t.Setenv("WATCHDOG_USEC", "20000") // 20 ms
		t.Setenv("WATCHDOG_PID", fmt.Sprint(os.Getpid()))
		f := newFakeFleet(in(receiver.Streaming, "a")...)
		close(f.started)
		s := New(f, slog.New(slog.DiscardHandler))
		ctx, cancel := context.WithCancel(t.Context())
		var wait sync.WaitGroup
		wait.Go(func() { s.Run(ctx) })
		for _, want := range []string{"READY=1\nSTATUS=1 streaming", "WATCHDOG=1", "WATCHDOG=1"} {
			if got := next(t, c); got != want {
				t.Errorf("%s: got %q, want %q", name, got, want)
			}
		}
		cancel()
		wait.Wait()
		got := next(t, c)
		for got == "WATCHDOG=1" { // sent meanwhile
			got = next(t, c)
		}
		if got != "STOPPING=1\nSTATUS=stopping" {
			t.Errorf("%s: got %q at the end", name, got)
		}
	}
}

func TestNothingHappensWithoutSystemd(t *testing.T) {
	for _, name := range []string{"", "relative", "vsock:2:1234"} {
		t.Setenv("NOTIFY_SOCKET", name)
		t.Setenv("WATCHDOG_USEC", "20000")
		s := New(newFakeFleet(), slog.New(slog.DiscardHandler))
		s.Run(t.Context()) // does not wait for the fleet's start, either
		s.Reloading()()
	}
}

func TestTheWatchdogsTimeIsOfThisProcess(t *testing.T) {
	own := fmt.Sprint(os.Getpid())
	for _, c := range []struct {
		usec, pid string
		want      time.Duration
		ok        bool
	}{
		{"", "", 0, true},
		{"60000000", "", time.Minute, true},
		{"60000000", own, time.Minute, true},
		{"60000000", own + "0", 0, true},
		{"2", "", 2 * time.Microsecond, true},
		{"1", "", 0, false}, // half of it is no time for a ticker
		{"0", "", 0, false},
		{"-5", "", 0, false},
		{"1m", "", 0, false},
		{"99999999999999999999", "", 0, false},
		{"9999999999999999", "", 0, false}, // would overflow
	} {
		got, err := watchdog(c.usec, c.pid)
		if got != c.want || (err == nil) != c.ok {
			t.Errorf("WATCHDOG_USEC=%s WATCHDOG_PID=%s: %v, %v; want %v, ok: %v", c.usec, c.pid, got, err, c.want, c.ok)
		}
	}
}

func TestSummary(t *testing.T) {
	var many, streaming []string
	for i := range 97 {
		streaming = append(streaming, fmt.Sprint("s", i))
	}
	for i := range 8 {
		many = append(many, fmt.Sprint("h", i))
	}
	for _, c := range []struct {
		all  []fleet.ClusterStatus
		want string
	}{
		{nil, "no clusters"},
		{in(receiver.Streaming, "a"), "1 streaming"},
		{slices.Concat(in(receiver.Halted, "orders"), in(receiver.Streaming, streaming...), in(receiver.Backoff, "b", "c")),
			"97 streaming, 2 backoff, 1 halted: orders"},
		{slices.Concat(in(receiver.Halted, "a", "b"), in(receiver.Blocked, "c"), in(receiver.CatchingUp, "d")),
			"1 catching up, 1 blocked: c; 2 halted: a, b"},
		{in(receiver.Halted, many...), "8 halted: h0, h1, h2, h3, h4 and 3 more"},
	} {
		if got := summary(c.all); got != c.want {
			t.Errorf("%q, want %q", got, c.want)
		}
	}
}
