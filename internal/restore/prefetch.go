package restore

import (
	"context"
	"crypto/sha256"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

// A server asks for one segment after the other, and replays nothing while it
// waits. So a process of its own makes the next ones ready meanwhile, in a
// directory beside their place: whole, checked and synced, to be renamed to their
// place when they are asked for. It ends when they are all there; another one is
// started when half of them are used up.
//
// Nothing depends on it. A file that is there under its final name is good, for it
// was synced before it got that; its name has what it was made of, so one of
// another archive, or of one that has changed, is not taken. One process at a time
// has the directory (flock), and removes what is not among the segments that come
// next: what a crash left, or a recovery that began anew somewhere else.

// ahead is the directory of what is ready.
func (r Request) ahead() string { return r.own(temporary + ".ahead") }

// prefetches tells whether the request is one that others follow. pg_rewind asks
// too, for files at their own names (RestoreArchivedFile in fe_utils/archive.c,
// where a server has RECOVERYXLOG), goes backwards, and is thrown off by a
// directory in which files come and go.
func (r Request) prefetches() bool { return r.Prefetch > 0 && filepath.Base(r.Path) == "RECOVERYXLOG" }

// aheadName is what a segment of this archive is called when it is ready.
func (r Request) aheadName(c archive.Catalogue, s wal.Segment, in *archive.Reader) (string, error) {
	path, err := filepath.Abs(filepath.Join(r.Archive, in.Name))
	if err != nil {
		return "", err
	}
	info, err := in.Stat()
	if err != nil {
		return "", err
	}
	of := fmt.Sprintf("%q %d %d %d", path, c.Identity.SystemID, info.Size(), info.ModTime().UnixNano())
	return fmt.Sprintf("%s.%.8x", s.Name(), sha256.Sum256([]byte(of))), nil
}

// takeReady gives a segment that is ready its place; false: it is not.
func (r Request) takeReady(name string, size wal.SegmentSize) (bool, error) {
	ready := filepath.Join(r.ahead(), name)
	for begun := time.Now(); ; time.Sleep(time.Millisecond) {
		if info, err := os.Lstat(ready); err == nil && info.Mode().IsRegular() && info.Size() == int64(size) {
			if os.Rename(ready, r.Path) == nil {
				return true, syncDir(filepath.Dir(r.Path))
			}
		}
		// One that is being made is ready sooner than if we began with it now.
		_, err := os.Lstat(ready + makingSuffix)
		if err != nil || time.Since(begun) > makingTime || !lockedDir(r.ahead()) {
			return false, nil
		}
	}
}

const (
	makingSuffix = ".tmp"
	makingTime   = 5 * time.Second // that a segment is waited for which is being made ready
)

// lockedDir tells whether a process makes segments ready in a directory.
func lockedDir(path string) bool {
	d, err := os.Open(path)
	if err != nil {
		return false
	}
	defer d.Close()
	return unix.Flock(int(d.Fd()), unix.LOCK_EX|unix.LOCK_NB) == unix.EWOULDBLOCK
}

// More tells whether, now that the server has what r asks for, somebody should
// begin with what comes next, with [Ahead].
func (r Request) More() bool {
	if !r.prefetches() || lockedDir(r.ahead()) {
		return false
	}
	entries, _ := os.ReadDir(r.ahead())
	n := 0
	for _, e := range entries {
		if e.Name() > r.Name && !strings.HasSuffix(e.Name(), makingSuffix) {
			n++
		}
	}
	return n <= r.Prefetch/2
}

// Ahead makes the segments after the one that r asks for ready, up to r.Prefetch of
// them, and removes all else from where they are. Where there are none, no room, or
// somebody else at it, it does nothing: it is for speed alone. It ends early when
// the server does, whose directory may be removed then.
func Ahead(ctx context.Context, r Request) error {
	serving, end := context.WithCancel(ctx)
	var watch sync.WaitGroup
	defer watch.Wait()
	defer end()
	watch.Go(func() {
		defer end()
		r.awaitServersEnd(serving)
	})
	c, err := r.open()
	if err != nil {
		return err
	}
	s, err := wal.ParseSegment(r.Name, c.Identity.SegmentSize)
	if err != nil {
		return err
	}
	if err := os.Mkdir(r.ahead(), 0o700); err != nil && !errors.Is(err, fs.ErrExist) {
		return err
	}
	dir, err := os.Open(r.ahead())
	if err != nil {
		return err
	}
	defer dir.Close()
	if unix.Flock(int(dir.Fd()), unix.LOCK_EX|unix.LOCK_NB) != nil {
		return nil
	}
	// Whoever removes the directory ends this: nothing can be made in it any more.
	root, err := os.OpenRoot(r.ahead())
	if err != nil {
		return err
	}
	defer root.Close()

	next := map[string]wal.Segment{}
	var names []string
	for range r.Prefetch {
		s = s.Next()
		name, err := r.inArchive(c, s)
		if err != nil {
			break // the server finds out what that means when it asks
		}
		next[name] = s
		names = append(names, name)
	}
	entries, err := dir.ReadDir(-1)
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, wanted := next[e.Name()]; !wanted {
			if err := root.RemoveAll(e.Name()); err != nil {
				return err
			}
		}
	}
	g, making := errgroup.WithContext(serving)
	g.SetLimit(max(1, runtime.GOMAXPROCS(0)-1)) // one processor is the server's
	for _, name := range names {
		g.Go(func() error { return r.makeReady(making, c, root, next[name], name) })
	}
	return g.Wait()
}

// awaitServersEnd waits until the server that asks is gone, going by the first line
// of its postmaster.pid; for ever where there is none.
func (r Request) awaitServersEnd(ctx context.Context) {
	file := r.inData("postmaster.pid")
	content, err := os.ReadFile(file)
	line, _, _ := strings.Cut(string(content), "\n")
	pid, parseErr := strconv.Atoi(line)
	if err != nil || parseErr != nil || pid <= 0 {
		<-ctx.Done()
		return
	}
	tick := time.NewTicker(50 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if _, err := os.Stat(file); errors.Is(err, fs.ErrNotExist) || errors.Is(unix.Kill(pid, 0), unix.ESRCH) {
			return
		}
	}
}

// inArchive is the name under which a segment gets ready.
func (r Request) inArchive(c archive.Catalogue, s wal.Segment) (string, error) {
	if gap, err := gapIn(c, s); gap != nil || err != nil {
		return "", errors.Join(errNoSegment, err)
	}
	in, err := c.Open(s)
	if err != nil {
		return "", err
	}
	defer in.Close()
	return r.aheadName(c, s, in)
}

// makeReady makes one segment ready, unless it is.
func (r Request) makeReady(ctx context.Context, c archive.Catalogue, root *os.Root, s wal.Segment, name string) error {
	if err := ctx.Err(); err != nil {
		return err
	}
	if _, err := root.Lstat(name); err == nil {
		return nil
	}
	// It is the server's pg_wal, which must never be full.
	var st unix.Statfs_t
	if err := unix.Statfs(filepath.Dir(r.Path), &st); err != nil {
		return err
	}
	if free := int64(st.Bavail) * int64(st.Bsize); free < 2*int64(r.Prefetch)*int64(s.Size) {
		return fmt.Errorf("only %d MB are free", free>>20)
	}
	in, err := c.Open(s)
	if err != nil {
		return err
	}
	defer in.Close()
	out, err := root.OpenFile(name+makingSuffix, os.O_WRONLY|os.O_CREATE|os.O_TRUNC, fileMode(filepath.Dir(r.Path)))
	if err != nil {
		return err
	}
	defer out.Close()
	err = copySegment(ctx, out, in, s, c.Identity.SystemID)
	if err == nil {
		err = out.Sync()
	}
	if err == nil {
		// Compressed since, say: then it is not what its name says, though its bytes are.
		if now, nameErr := r.aheadName(c, s, in); nameErr == nil && now == name {
			return root.Rename(name+makingSuffix, name)
		}
	}
	return errors.Join(err, root.Remove(name+makingSuffix))
}

// forgetAhead removes what is ready, and ends who is at it.
func (r Request) forgetAhead() {
	for range retries {
		if os.RemoveAll(r.ahead()) == nil {
			return
		}
	}
}
