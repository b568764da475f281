package receiver

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

const backupLabel = "START WAL LOCATION: 0/4200028 (file 000000010000000000000042)\n" // in the third segment

// sealed lists the archive's complete segments, counted from its beginning.
func (g *rig) sealed() (numbers []int) {
	g.Helper()
	c, err := archive.ReadCatalogue(g.Context(), g.cfg.Dir)
	if err != nil {
		g.Fatal(err)
	}
	for _, s := range c.Sealed() {
		numbers = append(numbers, int((s.Start-origin)/mb))
	}
	return numbers
}

func (g *rig) wantSealed(first, last int) {
	g.Helper()
	n := g.sealed()
	if len(n) != last-first+1 || n[0] != first || n[len(n)-1] != last {
		g.Errorf("segments %v are there, want those from %d to %d", n, first, last)
	}
}

func TestRetentionIsKeptToHourByHour(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.KeepSize = 4 * mb // of which the one in progress takes one
		g.start()
		g.appendTo(origin + 2*mb + 5000)
		g.sleep(retentionFirst)
		g.wantSealed(0, 1)
		g.appendTo(origin + 8*mb + 5000)
		g.sleep(time.Second)
		g.wantSealed(0, 7)
		g.sleep(retentionInterval)
		g.wantSealed(5, 7)
		g.appendTo(origin + 9*mb + 5000)
		g.wantArchived() // on the same connection
		if n := g.r.Status().Reconnects; n != 0 {
			t.Errorf("%d reconnects", n)
		}
		g.restart()
		g.appendTo(origin + 10*mb + 5000)
		g.wantArchived()
		g.sleep(retentionFirst)
		g.wantSealed(7, 9)
	})
}

func TestNothingIsPrunedUnlessItIsConfigured(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Backups = "/nowhere"
		g.start()
		g.appendTo(origin + 5*mb + 5000)
		g.sleep(2 * retentionInterval)
		g.wantSealed(0, 4)
		if w := g.r.Status().Warnings; len(w) != 0 {
			t.Errorf("warnings: %+v", w)
		}
	})
}

// A changed retention counts at once. What its base backups need stays, and one that cannot be read stops it.
func TestChangedRetentionAndItsBackups(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.appendTo(origin + 6*mb + 5000)
		g.sleep(time.Second)
		backups := filepath.Join(t.TempDir(), "{cluster}")
		label := filepath.Join(filepath.Dir(backups), "blue", "sunday", "backup_label")
		a := g.cfg.Adjustable
		a.KeepSize, a.Backups = mb, backups
		g.r.Adjust(a)
		g.sleep(time.Second)
		g.wantSealed(0, 5)
		warning := func(words string) {
			t.Helper()
			w := g.r.Status().Warnings
			if words == "" && len(w) > 0 || words != "" && (len(w) != 1 || w[0].Kind != WarnRetention || !strings.Contains(w[0].Text, words)) {
				t.Errorf("warnings %+v, want one that says %q", w, words)
			}
		}
		warning("no such file")
		if err := errors.Join(os.MkdirAll(filepath.Dir(label), 0o700), os.WriteFile(label, []byte("half a label"), 0o600)); err != nil {
			t.Fatal(err)
		}
		g.sleep(retentionInterval)
		g.wantSealed(0, 5)
		warning("sunday/backup_label")
		if err := os.WriteFile(label, []byte(backupLabel), 0o600); err != nil {
			t.Fatal(err)
		}
		g.sleep(retentionInterval)
		g.wantSealed(2, 5)
		warning("")
		if n := g.logs.count("retention is not kept"); n != 2 {
			t.Errorf("it was logged %d times, want once for each reason", n)
		}
		g.wantArchived()
	})
}

// By hand it works in any state but the last; a receiver that is halted has let go of the archive.
func TestPruneByHand(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.appendTo(origin + 6*mb + 5000)
		g.sleep(time.Second)
		prune := func(n int) ([]string, error) { return g.r.Prune(g.Context(), origin+wal.LSN(n)*mb+4000) }
		if removed, err := prune(2); len(removed) != 2 || err != nil {
			t.Errorf("while it streams: %q, %v", removed, err)
		}
		g.wantSealed(2, 5)
		foreign := filepath.Join(g.cfg.Dir, g.name(1, 7))
		if err := os.WriteFile(foreign, []byte("not ours"), 0o600); err != nil {
			t.Fatal(err)
		}
		g.appendTo(origin + 7*mb + 5000)
		g.sleep(time.Second)
		g.want(Halted)
		if err := os.Remove(foreign); err != nil {
			t.Fatal(err)
		}
		if removed, err := prune(4); len(removed) != 2 || err != nil {
			t.Errorf("while it is halted: %q, %v", removed, err)
		}
		g.sleep(haltedRetry)
		g.wantArchived()
		g.wantSealed(4, 6)
		g.stop()
		if removed, err := prune(5); len(removed) != 0 || err == nil || !strings.Contains(err.Error(), "was stopped meanwhile") {
			t.Errorf("after the end: %q, %v", removed, err)
		}
		g.wantSealed(4, 6)
	})
}

// A receiver that needs its archive does not wait for a prune, whichever comes first.
func TestCustodyIsTakenFromAPrune(t *testing.T) {
	c := custody{held: make(chan struct{}, 1)}
	ctx, release, err := c.borrow(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	taken := make(chan func())
	go func() { taken <- c.take() }()
	<-ctx.Done() // else the test hangs
	if t.Context().Err() != nil {
		t.Fatal("whoever asked for the prune is not done")
	}
	release()
	give := <-taken
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if _, _, err := c.borrow(cancelled); !errors.Is(err, context.Canceled) {
		t.Errorf("borrowed while it is taken: %v", err)
	}
	give()
	c.mu.Lock()
	c.wanted = true // take has said so, and waits
	c.mu.Unlock()
	if ctx, release, err = c.borrow(t.Context()); err != nil || ctx.Err() == nil {
		t.Errorf("a prune that begins while it is wanted goes on: %v", err)
	}
	release()
}

// A prune that is under way goes by what is kept no more: other limits end it, other settings do not.
func TestChangedRetentionEndsAPrune(t *testing.T) {
	r := New(Config{Name: "blue"}, slog.New(slog.DiscardHandler), nil)
	ctx, release, err := r.custody.borrow(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer release()
	a := *r.settings()
	a.StatusInterval = time.Minute
	r.Adjust(a)
	if ctx.Err() != nil {
		t.Error("a change of status_interval ends it")
	}
	a.KeepSize = 1
	r.Adjust(a)
	if ctx.Err() == nil {
		t.Error("it goes on by the limits of before")
	}
}

// Base backups on a disk that does not answer do not hold up a receiver that is to stop.
func TestRetentionStopsWhereBackupsHang(t *testing.T) {
	label := filepath.Join(t.TempDir(), "backup_label")
	if err := syscall.Mkfifo(label, 0o600); err != nil {
		t.Fatal(err)
	}
	r := New(Config{Name: "blue", Dir: t.TempDir(), Adjustable: Adjustable{Retention: Retention{KeepSize: mb, Backups: filepath.Dir(label)}}},
		slog.New(slog.DiscardHandler), NewShared(1, 1))
	stop := r.startRetention(t.Context())
	r.retain <- struct{}{}
	time.Sleep(100 * time.Millisecond) // to where it hangs
	stopped := make(chan struct{})
	go func() {
		stop()
		close(stopped)
	}()
	select {
	case <-stopped:
	case <-time.After(5 * time.Second):
		t.Error("it waits for the base backups")
	}
	if f, err := os.OpenFile(label, os.O_RDWR, 0); err == nil { // lets go of who hangs
		f.Close()
	}
}
