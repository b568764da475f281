package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime/debug"
	"sync"
	"time"
)

const (
	// contentsAge is how long what was read of an archive is good for people, and
	// contentsShare how much longer than the reading took.
	contentsAge   = time.Minute
	contentsShare = 20
	// contentsTimeout bounds a reading. One that a disk holds up for longer keeps no other
	// archive from being read.
	contentsTimeout = 30 * time.Second
	// contentsAtOnce is how many archives are read at a time: archiving comes first.
	contentsAtOnce = 1
)

// reading is what was read of an archive, or is being read.
type reading struct {
	done     chan struct{} // closed when what follows is there
	contents Contents
	err      error
	good     time.Time // until when
}

// readings are the archives that people looked into lately.
type readings struct {
	slots chan struct{} // has room for those that are being read
	log   *slog.Logger
	read  func(ctx context.Context, cluster, dir string) (Contents, error) // ReadContents

	mu sync.Mutex
	of map[string]*reading // by directory; the last one of each
}

func newReadings(log *slog.Logger) *readings {
	return &readings{slots: make(chan struct{}, contentsAtOnce), log: log, read: ReadContents, of: map[string]*reading{}}
}

// fault is a panic.
type fault struct {
	value any
	stack string
}

func (f *fault) Error() string { return "this is a fault of walfleet; its log says more" }

// guarded runs what people want to see and archiving does not need: a panic in it must
// not end the daemon.
func guarded(run func()) (f *fault) {
	defer func() {
		if value := recover(); value != nil {
			f = &fault{value, string(debug.Stack())}
		}
	}()
	run()
	return nil
}

// Contents reads what the archive of a cluster holds. It is read again once a minute at
// most, however often and by however many it is asked for, and one archive at a time: who
// asks waits for its turn, until ctx is done.
func (f *Fleet) Contents(ctx context.Context, cluster string) (Contents, error) {
	var dir string
	f.mu.Lock()
	m := f.members[cluster]
	if m != nil {
		dir = m.cfg.Dir
	}
	f.mu.Unlock()
	if m == nil {
		return Contents{}, fmt.Errorf("there is no cluster %q", cluster)
	}
	r := f.readings.begin(cluster, dir)
	select {
	case <-r.done:
		return r.contents, r.err
	case <-ctx.Done():
		return Contents{}, fmt.Errorf("the archive of %s is still being read, or waits for others to be: %w", cluster, context.Cause(ctx))
	}
}

// begin returns the reading of a directory that is under way or still good, or begins one.
// Its goroutine ends when the disk has answered, and nobody waits for it.
func (all *readings) begin(cluster, dir string) *reading {
	all.mu.Lock()
	defer all.mu.Unlock()
	now := time.Now()
	for key, r := range all.of { // those that nobody has asked for again
		select {
		case <-r.done:
			if now.After(r.good) {
				delete(all.of, key)
			}
		default:
		}
	}
	if r := all.of[dir]; r != nil {
		return r
	}
	r := &reading{done: make(chan struct{})}
	all.of[dir] = r
	go func() {
		defer close(r.done)
		all.slots <- struct{}{}
		var once sync.Once
		release := func() { once.Do(func() { <-all.slots }) }
		defer release()
		defer time.AfterFunc(contentsTimeout, release).Stop()
		ctx, cancel := context.WithTimeoutCause(context.Background(), contentsTimeout, errTooLong)
		defer cancel()
		began := time.Now()
		if fault := guarded(func() { r.contents, r.err = all.read(ctx, cluster, dir) }); fault != nil {
			all.log.Error("reading an archive panicked; this is a bug in walfleet", "cluster", cluster, "panic", fault.value, "stack", fault.stack)
			r.err = fault
		}
		r.good = time.Now().Add(max(contentsAge, contentsShare*time.Since(began)))
	}()
	return r
}

var errTooLong = errors.New("reading the archive took longer than " + contentsTimeout.String())
