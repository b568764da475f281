package receiver

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// decide hands the receiver a decision, and expects words in what it says.
func (g *rig) decide(what Decision, wantError bool, words ...string) {
	g.Helper()
	ctx, cancel := context.WithTimeout(g.Context(), time.Minute)
	defer cancel()
	text, err := g.r.Decide(ctx, what)
	if (err != nil) != wantError {
		g.Fatalf("%s: %q, error %v", what, text, err)
	}
	if err != nil {
		text = err.Error()
	}
	for _, w := range words {
		if !strings.Contains(text, w) {
			g.Errorf("%s: %q lacks %q", what, text, w)
		}
	}
}

// meta opens the archive of a receiver that was stopped.
func (g *rig) meta() *archive.Dir {
	g.Helper()
	g.stop()
	d, err := archive.Open(g.cfg.Dir)
	if err != nil {
		g.Fatal(err)
	}
	g.Cleanup(func() { d.Close() })
	return d
}

// loseWAL makes the server forget what comes after the archive's end, up to two segments later.
func (g *rig) loseWAL() (from, to wal.LSN) {
	from, to = g.last().flush, origin+2*mb
	g.srv.Disconnect()
	g.appendTo(origin + 3*mb + 5000)
	g.srv.Do(func(s *pgtest.State) {
		s.Oldest = to
		s.Slots[g.cfg.Slot].RestartLSN = to + 700
	})
	return from, to
}

// A gap halts the cluster with the missing range in words. Once a person has accepted it, it is in archive.json and
// the archive goes on behind it.
func TestHaltedGapIsAccepted(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.wantArchived()
		from, to := g.loseWAL()
		g.sleep(10 * time.Second)
		g.want(Halted, "timeline 1 from "+from.String()+" to "+to.String()+" (1 MB)", "already been removed")
		g.mu.Lock()
		g.missing = to
		g.mu.Unlock()
		g.decide(AcceptDivergence, true, "halted by something else")
		g.want(Halted)
		g.decide(AcceptGap, false, "gap recorded", from.String(), to.String(), "base backup")
		g.sleep(time.Second)
		g.wantArchived()
		g.wantFiles(g.name(1, 0)+".partial", g.name(1, 2), g.name(1, 3)+".partial")
		gaps := g.meta().Gaps()
		if len(gaps) != 1 || gaps[0].From != from || gaps[0].To != to || !strings.Contains(gaps[0].Reason, "accepted by accept-gap") {
			t.Errorf("gaps %+v", gaps)
		}
	})
}

// Where the server is gone, or has the WAL again, nothing is recorded, and the answer says so.
func TestGapThatCannotBeRecordedIsToldSo(t *testing.T) {
	for name, tt := range map[string]struct {
		change func(g *rig)
		says   string
		state  State
	}{
		"the server is gone": {func(g *rig) {
			g.srv.Do(func(s *pgtest.State) { s.StartupError = pgtest.Fatal("57P03", "the database system is starting up") })
		}, "starting up", Backoff},
		"the gap begins where the server writes": {func(g *rig) {
			g.srv.Do(func(s *pgtest.State) { s.Slots[g.cfg.Slot].RestartLSN = 0; s.WALEnd = origin + 5000 })
		}, "no longer has", Halted},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.start()
				g.wantArchived()
				g.loseWAL()
				g.sleep(10 * time.Second)
				g.want(Halted)
				tt.change(g)
				g.decide(AcceptGap, true, tt.says)
				g.want(tt.state)
				if gaps := g.meta().Gaps(); len(gaps) != 0 {
					t.Errorf("gaps %+v", gaps)
				}
			})
		})
	}
}

func TestDecisionIsForAHaltedClusterAlone(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.wantArchived()
		for _, what := range []Decision{AcceptGap, AcceptDivergence} {
			g.decide(what, true, "cluster blue is not halted (it is streaming)")
		}
		g.stop()
		g.srv.Do(func(s *pgtest.State) { s.Version = "9.6" })
		g.start()
		g.want(Halted)
		g.decide(AcceptGap, true, "halted by something else", "9.6")
		g.stop()
		g.decide(AcceptGap, true, "it is stopped")
	})
}

// An accepted divergence keeps the archive's files and goes on with the server's bytes.
func TestAcceptedDivergenceGoesOnWithTheServersWAL(t *testing.T) {
	for name, diverge := range map[string]func(g *rig){
		"other bytes": func(g *rig) {
			g.retell(2, func(w *pgtest.WAL) { w.Append([]byte("the other")); w.FillTo(origin + 200<<10) })
		},
		"WAL that ends soon": func(g *rig) { g.retell(2, func(w *pgtest.WAL) {}) },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.appendTo(origin + 100<<10)
				g.start()
				g.wantArchived()
				before := g.files()
				partial := g.name(1, 0) + ".partial"
				diverge(g)
				g.publish(1)
				g.sleep(time.Minute)
				g.want(Halted, "differs from the archive at timeline 1")
				if now := g.files()[partial]; now != before[partial] {
					t.Error("the archive changed")
				}
				g.mu.Lock()
				g.goesBack, g.acked = true, 0
				clear(g.judged)
				g.mu.Unlock()
				g.decide(AcceptGap, true, "halted by something else")
				g.decide(AcceptDivergence, false, "divergence accepted", "goes on from "+origin.String(), "1 files")
				g.sleep(time.Second)
				g.append(5, 1000)
				g.sleep(time.Second)
				g.wantArchived()
				g.wantFiles(partial, partial+".diverged")
				if kept := g.files()[partial+".diverged"]; kept != before[partial] {
					t.Errorf("kept is %q, was %q", kept, before[partial])
				}
				g.restart()
				g.append(5, 1000)
				g.wantArchived()
				if all := g.meta().Divergences(); len(all) != 1 || all[0].Restart != origin || all[0].Kept[0].File != partial+".diverged" {
					t.Errorf("%+v", all)
				}
			})
		})
	}
}

// Where the server's WAL does not continue the last sealed segment, a person's word is needed once, and is enough.
func TestAcceptedDivergenceAtASegmentsStart(t *testing.T) {
	bubble(t, func(g *rig) {
		g.wal.FillTo(origin + mb)
		g.publish(1)
		g.start()
		g.wantArchived()
		sealed := g.files()[g.name(1, 0)]
		g.retell(2, func(w *pgtest.WAL) { w.Append([]byte("the other")); w.FillTo(origin + mb); w.Append(make([]byte, 500)) })
		g.srv.Publish(g.wal)
		g.sleep(time.Minute)
		g.want(Halted, "differs from the archive")
		g.decide(AcceptDivergence, false, "goes on from "+(origin+mb).String())
		g.mu.Lock()
		g.truth[1] = image{g.wal.Bytes(origin, g.wal.End()), g.wal.Boundaries()}
		g.missing, g.goesBack, g.acked = origin+mb, true, 0
		g.mu.Unlock()
		g.sleep(time.Second)
		g.want(Streaming)
		g.restart()
		g.want(Streaming)
		if u := g.last(); u.flush != g.wal.End() {
			t.Errorf("%+v, want %s", u, g.wal.End())
		}
		if g.files()[g.name(1, 0)] != sealed {
			t.Error("the sealed segment changed")
		}
		// The sealed segment is the other server's, and stays.
		data, err := os.ReadFile(filepath.Join(g.cfg.Dir, g.name(1, 0)))
		if err != nil {
			t.Fatal(err)
		}
		g.mu.Lock()
		copy(g.truth[1].bytes, data)
		g.mu.Unlock()
	})
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
