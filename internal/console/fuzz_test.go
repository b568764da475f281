package console

import (
	"bufio"
	"bytes"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walfleet/walfleet/fleet"
)

// recorded is the server's end of a connection on which a client has sent everything at
// once and gone on reading.
type recorded struct {
	in     *bytes.Reader
	out    bytes.Buffer
	once   sync.Once
	closed chan struct{}
}

func (c *recorded) Read(p []byte) (int, error)  { return c.in.Read(p) }
func (c *recorded) Write(p []byte) (int, error) { return c.out.Write(p) }
func (c *recorded) Close() error {
	c.once.Do(func() { close(c.closed) })
	return nil
}
func (*recorded) LocalAddr() net.Addr              { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 9851} }
func (*recorded) RemoteAddr() net.Addr             { return &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: 40000} }
func (*recorded) SetDeadline(time.Time) error      { return nil }
func (*recorded) SetReadDeadline(time.Time) error  { return nil }
func (*recorded) SetWriteDeadline(time.Time) error { return nil }

// FuzzRequest sends anything: no handler fails, nothing is answered without the headers that keep it to itself, and
// nothing but reading succeeds.
func FuzzRequest(f *testing.F) {
	for _, path := range []string{"/", "/metrics", "/api/v1/status", "/api/v1/status/orders", "/api/v1/contents/orders", "/healthz", "/readyz",
		"/clusters/orders", "/assets/x.css", "/assets/../x", "//", "/%2e%2e", "/a%00", "*", "/metrics?name[]=a&name[]=%ff&name[]="} {
		f.Add([]byte("GET " + path + " HTTP/1.1\r\nHost: localhost\r\n\r\n"))
	}
	for _, request := range []string{
		"", "\x00", "GET", "GET / HTTP/1.1\r\n\r\n", "GET / HTTP/1.0\r\n\r\n", "GET / HTTP/9.9\r\nHost: localhost\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
		"POST /api/v1/status HTTP/1.1\r\nHost: localhost\r\nContent-Length: 3\r\n\r\nabc", "OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n",
		"GET /metrics HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n", "GET / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: gzip\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: localhost\r\nUpgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAAA\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: localhost\r\nExpect: 100-continue\r\n\r\n", "GET / HTTP/1.1\r\nHost: localhost\r\nExpect: x\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: evil.example\r\n\r\n", "GET / HTTP/1.1\r\nHost: localhost\r\nOrigin: null\r\nSec-Fetch-Site: cross-site\r\n\r\n",
		"GET /metrics HTTP/1.1\r\nHost: [::1]:1\r\nAccept: application/openmetrics-text; version=1.0.0; q=x, */*\r\nAccept-Encoding: zstd;q=2, gzip\r\n\r\n",
		"GET / HTTP/1.1\r\nHost: localhost\r\nAccept-Language: zh-CN;q=0.5, \xff\r\nCookie: a=\x01\r\nAuthorization: Basic !\r\nRange: bytes=0-1\r\nLast-Event-ID: -1\r\n\r\n",
		"CONNECT localhost:1 HTTP/1.1\r\nHost: localhost\r\n\r\n", "HEAD http://localhost/healthz HTTP/1.1\r\nHost: x\r\n\r\n",
	} {
		f.Add([]byte(request))
	}
	var log logBuffer
	s := newServer(fleetOf("orders"), log.logger(), usual)
	next, err := s.prepare(fleet.HTTPConfig{}, nil)
	if err != nil {
		f.Fatal(err)
	}
	s.settings.Store(next)
	p := make(pipes)
	a := s.newAddress("", p)
	s.begin(a)
	f.Cleanup(func() {
		s.close(a)
		s.listeners.Wait()
	})
	f.Fuzz(func(t *testing.T, request []byte) {
		c := &recorded{in: bytes.NewReader(request), closed: make(chan struct{})}
		p <- c
		<-c.closed
		if text := log.String(); strings.Contains(text, "panic") || strings.Contains(text, "level=ERROR") {
			t.Fatalf("%q: %s", request, text)
		}
		log.reset()
		if c.out.Len() == 0 {
			return // not a request
		}
		answer := c.out.String()
		method, _, _ := bytes.Cut(bytes.TrimLeft(request, "\r\n"), []byte(" "))
		response, err := http.ReadResponse(bufio.NewReader(&c.out), &http.Request{Method: string(method)})
		if err != nil {
			t.Fatalf("%q: %v: %q", request, err, answer)
		}
		defer response.Body.Close()
		switch response.StatusCode {
		case 100, 400, 417, 431, 501, 505:
			if response.Header.Get("Content-Security-Policy") == "" { // of package http itself, which nothing of ours has seen
				if body, _ := io.ReadAll(response.Body); len(body) > 200 {
					t.Errorf("%q: %q", request, answer)
				}
				return
			}
		}
		checkHeaders(t, string(request), response.Header)
		if response.StatusCode >= 500 && response.StatusCode != 503 || response.StatusCode == 200 && string(method) != "GET" && string(method) != "HEAD" {
			t.Errorf("%q: %s", request, response.Status)
		}
	})
}
