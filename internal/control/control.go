// Package control is how commands reach a running daemon: HTTP over a unix
// socket that only the daemon's user may use. Nothing that changes state is to be
// had in any other way.
//
//	POST /v1/clusters/NAME/accept-gap
//	POST /v1/clusters/NAME/accept-divergence
//
// The answer is JSON: {"done": "what was done"}, or {"error": "why not"} with a
// status of 400 or above.
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
	"strings"
	"syscall"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/receiver"
)

// socketName is the socket's name in the runtime directory. No cluster's name
// begins with a dot.
const socketName = ".walfleet.sock"

const (
	// decideTimeout bounds what a decision may take: a server may have to be asked.
	decideTimeout = time.Minute
	// dialTimeout bounds finding out whether a daemon is there.
	dialTimeout = 5 * time.Second
	// maxAnswer bounds what a client reads, in bytes.
	maxAnswer = 1 << 20
)

// decider is what a fleet does for its commands.
type decider interface {
	Decide(ctx context.Context, cluster string, what receiver.Decision) (string, error)
}

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

// Serve answers commands until ctx is done, and returns when that has ended and
// the socket is gone.
func Serve(ctx context.Context, l net.Listener, fleet decider) error {
	server := &http.Server{
		Handler:           handler(fleet),
		ReadHeaderTimeout: dialTimeout,
		ReadTimeout:       2 * dialTimeout,
		WriteTimeout:      decideTimeout + dialTimeout,
		IdleTimeout:       dialTimeout,
		MaxHeaderBytes:    16 << 10,
		BaseContext:       func(net.Listener) context.Context { return ctx },
	}
	closed := make(chan error, 1)
	stop := context.AfterFunc(ctx, func() { closed <- server.Close() })
	err := server.Serve(l)
	if stop() {
		return fmt.Errorf("control socket: %w", err)
	}
	return <-closed
}

func handler(fleet decider) http.Handler {
	mux := http.NewServeMux()
	for _, what := range []receiver.Decision{receiver.AcceptGap, receiver.AcceptDivergence} {
		mux.HandleFunc("POST /v1/clusters/{name}/"+string(what), func(w http.ResponseWriter, r *http.Request) {
			ctx, cancel := context.WithTimeout(r.Context(), decideTimeout)
			defer cancel()
			var a answer
			done, err := fleet.Decide(ctx, r.PathValue("name"), what)
			status := http.StatusOK
			if a.Done = done; err != nil {
				a.Error, status = err.Error(), http.StatusConflict
			}
			w.Header().Set("Content-Type", "application/json")
			w.WriteHeader(status)
			_ = json.NewEncoder(w).Encode(a) // whoever asked may be gone
		})
	}
	return mux
}

type answer struct {
	Done  string `json:"done,omitempty"`
	Error string `json:"error,omitempty"`
}

// Decide tells the daemon of a runtime directory what a person decided about a
// cluster, and returns what was done.
func Decide(ctx context.Context, runtimeDir, cluster string, what receiver.Decision) (string, error) {
	ctx, cancel := context.WithTimeout(ctx, decideTimeout+dialTimeout)
	defer cancel()
	path := filepath.Join(runtimeDir, socketName)
	transport := &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{Timeout: dialTimeout}).DialContext(ctx, "unix", path)
	}}
	defer transport.CloseIdleConnections()
	request, err := http.NewRequestWithContext(ctx, http.MethodPost,
		"http://walfleet/v1/clusters/"+url.PathEscape(cluster)+"/"+string(what), nil)
	if err != nil {
		return "", err
	}
	response, err := (&http.Client{Transport: transport}).Do(request)
	if err != nil {
		var op *net.OpError
		if errors.As(err, &op) && op.Op == "dial" {
			return "", fmt.Errorf("no walfleet answers at %s (is it running, with this runtime_dir?): %w", path, op.Err)
		}
		return "", err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, maxAnswer))
	if err != nil {
		return "", err
	}
	var a answer
	if err := json.Unmarshal(bytes.TrimSpace(body), &a); err != nil {
		return "", fmt.Errorf("the daemon at %s answered %s: %q", path, response.Status, strings.TrimSpace(string(body)))
	}
	if a.Error != "" {
		return "", errors.New(a.Error)
	}
	return a.Done, nil
}
