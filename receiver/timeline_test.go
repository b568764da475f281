package receiver

import (
	"bytes"
	"errors"
	"maps"
	"os"
	"path/filepath"
	"testing"
	"testing/synctest"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

func TestPromotionIsFollowedWhileStreaming(t *testing.T) {
	for name, fork := range map[string]wal.LSN{"within a segment": origin + 20<<10, "at a segment's end": origin + mb} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.start()
				g.appendTo(fork)
				g.wantArchived()
				for tli := wal.Timeline(2); tli <= 3; tli++ {
					g.promote(tli, g.wal.End(), 1)
					g.wantArchived()
					g.append(10, 1000)
					g.wantArchived()
					if s := g.r.Status(); s.Timeline != tli || s.Reconnects != 0 {
						t.Errorf("timeline %d, %d reconnects", s.Timeline, s.Reconnects)
					}
				}
				g.appendTo(origin + 2*mb)
				g.wantArchived()
				for tli := wal.Timeline(2); tli <= 3; tli++ {
					var want []byte
					g.srv.Do(func(s *pgtest.State) { want = s.Histories[tli] })
					if have, _ := os.ReadFile(filepath.Join(g.cfg.Dir, wal.HistoryName(tli))); string(have) != string(want) {
						t.Errorf("history of timeline %d: %q, want %q", tli, have, want)
					}
				}
				old := g.name(1, 0) + ".partial" // stays as it is
				if fork == origin+mb {
					old = g.name(1, 0)
				}
				if _, ok := g.files()[old]; !ok {
					t.Errorf("%s is gone", old)
				}
				g.restart()
				g.append(1, 10)
				g.wantArchived()
			})
		})
	}
}

// A receiver that was away during promotions finds its way by the history.
func TestPromotionsAreFollowedAfterARestart(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.append(10, 1000)
		g.wantArchived()
		g.stop()
		g.append(10, 1000) // of timeline 1, and never seen
		g.promote(2, g.wal.End(), 1)
		g.append(10, 1000)
		g.promote(3, g.wal.End(), 1)
		g.start()
		g.wantArchived()
		if g.r.Status().Timeline != 3 {
			t.Errorf("timeline %d", g.r.Status().Timeline)
		}
		g.wantFiles(g.name(1, 0)+".partial", g.name(2, 0)+".partial", g.name(3, 0)+".partial")
	})
}

// Between the end of a timeline and the first WAL of the next, or in the middle of what both have.
func TestRestartWhileFollowingATimeline(t *testing.T) {
	for name, size := range map[string]int{"nothing received": 0, "a part of what both have": 30 << 10, "past the fork": 60 << 10} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.start()
				g.appendTo(origin + 50<<10)
				g.wantArchived()
				serve := func(timeline2 func(st *pgtest.Stream)) {
					g.serve(func(st *pgtest.Stream) {
						if st.Request().Timeline == 1 {
							st.Serve()
							return
						}
						timeline2(st)
					})
				}
				serve(func(st *pgtest.Stream) {
					_ = st.Send(origin, g.wal.End(), g.wal.Bytes(origin, origin+wal.LSN(size)))
					<-st.Gone()
				})
				g.promote(2, g.wal.End(), 10)
				synctest.Wait()
				serve(trickle(g.wal, 8<<10, time.Second))
				g.restart()
				g.sleep(time.Minute)
				g.wantArchived()
			})
		})
	}
}

// A promoted PolarDB node ends the stream, names no next timeline, and stays on its own.
func TestNextTimeline0MeansToIdentifyAgain(t *testing.T) {
	bubble(t, func(g *rig) {
		promoted := make(chan struct{})
		g.serve(func(st *pgtest.Stream) {
			_ = st.Send(origin, g.wal.End(), g.wal.Bytes(origin, g.wal.End()))
			<-promoted
			_ = st.EndTimeline(0, 0)
		})
		g.start()
		g.wantArchived()
		g.serve(nil)
		close(promoted)
		g.want(Backoff, "named no next timeline")
		g.append(5, 1000)
		g.sleep(2 * time.Second)
		g.wantArchived()
		if s := g.r.Status(); s.Timeline != 1 || s.Reconnects != 1 {
			t.Errorf("timeline %d, %d reconnects", s.Timeline, s.Reconnects)
		}
	})
}

// The old primary had sent WAL that the new one never got: it is kept, and never acknowledged on the new timeline.
func TestLostTailOfADeadPrimaryIsKeptAndNotAcknowledged(t *testing.T) {
	for name, restart := range map[string]bool{"restart": true, "reconnect": false} {
		for _, lost := range []wal.LSN{10 << 10, 3 * mb} {
			t.Run(name, func(t *testing.T) {
				bubble(t, func(g *rig) {
					g.start()
					g.appendTo(origin + 30<<10)
					fork, first := g.wal.End(), g.wal.Fork(g.wal.End(), 2)
					g.appendTo(fork + lost)
					g.wantArchived()
					if restart {
						g.stop()
					}
					g.srv.Do(func(s *pgtest.State) { s.DialError = errors.New("no route to host") })
					g.srv.Disconnect()
					g.sleep(time.Minute)
					kept := g.files()

					first.Append(make([]byte, 100))
					g.mu.Lock()
					g.goesBack, g.acked = true, 0
					g.mu.Unlock()
					g.know(2, first)
					g.wal = first
					g.srv.Do(func(s *pgtest.State) {
						s.Slots[g.cfg.Slot].RestartLSN = fork // on another machine
						s.Promote(first, fork)
						s.DialError = nil
					})
					g.updates()
					if restart {
						g.start()
					}
					g.sleep(time.Minute)
					g.wantArchived()
					for _, u := range g.updates() {
						if u.flush != 0 && u.flush < fork || u.flush > first.End() {
							t.Errorf("%+v, the new timeline goes from %s to %s", u, fork, first.End())
						}
					}
					after := g.files()
					for name, content := range kept {
						if after[name] != content {
							t.Errorf("%s was changed", name)
						}
					}
					g.append(20, 1000)
					g.restart()
					g.append(1, 10)
					g.wantArchived()
				})
			})
		}
	}
}

func TestServerWithAnotherPastIsRefused(t *testing.T) {
	onTimeline2 := func(g *rig) {
		g.start()
		g.append(3, 500)
		g.promote(2, g.wal.End(), 1)
		g.append(3, 500)
		g.wantArchived()
		g.stop()
	}
	for name, tt := range map[string]struct {
		change func(g *rig, s *pgtest.State)
		state  State
		want   string
	}{
		"older timeline": {func(_ *rig, s *pgtest.State) { s.Timeline = 1 }, Backoff,
			"the server is on timeline 1, the archive is on 2 already"},
		"our timeline is no ancestor": {func(_ *rig, s *pgtest.State) {
			s.Timeline, s.Histories[3] = 3, []byte("1\t0/4000100\tsomewhere else\n")
		}, Halted, "timeline 2, which is no ancestor of the server's timeline 3"},
		"another history of our timeline": {func(_ *rig, s *pgtest.State) {
			s.Histories[2] = []byte("1\t0/4000100\tsomewhere else\n")
		}, Halted, "history of timeline 2 differs"},
		"unreadable history": {func(_ *rig, s *pgtest.State) {
			s.Timeline, s.Histories[3] = 3, []byte("what is this\n")
		}, Backoff, "history of timeline 3, line 1"},
		"WAL ends before ours": {func(g *rig, s *pgtest.State) { s.WALEnd = g.wal.End() - 700 }, Halted,
			"before the archive's end"},
		"standby that is behind": {func(g *rig, s *pgtest.State) { s.WALEnd, s.Standby = g.wal.End()-700, true }, Backoff,
			"the standby is behind"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.cfg.Source = SourceAny
				onTimeline2(g)
				before, slot, streams := g.files(), g.slot(), len(g.srv.Streams())
				g.srv.Do(func(s *pgtest.State) { tt.change(g, s) })
				g.start()
				g.want(tt.state, tt.want)
				after := g.files()
				delete(after, wal.HistoryName(3))
				if !maps.Equal(before, after) {
					t.Error("the archive changed")
				}
				if now := g.slot(); *now != *slot || len(g.srv.Streams()) != streams {
					t.Errorf("the slot %+v became %+v; %d streams", slot, now, len(g.srv.Streams())-streams)
				}
			})
		})
	}
}

// retell gives the server WAL that is the same for its first n records, and then another one's.
func (g *rig) retell(n int, other func(w *pgtest.WAL)) {
	ends := g.wal.Boundaries()
	w := newWAL(g.size)
	for w.End() < ends[n-1] {
		w.FillTo(ends[len(w.Boundaries())])
	}
	other(w)
	g.srv.Disconnect()
	g.wal = w
}

func TestOtherBytesThanTheArchivesHaltWithoutAChange(t *testing.T) {
	for name, restart := range map[string]bool{"restart": true, "reconnect": false} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.wal = newWAL(g.size)
				for i := range wal.LSN(6) {
					g.wal.FillTo(origin + 500*(i+1)*8)
				}
				g.publish(1)
				g.start()
				g.wantArchived()
				if restart {
					g.stop()
				}
				before, acked := g.files(), g.last().flush
				g.retell(4, func(w *pgtest.WAL) { w.Append([]byte("the other primary")); w.FillTo(origin + 100<<10) })
				g.srv.Publish(g.wal)
				if restart {
					g.start()
				}
				g.updates()
				for range 3 { // it is looked at again, and stays as it is
					g.sleep(31 * time.Second)
					g.want(Halted, "differs from the archive at timeline 1, 0/4003E80")
				}
				for _, u := range g.updates() {
					if u.flush != 0 {
						t.Errorf("acknowledged to the wrong server: %+v", u)
					}
				}
				if after := g.files(); !maps.Equal(before, after) {
					t.Error("the archive changed")
				}
				if slot := g.slot(); slot.RestartLSN != acked {
					t.Errorf("slot at %s, was at %s", slot.RestartLSN, acked)
				}
				if g.logs.count("level=ERROR") == 0 {
					t.Error("nothing was logged for a person")
				}
			})
		})
	}
}

// At a segment's start there is nothing to compare: what comes has to name our last record as the one before.
func TestOtherServerIsNoticedAtASegmentsStartToo(t *testing.T) {
	for name, end := range map[string]func(w *pgtest.WAL){
		"records end there": func(w *pgtest.WAL) { w.FillTo(origin + mb) },
		"after a switch":    func(w *pgtest.WAL) { w.Switch() },
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				end(g.wal)
				g.publish(1)
				g.switched = append(g.switched, origin+0x670)
				g.start()
				g.want(Streaming)
				before, acked := g.files(), g.slot().RestartLSN
				g.retell(2, func(w *pgtest.WAL) { w.Append([]byte("the other primary")); end(w); w.Append(make([]byte, 500)) })
				g.srv.Publish(g.wal)
				g.restart()
				g.updates()
				g.sleep(time.Minute)
				g.want(Halted, "differs from the archive")
				for _, u := range g.updates() {
					if u.flush != 0 {
						t.Errorf("acknowledged to the wrong server: %+v", u)
					}
				}
				if !maps.Equal(before, g.files()) || g.slot().RestartLSN != acked {
					t.Errorf("the archive changed, or the slot: %s, was %s", g.slot().RestartLSN, acked)
				}
			})
		})
	}
}

// The first segment of an archive can begin inside a record whose beginning nobody has: no CRC speaks for those
// bytes. They are compared all the same.
func TestArchiveThatBeginsInsideARecord(t *testing.T) {
	for name, tt := range map[string]struct {
		fill  byte // of the record across the segment's start, as the server has it after the restart
		state State
	}{"the same server": {7, Streaming}, "another one": {8, Halted}} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				across := func(w *pgtest.WAL, fill byte) {
					w.FillTo(origin + mb - 1000)
					w.Append(bytes.Repeat([]byte{fill}, 20000))
					w.FillTo(origin + mb + 100<<10)
				}
				g.retell(1, func(w *pgtest.WAL) { across(w, 7) })
				g.publish(1)
				g.srv.Do(func(s *pgtest.State) { s.Slots[g.cfg.Slot].RestartLSN = origin + mb })
				g.start()
				g.wantArchived()
				before := g.files()
				g.stop()
				g.retell(1, func(w *pgtest.WAL) { across(w, tt.fill) })
				g.srv.Publish(g.wal)
				g.serve(trickle(g.wal, 8<<10, time.Second))
				g.start()
				g.sleep(29 * time.Second)
				g.want(tt.state)
				if !maps.Equal(before, g.files()) {
					t.Error("the archive changed")
				}
			})
		})
	}
}

// A server that lost power goes on after its last complete record: vanilla PostgreSQL keeps the bytes of the torn
// one and gives it up on the next page, a promoted PolarDB node writes others in their place.
func TestTornRecordIsReplacedByWhatTheServerWroteInstead(t *testing.T) {
	for server, crash := range map[string]func(g *rig){
		"PostgreSQL": func(g *rig) {
			g.retell(3, func(w *pgtest.WAL) { w.Abort(make([]byte, 40000), 3) })
		},
		"PolarDB": func(g *rig) {
			g.retell(3, func(w *pgtest.WAL) { w.Append([]byte("instead")); w.FillTo(origin + 30<<10) })
		},
	} {
		for _, restart := range []bool{true, false} {
			t.Run(server, func(t *testing.T) {
				bubble(t, func(g *rig) {
					g.wal = newWAL(g.size)
					for i := range wal.LSN(3) {
						g.wal.FillTo(origin + 500*(i+1)*8)
					}
					complete := g.wal.End()
					g.wal.Append(make([]byte, 40000))
					g.publishTo(1, origin+3*wal.PageSize)
					g.start()
					if u := g.last(); u.flush != complete || u.write != origin+3*wal.PageSize {
						t.Fatalf("%+v, want the torn record alone unacknowledged", u)
					}
					if restart {
						g.stop()
					}
					crash(g)
					g.publish(1)
					if restart {
						g.start()
					}
					g.sleep(2 * time.Second)
					g.wantArchived()
					g.append(300, 4000)
					g.wantArchived()
					g.restart()
					g.wantArchived()
				})
			})
		}
	}
}
