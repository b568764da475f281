// Package fleet is many clusters in one process: the configuration file, the
// difference between two of them, and the supervision of one receiver each.
package fleet

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"runtime"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// Fleet runs one receiver per cluster. Make it with New, run it once with Run.
type Fleet struct {
	log      *slog.Logger
	shared   *receiver.Shared
	readings *readings

	reload  sync.Mutex // held while the set of members changes
	group   errgroup.Group
	started chan struct{} // closed when Run has started all receivers

	mu      sync.Mutex // guards what follows
	cfg     *Config
	members map[string]*member
	base    context.Context // of the receivers; nil until Run, and when it ends
}

// member is one cluster's receiver.
type member struct {
	cfg      receiver.Config
	report   ClusterReport // of cfg alone
	receiver *receiver.Receiver
	seen     *seen
	stop     context.CancelFunc
	stopping time.Time     // when a reload called stop, after which it cannot be kept; zero: none did
	next     *member       // what is started when it has stopped; nil: nothing
	done     chan struct{} // closed when Run has returned
	gone     chan struct{} // closed when next has taken its place
}

// ClusterStatus is the status of one cluster's receiver.
type ClusterStatus struct {
	Name     string
	Stopping time.Time // when a reload told it to stop; zero: none did
	receiver.Status
	configured ClusterReport
	memory     memory
}

// connectAttempts is how many clusters try to connect at the same time. It is all
// the spread that a start needs: an attempt takes milliseconds where servers answer, so
// hundreds of clusters are through in a second or two; and where none answers, 500 are
// in ten seconds. After an outage the receivers' own pauses, which are random, spread
// them as well.
const connectAttempts = 50

// New makes a fleet that does nothing yet.
func New(cfg *Config, log *slog.Logger) *Fleet {
	// Half of the processors compress: archiving comes first.
	shared := receiver.NewShared(max(1, int64(runtime.GOMAXPROCS(0))/2), connectAttempts)
	f := &Fleet{log: log, shared: shared, readings: newReadings(log), cfg: cfg, members: map[string]*member{}, started: make(chan struct{})}
	for _, c := range cfg.Clusters {
		f.members[c.Name] = f.newMember(c)
	}
	return f
}

func (f *Fleet) newMember(c receiver.Config) *member {
	remembered := new(seen)
	log := slog.New(&recorder{Handler: f.log.Handler(), seen: remembered})
	return &member{cfg: c, report: configured(c), receiver: receiver.New(c, log, f.shared), seen: remembered, stop: func() {}, done: make(chan struct{}), gone: make(chan struct{})}
}

// Run archives until ctx is done. It then stops all receivers at once, and
// returns when they have ended; those that have not after the shutdown timeout
// are named in the error.
func (f *Fleet) Run(ctx context.Context) error {
	base, cancel := context.WithCancel(ctx)
	defer cancel()
	f.mu.Lock()
	f.base = base
	for _, m := range f.members {
		f.start(m)
	}
	f.mu.Unlock()
	f.group.Go(func() error { f.watch(base); return nil })
	close(f.started)

	<-ctx.Done()
	f.mu.Lock()
	f.base = nil // no reload starts a receiver from here on
	timeout := f.cfg.ShutdownTimeout
	f.mu.Unlock()

	ended := make(chan error, 1)
	go func() { ended <- f.group.Wait() }()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case err := <-ended:
		return err
	case <-timer.C:
		return fmt.Errorf("not stopped after %s (shutdown_timeout): %s; what they had acknowledged is on disk", timeout, strings.Join(f.unfinished(), ", "))
	}
}

// Started is closed once Run has started the receivers; whether they reach their
// servers is another matter.
func (f *Fleet) Started() <-chan struct{} { return f.started }

// start runs a member's receiver. f.mu is held, and f.base is set.
func (f *Fleet) start(m *member) {
	ctx, cancel := context.WithCancel(f.base)
	m.stop = cancel
	f.group.Go(func() error {
		defer close(m.done)
		defer cancel()
		if err := m.receiver.Run(ctx); err != nil {
			// Siblings go on, whatever this was.
			f.log.Error("receiver ended", "cluster", m.cfg.Name, "error", err)
		}
		return nil
	})
}

func (f *Fleet) unfinished() []string {
	f.mu.Lock()
	defer f.mu.Unlock()
	var names []string
	for name, m := range f.members {
		select {
		case <-m.done:
		default:
			names = append(names, name)
		}
	}
	slices.Sort(names)
	return names
}

// ErrNotRunning says that a fleet has not begun to run, or is about to end.
var ErrNotRunning = errors.New("the fleet is not running")

// StuckError names clusters that did not stop in time.
type StuckError struct {
	Names   []string // sorted
	Timeout time.Duration
}

func (e *StuckError) Error() string {
	return fmt.Sprintf("not stopped after %s (shutdown_timeout): %s; what replaces them is started when they have stopped", e.Timeout, strings.Join(e.Names, ", "))
}

// Reload makes the fleet run cfg instead: it stops, starts, restarts and adjusts what
// the plan says, in parallel, and does not touch a cluster whose values are the same,
// but that one that is halted is looked at again. The plan that it returns is what was
// done. A cluster that does not stop within the shutdown timeout is not in it but in a
// *StuckError: nothing is started on top of it, and what is to replace it starts when
// it has stopped, unless a later Reload decides otherwise.
func (f *Fleet) Reload(ctx context.Context, cfg *Config) (Plan, error) {
	f.reload.Lock()
	defer f.reload.Unlock()

	// Made before the lock is held: files that a conninfo names are read for it.
	fresh := map[string]*member{}
	for _, c := range cfg.Clusters {
		fresh[c.Name] = f.newMember(c)
	}

	f.mu.Lock()
	if f.base == nil {
		f.mu.Unlock()
		return Plan{}, ErrNotRunning
	}
	plan := f.plan(cfg)
	for _, name := range plan.Adjust {
		m, next := f.members[name], fresh[name]
		m.cfg, m.report = next.cfg, next.report
		m.receiver.Adjust(next.cfg.Adjustable)
	}
	for _, name := range plan.Keep {
		f.members[name].receiver.LookAgain()
	}
	f.mu.Unlock()

	done := plan
	done.Start, done.Stop, done.Restart = nil, nil, nil
	var wait sync.WaitGroup
	var mu sync.Mutex // guards done and stuck
	var stuck []string
	for _, list := range []struct{ names, done *[]string }{{&plan.Start, &done.Start}, {&plan.Stop, &done.Stop}, {&plan.Restart, &done.Restart}} {
		for _, name := range *list.names {
			wait.Go(func() {
				ok := f.replace(ctx, name, fresh[name], cfg.ShutdownTimeout)
				mu.Lock()
				defer mu.Unlock()
				if ok {
					*list.done = append(*list.done, name)
				} else {
					stuck = append(stuck, name)
				}
			})
		}
	}
	wait.Wait()
	for _, names := range done.lists() {
		slices.Sort(*names)
	}

	f.mu.Lock()
	f.cfg = cfg
	stopped := f.base == nil
	f.mu.Unlock()
	for _, name := range plan.Stop {
		f.log.Warn("cluster removed: its files stay, and so does its replication slot, which retains WAL on the primary until it is dropped", "cluster", name)
	}
	if stopped || ctx.Err() != nil {
		return done, errors.New("the fleet was stopped while it was reloaded")
	}
	if len(stuck) > 0 {
		slices.Sort(stuck)
		return done, &StuckError{stuck, cfg.ShutdownTimeout}
	}
	return done, nil
}

// plan says what a reload does with cfg. f.mu is held.
func (f *Fleet) plan(cfg *Config) Plan {
	var running []receiver.Config
	for _, m := range f.members {
		running = append(running, m.cfg)
	}
	plan := Diff(running, cfg.Clusters)
	for name, m := range f.members {
		if !m.stopping.IsZero() { // by an earlier reload, in vain
			plan.restart(name)
		}
	}
	return plan
}

// Plan says what Reload would do with cfg now, and does nothing.
func (f *Fleet) Plan(cfg *Config) Plan {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.plan(cfg)
}

// replace stops a cluster's receiver, where there is one, and starts the next,
// where there is one. It reports false when the old one did not stop in time.
func (f *Fleet) replace(ctx context.Context, name string, next *member, timeout time.Duration) bool {
	f.mu.Lock()
	if f.base == nil {
		f.mu.Unlock()
		return false
	}
	old := f.members[name]
	if old == nil { // never was there, or has ended since the plan was made
		if next != nil {
			f.members[name] = next
			f.start(next)
		}
		f.mu.Unlock()
		return true
	}
	old.next = next
	if old.stopping.IsZero() {
		old.stopping = time.Now()
		old.stop()
		f.group.Go(func() error {
			<-old.done
			f.succeed(name, old, timeout)
			return nil
		})
	}
	f.mu.Unlock()
	timer := time.NewTimer(timeout)
	defer timer.Stop()
	select {
	case <-old.gone:
		return true
	case <-ctx.Done():
	case <-timer.C:
	}
	return false
}

// succeed takes away a receiver that has stopped, and starts what comes after it.
func (f *Fleet) succeed(name string, old *member, timeout time.Duration) {
	f.mu.Lock()
	defer f.mu.Unlock()
	defer close(old.gone)
	if took := time.Since(old.stopping); took > timeout {
		f.log.Info("the receiver that did not stop in time has stopped", "cluster", name, "after", took.Round(time.Second))
	}
	if f.base == nil {
		return
	}
	delete(f.members, name)
	if old.next != nil {
		old.next.seen.inherit(old.seen, old.next.cfg.Dir == old.cfg.Dir)
		f.members[name] = old.next
		f.start(old.next)
	}
}

// Decide hands a person's decision to a cluster's receiver; see
// [receiver.Receiver.Decide]. Any goroutine may call it.
func (f *Fleet) Decide(ctx context.Context, cluster string, what receiver.Decision) (string, error) {
	f.mu.Lock()
	m := f.members[cluster]
	f.mu.Unlock()
	if m == nil {
		return "", fmt.Errorf("there is no cluster %q", cluster)
	}
	return m.receiver.Decide(ctx, what)
}

// Prune removes WAL before limit from a cluster's archive; see [receiver.Receiver.Prune].
// Any goroutine may call it.
func (f *Fleet) Prune(ctx context.Context, cluster string, limit wal.LSN) (removed []string, err error) {
	f.mu.Lock()
	m := f.members[cluster]
	f.mu.Unlock()
	if m == nil {
		return nil, fmt.Errorf("there is no cluster %q", cluster)
	}
	return m.receiver.Prune(ctx, limit)
}

// Status lists all clusters, in the configuration's order.
func (f *Fleet) Status() []ClusterStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := make([]ClusterStatus, 0, len(f.members))
	listed := map[string]bool{}
	for _, c := range f.cfg.Clusters {
		if m := f.members[c.Name]; m != nil {
			listed[c.Name] = true
			all = append(all, m.status())
		}
	}
	var rest []ClusterStatus // being removed
	for name, m := range f.members {
		if !listed[name] {
			rest = append(rest, m.status())
		}
	}
	slices.SortFunc(rest, func(a, b ClusterStatus) int { return strings.Compare(a.Name, b.Name) })
	return append(all, rest...)
}

// status is a member's; f.mu is held.
func (m *member) status() ClusterStatus {
	return ClusterStatus{m.cfg.Name, m.stopping, m.receiver.Status(), m.report, m.seen.memory(m.cfg.MinFree)}
}
