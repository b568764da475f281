package receiver

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/walfleet/walfleet/internal/pgtest"
)

// lines are those of the log at the level of people that hold words.
func (l *logs) lines(words string) (all []string) {
	for line := range strings.Lines(l.String()) {
		if !strings.Contains(line, "level=DEBUG") && strings.Contains(line, words) {
			all = append(all, line)
		}
	}
	return all
}

// Trouble is told when it is new. What comes again is counted, in the status and in the next line.
func TestRepeatsAreCountedAndNotRepeated(t *testing.T) {
	bubble(t, func(g *rig) {
		refuse := func(code, text string) {
			g.srv.Do(func(s *pgtest.State) { s.StartupError = pgtest.Fatal(code, "%s", text) })
		}
		refuse("57P03", "starting up")
		begun := time.Now()
		g.start()
		g.sleep(5 * time.Minute)
		s := g.r.Status()
		if s.Repeats < 5 || !s.TroubleSince.Equal(begun) {
			t.Errorf("%d repeats since %s", s.Repeats, s.TroubleSince)
		}
		if got := g.logs.lines("not archiving"); len(got) != 1 {
			t.Errorf("%d lines: %q", len(got), got)
		}
		// Two that take turns are told once each.
		for i := range 40 {
			refuse([]string{"57P01", "57P03"}[i%2], "one or the other")
			g.sleep(20 * time.Second)
		}
		got := g.logs.lines("not archiving")
		if len(got) != 2 || !strings.Contains(got[1], fmt.Sprintf("repeated_before=%d", s.Repeats)) {
			t.Errorf("%d repeats, and then %d lines: %q", s.Repeats, len(got), got)
		}
		refuse("28000", "no pg_hba.conf entry")
		g.sleep(5 * time.Minute)
		s = g.r.Status()
		if got := g.logs.lines("not archiving"); len(got) != 3 || !strings.Contains(got[2], "level=ERROR") || !strings.Contains(got[2], "repeated_before=") {
			t.Errorf("%q", got)
		}
		if s.State != Halted || !s.TroubleSince.Equal(begun) || s.Repeats < 20 {
			t.Errorf("%+v", s)
		}
		g.srv.Do(func(s *pgtest.State) { s.StartupError = nil })
		g.sleep(haltedRetry)
		g.wantArchived()
		if s := g.r.Status(); s.Repeats != 0 || !s.TroubleSince.IsZero() || s.Reason != "" {
			t.Errorf("%+v", s)
		}
		if got := g.logs.lines("caught up"); len(got) != 1 || !strings.Contains(got[0], "failures=") || !strings.Contains(got[0], "not_archiving_for=") {
			t.Errorf("%q", got)
		}
		// The next trouble is news.
		g.sleep(time.Minute)
		refuse("28000", "no pg_hba.conf entry")
		g.srv.Disconnect()
		g.sleep(time.Minute)
		if got := g.logs.lines("not archiving"); len(got) != 5 { // the lost connection too
			t.Errorf("%q", got)
		}
	})
}

// Sessions that get as far again and again say so once.
func TestSessionsInAnOutageAreToldOnce(t *testing.T) {
	bubble(t, func(g *rig) {
		g.serve(func(*pgtest.Stream) { time.Sleep(time.Second) }) // nothing comes
		g.start()
		g.sleep(5 * time.Minute)
		for _, msg := range []string{"msg=" + MsgConnected, MsgStreaming, "not archiving"} {
			if got := g.logs.lines(msg); len(got) != 1 {
				t.Errorf("%d lines: %q", len(got), got)
			}
		}
		if n := len(g.srv.Streams()); n < 10 {
			t.Errorf("only %d sessions", n)
		}
		g.serve(nil)
		g.sleep(time.Minute)
		g.wantArchived()
		g.srv.Disconnect()
		g.sleep(time.Minute)
		g.wantArchived()
		if got := g.logs.lines("msg=" + MsgConnected); len(got) != 2 {
			t.Errorf("a new connection is not told: %q", got)
		}
	})
}

// A cluster that is halted, or waits for a condition, is so without a break until that is over, although it is
// looked at again and again.
func TestStateHoldsWhileItIsLookedAtAgain(t *testing.T) {
	for name, tt := range map[string]struct {
		state      State
		begin, end func(s *pgtest.State)
	}{
		"halted": {Halted, func(s *pgtest.State) { s.Password = "other" }, func(s *pgtest.State) { s.Password = "" }},
		"blocked": {Blocked, func(s *pgtest.State) { s.Slots["walfleet"].ActivePID = 99 },
			func(s *pgtest.State) { s.Slots["walfleet"].ActivePID = 0 }},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.srv.Do(tt.begin)
				g.srv.OnQuery = func(pgtest.Query) []pgproto3.BackendMessage { time.Sleep(50 * time.Millisecond); return nil }
				g.start()
				g.sleep(2 * time.Second)
				g.want(tt.state)
				since := g.r.Status().Since
				looked := false
				for range 3000 {
					g.sleep(37 * time.Millisecond)
					s := g.r.Status()
					if s.State != tt.state || !s.Since.Equal(since) || s.Reason == "" {
						t.Fatalf("%+v, want %s since %s", s, tt.state, since)
					}
					if s.looking {
						looked = true
						if _, err := g.r.Decide(t.Context(), AcceptGap); err == nil {
							t.Error("something was decided while it was looked at")
						}
					}
				}
				if !looked && tt.state == Blocked {
					t.Error("it was never looked at again")
				}
				g.srv.Do(tt.end)
				g.sleep(haltedRetry + 2*time.Second)
				g.wantArchived()
			})
		})
	}
}

// The pauses begin anew after WAL was streamed for a while. Connecting slowly is not that.
func TestSlowConnectionsDoNotResetTheBackoff(t *testing.T) {
	bubble(t, func(g *rig) {
		g.srv.OnQuery = func(q pgtest.Query) []pgproto3.BackendMessage {
			if q.SQL == "IDENTIFY_SYSTEM" {
				time.Sleep(sustained + time.Second)
			}
			return nil
		}
		g.serve(func(st *pgtest.Stream) { time.Sleep(time.Second) })
		g.start()
		var pauses time.Duration
		for range 200 {
			for g.r.Status().State != Backoff {
				g.sleep(100 * time.Millisecond)
			}
			begun := time.Now()
			for g.r.Status().State == Backoff {
				g.sleep(100 * time.Millisecond)
			}
			pauses += time.Since(begun)
		}
		if mean := pauses / 200; mean < 5*time.Second {
			t.Errorf("the mean pause is %s", mean)
		}
	})
}

// What is free may go up and down around min_free. That is told now and then.
func TestRoomThatComesAndGoesIsToldNowAndThen(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.MinFree = 10 * mb
		g.start()
		g.wantArchived()
		begun := time.Now()
		for range 50 {
			g.room.Store(9 * mb)
			g.sleep(3 * time.Second)
			g.append(1, 100)
			g.sleep(3 * time.Second)
			g.want(Blocked, "min_free")
			if s := g.r.Status(); !strings.Contains(s.Hint, "make room") || s.TroubleSince.IsZero() {
				t.Fatalf("%+v", s)
			}
			g.room.Store(0)
			g.sleep(2 * time.Second)
			g.wantArchived()
		}
		most := int(time.Since(begun)/spaceNews) + 1
		for _, words := range []string{"not archiving", "room again"} {
			got := g.logs.lines(words)
			if len(got) < 2 || len(got) > most {
				t.Errorf("%d lines in %s: %q", len(got), time.Since(begun), got)
			}
			if words == "not archiving" && !strings.Contains(got[1], "repeated_before=") {
				t.Errorf("%q does not tell how often", got[1])
			}
		}
	})
}
