package console

import (
	"crypto/tls"
	"log/slog"
	"os"
	"sync"
	"sync/atomic"
	"time"
)

// certificateInterval is how often the certificate's files are looked at, when there are handshakes.
const certificateInterval = time.Second

// certificate is one in two files, which are read again when they have changed. Files
// that do not fit, as in the middle of a renewal, leave the one before in use.
type certificate struct {
	file, key string
	log       *slog.Logger
	loaded    atomic.Pointer[tls.Certificate]

	mu      sync.Mutex
	looked  time.Time
	seen    [2]stamp // of what is loaded
	problem string   // why what is there now is not; ""
}

// stamp tells that a file has changed.
type stamp struct {
	modified time.Time
	size     int64
}

// loadCertificate reads a certificate for the first time.
func loadCertificate(file, key string, log *slog.Logger) (*certificate, error) {
	c := &certificate{file: file, key: key, log: log}
	return c, c.load()
}

// load reads the files. Their stamps are taken first, so that a change meanwhile is seen the next time.
func (c *certificate) load() error {
	c.looked = time.Now()
	seen, err := c.stamps()
	if err != nil {
		return err
	}
	if c.loaded.Load() != nil && seen == c.seen {
		return nil
	}
	pair, err := tls.LoadX509KeyPair(c.file, c.key)
	if err != nil {
		return err
	}
	c.loaded.Store(&pair)
	c.seen = seen
	return nil
}

func (c *certificate) stamps() (seen [2]stamp, err error) {
	for i, name := range []string{c.file, c.key} {
		info, err := os.Stat(name)
		if err != nil {
			return seen, err
		}
		seen[i] = stamp{info.ModTime(), info.Size()}
	}
	return seen, nil
}

// get is the certificate for a handshake. While one handshake looks at the files, the
// others take what is there.
func (c *certificate) get(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	if c.mu.TryLock() {
		defer c.mu.Unlock()
		if time.Since(c.looked) >= certificateInterval {
			c.renew()
		}
	}
	return c.loaded.Load(), nil
}

// renew logs a problem once, and its end.
func (c *certificate) renew() {
	was, serial := c.problem, c.loaded.Load()
	c.problem = ""
	if err := c.load(); err != nil {
		c.problem = err.Error()
	}
	switch {
	case c.problem != "" && c.problem != was:
		c.log.Error("the renewed certificate for HTTP cannot be used, the one before stays", "file", c.file, "error", c.problem)
	case c.loaded.Load() != serial:
		c.log.Info("the certificate for HTTP was renewed", "file", c.file)
	}
}
