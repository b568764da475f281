package receiver

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"time"

	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/wal"
)

const (
	// hostGrace is how long the other hosts are waited for once one has answered
	// that can be archived.
	hostGrace = 3 * time.Second
	// hostInterval is how often the other hosts are asked while one is archived.
	hostInterval = 30 * time.Second
)

// candidate is a connection to one host, and what that host says of itself.
type candidate struct {
	conn        *pgrepl.Conn
	host        int // index in the conninfo's hosts
	id          pgrepl.Identity
	history     wal.History // of id.Timeline
	historyFile []byte      // the same as the server sent it; nil for timeline 1
}

// connect asks all hosts and takes the one to archive: of those that are of this
// cluster, in the right role, and continue what the archive has, the one with
// the highest timeline. So an old primary that still runs is passed over. One of
// PolarDB's has the new one's timeline: it is behind, or its WAL is not the
// archive's.
func (s *session) connect(ctx context.Context) error {
	conninfo, err := pgrepl.ParseConninfo(s.cfg.Conninfo)
	if err != nil {
		return &pgrepl.UnusableError{Reason: err.Error()}
	}
	end, err := s.shared.turn(ctx)
	if err != nil {
		return err
	}
	answered, failed := s.askHosts(ctx, conninfo)
	end()
	fit := answered[:0]
	for _, c := range answered {
		if err := s.fits(c); err != nil {
			failed = append(failed, fmt.Errorf("%s: %w", c.conn.Host(), err))
			c.conn.Close()
			continue
		}
		fit = append(fit, c)
	}
	if ctx.Err() != nil || len(fit) == 0 {
		for _, c := range fit {
			c.conn.Close()
		}
		return cmp.Or[error](ctx.Err(), failed)
	}
	slices.SortStableFunc(fit, func(a, b candidate) int {
		order := cmp.Or(cmp.Compare(b.id.Timeline, a.id.Timeline), compareBool(a.id.InRecovery, b.id.InRecovery))
		if order == 0 && !a.id.InRecovery { // two primaries: one was replaced, and does not get on
			order = cmp.Compare(b.id.XLogPos, a.id.XLogPos)
		}
		return order
	})
	chosen := 0
	if i := slices.IndexFunc(fit, func(c candidate) bool { return !s.isStray(c) }); i >= 0 && fit[i].id.InRecovery == fit[0].id.InRecovery {
		chosen = i
	} else {
		defer clear(s.stray) // all of them, this one was tried first: once more, one after the other
	}
	for i, c := range fit {
		if i != chosen {
			c.conn.Close()
			// A standby does not speak against a primary.
			s.alternative = s.alternative || !s.isStray(c) && c.id.InRecovery == fit[chosen].id.InRecovery
		}
	}
	s.candidate, s.conninfo = fit[chosen], conninfo
	for _, err := range failed {
		s.log.Debug("host passed over", "error", err)
	}
	return nil
}

// isStray tells whether a host's WAL was not the archive's when it was tried last.
// On a newer timeline it may be.
func (s *session) isStray(c candidate) bool {
	return s.stray[c.conn.Host()] == c.id.Timeline
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case a:
		return 1
	}
	return -1
}

// askHosts asks all hosts at once. Once one has answered as it should, the
// others have hostGrace to do so too.
func (s *session) askHosts(ctx context.Context, conninfo *pgrepl.Conninfo) (answered []candidate, failed HostsError) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	type answer struct {
		candidate
		err error
	}
	order := conninfo.Order()
	answers := make([]answer, len(order))
	var wait sync.WaitGroup
	var once sync.Once
	for at, host := range order {
		wait.Go(func() {
			c, err := s.ask(ctx, conninfo, host)
			answers[at] = answer{c, err}
			if err == nil && s.roleFits(c.id) == nil {
				once.Do(func() {
					t := time.AfterFunc(hostGrace, cancel)
					context.AfterFunc(ctx, func() { t.Stop() })
				})
			}
		})
	}
	wait.Wait()
	for _, a := range answers {
		if a.err != nil {
			failed = append(failed, a.err)
			continue
		}
		answered = append(answered, a.candidate)
	}
	return answered, failed
}

// ask connects to a host and hears who it is. It touches nothing of the session.
func (s *session) ask(ctx context.Context, conninfo *pgrepl.Conninfo, host int) (c candidate, err error) {
	defer func() {
		if p := recover(); p != nil { // in a goroutine of its own: guardedSession cannot do this
			err = s.panicked(p)
		}
	}()
	conn, err := conninfo.Connect(ctx, host, s.options())
	if err != nil {
		return c, err
	}
	c = candidate{conn: conn, host: host}
	defer func() {
		if err != nil {
			conn.Close()
			err = fmt.Errorf("%s: %w", conn.Host(), err)
		}
	}()
	if c.id, err = conn.Identify(ctx); err != nil {
		return c, err
	}
	c.history = wal.History{Timeline: c.id.Timeline}
	if c.id.Timeline == 1 {
		return c, nil
	}
	if c.historyFile, err = conn.TimelineHistory(ctx, c.id.Timeline); err != nil {
		return c, err
	}
	c.history, err = wal.ParseHistory(c.id.Timeline, c.historyFile)
	return c, err
}

func (s *session) roleFits(id pgrepl.Identity) error {
	if id.InRecovery && s.cfg.Source == SourcePrimary {
		return &refusedError{`the server is a standby (in recovery), and source = "primary"`}
	}
	return nil
}

// fits tells whether a host can continue the archive.
func (s *session) fits(c candidate) error {
	if err := s.roleFits(c.id); err != nil {
		return err
	}
	if err := s.dir.Check(archiveIdentity(c.id)); err != nil {
		return err
	}
	tli, err := s.tailTimeline(c.id)
	if err != nil || tli == 0 {
		return err
	}
	return continues(c, tli)
}

// tailTimeline is the timeline on which the archive ends; 0: it is empty.
func (s *session) tailTimeline(id pgrepl.Identity) (wal.Timeline, error) {
	if s.writer != nil {
		return s.writer.Timeline(), nil
	}
	tail, _, err := s.dir.Tail(id.SegmentSize)
	return tail.Timeline, err
}

// continues tells whether a server's history contains timeline tli.
func continues(c candidate, tli wal.Timeline) error {
	if tli > c.id.Timeline {
		return &refusedError{fmt.Sprintf("the server is on timeline %d, the archive is on %d already: an old primary, or one restored from a backup", c.id.Timeline, tli)}
	}
	if _, ok := c.history.End(tli); !ok {
		return &historyError{fmt.Sprintf("the archive is on timeline %d, which is no ancestor of the server's timeline %d", tli, c.id.Timeline)}
	}
	return nil
}

// watchHosts asks the other hosts now and then, and calls leave when one of them
// is a primary on a newer timeline that continues ours, or on ours and farther
// than our server gets until the next time: that is an old primary then. It ends
// when ctx is done; wait returns after that.
func (s *session) watchHosts(ctx context.Context, leave func(error)) (wait func()) {
	if len(s.conninfo.Hosts()) < 2 {
		return func() {}
	}
	var group sync.WaitGroup
	group.Go(func() {
		seen := map[int]wal.LSN{} // where each host's WAL ended the time before
		for sleep(ctx, hostInterval) {
			for _, host := range s.conninfo.Order() {
				if s.conninfo.Hosts()[host] == s.conn.Host() {
					continue
				}
				end, err := s.superseded(ctx, host, seen[host])
				if err != nil {
					leave(err)
					return
				}
				seen[host] = end
			}
		}
	})
	return group.Wait
}

// errSuperseded says that another host is the primary now.
var errSuperseded = errors.New("another host is farther")

// superseded asks one host, and returns errSuperseded when it is to be archived
// instead; else where the host's WAL ends, if it is a primary on our timeline. The
// host may be our server under another name: then that has sent WAL up to before,
// where the host's ended the last time, unless we do not read, or max_rate keeps us
// from reading all that it sends.
func (s *session) superseded(ctx context.Context, host int, before wal.LSN) (wal.LSN, error) {
	end, err := s.shared.turn(ctx)
	if err != nil {
		return 0, nil // ctx is done
	}
	c, err := s.ask(ctx, s.conninfo, host)
	end()
	if err != nil {
		s.log.Debug("asking another host", "error", err)
		return 0, nil
	}
	defer c.conn.Close()
	st := s.Status()
	if c.id.InRecovery || archiveIdentity(c.id) != archiveIdentity(s.id) || s.isStray(c) ||
		c.id.Timeline < st.Timeline || continues(c, st.Timeline) != nil {
		return 0, nil
	}
	if c.id.Timeline == st.Timeline && (st.State == Blocked || st.ServerEnd >= before || time.Since(st.HeldBack) < 2*hostInterval) {
		return c.id.XLogPos, nil
	}
	return 0, fmt.Errorf("%w: %s is a primary on timeline %d, %s, while %s is on timeline %d, %s",
		errSuperseded, c.conn.Host(), c.id.Timeline, c.id.XLogPos, s.conn.Host(), st.Timeline, st.ServerEnd)
}
