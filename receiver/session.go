package receiver

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/wal"
)

// session is one connection to a server, from connecting to its end.
type session struct {
	*Receiver
	conninfo  *pgrepl.Conninfo
	candidate // the host that was taken
	// alternative says that another host fits too, and has not been tried in vain.
	alternative bool
}

// session connects and archives until something ends it. since is when streaming
// began; zero: it did not. When ctx is done, what was received is flushed and
// the server is told before it returns.
func (r *Receiver) session(ctx context.Context) (since time.Time, err error) {
	r.lookAgain()
	if r.dir == nil {
		open := archive.Open
		if r.cfg.NoSync {
			open = archive.OpenUnsynced
		}
		func() {
			defer r.custody.take()()
			r.dir, err = open(r.cfg.Dir)
		}()
		if err != nil {
			return since, err
		}
		r.dir.ObserveSyncs(r.syncs.add)
		r.startCompressing() // the server may be away for long
	}
	r.gaps.Store(int64(len(r.dir.Gaps())))
	if free, err := r.dir.Free(); err == nil { // the server may be away for long
		r.room.Store(free + 1)
	}
	s := &session{Receiver: r}
	if err := s.connect(ctx); err != nil {
		return since, err
	}
	defer s.conn.Close()
	defer func() { err = s.judgeHost(err) }()
	s.setServer(s.conn.Host(), s.id)
	s.logConnected()
	r.dir.SetGroupReadable(s.id.GroupReadable)
	if err := s.storeHistories(ctx); err != nil {
		return since, err
	}
	if err := s.chooseStart(ctx); err != nil {
		return since, err
	}
	r.startCompressing()
	r.compressLater(nil, true) // opening the writer may have sealed some
	if err := r.writer.Unsound(); err != nil {
		r.once(slog.LevelError, "the archive goes on behind a file that needs a person", "error", err)
	}
	ctx, leave := context.WithCancelCause(ctx)
	defer leave(nil)
	wait := s.watchHosts(ctx, leave)
	defer wait()
	defer leave(nil) // before the wait
	for {
		s.log.Debug(MsgStarting, "timeline", s.writer.Timeline(), "lsn", s.writer.Pos())
		if err := s.checkEnd(s.id.SegmentSize.Start(s.writer.Pos())); err != nil {
			return since, err
		}
		stream, next, err := s.start(ctx)
		if err != nil {
			return since, err
		}

		if stream != nil {
			if since.IsZero() {
				s.now.streams++
				since = time.Now()
			}
			next, err = s.receive(ctx, stream)
			if err == nil {
				err = context.Cause(ctx)
			}
			if err != nil {
				return since, err
			}
		}
		if next.Timeline == 0 {
			// A PolarDB read-only node was promoted; its timeline stays.
			return since, &refusedError{"the server ended the stream and named no next timeline"}
		}
		if err := s.follow(ctx, next); err != nil {
			return since, err
		}
	}
}

// judgeHost remembers a host whose WAL is not the archive's. It is passed over
// while there is another one: of two PolarDB primaries on one timeline, this may
// be the old one.
func (s *session) judgeHost(err error) error {
	var diverged *archive.DivergenceError
	if !errors.As(err, &diverged) {
		return err
	}
	s.stray[s.conn.Host()] = s.id.Timeline
	if !s.alternative {
		s.others = map[string]wal.Timeline{}
		for _, host := range s.conninfo.Hosts() {
			if host != s.conn.Host() {
				s.others[host] = s.id.Timeline
			}
		}
		return err
	}
	s.dropWriter() // it may have followed the other's WAL
	return &strayHostError{s.conn.Host(), err}
}

func archiveIdentity(id pgrepl.Identity) archive.Identity {
	return archive.Identity{SystemID: id.SystemID, SegmentSize: id.SegmentSize}
}

func (s *session) logConnected() {
	attrs := []any{"host", s.conn.Host(), "server_version", s.id.Version, "system_identifier", s.id.SystemID,
		"timeline", s.id.Timeline, "lsn", s.id.XLogPos, "segment_size", int64(s.id.SegmentSize), "slot", s.cfg.Slot}
	if s.id.PolarDB != "" {
		attrs = append(attrs, "polardb", s.id.PolarDB)
	}
	if s.id.InRecovery {
		attrs = append(attrs, "role", "standby")
	}
	s.once(slog.LevelInfo, MsgConnected, attrs...)
}

// storeHistories stores the history of the server's timeline, and those of its
// ancestors where the server still has them.
func (s *session) storeHistories(ctx context.Context) error {
	if s.historyFile != nil {
		if _, err := s.dir.StoreHistory(s.id.Timeline, s.historyFile); err != nil {
			return err
		}
	}
	for _, fork := range s.history.Forks {
		if _, ok, err := s.dir.History(fork.Timeline); err != nil || ok {
			if err != nil {
				return err
			}
			continue
		}
		_, err := s.fetchHistory(ctx, fork.Timeline)
		if pgrepl.Code(err) == pgrepl.CodeUndefinedFile {
			s.once(slog.LevelWarn, "the server does not have the history of an older timeline", "timeline", fork.Timeline)
			continue
		}
		if err != nil {
			return err
		}
	}
	return nil
}

// fetchHistory stores a timeline's history and returns it; one that is stored
// already must be the same. Timeline 1 has none.
func (s *session) fetchHistory(ctx context.Context, tli wal.Timeline) (wal.History, error) {
	if tli == 1 {
		return wal.History{Timeline: 1}, nil
	}
	data, err := s.conn.TimelineHistory(ctx, tli)
	if err != nil {
		return wal.History{}, err
	}
	return s.dir.StoreHistory(tli, data)
}

// chooseStart opens the writer at the archive's own tail; at the slot's
// restart_lsn when the archive is empty; else at the server's current position.
func (s *session) chooseStart(ctx context.Context) error {
	if s.writer == nil {
		tail, ok, err := s.dir.Tail(s.id.SegmentSize)
		if err != nil {
			return err
		}
		if !ok {
			return s.begin(ctx)
		}
		if !s.dir.Bound() {
			if err := s.bind(tail.First.Timeline, tail.First.Start, "existing files"); err != nil {
				return err
			}
		}
		writer, err := s.dir.OpenWriter(ctx, archiveIdentity(s.id), tail.Timeline, tail.Start)
		if err != nil {
			return err
		}
		s.writer = writer
	} else {
		s.writer.Rewind()
	}
	return s.checkHistory(ctx)
}

// gapEnd is where an archive that ends at from can go on when the server no longer
// has the WAL that comes next: the start of a segment, with its timeline.
func (s *session) gapEnd(ctx context.Context, conn *pgrepl.Conn, from wal.LSN) (wal.Timeline, wal.LSN) {
	lsn := s.id.XLogPos
	if slot, err := s.readSlot(ctx, conn); err == nil && slot.RestartLSN > from && !slot.Lost {
		lsn = slot.RestartLSN
	}
	return s.history.At(lsn), s.id.SegmentSize.Start(lsn)
}

// checkHistory makes sure that the server continues what the archive has.
func (s *session) checkHistory(ctx context.Context) error {
	tli, end := s.writer.Timeline(), s.writer.Durable()
	if tli == s.id.Timeline {
		if s.id.XLogPos < end {
			return s.behind(end)
		}
		return nil
	}
	fork, _ := s.history.End(tli) // connect made sure that it is there
	if end <= fork {
		return nil // the server still streams the old timeline up to its end
	}
	// The tail of a primary that died: it stays under its own timeline, and is
	// never acknowledged on the new one.
	next, _ := s.history.Next(tli)
	s.log.Warn("the archive has WAL that the new timeline does not contain; it is kept under the old one",
		"timeline", tli, "from", fork, "to", s.writer.Written(), "next_timeline", next)
	return s.follow(ctx, pgrepl.NextTimeline{Timeline: next, Start: fork})
}

func (s *session) behind(end wal.LSN) error {
	if s.id.InRecovery {
		return &refusedError{fmt.Sprintf("the server's WAL ends at %s on timeline %d, before the archive's end %s: the standby is behind", s.id.XLogPos, s.id.Timeline, end)}
	}
	return &archive.DivergenceError{Timeline: s.id.Timeline, LSN: s.id.XLogPos,
		Reason: fmt.Sprintf("the server's WAL ends there, before the archive's end %s", end)}
}

// begin decides where an empty archive starts, and writes that down. One that
// was begun and has no segment yet starts where it was going to.
func (s *session) begin(ctx context.Context) error {
	tli, start, bound := s.dir.Origin()
	if !bound {
		lsn, source, err := s.firstPosition(ctx)
		if err != nil {
			return err
		}
		tli, start = s.history.At(lsn), s.id.SegmentSize.Start(lsn)
		if err := s.bind(tli, start, source); err != nil {
			return err
		}
	}
	writer, err := s.dir.OpenWriter(ctx, archiveIdentity(s.id), tli, start)
	if err != nil {
		return err
	}
	s.writer = writer
	return nil
}

func (s *session) bind(tli wal.Timeline, start wal.LSN, source string) error {
	s.log.Info("archive begins", "timeline", tli, "lsn", start, "source", source, "directory", s.dir.Path())
	return s.dir.Bind(archiveIdentity(s.id), archive.Origin{Timeline: tli, LSN: start, Source: source, Time: time.Now()})
}

// readSlot reads the slot on conn, as far as that may be done: one that is not asked
// about exists, and retains nothing that is known.
func (s *session) readSlot(ctx context.Context, conn *pgrepl.Conn) (pgrepl.Slot, error) {
	if s.cfg.Slot == "" || s.cfg.SlotAsIs && s.id.Major < 15 {
		return pgrepl.Slot{Exists: true}, nil
	}
	return conn.ReadSlot(ctx, s.id, s.cfg.Slot)
}

// firstPosition is the oldest WAL that the slot retains, and makes the slot when
// it is missing.
func (s *session) firstPosition(ctx context.Context) (lsn wal.LSN, source string, err error) {
	slot, err := s.readSlot(ctx, s.conn)
	if readErr := err; errors.Is(err, pgrepl.ErrSlotUnreadable) {
		if err := s.createSlot(ctx); err != nil {
			return 0, "", &slotError{fmt.Sprintf("where the WAL of replication slot %q begins cannot be read on PostgreSQL %d (%v), and it could not be created (%v): "+
				"let the role connect to a database as well, or drop the slot if nothing needs its WAL", s.cfg.Slot, s.id.Major, readErr, err)}
		}
		return s.id.XLogPos, "current position", nil
	}
	if err != nil {
		return 0, "", err
	}
	if !slot.Exists {
		if err := s.createSlot(ctx); err != nil {
			return 0, "", err
		}
		if slot, err = s.conn.ReadSlot(ctx, s.id, s.cfg.Slot); err != nil {
			return 0, "", err
		}
	}
	if slot.RestartLSN == 0 {
		return s.id.XLogPos, "current position", nil
	}
	return slot.RestartLSN, "slot", nil
}

func (s *session) createSlot(ctx context.Context) error {
	if s.cfg.SlotAsIs {
		return &slotError{fmt.Sprintf("replication slot \"%s\" does not exist", s.cfg.Slot)}
	}
	if !s.cfg.CreateSlot {
		return &slotError{fmt.Sprintf("replication slot %q does not exist, and create_slot is false: create it with SELECT pg_create_physical_replication_slot('%s', true)", s.cfg.Slot, s.cfg.Slot)}
	}
	if err := s.conn.CreateSlot(ctx, s.cfg.Slot, true); err != nil {
		return err
	}
	s.log.Info("replication slot created", "slot", s.cfg.Slot)
	return nil
}

// start begins streaming where the writer stands. A slot that is missing or was
// invalidated is made anew: the server then says whether it still has the WAL.
func (s *session) start(ctx context.Context) (*pgrepl.Stream, pgrepl.NextTimeline, error) {
	tli, pos := s.writer.Timeline(), s.writer.Pos()
	if s.cfg.SlotAsIs || s.cfg.Slot == "" {
		stream, next, err := s.conn.StartStream(ctx, s.cfg.Slot, tli, pos)
		return stream, next, s.noteGap(ctx, err)
	}
	if err := s.renewLostSlot(ctx); err != nil {
		return nil, pgrepl.NextTimeline{}, err
	}
	stream, next, err := s.conn.StartStream(ctx, s.cfg.Slot, tli, pos)
	var renewed error
	switch pgrepl.Code(err) {
	case pgrepl.CodeUndefinedObject:
		renewed = s.createSlot(ctx)
	case pgrepl.CodeNotPrerequisite: // up to PostgreSQL 16 this is how an invalidated slot shows
		slot, rerr := s.conn.ReadSlot(ctx, s.id, s.cfg.Slot)
		if rerr != nil || !slot.Exists || slot.RestartLSN != 0 && !slot.Lost {
			return nil, next, err
		}
		renewed = s.renewSlot(ctx)
	default:
		return stream, next, s.noteGap(ctx, err)
	}
	if renewed != nil {
		return nil, next, renewed
	}
	stream, next, err = s.conn.StartStream(ctx, s.cfg.Slot, tli, pos)
	return stream, next, s.noteGap(ctx, err)
}

// renewLostSlot makes an invalidated slot anew. PostgreSQL 17 and later let one
// stream, and show its restart_lsn, while it retains nothing; where
// pg_replication_slots cannot be read, that goes unnoticed.
func (s *session) renewLostSlot(ctx context.Context) error {
	if s.id.Major < 17 {
		return nil
	}
	slot, err := s.conn.SelectSlot(ctx, s.cfg.Slot)
	if errors.Is(err, pgrepl.ErrSlotUnreadable) {
		s.log.Debug("whether the slot is still valid is not known", "error", err)
		return nil
	}
	if err != nil || !slot.Lost {
		return err
	}
	return s.renewSlot(ctx)
}

// renewSlot replaces our slot, which retains nothing any more.
func (s *session) renewSlot(ctx context.Context) error {
	s.log.Warn("the replication slot was invalidated and retains no WAL; it is made anew", "slot", s.cfg.Slot)
	if !s.cfg.CreateSlot {
		return &slotError{fmt.Sprintf("replication slot %q was invalidated, and create_slot is false: drop it, and create it again", s.cfg.Slot)}
	}
	if err := s.conn.DropSlot(ctx, s.cfg.Slot); err != nil {
		return err
	}
	return s.createSlot(ctx)
}

// noteGap recognises that the server no longer has the WAL that comes next. It
// says so when streaming starts, or as the first thing in the stream. A gap that
// was accepted is written down.
func (s *session) noteGap(ctx context.Context, err error) error {
	if s.writer == nil || pgrepl.Code(err) != pgrepl.CodeUndefinedFile {
		return err
	}
	gap := &gapError{tli: s.writer.Timeline(), next: s.writer.Durable(), err: err}
	tli := gap.tli
	// How much is missing is asked on a new connection: this one may still be in
	// the middle of a stream.
	if conn, err := s.conninfo.Connect(ctx, s.host, s.options()); err == nil {
		defer conn.Close()
		tli, gap.to = s.gapEnd(ctx, conn, gap.next)
	}
	if gap.to <= gap.next {
		return gap // not known, or in the segment that the server writes: nothing to go on from yet
	}
	switch {
	case s.settings().OnGap == GapRecord:
		return s.recordGap(gap, tli, "on_gap")
	case s.accepted != nil && s.accepted.tli == gap.tli && s.accepted.next == gap.next:
		return s.recordGap(gap, tli, string(AcceptGap))
	}
	return gap
}

// errGapRecorded ends the session in which a gap was written down; the next one
// begins behind it.
var errGapRecorded = errors.New("a gap was recorded, the archive goes on behind it")

// recordGap writes down that the WAL of a gap is missing for good, and by whose
// decision. The archive goes on with timeline tli.
func (s *session) recordGap(gap *gapError, tli wal.Timeline, by string) error {
	reason := fmt.Sprintf("%v (accepted by %s)", gap.err, by)
	if err := s.dir.RecordGap(archive.Gap{Timeline: tli, From: gap.next, To: gap.to, Reason: reason, Time: time.Now()}); err != nil {
		return err
	}
	s.gaps.Add(1)
	s.log.Error("gap recorded: this WAL is missing in the archive for good, and no recovery can pass it; take a base backup now",
		"timeline", tli, "from", gap.next, "to", gap.to, "by", by)
	s.answer(fmt.Sprintf("gap recorded: WAL from %s to %s is missing for good, the archive goes on with timeline %d; no recovery can pass the gap: take a base backup now",
		gap.next, gap.to, tli), nil)
	s.dropWriter()
	s.hold = 0
	return errGapRecorded
}

// follow goes on with the next timeline, from the start of the segment in which
// it forks. The old .partial stays as it is.
func (s *session) follow(ctx context.Context, next pgrepl.NextTimeline) error {
	old := s.writer
	if next.Timeline <= old.Timeline() {
		return &historyError{fmt.Sprintf("the server names %d as the timeline after %d", next.Timeline, old.Timeline())}
	}
	switch _, err := s.fetchHistory(ctx, next.Timeline); {
	case pgrepl.Code(err) == pgrepl.CodeUndefinedFile: // a clone that never was on that timeline
		s.log.Warn("the server does not have the history of an older timeline", "timeline", next.Timeline)
	case err != nil:
		return err
	}
	s.log.Info(MsgFollowing, "timeline", next.Timeline, "from_timeline", old.Timeline(), "fork", next.Start)
	s.hold = 0
	s.dropWriter()
	writer, err := s.dir.OpenWriter(ctx, archiveIdentity(s.id), next.Timeline, s.id.SegmentSize.Start(next.Start))
	if err != nil {
		return err
	}
	s.writer = writer
	return nil
}
