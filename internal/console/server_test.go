package console

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/walfleet/walfleet/fleet"
)

// patience is how long anything in a test may take before it has failed.
const patience = 30 * time.Second

// fake is a fleet of which everything is known.
type fake struct {
	mu       sync.Mutex
	report   fleet.Report
	ready    error
	contents func(ctx context.Context, cluster string) (fleet.Contents, error)
}

func (f *fake) Report() fleet.Report {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.report
}

func (f *fake) ReportOf(cluster string) (fleet.Report, bool) { return f.Report().Cluster(cluster) }

func (f *fake) Contents(ctx context.Context, cluster string) (fleet.Contents, error) {
	return f.contents(ctx, cluster)
}

func (f *fake) Ready() error {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.ready
}

// logBuffer is a log that a test reads.
type logBuffer struct {
	mu sync.Mutex
	b  bytes.Buffer
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func (l *logBuffer) reset() {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.b.Reset()
}

func (l *logBuffer) logger() *slog.Logger {
	return slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: slog.LevelDebug}))
}

// running is a server until the end of the test.
type running struct {
	*Server
	log    logBuffer
	client *http.Client
}

// serve shows a source, at a port of its own unless c says another.
func serve(t testing.TB, s source, c fleet.HTTPConfig, l limits) *running {
	t.Helper()
	r := &running{}
	r.Server = newServer(s, r.log.logger(), l)
	if c.Listen == "" {
		c.Listen = "127.0.0.1:0"
	}
	if err := r.Follow(c); err != nil {
		t.Fatal(err)
	}
	transport := &http.Transport{DisableCompression: true}
	r.client = &http.Client{Transport: transport, Timeout: patience}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan struct{})
	go func() { defer close(ended); r.Run(ctx) }()
	t.Cleanup(func() {
		transport.CloseIdleConnections()
		cancel()
		select {
		case <-ended:
		case <-time.After(patience):
			t.Error("the server does not end")
		}
	})
	return r
}

func (r *running) url(path string) string { return "http://" + r.addr().String() + path }

// get is a whole answer; change may be nil.
func (r *running) get(t testing.TB, path string, change func(*http.Request)) (*http.Response, string) {
	t.Helper()
	request, err := http.NewRequestWithContext(t.Context(), http.MethodGet, r.url(path), nil)
	if err != nil {
		t.Fatal(err)
	}
	if change != nil {
		change(request)
	}
	response, err := r.client.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("%s: %v", path, err)
	}
	return response, string(body)
}

// raw sends bytes as they are and returns the answer.
func (r *running) raw(t testing.TB, text string) (*http.Response, string) {
	t.Helper()
	c := r.dial(t)
	defer c.Close()
	if _, err := io.WriteString(c, text); err != nil {
		t.Fatal(err)
	}
	response, err := http.ReadResponse(bufio.NewReader(c), nil)
	if err != nil {
		t.Fatalf("%.100q: %v", text, err)
	}
	defer response.Body.Close()
	body, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatalf("%.100q: %v", text, err)
	}
	return response, string(body)
}

func (r *running) dial(t testing.TB) net.Conn {
	t.Helper()
	c, err := net.DialTimeout("tcp", r.addr().String(), patience)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(patience)); err != nil {
		t.Fatal(err)
	}
	return c
}

// checkHeaders holds every answer to the headers that keep it to itself.
func checkHeaders(t testing.TB, what string, h http.Header) {
	t.Helper()
	for name, want := range headers {
		if got := strings.Join(h.Values(name), "|"); got != want && name != "Cache-Control" {
			t.Errorf("%s: %s is %q, want %q", what, name, got, want)
		}
	}
	if h.Get("Cache-Control") == "" {
		t.Errorf("%s: it may be cached", what)
	}
	for name := range h {
		if strings.HasPrefix(name, "Access-Control-") || strings.HasPrefix(name, "X-Injected") || name == "Set-Cookie" || name == "Server" || name == "Location" {
			t.Errorf("%s: it has %s: %s", what, name, h.Get(name))
		}
	}
}

func someFleet() *fake {
	return &fake{
		report: fleet.Report{Time: time.Unix(1e9, 0), Daemon: &fleet.DaemonReport{PID: 7, Version: "v1", Since: time.Unix(8e8, 0), Applied: time.Unix(9e8, 0)}, Clusters: []fleet.ClusterReport{
			{Name: "orders", State: "streaming", Health: fleet.Healthy}, {Name: "billing.eu", State: "halted", Health: fleet.Critical, Reason: "a gap <script>"},
		}},
		contents: func(_ context.Context, cluster string) (fleet.Contents, error) {
			if cluster != "orders" {
				return fleet.Contents{}, errors.New("the disk does not answer")
			}
			return fleet.Contents{Cluster: cluster, Directory: "/a"}, nil
		},
	}
}

func TestAnswers(t *testing.T) {
	t.Parallel()
	f := someFleet()
	s := serve(t, f, fleet.HTTPConfig{}, usual)
	const text, json = "text/plain; charset=utf-8", "application/json"
	for _, c := range []struct {
		path   string
		status int
		kind   string
		says   string
	}{
		{"/healthz", 200, text, "ok\n"},
		{"/readyz", 200, text, "ok\n"},
		{"/metrics", 200, "text/plain; version=0.0.4; charset=utf-8; escaping=underscores", `walfleet_health{cluster="billing.eu"} 2`},
		{"/api/v1/status", 200, json, `"name":"billing.eu","state":"halted","reason":"a gap \u003cscript\u003e"`},
		{"/api/v1/status/orders", 200, json, `"clusters":[{"name":"orders"`},
		{"/api/v1/status/billing.eu", 200, json, `"clusters":[{"name":"billing.eu"`},
		{"/api/v1/status/nobody", 404, json, `{"error":"there is no cluster of this name"}` + "\n"},
		{"/api/v1/contents/orders", 200, json, `"cluster":"orders"`},
		{"/api/v1/contents/billing.eu", 503, json, `{"error":"reading the archive: the disk does not answer"}` + "\n"},
		{"/api/v1/contents/nobody", 404, json, `{"error":"there is no cluster of this name"}` + "\n"},
		{"/api/v1/status?x=1", 200, json, `"orders"`},
		{"/api/v1/", 404, text, ""},
		{"/api", 404, text, ""},
		{"/favicon.ico", 404, text, ""},
		{"/v1/reload", 404, text, ""}, // the control socket's
		{"/debug/pprof/", 404, text, ""},
	} {
		response, body := s.get(t, c.path, nil)
		if response.StatusCode != c.status || response.Header.Get("Content-Type") != c.kind || !strings.Contains(body, c.says) {
			t.Errorf("%s: %s, %s, %.300q; want %d, %s, %q", c.path, response.Status, response.Header.Get("Content-Type"), body, c.status, c.kind, c.says)
		}
		checkHeaders(t, c.path, response.Header)
		head, body := s.get(t, c.path, func(r *http.Request) { r.Method = http.MethodHead })
		if head.StatusCode != c.status || body != "" {
			t.Errorf("HEAD %s: %s, %q", c.path, head.Status, body)
		}
	}
	f.mu.Lock()
	f.ready = errors.New("the last reload failed: w.toml:3: cluster \"orders\": slot")
	f.mu.Unlock()
	if response, body := s.get(t, "/readyz", nil); response.StatusCode != 503 || !strings.Contains(body, "w.toml:3:") {
		t.Errorf("not ready: %s, %q", response.Status, body)
	}
}

// Nothing can be changed, whatever the method.
func TestOnlyReading(t *testing.T) {
	t.Parallel()
	s := serve(t, someFleet(), fleet.HTTPConfig{}, usual)
	for _, path := range []string{"/", "/metrics", "/api/v1/status", "/api/v1/contents/orders", "/healthz", "/nothing", "*"} {
		for _, method := range []string{"POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "CONNECT", "PROPFIND", "get"} {
			what := method + " " + path
			response, _ := s.raw(t, what+" HTTP/1.1\r\nHost: localhost\r\n\r\n")
			if path == "*" && method != "OPTIONS" || method == "CONNECT" && response.StatusCode == 400 {
				continue // refused by net/http, or not
			}
			if response.StatusCode != 405 || response.Header.Get("Allow") != "GET, HEAD" {
				t.Errorf("%s: %s, %v", what, response.Status, response.Header)
			}
			checkHeaders(t, what, response.Header)
		}
	}
	// A body is refused before it is there.
	for _, c := range []struct {
		method, header string
		status         int
	}{
		{"POST", "Content-Length: 1000000000000", 405},
		{"POST", "Expect: 100-continue\r\nContent-Length: 5", 405},
		{"GET", "Content-Length: 5", 413},
		{"GET", "Transfer-Encoding: chunked", 413},
		{"GET", "Content-Length: 5\r\nTransfer-Encoding: chunked", 413},
		{"GET", "Content-Length: 5\r\nContent-Length: 6", 400},
	} {
		response, _ := s.raw(t, c.method+" /metrics HTTP/1.1\r\nHost: localhost\r\n"+c.header+"\r\n\r\n")
		if response.StatusCode != c.status || !response.Close {
			t.Errorf("%s with %q: %s, %v", c.method, c.header, response.Status, response.Header)
		}
	}
}

// Paths that are not plainly one of ours get nothing, neither a file nor a redirection.
func TestTraversal(t *testing.T) {
	t.Parallel()
	s := serve(t, someFleet(), fleet.HTTPConfig{}, usual)
	for _, path := range []string{
		"/../../etc/passwd", "/assets/../../../etc/passwd", "/assets/..%2f..%2fetc%2fpasswd", "/assets/%2e%2e/%2e%2e/etc/passwd", "/assets/..\\..\\server.go",
		"/assets/../metrics", "/assets/%2e%2e/metrics", "/./metrics", "//metrics", "/metrics/", "/metrics/.", "/metrics//", "//evil.example/..", "/%2fmetrics",
		"/api/v1/status/..", "/api/v1/status/../status", "/api/v1/status/%2e%2e", "/api/v1/status/..%2forders", "/api/v1/contents/..%2f..%2fetc",
		"/metrics%00", "/api/v1/status/orders%00", "/api/v1/status/%00", "/api/v1/status/orders%ff", "/metrics;a", "/Metrics", "/api/v1/status/ORDERS",
		"/clusters/%2e%2e", "/clusters/orders/../../metrics", "/assets/", "/assets", "/" + strings.Repeat("a", 10000), "/api/v1/status/" + strings.Repeat("%2e", 3000),
	} {
		response, body := s.raw(t, "GET "+path+" HTTP/1.1\r\nHost: localhost\r\n\r\n")
		if response.StatusCode != 404 || strings.Contains(body, "walfleet_") || strings.Contains(body, "root:") {
			t.Errorf("%.80s: %s, %.100q", path, response.Status, body)
		}
		checkHeaders(t, path, response.Header)
	}
	for path, status := range map[string]int{"/metrics\x00": 400, "/metrics\x7f": 400, "/%zz": 400, "metrics": 400, "": 400} {
		if response, _ := s.raw(t, "GET "+path+" HTTP/1.1\r\nHost: localhost\r\n\r\n"); response.StatusCode != status {
			t.Errorf("%.80q: %s, want %d", path, response.Status, status)
		}
	}
	for _, long := range []string{"GET /%s HTTP/1.1\r\nHost: localhost\r\n\r\n", "GET /metrics HTTP/1.1\r\nHost: localhost\r\nCookie: %s\r\n\r\n"} {
		c := s.dial(t)
		if _, err := fmt.Fprintf(c, long, strings.Repeat("a", 1<<20)); err == nil {
			answer, _ := io.ReadAll(c) // what is not read of a request can reset the connection
			if len(answer) > 0 && !strings.HasPrefix(string(answer), "HTTP/1.1 431 ") {
				t.Errorf("long %.20s: %.100q", long, answer)
			}
		}
	}
}

// What a client sends never becomes a line of the answer's header or of the log.
func TestHeaderInjection(t *testing.T) {
	t.Parallel()
	s := serve(t, someFleet(), fleet.HTTPConfig{}, usual)
	const evil = "%0d%0aX-Injected:%20yes%0d%0a%0d%0a<script>"
	for _, request := range []string{
		"GET /api/v1/status/orders" + evil + " HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"GET /api/v1/contents/" + evil + " HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"GET /clusters/" + evil + " HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"GET /" + evil + "/../ HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"GET /metrics?name[]=" + evil + " HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"GET /healthz HTTP/1.1\r\nHost: localhost" + evil + "\r\n\r\n",
		"GET /healthz HTTP/1.1\r\nHost: localhost\rX-Injected: yes\r\n\r\n",
		"GET /healthz HTTP/1.1\r\nHost: localhost\r\nOrigin: http://localhost" + evil + "\r\n\r\n",
		"GET http://localhost" + evil + "/ HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"\r\nX-Injected: yes\r\n\r\n",
	} {
		response, body := s.raw(t, request)
		if response.Header.Get("X-Injected") != "" || strings.Contains(body, "X-Injected") || strings.Contains(body, "<script>") {
			t.Errorf("%q: %v, %q", request, response.Header, body)
		}
	}
	for line := range strings.Lines(s.log.String()) {
		if !strings.HasPrefix(line, "time=") {
			t.Errorf("the log has the line %q", line)
		}
	}
}

// Other sites' pages get nothing, whether they ask by their own name or by one of theirs
// that points here.
func TestOtherSitesGetNothing(t *testing.T) {
	t.Parallel()
	s := serve(t, someFleet(), fleet.HTTPConfig{}, usual)
	port := s.addr().(*net.TCPAddr).Port
	for _, c := range []struct {
		host, headers string
		status        int
	}{
		// DNS rebinding.
		{"localhost", "", 200},
		{fmt.Sprintf("localhost:%d", port), "", 200},
		{"LocalHost.", "", 200},
		{"console.localhost:80", "", 200},
		{"127.0.0.1", "", 200},
		{"127.0.0.1:1", "", 200},
		{"[::1]:9851", "", 200},
		{"::1", "", 421}, // not how it is written
		{"evil.example", "", 421},
		{fmt.Sprintf("evil.example:%d", port), "", 421},
		{"127.0.0.1.evil.example", "", 421},
		{"localhost.evil.example", "", 421},
		{"evillocalhost", "", 421},
		{"evil.example:localhost", "", 421},

		// Cross-site requests.
		{"localhost", "Sec-Fetch-Site: none\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: document", 200},
		{"localhost", "Sec-Fetch-Site: same-origin\r\nSec-Fetch-Mode: cors\r\nSec-Fetch-Dest: empty", 200},
		{"localhost", "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: document", 200}, // a link
		{"localhost", "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: navigate\r\nSec-Fetch-Dest: iframe", 403},
		{"localhost", "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: no-cors\r\nSec-Fetch-Dest: script", 403},
		{"localhost", "Sec-Fetch-Site: cross-site\r\nSec-Fetch-Mode: cors\r\nSec-Fetch-Dest: empty", 403},
		{"localhost", "Sec-Fetch-Site: same-site\r\nSec-Fetch-Mode: no-cors\r\nSec-Fetch-Dest: image", 403}, // another port of this machine
		{"localhost", "Sec-Fetch-Site: what-comes-next", 403},
		{"localhost:1", "Origin: http://localhost:1", 200},
		{"localhost:1", "Origin: http://localhost:2", 403},
		{"localhost", "Origin: http://evil.example", 403},
		{"localhost", "Origin: null", 403},
		{"localhost", "Origin: http://%zz", 403},
		{"evil.example", "Origin: http://evil.example", 421},
	} {
		what := c.host + " " + c.headers
		response, body := s.raw(t, "GET /api/v1/status HTTP/1.1\r\nHost: "+c.host+"\r\n"+strings.TrimLeft(c.headers+"\r\n", "\r\n")+"\r\n")
		if response.StatusCode != c.status || strings.Contains(body, "orders") != (c.status == 200) {
			t.Errorf("%q: %s, %.100q; want %d", what, response.Status, body, c.status)
		}
		checkHeaders(t, what, response.Header)
	}
	if response, _ := s.raw(t, "GET /healthz HTTP/1.0\r\n\r\n"); response.StatusCode != 200 { // a load balancer's
		t.Errorf("without Host: %s", response.Status)
	}
	if response, _ := s.raw(t, "GET http://evil.example/healthz HTTP/1.1\r\nHost: localhost\r\n\r\n"); response.StatusCode != 421 {
		t.Errorf("another name in the path: %s", response.Status)
	}
}

// A name of one's own is fine at an address that is not this machine's alone.
func TestHostElsewhere(t *testing.T) {
	r := func(local string) *http.Request {
		addr, err := net.ResolveTCPAddr("tcp", local)
		if err != nil {
			t.Fatal(err)
		}
		request, _ := http.NewRequestWithContext(context.WithValue(t.Context(), http.LocalAddrContextKey, addr), "GET", "http://archive.example.com/", nil)
		return request
	}
	if !hostAllowed(r("192.0.2.1:9851")) || hostAllowed(r("127.0.0.1:9851")) || hostAllowed(r("127.1.2.3:9851")) || hostAllowed(r("[::1]:9851")) || hostAllowed(r("[::ffff:127.0.0.1]:9851")) {
		t.Error("wrong")
	}
}

// slowly begins a request of a client that takes nothing.
func (r *running) slowly(t *testing.T, request string) {
	t.Helper()
	c := r.dial(t)
	if err := c.(*net.TCPConn).SetReadBuffer(4096); err != nil {
		t.Fatal(err)
	}
	if _, err := io.WriteString(c, request); err != nil {
		t.Fatal(err)
	}
}

// A client that is slow to ask, or never takes its answer, is dropped, and nobody else notices
// before.
func TestSlowClients(t *testing.T) {
	t.Parallel()
	large := someFleet()
	large.report.Clusters[0].Reason = strings.Repeat("x", 8<<20) // more than a socket's buffers take
	requests := []string{"GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n", "GET / HTTP/1.1\r\nHost: local", "G", ""}
	t.Run("others are answered meanwhile", func(t *testing.T) {
		l := usual
		l.header, l.write = time.Hour, time.Hour
		s := serve(t, large, fleet.HTTPConfig{}, l)
		for _, request := range requests {
			s.slowly(t, request)
		}
		for _, path := range []string{"/healthz", "/metrics", "/api/v1/status/billing.eu"} {
			if response, _ := s.get(t, path, nil); response.StatusCode != 200 {
				t.Errorf("%s: %s", path, response.Status)
			}
		}
		if !large.mu.TryLock() {
			t.Fatal("a slow client holds the source's lock")
		}
		large.mu.Unlock()
	})
	// With room for one connection, the next one is answered when the slow one is dropped.
	for _, request := range requests {
		t.Run(fmt.Sprintf("%.20q", request), func(t *testing.T) {
			l := usual
			l.connections, l.header, l.write, l.idle = 1, 50*time.Millisecond, 100*time.Millisecond, 50*time.Millisecond
			s := serve(t, large, fleet.HTTPConfig{}, l)
			s.slowly(t, request)
			for began := time.Now(); ; { // this client may be too slow itself
				response, err := s.client.Get(s.url("/healthz"))
				if err == nil {
					response.Body.Close()
					return
				}
				if time.Since(began) > patience {
					t.Fatal(err)
				}
			}
		})
	}
}

// What is made for clients that do not take it is bounded, and who waits for that is told to
// come again; health is for everyone.
func TestAnswersAreLimited(t *testing.T) {
	t.Parallel()
	f := someFleet()
	asked, goOn := make(chan struct{}), make(chan struct{})
	f.contents = func(ctx context.Context, _ string) (fleet.Contents, error) {
		asked <- struct{}{}
		<-goOn
		return fleet.Contents{}, nil
	}
	l := usual
	l.answers, l.header = 2, 100*time.Millisecond
	s := serve(t, f, fleet.HTTPConfig{}, l)
	var both sync.WaitGroup
	for range 2 {
		both.Go(func() {
			if response, err := s.client.Get(s.url("/api/v1/contents/orders")); err != nil || response.StatusCode != 200 {
				t.Errorf("%+v, %v", response, err)
			}
		})
		<-asked
	}
	if response, _ := s.get(t, "/api/v1/status", nil); response.StatusCode != 503 || response.Header.Get("Retry-After") == "" {
		t.Errorf("the third: %s, %v", response.Status, response.Header)
	}
	if response, _ := s.get(t, "/healthz", nil); response.StatusCode != 200 {
		t.Errorf("health: %s", response.Status)
	}
	close(goOn)
	both.Wait()
	if response, _ := s.get(t, "/api/v1/status", nil); response.StatusCode != 200 {
		t.Errorf("after that: %s", response.Status)
	}
}

// pipes is a listener of connections that a test makes.
type pipes chan net.Conn

func (p pipes) Accept() (net.Conn, error) {
	c, ok := <-p
	if !ok {
		return nil, net.ErrClosed
	}
	return c, nil
}
func (p pipes) Close() error   { close(p); return nil }
func (p pipes) Addr() net.Addr { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9851} }

// Reading an archive may take longer than a request to be sent, and an answer to be taken.
func TestContentsHaveTime(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := someFleet()
		f.contents = func(ctx context.Context, _ string) (fleet.Contents, error) {
			select {
			case <-ctx.Done():
				return fleet.Contents{}, ctx.Err()
			case <-time.After(usual.contents - time.Second):
				return fleet.Contents{Cluster: "orders"}, nil
			}
		}
		l := usual
		l.header, l.write = time.Second, time.Second
		s := newServer(f, slog.New(slog.DiscardHandler), l)
		next, err := s.prepare(fleet.HTTPConfig{}, nil)
		if err != nil {
			t.Fatal(err)
		}
		s.settings.Store(next)
		p := make(pipes)
		a := s.newAddress("", p)
		s.begin(a)
		client, server := net.Pipe()
		defer client.Close()
		p <- server
		if _, err := io.WriteString(client, "GET /api/v1/contents/orders HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"); err != nil {
			t.Fatal(err)
		}
		if answer, _ := io.ReadAll(client); !strings.HasPrefix(string(answer), "HTTP/1.1 200 ") {
			t.Errorf("%.300q", answer)
		}
		s.close(a)
		s.listeners.Wait()
	})
}

func TestConnectionLimit(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		p := make(pipes, 10)
		l := limited(p, 2)
		accepted := make(chan net.Conn, 10)
		ended := make(chan error, 1)
		go func() {
			for {
				c, err := l.Accept()
				if err != nil {
					ended <- err
					return
				}
				accepted <- c
			}
		}()
		for range 4 {
			c, _ := net.Pipe()
			p <- c
		}
		synctest.Wait()
		if len(accepted) != 2 {
			t.Fatalf("%d connections, want 2", len(accepted))
		}
		first := <-accepted
		first.Close()
		first.Close() // makes room for one alone
		synctest.Wait()
		if len(accepted) != 2 {
			t.Errorf("%d connections more, want 2", len(accepted))
		}
		l.Close()
		if err := <-ended; !errors.Is(err, net.ErrClosed) {
			t.Errorf("Accept: %v", err)
		}
	})
}

// panicking is a source with a fault.
type panicking struct{ *fake }

func (panicking) Report() fleet.Report { panic("a fault with a secret") }

// A fault of a handler ends neither the process nor the connection, and tells the log alone.
func TestPanicIsAnsweredAndLogged(t *testing.T) {
	t.Parallel()
	s := serve(t, panicking{someFleet()}, fleet.HTTPConfig{}, usual)
	for _, path := range []string{"/api/v1/status", "/metrics"} {
		response, body := s.get(t, path, nil)
		if response.StatusCode != 500 || strings.Contains(body, "secret") || strings.Contains(body, "goroutine") || !strings.Contains(body, "fault of walfleet") {
			t.Errorf("%s: %s, %q", path, response.Status, body)
		}
		checkHeaders(t, path, response.Header)
	}
	if n := strings.Count(s.log.String(), `panic="a fault with a secret" stack=`); n != 2 {
		t.Errorf("%d panics in the log: %s", n, s.log.String())
	}
	if response, _ := s.get(t, "/healthz", nil); response.StatusCode != 200 {
		t.Errorf("after that: %s", response.Status)
	}
}

// More scrapes than a few at a time are refused, and do not pile up.
func TestScrapesAreLimited(t *testing.T) {
	t.Parallel()
	f := someFleet()
	l := usual
	l.scrapes = 1
	s := serve(t, f, fleet.HTTPConfig{}, l)
	f.mu.Lock() // as a source that does not answer
	first := make(chan int, 1)
	go func() {
		response, err := s.client.Get(s.url("/metrics"))
		if err != nil {
			first <- 0
			return
		}
		defer response.Body.Close()
		first <- response.StatusCode
	}()
	for {
		// Until the first one is at it this one is, and gives up.
		ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
		request, _ := http.NewRequestWithContext(ctx, "GET", s.url("/metrics"), nil)
		response, err := s.client.Do(request)
		cancel()
		if err == nil {
			response.Body.Close()
			if response.StatusCode != 503 {
				t.Errorf("the second: %s", response.Status)
			}
			break
		}
	}
	f.mu.Unlock()
	if status := <-first; status != 200 && status != 503 {
		t.Errorf("the first: %d", status)
	}
}

// Only what is bounded elsewhere, or costs nothing, does not wait for its turn.
func TestWhoWaitsForATurn(t *testing.T) {
	for path, free := range map[string]bool{
		"/events": true, "/clusters/orders/events": true, "/metrics": true, "/healthz": true, "/readyz": true,
		"/": false, "/clusters/orders": false, "/clusters/events": false, "/api/v1/status": false, "/api/v1/contents/events": false, "/x/events": false,
	} {
		if boundElsewhere(path) != free {
			t.Errorf("%s: %t", path, !free)
		}
	}
}
