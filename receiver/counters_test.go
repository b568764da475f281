package receiver

import (
	"slices"
	"testing"
	"testing/synctest"
	"time"

	"github.com/walfleet/walfleet/internal/wal"
)

// What a receiver counts is what happened, no more and no less.
func TestCountersTellWhatHappened(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.append(5, 1000)
		g.wantArchived()
		g.sleep(25 * time.Second)
		s := g.r.Status()
		if n := len(g.updates()); s.StatusUpdates != int64(n) || n < 3 {
			t.Errorf("%d status updates were counted, and %d arrived", s.StatusUpdates, n)
		}
		if s.Syncs.Count == 0 || s.Syncs.Within[0] != s.Syncs.Count { // virtual time stands still meanwhile
			t.Errorf("syncs: %+v", s.Syncs)
		}
		if len(s.Failures) != len(FailureClasses) || s.Switchovers != 0 || s.Reconnects != 0 {
			t.Errorf("%+v", s)
		}
		for class, n := range s.Failures {
			if n != 0 {
				t.Errorf("%d failures of class %s", n, class)
			}
		}

		g.append(1, 1000)
		g.sleep(0)
		if after := g.r.Status().Syncs.Count; after != s.Syncs.Count+1 {
			t.Errorf("a commit was flushed: %d syncs, %d before", after, s.Syncs.Count)
		}

		g.cut()
		g.sleep(10 * time.Minute)
		g.mend()
		g.wantArchived()
		s = g.r.Status()
		if s.Failures["network"] < 2 || s.Switchovers != 0 || s.Reconnects != 1 {
			t.Errorf("after an outage: %v, %d switchovers, %d reconnects", s.Failures, s.Switchovers, s.Reconnects)
		}
		for class, n := range s.Failures {
			if n != 0 && class != "network" {
				t.Errorf("%d failures of class %s", n, class)
			}
		}
	})
}

// A failover is one switch-over, on whichever timelines and hosts it is followed.
func TestSwitchoversAreCounted(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.append(5, 1000)
		g.wantArchived()
		for i, tli := range []wal.Timeline{2, 3} {
			g.promote(tli, g.wal.End(), 3)
			g.sleep(time.Minute)
			g.wantArchived()
			if n := g.r.Status().Switchovers; n != int64(i+1) {
				t.Errorf("timeline %d: %d switch-overs", tli, n)
			}
		}
		g.srv.Disconnect()
		g.sleep(time.Minute)
		g.append(1, 1000)
		g.wantArchived()
		synctest.Wait()
		if s := g.r.Status(); s.Switchovers != 2 || s.Reconnects == 0 {
			t.Errorf("after a reconnect: %d switch-overs, %d reconnects", s.Switchovers, s.Reconnects)
		}
	})
}

func TestSyncTimesCumulate(t *testing.T) {
	var timer syncTimer
	limits := SyncLimits()
	if !slices.IsSorted(limits) {
		t.Fatal("the limits are not sorted")
	}
	var sum time.Duration
	for i, limit := range limits {
		timer.add(limit) // inclusive
		timer.add(limit + 1)
		sum += 2*limit + 1
		s := timer.times()
		if s.Count != int64(2*i+2) || s.Within[i] != int64(2*i+1) || s.Sum != sum {
			t.Errorf("after %s: %+v, want a sum of %s", limit, s, sum)
		}
	}
	if s := timer.times(); s.Within[len(limits)-1] != s.Count-1 {
		t.Errorf("one took longer than all limits: %+v", s)
	}
}
