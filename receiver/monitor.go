package receiver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/walfleet/walfleet/internal/pgrepl"
)

const (
	// monitorTimeout bounds what one host may take to tell of its slot.
	monitorTimeout = 10 * time.Second
	// refusedPause is how long a host is not asked by SQL after it has refused that:
	// each attempt is a line in its log.
	refusedPause = 10 * time.Minute
)

// SlotView is what the monitor knows of our slot on one host of the cluster.
type SlotView struct {
	Host     string    // "host:port"
	Answered time.Time // when the host told what follows; zero: never yet
	// Note is what the host did not tell the last time, and why; empty: it told all.
	Note string
	pgrepl.SlotWatch
}

// The kinds of a Warning.
const (
	WarnSlotLost       = "slot_lost"       // the slot was invalidated: it retains nothing
	WarnSlotUnreserved = "slot_unreserved" // the server is about to remove WAL that the slot needs
	WarnSlotRetained   = "slot_retained"   // the slot retains more than max_slot_retained
)

// Warning is a danger that does not end the archiving and wants a person.
type Warning struct {
	Kind  string
	Host  string // "host:port" of the server that it is about
	Since time.Time
	Text  string
	Hint  string // what a person can do
}

// monitored is what the monitor publishes: values that nobody changes.
type monitored struct {
	slots    []SlotView
	warnings []Warning
}

// monitor watches what our slot costs each host of the cluster, in a goroutine of its
// own: the primary that is archived, its standbys, and an old primary, on which a
// failover left the slot behind.
//
// Each host is asked over a connection of its own, which is closed again. One that is
// kept would be cheaper here, and hold a backend on every server of the fleet for one
// query in half a minute.
type monitor struct {
	*Receiver
	views map[string]SlotView // by host
	quiet map[string]refusal  // hosts that refused SQL
}

// refusal is a host's: until then it is not asked by SQL again.
type refusal struct {
	until time.Time
	note  string
}

// startMonitor begins to watch the slot; stop returns once that has ended.
func (r *Receiver) startMonitor(ctx context.Context) (stop func()) {
	if !r.cfg.Monitor || r.cfg.Slot == "" {
		return func() {}
	}
	ctx, cancel := context.WithCancel(ctx)
	m := &monitor{r, map[string]SlotView{}, map[string]refusal{}}
	var group sync.WaitGroup
	group.Go(func() {
		// The first look comes at any time within the interval, so that those of a
		// fleet do not come together.
		interval := func() time.Duration { return max(r.settings().MonitorInterval, time.Second) }
		for pause := rand.N(interval()); sleep(ctx, pause); pause = interval() {
			m.look(ctx)
		}
	})
	return func() {
		cancel()
		group.Wait()
	}
}

// look asks each host in turn, and publishes what they told. A host that does not
// answer takes monitorTimeout.
func (m *monitor) look(ctx context.Context) {
	defer func() {
		if p := recover(); p != nil {
			_ = m.panicked(p) // the receiving is not concerned
		}
	}()
	conninfo, err := pgrepl.ParseConninfo(m.cfg.Conninfo)
	if err != nil {
		m.log.Debug("monitor", "error", err) // the receiving halts for it
		return
	}
	views := make([]SlotView, 0, len(conninfo.Hosts()))
	for host, name := range conninfo.Hosts() {
		view := m.views[name]
		view.Host = name
		watch, note, err := m.ask(ctx, conninfo, host)
		if ctx.Err() != nil {
			return
		}
		if err == nil {
			view.SlotWatch, view.Answered = watch, time.Now()
		} else {
			note = err.Error()
		}
		if note != m.views[name].Note && note != "" {
			level := slog.LevelDebug
			if _, refused := m.quiet[name]; refused || err == nil { // a person can change that
				level = slog.LevelInfo
			}
			m.log.Log(ctx, level, "the slot's state is not known in full", "host", name, "note", note)
		}
		view.Note = note
		m.views[name] = view
		views = append(views, view)
	}
	m.publish(views)
}

// ask asks one host about the slot: by SQL, and where that is refused over the
// replication protocol, which tells less. note is what is not known then.
func (m *monitor) ask(ctx context.Context, conninfo *pgrepl.Conninfo, host int) (w pgrepl.SlotWatch, note string, err error) {
	ctx, cancel := context.WithTimeout(ctx, monitorTimeout)
	defer cancel()
	o := m.options()
	o.Timeout = monitorTimeout
	name := conninfo.Hosts()[host]
	if time.Now().After(m.quiet[name].until) {
		w, err = watchBySQL(ctx, conninfo, host, m.cfg.Slot, o)
		switch {
		case err == nil && w.Hidden:
			return w, fmt.Sprintf("whether it is a synchronous standby is not shown: GRANT pg_monitor TO %s", conninfo.User()), nil
		case err == nil || !pgrepl.Refused(err):
			return w, "", err
		}
		m.quiet[name] = refusal{time.Now().Add(refusedPause), fmt.Sprintf("wal_status and sync_state are not known, since SQL is refused: %v", err)}
	}
	note = m.quiet[name].note
	w, rerr := watchByReplication(ctx, conninfo, host, m.cfg.Slot, o)
	if errors.Is(rerr, pgrepl.ErrSlotUnreadable) {
		rerr = errors.New(note) // which says why
	}
	return w, note, rerr
}

func watchBySQL(ctx context.Context, conninfo *pgrepl.Conninfo, host int, slot string, o pgrepl.Options) (pgrepl.SlotWatch, error) {
	conn, err := conninfo.ConnectSQL(ctx, host, o)
	if err != nil {
		return pgrepl.SlotWatch{}, err
	}
	defer conn.Close()
	return conn.WatchSlot(ctx, slot)
}

func watchByReplication(ctx context.Context, conninfo *pgrepl.Conninfo, host int, slot string, o pgrepl.Options) (pgrepl.SlotWatch, error) {
	o.ApplicationName = pgrepl.MonitorName
	conn, err := conninfo.Connect(ctx, host, o)
	if err != nil {
		return pgrepl.SlotWatch{}, err
	}
	defer conn.Close()
	id, err := conn.Identify(ctx)
	if err != nil {
		return pgrepl.SlotWatch{}, err
	}
	return conn.WatchSlot(ctx, id, slot)
}

// publish makes views a part of the status, with the warnings that follow from
// them. A warning is logged when it begins and when it has ended.
func (m *monitor) publish(views []SlotView) {
	var before []Warning
	if was := m.monitored.Load(); was != nil {
		before = was.warnings
	}
	archived := ""
	if s := m.state.Load(); s.State == Streaming || s.State == CatchingUp {
		archived = s.Host
	}
	warnings := slotWarnings(m.cfg.Slot, m.settings().MaxSlotRetained, views, archived)
	for i, w := range warnings {
		at := slices.IndexFunc(before, w.sameAs)
		if at >= 0 {
			warnings[i].Since = before[at].Since
			continue
		}
		warnings[i].Since = time.Now()
		m.log.Warn("the slot needs attention", "warning", w.Kind, "host", w.Host, "detail", w.Text, "hint", w.Hint)
	}
	for _, w := range before {
		if !slices.ContainsFunc(warnings, w.sameAs) {
			m.log.Info("the slot needs no attention any more", "warning", w.Kind, "host", w.Host, "since", w.Since)
		}
	}
	m.monitored.Store(&monitored{views, warnings})
}

func (w Warning) sameAs(other Warning) bool { return w.Kind == other.Kind && w.Host == other.Host }

// slotWarnings are the dangers in what the hosts told of a slot that may retain most
// bytes; archived is the host that WAL comes from now, "" if from none: then any of them
// may be the one whose slot the archive needs, and nothing is said of dropping it. That
// a host does not answer any more does not end a danger.
func slotWarnings(slot string, most int64, views []SlotView, archived string) []Warning {
	var all []Warning
	for _, v := range views {
		if !v.Exists {
			continue
		}
		left := archived != "" && v.Host != archived // behind, by a failover
		drop := fmt.Sprintf("SELECT pg_drop_replication_slot('%s')", slot)
		elsewhere := "this host is not archived now; if it will not be soon, drop the slot there: " + drop
		switch {
		case v.Lost() && !left:
			all = append(all, Warning{Kind: WarnSlotLost, Host: v.Host,
				Text: fmt.Sprintf("replication slot %q on %s was invalidated%s: it retains no WAL", slot, v.Host, because(v.Invalid)),
				Hint: "it is made anew at the next connection: restart walfleet, and see with walfleet status whether WAL is missing"})
		case v.Lost():
			all = append(all, Warning{Kind: WarnSlotLost, Host: v.Host,
				Text: fmt.Sprintf("replication slot %q on %s was invalidated%s: it retains no WAL", slot, v.Host, because(v.Invalid)),
				Hint: "it is made anew when this host is archived again; until then it may be dropped: " + drop})
		case v.Status == "unreserved":
			all = append(all, Warning{Kind: WarnSlotUnreserved, Host: v.Host,
				Text: fmt.Sprintf("replication slot %q on %s is about to be invalidated: the next checkpoint may remove WAL that is not archived (%s retained)", slot, v.Host, megabytes(v.Retained)),
				Hint: "raise max_slot_wal_keep_size on the server now, then see why the archive is behind"})
		}
		if most > 0 && v.Retained > most {
			hint := "see why the archive is behind (walfleet status); the server's disk fills up until it has caught up"
			if left {
				hint = elsewhere
			}
			all = append(all, Warning{Kind: WarnSlotRetained, Host: v.Host,
				Text: fmt.Sprintf("replication slot %q retains %s of WAL on %s, more than max_slot_retained = %s", slot, megabytes(v.Retained), v.Host, megabytes(most)),
				Hint: hint})
		}
	}
	return all
}

func because(reason string) string {
	if reason == "" {
		return ""
	}
	return " (" + reason + ")"
}
