package receiver

import (
	"bytes"
	"errors"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

const kb = 1 << 10

var errUnreachable = errors.New("no route to host")

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
		s.Histories = maps.Clone(histories)
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
