package receiver

import (
	"bytes"
	"fmt"
	"maps"
	"slices"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

const kb = 1 << 10

var errUnreachable error = syscall.EHOSTUNREACH

// wantBytes expects the archive to have what the servers had of a timeline.
func (g *rig) wantBytes(tli wal.Timeline, from, to wal.LSN) {
	g.Helper()
	g.mu.Lock()
	defer g.mu.Unlock()
	if start, ok := g.archiveStart(tli); !ok || start > from {
		g.Errorf("timeline %d begins at %s in the archive, want %s", tli, start, from)
	}
	g.judgeBytes(tli, from, to)
}

// wantOwnTimeline expects no server to have been told of WAL that is not on the timeline which it was streaming.
func (g *rig) wantOwnTimeline(servers ...*pgtest.Server) {
	g.Helper()
	for _, srv := range servers {
		var history wal.History
		var end wal.LSN
		srv.Do(func(s *pgtest.State) {
			history, _ = wal.ParseHistory(s.Timeline, s.Histories[s.Timeline])
			end = s.WALEnd
		})
		for _, st := range srv.Streams() {
			tli := st.Request().Timeline
			from, to := wal.LSN(0), end
			for _, f := range history.Forks {
				switch {
				case f.Timeline < tli:
					from = f.End
				case f.Timeline == tli:
					to = f.End
				}
			}
			for _, u := range st.Statuses() {
				if u.Flush > to || u.Flush != 0 && u.Flush < from {
					g.Errorf("flush %s was told on timeline %d, which goes from %s to %s", u.Flush, tli, from, to)
				}
			}
		}
	}
}

// forgetAcknowledged lets flush positions begin anew, where a new timeline lacks what was acknowledged on the old one.
func (g *rig) forgetAcknowledged() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.goesBack, g.acked = true, 0
}

// setHosts makes the receiver meet these servers, in this order.
func (g *rig) setHosts(order []string, servers map[string]*pgtest.Server) {
	g.cfg.Conninfo = "host=" + strings.Join(order, ",") + " user=archiver sslmode=disable"
	g.hosts(servers)
}

// follower is a standby of the servers that had this WAL, the last of it on the current timeline.
func (g *rig) follower(histories map[wal.Timeline][]byte, had ...*pgtest.WAL) *pgtest.Server {
	srv := pgtest.NewServer(g, pgtest.State{SystemID: systemID, Standby: true})
	srv.Do(func(s *pgtest.State) {
		maps.Copy(s.Histories, histories)
		s.Timeline = max(1, slices.Max(append(slices.Collect(maps.Keys(histories)), 1)))
		for _, w := range had {
			s.Publish(w)
		}
	})
	return srv
}

// promoteServer makes a server go on with a timeline that forks off g.wal at at, which becomes g.wal.
func (g *rig) promoteServer(srv *pgtest.Server, tli wal.Timeline, at wal.LSN, n int) {
	old := g.wal
	g.wal = old.Fork(at, tli)
	for i := range n {
		g.wal.Append(bytes.Repeat([]byte{byte(tli), byte(i)}, 2500))
	}
	g.know(tli, g.wal)
	srv.Do(func(s *pgtest.State) { s.Promote(g.wal, at) })
}

// grow adds records to g.wal for srv, up to end.
func (g *rig) grow(srv *pgtest.Server, tli wal.Timeline, end wal.LSN) {
	for g.wal.End()+12<<10 < end {
		g.wal.Append(bytes.Repeat([]byte{byte(g.wal.End() >> 13)}, 8000))
	}
	g.wal.FillTo(end)
	g.know(tli, g.wal)
	srv.Publish(g.wal)
}

// A standby takes over while the archive is behind the fork, at it, or ahead of it with WAL that died with the old
// primary: the old timeline is archived up to the fork, or kept as it is behind it, and the new one goes on.
func TestArchiveGoesOnFromWhereverItIsAtAPromotion(t *testing.T) {
	forks := map[string]wal.LSN{
		"inside a segment":   origin + mb + 300*kb,
		"at a page's end":    origin + mb + 304*kb,
		"at a segment's end": origin + 2*mb,
	}
	stands := map[string]int64{ // the end of what the archive has, from the fork on
		"a segment behind":     -mb - 100*kb,
		"behind":               -100 * kb,
		"in the record before": -1000,
		"at the fork":          0,
		"in the record after":  1000,
		"ahead":                50 * kb,
		"a segment ahead":      mb + 100*kb,
	}
	for forkName, fork := range forks {
		for standName, stand := range stands {
			if forkName == "at a page's end" && max(stand, -stand) > 1000 {
				continue // as inside a segment
			}
			for _, restart := range []bool{true, false} {
				t.Run(fmt.Sprintf("fork %s, archive %s, restart %t", forkName, standName, restart), func(t *testing.T) {
					t.Parallel()
					bubble(t, func(g *rig) { promoteAround(g, fork, fork+wal.LSN(stand), restart) })
				})
			}
		}
	}
}

func promoteAround(g *rig, fork, stand wal.LSN, restart bool) {
	fresh := pgtest.NewServer(g, pgtest.State{SystemID: systemID})
	servers := map[string]*pgtest.Server{"old": g.srv}
	g.setHosts([]string{"old", "new"}, servers)
	g.grow(g.srv, 1, fork)
	before := g.wal.Fork(fork, 2) // to take timeline 1 up to the fork from
	g.grow(g.srv, 1, fork+mb+200*kb)
	lost := g.wal
	g.publishTo(1, stand)
	g.start()
	g.want(Streaming)
	if s := g.r.Status(); s.Written != stand {
		g.Fatalf("written %s, want %s", s.Written, stand)
	}
	acked := g.last().flush
	if restart {
		g.stop()
	}
	kept := g.files()
	g.srv.Close()
	if acked > fork {
		g.forgetAcknowledged()
	}
	fresh.Publish(lost) // of which it has what is before the fork
	g.wal = before
	for i := range 3 {
		g.wal.Append(bytes.Repeat([]byte{2, byte(i)}, 2500))
	}
	g.know(2, g.wal)
	fresh.Do(func(s *pgtest.State) {
		s.Histories[2] = fmt.Appendf(nil, "1\t%s\tno recovery target specified\n", fork)
		s.Timeline = 2
		s.Publish(g.wal)
	})
	g.hosts(map[string]*pgtest.Server{"new": fresh})
	if restart {
		g.start()
	}
	g.sleep(time.Minute)
	g.wantArchived()
	g.wantBytes(1, origin, max(fork, stand))
	g.wantBytes(2, g.size.Start(fork), g.wal.End())
	if stand > fork {
		for name, content := range g.files() {
			if was := kept[name]; strings.HasPrefix(name, "00000001") && was != content {
				g.Errorf("%s was %q, and is %q", name, was, content)
			}
		}
	}
	g.grow(fresh, 2, fork+mb+50*kb)
	g.wantArchived()
	if n := g.r.Status().Timeline; n != 2 {
		g.Errorf("timeline %d", n)
	}
	g.restart()
	g.grow(fresh, 2, fork+mb+60*kb)
	g.wantArchived()
	g.wantBytes(1, origin, max(fork, stand))
	g.wantBytes(2, g.size.Start(fork), g.wal.End())
	g.wantOwnTimeline(g.srv, fresh)
}

// Several promotions after each other, seen one by one, after a restart each, or all of them later.
func TestCascadeOfPromotionsIsFollowed(t *testing.T) {
	cascades := map[string][]wal.LSN{ // where timelines 2, 3 and 4 fork
		"in one segment":                   {100 * kb, 200 * kb, 300 * kb},
		"on one page":                      {100 * kb, 100*kb + 64, 100*kb + 128},
		"segments apart":                   {100 * kb, mb + 100*kb, 3*mb + 100*kb},
		"at segment ends":                  {mb, 2 * mb, 3 * mb},
		"no WAL on 2":                      {100 * kb, 100 * kb, 200 * kb},
		"no WAL on 2, at a segment's end":  {mb, mb, mb + 100*kb},
		"no WAL on 2 and 3":                {100 * kb, 100 * kb, 100 * kb},
		"no WAL on 2 and 3, segment's end": {mb, mb, mb},
		"no WAL on 3, a segment later":     {100 * kb, mb, mb},
	}
	modes := map[string]func(g *rig, begin bool){
		"while streaming":         func(*rig, bool) {},
		"restarted in between":    func(g *rig, begin bool) { g.between(g.stop, g.start, begin) },
		"disconnected in between": func(g *rig, begin bool) { g.between(g.cut, g.mend, begin) },
		"while it was away": func(g *rig, begin bool) {
			if begin && g.cancel != nil {
				g.stop()
			}
		},
	}
	for cascade, forks := range cascades {
		for mode, around := range modes {
			if mode == "disconnected in between" && len(cascade) > len("at segment ends") {
				continue // a restart takes the same ways
			}
			t.Run(cascade+", "+mode, func(t *testing.T) {
				t.Parallel()
				bubble(t, func(g *rig) {
					g.start()
					g.wantArchived()
					for i, fork := range forks {
						if fork += origin; fork > g.wal.End() {
							g.growCurrent(fork)
						}
						around(g, true)
						g.promote(wal.Timeline(i+2), fork, 0)
						around(g, false)
						synctest.Wait()
					}
					g.growCurrent(origin + forks[2] + 20*kb)
					if g.cancel == nil {
						g.start()
					}
					g.sleep(5 * time.Second)
					g.wantArchived()
					wantCascade(g, forks)
					g.growCurrent(origin + forks[2] + mb + 30*kb)
					g.restart()
					g.sleep(5 * time.Second)
					g.wantArchived()
					wantCascade(g, forks)
				})
			})
		}
	}
}

func (g *rig) between(first, then func(), begin bool) {
	if begin {
		first()
	} else {
		then()
	}
}

// cut ends the server's connections, and refuses new ones until mend.
func (g *rig) cut() {
	g.srv.Do(func(s *pgtest.State) { s.DialError = errUnreachable })
	g.srv.Disconnect()
	g.sleep(time.Second)
}

func (g *rig) mend() {
	g.srv.Do(func(s *pgtest.State) { s.DialError = nil })
	g.sleep(time.Minute)
}

// growCurrent adds records on the server's timeline.
func (g *rig) growCurrent(end wal.LSN) {
	var tli wal.Timeline
	g.srv.Do(func(s *pgtest.State) { tli = s.Timeline })
	g.grow(g.srv, tli, end)
	synctest.Wait()
}

// wantCascade expects every timeline to be there with its own WAL, from the segment in which it begins to its fork.
func wantCascade(g *rig, forks []wal.LSN) {
	g.Helper()
	from := origin
	for i, fork := range append(slices.Clone(forks), g.wal.End()-origin) {
		tli, to := wal.Timeline(i+1), origin+fork
		if start := g.size.Start(from); start < to { // else there is nothing of its own
			g.wantBytes(tli, start, to)
		}
		from = to
	}
	if tli := g.r.Status().Timeline; tli != 4 {
		g.Errorf("timeline %d", tli)
	}
	for tli := wal.Timeline(2); tli <= 4; tli++ {
		if _, ok := g.files()[wal.HistoryName(tli)]; !ok {
			g.Errorf("no history of timeline %d", tli)
		}
	}
	g.wantOwnTimeline(g.srv)
}

// The old primary comes back as a follower of the new one, and is promoted again, while the one that it replaces is
// gone, or goes on as if nothing had happened.
func TestFailback(t *testing.T) {
	for _, order := range [][]string{{"old", "new"}, {"new", "old"}} {
		for name, zombie := range map[string]bool{"the other is gone": false, "the other goes on": true} {
			for _, restart := range []bool{true, false} {
				t.Run(fmt.Sprintf("%s first, %s, restart %t", order[0], name, restart), func(t *testing.T) {
					t.Parallel()
					bubble(t, func(g *rig) { failBack(g, order, zombie, restart) })
				})
			}
		}
	}
}

func failBack(g *rig, order []string, zombie, restart bool) {
	g.setHosts(order, map[string]*pgtest.Server{"old": g.srv})
	g.start()
	g.growCurrent(origin + 100*kb)
	g.wantArchived()
	first := g.wal
	fresh := g.follower(nil, first)
	g.srv.Close()
	g.promoteServer(fresh, 2, first.End(), 3)
	g.hosts(map[string]*pgtest.Server{"new": fresh})
	g.sleep(time.Minute)
	g.wantArchived()
	g.wantHost("new:5432")

	var histories map[wal.Timeline][]byte
	fresh.Do(func(s *pgtest.State) { histories = s.Histories })
	old := g.follower(histories, first, g.wal) // rewound
	g.hosts(map[string]*pgtest.Server{"old": old, "new": fresh})
	g.grow(fresh, 2, origin+mb+100*kb)
	g.sleep(time.Minute)
	g.wantArchived()
	g.wantHost("new:5432")

	if restart {
		g.stop()
	}
	second := g.wal
	old.Publish(second)
	fork := second.End()
	g.promoteServer(old, 3, fork, 3)
	if zombie { // nobody has told it; what it still writes may get here
		second.Append(make([]byte, 30*kb))
		g.know(2, second)
		g.forgetAcknowledged()
		fresh.Publish(second)
	} else {
		fresh.Close()
	}
	if restart {
		g.start()
	}
	g.sleep(2 * time.Minute)
	g.wantArchived()
	g.wantHost("old:5432")
	g.grow(old, 3, origin+2*mb+100*kb)
	g.restart()
	g.wantArchived()
	g.wantHost("old:5432")
	g.wantBytes(1, origin, first.End())
	g.wantBytes(2, origin, fork)
	g.wantBytes(3, origin+mb, g.wal.End())
	g.wantOwnTimeline(g.srv, fresh, old)
}

// Two promotions happened while the old primary was dead, and the archive has WAL that none of the new ones has: the
// timeline in between is archived, too.
func TestLostTailBeforeTwoPromotions(t *testing.T) {
	for _, restart := range []bool{true, false} {
		t.Run(fmt.Sprintf("restart %t", restart), func(t *testing.T) {
			t.Parallel()
			bubble(t, func(g *rig) {
				g.growCurrent(origin + 100*kb)
				fork, first := g.wal.End(), g.wal.Fork(g.wal.End(), 2)
				g.growCurrent(origin + 2*mb + 100*kb)
				g.start()
				g.wantArchived()
				if restart {
					g.stop()
				} else {
					g.cut()
				}
				g.forgetAcknowledged()
				g.wal = first
				g.srv.Do(func(s *pgtest.State) { s.Promote(g.wal, fork) })
				g.grow(g.srv, 2, origin+mb+100*kb)
				second := g.wal.End()
				g.promote(3, second, 3)
				if restart {
					g.start()
				} else {
					g.mend()
				}
				g.sleep(time.Minute)
				g.wantArchived()
				g.growCurrent(origin + 3*mb)
				g.restart()
				g.growCurrent(origin + 3*mb + 50*kb)
				g.wantArchived()
				g.wantBytes(1, origin, origin+2*mb+100*kb)
				g.wantBytes(2, origin, second)
				g.wantBytes(3, origin+mb, g.wal.End())
			})
		})
	}
}

// A promoted standby has no slot of ours, and where its WAL begins is another matter than where a new slot would.
func TestNewPrimaryWithoutTheSlot(t *testing.T) {
	for name, tt := range map[string]struct {
		oldest wal.LSN // what the new primary still has
		redo   wal.LSN // what a new slot reserves
		onGap  string
		state  State
	}{
		"that has everything":              {origin, origin + 100*kb, GapHalt, Streaming},
		"whose new slot begins behind us":  {origin, origin + 2*mb + 300*kb, GapHalt, Streaming},
		"that has our segment still":       {origin + mb + 5, origin + 2*mb + 300*kb, GapHalt, Streaming},
		"that no longer has what is next":  {origin + 2*mb, origin + 2*mb + 300*kb, GapHalt, Halted},
		"that no longer has it, and so be": {origin + 2*mb, origin + 2*mb + 300*kb, GapRecord, Streaming},
	} {
		for _, restart := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, restart %t", name, restart), func(t *testing.T) {
				t.Parallel()
				bubble(t, func(g *rig) {
					g.cfg.OnGap = tt.onGap
					g.setHosts([]string{"old", "new"}, map[string]*pgtest.Server{"old": g.srv})
					g.start()
					g.growCurrent(origin + mb + 100*kb)
					g.wantArchived()
					tail := g.wal.End()
					if restart {
						g.stop()
					}
					before := g.files()
					g.srv.Close()
					g.grow(g.srv, 1, origin+2*mb+100*kb) // never seen by us
					fresh := g.follower(nil, g.wal)
					fork := g.wal.End()
					g.promoteServer(fresh, 2, fork, 0)
					g.grow(fresh, 2, origin+2*mb+500*kb)
					fresh.Do(func(s *pgtest.State) { s.Oldest, s.Redo = tt.oldest, tt.redo })
					g.hosts(map[string]*pgtest.Server{"new": fresh})
					if tt.onGap == GapRecord {
						g.mu.Lock()
						g.missing = origin + 2*mb
						g.mu.Unlock()
					}
					if restart {
						g.start()
					}
					g.sleep(2 * time.Minute)
					if tt.state == Halted {
						g.want(Halted, "no longer has the WAL that comes next, timeline 1 from "+tail.String())
						after := g.files()
						delete(after, wal.HistoryName(2))
						if !maps.Equal(before, after) {
							t.Error("the archive changed")
						}
						return
					}
					g.wantArchived()
					if tt.onGap == GapHalt {
						for _, st := range fresh.Streams()[:1] {
							if r := st.Request(); r.Timeline != 1 || r.LSN > tail || r.LSN < tail-2*wal.PageSize {
								t.Errorf("%+v, the archive ended on timeline 1 at %s", r, tail)
							}
						}
						g.wantBytes(1, origin, fork)
					}
					g.wantBytes(2, origin+2*mb, g.wal.End())
					fresh.Do(func(s *pgtest.State) {
						if slot := s.Slots[g.cfg.Slot]; slot == nil || slot.RestartLSN != g.wal.End() {
							t.Errorf("slot %+v, want it at %s", slot, g.wal.End())
						}
					})
					g.restart()
					g.grow(fresh, 2, origin+3*mb+100*kb)
					g.wantArchived()
					g.wantBytes(2, origin+2*mb, g.wal.End())
					g.wantOwnTimeline(fresh)
				})
			})
		}
	}
}

// A slot can be behind what was acknowledged: after a crash it is what was saved last. It is no place to resume from.
func TestSlotBehindTheArchiveIsNotResumedFrom(t *testing.T) {
	for _, restart := range []bool{true, false} {
		t.Run(fmt.Sprintf("restart %t", restart), func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.start()
				g.growCurrent(origin + 2*mb + 100*kb)
				g.wantArchived()
				tail, received := g.wal.End(), g.r.Status().ReceivedBytes
				if restart {
					g.stop()
					received = 0
				}
				g.srv.Disconnect()
				g.srv.Do(func(s *pgtest.State) { s.Slots[g.cfg.Slot].RestartLSN = origin + 50*kb })
				if restart {
					g.start()
				}
				g.sleep(time.Minute)
				g.growCurrent(origin + 2*mb + 200*kb)
				g.wantArchived()
				if r := g.stream().Request(); r.LSN > tail || r.LSN < tail-2*wal.PageSize {
					t.Errorf("%+v, the archive ended at %s", r, tail)
				}
				again := g.r.Status().ReceivedBytes - received - int64(g.wal.End()-tail)
				if again < 0 || again > 2*wal.PageSize {
					t.Errorf("%d bytes were received again", again)
				}
				if slot := g.slot(); slot.RestartLSN != g.wal.End() {
					t.Errorf("slot %s, want %s", slot.RestartLSN, g.wal.End())
				}
			})
		})
	}
}

// A PolarDB node that is promoted stays on its timeline and goes on after the last complete record: what the archive
// has of a torn one, several segments of it, is replaced; of what is complete, nothing is.
func TestTornRecordOfSeveralSegmentsIsReplaced(t *testing.T) {
	for name, instead := range map[string]func(w *pgtest.WAL){
		"nothing at first":     func(*pgtest.WAL) {},
		"less, on one page":    func(w *pgtest.WAL) { w.Append([]byte("instead")) },
		"less":                 func(w *pgtest.WAL) { w.Append(bytes.Repeat([]byte("instead"), mb/5)) },
		"more":                 func(w *pgtest.WAL) { w.Append(bytes.Repeat([]byte("instead"), mb/2)) },
		"another, torn again":  func(w *pgtest.WAL) { w.Append(bytes.Repeat([]byte("instead"), 4*mb/7)) },
		"up to a page's start": func(w *pgtest.WAL) { w.FillTo(origin + mb + 16*wal.PageSize) },
	} {
		for _, restart := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s, restart %t", name, restart), func(t *testing.T) {
				t.Parallel()
				bubble(t, func(g *rig) {
					g.srv.Do(func(s *pgtest.State) { s.Settings = map[string]string{"polar_version": "2.0.15.2.0"} })
					g.wal = newWAL(g.size) // of zeros alone: retell can make it again
					g.appendTo(origin + 900*kb)
					complete := g.wal.End()
					records := len(g.wal.Boundaries())
					g.wal.Append(make([]byte, 3*mb))
					g.publishTo(1, complete+3*mb-5000)
					g.start()
					g.sleep(g.cfg.StatusInterval)
					if u := g.last(); u.flush != complete || u.write != complete+3*mb-5000 {
						t.Fatalf("%+v, want the torn record alone unacknowledged", u)
					}
					if restart {
						g.stop()
					}
					g.retell(records, func(*pgtest.WAL) {})
					g.know(1, g.wal)
					instead(g.wal)
					end := g.wal.End()
					if name == "another, torn again" {
						end = complete + 3*mb
					}
					g.publishTo(1, end)
					if restart {
						g.start()
					}
					g.sleep(time.Minute)
					g.want(Streaming)
					if u := g.last(); name != "nothing at first" && name != "another, torn again" && u.flush != end {
						t.Errorf("%+v, want flush %s", u, end)
					}
					if g.logs.count("level=ERROR") > 0 {
						t.Errorf("a person was called:\n%s", g.logs.last(12))
					}
					g.restart()
					g.growCurrent(g.wal.End() + 100*kb)
					g.sleep(5 * time.Second)
					g.wantArchived()
					g.wantBytes(1, origin, g.wal.End())
					g.growCurrent(origin + 5*mb + 20*kb)
					g.restart()
					g.sleep(5 * time.Second)
					g.wantArchived()
					g.wantBytes(1, origin, g.wal.End())
				})
			})
		}
	}
}

// A server that was cloned from one of a later timeline has WAL of an older one, and not its history.
func TestServerWithoutTheHistoryOfAnOlderTimeline(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.wantArchived()
		g.stop()
		g.append(3, 700)
		g.promote(2, g.wal.End(), 3)
		g.append(3, 700)
		g.promote(3, g.wal.End(), 3)
		g.srv.Do(func(s *pgtest.State) { delete(s.Histories, 2) })
		g.start()
		g.sleep(time.Minute)
		g.wantArchived()
		if s := g.r.Status(); s.Timeline != 3 || g.logs.count("does not have the history of an older timeline") == 0 {
			t.Errorf("timeline %d\n%s", s.Timeline, g.logs.last(8))
		}
	})
}
