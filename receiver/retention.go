package receiver

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"strings"
	"sync"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

// Retention says how much of an archive is kept. Its zero value keeps everything.
type Retention struct {
	KeepAge  time.Duration // WAL that is older goes; 0: whatever its age
	KeepSize int64         // bytes of segments' files beyond which the oldest go; 0: any
	Backups  string        // directory of base backups, whose WAL stays; "{cluster}" in it stands for the cluster's name; "": none are known
}

// Prunes tells whether anything is pruned by it.
func (k Retention) Prunes() bool { return k.KeepAge > 0 || k.KeepSize > 0 }

// Rule is what a cluster's retention lets go, with ages that count from now, the archive's
// [archive.Catalogue.Newest]. The error is one of the base backups.
func (k Retention) Rule(ctx context.Context, cluster string, now time.Time) (rule archive.PruneRule, err error) {
	rule.KeepSize = k.KeepSize
	if k.KeepAge > 0 {
		rule.OlderThan = now.Add(-k.KeepAge)
	}
	if k.Backups != "" {
		rule.Backups, err = archive.FindBackups(ctx, strings.ReplaceAll(k.Backups, "{cluster}", cluster))
	}
	return rule, err
}

const (
	// retentionInterval is the time between two looks at what may go.
	retentionInterval = time.Hour
	// retentionFirst bounds the time to the first one after the start.
	retentionFirst = time.Minute
)

// WarnRetention is the kind of a Warning: the archive's retention cannot be kept to.
const WarnRetention = "retention"

// custody is whose the archive's directory is: it is opened, closed and pruned by who
// holds it. Run's goroutine takes it from a prune, which stops after the file that it is at.
type custody struct {
	held   chan struct{} // has one while somebody holds it
	mu     sync.Mutex    // guards what follows
	wanted bool
	cancel context.CancelFunc // of the prune that holds it; nil: none does
}

// take takes the directory for Run's goroutine.
func (c *custody) take() (release func()) {
	c.mu.Lock()
	c.wanted = true
	if c.cancel != nil {
		c.cancel()
	}
	c.mu.Unlock()
	c.held <- struct{}{}
	c.mu.Lock()
	c.wanted = false
	c.mu.Unlock()
	return func() { <-c.held }
}

// borrow takes the directory for a prune, which goes on until the context that it returns
// is done. The error is ctx's.
func (c *custody) borrow(ctx context.Context) (_ context.Context, release func(), err error) {
	select {
	case c.held <- struct{}{}:
	case <-ctx.Done():
		return nil, nil, ctx.Err()
	}
	ctx, cancel := context.WithCancel(ctx)
	c.mu.Lock()
	defer c.mu.Unlock()
	c.cancel = cancel
	if c.wanted {
		cancel()
	}
	return ctx, func() {
		c.mu.Lock()
		c.cancel = nil
		c.mu.Unlock()
		cancel()
		<-c.held
	}, nil
}

// interrupt ends a prune that is under way.
func (c *custody) interrupt() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.cancel != nil {
		c.cancel()
	}
}

// errInterrupted says that a prune did not come to its end, and did no harm.
var errInterrupted = errors.New("the receiver needed the archive for itself, or other limits hold now")

// Prune removes WAL before limit from the archive, as [archive.Dir.Prune] does, beside
// the receiving. An archive that is not open, as that of a halted cluster, is opened for
// it. It returns the names of the files that it has removed, also with an error. Any
// goroutine may call it.
func (r *Receiver) Prune(ctx context.Context, limit wal.LSN) (removed []string, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = r.panicked(p) // the receiving is not concerned
		}
	}()
	asked := ctx
	ctx, release, err := r.custody.borrow(ctx)
	if err != nil {
		return nil, err
	}
	defer release()
	if r.closed {
		return nil, fmt.Errorf("cluster %s was stopped meanwhile", r.cfg.Name)
	}
	dir := r.dir
	if dir == nil {
		if dir, err = archive.Open(r.cfg.Dir); err != nil {
			return nil, err
		}
		defer func() { err = errors.Join(err, dir.Close()) }()
	}
	removed, err = dir.Prune(ctx, limit)
	if errors.Is(err, context.Canceled) && asked.Err() == nil {
		err = fmt.Errorf("cluster %s: %w: prune again for the rest", r.cfg.Name, errInterrupted)
	}
	if len(removed) > 0 {
		r.log.Info("archive pruned", "before", limit, "files", len(removed), "first", removed[0], "last", removed[len(removed)-1])
	}
	return removed, err
}

// startRetention begins to keep the archive to its retention; stop returns once that has
// ended.
func (r *Receiver) startRetention(ctx context.Context) (stop func()) {
	ctx, cancel := context.WithCancel(ctx)
	var group sync.WaitGroup
	group.Go(func() {
		pause := rand.N(retentionFirst) // those of a fleet do not come together
		for {
			timer := time.NewTimer(pause)
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case <-timer.C:
			case <-r.retain: // what is kept was changed
				timer.Stop()
			}
			r.keep(ctx, *r.settings())
			pause = retentionInterval
		}
	})
	return func() {
		cancel()
		group.Wait()
	}
}

// keep keeps to a retention once. What goes wrong is a warning, and logged when it is news.
func (r *Receiver) keep(ctx context.Context, settings Adjustable) {
	var err error
	if settings.Retention.Prunes() {
		err = r.prunePlanned(ctx, settings.Retention)
	}
	if ctx.Err() != nil {
		return
	}
	old := r.unkept.Load()
	if err == nil {
		r.unkept.Store(nil)
		return
	}
	w := &Warning{Kind: WarnRetention, Since: time.Now(), Text: "nothing was pruned, the archive grows: " + err.Error(),
		Hint: "see what \"walfleet prune " + r.cfg.Name + " --dry-run\" with the same limits says; [retention] is looked at again every hour"}
	if old != nil {
		w.Since = old.Since
	}
	r.unkept.Store(w)
	if old == nil || old.Text != w.Text {
		r.log.Warn("the archive's retention is not kept", "error", err, "hint", w.Hint)
	}
}

func (r *Receiver) prunePlanned(ctx context.Context, k Retention) error {
	// Nothing interrupts a disk that does not answer, as where the base backups are: the
	// receiver must be able to stop, and another one to begin, all the same.
	type planned struct {
		archive.PrunePlan
		err error
	}
	ready := make(chan planned, 1)
	go func() {
		plan, err := r.planPrune(ctx, k)
		ready <- planned{plan, err}
	}()
	var plan planned
	select {
	case plan = <-ready:
	case <-ctx.Done():
		return ctx.Err()
	}
	if plan.err != nil || plan.Limit == 0 || r.settings().Retention != k {
		return plan.err
	}
	for _, held := range plan.Held {
		r.log.Debug("retention", "held", held)
	}
	_, err := r.Prune(ctx, plan.Limit)
	if errors.Is(err, errInterrupted) {
		return nil // the rest is for the next time
	}
	return err
}

// planPrune finds out what a retention lets go now, and changes nothing.
func (r *Receiver) planPrune(ctx context.Context, k Retention) (plan archive.PrunePlan, err error) {
	defer func() {
		if p := recover(); p != nil {
			err = r.panicked(p)
		}
	}()
	catalogue, err := archive.ReadCatalogue(ctx, r.cfg.Dir)
	if errors.Is(err, fs.ErrNotExist) || err == nil && !catalogue.Bound {
		return plan, nil // not begun yet
	}
	if err != nil {
		return plan, err
	}
	rule, err := k.Rule(ctx, r.cfg.Name, catalogue.Newest(time.Now()))
	if err != nil {
		return plan, err
	}
	return catalogue.PlanPrune(ctx, rule)
}
