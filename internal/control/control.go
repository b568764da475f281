// Package control is how commands reach a running daemon: HTTP over a unix
// socket that only the daemon's user may use. Nothing that changes state is to be
// had in any other way.
//
//	GET  /v1/status                            a fleet.Report
//	GET  /v1/clusters/NAME/status              a fleet.Report of one cluster, with its events; of none where there is none of that name
//	POST /v1/reload?file=PATH                  a fleet.Outcome, once it has one
//	POST /v1/preview?file=NAME                 a fleet.Outcome; the body is a configuration, of which nothing is done
//	POST /v1/clusters/NAME/accept-gap
//	POST /v1/clusters/NAME/accept-divergence
//	POST /v1/clusters/NAME/prune?before=LSN    what of WAL before it was removed: {"removed": [names of files]}
//
// The answer is JSON. A reload that failed, in part too, has a status of 409. A
// decision's is {"done": "what was done"}, or {"error": "why not"} with a status of
// 400 or above.
package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// socketName is the socket's name in the runtime directory. No cluster's name
// begins with a dot.
const socketName = ".walfleet.sock"

const (
	// decideTimeout bounds what a decision may take: a server may have to be asked.
	decideTimeout = time.Minute
	// pruneTimeout bounds what a prune may take. What it has not removed by then stays.
	pruneTimeout = 10 * time.Minute
	// dialTimeout bounds finding out whether a daemon is there.
	dialTimeout = 5 * time.Second
	// statusTimeout bounds what a status may take: nothing is asked for it.
	statusTimeout = 10 * time.Second
	// maxAnswer bounds what a client reads, in bytes: some thousand clusters' status.
	maxAnswer = 64 << 20
	// maxConfig bounds the configuration that a client sends, in bytes.
	maxConfig = 16 << 20
)

// daemon is what answers commands.
type daemon interface {
	Decide(ctx context.Context, cluster string, what receiver.Decision) (string, error)
	Reload(ctx context.Context, file string) fleet.Outcome
	Preview(file string, content []byte) fleet.Outcome
	Report() fleet.Report
	ReportOf(cluster string) (fleet.Report, bool)
	Prune(ctx context.Context, cluster string, before wal.LSN) (removed []string, err error)
}

// ErrNoDaemon says that nobody answers at a runtime directory's socket.
var ErrNoDaemon = errors.New("no walfleet answers")

// Listen makes the socket in the runtime directory, which is made when it is
// missing. A socket that a daemon left behind is replaced, one that answers is an
// error. It changes the process's umask for a moment.
func Listen(runtimeDir string) (net.Listener, error) {
	// It may be the directory of all archives, whose name has to last.
	if err := archive.MakeDir(runtimeDir, 0o700); err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	path := filepath.Join(runtimeDir, socketName)
	if c, err := net.DialTimeout("unix", path, dialTimeout); err == nil {
		return nil, errors.Join(fmt.Errorf("control socket %s: another walfleet answers there", path), c.Close())
	}
	if info, err := os.Lstat(path); err == nil && info.Mode().Type() == fs.ModeSocket {
		if err := os.Remove(path); err != nil {
			return nil, fmt.Errorf("control socket: %w", err)
		}
	}
	umask := syscall.Umask(0o177)
	l, err := net.Listen("unix", path)
	syscall.Umask(umask)
	if errors.Is(err, syscall.EINVAL) { // longer than sun_path
		err = fmt.Errorf("%w: the path may be too long, set runtime_dir to a shorter one", err)
	}
	if err != nil {
		return nil, fmt.Errorf("control socket: %w", err)
	}
	return l, nil
}

// Serve answers commands until ctx is done, and returns when that has ended, those
// under way have been answered, and the socket is gone. A reload that has begun goes on
// when whoever asked for it has gone.
func Serve(ctx context.Context, l net.Listener, d daemon) error {
	server := &http.Server{
		Handler:           handler(ctx, d),
		ReadHeaderTimeout: dialTimeout,
		ReadTimeout:       2 * dialTimeout,
		WriteTimeout:      decideTimeout + dialTimeout,
		IdleTimeout:       dialTimeout,
		MaxHeaderBytes:    16 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	closed := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() {
		// Whatever is under way ends with ctx too.
		ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), dialTimeout)
		defer cancel()
		if server.Shutdown(ctx) != nil {
			closed <- server.Close()
			return
		}
		closed <- nil
	})
	err := server.Serve(l)
	if stop() {
		return fmt.Errorf("control socket: %w", err)
	}
	return <-closed
}

func handler(ctx context.Context, d daemon) http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /v1/status", func(w http.ResponseWriter, _ *http.Request) {
		reply(w, http.StatusOK, d.Report())
	})
	mux.HandleFunc("GET /v1/clusters/{name}/status", func(w http.ResponseWriter, r *http.Request) {
		report, ok := d.ReportOf(r.PathValue("name"))
		if !ok {
			report.Clusters = nil
		}
		reply(w, http.StatusOK, report)
	})
	mux.HandleFunc("POST /v1/reload", func(w http.ResponseWriter, r *http.Request) {
		// However long clusters take to stop, the answer has time to be written.
		conn := http.NewResponseController(w)
		_ = conn.SetWriteDeadline(time.Time{})
		out := d.Reload(ctx, r.URL.Query().Get("file"))
		_ = conn.SetWriteDeadline(time.Now().Add(dialTimeout))
		status := http.StatusOK
		if out.Error != "" {
			status = http.StatusConflict
		}
		reply(w, status, out)
	})
	mux.HandleFunc("POST /v1/preview", func(w http.ResponseWriter, r *http.Request) {
		file := r.URL.Query().Get("file")
		content, err := io.ReadAll(http.MaxBytesReader(w, r.Body, maxConfig))
		if err != nil {
			reply(w, http.StatusBadRequest, fleet.Outcome{File: file, Error: fmt.Sprintf("reading the configuration: %v", err)})
			return
		}
		out := d.Preview(file, content)
		status := http.StatusOK
		if out.Error != "" {
			status = http.StatusConflict
		}
		reply(w, status, out)
	})
	mux.HandleFunc("POST /v1/clusters/{name}/prune", func(w http.ResponseWriter, r *http.Request) {
		conn := http.NewResponseController(w)
		_ = conn.SetReadDeadline(time.Time{}) // when that of reading the request passes, its context ends
		_ = conn.SetWriteDeadline(time.Now().Add(pruneTimeout + dialTimeout))
		ctx, cancel := context.WithTimeout(r.Context(), pruneTimeout)
		defer cancel()
		a, status := pruned{Removed: []string{}}, http.StatusOK
		before, err := wal.ParseLSN(r.URL.Query().Get("before"))
		if err == nil {
			a.Removed, err = d.Prune(ctx, r.PathValue("name"), before)
		}
		if err != nil {
			a.Error, status = err.Error(), http.StatusConflict
		}
		reply(w, status, a)
	})
	for _, what := range []receiver.Decision{receiver.AcceptGap, receiver.AcceptDivergence} {
		mux.HandleFunc("POST /v1/clusters/{name}/"+string(what), func(w http.ResponseWriter, r *http.Request) {
			// When that of reading the request passes, its context ends.
			_ = http.NewResponseController(w).SetReadDeadline(time.Time{})
			ctx, cancel := context.WithTimeout(r.Context(), decideTimeout)
			defer cancel()
			var a answer
			done, err := d.Decide(ctx, r.PathValue("name"), what)
			status := http.StatusOK
			if a.Done = done; err != nil {
				a.Error, status = err.Error(), http.StatusConflict
			}
			reply(w, status, a)
		})
	}
	return mux
}

func reply(w http.ResponseWriter, status int, answer any) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	_ = json.NewEncoder(w).Encode(answer) // whoever asked may be gone
}

type answer struct {
	Done  string `json:"done,omitempty"`
	Error string `json:"error,omitempty"`
}

type pruned struct {
	Removed []string `json:"removed"`
	Error   string   `json:"error,omitempty"`
}

// Prune makes the daemon of a runtime directory remove WAL before a position from a
// cluster's archive, and returns the names of the files that it has removed, also with an
// error.
func Prune(ctx context.Context, runtimeDir, cluster string, before wal.LSN) ([]string, error) {
	var a pruned
	resource := "clusters/" + url.PathEscape(cluster) + "/prune?before=" + url.QueryEscape(before.String())
	err := ask(ctx, runtimeDir, http.MethodPost, resource, pruneTimeout+dialTimeout, nil, &a)
	if err == nil && a.Error != "" {
		err = errors.New(a.Error)
	}
	return a.Removed, err
}

// Decide tells the daemon of a runtime directory what a person decided about a
// cluster, and returns what was done.
func Decide(ctx context.Context, runtimeDir, cluster string, what receiver.Decision) (string, error) {
	var a answer
	err := ask(ctx, runtimeDir, http.MethodPost, "clusters/"+url.PathEscape(cluster)+"/"+string(what), decideTimeout+dialTimeout, nil, &a)
	if err == nil && a.Error != "" {
		err = errors.New(a.Error)
	}
	return a.Done, err
}

// Reload makes the daemon of a runtime directory read its file again, and returns what
// became of that; when it failed, the outcome says why. file is the absolute path of
// the file that is meant; the daemon refuses when it runs with another one. timeout
// bounds how long it may take.
func Reload(ctx context.Context, runtimeDir, file string, timeout time.Duration) (fleet.Outcome, error) {
	var out fleet.Outcome
	err := ask(ctx, runtimeDir, http.MethodPost, "reload?file="+url.QueryEscape(file), timeout, nil, &out)
	return out, err
}

// Preview asks the daemon of a runtime directory what a reload would do if its file had
// this content. file is its name, for errors.
func Preview(ctx context.Context, runtimeDir, file string, content []byte) (fleet.Outcome, error) {
	var out fleet.Outcome
	err := ask(ctx, runtimeDir, http.MethodPost, "preview?file="+url.QueryEscape(file), statusTimeout, bytes.NewReader(content), &out)
	return out, err
}

// Status asks the daemon of a runtime directory how its clusters are, or the one of a
// name, with its events; "": all of them.
func Status(ctx context.Context, runtimeDir, cluster string) (fleet.Report, error) {
	resource := "status"
	if cluster != "" {
		resource = "clusters/" + url.PathEscape(cluster) + "/status"
	}
	var r fleet.Report
	err := ask(ctx, runtimeDir, http.MethodGet, resource, statusTimeout, nil, &r)
	return r, err
}

// ask sends a request, with a body or nil, and reads the answer into answer. The error is
// ErrNoDaemon when the socket is not there or nobody listens.
func ask(ctx context.Context, runtimeDir, method, resource string, timeout time.Duration, body io.Reader, answer any) error {
	ctx, cancel := context.WithTimeout(ctx, timeout)
	defer cancel()
	path := filepath.Join(runtimeDir, socketName)
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "unix", path)
	}}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, method, "http://walfleet/v1/"+resource, body)
	if err != nil {
		return err
	}
	response, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		var op *net.OpError
		switch {
		case errors.As(err, &op) && op.Op == "dial":
			return fmt.Errorf("%w at %s (is it running, with this runtime_dir?): %w", ErrNoDaemon, path, op.Err)
		case ctx.Err() == context.DeadlineExceeded:
			return fmt.Errorf("the walfleet at %s did not answer within %s", path, timeout)
		}
		return fmt.Errorf("asking the walfleet at %s: %w", path, err)
	}
	defer response.Body.Close()
	data, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return fmt.Errorf("asking the walfleet at %s: %w", path, err)
	}
	if err := json.Unmarshal(data, answer); err != nil {
		return fmt.Errorf("the daemon at %s answered %s: %.200q", path, response.Status, bytes.TrimSpace(data))
	}
	return nil
}
