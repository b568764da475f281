package receiver

import (
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
)

// adjust changes settings of the running receiver, and lets everything come to rest.
func (g *rig) adjust(f func(*Adjustable)) {
	a := *g.r.settings()
	f(&a)
	g.r.Adjust(a)
	g.sleep(0)
}

// wantOneStream expects the connection to be the first one.
func (g *rig) wantOneStream() {
	g.Helper()
	if n := len(g.srv.Streams()); n != 1 || g.stream().Ended().Gone {
		g.Errorf("%d streams, the last one gone: %v", n, g.stream().Ended().Gone)
	}
}

// A receiver that waits for a message goes by new settings at once, and keeps its connection.
func TestAdjustedIntervalsCountAtOnce(t *testing.T) {
	bubble(t, func(g *rig) {
		g.srv.Do(func(s *pgtest.State) { s.SenderTimeout = -1 })
		g.cfg.StatusInterval, g.cfg.ReceiveTimeout = 0, 24*time.Hour
		g.start()
		g.wantArchived()
		g.sleep(time.Hour)
		g.updates()
		for range 3 { // each time it waits with another deadline
			g.adjust(func(a *Adjustable) { a.StatusInterval = time.Second })
			g.sleep(10*time.Second - time.Millisecond)
			if n := len(g.updates()); n < 10 || n > 11 {
				t.Errorf("%d updates in 10 seconds", n)
			}
			g.adjust(func(a *Adjustable) { a.StatusInterval = 0 })
			g.sleep(time.Minute)
			if n := len(g.updates()); n > 0 {
				t.Errorf("%d updates without an interval", n)
			}
		}
		g.wantOneStream()
		g.append(3, 1000)
		g.wantArchived()

		// A shorter receive_timeout begins anew: the server was silent for longer, and is asked first.
		g.sleep(time.Hour)
		g.updates()
		g.adjust(func(a *Adjustable) { a.ReceiveTimeout = 20 * time.Second })
		g.sleep(9 * time.Second)
		if n := len(g.updates()); n > 0 {
			t.Errorf("%d updates", n)
		}
		g.sleep(2 * time.Second)
		if sent := g.updates(); len(sent) != 1 || !sent[0].ask {
			t.Errorf("not asked after half of receive_timeout: %+v", sent)
		}
		g.wantOneStream()
	})
}

// What comes in late is synced by a new flush_interval.
func TestAdjustedFlushInterval(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Synchronous, g.cfg.FlushInterval = false, 24*time.Hour
		g.start()
		g.append(3, 1000)
		g.sleep(time.Minute)
		if s := g.r.Status(); s.Flushed == g.wal.End() || s.Written != g.wal.End() || s.Synced >= s.Written {
			t.Errorf("synced already: %+v", s)
		}
		g.adjust(func(a *Adjustable) { a.FlushInterval = time.Second })
		g.sleep(time.Second)
		g.wantArchived()
		if s := g.r.Status(); s.Synced != s.Written {
			t.Errorf("%+v", s)
		}
		g.wantOneStream()
	})
}

func TestAdjustedMinFree(t *testing.T) {
	bubble(t, func(g *rig) {
		g.room.Store(100 * mb)
		g.start()
		g.wantArchived()
		g.adjust(func(a *Adjustable) { a.MinFree = 200 * mb })
		g.want(Blocked, "less than min_free = 200 MB")
		g.append(3, 1000)
		g.adjust(func(a *Adjustable) { a.MinFree = 50 * mb })
		g.sleep(2 * time.Second)
		g.wantArchived()
		if s := g.r.Status(); s.DiskFree != 100*mb {
			t.Errorf("free: %d", s.DiskFree)
		}
		g.wantOneStream()
	})
}

// A cluster that is halted by a gap is looked at again when on_gap changes, not up to half a minute later.
func TestAdjustedOnGapEndsAHalt(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.wantArchived()
		g.srv.Disconnect()
		g.appendTo(origin + 3*mb + 5000)
		g.srv.Do(func(s *pgtest.State) {
			s.Oldest = origin + 2*mb
			s.Slots[g.cfg.Slot].RestartLSN = origin + 2*mb + 700
		})
		g.sleep(time.Second)
		for g.r.Status().State != Halted {
			g.sleep(time.Second)
		}
		g.mu.Lock()
		g.missing = origin + 2*mb
		g.mu.Unlock()
		g.adjust(func(a *Adjustable) { a.OnGap = GapRecord })
		g.sleep(time.Second)
		g.wantArchived()
		if s := g.r.Status(); s.Gaps != 1 || s.LastError == "" || s.LastErrorAt.IsZero() {
			t.Errorf("%+v", s)
		}
	})
}

// LookAgain ends the pause of a halted cluster, and none else.
func TestLookAgain(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.wantArchived()
		g.r.LookAgain() // no token stays for later
		g.srv.Disconnect()
		system := uint64(0)
		g.srv.Do(func(s *pgtest.State) { system, s.SystemID = s.SystemID, s.SystemID+1 })
		for g.r.Status().State != Halted {
			g.sleep(time.Second)
		}
		g.sleep(time.Second)
		g.want(Halted)
		g.srv.Do(func(s *pgtest.State) { s.SystemID = system })
		g.sleep(time.Second)
		g.want(Halted)
		g.r.LookAgain()
		g.wantArchived()
	})
}

// Adjust may come at any moment of a session; none of them loses the change or the stream. Run it with -race.
func TestAdjustAtAnyTime(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		var wait sync.WaitGroup
		for i := range 4 {
			wait.Go(func() {
				for j := range 500 {
					a := g.cfg.Adjustable
					a.StatusInterval = time.Duration(1+(i+j)%3) * time.Second
					g.r.Adjust(a)
					if j%7 == 0 {
						time.Sleep(time.Millisecond)
					}
				}
			})
		}
		for range 50 {
			g.append(3, 1000)
			time.Sleep(time.Millisecond)
		}
		wait.Wait()
		g.adjust(func(a *Adjustable) { a.StatusInterval = 10 * time.Second })
		g.sleep(time.Second)
		g.wantArchived()
		g.wantOneStream()
		g.updates()
		g.sleep(100 * time.Second)
		if n := len(g.updates()); n < 9 || n > 14 {
			t.Errorf("%d updates in 100 seconds, with an interval of 10", n)
		}
	})
}

// What a status shows of the way that a cluster goes.
func TestStatusShowsRateAndAge(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.wantArchived()
		s := g.r.Status()
		if d, known := s.Behind(time.Now()); d != 0 || !known {
			t.Errorf("streams, and is %s behind (%v)", d, known)
		}
		for range 30 { // 10 kB a second
			g.append(1, 10000)
			g.sleep(time.Second)
		}
		if s = g.r.Status(); s.Rate < 9000 || s.Rate > 12000 {
			t.Errorf("%f bytes a second, want about 10000", s.Rate)
		}
		g.sleep(30 * time.Second)
		if s = g.r.Status(); s.Rate != 0 || s.ReceivedAgain != 0 {
			t.Errorf("idle: %f bytes a second, %d received again", s.Rate, s.ReceivedAgain)
		}

		// The server goes away: from the last time it was heard on, WAL may be missing.
		g.append(1, 1000)
		g.sleep(0)
		last := g.r.Status().LastData
		g.cut()
		g.sleep(10 * time.Minute)
		s = g.r.Status()
		if d, known := s.Behind(time.Now()); !known || d != time.Since(last) {
			t.Errorf("%s behind (%v), heard last %s ago", d, known, time.Since(last))
		}
		if s.Rate != 0 || !strings.Contains(s.LastError, "no route to host") || time.Since(s.LastErrorAt) > time.Minute {
			t.Errorf("%+v", s)
		}
		g.mend()
		g.wantArchived()
		if s = g.r.Status(); s.ReceivedAgain == 0 || s.ReceivedAgain > 16<<10 || s.Reconnects != 1 {
			t.Errorf("%d bytes received again, %d reconnects", s.ReceivedAgain, s.Reconnects)
		}
	})
}

// A receiver that its disk holds up cannot say so. It is not to be taken for one that streams and has everything.
func TestStatusOfAReceiverWhoseDiskHangs(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.wantArchived()
		g.sleep(10 * time.Minute) // an idle server is heard now and then
		s := g.r.Status()
		if d, known := s.Behind(time.Now()); d != 0 || !known || !s.TroubleSince.IsZero() || s.Reason != "" {
			t.Errorf("idle: %s behind (%v), trouble since %s: %s", d, known, s.TroubleSince, s.Reason)
		}

		goOn := make(chan struct{})
		g.hang.Store(&goOn)
		g.sleep(time.Minute)
		g.append(1, 1000)
		g.sleep(time.Hour)
		s = g.r.Status()
		if d, known := s.Behind(time.Now()); !known || d < time.Hour || time.Since(s.TroubleSince) < time.Hour || !strings.Contains(s.Reason, "does not answer") {
			t.Errorf("%s, %s behind (%v), trouble since %s: %s", s.State, d, known, s.TroubleSince, s.Reason)
		}
		g.hang.Store(nil)
		close(goOn)
		g.sleep(time.Minute)
		g.wantArchived()
		if s = g.r.Status(); !s.TroubleSince.IsZero() || s.Reason != "" {
			t.Errorf("%+v", s)
		}
	})
}

// While WAL keeps coming the archive never has quite all of it; that does not make it older and older.
func TestAgeWhileWALKeepsComing(t *testing.T) {
	bubble(t, func(g *rig) {
		g.appendTo(origin + 5*mb)
		g.publishTo(1, origin+16000)      // what the server says of itself at first
		g.serve(func(st *pgtest.Stream) { // always more to come than was sent
			for pos := st.Request().LSN; pos+20000 < g.wal.End(); pos += 10000 {
				if st.Send(pos, pos+15000, g.wal.Bytes(pos, pos+10000)) != nil {
					return
				}
				time.Sleep(time.Second)
			}
		})
		g.start()
		g.sleep(5 * time.Minute)
		s := g.r.Status()
		if d, known := s.Behind(time.Now()); !known || d > 8*time.Second || s.Lag() == 0 {
			t.Errorf("%s behind (%v), lag %d", d, known, s.Lag())
		}
		g.serve(nil)
	})
}

// The backlog is what waits: all that is plain, without what is done.
func TestStatusShowsTheCompressionsBacklog(t *testing.T) {
	bubble(t, func(g *rig) {
		g.plainArchive(3)
		g.make()
		goOn := make(chan struct{})
		g.r.free = func() (int64, error) { <-goOn; return 1 << 40, nil }
		g.run(g.r.Run)
		g.sleep(time.Second)
		if s := g.r.Status(); s.CompressBacklog != 3 || s.SegmentsCompressed != 0 {
			t.Errorf("backlog %d, compressed %d", s.CompressBacklog, s.SegmentsCompressed)
		}
		close(goOn)
		g.sleep(time.Minute)
		if s := g.r.Status(); s.CompressBacklog != 0 || s.SegmentsCompressed != 3 {
			t.Errorf("backlog %d, compressed %d", s.CompressBacklog, s.SegmentsCompressed)
		}
	})
}
