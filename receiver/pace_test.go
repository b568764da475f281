package receiver

import (
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// The rate is kept from the start of catching up on, and while streaming; with one that is smaller than a message too.
func TestMaxRateIsKept(t *testing.T) {
	for name, tt := range map[string]struct {
		rate   int64
		window time.Duration
	}{
		"1 MB/s":              {mb, 10 * time.Second},
		"700 kB/s":            {700 << 10, 10 * time.Second},
		"less than a message": {32 << 10, 200 * time.Second},
	} {
		for _, streaming := range []bool{false, true} {
			t.Run(name, func(t *testing.T) {
				bubble(t, func(g *rig) {
					g.cfg.MaxRate = tt.rate
					enough := origin + wal.LSN(2*tt.rate*int64(tt.window/time.Second))
					if streaming {
						g.start()
						g.wantArchived()
						g.sleep(time.Minute)
					}
					before := g.r
					g.appendTo((enough + mb) &^ 7)
					if !streaming {
						g.start()
					} else if g.r != before {
						t.Fatal("another receiver")
					}
					g.busy.Store(true)
					g.sleep(time.Second)
					from := g.r.Status().ReceivedBytes
					g.sleep(tt.window)
					got := g.r.Status().ReceivedBytes - from
					want := tt.rate * int64(tt.window/time.Second)
					if got < want*95/100 || got > want*105/100 {
						t.Errorf("%d bytes in %s, want %d", got, tt.window, want)
					}
					if s := g.r.Status(); s.Reconnects != 0 || time.Since(s.HeldBack) > time.Second {
						t.Errorf("%+v", s)
					}
					g.busy.Store(false)
				})
			})
		}
	}
}

// However long the limit keeps from reading, the server hears from us, and learns of everything that was flushed; its
// silence is not told from ours.
func TestMaxRateStarvesNothing(t *testing.T) {
	for name, interval := range map[string]time.Duration{"status_interval": 300 * time.Millisecond, "without": 0} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.srv.Do(func(s *pgtest.State) { s.SenderTimeout = 3 * time.Second })
				// A message of 128 KB takes 13 s.
				g.cfg.MaxRate, g.cfg.StatusInterval, g.cfg.ReceiveTimeout = 10<<10, interval, 6*time.Second
				g.appendTo(origin + 3*mb)
				g.busy.Store(true)
				g.start()
				g.sleep(time.Second)
				g.updates()
				last := wal.LSN(0)
				for range 20 {
					g.sleep(10 * time.Second)
					s := g.r.Status()
					if s.State != CatchingUp || s.Reconnects != 0 {
						t.Fatalf("%s (%s), %d reconnects\n%s", s.State, s.Reason, s.Reconnects, g.logs.last(8))
					}
					if s.Written-s.Flushed > 16<<10 {
						t.Errorf("written %s, flushed %s", s.Written, s.Flushed)
					}
					if u := g.last(); u.flush != s.Flushed {
						t.Errorf("%+v, flushed %s", u, s.Flushed)
					}
					last = s.Flushed
				}
				if last < origin+mb {
					t.Errorf("only %s was flushed", last)
				}
				sent := g.updates()
				longest := max(interval, 0)
				if interval == 0 {
					longest = heldInterval
				}
				for i := 1; i < len(sent); i++ {
					if d := sent[i].at.Sub(sent[i-1].at); d > longest {
						t.Errorf("%s between two status updates", d)
					}
				}
				if many := int(200 * time.Second / longest); len(sent) > many+100 {
					t.Errorf("%d status updates in 200 s", len(sent))
				}
				begun := time.Now()
				g.stop()
				if d := time.Since(begun); d > 50*time.Millisecond {
					t.Errorf("stopping took %s", d)
				}
			})
		})
	}
}

// A server that asks for a reply gets one as soon as its question is read.
func TestMaxRateAnswersWhoAsks(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.MaxRate = 10 << 10
		g.appendTo(origin + 200<<10)
		asked := make(chan time.Time, 1)
		g.serve(func(st *pgtest.Stream) {
			end := g.wal.End()
			if st.Send(origin, end, g.wal.Bytes(origin, origin+100<<10)) != nil || st.Keepalive(end, true) != nil {
				return
			}
			asked <- time.Now() // net.Pipe: it was read
			<-st.Gone()
		})
		g.start()
		g.sleep(time.Minute)
		at := <-asked
		for _, u := range g.updates() {
			if u.at.Equal(at) && u.write == origin+100<<10 {
				return
			}
		}
		t.Errorf("no answer at %s", at)
	})
}

// A server that has nothing more to say after a long time without reading is asked first.
func TestSilenceBeginsWhenReadingDoes(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.MaxRate, g.cfg.ReceiveTimeout = 10<<10, 6*time.Second
		g.appendTo(origin + 128<<10) // one message, 13 s
		g.start()
		g.sleep(time.Minute)
		if s := g.r.Status(); s.Reconnects != 0 || s.State != Streaming {
			t.Errorf("%s (%s), %d reconnects\n%s", s.State, s.Reason, s.Reconnects, g.logs.last(8))
		}
	})
}

// A server with two names is not taken for a replaced one because we read it slowly.
func TestServerThatIsReadSlowlyIsNotLeft(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Conninfo = "host=name,alias user=archiver sslmode=disable"
		g.hosts(map[string]*pgtest.Server{"name": g.srv, "alias": g.srv})
		g.cfg.MaxRate = 1 << 10 // two minutes for a message
		g.appendTo(origin + 400<<10)
		g.start()
		for range 20 {
			g.append(1, 5000)
			g.sleep(20 * time.Second)
		}
		if s := g.r.Status(); s.Reconnects != 0 {
			t.Errorf("%s (%s), %d reconnects\n%s", s.State, s.Reason, s.Reconnects, g.logs.last(8))
		}
	})
}

// Another rate holds from its first moment on, whatever was read at the old one.
func TestPacerFollowsAChangedRate(t *testing.T) {
	now := time.Unix(0, 0)
	var p pacer
	if d := p.wait(now, 1000); d != 0 {
		t.Errorf("%s before anything was read", d)
	}
	p.took(100100) // 100 of them are credit
	if d := p.wait(now, 1000); d != 100*time.Second {
		t.Errorf("%s at 1000 bytes a second", d)
	}
	if d := p.wait(now, 10000); d != 10*time.Second {
		t.Errorf("%s at 10000 bytes a second", d)
	}
	if d := p.wait(now, 0); d != 0 {
		t.Errorf("%s without a limit", d)
	}
	if d := p.wait(now.Add(time.Hour), 1000); d != 0 {
		t.Errorf("%s after an hour without a limit", d)
	}
	p.took(1100)
	if d := p.wait(now.Add(time.Hour), 1000); d != time.Second {
		t.Errorf("%s: more credit than for %s", d, paceCredit)
	}
}
