package check

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/receiver"
)

// facts is what was found out about one cluster. Nothing in it is judged yet.
type facts struct {
	cfg     receiver.Config
	asked   bool   // its hosts were asked
	err     error  // of the conninfo
	warning string // about a passfile that is not used
	app     string // the application_name that servers see
	user    string
	hosts   []host
	dir     directory
}

// host is what one host told, as far as it got. With err, what follows it is only
// what was known before.
type host struct {
	name      string
	sslMode   string
	local     bool // a unix socket, or this machine's loopback
	socket    bool
	cert      bool // we have a certificate to show
	requires  bool // require_auth is given
	connected bool // in replication mode
	err       error

	tls  string // empty: not encrypted
	auth string
	id   pgrepl.Identity

	settings    pgrepl.Settings
	settingsErr error

	watch    pgrepl.SlotWatch
	watchErr error // nothing is known of the slot

	database string // that SQL is asked on
	use      pgrepl.ServerUse
	sqlErr   error // use is not known, and of the slot only what the replication protocol tells
}

// directory is what there is of an archive's directory.
type directory struct {
	path     string
	exists   bool
	parent   string // the nearest directory above that exists; path itself where that does
	mode     fs.FileMode
	writable bool  // path, or parent, for the user that checks
	err      error // what else could not be looked at
	holdings archive.Holdings
	damaged  *archive.FileError

	device      uint64
	free, total int64
	grown       int64         // bytes of complete segments that were stored lately
	over        time.Duration // the time in which they were
}

// rateWindow is the time that archives' growth is measured over, and leastWindow the
// time that it takes at least.
const (
	rateWindow  = 24 * time.Hour
	leastWindow = 10 * time.Minute
)

// rate is how fast the archive grew lately, in bytes a second; 0: not known.
func (d directory) rate() float64 {
	if d.over < leastWindow {
		return 0
	}
	return float64(d.grown) / d.over.Seconds()
}

// ask asks all hosts of the cluster at once.
func (f *facts) ask(ctx context.Context, dial func(ctx context.Context, network, address string) (net.Conn, error)) {
	conninfo, err := pgrepl.ParseConninfo(f.cfg.Conninfo)
	if err != nil {
		f.err = err
		return
	}
	f.warning = conninfo.Warning()
	f.app, f.user = conninfo.ApplicationName(0, f.cfg.ApplicationName), conninfo.User()
	f.hosts = make([]host, len(conninfo.Hosts()))
	o := pgrepl.Options{
		ApplicationName: "walfleet check", // not the one that commits may wait for
		PasswordFile:    f.cfg.PasswordFile,
		Timeout:         clusterTimeout / 2,
		Dial:            dial,
		NoteAuth:        true,
	}
	var wait sync.WaitGroup
	for i := range f.hosts {
		wait.Go(func() { f.hosts[i] = askHost(ctx, conninfo, i, f.cfg.Slot, o) })
	}
	wait.Wait()
}

// askHost asks one host, first in replication mode, then by SQL.
func askHost(ctx context.Context, conninfo *pgrepl.Conninfo, i int, slot string, o pgrepl.Options) host {
	h := host{name: conninfo.Hosts()[i], sslMode: conninfo.SSLMode(i), socket: conninfo.IsSocket(i),
		cert: conninfo.HasCertificate(i), requires: conninfo.RequiresAuth(i), database: conninfo.Database(i)}
	h.local = h.socket || isLoopback(h.name)
	conn, err := conninfo.Connect(ctx, i, o)
	if err != nil {
		h.err = err
		return h
	}
	defer conn.Close()
	h.connected = true
	h.tls, h.auth = conn.TLS(), conn.AuthMethod()
	if h.id, h.err = conn.Identify(ctx); h.err != nil {
		return h
	}
	h.settings, h.settingsErr = conn.Settings(ctx)

	sql, err := conninfo.ConnectSQL(ctx, i, o)
	if err == nil {
		defer sql.Close()
		if h.watch, h.watchErr = sql.WatchSlot(ctx, slot); h.watchErr == nil {
			h.use, err = sql.ServerUse(ctx, conn.PID())
		} else {
			err = h.watchErr
		}
	}
	if h.sqlErr = err; err != nil && h.watch == (pgrepl.SlotWatch{}) {
		h.watch, h.watchErr = conn.WatchSlot(ctx, h.id, slot)
	}
	return h
}

func isLoopback(hostPort string) bool {
	name, _, err := net.SplitHostPort(hostPort)
	ip := net.ParseIP(name)
	return err == nil && (name == "localhost" || ip != nil && ip.IsLoopback())
}

// chosen is the host that a receiver would take: of those that are in the right role
// and of the archive's cluster, a primary before a standby, with the highest
// timeline. nil: none.
func (f *facts) chosen() *host {
	var best *host
	for i := range f.hosts {
		h := &f.hosts[i]
		if h.err != nil || !f.fits(h) {
			continue
		}
		if best == nil || cmp.Or(cmp.Compare(h.id.Timeline, best.id.Timeline), cmp.Compare(role(best), role(h)), cmp.Compare(h.id.XLogPos, best.id.XLogPos)) > 0 {
			best = h
		}
	}
	return best
}

func role(h *host) int {
	if h.id.InRecovery {
		return 1
	}
	return 0
}

// fits tells whether a host may be archived into the directory.
func (f *facts) fits(h *host) bool {
	have := f.dir.holdings.Identity
	return (!h.id.InRecovery || f.cfg.Source == receiver.SourceAny) &&
		(have == archive.Identity{} || have == archive.Identity{SystemID: h.id.SystemID, SegmentSize: h.id.SegmentSize})
}

// lookAt looks at an archive's directory until ctx is done. A disk that hangs cannot
// be interrupted; what waits for it is left behind, for the process ends soon.
func lookAt(ctx context.Context, path string) directory {
	found := make(chan directory, 1)
	go func() { found <- look(ctx, path) }()
	select {
	case d := <-found:
		return d
	case <-ctx.Done():
		return directory{path: path, parent: path, err: fmt.Errorf("%s: the disk does not answer: %w", path, ctx.Err())}
	}
}

func look(ctx context.Context, path string) directory {
	d := directory{path: path, parent: path}
	info, err := os.Stat(path)
	d.exists = err == nil
	for errors.Is(err, fs.ErrNotExist) && d.parent != filepath.Dir(d.parent) {
		d.parent = filepath.Dir(d.parent)
		info, err = os.Stat(d.parent)
	}
	if err != nil {
		d.err = err
		return d
	}
	if d.mode = info.Mode(); !info.IsDir() {
		d.err = fmt.Errorf("%s is not a directory", d.parent)
		return d
	}
	d.writable = unix.Access(d.parent, unix.W_OK|unix.X_OK) == nil
	var st unix.Stat_t
	var fsys unix.Statfs_t
	if err := errors.Join(unix.Stat(d.parent, &st), unix.Statfs(d.parent, &fsys)); err != nil {
		d.err = fmt.Errorf("%s: %w", d.parent, err)
		return d
	}
	d.device = uint64(st.Dev)
	d.free, d.total = int64(fsys.Bavail)*int64(fsys.Bsize), int64(fsys.Blocks)*int64(fsys.Bsize)
	if !d.exists {
		return d
	}
	if d.holdings, err = archive.Peek(ctx, path); err != nil && !errors.As(err, &d.damaged) {
		d.err = err
		return d
	}
	d.measure(time.Now())
	return d
}

// segmentFile matches the names of complete segments, compressed or not.
var segmentFile = regexp.MustCompile(`^[0-9A-F]{24}(\.gz|\.lz4|\.zst)?$`)

// measure finds out how fast the archive grew until now.
func (d *directory) measure(now time.Time) {
	entries, err := os.ReadDir(d.path)
	if err != nil {
		return
	}
	oldest := now
	for _, e := range entries {
		if !segmentFile.MatchString(e.Name()) {
			continue
		}
		info, err := e.Info()
		if err != nil {
			continue // pruned or compressed meanwhile
		}
		at := info.ModTime()
		if at.Before(oldest) {
			oldest = at
		}
		if now.Sub(at) <= rateWindow {
			d.grown += info.Size()
		}
	}
	if origin := d.holdings.Origin.Time; !origin.IsZero() && origin.Before(oldest) {
		oldest = origin
	}
	d.over = min(now.Sub(oldest), rateWindow)
}

// primaries are the hosts that say they are one, and fit.
func (f *facts) primaries() []string {
	var names []string
	for i := range f.hosts {
		if h := &f.hosts[i]; h.err == nil && !h.id.InRecovery {
			names = append(names, h.name)
		}
	}
	slices.Sort(names)
	return names
}
