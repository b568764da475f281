package receiver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"golang.org/x/sync/semaphore"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

// compressRetry is the time after which a failed compression is tried again.
const compressRetry = time.Minute

// compressing is the goroutine that compresses an open archive's sealed segments,
// beside the one that receives. The directory is its list of what is to be done,
// so that it goes on by itself where an earlier process ended.
type compressing struct {
	sealed chan struct{} // has one while there may be new segments
	stop   context.CancelFunc
	done   chan struct{}
}

// startCompressing starts it, if there is something to do and to do it with.
func (r *Receiver) startCompressing() {
	size := r.dir.SegmentSize()
	if r.cfg.Compress == (archive.Compression{}) || r.compressing != nil || size == 0 {
		return
	}
	ctx, stop := context.WithCancel(context.Background())
	c := &compressing{make(chan struct{}, 1), stop, make(chan struct{})}
	r.compressing = c
	dir := r.dir
	go func() {
		defer close(c.done)
		r.compress(ctx, dir, size, c.sealed)
	}()
}

// wakeCompressing tells it that there are new sealed segments.
func (r *Receiver) wakeCompressing() {
	if r.compressing == nil {
		return
	}
	select {
	case r.compressing.sealed <- struct{}{}:
	default:
	}
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
func (r *Receiver) compress(ctx context.Context, dir *archive.Dir, size wal.SegmentSize, sealed <-chan struct{}) {
	hopeless := map[wal.Segment]bool{}
	reported := ""
	for {
		err := r.compressPlain(ctx, dir, size, hopeless)
		if ctx.Err() != nil {
			return
		}
		var again <-chan time.Time
		if err == nil {
			reported = ""
		} else {
			again = time.After(compressRetry)
			if err.Error() != reported {
				reported = err.Error()
				r.log.Warn("a sealed segment stays as it is, not compressed", "error", err, "retry_in", compressRetry)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-sealed:
		case <-again:
		}
	}
}

// compressPlain compresses all sealed segments that are plain, oldest first. Those
// that need a person become hopeless, and are left out from then on.
func (r *Receiver) compressPlain(ctx context.Context, dir *archive.Dir, size wal.SegmentSize, hopeless map[wal.Segment]bool) error {
	segments, err := dir.Plain(size)
	for _, s := range segments {
		if hopeless[s] {
			continue
		}
		serr := r.compressSegment(ctx, dir, s)
		if ctx.Err() != nil {
			return ctx.Err()
		}
		hopeless[s] = errors.As(serr, new(*archive.FileError))
		err = errors.Join(err, serr)
		if serr != nil && !hopeless[s] {
			break // the disk, or the room on it: the next one has no better
		}
	}
	return err
}

// compressSegment compresses one segment, when it is this receiver's turn.
func (r *Receiver) compressSegment(ctx context.Context, dir *archive.Dir, s wal.Segment) (err error) {
	if err := r.compressors.Acquire(ctx, 1); err != nil {
		return err
	}
	defer r.compressors.Release(1)
	free, err := r.freeBytes(dir)
	if err != nil {
		return err
	}
	if room := int64(s.Size) + max(r.cfg.MinFree, 0); free < room {
		return fmt.Errorf("no room to compress %s: %s has %s left, and it may take %s above min_free", s.Name(), r.cfg.Dir, megabytes(free), megabytes(int64(s.Size)))
	}
	var n int64
	done := make(chan struct{})
	go func() {
		defer close(done)
		defer func() {
			if p := recover(); p != nil {
				err = r.panicked(p)
			}
		}()
		lowerPriority()
		n, err = dir.Compress(ctx, s, r.cfg.Compress)
	}()
	<-done
	if err == nil {
		r.compressed.Add(1)
		r.log.Info("segment compressed", "segment", s.Name(), "compress", r.cfg.Compress.String(), "bytes", n)
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
	return r.compressPlain(ctx, r.dir, r.dir.SegmentSize(), map[wal.Segment]bool{})
}

// NewCompressors makes what bounds the work of all receivers that share it: how
// many segments are compressed at the same time. Each takes one processor, at low
// priority, and up to 20 MB of memory.
func NewCompressors(n int64) *semaphore.Weighted { return semaphore.NewWeighted(n) }
