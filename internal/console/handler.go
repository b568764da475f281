package console

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"path"
	"runtime/debug"
	"strings"
	"time"
)

// routes are what is to be seen, for those who may.
func routes(s source, log *slog.Logger, l limits, p *pages) http.Handler {
	mux := http.NewServeMux()
	p.register(mux)
	mux.Handle("GET /metrics", metricsHandler(s, log, l))
	mux.HandleFunc("GET /api/v1/status", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, s.Report())
	})
	mux.HandleFunc("GET /api/v1/status/{name}", func(w http.ResponseWriter, r *http.Request) {
		report, ok := s.ReportOf(r.PathValue("name"))
		if !ok {
			reply(w, http.StatusNotFound, problem{"there is no cluster of this name"})
			return
		}
		reply(w, http.StatusOK, report)
	})
	mux.HandleFunc("GET /api/v1/contents/{name}", func(w http.ResponseWriter, r *http.Request) {
		name := r.PathValue("name")
		if _, ok := s.ReportOf(name); !ok {
			reply(w, http.StatusNotFound, problem{"there is no cluster of this name"})
			return
		}
		_ = http.NewResponseController(w).SetWriteDeadline(time.Now().Add(l.contents + l.write))
		ctx, cancel := context.WithTimeout(r.Context(), l.contents)
		defer cancel()
		contents, err := s.Contents(ctx, name)
		if err != nil {
			reply(w, http.StatusServiceUnavailable, problem{fmt.Sprintf("reading the archive: %v", err)})
			return
		}
		reply(w, http.StatusOK, contents)
	})
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { say(w, http.StatusOK, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, r *http.Request) {
		err := s.Ready()
		switch {
		case err == nil:
			say(w, http.StatusOK, "ok")
		case settingsOf(r).door != nil: // nobody was asked who this is
			say(w, http.StatusServiceUnavailable, "walfleet does not run as its configuration file says; its log and \"walfleet status\" say why")
		default:
			say(w, http.StatusServiceUnavailable, err.Error())
		}
	})
	return mux
}

// public are the paths that everyone may ask for: they do not tell any cluster's name.
var public = map[string]bool{"/healthz": true, "/readyz": true}

// headers are those of every answer. Nothing is loaded from elsewhere, nothing here is
// shown or read elsewhere, and nothing is kept.
var headers = map[string]string{
	"Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data:; connect-src 'self'; " +
		"form-action 'none'; base-uri 'none'; frame-ancestors 'none'",
	"X-Content-Type-Options":       "nosniff",
	"X-Frame-Options":              "DENY",
	"Referrer-Policy":              "no-referrer",
	"Permissions-Policy":           "accelerometer=(), camera=(), geolocation=(), microphone=(), payment=(), usb=()",
	"Cross-Origin-Resource-Policy": "same-origin",
	"Cross-Origin-Opener-Policy":   "same-origin",
	"Cache-Control":                "no-store",
}

// A refusal is an answer to whom nothing is shown.
type refusal struct {
	status int
	text   string
	header string // "Name: value", or ""
}

// guarded is what every request has to pass on its way to next.
func (s *Server) guarded(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		answer := &answer{ResponseWriter: w}
		defer func() {
			switch reason := recover(); {
			case reason == nil:
			case reason == http.ErrAbortHandler:
				panic(reason)
			case answer.begun:
				s.log.Error("an answer over HTTP broke off", "path", r.URL.Path, "panic", fmt.Sprint(reason), "stack", string(debug.Stack()))
				panic(http.ErrAbortHandler) // the client must not take it for whole
			default:
				s.log.Error("no answer over HTTP", "path", r.URL.Path, "panic", fmt.Sprint(reason), "stack", string(debug.Stack()))
				say(answer, http.StatusInternalServerError, "this is a fault of walfleet; its log says more")
			}
		}()
		for name, value := range headers {
			w.Header().Set(name, value)
		}
		settings := s.settings.Load()
		ctx, cancel := context.WithCancel(context.WithValue(r.Context(), settingsKey{}, settings))
		defer cancel()
		defer context.AfterFunc(settings.replaced, cancel)()
		r = r.WithContext(ctx)
		if no := s.refuse(r, settings); no != nil {
			if name, value, ok := strings.Cut(no.header, ": "); ok {
				w.Header().Set(name, value)
			}
			if r.ContentLength != 0 || no.status == http.StatusMisdirectedRequest { // a body is not read, not even to throw it away
				w.Header().Set("Connection", "close")
			}
			say(answer, no.status, no.text)
			return
		}
		if !boundElsewhere(r.URL.Path) {
			wait := time.NewTimer(s.limits.header)
			defer wait.Stop()
			select {
			case s.answers <- struct{}{}:
				defer func() { <-s.answers }()
			case <-wait.C:
				w.Header().Set("Retry-After", "10")
				say(answer, http.StatusServiceUnavailable, "too many answers are being made or taken")
				return
			case <-ctx.Done():
				panic(http.ErrAbortHandler)
			}
		}
		next.ServeHTTP(answer, r)
	})
}

// boundElsewhere tells the answers that do not wait for their turn: event streams, which go on; metrics, so that no
// reader of pages keeps Prometheus from them; and what costs nothing.
func boundElsewhere(path string) bool {
	name, isCluster := strings.CutPrefix(path, "/clusters/")
	return public[path] || path == "/metrics" || path == "/events" || isCluster && strings.HasSuffix(name, "/events")
}

// refuse is why nothing is shown to a request, or nil.
func (s *Server) refuse(r *http.Request, settings *settings) *refusal {
	switch {
	case r.Method != http.MethodGet && r.Method != http.MethodHead:
		return &refusal{http.StatusMethodNotAllowed, "nothing can be changed here", "Allow: GET, HEAD"}
	case r.ContentLength != 0:
		return &refusal{http.StatusRequestEntityTooLarge, "a request here has no body", ""}
	case (r.TLS != nil) != (settings.certificate != nil): // a connection from before a reload
		return &refusal{http.StatusMisdirectedRequest, "TLS was turned on or off here; connect again", ""}
	case !hostAllowed(r):
		return &refusal{http.StatusMisdirectedRequest, "this address is for its own machine alone, and is called localhost or by its number; " +
			"a reverse proxy has to send \"Host: localhost\"", ""}
	case foreign(r):
		return &refusal{http.StatusForbidden, "another site's page may not ask here", ""}
	case path.Clean(r.URL.Path) != r.URL.Path || strings.ContainsRune(r.URL.Path, 0):
		return &refusal{http.StatusNotFound, "there is nothing here", ""}
	case settings.door != nil && !public[r.URL.Path]:
		return settings.door.refuse(r)
	}
	return nil
}

// hostAllowed holds off pages of sites whose names are made to point here (DNS
// rebinding): at a loopback address no such name is ours. Without a name no browser asks.
func hostAllowed(r *http.Request) bool {
	local, ok := r.Context().Value(http.LocalAddrContextKey).(net.Addr)
	if r.Host == "" || !ok || !isLoopback(local) {
		return true
	}
	host := (&url.URL{Host: r.Host}).Hostname()
	if _, err := netip.ParseAddr(host); err == nil {
		return true
	}
	host = strings.TrimSuffix(strings.ToLower(host), ".")
	return host == "localhost" || strings.HasSuffix(host, ".localhost")
}

// foreign tells requests that a page of another site makes. Following a link to here is
// none.
func foreign(r *http.Request) bool {
	if origin := r.Header.Get("Origin"); origin != "" {
		u, err := url.Parse(origin)
		if err != nil || !strings.EqualFold(u.Host, r.Host) {
			return true
		}
	}
	switch r.Header.Get("Sec-Fetch-Site") {
	case "", "none", "same-origin":
		return false
	}
	return r.Header.Get("Sec-Fetch-Mode") != "navigate" || r.Header.Get("Sec-Fetch-Dest") != "document"
}

type settingsKey struct{}

// settingsOf are the settings that a request was let in with.
func settingsOf(r *http.Request) *settings {
	return r.Context().Value(settingsKey{}).(*settings)
}

// answer knows whether something of it was sent.
type answer struct {
	http.ResponseWriter
	begun bool
}

func (a *answer) WriteHeader(status int) {
	a.begun = true
	a.ResponseWriter.WriteHeader(status)
}

func (a *answer) Write(p []byte) (int, error) {
	a.begun = true
	return a.ResponseWriter.Write(p)
}

// Unwrap is for http.ResponseController.
func (a *answer) Unwrap() http.ResponseWriter { return a.ResponseWriter }

// say answers with a line of text.
func say(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "text/plain; charset=utf-8")
	w.WriteHeader(status)
	fmt.Fprintln(w, text)
}

// problem is the JSON of what was not possible.
type problem struct {
	Error string `json:"error"`
}

// reply answers with JSON.
func reply(w http.ResponseWriter, status int, value any) {
	var b bytes.Buffer
	if err := json.NewEncoder(&b).Encode(value); err != nil {
		panic(fmt.Sprintf("internal error: %T as JSON: %v", value, err))
	}
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_, _ = w.Write(b.Bytes()) // whoever asked may be gone
}
