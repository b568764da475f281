package receiver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"time"

	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/wal"
)

// Bounds on what a synchronous receiver leaves unsynced while more WAL keeps
// coming in.
const (
	maxUnsyncedAge   = 20 * time.Millisecond
	maxUnsyncedBytes = 16 << 20
)

// stream is a session's state while WAL comes in.
type stream struct {
	*session
	*pgrepl.Stream
	in        *Adjustable // the settings that deadlines were made with
	caughtUp  bool
	unsynced  int64     // bytes written since the last flush
	oldest    time.Time // when the first of them came
	lastSent  time.Time // when the last status update went out
	reported  wal.LSN   // the highest flush position so far
	lastHeard time.Time
	asked     bool      // the server was asked for a reply, and has not been heard since
	replying  bool      // to a keepalive that asked for it; all that was received is synced
	silenceAt time.Time // when to look at lastHeard again
	goal      wal.LSN   // where the server's WAL ended at goalAt, and the archive's did not; 0: nothing is remembered
	goalAt    time.Time
	spaceAt   time.Time // when to look at the free space again
	heldAt    time.Time // when max_rate last held reading back
	timer     *time.Timer
	quietly   bool // what comes of missing room is for debugging
}

// receive archives what comes, until the server ends the timeline, ctx is done,
// or an error. Then it flushes what it can.
func (s *session) receive(ctx context.Context, ps *pgrepl.Stream) (pgrepl.NextTimeline, error) {
	now := time.Now()
	st := &stream{session: s, Stream: ps, lastHeard: now}
	s.now.timeline, s.now.serverEnd = s.writer.Timeline(), s.id.XLogPos
	if err := s.setHold(); err != nil {
		return pgrepl.NextTimeline{}, err
	}
	s.mark = max(s.mark, s.writer.Durable())
	s.once(slog.LevelInfo, MsgStreaming, "timeline", s.writer.Timeline(), "lsn", s.writer.Pos(), "server_lsn", s.id.XLogPos, "host", s.conn.Host())
	s.setState(CatchingUp, "")
	err := st.interruptible(ctx)
	ended, reached := errors.Is(err, errTimelineEnded), errors.Is(err, errEndReached)
	if s.writer != nil {
		if ferr := st.flush(); ferr != nil {
			return pgrepl.NextTimeline{}, ferr
		}
	}
	st.publish()
	if s.writer != nil && (err == nil && !errors.Is(context.Cause(ctx), errSuperseded) || reached) {
		defer s.dropWriter() // it is only good for the last status now
		if terr := s.writer.Trim(); terr != nil {
			return pgrepl.NextTimeline{}, terr
		}
	}
	if s.writer != nil && (err == nil || ended || reached || errors.Is(err, pgrepl.ErrShutdown) || pgrepl.Code(err) != "") {
		s.logPartial()
	}
	switch {
	case ended:
		return st.finish(ctx)
	case err == nil: // ctx is done
		return pgrepl.NextTimeline{}, st.goodbye()
	case reached:
		return pgrepl.NextTimeline{}, errors.Join(err, st.goodbye())
	}
	return pgrepl.NextTimeline{}, s.noteGap(ctx, err)
}

// setHold decides from where on flush positions are sent.
func (s *session) setHold() error {
	tli := s.writer.Timeline()
	h, ok, err := s.dir.History(tli)
	if err != nil {
		return err
	}
	if !ok {
		h = s.history // of a later one
	}
	for _, fork := range h.Forks {
		if fork.Timeline < tli {
			s.hold = max(s.hold, fork.End) // may have been acknowledged on the timeline before
		}
	}
	s.hold = max(s.hold, s.writer.Promised())
	if s.writer.Pos() == s.writer.Written() {
		s.hold = max(s.hold, s.writer.Durable()+1) // nothing will be compared: new WAL has to show that it fits
	}
	return nil
}

// interruptible is the loop, with a Receive that ends when ctx is done.
func (s *stream) interruptible(ctx context.Context) error {
	interrupted := make(chan struct{})
	unwatch := context.AfterFunc(ctx, func() {
		defer close(interrupted)
		s.Interrupt(stopTimeout)
	})
	defer func() {
		if !unwatch() {
			<-interrupted
		}
	}()
	s.setReceiving(s.Stream)
	defer s.setReceiving(nil)
	return s.loop(ctx)
}

// errWALThere is what becomes of accepting a gap that is none any more.
var errWALThere = errors.New("the server has the missing WAL again; nothing was recorded")

var errTimelineEnded = errors.New("the server ended the timeline")

// loop receives until ctx is done (nil), or an error.
func (s *stream) loop(ctx context.Context) error {
	if err := s.sendStatus(false); err != nil {
		return err
	}
	for {
		s.takeSettings()
		if err := s.flushIfDue(); err != nil {
			return err
		}
		if err := s.checkEnd(s.writer.Pos()); err != nil {
			return err
		}
		if err := s.statusIfDue(); err != nil {
			return err
		}
		if err := s.awaitSpace(ctx, 1); err != nil {
			return err
		}
		s.noteCaughtUp()
		s.publish()
		if s.cfg.Synchronous && s.caughtUp && s.unsynced == 0 {
			s.writer.Prepare() // for the commits to come
		}
		if s.holdBack(ctx) {
			if ctx.Err() != nil {
				return nil
			}
			continue
		}
		// The deadline is given to the socket before ctx and the settings are looked
		// at; an interruption after that ends the Receive.
		deadline := s.deadline()
		if err := s.SetDeadline(deadline); err != nil {
			return err
		}
		if ctx.Err() != nil {
			return nil
		}
		if s.in != s.settings() {
			continue
		}
		msg, err := s.Receive()
		if errors.Is(err, os.ErrDeadlineExceeded) {
			continue
		}
		if err != nil {
			return err
		}
		if err := s.handle(ctx, msg); err != nil {
			return err
		}
	}
}

// takeSettings goes by the settings that hold now. The server has the time of a new
// receive_timeout to be heard.
func (s *stream) takeSettings() {
	if now := s.settings(); s.in != now {
		if s.in != nil {
			s.lastHeard, s.asked = time.Now(), false
		}
		s.in, s.spaceAt = now, time.Time{}
		s.silenceAt = s.lastHeard.Add(now.ReceiveTimeout / 2)
	}
}

// errEndReached ends the session in which WAL beyond the configuration's EndPos has
// come.
var errEndReached = errors.New("the end position was passed")

// checkEnd returns errEndReached when pos is beyond the end position.
func (s *session) checkEnd(pos wal.LSN) error {
	if s.cfg.EndPos == 0 || pos <= s.cfg.EndPos {
		return nil
	}
	s.log.Info(MsgEndReached, "timeline", s.writer.Timeline(), "lsn", pos)
	return errEndReached
}

func (s *session) logPartial() {
	for _, segment := range s.writer.Partial() {
		s.log.Debug(MsgPartial, "segment", segment.Name(), "timeline", segment.Timeline)
	}
}

// handle takes one message.
func (s *stream) handle(ctx context.Context, msg pgrepl.Message) error {
	s.lastHeard, s.asked = time.Now(), false
	s.now.lastMessage = s.lastHeard.UnixNano()
	if msg.Kind == pgrepl.Done {
		return errTimelineEnded
	}
	s.now.serverEnd = max(s.now.serverEnd, msg.ServerEnd)
	if msg.Kind == pgrepl.Keepalive {
		if !msg.ReplyRequested {
			return nil
		}
		// A server that shuts down waits until everything is flushed.
		if err := s.flush(); err != nil {
			return err
		}
		s.replying = true
		defer func() { s.replying = false }()
		return s.sendStatus(false)
	}
	if msg.Start != s.writer.Pos() {
		return &pgrepl.ProtocolError{Reason: fmt.Sprintf("WAL from %s on came where %s was next", msg.Start, s.writer.Pos())}
	}
	if err := s.awaitSpace(ctx, len(msg.Data)); err != nil || ctx.Err() != nil {
		return err
	}
	s.now.received += int64(len(msg.Data))
	s.pace.took(len(msg.Data))
	before := s.writer.Written()
	if err := s.writer.Write(msg.Start, msg.Data); err != nil {
		s.dropWriter() // its walker may be ahead of its files: it must not seal any more
		return err
	}
	s.answer("", errWALThere)
	if a := s.writer.TakeAborted(); a != nil {
		s.log.Warn("the server replaced the archive's last incomplete record; what the archive had of it is kept aside",
			"timeline", a.Timeline, "lsn", a.LSN, "end", a.End, "file", a.File)
	}
	n := int64(s.writer.Written() - before)
	s.now.again += int64(len(msg.Data)) - n
	if n > 0 {
		if s.unsynced == 0 {
			s.oldest = s.lastHeard
		}
		s.unsynced += n
	}
	return nil
}

// flushIfDue flushes by the cluster's policy, and tells the server at once when
// that moved the flush position.
func (s *stream) flushIfDue() error {
	due := s.writer.SealDue()
	if !due && s.unsynced > 0 {
		age := time.Since(s.oldest)
		if s.cfg.Synchronous {
			due = s.unsynced >= maxUnsyncedBytes || age >= maxUnsyncedAge || s.Drained()
		} else {
			due = s.in.FlushInterval > 0 && age >= s.in.FlushInterval
		}
	}
	if !due {
		return nil
	}
	return s.flush()
}

// flush syncs what is written, and logs what that sealed.
func (s *stream) flush() error {
	sealed, err := s.writer.Flush()
	for _, segment := range sealed {
		s.now.sealed++
		s.log.Info(MsgSealed, "segment", segment.Name(), "timeline", segment.Timeline, "end", segment.End())
	}
	s.compressLater(sealed, false)
	if err != nil {
		s.dropWriter()
		return err
	}
	s.unsynced = 0
	return nil
}

// flushPosition is what may be acknowledged: complete records that are synced;
// nothing while the overlap with the archive is being compared, nor below what
// the archive had before, nor beyond what the server says it has; nothing without
// a slot unless synchronous, for that alone makes a synchronous standby.
//
// A standby that shuts down waits until everything that it sent is acknowledged,
// and its WAL can end inside a record (WalSndDone in walsender.c). Without a
// flush position it goes by the write position, and its slot does not move; so
// that is what it gets then.
func (s *stream) flushPosition() wal.LSN {
	durable := s.writer.Durable()
	if s.cfg.Slot == "" && !s.cfg.Synchronous {
		return 0
	}
	if s.id.InRecovery && s.replying && durable < s.writer.Written() {
		return 0
	}
	if s.writer.Pos() < s.writer.Written() || durable < s.hold {
		return 0
	}
	return min(durable, s.now.serverEnd)
}

// statusIfDue reports a flush position that moved at once, the state of things
// every status interval, and asks a silent server for a reply.
func (s *stream) statusIfDue() error {
	now := time.Now()
	if !now.Before(s.silenceAt) {
		silent := now.Sub(s.lastHeard)
		switch {
		case silent >= s.in.ReceiveTimeout:
			return fmt.Errorf("no message from the server for %s %w", silent.Round(time.Millisecond), errSilent)
		case silent >= s.in.ReceiveTimeout/2:
			s.silenceAt = s.lastHeard.Add(s.in.ReceiveTimeout)
			if !s.asked {
				s.asked = true
				return s.sendStatus(true)
			}
		default:
			s.silenceAt = s.lastHeard.Add(s.in.ReceiveTimeout / 2)
		}
	}
	every := s.statusEvery()
	if s.flushPosition() > s.reported || every > 0 && now.Sub(s.lastSent) >= every {
		return s.sendStatus(false)
	}
	return nil
}

func (s *stream) sendStatus(ask bool) error {
	status := pgrepl.Status{Flush: s.flushPosition(), ReplyRequested: ask}
	if s.now.received > 0 || status.Flush > 0 {
		status.Write = s.writer.Pos()
	}
	if err := s.SendStatus(status); err != nil {
		return err
	}
	s.statuses.Add(1)
	s.lastSent, s.reported = time.Now(), max(s.reported, status.Flush)
	return nil
}

// deadline is when something is to be done even if no message comes. It stays
// the same over many messages: moving it costs more than waking up for nothing.
func (s *stream) deadline() time.Time {
	d := s.silenceAt
	if every := s.statusEvery(); every > 0 {
		d = earlier(d, s.lastSent.Add(every))
	}
	patience := s.in.FlushInterval
	if s.cfg.Synchronous {
		patience = maxUnsyncedAge
	}
	if s.unsynced > 0 && patience > 0 {
		d = earlier(d, s.oldest.Add(patience))
	}
	return d
}

func earlier(a, b time.Time) time.Time {
	if b.Before(a) {
		return b
	}
	return a
}

// place is where WAL comes from.
type place struct {
	host     string
	timeline wal.Timeline
}

// noteCaughtUp turns catching_up into streaming once the archive has all that
// the server had.
func (s *stream) noteCaughtUp() {
	if s.caughtUp || s.writer.Timeline() < s.id.Timeline || s.writer.Pos() < s.now.serverEnd {
		return
	}
	s.caughtUp = true
	here := place{s.state.Load().Host, s.writer.Timeline()}
	if s.streamed != here && s.streamed != (place{}) {
		s.switchovers.Add(1)
	}
	s.streamed = here
	s.setState(Streaming, "")
	attrs := []any{"timeline", s.writer.Timeline(), "lsn", s.writer.Pos()}
	s.log.Log(context.Background(), s.level(slog.LevelInfo), "caught up, streaming", append(attrs, s.outage.attrs()...)...)
	s.outage, s.quietly = outage{}, false
}

func (s *stream) publish() {
	if s.writer != nil {
		s.now.written, s.now.flushed = s.writer.Written(), s.writer.Durable()
		if s.unsynced == 0 {
			s.now.synced = s.now.written
		}
	}
	at := s.lastHeard // or whatever else made the loop go round last
	if s.lastSent.After(at) {
		at = s.lastSent
	}
	s.now.note(at)
	s.noteAge(at)
	s.Receiver.progress.store(s.now)
}

// noteAge takes down since when the archive has all that the server had. While WAL
// keeps coming it never has quite all, so what the server had at one time is
// remembered until the archive has that.
func (s *stream) noteAge(at time.Time) {
	if s.now.flushed >= s.goal && s.goal != 0 {
		s.now.caughtUp = s.goalAt.UnixNano()
		s.goal = 0
	}
	switch {
	case s.now.flushed >= s.now.serverEnd && s.now.lastMessage != 0:
		s.now.caughtUp = s.now.lastMessage
	case s.goal == 0:
		s.goal, s.goalAt = s.now.serverEnd, at
	}
}

// finish ends a timeline together with the server.
func (s *stream) finish(ctx context.Context) (pgrepl.NextTimeline, error) {
	pos := s.writer.Pos()
	next, err := s.Finish(ctx)
	if err != nil {
		return next, err
	}
	if next.Timeline != 0 && next.Start > pos {
		return next, &pgrepl.ProtocolError{Reason: fmt.Sprintf("timeline %d is said to begin at %s, but the old one ended at %s", next.Timeline, next.Start, pos)}
	}
	s.log.Info("end of timeline", "timeline", s.writer.Timeline(), "lsn", pos, "next_timeline", next.Timeline, "fork", next.Start)
	return next, nil
}

// goodbye sends a last status and ends the stream, within stopTimeout.
func (s *stream) goodbye() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	if err := s.sendStatus(false); err != nil {
		return err
	}
	_, err := s.Finish(ctx)
	return err
}
