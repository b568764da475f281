// Package receiver archives one cluster: it connects, chooses where to start,
// streams, writes, flushes and acknowledges, and goes on after every trouble
// that does not need a person.
package receiver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"net"
	"runtime/debug"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/cenkalti/backoff/v5"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/wal"
)

const (
	// sustained is how long a session must have streamed for its failure to
	// count as the first one. Connecting, and finding the place to start, do not count.
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
	custody     custody
	retain      chan struct{} // has one when the retention was changed
	unkept      atomic.Pointer[Warning]
	receiving   *pgrepl.Stream // guarded by waking: what an Adjust wakes; nil: nothing
	again       chan struct{}  // has one when a halted cluster is to be looked at
	state       atomic.Pointer[Status]
	progress    progressCell
	monitored   atomic.Pointer[monitored] // nil: the monitor has not looked yet
	panics      atomic.Int64
	statuses    atomic.Int64 // status updates sent
	failures    failureCounts
	syncs       syncTimer
	compressed  atomic.Int64
	backlog     atomic.Int64 // sealed segments that wait to be compressed
	switchovers atomic.Int64
	gaps        atomic.Int64 // that the archive has on record, when last looked at
	room        atomic.Int64 // free bytes of the archive's file system, plus 1; 0: not known
	shared      *Shared
	decisions   chan decision
	done        chan struct{} // closed when Run has returned

	// Owned by Run or RunOnce.
	now         progress
	outage      outage
	pace        pacer // over all sessions
	scarce      spaceLog
	streamed    place           // where it streamed last, having caught up
	mark        wal.LSN         // what the archive had when the session began; beyond it WAL is archived
	closed      bool            // changed in custody too: there is no more to come
	dir         *archive.Dir    // changed, and closed, in custody of Run's goroutine alone
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

// New makes a receiver that does nothing yet. All receivers of a process have one shared.
func New(cfg Config, log *slog.Logger, shared *Shared) *Receiver {
	r := &Receiver{cfg: cfg, shared: shared, log: log.With("cluster", cfg.Name), again: make(chan struct{}, 1),
		custody: custody{held: make(chan struct{}, 1)}, retain: make(chan struct{}, 1),
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
	old := r.adjusted.Swap(&a)
	if old.Retention != a.Retention {
		select {
		case r.retain <- struct{}{}:
		default:
		}
		r.custody.interrupt() // what goes by the limits of before
	}
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
	defer r.startMonitor(ctx)()
	defer r.startRetention(ctx)()
	retry := backoff.NewExponentialBackOff()
	retry.RandomizationFactor = 1 // full jitter: from 0 to twice the interval
	retry.MaxInterval = 15 * time.Second
	for {
		r.mark = r.now.flushed
		since, err := r.guardedSession(ctx)
		r.answer("", err)
		r.accepted = nil
		if ctx.Err() != nil {
			if err != nil && !errors.Is(err, context.Canceled) {
				r.log.Warn(msgNoGoodbye, "error", err)
			}
			return nil
		}
		if r.state.Load().State == Streaming || r.now.flushed > r.mark {
			r.outage = outage{} // it was archiving: the next trouble is news
		}
		if !since.IsZero() && time.Since(since) >= sustained {
			retry.Reset()
		}
		t := classify(err)
		var gap *gapError
		if errors.As(err, &gap) && r.settings().OnGap == GapRecord {
			t.state, t.kind, t.pause, t.hint = Backoff, "gap", 0, "" // it cannot be recorded yet
		}
		pause := t.pause
		switch {
		case t.state == Backoff && pause == 0:
			pause = retry.NextBackOff()
		case t.state != Backoff:
			pause -= rand.N(pause / 4) // many clusters may have one cause
		}
		if t.state == Halted {
			// Whoever mends this may have to move the directory away.
			if err := r.release(); err != nil {
				r.log.Debug("closing the archive", "error", err)
			}
		}
		r.report(t, err, pause)
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
		r.outage = outage{}
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
		r.setFailed(t.state, err, r.fillIn(t.hint))
		return err
	}
}

// Close ends what RunOnce left open.
func (r *Receiver) Close() error { return r.close() }

// guardedSession is a session whose panic is its own failure: siblings go on,
// and so does this cluster, from what the disk has.
func (r *Receiver) guardedSession(ctx context.Context) (since time.Time, err error) {
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
	return &panicError{p}
}

// outage is the time since WAL was last archived, and what was told of it. Its zero value says that WAL
// is archived.
type outage struct {
	since    time.Time // of the first failure
	failures int64
	repeats  int64           // of them that brought nothing new
	state    State           // of the last one
	quiet    int64           // failures since the last line of the log
	kinds    map[string]bool // of trouble that were logged
	lines    map[string]bool // what was logged of its sessions
}

// add counts a failure, and reports whether it is to be logged: where the state is another one, or the kind
// of trouble is new. Two that take turns in one state are told once each.
func (o *outage) add(t trouble) (news bool) {
	if o.kinds == nil {
		o.since, o.kinds = time.Now(), map[string]bool{}
	}
	o.failures++
	news = o.state != t.state || !o.kinds[t.kind]
	o.state, o.kinds[t.kind] = t.state, true
	if !news {
		o.repeats++
		o.quiet++
	}
	return news
}

// attrs tell of an outage in the line that ends it.
func (o *outage) attrs() []any {
	if o.failures == 0 {
		return nil
	}
	return []any{"failures", o.failures, "not_archiving_for", time.Since(o.since).Round(time.Second)}
}

// once logs what sessions come to: the first time until WAL is archived again as it is told to, for sessions
// may get as far again and again, and then for debugging. What matters of attrs comes first.
func (r *Receiver) once(level slog.Level, msg string, attrs ...any) {
	line := fmt.Sprint(msg, attrs[:2])
	if r.outage.lines[line] {
		level = slog.LevelDebug
	}
	if r.outage.lines == nil {
		r.outage.lines = map[string]bool{}
	}
	r.outage.lines[line] = true
	r.log.Log(context.Background(), level, msg, attrs...)
}

// report publishes trouble, and logs it when it is new. What comes again is counted, in the status and in the
// next line that is different; and logged for debugging.
func (r *Receiver) report(t trouble, err error, pause time.Duration) {
	quiet := r.outage.quiet
	news := r.outage.add(t)
	hint := r.fillIn(t.hint)
	r.setFailed(t.state, err, hint)
	if t.pause != atOnce { // which is part of going on
		r.failures.add(t.class)
	}
	level := slog.LevelWarn
	switch {
	case !news:
		level = slog.LevelDebug
	case t.state == Halted:
		level = slog.LevelError
	}
	attrs := []any{"state", string(t.state), "error", err, "retry_in", pause.Round(time.Millisecond)}
	if r.now.flushed != 0 {
		attrs = append(attrs, "timeline", r.now.timeline, "flushed", r.now.flushed)
	}
	if news && quiet > 0 {
		attrs = append(attrs, "repeated_before", quiet)
		r.outage.quiet = 0
	}
	if hint != "" {
		attrs = append(attrs, "hint", hint)
	}
	r.log.Log(context.Background(), level, MsgTrouble, attrs...)
}

// fillIn puts names into a hint.
func (r *Receiver) fillIn(hint string) string {
	if !strings.Contains(hint, "{") {
		return hint
	}
	role := "ROLE"
	if c, err := pgrepl.ParseConninfo(r.cfg.Conninfo); err == nil {
		role = pgrepl.QuoteIdentifier(c.User())
	}
	return strings.NewReplacer("{cluster}", r.cfg.Name, "{slot}", r.cfg.Slot, "{role}", role).Replace(hint)
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
	defer r.custody.take()()
	err := r.dir.Close()
	r.dir, r.hold = nil, 0
	return err
}

func (r *Receiver) close() error {
	err := r.release()
	release := r.custody.take()
	r.closed = true // another receiver may have the directory from here on
	release()
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
