package console

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/walfleet/walfleet/fleet"
)

// limits bound what clients can take.
type limits struct {
	header      time.Duration // to send a request, and for a TLS handshake
	write       time.Duration // to take an answer; event streams renew theirs with each event
	idle        time.Duration // between two requests
	contents    time.Duration // to read what an archive holds
	stop        time.Duration // to end what is under way when an address is given up
	headerBytes int
	connections int // at a time; more wait to be accepted
	streams     int // requests at a time on one connection of HTTP/2
	answers     int // at a time, being made or taken, which bounds what of them is in memory; more wait, for as long as a request may take to be sent
	scrapes     int // at a time; more are refused
}

var usual = limits{
	header:      5 * time.Second,
	write:       30 * time.Second,
	idle:        time.Minute,
	contents:    30 * time.Second,
	stop:        5 * time.Second,
	headerBytes: 16 << 10,
	connections: 256,
	streams:     32,
	answers:     16,
	scrapes:     4,
}

const (
	// listenTimeout bounds listening: the host's name may have to be resolved.
	listenTimeout = 10 * time.Second
	// pagesPause is the time after which the pages begin anew, when they failed.
	pagesPause = time.Second
)

// Server shows a fleet over HTTP. Make it with New, tell it by Follow where and to whom,
// and Run it.
type Server struct {
	log     *slog.Logger
	limits  limits
	handler http.Handler
	pages   *pages
	answers chan struct{} // has one for each that is made or taken

	settings  atomic.Pointer[settings] // nil before the first Follow that was successful
	listeners sync.WaitGroup           // one for each goroutine of an address

	following sync.Mutex // held by Follow, also while it reads files, which a file system may hold for good

	mu      sync.Mutex // held by Follow while it changes things, and the end of Run
	at      *address   // nil: nowhere
	stopped bool
}

// New makes a server that listens nowhere yet.
func New(s source, log *slog.Logger) *Server { return newServer(s, log, usual) }

func newServer(s source, log *slog.Logger, l limits) *Server {
	server := &Server{log: log, limits: l, pages: newPages(s, log), answers: make(chan struct{}, l.answers)}
	server.handler = server.guarded(routes(s, log, l, server.pages))
	return server
}

// settings are what one [http] section means for requests.
type settings struct {
	config      fleet.HTTPConfig
	certificate *certificate // nil: no TLS
	door        *door        // nil: open to everyone
	replaced    context.Context
	replace     context.CancelFunc // ends requests that go on, event streams that is: they have to come again
}

// An address is one that is listened at, until its end.
type address struct {
	configured string
	listener   net.Listener
	server     *http.Server
	streams    context.CancelFunc // ends requests under way
	given      atomic.Bool        // up: that it accepts nothing any more is no failure
}

// Follow listens where c says and to whom it says from now on. When that cannot be, the
// error says why, and nothing has changed. An address that is given up is closed once the
// new one is open.
func (s *Server) Follow(c fleet.HTTPConfig) error {
	s.following.Lock()
	defer s.following.Unlock()
	was := s.settings.Load()
	if was != nil && was.config == c && (s.addr() != nil || c.Listen == "") {
		return nil
	}
	next, err := s.prepare(c, was)
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.stopped {
		return errors.New("[http]: walfleet is stopping")
	}
	old, at := s.at, s.at
	switch {
	case c.Listen == "":
		at = nil
	case old == nil || old.configured != c.Listen:
		if at, err = s.listen(c.Listen); err != nil {
			return err
		}
	}
	s.settings.Store(next)
	if was != nil {
		was.replace()
	}
	if s.at = at; at != old {
		s.begin(at)
		s.end(old)
	}
	s.announce(c)
	return nil
}

// prepare takes from the settings before, which may be nil, what stays: the certificate in use, whatever has become
// of its files, and who was let in.
func (s *Server) prepare(c fleet.HTTPConfig, was *settings) (next *settings, err error) {
	next = &settings{config: c}
	next.replaced, next.replace = context.WithCancel(context.Background())
	switch {
	case c.Certificate == "":
	case was != nil && was.config.Certificate == c.Certificate && was.config.Key == c.Key:
		next.certificate = was.certificate
	default:
		if next.certificate, err = loadCertificate(c.Certificate, c.Key, s.log); err != nil {
			return nil, fmt.Errorf("[http] tls_certificate and tls_key: %w", err)
		}
	}
	switch {
	case c.User == "":
	case was != nil && was.config.User == c.User && was.config.PasswordHash == c.PasswordHash:
		next.door = was.door
	default:
		next.door = newDoor(c.User, c.PasswordHash)
	}
	return next, nil
}

// listen binds an address. One of ours that excludes it, such as 127.0.0.1:9851 does
// :9851, makes room, and comes back if that was not enough.
func (s *Server) listen(where string) (*address, error) {
	l, err := bind(where)
	if old := s.at; errors.Is(err, syscall.EADDRINUSE) && old != nil && samePort(where, old.listener.Addr()) {
		old.given.Store(true)
		old.listener.Close()
		if l, err = bind(where); err != nil {
			s.end(old)
			s.at = nil
			again, err := bind(old.listener.Addr().String())
			if err != nil {
				s.log.Error("the fleet cannot be seen over HTTP any more, archiving goes on", "error", err)
			} else {
				s.at = s.newAddress(old.configured, again)
				s.begin(s.at)
			}
		}
	}
	switch {
	case errors.Is(err, syscall.EADDRINUSE):
		return nil, fmt.Errorf("[http] listen: another program has this address (%w); give another one, or \"\" to listen nowhere", err)
	case err != nil:
		return nil, fmt.Errorf("[http] listen: %w", err)
	}
	return s.newAddress(where, l), nil
}

// begin serves at an address in the background, if it is one; end gives it up there.
func (s *Server) begin(a *address) {
	if a != nil {
		s.listeners.Go(func() { s.serve(a) })
	}
}

func (s *Server) end(a *address) {
	if a != nil {
		s.listeners.Go(func() { s.close(a) })
	}
}

func bind(where string) (net.Listener, error) {
	ctx, cancel := context.WithTimeout(context.Background(), listenTimeout)
	defer cancel()
	var lc net.ListenConfig
	return lc.Listen(ctx, "tcp", where)
}

func samePort(where string, other net.Addr) bool {
	_, port, _ := net.SplitHostPort(where)
	_, otherPort, _ := net.SplitHostPort(other.String())
	return port == otherPort
}

// newAddress prepares serving at l.
func (s *Server) newAddress(configured string, l net.Listener) *address {
	ctx, cancel := context.WithCancel(context.Background())
	a := &address{configured: configured, listener: l, streams: cancel}
	a.server = &http.Server{
		Handler:                      s.handler,
		BaseContext:                  func(net.Listener) context.Context { return ctx },
		ErrorLog:                     slog.NewLogLogger(s.log.Handler(), slog.LevelDebug),
		ReadHeaderTimeout:            s.limits.header,
		ReadTimeout:                  2 * s.limits.header,
		WriteTimeout:                 s.limits.write,
		IdleTimeout:                  s.limits.idle,
		MaxHeaderBytes:               s.limits.headerBytes,
		DisableGeneralOptionsHandler: true, // all answers are ours
		HTTP2: &http.HTTP2Config{
			MaxConcurrentStreams: s.limits.streams,
			WriteByteTimeout:     s.limits.write,
			SendPingTimeout:      s.limits.idle,
			PingTimeout:          s.limits.header,
		},
	}
	return a
}

// serve answers at an address until it is closed.
func (s *Server) serve(a *address) {
	err := a.server.Serve(&listener{Listener: limited(a.listener, s.limits.connections), settings: &s.settings})
	if a.given.Load() {
		return
	}
	s.log.Error("the fleet cannot be seen over HTTP any more, archiving goes on; a reload listens again", "error", err)
	s.mu.Lock()
	if s.at == a {
		s.at = nil
	}
	s.mu.Unlock()
	s.close(a)
}

// close gives an address up in good order: what is under way is answered, for a while.
func (s *Server) close(a *address) {
	a.given.Store(true)
	a.streams()
	ctx, cancel := context.WithTimeout(context.Background(), s.limits.stop)
	defer cancel()
	if a.server.Shutdown(ctx) != nil {
		a.server.Close()
	}
}

// announce logs where the fleet is to be seen, and what may be wrong with that.
func (s *Server) announce(c fleet.HTTPConfig) {
	if s.at == nil {
		s.log.Info("listening nowhere for HTTP")
		return
	}
	addr := s.at.listener.Addr()
	scheme := "http"
	if c.Certificate != "" {
		scheme = "https"
	}
	s.log.Info("the fleet can be seen over HTTP", "url", scheme+"://"+addr.String()+"/")
	switch local := isLoopback(addr); {
	case !local && c.User == "":
		s.log.Warn("everyone who reaches this address can see the fleet over HTTP: set user and password_hash in [http], or listen on 127.0.0.1", "listen", c.Listen)
	case !local && c.Certificate == "":
		s.log.Warn("passwords for HTTP can be seen on their way: set tls_certificate and tls_key in [http]", "listen", c.Listen)
	}
}

// addr is where the server listens; nil: nowhere.
func (s *Server) addr() net.Addr {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.at == nil {
		return nil
	}
	return s.at.listener.Addr()
}

// Run serves until ctx is done, and returns when everything that Follow began has ended,
// which is bounded. Nothing that goes wrong ends it before.
func (s *Server) Run(ctx context.Context) {
	var running sync.WaitGroup
	running.Go(func() { s.runPages(ctx) })
	<-ctx.Done()
	s.mu.Lock()
	s.stopped = true
	last := s.at
	s.at = nil
	if settings := s.settings.Load(); settings != nil {
		settings.replace()
	}
	s.mu.Unlock()
	s.end(last)
	s.listeners.Wait()
	running.Wait()
}

// runPages keeps the pages up to date until ctx is done, also after a fault.
func (s *Server) runPages(ctx context.Context) {
	run := func() (err error) {
		defer func() {
			if reason := recover(); reason != nil {
				err = fmt.Errorf("panic: %v\n%s", reason, debug.Stack())
			}
		}()
		return s.pages.run(ctx)
	}
	for {
		err := run()
		if ctx.Err() != nil {
			return
		}
		s.log.Error("the console's pages begin anew, archiving goes on", "error", err)
		select {
		case <-ctx.Done():
		case <-time.After(pagesPause):
		}
	}
}

// limited accepts only so many connections at a time.
func limited(l net.Listener, n int) net.Listener {
	return &limitedListener{Listener: l, free: make(chan struct{}, n), closed: make(chan struct{})}
}

type limitedListener struct {
	net.Listener
	free   chan struct{} // has one for each connection
	once   sync.Once
	closed chan struct{}
}

func (l *limitedListener) Accept() (net.Conn, error) {
	select {
	case l.free <- struct{}{}:
	case <-l.closed:
		return nil, net.ErrClosed
	}
	c, err := l.Listener.Accept()
	if err != nil {
		<-l.free
		return nil, err
	}
	return &limitedConn{Conn: c, release: sync.OnceFunc(func() { <-l.free })}, nil
}

func (l *limitedListener) Close() error {
	l.once.Do(func() { close(l.closed) })
	return l.Listener.Close()
}

type limitedConn struct {
	net.Conn
	release func()
}

func (c *limitedConn) Close() error {
	defer c.release()
	return c.Conn.Close()
}

// listener speaks TLS or not, as the settings are when a connection comes.
type listener struct {
	net.Listener
	settings *atomic.Pointer[settings]
}

func (l *listener) Accept() (net.Conn, error) {
	c, err := l.Listener.Accept()
	if err != nil {
		return nil, err
	}
	if cert := l.settings.Load().certificate; cert != nil {
		return tls.Server(c, &tls.Config{
			MinVersion:     tls.VersionTLS12,
			NextProtos:     []string{"h2", "http/1.1"},
			GetCertificate: cert.get,
		}), nil
	}
	return c, nil
}

// isLoopback tells whether only this machine can reach an address.
func isLoopback(a net.Addr) bool {
	tcp, ok := a.(*net.TCPAddr)
	return ok && tcp.IP.IsLoopback()
}
