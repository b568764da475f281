package receiver

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
)

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

// A gap in front of an archive that has no segment yet can be accepted.
func TestGapBeforeTheFirstSegmentIsAccepted(t *testing.T) {
	bubble(t, func(g *rig) {
		g.appendTo(origin + 3*mb + 5000)
		// The WAL is removed between the look at the slot and the start of streaming, or while the disk is full.
		g.srv.Do(func(s *pgtest.State) { s.Oldest = origin + 2*mb })
		g.start()
		g.sleep(time.Second)
		g.want(Halted, "no longer has")
		g.srv.Do(func(s *pgtest.State) { s.Slots[g.cfg.Slot].RestartLSN = origin + 2*mb + 700 })
		g.mu.Lock()
		g.missing = origin + 2*mb
		g.mu.Unlock()
		g.decide(AcceptGap, false, "gap recorded")
		g.sleep(time.Second)
		g.wantArchived()
	})
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

// A person who accepts a host's WAL gets that host's WAL, not that of another one which came back meanwhile.
func TestAcceptedDivergenceIsForTheHostThatHalted(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Conninfo = "host=old,new user=archiver sslmode=disable"
		g.hosts(map[string]*pgtest.Server{"old": g.srv})
		g.start()
		g.append(5, 500)
		g.wantArchived()
		fresh, w := g.strayFrom(4) // promoted on the same timeline, without the end of the old one's WAL
		g.hosts(map[string]*pgtest.Server{"new": fresh})
		g.srv.Disconnect()
		g.sleep(time.Minute)
		g.want(Halted, "differs from the archive")
		g.wantHost("new:5432")
		g.hosts(map[string]*pgtest.Server{"old": g.srv, "new": fresh}) // the old one is started again by mistake
		g.mu.Lock()
		g.goesBack, g.acked = true, 0
		g.truth[1] = image{w.Bytes(origin, w.End()), w.Boundaries()}
		clear(g.judged)
		g.mu.Unlock()
		g.decide(AcceptDivergence, false, "divergence accepted")
		g.sleep(2 * time.Second)
		g.wantHost("new:5432")
		if s := g.r.Status(); s.State != Streaming || s.Flushed != w.End() {
			t.Errorf("%s, flushed %s: not the accepted host's WAL, which ends at %s", s.State, s.Flushed, w.End())
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

// min_free holds when a message crosses into the next segment, as most do.
func TestNoSegmentIsBegunBelowMinFreeByAMessageThatCrosses(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.MinFree = 10 * mb
		g.appendTo(origin + mb - 5000)
		g.start()
		g.sleep(2 * time.Second)
		g.wantArchived()
		g.room.Store(10*mb + mb/2)
		g.append(1, 20000)
		g.sleep(5 * time.Second)
		if names, _ := filepath.Glob(filepath.Join(g.cfg.Dir, strings.Repeat("[0-9A-F]", 24)+"*")); len(names) != 1 {
			t.Errorf("%d segments, state %s: the second one does not fit above min_free", len(names), g.r.Status().State)
		}
	})
}

// One word ends one halt: a request that waits does not answer a question that nobody has seen.
func TestDecisionThatWaitsIsNotForALaterHalt(t *testing.T) {
	bubble(t, func(g *rig) {
		g.append(5, 500)
		g.wal.FillTo(origin + mb)
		g.append(5, 500)
		g.start()
		g.wantArchived()
		// Other WAL from the first segment on, noticed in the second: two places, one after the other.
		w := newWAL(g.size)
		w.Append([]byte("the other"))
		w.FillTo(origin + mb)
		w.Append(make([]byte, 700))
		g.srv.Disconnect()
		g.srv.Publish(w)
		g.sleep(time.Minute)
		g.want(Halted)
		first := g.r.Status().Reason
		g.mu.Lock()
		g.goesBack, g.acked = true, 0
		g.truth[1] = image{w.Bytes(origin, w.End()), w.Boundaries()}
		g.missing = origin + mb
		clear(g.judged)
		g.mu.Unlock()
		answers := make(chan string, 2)
		for range 2 { // a person who is impatient
			go func() {
				ctx, cancel := context.WithTimeout(g.Context(), time.Minute)
				defer cancel()
				text, err := g.r.Decide(ctx, AcceptDivergence)
				answers <- fmt.Sprint(text, err)
			}()
		}
		a, b := <-answers, <-answers
		if strings.Contains(a, "divergence accepted") && strings.Contains(b, "divergence accepted") {
			t.Errorf("halted by: %s\n1: %s\n2: %s\na second divergence was accepted by a request from before it was known", first, a, b)
		}
		g.stop()
		data, err := os.ReadFile(filepath.Join(g.cfg.Dir, g.name(1, 0)))
		if err != nil {
			t.Fatal(err)
		}
		g.mu.Lock()
		copy(g.truth[1].bytes, data) // the sealed segment is the other server's, and stays
		g.mu.Unlock()
	})
}

// A gap is what no server has: where one has the WAL again, or another host does, nothing is recorded.
func TestGapIsNotRecordedWhenTheServerHasTheWALAgain(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.wantArchived()
		g.loseWAL()
		g.sleep(10 * time.Second)
		g.want(Halted)
		g.srv.Do(func(s *pgtest.State) { s.Oldest = origin })
		g.decide(AcceptGap, true, "has the missing WAL again")
		g.sleep(time.Minute)
		g.want(Streaming)
		if gaps := g.meta().Gaps(); len(gaps) != 0 {
			t.Errorf("WAL that the server has is missing in the archive for good: %+v", gaps)
		}
	})
}
