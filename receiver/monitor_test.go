package receiver

import (
	"context"
	"fmt"
	"net"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// sqlSlot is what a server's pg_replication_slots has of our slot.
type sqlSlot struct {
	retained atomic.Int64
	status   atomic.Value // string
	asked    atomic.Int64
	refuses  atomic.Bool
	hangs    atomic.Bool
}

// answer makes a scripted server answer the monitor, and nothing else by SQL.
func (s *sqlSlot) answer(srv *pgtest.Server) {
	s.status.Store("reserved")
	srv.OnQuery = func(q pgtest.Query) []pgproto3.BackendMessage {
		if q.Startup["application_name"] != pgrepl.MonitorName || q.Startup["replication"] != "" { // the receiver asks too
			return nil
		}
		s.asked.Add(1)
		for s.hangs.Load() {
			time.Sleep(time.Second)
		}
		if s.refuses.Load() {
			return []pgproto3.BackendMessage{pgtest.Error("42501", "permission denied for view pg_replication_slots")}
		}
		return pgtest.Result("SELECT 1", make([]string, 12), []any{"f", "physical", "0/4000000", fmt.Sprint(s.retained.Load()), s.status.Load(), nil, nil,
			"77", "walfleet", "streaming", "async", "77"})
	}
}

func watchedBy(g *rig, most int64) *sqlSlot {
	g.cfg.Monitor, g.cfg.MonitorInterval, g.cfg.MaxSlotRetained = true, 30*time.Second, most
	s := &sqlSlot{}
	s.answer(g.srv)
	return s
}

// TestSlotIsWatchedOnEveryHost has a slot that an earlier primary keeps, and retains more and more there.
func TestSlotIsWatchedOnEveryHost(t *testing.T) {
	bubble(t, func(g *rig) {
		here := watchedBy(g, 100*mb)
		old := pgtest.NewServer(g, pgtest.State{SystemID: systemID, Standby: true})
		old.Publish(g.wal)
		var there sqlSlot
		there.answer(old)
		g.cfg.Conninfo = "host=here,old,down user=archiver sslmode=disable"
		g.hosts(map[string]*pgtest.Server{"here": g.srv, "old": old})
		g.start()
		here.retained.Store(5 * mb)
		there.retained.Store(100 * mb)
		g.sleep(30 * time.Second)
		s := g.r.Status()
		if len(s.Slots) != 3 || s.Slots[0].Host != "here:5432" || s.Slots[0].Retained != 5*mb || s.Slots[0].SyncState != "async" || s.Slots[0].Note != "" ||
			s.Slots[1].Host != "old:5432" || s.Slots[1].Retained != 100*mb || s.Slots[1].Answered.IsZero() {
			t.Errorf("%+v", s.Slots)
		}
		if down := s.Slots[2]; !down.Answered.IsZero() || !strings.Contains(down.Note, "connection refused") {
			t.Errorf("%+v", down)
		}
		if len(s.Warnings) != 0 {
			t.Errorf("%+v", s.Warnings)
		}

		there.retained.Store(100*mb + 1)
		g.sleep(30 * time.Second)
		s = g.r.Status()
		if len(s.Warnings) != 1 || s.Warnings[0].Kind != WarnSlotRetained || s.Warnings[0].Host != "old:5432" ||
			!strings.Contains(s.Warnings[0].Text, "more than max_slot_retained") || !strings.Contains(s.Warnings[0].Hint, "SELECT pg_drop_replication_slot('walfleet')") {
			t.Fatalf("%+v", s.Warnings)
		}
		since := s.Warnings[0].Since
		if since.IsZero() || time.Since(since) > 30*time.Second {
			t.Errorf("since %s", since)
		}
		there.retained.Store(300 * mb)
		g.sleep(5 * time.Minute)
		g.hosts(map[string]*pgtest.Server{"here": g.srv}) // what is not known has not ended
		old.Disconnect()
		g.sleep(5 * time.Minute)
		s = g.r.Status()
		if len(s.Warnings) != 1 || s.Warnings[0].Since != since || !strings.Contains(s.Warnings[0].Text, "300 MB") {
			t.Errorf("%+v, want one since %s", s.Warnings, since)
		}
		if n := g.logs.count("more than max_slot_retained"); n != 1 {
			t.Errorf("logged %d times", n)
		}
		g.hosts(map[string]*pgtest.Server{"here": g.srv, "old": old})
		there.retained.Store(0)
		g.sleep(time.Minute)
		if s = g.r.Status(); len(s.Warnings) != 0 || g.logs.count("needs no attention any more") != 1 {
			t.Errorf("%+v\n%s", s.Warnings, g.logs.last(5))
		}

		there.status.Store("unreserved")
		here.status.Store("lost")
		g.sleep(time.Minute)
		s = g.r.Status()
		if len(s.Warnings) != 2 || s.Warnings[0].Kind != WarnSlotLost || s.Warnings[1].Kind != WarnSlotUnreserved {
			t.Errorf("%+v", s.Warnings)
		}
	})
}

// TestMonitorNeverDelaysReceiving has a server that takes the monitor's connections, and never answers them.
func TestMonitorNeverDelaysReceiving(t *testing.T) {
	bubble(t, func(g *rig) {
		slot := watchedBy(g, 0)
		slot.hangs.Store(true)
		defer slot.hangs.Store(false)
		g.start()
		for range 20 {
			g.append(2, 300)
			g.sleep(5 * time.Second)
			g.wantArchived()
		}
		if slot.asked.Load() < 2 {
			t.Errorf("asked %d times", slot.asked.Load())
		}
		g.stop() // in the time that the rig allows
	})
}

// deafConn is a connection whose other side never hears the goodbye: the host hangs.
type deafConn struct{ net.Conn }

func (c deafConn) Write(p []byte) (int, error) {
	if len(p) == 5 && p[0] == 'X' { // Terminate
		return len(p), nil
	}
	return c.Conn.Write(p)
}

// TestHostThatHangsDoesNotDelayTheStop stops while the monitor waits for an answer of a host that does not even hang up,
// and takes no cancel request.
func TestHostThatHangsDoesNotDelayTheStop(t *testing.T) {
	bubble(t, func(g *rig) {
		slot := watchedBy(g, 0)
		slot.hangs.Store(true)
		defer slot.hangs.Store(false)
		g.dial = func(ctx context.Context, network, address string) (net.Conn, error) {
			conn, err := g.srv.Dial(ctx, network, address)
			if err == nil && slot.asked.Load() > 0 {
				t.Error("a connection beside the one that hangs")
			}
			return deafConn{conn}, err
		}
		g.start()
		for slot.asked.Load() == 0 {
			g.sleep(time.Second)
		}
		begun := time.Now()
		g.stop()
		if took := time.Since(begun); took > 2*time.Second {
			t.Errorf("stopping took %s", took)
		}
	})
}

// TestServerThatRefusesSQLIsAskedOtherwise has a pg_hba.conf for replication alone: the server's log is not filled with
// refusals, and what the slot retains is known all the same.
func TestServerThatRefusesSQLIsAskedOtherwise(t *testing.T) {
	bubble(t, func(g *rig) {
		slot := watchedBy(g, 1000)
		slot.refuses.Store(true)
		g.start()
		g.sleep(9 * time.Minute)
		if n := slot.asked.Load(); n != 1 {
			t.Errorf("asked %d times in 9 minutes", n)
		}
		g.sleep(2 * time.Minute)
		if n := slot.asked.Load(); n != 2 {
			t.Errorf("asked %d times in 11 minutes", n)
		}
		s := g.r.Status()
		if len(s.Slots) != 1 || !s.Slots[0].Exists || !strings.Contains(s.Slots[0].Note, "permission denied") || s.Slots[0].Answered.IsZero() {
			t.Errorf("%+v", s.Slots)
		}
		if n := g.logs.count("the slot's state is not known in full"); n != 1 {
			t.Errorf("told %d times", n)
		}
	})
}

func TestSlotWarnings(t *testing.T) {
	view := func(change func(v *SlotView)) []SlotView {
		v := SlotView{Host: "db:5432", SlotWatch: pgrepl.SlotWatch{Exists: true, RestartLSN: wal.LSN(mb), Retained: 10 * mb, Status: "reserved"}}
		change(&v)
		return []SlotView{v}
	}
	for _, test := range []struct {
		name     string
		most     int64
		archived string
		views    []SlotView
		kinds    string
		hint     string
	}{
		{"fine", 10 * mb, "db:5432", view(func(*SlotView) {}), "", ""},
		{"no limit", 0, "db:5432", view(func(v *SlotView) { v.Retained = 1 << 50 }), "", ""},
		{"too much", 10*mb - 1, "db:5432", view(func(*SlotView) {}), WarnSlotRetained, "why the archive is behind"},
		{"too much elsewhere", 10*mb - 1, "other:5432", view(func(*SlotView) {}), WarnSlotRetained, "pg_drop_replication_slot('walfleet')"},
		{"too much, and nothing is archived", 10*mb - 1, "", view(func(*SlotView) {}), WarnSlotRetained, "why the archive is behind"},
		{"lost, and nothing is archived", 0, "", view(func(v *SlotView) { v.Status = "lost" }), WarnSlotLost, "restart walfleet"},
		{"no slot", 1, "db:5432", view(func(v *SlotView) { v.Exists = false }), "", ""},
		{"extended", 0, "db:5432", view(func(v *SlotView) { v.Status = "extended" }), "", ""},
		{"unreserved", 0, "db:5432", view(func(v *SlotView) { v.Status = "unreserved" }), WarnSlotUnreserved, "max_slot_wal_keep_size"},
		{"unreserved, too much", 1, "db:5432", view(func(v *SlotView) { v.Status = "unreserved" }), WarnSlotUnreserved + " " + WarnSlotRetained, ""},
		{"lost", 0, "db:5432", view(func(v *SlotView) { v.Status = "lost" }), WarnSlotLost, "restart walfleet"},
		{"invalidated elsewhere", 0, "other:5432", view(func(v *SlotView) { v.Invalid = "idle_timeout" }), WarnSlotLost, "archived again"},
	} {
		var kinds []string
		got := slotWarnings("walfleet", test.most, test.views, test.archived)
		for _, w := range got {
			kinds = append(kinds, w.Kind)
			if w.Host != "db:5432" || w.Text == "" {
				t.Errorf("%s: %+v", test.name, w)
			}
		}
		if test.archived == "" && strings.Contains(got[0].Hint, "drop") {
			t.Errorf("%s: what the archive may need is to be dropped: %+v", test.name, got)
		}
		if strings.Join(kinds, " ") != test.kinds || len(got) > 0 && !strings.Contains(got[0].Hint, test.hint) {
			t.Errorf("%s: %+v", test.name, got)
		}
	}
}
