package integration

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"
)

// TestHTTPClientsDelayNoReceiver has a server that does not commit without walfleet, and HTTP clients of every bad kind.
// Commits go on, and walfleet's memory stays small.
func TestHTTPClientsDelayNoReceiver(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{segment: megabyte})
	s.query(t, "CREATE TABLE ticks (i int)")
	address := fmt.Sprintf("%s:%d", host, freePort(t))
	_, port, _ := net.SplitHostPort(address)
	at, _ := strconv.Atoi(port)
	p := startProgram(t, listening(at, configText(t.TempDir(), cluster("orders", s.conninfo()))))
	p.stderr.await(t, "caught up, streaming", "cluster=orders")
	s.set(t, "synchronous_standby_names", "walfleet")
	await(t, patience, "walfleet is the synchronous standby", func() (bool, string) {
		got := s.sender(t, "walfleet")
		return got.sync == "sync", fmt.Sprintf("%+v", got)
	})

	const commits = 400
	before := commitTimes(t, s, commits)
	memory := residentMemory(t, p)
	bad := startBadClients(t, address)
	during := commitTimes(t, s, commits)
	await(t, patience, "enough of each kind of bad client", func() (bool, string) {
		counts := bad.counts()
		return !slices.ContainsFunc(counts, func(n int) bool { return n < 20 }), fmt.Sprint(counts)
	})
	during = append(during, commitTimes(t, s, commits)...)
	attacked := residentMemory(t, p)
	begin := time.Now()
	get(t, "http://"+address+"/api/v1/status")
	t.Logf("beside them somebody else got the JSON in %s", time.Since(begin).Round(time.Millisecond))
	bad.stop()
	slices.Sort(before)
	slices.Sort(during)
	percentile := func(times []time.Duration, n int) time.Duration {
		return times[(len(times)-1)*n/100].Round(10 * time.Microsecond)
	}
	for _, of := range []struct {
		what  string
		times []time.Duration
	}{{"alone", before}, {"beside bad clients", during}} {
		t.Logf("%d synchronous commits %s: median %s, p99 %s, longest %s", len(of.times), of.what,
			percentile(of.times, 50), percentile(of.times, 99), percentile(of.times, 100))
	}
	t.Logf("bad clients %v (of %v); memory %d MB before, %d MB beside them", bad.counts(), badKinds(), memory>>20, attacked>>20)
	// The bad clients want the same processors as the server: some of what they cost is theirs to have.
	if got, limit := percentile(during, 99), 10*percentile(before, 99)+500*time.Millisecond; got > limit {
		t.Errorf("p99 of commits is %s beside bad clients, and was %s", got, percentile(before, 99))
	}
	if longest := percentile(during, 100); longest > 10*time.Second {
		t.Errorf("a commit took %s", longest)
	}
	if attacked > memory+128<<20 {
		t.Errorf("memory grew from %d to %d MB", memory>>20, attacked>>20)
	}
	if end, got := s.end(t), awaitSlotFlushed(t, s, "walfleet", s.end(t)); got.flush < end {
		t.Errorf("flushed %s of %s", got.flush, end)
	}

	// When they are gone, everybody else is served as before.
	goroutines := regexp.MustCompile(`(?m)^go_goroutines (\d+)$`)
	await(t, patience, "their goroutines have ended", func() (bool, string) {
		found := goroutines.FindSubmatch(get(t, "http://"+address+"/metrics"))
		if found == nil {
			t.Fatal("no go_goroutines")
		}
		n, _ := strconv.Atoi(string(found[1]))
		return n < 100, string(found[0])
	})
	if text := p.stderr.String(); strings.Contains(text, "panic") || len(text) > 1<<20 {
		t.Errorf("the log has %d bytes, or a panic", len(text))
	}
}

// commitTimes are how long n commits took, one after the other.
func commitTimes(t *testing.T, s *server, n int) (times []time.Duration) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), patience)
	defer cancel()
	conn, err := s.connect(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(context.Background())
	for i := range n {
		begin := time.Now()
		if _, err := conn.Exec(ctx, "INSERT INTO ticks VALUES (1)").ReadAll(); err != nil {
			t.Fatalf("after %d commits: %v", i, err)
		}
		times = append(times, time.Since(begin))
	}
	return times
}

// residentMemory is the largest that a program has had, in bytes; 0: the system does not say.
func residentMemory(t *testing.T, p *program) int64 {
	t.Helper()
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", p.cmd.Process.Pid))
	if err != nil {
		t.Logf("memory is not looked at: %v", err)
		return 0
	}
	for line := range strings.Lines(string(text)) {
		if size, ok := strings.CutPrefix(line, "VmHWM:"); ok {
			kilobytes, err := strconv.ParseInt(strings.TrimSuffix(strings.TrimSpace(size), " kB"), 10, 64)
			if err != nil {
				t.Fatal(err)
			}
			return kilobytes << 10
		}
	}
	t.Fatalf("no VmHWM in %s", text)
	return 0
}

// A badKind is a way to be a bad client, over one connection. It returns when there is nothing left to do badly.
type badKind struct {
	name    string
	clients int // at a time
	behave  func(ctx context.Context, c *net.TCPConn) error
}

// request is one as a client sends it that means well.
func request(path string) string {
	return "GET " + path + " HTTP/1.1\r\nHost: localhost\r\n\r\n"
}

var kinds = []badKind{
	{"a header that never ends", 60, func(ctx context.Context, c *net.TCPConn) error {
		if _, err := io.WriteString(c, "GET / HTTP/1.1\r\nHost: localhost\r\nX-Slow: "); err != nil {
			return err
		}
		for ctx.Err() == nil {
			if _, err := c.Write([]byte("x")); err != nil {
				return nil // thrown out
			}
			pause(ctx, 200*time.Millisecond)
		}
		return nil
	}},
	{"streams that nobody reads", 60, unread("/events", 1)},
	{"answers that nobody reads", 40, unread("/metrics", 200)},
	{"connections that say nothing", 40, func(ctx context.Context, c *net.TCPConn) error {
		<-ctx.Done()
		return nil
	}},
	{"garbage", 2, flood("\x16\x03\x01\x02\x00\x01garbage\r\n\r\n")},
	{"headers too large", 2, flood("GET / HTTP/1.1\r\nHost: localhost\r\nX-Large: " + strings.Repeat("x", 60<<10) + "\r\n\r\n")},
	{"paths out of the tree", 2, flood(request("/assets/../../../../etc/passwd"))},
	{"bodies", 2, flood("POST /api/v1/status HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000000\r\n\r\nx")},
	{"strangers", 2, flood("GET / HTTP/1.1\r\nHost: attacker.example\r\n\r\n")},
	{"scrapes without a pause", 2, flood(request("/metrics"))},
}

func badKinds() (names []string) {
	for _, kind := range kinds {
		names = append(names, kind.name)
	}
	return names
}

// unread asks, and reads nothing of the answers.
func unread(path string, times int) func(context.Context, *net.TCPConn) error {
	return func(ctx context.Context, c *net.TCPConn) error {
		if err := c.SetReadBuffer(4 << 10); err != nil {
			return err
		}
		c.SetWriteDeadline(time.Now().Add(10 * time.Second)) // walfleet takes no more of them
		io.WriteString(c, strings.Repeat(request(path), times))
		<-ctx.Done()
		return nil
	}
}

// flood sends a request, and reads the answer.
func flood(text string) func(context.Context, *net.TCPConn) error {
	return func(ctx context.Context, c *net.TCPConn) error {
		c.SetDeadline(time.Now().Add(10 * time.Second))
		io.WriteString(c, text)
		if answer, err := http.ReadResponse(bufio.NewReader(c), nil); err == nil {
			io.Copy(io.Discard, answer.Body)
			answer.Body.Close()
		}
		pause(ctx, 5*time.Millisecond)
		return nil
	}
}

func pause(ctx context.Context, d time.Duration) {
	select {
	case <-ctx.Done():
	case <-time.After(d):
	}
}

// badClients are bad until they are stopped.
type badClients struct {
	stop func()

	mu        sync.Mutex
	connected []int // how often each kind of them was, so far
}

func (b *badClients) counts() []int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return slices.Clone(b.connected)
}

func startBadClients(t *testing.T, address string) *badClients {
	ctx, cancel := context.WithCancel(context.Background())
	var running sync.WaitGroup
	b := &badClients{connected: make([]int, len(kinds)), stop: func() {
		cancel()
		running.Wait()
	}}
	t.Cleanup(b.stop)
	for i, kind := range kinds {
		for range kind.clients {
			running.Go(func() {
				for ctx.Err() == nil {
					d := net.Dialer{Timeout: 5 * time.Second}
					conn, err := d.DialContext(ctx, "tcp", address)
					if err != nil {
						pause(ctx, 50*time.Millisecond)
						continue
					}
					b.mu.Lock()
					b.connected[i]++
					b.mu.Unlock()
					unblock := context.AfterFunc(ctx, func() { conn.SetDeadline(time.Now()) })
					kind.behave(ctx, conn.(*net.TCPConn))
					unblock()
					conn.Close()
				}
			})
		}
	}
	return b
}
