package receiver

import (
	"slices"
	"sync/atomic"
	"time"

	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/wal"
)

// State is where a receiver is in its life.
type State string

const (
	Connecting State = "connecting"  // reaching a server, or finding the place to start
	CatchingUp State = "catching_up" // receiving WAL that the server wrote earlier
	Streaming  State = "streaming"   // receiving WAL as it is written
	Backoff    State = "backoff"     // failed, and about to try again
	Blocked    State = "blocked"     // waiting for a condition, such as a slot in use elsewhere
	Halted     State = "halted"      // needs a person; checked again now and then
	Stopped    State = "stopped"     // told to stop
)

// Status is one consistent snapshot of a receiver. Nobody may change what its slices
// hold.
type Status struct {
	State  State
	Reason string // in words; empty while all is well
	Hint   string // what a person can do about it; often empty
	// Since is when the state began. Blocked and Halted go on while their condition is looked at again.
	Since time.Time
	// TroubleSince is when WAL stopped being archived: the first of all failures since it was, or the last sign of life
	// of a receiver that its disk holds up. Zero: it is archived.
	TroubleSince time.Time
	Repeats      int64 // failures since then that brought nothing new, and were not logged

	Host          string // "host:port" of the last server that was accepted
	ServerVersion string
	PolarDB       string // polar_version; empty on PostgreSQL
	SystemID      uint64
	SegmentSize   wal.SegmentSize

	Timeline  wal.Timeline
	Written   wal.LSN   // exclusive end of the WAL in the archive's files; 0: not known
	Synced    wal.LSN   // exclusive end of what of it is synced; 0: not known
	Flushed   wal.LSN   // exclusive end of the complete records that are synced, which is what is acknowledged; 0: not known
	ServerEnd wal.LSN   // exclusive end of the server's WAL as last told; 0: not known
	LastData  time.Time // when the last message came
	CaughtUp  time.Time // the archive has all that the server was known to have then; zero: not known since New
	HeldBack  time.Time // when MaxRate last kept from reading; zero: never

	Rate               float64 // bytes a second received lately, over 5 to 15 s; 0 while nothing is streamed
	ReceivedBytes      int64   // WAL received, with what was received again
	ReceivedAgain      int64   // what of it the archive had already, to be compared
	SegmentsSealed     int64
	SegmentsCompressed int64
	CompressBacklog    int64 // sealed segments that wait to be compressed
	Reconnects         int64 // connections that WAL came through, without the first
	Switchovers        int64 // how often streaming went on from another host, or on another timeline
	StatusUpdates      int64 // standby status updates that were sent
	Panics             int64 // faults of walfleet's that ended a session

	Gaps        int64  // that the archive has on record
	DiskFree    int64  // bytes of the archive's file system that are left, when last looked at; -1: not known
	LastError   string // what ended a session last, whatever came after it; "": nothing did
	LastErrorAt time.Time

	Failures map[string]int64 // of attempts and connections, by FailureClasses
	Syncs    SyncTimes        // of the WAL's files

	Slots    []SlotView // of each host of the conninfo, in its order; nil: the monitor has not looked, or is off
	Warnings []Warning  // dangers that do not end the archiving

	halt    int64 // how often it was halted; a decision is about one of them
	looking bool  // Blocked or Halted, and the condition is just looked at again
}

// Lag is the WAL in bytes that the server had, when it last spoke, and the
// archive has not synced.
func (s Status) Lag() int64 {
	if s.ServerEnd <= s.Flushed || s.Flushed == 0 {
		return 0
	}
	return int64(s.ServerEnd - s.Flushed)
}

// Behind is how old, at now, the WAL can be that the archive lacks: what the primary
// would lose of the time before now if it burnt. It is 0 while the cluster streams and
// nothing is missing, and at most twice as long as it should be while WAL is under
// way; known is false when the archive has not caught up since the process was started.
func (s Status) Behind(now time.Time) (d time.Duration, known bool) {
	if s.State == Streaming && s.ServerEnd <= s.Flushed && s.TroubleSince.IsZero() {
		return 0, true
	}
	if s.CaughtUp.IsZero() {
		return 0, false
	}
	return max(now.Sub(s.CaughtUp), 0), true
}

// Status returns the current snapshot. Any goroutine may call it.
func (r *Receiver) Status() Status {
	s := *r.state.Load()
	p := r.progress.load()
	s.Timeline, s.Written, s.Synced, s.Flushed, s.ServerEnd = p.timeline, p.written, p.synced, p.flushed, p.serverEnd
	s.ReceivedBytes, s.ReceivedAgain = p.received, p.again
	s.SegmentsSealed, s.Reconnects = p.sealed, max(p.streams-1, 0)
	s.Panics, s.SegmentsCompressed, s.CompressBacklog = r.panics.Load(), r.compressed.Load(), r.backlog.Load()
	s.Switchovers, s.StatusUpdates, s.Failures, s.Syncs = r.switchovers.Load(), r.statuses.Load(), r.failures.counts(), r.syncs.times()
	s.LastData, s.CaughtUp, s.HeldBack = unixTime(p.lastMessage), unixTime(p.caughtUp), unixTime(p.heldBack)
	s.Gaps, s.DiskFree = r.gaps.Load(), r.room.Load()-1
	if s.State == Streaming || s.State == CatchingUp {
		now := time.Now()
		s.Rate = p.rate(now)
		if last := latest(s.Since, s.LastData, s.HeldBack); now.Sub(last) > r.settings().ReceiveTimeout+stuckAfter {
			s.Reason, s.Hint, s.TroubleSince = reasonStuck, hintDisk, last
		}
	}
	if w := r.monitored.Load(); w != nil {
		s.Slots, s.Warnings = w.slots, w.warnings
	}
	if w := r.unkept.Load(); w != nil {
		s.Warnings = append(slices.Clip(s.Warnings), *w)
	}
	return s
}

// stuckAfter is how long a receiver may take to end a session whose server was silent for receive_timeout. One that
// has not by then waits for something that nothing bounds: its disk.
const stuckAfter = 10 * time.Second

const reasonStuck = "nothing is written any more: the archive's file system does not answer"

func latest(times ...time.Time) (last time.Time) {
	for _, t := range times {
		if t.After(last) {
			last = t
		}
	}
	return last
}

// unixTime is the time of a Unix time in ns, of which 0 is none.
func unixTime(ns int64) time.Time {
	if ns == 0 {
		return time.Time{}
	}
	return time.Unix(0, ns)
}

// setState publishes a transition. Since moves only when the state changes.
func (r *Receiver) setState(state State, reason string) { r.setTrouble(state, reason, "") }

// setTrouble is setState with a hint.
func (r *Receiver) setTrouble(state State, reason, hint string) {
	s := *r.state.Load()
	old := s.State
	if old != state {
		s.Since = time.Now()
	}
	if state == Halted {
		s.halt++
	}
	s.State, s.Reason, s.Hint, s.looking = state, reason, hint, false
	s.TroubleSince, s.Repeats = time.Time{}, 0
	switch state {
	case Connecting, Backoff, Blocked, Halted:
		s.TroubleSince, s.Repeats = r.outage.since, r.outage.repeats
	}
	r.state.Store(&s)
	if old == CatchingUp && state != old {
		r.compressLater(nil, true) // it has waited for this
	}
}

// setFailed publishes what ended a session, and the state that follows from it.
func (r *Receiver) setFailed(state State, err error, hint string) {
	s := *r.state.Load()
	s.LastError, s.LastErrorAt = err.Error(), time.Now()
	r.state.Store(&s)
	r.setTrouble(state, err.Error(), hint)
}

// lookAgain begins an attempt. What needs a person, or waits for a condition, does
// so until the attempt has shown that it is over: nobody is to take a cluster that
// is halted for days for one that has just begun to connect.
func (r *Receiver) lookAgain() {
	s := *r.state.Load()
	if s.State != Halted && s.State != Blocked {
		r.setTrouble(Connecting, s.Reason, s.Hint)
		return
	}
	s.looking = true
	r.state.Store(&s)
}

func (r *Receiver) setServer(host string, id pgrepl.Identity) {
	s := *r.state.Load()
	s.Host, s.ServerVersion, s.PolarDB = host, id.Version, id.PolarDB
	s.SystemID, s.SegmentSize = id.SystemID, id.SegmentSize
	r.state.Store(&s)
}

// progress is what changes with every message.
type progress struct {
	timeline                            wal.Timeline
	written, synced, flushed, serverEnd wal.LSN
	received, again, sealed, streams    int64
	lastMessage, caughtUp, heldBack     int64 // Unix times in ns; 0: never
	// The rate is that since the first of two marks, the last of which is younger
	// than rateWindow while the loop goes round.
	marks [2]mark
}

// mark is how much had been received at a Unix time in ns.
type mark struct{ at, received int64 }

// rateWindow is the least time that a rate is measured over.
const rateWindow = 5 * time.Second

// note takes down what was received by at.
func (p *progress) note(at time.Time) {
	now := at.UnixNano()
	switch {
	case p.marks[1].at == 0:
		p.marks[1] = mark{now, p.received}
		p.marks[0] = p.marks[1]
	case now-p.marks[1].at >= int64(rateWindow):
		p.marks[0], p.marks[1] = p.marks[1], mark{now, p.received}
	}
}

// rate is how many bytes a second were received lately.
func (p *progress) rate(now time.Time) float64 {
	d := now.UnixNano() - p.marks[0].at
	if p.marks[0].at == 0 || d <= 0 {
		return 0
	}
	return float64(p.received-p.marks[0].received) / time.Duration(d).Seconds()
}

// progressCell publishes progress from one writer to any reader, without a lock
// or an allocation: a reader tries again when the sequence number, odd during a
// store, has moved.
type progressCell struct {
	sequence atomic.Uint64
	field    [16]atomic.Uint64
}

func (c *progressCell) store(p progress) {
	c.sequence.Add(1)
	for i, v := range [len(c.field)]uint64{uint64(p.timeline), uint64(p.written), uint64(p.synced), uint64(p.flushed), uint64(p.serverEnd),
		uint64(p.received), uint64(p.again), uint64(p.sealed), uint64(p.streams), uint64(p.lastMessage), uint64(p.caughtUp), uint64(p.heldBack),
		uint64(p.marks[0].at), uint64(p.marks[0].received), uint64(p.marks[1].at), uint64(p.marks[1].received)} {
		if c.field[i].Load() != v { // most stay the same, and a load is cheap
			c.field[i].Store(v)
		}
	}
	c.sequence.Add(1)
}

func (c *progressCell) load() progress {
	for {
		before := c.sequence.Load()
		var v [len(c.field)]uint64
		for i := range c.field {
			v[i] = c.field[i].Load()
		}
		if before%2 == 0 && c.sequence.Load() == before {
			return progress{wal.Timeline(v[0]), wal.LSN(v[1]), wal.LSN(v[2]), wal.LSN(v[3]), wal.LSN(v[4]),
				int64(v[5]), int64(v[6]), int64(v[7]), int64(v[8]), int64(v[9]), int64(v[10]), int64(v[11]),
				[2]mark{{int64(v[12]), int64(v[13])}, {int64(v[14]), int64(v[15])}}}
		}
	}
}
