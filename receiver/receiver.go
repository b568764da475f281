// Package receiver archives one cluster: it connects, chooses where to start,
// streams, writes, flushes and acknowledges, and goes on after every trouble
// that does not need a person.
package receiver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"runtime/debug"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"
	"golang.org/x/sync/semaphore"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/wal"
)

const (
	// sustained is how long a session must have streamed for its failure to
	// count as the first one.
	sustained = 30 * time.Second
	// blockedRetry and haltedRetry are the times between two looks at a
	// condition.
	blockedRetry = 2 * time.Second
	haltedRetry  = 30 * time.Second
	// atOnce is the pause before an attempt that is part of going on.
	atOnce = time.Millisecond
	// stopTimeout bounds the good-bye to a server.
	stopTimeout = 5 * time.Second
)

// Receiver archives one cluster. Make it with New, then either run it once with Run,
// or call RunOnce as often as needed, and Close.
type Receiver struct {
	cfg  Config // without its Adjustable: see settings
	log  *slog.Logger
	dial func(ctx context.Context, network, address string) (net.Conn, error) // nil: the network
	free func() (int64, error)                                                // nil: the archive's file system

	adjusted    atomic.Pointer[Adjustable] // never nil
	waking      sync.Mutex
	receiving   *pgrepl.Stream // guarded by waking: what an Adjust wakes; nil: nothing
	again       chan struct{}  // has one when a halted cluster is to be looked at
	state       atomic.Pointer[Status]
	progress    progressCell
	panics      atomic.Int64
	compressed  atomic.Int64
	backlog     atomic.Int64        // sealed segments that wait to be compressed
	gaps        atomic.Int64        // that the archive has on record, when last looked at
	room        atomic.Int64        // free bytes of the archive's file system, plus 1; 0: not known
	compressors *semaphore.Weighted // shared with other receivers
	decisions   chan decision
	done        chan struct{} // closed when Run has returned

	// Owned by Run or RunOnce.
	now         progress
	dir         *archive.Dir
	compressing *compressing    // nil: nothing to compress, or no archive is open
	writer      *archive.Writer // kept from one connection to the next; nil after an error of its own
	// hold keeps flush positions below it from being sent, which could move the
	// slot back: it is what may have been acknowledged before.
	hold wal.LSN
	// accepted is the gap that the next session may record.
	accepted *gapError
	pending  chan<- outcome // of the decision under way; nil: none is
	// stray are hosts whose WAL was not the archive's when they were tried last, with
	// their timelines.
	stray map[string]wal.Timeline
	// others are the hosts that become stray if a person accepts the divergence of
	// the one that halted the cluster.
	others map[string]wal.Timeline
}

// New makes a receiver that does nothing yet. compressors are those of the process;
// see NewCompressors.
func New(cfg Config, log *slog.Logger, compressors *semaphore.Weighted) *Receiver {
	r := &Receiver{cfg: cfg, compressors: compressors, log: log.With("cluster", cfg.Name), again: make(chan struct{}, 1),
		decisions: make(chan decision), done: make(chan struct{}), stray: map[string]wal.Timeline{}}
	r.adjusted.Store(&cfg.Adjustable)
	r.cfg.Adjustable = Adjustable{} // nobody goes by what may have changed
	r.state.Store(&Status{State: Connecting, Since: time.Now()})
	return r
}

// settings are those that hold now. They are read where they are used; the pointer
// stays the same until the next Adjust.
func (r *Receiver) settings() *Adjustable { return r.adjusted.Load() }

// Adjust makes the receiver go by other settings from now on, whatever it is doing:
// its connection stays, and a cluster that is halted is looked at again. Any
// goroutine may call it.
func (r *Receiver) Adjust(a Adjustable) {
	r.adjusted.Store(&a)
	r.waking.Lock()
	if r.receiving != nil {
		r.receiving.Wake()
	}
	r.waking.Unlock()
	r.LookAgain()
}

// setReceiving says which stream waits for messages, and may be woken; nil: none.
func (r *Receiver) setReceiving(s *pgrepl.Stream) {
	r.waking.Lock()
	defer r.waking.Unlock()
	r.receiving = s
}

// LookAgain makes a receiver whose cluster is halted try again now, rather than
// after a while: whoever asks may have mended something. In any other state it
// changes nothing that is under way. Any goroutine may call it.
func (r *Receiver) LookAgain() {
	if r.state.Load().State != Halted {
		return
	}
	select {
	case r.again <- struct{}{}:
	default:
	}
}

// Run archives until ctx is done, through all trouble. It then flushes, tells
// the server, and returns nil; the error is one of closing the archive.
func (r *Receiver) Run(ctx context.Context) (err error) {
	defer close(r.done)
	defer func() { err = errors.Join(err, r.close()) }()
	retry := backoff.NewExponentialBackOff()
	retry.RandomizationFactor = 1 // full jitter: from 0 to twice the interval
	retry.MaxInterval = 15 * time.Second
	var reported trouble
	for {
		begun, before := time.Now(), r.now.flushed
		streamed, err := r.guardedSession(ctx)
		r.answer("", err)
		r.accepted = nil
		if ctx.Err() != nil {
			if err != nil && !errors.Is(err, context.Canceled) {
				r.log.Warn(msgNoGoodbye, "error", err)
			}
			return nil
		}
		if r.state.Load().State == Streaming || r.now.flushed > before {
			reported = trouble{} // it was archiving: the next trouble is news
		}
		if streamed && time.Since(begun) >= sustained {
			retry.Reset()
		}
		t := classify(err)
		var gap *gapError
		if errors.As(err, &gap) && r.settings().OnGap == GapRecord {
			t = trouble{Backoff, "gap", 0, ""} // it cannot be recorded yet
		}
		pause := t.pause
		if t.state == Backoff && pause == 0 {
			pause = retry.NextBackOff()
		}
		if t.state == Halted {
			// Whoever mends this may have to move the directory away.
			if err := r.release(); err != nil {
				r.log.Debug("closing the archive", "error", err)
			}
		}
		r.setTrouble(t.state, err)
		reported = r.reportTrouble(reported, t, err, pause)
		wait := sleep
		if t.state == Halted {
			wait = func(ctx context.Context, pause time.Duration) bool { return r.halt(ctx, pause, err) }
		}
		if !wait(ctx, pause) {
			return nil
		}
	}
}

const msgNoGoodbye = "stopped without a good-bye to the server"

// RunOnce archives over one connection, and returns what ended that. It is nil when
// ctx is done or cfg.EndPos was passed, after what came was flushed and the server
// was told. Another RunOnce goes on where this one ended, without reading the
// archive again unless it has to.
func (r *Receiver) RunOnce(ctx context.Context) error {
	for {
		_, err := r.guardedSession(ctx)
		if errors.Is(err, errEndReached) || ctx.Err() != nil && !archive.SyncFailed(err) {
			if err != nil && !errors.Is(err, errEndReached) && !errors.Is(err, context.Canceled) {
				r.log.Warn(msgNoGoodbye, "error", err)
			}
			return nil
		}
		t := classify(err)
		if t.state == Backoff && t.pause == atOnce {
			continue
		}
		if t.state == Halted {
			err = errors.Join(err, r.release()) // whoever mends this may have to change the directory
		}
		r.setTrouble(t.state, err)
		return err
	}
}

// Close ends what RunOnce left open.
func (r *Receiver) Close() error { return r.close() }

// guardedSession is a session whose panic is its own failure: siblings go on,
// and so does this cluster, from what the disk has.
func (r *Receiver) guardedSession(ctx context.Context) (streamed bool, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = r.panicked(p)
			r.dropWriter()
		}
	}()
	return r.session(ctx)
}

// panicked logs a panic that was recovered, with its stack, and makes it an
// error.
func (r *Receiver) panicked(p any) error {
	r.panics.Add(1)
	r.log.Error("panic in the receiver; this is a bug in walfleet", "panic", p, "stack", string(debug.Stack()))
	return fmt.Errorf("internal error: panic: %v", p)
}

// reportTrouble logs a kind of trouble once; the same again is for debugging.
func (r *Receiver) reportTrouble(last, now trouble, err error, pause time.Duration) trouble {
	level := slog.LevelWarn
	if now.state == Halted {
		level = slog.LevelError
	}
	if last.state == now.state && last.kind == now.kind {
		level = slog.LevelDebug
	}
	attrs := []any{"state", string(now.state), "error", err, "retry_in", pause.Round(time.Millisecond)}
	if r.now.flushed != 0 {
		attrs = append(attrs, "timeline", r.now.timeline, "flushed", r.now.flushed)
	}
	if now.hint != "" {
		attrs = append(attrs, "hint", now.hint)
	}
	r.log.Log(context.Background(), level, MsgTrouble, attrs...)
	return now
}

// dropWriter forgets the writer after an error of its own, so that the next
// session finds out what the disk has.
func (r *Receiver) dropWriter() {
	if r.writer != nil {
		if err := r.writer.Close(); err != nil {
			r.log.Debug("closing segments", "error", err)
		}
		r.writer = nil
	}
}

// release closes the archive; the next session opens it again.
func (r *Receiver) release() error {
	r.stopCompressing()
	r.dropWriter()
	if r.dir == nil {
		return nil
	}
	err := r.dir.Close()
	r.dir, r.hold = nil, 0
	return err
}

func (r *Receiver) close() error {
	err := r.release()
	r.setState(Stopped, "")
	r.log.Info(MsgStopped, "timeline", r.now.timeline, "flushed", r.now.flushed)
	return err
}

// sleep waits; false when ctx was done first.
func sleep(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-ctx.Done():
		return false
	case <-t.C:
		return true
	}
}

func (r *Receiver) options() pgrepl.Options {
	return pgrepl.Options{
		ApplicationName: r.cfg.ApplicationName,
		PasswordFile:    r.cfg.PasswordFile,
		Timeout:         r.settings().ReceiveTimeout,
		Dial:            r.dial,
	}
}
