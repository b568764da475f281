package console

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"math/big"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/walfleet/walfleet/fleet"
)

// answers tells whether a fleet is to be seen at an address.
func answers(t *testing.T, address string) bool {
	t.Helper()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: patience}
	response, err := client.Get("http://" + address + "/healthz")
	if err != nil {
		return false
	}
	response.Body.Close()
	return response.StatusCode == 200
}

// taken is an address that another program has.
func taken(t *testing.T, address string) net.Addr {
	t.Helper()
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	return l.Addr()
}

// A reload moves the server; where it cannot go it stays, and is whole.
func TestFollow(t *testing.T) {
	t.Parallel()
	s := serve(t, someFleet(), fleet.HTTPConfig{}, usual)
	first := s.addr().String()
	_, port, _ := net.SplitHostPort(first)

	other := taken(t, "127.0.0.1:0").String()
	err := s.Follow(fleet.HTTPConfig{Listen: other, User: "ann", PasswordHash: hashOfSecret})
	if err == nil || !strings.Contains(err.Error(), "[http] listen: another program has this address") || !strings.Contains(err.Error(), other) {
		t.Errorf("a taken port: %v", err)
	}
	if response, _ := s.get(t, "/metrics", nil); response.StatusCode != 200 || s.addr().String() != first {
		t.Errorf("after a taken port: %s at %s", response.Status, s.addr())
	}
	if err := s.Follow(fleet.HTTPConfig{Listen: "192.0.2.1:0"}); err == nil || !strings.Contains(err.Error(), "[http] listen: ") {
		t.Errorf("an address of another machine: %v", err)
	}

	follow := func(listen string) string {
		t.Helper()
		if err := s.Follow(fleet.HTTPConfig{Listen: listen}); err != nil {
			t.Fatal(err)
		}
		if s.addr() == nil {
			return ""
		}
		return s.addr().String()
	}
	if same := follow("127.0.0.1:0"); same != first {
		t.Errorf("without a change it moved to %s", same)
	}
	// One's own address makes room for one that has it too, and back.
	if all := follow(":" + port); !answers(t, first) || !strings.HasSuffix(all, ":"+port) {
		t.Errorf("at %s: no answer", all)
	}
	if !strings.Contains(s.log.String(), "level=WARN msg=\"everyone who reaches this address can see the fleet over HTTP") {
		t.Error("no warning")
	}
	if back := follow(first); back != first || !answers(t, first) {
		t.Errorf("back at %s: no answer", back)
	}
	// It comes back where that is not enough.
	taken(t, "127.0.0.2:"+port)
	if err := s.Follow(fleet.HTTPConfig{Listen: ":" + port}); err == nil || s.addr().String() != first || !answers(t, first) {
		t.Errorf("with another program at the port: %v, at %s", err, s.addr())
	}
	second := follow("localhost:0")
	if !answers(t, second) {
		t.Errorf("at %s: no answer", second)
	}
	s.gone(t, first)
	if nowhere := follow(""); nowhere != "" {
		t.Errorf("at %s", nowhere)
	}
	s.gone(t, second)
	if third := follow("127.0.0.1:0"); !answers(t, third) {
		t.Error("no answer at the end")
	}
}

// gone waits until nothing answers at an address that was given up.
func (r *running) gone(t *testing.T, address string) {
	t.Helper()
	for began := time.Now(); answers(t, address); {
		if time.Since(began) > patience {
			t.Fatalf("%s is not given up", address)
		}
	}
}

// Requests that go on, as event streams do, end with what they were let in with, and with
// the address. So does whoever holds a connection.
func TestFollowEndsWhatGoesOn(t *testing.T) {
	t.Parallel()
	f := someFleet()
	asked := make(chan struct{}, 1)
	f.contents = func(ctx context.Context, _ string) (fleet.Contents, error) {
		asked <- struct{}{}
		<-ctx.Done()
		return fleet.Contents{}, ctx.Err()
	}
	l := usual
	l.contents = time.Hour
	s := serve(t, f, fleet.HTTPConfig{}, l)
	for _, c := range []fleet.HTTPConfig{
		{Listen: "127.0.0.1:0", User: "ann", PasswordHash: hashOfSecret},
		{Listen: "localhost:0", User: "ann", PasswordHash: hashOfSecret},
		{},
	} {
		ended := make(chan error, 1)
		request, _ := http.NewRequestWithContext(t.Context(), "GET", s.url("/api/v1/contents/orders"), nil)
		request.SetBasicAuth("ann", "secret")
		go func() {
			response, err := s.client.Do(request)
			if err == nil {
				_, err = io.Copy(io.Discard, response.Body)
				response.Body.Close()
			}
			ended <- err
		}()
		<-asked
		if err := s.Follow(c); err != nil {
			t.Fatal(err)
		}
		select {
		case err := <-ended:
			if err != nil {
				t.Errorf("%+v: %v", c, err)
			}
		case <-time.After(patience):
			t.Fatalf("%+v: it goes on", c)
		}
	}
}

func TestFollowAfterTheEnd(t *testing.T) {
	s := newServer(someFleet(), slog.New(slog.DiscardHandler), usual)
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	s.Run(ctx)
	if err := s.Follow(fleet.HTTPConfig{Listen: "127.0.0.1:0"}); err == nil || s.addr() != nil {
		t.Errorf("it listens at %v, %v", s.addr(), err)
	}
}

// A certificate on a file system that does not answer holds up a reload, but not the end.
func TestTheEndDoesNotWaitForAFollow(t *testing.T) {
	dir := t.TempDir()
	pipe, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	if err := errors.Join(syscall.Mkfifo(pipe, 0o600), os.WriteFile(key, nil, 0o600)); err != nil {
		t.Fatal(err)
	}
	s := newServer(someFleet(), slog.New(slog.DiscardHandler), usual)
	followed := make(chan error, 1)
	go func() { followed <- s.Follow(fleet.HTTPConfig{Listen: "127.0.0.1:0", Certificate: pipe, Key: key}) }()
	w, err := os.OpenFile(pipe, os.O_WRONLY, 0) // waits until it is being read
	if err != nil {
		t.Fatal(err)
	}
	ended := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	go func() {
		defer close(ended)
		s.Run(ctx)
	}()
	select {
	case <-ended:
	case <-time.After(patience):
		t.Error("the end waits")
	}
	w.Close()
	if err := <-followed; err == nil {
		t.Error("no error")
	}
	<-ended
}

// What ends the listening by itself is said, and a reload mends it.
func TestAListenerThatFails(t *testing.T) {
	t.Parallel()
	s := serve(t, someFleet(), fleet.HTTPConfig{}, usual)
	s.mu.Lock()
	s.at.listener.Close()
	s.mu.Unlock()
	for began := time.Now(); s.addr() != nil; {
		if time.Since(began) > patience {
			t.Fatal("nobody noticed")
		}
	}
	if !strings.Contains(s.log.String(), "the fleet cannot be seen over HTTP any more") {
		t.Errorf("the log says %s", s.log.String())
	}
	if err := s.Follow(fleet.HTTPConfig{Listen: "127.0.0.1:0"}); err != nil || !answers(t, s.addr().String()) {
		t.Errorf("after a reload: %v", err)
	}
}

// pair is a certificate and its key in two files.
type pair struct{ dir, file, key string }

func newPair(t *testing.T) pair {
	dir := t.TempDir()
	return pair{dir, filepath.Join(dir, "c.pem"), filepath.Join(dir, "k.pem")}
}

// renew replaces the files. n is the certificate's serial number, and, since a file system's clock may be coarse,
// the age that the files are given.
func (p pair) renew(t *testing.T, n int64) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(n), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"localhost"}, IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	certificate, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	p.write(t, p.file, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: certificate}), n)
	p.write(t, p.key, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), n)
}

func (p pair) write(t *testing.T, file string, data []byte, n int64) {
	t.Helper()
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	if err := os.Chtimes(file, time.Time{}, time.Unix(n, 0)); err != nil {
		t.Fatal(err)
	}
}

// shake asks over TLS and returns the certificate's serial number and the answer.
func (r *running) shake(c *tls.Config) (serial int64, response *http.Response, err error) {
	c.InsecureSkipVerify = true // the serial number tells
	transport := &http.Transport{TLSClientConfig: c, ForceAttemptHTTP2: true, DisableKeepAlives: true}
	client := http.Client{Transport: transport, Timeout: patience}
	response, err = client.Get("https://" + r.addr().String() + "/healthz")
	if err != nil {
		return 0, nil, err
	}
	response.Body.Close()
	return response.TLS.PeerCertificates[0].SerialNumber.Int64(), response, nil
}

func TestTLS(t *testing.T) {
	t.Parallel()
	p := newPair(t)
	p.renew(t, 1)
	s := serve(t, someFleet(), fleet.HTTPConfig{Certificate: p.file, Key: p.key}, usual)
	serial, response, err := s.shake(&tls.Config{})
	if err != nil || serial != 1 || response.StatusCode != 200 || response.ProtoMajor != 2 {
		t.Errorf("certificate %d, %+v, %v", serial, response, err)
	}
	checkHeaders(t, "TLS", response.Header)
	if _, _, err := s.shake(&tls.Config{MaxVersion: tls.VersionTLS11}); err == nil {
		t.Error("TLS 1.1 is spoken")
	}
	if response, body := s.raw(t, "GET /api/v1/status HTTP/1.1\r\nHost: localhost\r\n\r\n"); response.StatusCode != 400 || strings.Contains(body, "orders") {
		t.Errorf("without TLS: %s, %q", response.Status, body)
	}

	// Its files are looked at again when there is a handshake, once a second at most.
	look := func() int64 {
		t.Helper()
		c := s.settings.Load().certificate
		c.mu.Lock()
		c.looked = time.Time{}
		c.mu.Unlock()
		serial, _, err := s.shake(&tls.Config{})
		if err != nil {
			t.Fatal(err)
		}
		return serial
	}
	p.renew(t, 2)
	if got := look(); got != 2 {
		t.Errorf("after a renewal the certificate is %d", got)
	}
	const broken = "the renewed certificate for HTTP cannot be used, the one before stays"
	for _, breaks := range []func(){
		func() { p.write(t, p.file, []byte("half"), 3) },
		func() { p.renew(t, 4); q := newPair(t); q.renew(t, 5); os.Rename(q.key, p.key) },
		func() { os.Remove(p.file) },
	} {
		before := strings.Count(s.log.String(), broken)
		breaks()
		for range 3 {
			if got := look(); got != 2 {
				t.Errorf("with broken files the certificate is %d", got)
			}
		}
		if n := strings.Count(s.log.String(), broken) - before; n != 1 {
			t.Errorf("it is said %d times", n)
		}
	}
	// Neither does a reload mind, unless it is about other files.
	same := fleet.HTTPConfig{Listen: "127.0.0.1:0", Certificate: p.file, Key: p.key, User: "ann", PasswordHash: hashOfSecret}
	if err := s.Follow(same); err != nil || look() != 2 {
		t.Errorf("a reload with broken files: %v", err)
	}
	other := same
	other.Certificate = filepath.Join(p.dir, "none.pem")
	if err := s.Follow(other); err == nil || !strings.Contains(err.Error(), "[http] tls_certificate and tls_key: ") || look() != 2 {
		t.Errorf("a reload with another certificate: %v", err)
	}
	p.renew(t, 6)
	if got := look(); got != 6 {
		t.Errorf("after it was mended the certificate is %d", got)
	}

	// TLS is turned off, and who holds a connection from before has to come again.
	old, err := tls.Dial("tcp", s.addr().String(), &tls.Config{InsecureSkipVerify: true})
	if err != nil {
		t.Fatal(err)
	}
	defer old.Close()
	ask := func(c net.Conn) string {
		t.Helper()
		_ = c.SetDeadline(time.Now().Add(patience))
		fmt.Fprint(c, "GET /healthz HTTP/1.1\r\nHost: localhost\r\n\r\n")
		buffer := make([]byte, 4096)
		n, err := c.Read(buffer)
		if err != nil {
			t.Fatal(err)
		}
		return string(buffer[:n])
	}
	if got := ask(old); !strings.HasPrefix(got, "HTTP/1.1 200 ") {
		t.Errorf("%.100q", got)
	}
	if err := s.Follow(fleet.HTTPConfig{Listen: "127.0.0.1:0"}); err != nil {
		t.Fatal(err)
	}
	if got := ask(old); !strings.HasPrefix(got, "HTTP/1.1 421 ") || !strings.Contains(got, "Connection: close") {
		t.Errorf("%.100q", got)
	}
	if response, _ := s.get(t, "/healthz", nil); response.StatusCode != 200 {
		t.Errorf("without TLS: %s", response.Status)
	}
}

// One who never finishes a handshake is dropped.
func TestSlowHandshake(t *testing.T) {
	t.Parallel()
	p := newPair(t)
	p.renew(t, 1)
	l := usual
	l.header = 50 * time.Millisecond
	s := serve(t, someFleet(), fleet.HTTPConfig{Certificate: p.file, Key: p.key}, l)
	c := s.dial(t)
	if _, err := io.WriteString(c, "\x16\x03\x01"); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadAll(c); err != nil && strings.Contains(err.Error(), "timeout") {
		t.Errorf("%v", err)
	}
}

// What is secret in the configuration is in no answer and in no line of the log.
func TestSecretsStayInside(t *testing.T) {
	dir := t.TempDir()
	p := newPair(t)
	p.renew(t, 1)
	text := fmt.Sprintf("archive_dir = %q\n[http]\nlisten = \"127.0.0.1:0\"\nuser = \"ann\"\npassword_hash = %q\ntls_certificate = %q\ntls_key = %q\n", dir, hashOfSecret, p.file, p.key) +
		fmt.Sprintf("[[cluster]]\nname = \"orders\"\nconninfo = \"host=%s/none user=u password=hunter2\"\n", dir) +
		"[[cluster]]\nname = \"billing\"\nconninfo = \"postgresql://u:hunter2@127.0.0.1:1/?password=hunter2\"\n"
	file := filepath.Join(dir, "w.toml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(text)
	cfg, err := fleet.Load(file)
	if err != nil {
		t.Fatal(err)
	}
	var level slog.LevelVar
	var log logBuffer
	d, err := fleet.NewDaemon(file, cfg, log.logger(), &level, "v1")
	if err != nil {
		t.Fatal(err)
	}
	s := &running{Server: New(d, log.logger())}
	if err := s.Follow(cfg.HTTP); err != nil {
		t.Fatal(err)
	}
	d.Follow = s.Follow
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 2)
	go func() { ended <- d.Run(ctx) }()
	go func() { s.Run(ctx); ended <- nil }()
	defer func() {
		cancel()
		for range 2 {
			if err := <-ended; err != nil {
				t.Error(err)
			}
		}
	}()
	<-d.Started()
	write(strings.Replace(text, "ann", "ann:hunter2", 1))
	refused := d.Reload(ctx, "")
	if refused.Applied || refused.Error == "" {
		t.Errorf("%+v", refused)
	}

	transport := &http.Transport{TLSClientConfig: &tls.Config{InsecureSkipVerify: true}}
	defer transport.CloseIdleConnections()
	client := http.Client{Transport: transport, Timeout: patience}
	seen := 0
	for _, path := range []string{
		"/", "/metrics", "/api/v1/status", "/api/v1/status/orders", "/api/v1/status/billing", "/api/v1/contents/orders", "/api/v1/contents/billing",
		"/healthz", "/readyz", "/clusters/orders", "/clusters/billing", "/nothing",
	} {
		for _, user := range []string{"", "ann"} {
			request, _ := http.NewRequestWithContext(ctx, "GET", "https://"+s.addr().String()+path, nil)
			if user != "" {
				request.SetBasicAuth(user, "secret")
			}
			response, err := client.Do(request)
			if err != nil {
				t.Fatal(err)
			}
			body, err := io.ReadAll(response.Body)
			response.Body.Close()
			if err != nil {
				t.Fatal(err)
			}
			seen += strings.Count(string(body), "orders")
			for _, secret := range []string{"hunter2", "$2y$", hashOfSecret[7:], "PRIVATE KEY"} {
				if strings.Contains(string(body)+fmt.Sprint(response.Header), secret) {
					t.Errorf("%s as %q says %q", path, user, secret)
				}
			}
			if user == "" && strings.Contains(string(body), "orders") {
				t.Errorf("%s without a user says %q", path, body)
			}
		}
	}
	if seen == 0 {
		t.Error("nothing was seen of the clusters at all")
	}
	for _, secret := range []string{"hunter2", "$2y$", hashOfSecret[7:], "PRIVATE KEY"} {
		if strings.Contains(log.String(), secret) {
			t.Errorf("the log says %q: %s", secret, log.String())
		}
	}
}
