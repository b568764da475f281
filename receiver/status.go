package receiver

import (
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

// Status is one consistent snapshot of a receiver.
type Status struct {
	State  State
	Reason string // in words; empty while all is well
	Since  time.Time

	Host          string // "host:port" of the last server that was accepted
	ServerVersion string
	PolarDB       string // polar_version; empty on PostgreSQL
	SystemID      uint64
	SegmentSize   wal.SegmentSize

	Timeline  wal.Timeline
	Written   wal.LSN   // exclusive end of the WAL in the archive's files; 0: not known
	Flushed   wal.LSN   // exclusive end of the complete records that are synced; 0: not known
	ServerEnd wal.LSN   // exclusive end of the server's WAL as last told; 0: not known
	LastData  time.Time // when the last message came

	ReceivedBytes      int64 // WAL received, with what was received again
	SegmentsSealed     int64
	SegmentsCompressed int64
	Reconnects         int64 // connections that WAL came through, without the first
	Panics             int64 // faults of walfleet's that ended a session
}

// Lag is the WAL in bytes that the server had, when it last spoke, and the
// archive has not synced.
func (s Status) Lag() int64 {
	if s.ServerEnd <= s.Flushed || s.Flushed == 0 {
		return 0
	}
	return int64(s.ServerEnd - s.Flushed)
}

// Status returns the current snapshot. Any goroutine may call it.
func (r *Receiver) Status() Status {
	s := *r.state.Load()
	p := r.progress.load()
	s.Timeline, s.Written, s.Flushed, s.ServerEnd = p.timeline, p.written, p.flushed, p.serverEnd
	s.ReceivedBytes, s.SegmentsSealed, s.Reconnects = p.received, p.sealed, max(p.streams-1, 0)
	s.Panics, s.SegmentsCompressed = r.panics.Load(), r.compressed.Load()
	if p.lastMessage != 0 {
		s.LastData = time.Unix(0, p.lastMessage)
	}
	return s
}

// setState publishes a transition. Since moves only when the state changes.
func (r *Receiver) setState(state State, reason string) {
	s := *r.state.Load()
	old := s.State
	if old != state {
		s.Since = time.Now()
	}
	s.State, s.Reason = state, reason
	r.state.Store(&s)
	if old == CatchingUp && state != old {
		r.compressLater(nil, true) // it has waited for this
	}
}

func (r *Receiver) setServer(host string, id pgrepl.Identity) {
	s := *r.state.Load()
	s.Host, s.ServerVersion, s.PolarDB = host, id.Version, id.PolarDB
	s.SystemID, s.SegmentSize = id.SystemID, id.SegmentSize
	r.state.Store(&s)
}

// progress is what changes with every message.
type progress struct {
	timeline                    wal.Timeline
	written, flushed, serverEnd wal.LSN
	received, sealed, streams   int64
	lastMessage                 int64 // Unix time in ns; 0: never
}

// progressCell publishes progress from one writer to any reader, without a lock
// or an allocation: a reader tries again when the sequence number, odd during a
// store, has moved.
type progressCell struct {
	sequence atomic.Uint64
	field    [8]atomic.Uint64
}

func (c *progressCell) store(p progress) {
	c.sequence.Add(1)
	for i, v := range [...]uint64{uint64(p.timeline), uint64(p.written), uint64(p.flushed), uint64(p.serverEnd),
		uint64(p.received), uint64(p.sealed), uint64(p.streams), uint64(p.lastMessage)} {
		c.field[i].Store(v)
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
			return progress{wal.Timeline(v[0]), wal.LSN(v[1]), wal.LSN(v[2]), wal.LSN(v[3]), int64(v[4]), int64(v[5]), int64(v[6]), int64(v[7])}
		}
	}
}
