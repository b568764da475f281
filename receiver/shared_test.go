package receiver

import (
	"context"
	"fmt"
	"log/slog"
	"net"
	"path/filepath"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"
)

// crowd is many receivers of one process, whose hosts are dialled as a test wants it.
type crowd struct {
	*testing.T
	cfg    Config
	shared *Shared
	dial   func(ctx context.Context) (net.Conn, error)

	mu    sync.Mutex
	now   int         // attempts under way
	most  int         // at the same time
	times []time.Time // of all attempts
}

func newCrowd(t *testing.T, places int64) *crowd {
	g := newRig(t, mb)
	return &crowd{T: t, cfg: g.cfg, shared: NewShared(1, places)}
}

// join starts n receivers, and returns once nothing moves. leave ends them.
func (c *crowd) join(n int) (all []*Receiver, leave func()) {
	ctx, cancel := context.WithCancel(c.Context())
	var wait sync.WaitGroup
	for i := range n {
		cfg := c.cfg
		cfg.Name = fmt.Sprintf("c%d", i)
		cfg.Dir = filepath.Join(c.TempDir(), cfg.Name)
		r := New(cfg, slog.New(slog.DiscardHandler), c.shared)
		r.dial = func(ctx context.Context, _, _ string) (net.Conn, error) {
			c.mu.Lock()
			c.now++
			c.most = max(c.most, c.now)
			c.times = append(c.times, time.Now())
			c.mu.Unlock()
			defer func() {
				c.mu.Lock()
				c.now--
				c.mu.Unlock()
			}()
			return c.dial(ctx)
		}
		all = append(all, r)
		wait.Go(func() {
			if err := r.Run(ctx); err != nil {
				c.Error(err)
			}
		})
	}
	synctest.Wait()
	return all, func() {
		cancel()
		wait.Wait()
	}
}

// seen is how many attempts there were, and how many at the same time.
func (c *crowd) seen() (all, most int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	return len(c.times), c.most
}

func refused() error {
	return &net.OpError{Op: "dial", Net: "tcp", Err: syscall.ECONNREFUSED}
}

// Many clusters that start together do not all connect at once, and none waits longer than its turn takes.
func TestAttemptsToConnectAreBounded(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c := newCrowd(t, 3)
		c.dial = func(context.Context) (net.Conn, error) {
			time.Sleep(300 * time.Millisecond)
			return nil, refused()
		}
		all, leave := c.join(30)
		time.Sleep(2900 * time.Millisecond)
		if n, most := c.seen(); most != 3 || n < 28 {
			t.Errorf("%d attempts, %d at the same time, want 3", n, most)
		}
		time.Sleep(30 * time.Second)
		for _, r := range all {
			if s := r.Status(); s.TroubleSince.IsZero() {
				t.Errorf("a cluster had no turn: %+v", s)
			}
		}
		leave()
		if _, most := c.seen(); most != 3 {
			t.Errorf("%d at the same time", most)
		}
	})
}

// Hosts that hang, more of them than there are places, do not keep a cluster from its turn.
func TestHostsThatHangTakeNobodysTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, mb)
		c := newCrowd(t, 2)
		c.dial = func(ctx context.Context) (net.Conn, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		_, leave := c.join(12)
		g.shared = c.shared
		g.start() // behind all of them
		if s := g.r.Status(); s.State != Connecting {
			t.Errorf("%s before its turn", s.State)
		}
		g.sleep(6*time.Second + time.Millisecond) // 12 before it, two in each second
		g.wantArchived()
		// Later on too, when those that hang come again and again.
		for range 20 {
			g.srv.Disconnect()
			g.sleep(sustained + 10*time.Second)
			g.wantArchived()
		}
		g.stop()
		leave()
	})
}

// Who waits for a turn can be stopped, and takes none.
func TestWaitForATurnEndsWithTheReceiver(t *testing.T) {
	bubble(t, func(g *rig) {
		if !g.shared.places.TryAcquire(1) {
			t.Fatal("no place")
		}
		g.start()
		g.sleep(time.Hour)
		g.want(Connecting)
		begun := time.Now()
		g.stop()
		if d := time.Since(begun); d != 0 {
			t.Errorf("stopping took %s", d)
		}
		g.shared.places.Release(1)
		g.start()
		g.wantArchived()
	})
}

// Clusters that lost their servers in one moment do not come back in one.
func TestCommonOutageIsSpread(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const n = 300
		c := newCrowd(t, n)
		c.dial = func(context.Context) (net.Conn, error) { return nil, refused() }
		_, leave := c.join(n)
		time.Sleep(time.Minute)
		leave()
		perSlice := map[time.Duration]int{} // attempts in each tenth of a second
		begun := c.times[0]
		for _, at := range c.times {
			perSlice[at.Sub(begun)/(100*time.Millisecond)]++
		}
		if perSlice[0] < n {
			t.Errorf("%d attempts at the start", perSlice[0])
		}
		delete(perSlice, 0)
		for slice, attempts := range perSlice {
			if attempts > n/3 {
				t.Errorf("%d of %d come again within the same tenth of a second, after %s", attempts, n, slice*100*time.Millisecond)
			}
		}
		if attempts := len(c.times); attempts > n*15 {
			t.Errorf("%d attempts in a minute: the pauses do not grow", attempts)
		}
	})
}
