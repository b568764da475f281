package receiver

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// silent is an OnStream that leaves a client alone until hold is closed, and then serves.
func silent(hold <-chan struct{}) func(*pgtest.Stream) {
	return func(st *pgtest.Stream) {
		select {
		case <-hold:
			st.Serve()
		case <-st.Gone():
		}
	}
}

func TestEmptyArchiveAcknowledgesNothingAtFirst(t *testing.T) {
	bubble(t, func(g *rig) {
		hold := make(chan struct{})
		g.serve(silent(hold))
		g.start()
		g.sleep(25 * time.Second)
		sent := g.updates()
		if len(sent) != 3 {
			t.Errorf("%d updates in 25 s, want 3", len(sent))
		}
		for _, u := range sent {
			if u.write != 0 || u.flush != 0 {
				t.Errorf("nothing was received, and this sent: %+v", u)
			}
		}
		close(hold)
		g.wantArchived()
	})
}

func TestFlushIsZeroUntilTheOverlapWasCompared(t *testing.T) {
	for name, again := range map[string]func(*rig){
		"restart":   (*rig).restart,
		"reconnect": func(g *rig) { g.srv.Disconnect(); g.sleep(2 * time.Second) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.appendTo(origin + mb + 300<<10) // one sealed segment, one begun
				g.start()
				g.wantArchived()
				tail := g.last().flush

				hold := make(chan struct{})
				g.serve(silent(hold))
				again(g)
				g.updates()
				g.sleep(25 * time.Second)
				for _, u := range g.updates() {
					if u.flush != 0 {
						t.Errorf("the overlap was not compared, and this sent: %+v", u)
					}
				}
				if got := g.slot().RestartLSN; got != tail {
					t.Errorf("the slot is at %s, was at %s", got, tail)
				}
				if at := g.stream().Request().LSN; at >= tail || tail-at > 2*wal.PageSize {
					t.Errorf("asked for WAL from %s, the archive ends at %s", at, tail)
				}
				close(hold)
				synctest.Wait()
				if u := g.last(); u.flush != tail {
					t.Errorf("after the overlap: %+v, want %s", u, tail)
				}
				g.append(1, 100)
				g.wantArchived()
			})
		})
	}
}

// Only the first of several differing messages is the overlap's end.
func TestFlushIsZeroInTheMiddleOfTheOverlap(t *testing.T) {
	bubble(t, func(g *rig) {
		g.appendTo(origin + 40<<10)
		g.start()
		g.wantArchived()
		more := make(chan wal.LSN)
		g.serve(func(st *pgtest.Stream) {
			pos := st.Request().LSN
			for to := range more {
				if st.Send(pos, g.wal.End(), g.wal.Bytes(pos, to)) != nil {
					return
				}
				pos = to
			}
			<-st.Gone()
		})
		g.restart()
		for _, to := range []wal.LSN{g.wal.End() - 4000, g.wal.End() - 8} {
			more <- to
			g.sleep(11 * time.Second)
			if u := g.last(); u.flush != 0 || u.write != to {
				t.Errorf("received up to %s: %+v", to, u)
			}
		}
		more <- g.wal.End()
		synctest.Wait()
		if u := g.last(); u.flush != g.wal.End() {
			t.Errorf("received everything: %+v, want %s", u, g.wal.End())
		}
		close(more)
	})
}

func TestFlushNeverPassesTheServersOwnEnd(t *testing.T) {
	bubble(t, func(g *rig) {
		end := g.wal.End()
		g.serve(func(st *pgtest.Stream) {
			_ = st.Send(origin, end, g.wal.Bytes(origin, g.wal.End())) // more than it says that it has
			<-st.Gone()
		})
		g.wal.Append(make([]byte, 1000))
		g.know(1, g.wal)
		g.start()
		if u := g.last(); u.flush != end || u.write != g.wal.End() {
			t.Errorf("%+v, the server's end is %s", u, end)
		}
	})
}

func TestFlushCountsCompleteRecordsOnly(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.wantArchived()
		complete := g.wal.End()
		g.wal.Append(make([]byte, 30000))
		for _, part := range []wal.LSN{100, 12000, 28000} {
			g.publishTo(1, complete+part)
			g.sleep(11 * time.Second)
			if u := g.last(); u.flush != complete || u.write != complete+part {
				t.Errorf("%d bytes of a record: %+v, want flush %s", part, u, complete)
			}
		}
		g.publish(1)
		g.wantArchived()
	})
}

func TestMovedFlushIsToldAtOnce(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		for range 5 {
			g.sleep(3 * time.Second)
			g.append(2, 700)
			g.wantArchived()
			if u := g.last(); !u.at.Equal(time.Now()) {
				t.Errorf("told %s late", time.Since(u.at))
			}
		}
	})
}

func TestServerThatAsksIsAnsweredAtOnceWithEverythingFlushed(t *testing.T) {
	for _, synchronous := range []bool{true, false} {
		bubble(t, func(g *rig) {
			g.cfg.Synchronous, g.cfg.FlushInterval, g.cfg.StatusInterval = synchronous, time.Hour, 0
			ask := make(chan struct{})
			g.serve(func(st *pgtest.Stream) {
				_ = st.Send(origin, g.wal.End(), g.wal.Bytes(origin, g.wal.End()))
				<-ask
				_ = st.Keepalive(g.wal.End(), true)
				<-st.Gone()
			})
			g.start()
			if u := g.last(); !synchronous && u.flush != 0 {
				t.Errorf("flushed before it was time: %+v", u)
			}
			g.updates()
			close(ask)
			synctest.Wait()
			if sent := g.updates(); len(sent) != 1 || sent[0].flush != g.wal.End() || sent[0].ask {
				t.Errorf("answers: %+v, want one with %s", sent, g.wal.End())
			}
		})
	}
}

func TestStatusInterval(t *testing.T) {
	for _, tt := range []struct {
		interval time.Duration
		want     int // in a minute after the last change
	}{{time.Second, 60}, {10 * time.Second, 6}, {0, 0}} {
		bubble(t, func(g *rig) {
			g.srv.Do(func(s *pgtest.State) { s.SenderTimeout = -1 })
			g.cfg.StatusInterval, g.cfg.ReceiveTimeout = tt.interval, time.Hour
			g.start()
			g.wantArchived()
			g.updates()
			g.sleep(time.Minute)
			sent := g.updates()
			if len(sent) != tt.want {
				t.Errorf("interval %s: %d updates in a minute, want %d", tt.interval, len(sent), tt.want)
			}
			for _, u := range sent {
				if u.flush != g.wal.End() || u.ask {
					t.Errorf("%+v", u)
				}
			}
		})
	}
}

// trickle is an OnStream that sends messages of size bytes, one per tick.
func trickle(w *pgtest.WAL, size int, tick time.Duration) func(*pgtest.Stream) {
	return func(st *pgtest.Stream) {
		for pos := st.Request().LSN; pos < w.End(); time.Sleep(tick) {
			to := min(w.End(), pos+wal.LSN(size))
			if st.Send(pos, w.End(), w.Bytes(pos, to)) != nil {
				return
			}
			pos = to
		}
		<-st.Gone()
	}
}

func TestSynchronousFlushHasABoundOnAge(t *testing.T) {
	bubble(t, func(g *rig) {
		g.appendTo(origin + 900<<10)
		g.serve(trickle(g.wal, 4<<10, time.Millisecond))
		g.busy.Store(true)
		g.start()
		g.sleep(200 * time.Millisecond)
		sent := slices.DeleteFunc(g.updates(), func(u update) bool { return u.flush == 0 })
		if len(sent) < 9 || len(sent) > 11 {
			t.Errorf("%d flushes in 200 ms of steady traffic, want one in about %s", len(sent), maxUnsyncedAge)
		}
		for i := 1; i < len(sent); i++ {
			if d := sent[i].at.Sub(sent[i-1].at); d > maxUnsyncedAge+time.Millisecond {
				t.Errorf("%s between two flushes", d)
			}
		}
		g.sleep(time.Second)
		if u := g.last(); u.flush != g.wal.End() {
			t.Errorf("in the end: %+v, want %s", u, g.wal.End())
		}
	})
}

func TestSynchronousFlushHasABoundOnSize(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		g := newRig(t, 64*mb)
		for g.wal.End() < origin+36*mb {
			g.wal.Append(make([]byte, 60000))
		}
		g.publish(1)
		g.serve(trickle(g.wal, 128<<10, time.Microsecond))
		g.busy.Store(true)
		g.start()
		g.sleep(time.Second)
		var flushed []wal.LSN
		for _, u := range g.updates() {
			if u.flush != 0 {
				flushed = append(flushed, (u.flush-origin)>>20)
			}
		}
		if want := []wal.LSN{15, 31, 36}; !slices.Equal(flushed, want) {
			t.Errorf("flushed at %d MB, want %d", flushed, want)
		}
		g.stop()
	})
}

func TestAsynchronousFlushesAtSegmentEndsAndEveryFlushInterval(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Synchronous, g.cfg.FlushInterval, g.cfg.StatusInterval = false, 7*time.Second, time.Second
		begun := time.Now()
		g.start()
		g.sleep(7*time.Second - 1)
		if u := g.last(); u.flush != 0 || u.write != g.wal.End() {
			t.Errorf("before flush_interval: %+v", u)
		}
		g.sleep(1)
		if u := g.last(); u.flush != g.wal.End() || u.at.Sub(begun) != 7*time.Second {
			t.Errorf("after flush_interval: %+v", u)
		}
		g.appendTo(origin + mb)
		g.wantArchived() // at once, for the segment is full
		g.wantFiles(g.name(1, 0))
		g.append(1, 100)
		g.sleep(5 * time.Second)
		if u := g.last(); u.flush != origin+mb {
			t.Errorf("flushed early: %+v", u)
		}
		g.sleep(2 * time.Second)
		g.wantArchived()
	})
}
