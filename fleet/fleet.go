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
	"golang.org/x/sync/semaphore"

	"github.com/walfleet/walfleet/receiver"
)

// Fleet runs one receiver per cluster. Make it with New, run it once with Run.
type Fleet struct {
	log         *slog.Logger
	compressors *semaphore.Weighted

	reload sync.Mutex // held while the set of members changes
	group  errgroup.Group

	mu      sync.Mutex // guards what follows
	cfg     *Config
	members map[string]*member
	base    context.Context // of the receivers; nil until Run, and when it ends
}

// member is one cluster's receiver.
type member struct {
	cfg      receiver.Config
	receiver *receiver.Receiver
	stop     context.CancelFunc
	stopping bool          // stop was called; it cannot be kept
	done     chan struct{} // closed when Run has returned
}

// ClusterStatus is the status of one cluster's receiver.
type ClusterStatus struct {
	Name string
	receiver.Status
}

// New makes a fleet that does nothing yet.
func New(cfg *Config, log *slog.Logger) *Fleet {
	// Half of the processors: archiving comes first.
	compressors := receiver.NewCompressors(max(1, int64(runtime.GOMAXPROCS(0))/2))
	f := &Fleet{log: log, compressors: compressors, cfg: cfg, members: map[string]*member{}}
	for _, c := range cfg.Clusters {
		f.members[c.Name] = f.newMember(c)
	}
	return f
}

func (f *Fleet) newMember(c receiver.Config) *member {
	return &member{cfg: c, receiver: receiver.New(c, f.log, f.compressors), stop: func() {}, done: make(chan struct{})}
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

// Reload makes the fleet run cfg instead: it stops, starts and restarts what the
// plan says, in parallel, and does not touch a cluster whose values are the
// same. A cluster that does not stop within the shutdown timeout keeps its place
// and is named in the error; nothing is started on top of it, and the next
// Reload replaces it, whatever its values are then.
func (f *Fleet) Reload(ctx context.Context, cfg *Config) (Plan, error) {
	f.reload.Lock()
	defer f.reload.Unlock()

	f.mu.Lock()
	if f.base == nil {
		f.mu.Unlock()
		return Plan{}, errors.New("the fleet is not running")
	}
	var running []receiver.Config
	for name, m := range f.members {
		if m.stopping { // by an earlier reload, in vain: equal to nothing
			running = append(running, receiver.Config{Name: name})
			continue
		}
		running = append(running, m.cfg)
	}
	plan := Diff(running, cfg.Clusters)
	fresh := map[string]*member{}
	for _, c := range cfg.Clusters {
		if !slices.Contains(plan.Keep, c.Name) {
			fresh[c.Name] = f.newMember(c)
		}
	}
	f.mu.Unlock()

	var wait sync.WaitGroup
	var stuck stuckNames
	for _, name := range slices.Concat(plan.Stop, plan.Restart, plan.Start) {
		wait.Go(func() {
			if !f.replace(ctx, name, fresh[name], cfg.ShutdownTimeout) {
				stuck.add(name)
			}
		})
	}
	wait.Wait()

	f.mu.Lock()
	f.cfg = cfg
	f.mu.Unlock()
	for _, name := range plan.Stop {
		f.log.Warn("cluster removed: its files stay, and so does its replication slot, which retains WAL on the primary until it is dropped", "cluster", name)
	}
	return plan, stuck.err(cfg.ShutdownTimeout)
}

// replace stops a cluster's receiver, where there is one, and starts the next,
// where there is one. It reports false when the old one did not stop in time.
func (f *Fleet) replace(ctx context.Context, name string, next *member, timeout time.Duration) bool {
	f.mu.Lock()
	old := f.members[name]
	if old != nil {
		old.stopping = true
	}
	f.mu.Unlock()
	if old != nil {
		old.stop()
		timer := time.NewTimer(timeout)
		defer timer.Stop()
		select {
		case <-old.done:
		case <-ctx.Done():
			return false
		case <-timer.C:
			return false
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	delete(f.members, name)
	if next != nil && f.base != nil {
		f.members[name] = next
		f.start(next)
	}
	return true
}

// stuckNames collects the clusters that did not stop.
type stuckNames struct {
	mu    sync.Mutex
	names []string
}

func (s *stuckNames) add(name string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.names = append(s.names, name)
}

func (s *stuckNames) err(timeout time.Duration) error {
	if len(s.names) == 0 {
		return nil
	}
	slices.Sort(s.names)
	return fmt.Errorf("not stopped after %s (shutdown_timeout), and left as they were: %s; reload again", timeout, strings.Join(s.names, ", "))
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

// Status lists all clusters, in the configuration's order.
func (f *Fleet) Status() []ClusterStatus {
	f.mu.Lock()
	defer f.mu.Unlock()
	all := make([]ClusterStatus, 0, len(f.members))
	listed := map[string]bool{}
	for _, c := range f.cfg.Clusters {
		if m := f.members[c.Name]; m != nil {
			listed[c.Name] = true
			all = append(all, ClusterStatus{c.Name, m.receiver.Status()})
		}
	}
	var rest []ClusterStatus // being removed
	for name, m := range f.members {
		if !listed[name] {
			rest = append(rest, ClusterStatus{name, m.receiver.Status()})
		}
	}
	slices.SortFunc(rest, func(a, b ClusterStatus) int { return strings.Compare(a.Name, b.Name) })
	return append(all, rest...)
}
