package receiver

import (
	"bytes"
	"context"
	"maps"
	"net"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// hosts makes the receiver meet these servers under their names; others are down.
func (g *rig) hosts(servers map[string]*pgtest.Server) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
		host, _, _ := net.SplitHostPort(address)
		if host == "hangs" {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		if servers[host] == nil {
			return nil, syscall.ECONNREFUSED
		}
		return servers[host].Dial(ctx, network, address)
	}
}

func (g *rig) wantHost(name string) {
	g.Helper()
	if h := g.r.Status().Host; h != name {
		g.Errorf("host %s, want %s", h, name)
	}
}

func TestPrimaryIsFoundAmongSeveralHosts(t *testing.T) {
	bubble(t, func(g *rig) {
		standby := pgtest.NewServer(g, pgtest.State{SystemID: systemID, Standby: true})
		standby.Publish(g.wal)
		other := pgtest.NewServer(g, pgtest.State{SystemID: 4711})
		g.cfg.Conninfo = "host=down,standby,other,primary port=5432,5433,5434,5435 user=archiver sslmode=disable"
		g.hosts(map[string]*pgtest.Server{"standby": standby, "primary": g.srv})
		g.start()
		g.append(1, 100)
		g.wantArchived()
		g.hosts(map[string]*pgtest.Server{"standby": standby, "other": other, "primary": g.srv})
		g.restart() // the directory belongs to a cluster now
		g.wantArchived()
		g.wantHost("primary:5435")
		g.stop()
		g.hosts(map[string]*pgtest.Server{"standby": standby, "other": other})
		g.start()
		g.want(Backoff, "connection refused", "standby:5433: the server is a standby", "system identifier 7000000000000000042, the server has 4711")
		other.Do(func(s *pgtest.State) {
			if len(s.Slots) > 0 {
				t.Error("a slot was created on another cluster")
			}
		})
	})
}

func TestHostThatHangsDoesNotHoldUpTheOthers(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Conninfo = "host=hangs,primary user=archiver sslmode=disable"
		g.hosts(map[string]*pgtest.Server{"primary": g.srv})
		g.start()
		g.sleep(hostGrace)
		g.wantArchived()
	})
}

// newPrimary is a second server, promoted at the end of g's WAL as it is now.
func (g *rig) newPrimary(tli wal.Timeline, at wal.LSN) *pgtest.Server {
	w := g.wal.Fork(at, tli)
	w.Append([]byte("of the new primary"))
	w.Append(make([]byte, 3000))
	s := pgtest.NewServer(g, pgtest.State{SystemID: systemID})
	s.Publish(g.wal)
	s.Do(func(s *pgtest.State) { s.Promote(w, at) })
	g.know(tli, w)
	return s
}

// A PolarDB primary that was replaced on the same timeline, and still runs, is noticed by its WAL alone. It is passed
// over while the other one can be archived, listed first or not.
func TestStrayPrimaryOnTheSameTimelineIsPassedOver(t *testing.T) {
	for _, conninfo := range []string{"host=stray,right", "host=right,stray"} {
		bubble(t, func(g *rig) {
			g.cfg.Conninfo = conninfo + " user=archiver sslmode=disable"
			g.hosts(map[string]*pgtest.Server{"right": g.srv})
			g.start()
			g.append(5, 500)
			g.wantArchived()
			stray, _ := g.strayFrom(4)
			g.hosts(map[string]*pgtest.Server{"right": g.srv, "stray": stray})
			for range 3 {
				g.srv.Disconnect()
				g.append(3, 700)
				g.sleep(5 * time.Second)
				g.wantArchived()
				g.wantHost("right:5432")
			}
			stray.Do(func(s *pgtest.State) {
				if at := s.Slots["walfleet"].RestartLSN; at != origin {
					t.Errorf("the stray host's slot moved to %s", at)
				}
			})

			// Alone, it is a person's decision; when the right one is back, none is needed.
			g.hosts(map[string]*pgtest.Server{"stray": stray})
			before := g.files()
			g.srv.Disconnect()
			g.sleep(5 * time.Minute)
			g.want(Halted, "differs from the archive")
			if !maps.Equal(before, g.files()) {
				t.Error("the archive changed")
			}
			g.hosts(map[string]*pgtest.Server{"right": g.srv, "stray": stray})
			g.append(3, 700)
			g.sleep(2 * time.Minute)
			g.wantArchived()
		})
	}
}

// A PolarDB primary that was replaced and has nothing to send any more does not keep the archive from going on.
func TestPrimaryThatStoppedWritingIsLeft(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Conninfo = "host=old,new user=archiver sslmode=disable"
		old := pgtest.NewServer(g, pgtest.State{SystemID: systemID, Slots: map[string]*pgtest.Slot{"walfleet": {RestartLSN: origin}}})
		old.Publish(g.wal)
		g.hosts(map[string]*pgtest.Server{"old": old})
		g.start()
		g.want(Streaming)
		g.wantHost("old:5432")
		g.hosts(map[string]*pgtest.Server{"old": old, "new": g.srv})
		g.sleep(2 * hostInterval)
		g.wantHost("old:5432") // the new one is not farther
		g.append(3, 700)
		g.sleep(2*hostInterval + 5*time.Second)
		g.wantArchived()
		g.wantHost("new:5432")
		for range 3 {
			g.srv.Disconnect()
			g.sleep(5 * time.Second)
			g.wantArchived()
			g.wantHost("new:5432")
		}
	})
}

// One server can have several names in a conninfo, and be farther in each moment in which it is asked under another
// one. It is not left for itself.
func TestServerWithTwoNamesIsNotLeftForItself(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Conninfo = "host=name,alias user=archiver sslmode=disable"
		g.hosts(map[string]*pgtest.Server{"name": g.srv, "alias": g.srv})
		pause := make(chan time.Duration)
		g.serve(func(st *pgtest.Stream) { // what the server has comes late
			for pos := st.Request().LSN; ; {
				select {
				case d := <-pause:
					time.Sleep(d)
				case <-st.Gone():
					return
				}
				if st.Send(pos, g.wal.End(), g.wal.Bytes(pos, g.wal.End())) != nil {
					return
				}
				pos = g.wal.End()
			}
		})
		g.start()
		pause <- 0
		g.sleep(time.Second)
		for range 10 {
			g.append(3, 700)
			pause <- hostInterval + 10*time.Second
			g.sleep(hostInterval + 15*time.Second)
		}
		g.wantArchived()
		if s := g.r.Status(); s.Reconnects != 0 {
			t.Errorf("%d reconnects\n%s", s.Reconnects, g.logs.last(8))
		}
	})
}

func TestOldPrimaryIsPassedOver(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Conninfo = "host=old,new user=archiver sslmode=disable"
		g.hosts(map[string]*pgtest.Server{"old": g.srv})
		g.start()
		g.wantArchived()
		g.stop()
		fork := g.wal.End()
		fresh := g.newPrimary(2, fork)
		g.append(5, 1000) // the old one goes on by itself
		g.hosts(map[string]*pgtest.Server{"old": g.srv, "new": fresh})
		g.start()
		g.want(Streaming)
		g.wantHost("new:5432")
		if tli := g.r.Status().Timeline; tli != 2 {
			t.Errorf("timeline %d", tli)
		}
	})
}

func TestNewTimelineThatDoesNotContainTheArchiveIsPassedOver(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Conninfo = "host=stray,ours user=archiver sslmode=disable"
		g.hosts(map[string]*pgtest.Server{"ours": g.srv})
		fork := g.wal.End()
		stray := g.newPrimary(3, fork) // of timeline 1
		g.promote(2, fork, 3)
		g.start()
		g.wantArchived()
		g.hosts(map[string]*pgtest.Server{"stray": stray, "ours": g.srv})
		g.restart()
		g.wantArchived()
		g.sleep(3 * hostInterval)
		g.wantArchived()
		g.wantHost("ours:5432")
		if n := g.r.Status().Reconnects; n != 0 {
			t.Errorf("%d reconnects", n)
		}
	})
}

func TestOldPrimaryIsLeftWhenANewOneAppears(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Conninfo = "host=old,new user=archiver sslmode=disable"
		g.hosts(map[string]*pgtest.Server{"old": g.srv})
		g.start()
		g.append(1, 1000)
		g.wantArchived()
		fork := g.wal.End()
		fresh := g.newPrimary(2, fork)
		g.append(5, 1000) // on the old one, which nobody has fenced
		g.wantArchived()
		g.mu.Lock()
		g.goesBack = true // what the old one still wrote is worth nothing
		g.mu.Unlock()
		old := g.stream()
		g.hosts(map[string]*pgtest.Server{"old": g.srv, "new": fresh})
		g.sleep(hostInterval + 5*time.Second)
		g.want(Streaming)
		g.wantHost("new:5432")
		if !old.Ended().Gone {
			t.Error("the old primary still has a stream")
		}
		fresh.Do(func(s *pgtest.State) {
			if s.Last.Flush != s.WALEnd {
				t.Errorf("the new primary was told %s, its WAL ends at %s", s.Last.Flush, s.WALEnd)
			}
		})
	})
}

// A panic in the goroutine that asks a host is that cluster's trouble, not the daemon's end.
func TestPanicWhileAskingAHostIsOneClustersTrouble(t *testing.T) {
	bubble(t, func(g *rig) {
		dial := g.dial
		g.dial = func(context.Context, string, string) (net.Conn, error) { panic("in a host's goroutine") }
		g.start()
		g.want(Backoff, "panic")
		g.stop()
		g.dial = dial
		g.start()
		g.wantArchived()
	})
}

// strayFrom is a second primary whose WAL is g's up to its n-th record, and then another's.
func (g *rig) strayFrom(n int) (*pgtest.Server, *pgtest.WAL) {
	ends := g.wal.Boundaries()
	w := newWAL(g.size)
	for w.End() < ends[n-1] {
		w.FillTo(ends[len(w.Boundaries())])
	}
	w.Append(bytes.Repeat([]byte("stray"), 20000))
	s := pgtest.NewServer(g, pgtest.State{SystemID: systemID, Slots: map[string]*pgtest.Slot{"walfleet": {RestartLSN: origin}}})
	s.Publish(w)
	return s, w
}

// A host whose WAL was not the archive's once, and that was made anew from the right one, is the primary when it has
// been promoted: the old one is left, as always.
func TestHostThatWasStrayOnAnOlderTimelineIsTakenWhenItIsPromoted(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Conninfo = "host=b,a user=archiver sslmode=disable"
		g.hosts(map[string]*pgtest.Server{"a": g.srv})
		g.start()
		g.append(5, 500)
		g.wantArchived()
		stray, _ := g.strayFrom(4)
		g.hosts(map[string]*pgtest.Server{"a": g.srv, "b": stray})
		g.srv.Disconnect()
		g.append(3, 700)
		g.sleep(5 * time.Second)
		g.wantArchived()
		g.wantHost("a:5432") // b is known to be stray

		fork := g.wal.End()
		fresh := g.newPrimary(2, fork) // b, made anew from a and promoted
		g.mu.Lock()
		g.goesBack = true
		g.mu.Unlock()
		g.append(3, 700) // nobody has fenced a
		g.hosts(map[string]*pgtest.Server{"a": g.srv, "b": fresh})
		g.sleep(10 * hostInterval)
		g.wantHost("b:5432")
		if tli := g.r.Status().Timeline; tli != 2 {
			t.Errorf("timeline %d after %d connections; the primary is on 2", tli, g.logs.count("msg=connected"))
		}
	})
}

// A standby that is behind is no way around a primary that diverged: the cluster halts, and stays so.
func TestStandbyDoesNotHideAPrimaryThatDiverged(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Conninfo, g.cfg.Source = "host=primary,standby user=archiver sslmode=disable", SourceAny
		g.hosts(map[string]*pgtest.Server{"primary": g.srv})
		g.append(5, 500)
		g.start()
		g.wantArchived()
		fresh := newWAL(g.size) // the new primary lacks the archive's end, and so does its standby
		for fresh.End() < g.wal.Boundaries()[3] {
			fresh.FillTo(g.wal.Boundaries()[len(fresh.Boundaries())])
		}
		servers := map[string]*pgtest.Server{}
		for _, host := range []string{"primary", "standby"} {
			servers[host] = pgtest.NewServer(g, pgtest.State{SystemID: systemID, Standby: host == "standby"})
			servers[host].Publish(fresh)
		}
		g.hosts(servers)
		g.srv.Disconnect()
		halted, states := 0, map[State]int{}
		for range 300 {
			g.sleep(time.Second)
			s := g.r.Status().State
			states[s]++
			if s == Halted {
				halted++
			}
		}
		if halted < 200 {
			t.Errorf("in 300 s the primary's divergence was shown for %d: %v\n%s", halted, states, g.logs.last(3))
		}
	})
}

// The same for two primaries that both diverged, and it is told once.
func TestTwoHostsThatDivergedHaltOnce(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Conninfo = "host=a,b user=archiver sslmode=disable"
		g.hosts(map[string]*pgtest.Server{"a": g.srv})
		g.append(5, 500)
		g.start()
		g.wantArchived()
		a, _ := g.strayFrom(4)
		b, _ := g.strayFrom(4)
		g.hosts(map[string]*pgtest.Server{"a": a, "b": b})
		g.srv.Disconnect()
		states := map[State]int{}
		for range 300 {
			g.sleep(time.Second)
			states[g.r.Status().State]++
		}
		if n := g.logs.count("level=ERROR"); n != 1 {
			t.Errorf("told %d times in 5 minutes; states %v", n, states)
		}
	})
}

// Leaving a host is no stop: the writer goes on with the next one, also inside a record that crosses a segment's end.
func TestHostIsLeftInsideARecordThatCrossesASegmentsEnd(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Conninfo = "host=old,new user=archiver sslmode=disable"
		g.appendTo(origin + mb - 3000)
		_, end := g.wal.Append(bytes.Repeat([]byte{7}, 50_000))
		g.publishTo(1, end-8)
		old := pgtest.NewServer(g, pgtest.State{SystemID: systemID, Slots: map[string]*pgtest.Slot{"walfleet": {RestartLSN: origin}}})
		old.Do(func(s *pgtest.State) {
			s.Publish(g.wal)
			s.WALEnd = end - 8
		})
		g.hosts(map[string]*pgtest.Server{"old": old})
		g.start()
		g.sleep(time.Second)
		g.wantHost("old:5432")
		writer := g.r.writer
		g.publish(1)
		g.append(3, 700)
		g.hosts(map[string]*pgtest.Server{"old": old, "new": g.srv})
		g.sleep(2*hostInterval + 5*time.Second)
		g.wantArchived()
		g.wantHost("new:5432")
		if strings.Contains(g.logs.String(), "internal error") || g.r.writer != writer {
			t.Errorf("the archive was opened again:\n%s", g.logs.last(12))
		}
	})
}
