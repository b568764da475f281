package receiver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"sync"
	"syscall"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

// compressRetry is the time after which a failed compression is tried again.
const compressRetry = time.Minute

// compressing is the goroutine that compresses an open archive's sealed segments,
// beside the one that receives. While that catches up it waits: both write to the
// same disk, and what is not received yet is only on the server. It lists the
// directory when it starts, so that it goes on where an earlier process ended, and
// after trouble.
type compressing struct {
	stop context.CancelFunc
	done chan struct{}
	wake chan struct{} // has one while there are new segments

	mu      sync.Mutex
	sealed  []wal.Segment        // since it looked last
	list    bool                 // there may be more in the directory
	waiting map[wal.Segment]bool // all that it knows of and has not compressed
}

// startCompressing starts it, if there is something to do and to do it with.
func (r *Receiver) startCompressing() {
	size := r.dir.SegmentSize()
	if r.cfg.Compress == (archive.Compression{}) || r.compressing != nil || size == 0 {
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	c := &compressing{stop: stop, done: make(chan struct{}), wake: make(chan struct{}, 1), waiting: map[wal.Segment]bool{}}
	r.compressing = c
	dir := r.dir
	go func() {
		defer close(c.done)
		defer func() {
			if p := recover(); p != nil {
				_ = r.panicked(p) // the segments stay plain
			}
		}()
		r.compress(ctx, dir, size, c)
	}()
}

// compressLater tells it of sealed segments, or that the directory may have some
// that nobody told it of.
func (r *Receiver) compressLater(sealed []wal.Segment, list bool) {
	c := r.compressing
	if c == nil || len(sealed) == 0 && !list {
		return
	}
	c.mu.Lock()
	c.sealed, c.list = append(c.sealed, sealed...), c.list || list
	r.waitFor(c, sealed)
	c.mu.Unlock()
	select {
	case c.wake <- struct{}{}:
	default:
	}
}

// waitFor counts segments as waiting, beside those that do. c.mu is held.
func (r *Receiver) waitFor(c *compressing, segments []wal.Segment) {
	for _, s := range segments {
		c.waiting[s] = true
	}
	r.backlog.Store(int64(len(c.waiting)))
}

// waitForAll makes plain, which are all that the directory has, and what was sealed
// since then those that wait.
func (r *Receiver) waitForAll(c *compressing, plain []wal.Segment) {
	c.mu.Lock()
	defer c.mu.Unlock()
	clear(c.waiting)
	r.waitFor(c, c.sealed)
	r.waitFor(c, plain)
}

// waitsNot says that a segment is compressed, or gone.
func (r *Receiver) waitsNot(c *compressing, s wal.Segment) {
	c.mu.Lock()
	defer c.mu.Unlock()
	delete(c.waiting, s)
	r.backlog.Store(int64(len(c.waiting)))
}

// stopCompressing ends it. A segment that is being compressed stays plain.
func (r *Receiver) stopCompressing() {
	if r.compressing != nil {
		r.compressing.stop()
		<-r.compressing.done
		r.compressing = nil
	}
}

// compress compresses what is there, and what is sealed later, until ctx is done.
// Trouble is logged when it is news, and tried again.
func (r *Receiver) compress(ctx context.Context, dir *archive.Dir, size wal.SegmentSize, c *compressing) {
	hopeless := map[wal.Segment]bool{}
	reported := ""
	var retry <-chan time.Time // of what failed; nil: nothing did
	list := true
	for {
		c.mu.Lock()
		segments, err := c.sealed, error(nil)
		list = list || c.list
		c.sealed, c.list = nil, false
		c.mu.Unlock()
		if list {
			if segments, err = dir.Plain(size); err == nil {
				r.waitForAll(c, segments)
			}
		}
		later, cerr := r.compressAll(ctx, dir, segments, hopeless, c)
		err = errors.Join(err, cerr)
		switch {
		case ctx.Err() != nil:
			return
		case err == nil && list && !later:
			reported = ""
		case err != nil:
			if err.Error() != reported {
				reported = err.Error()
				r.log.Warn("a sealed segment stays as it is, not compressed", "error", err)
			}
			if retry == nil {
				retry = time.After(compressRetry)
			}
		}
		list = false
		select {
		case <-ctx.Done():
			return
		case <-retry:
			retry, list = nil, true
		case <-c.wake:
		}
	}
}

// errNoRoom says that a segment is not compressed for want of room.
var errNoRoom = errors.New("no room to compress")

// compressAll compresses segments. Those that need a person become hopeless, and
// are left out from then on. For c it leaves the rest for later once the receiver
// catches up, whose end wakes it; c is nil when nothing is received any more.
func (r *Receiver) compressAll(ctx context.Context, dir *archive.Dir, segments []wal.Segment, hopeless map[wal.Segment]bool, c *compressing) (later bool, err error) {
	var errs []error
	for _, s := range segments {
		if hopeless[s] {
			continue
		}
		if c != nil && r.state.Load().State == CatchingUp {
			later = true
			break
		}
		err := r.compressSegment(ctx, dir, s)
		if ctx.Err() != nil {
			return false, ctx.Err()
		}
		if err == nil && c != nil {
			r.waitsNot(c, s)
		}
		if errors.As(err, new(*archive.FileError)) {
			hopeless[s] = true
		}
		errs = append(errs, err)
		if errors.Is(err, errNoRoom) || errors.Is(err, syscall.ENOSPC) || errors.Is(err, syscall.EDQUOT) || errors.Is(err, syscall.EROFS) {
			break // the next one has no better luck
		}
	}
	return later, errors.Join(errs...)
}

// compressSegment compresses one segment, when it is this receiver's turn.
func (r *Receiver) compressSegment(ctx context.Context, dir *archive.Dir, s wal.Segment) (err error) {
	defer func() {
		if p := recover(); p != nil {
			err = r.panicked(p)
		}
	}()
	free, err := r.freeBytes(dir)
	if err != nil {
		return err
	}
	// The next segment to be received must still fit beside min_free. Where that has
	// no room already, compressing makes some.
	room := 2*int64(s.Size) + max(r.settings().MinFree, 0)
	if r.state.Load().State == Blocked {
		room = int64(s.Size)
	}
	if free < room {
		return fmt.Errorf("%w %s: %s has %s left, less than %s", errNoRoom, s.Name(), r.cfg.Dir, megabytes(free), megabytes(room))
	}
	if err := r.shared.compressors.Acquire(ctx, 1); err != nil {
		return err
	}
	defer r.shared.compressors.Release(1)
	n, err := dir.Compress(ctx, s, r.cfg.Compress)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil // it was listed before it was compressed, or a person has moved it away
	case err == nil:
		r.compressed.Add(1)
		r.log.Info(MsgCompressed, "segment", s.Name(), "compress", r.cfg.Compress.String(), "bytes", n)
	}
	return err
}

// CompressSealed compresses what is sealed and still plain, after the last
// RunOnce and before Close.
func (r *Receiver) CompressSealed(ctx context.Context) error {
	r.stopCompressing()
	if r.dir == nil || r.cfg.Compress == (archive.Compression{}) || r.dir.SegmentSize() == 0 {
		return nil
	}
	segments, err := r.dir.Plain(r.dir.SegmentSize())
	_, cerr := r.compressAll(ctx, r.dir, segments, map[wal.Segment]bool{}, nil)
	return errors.Join(err, cerr)
}
