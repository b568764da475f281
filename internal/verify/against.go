package verify

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"sort"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/wal"
)

// stretch is WAL of one timeline that the archive has without a hole, complete segments and what of a partial one
// has complete records.
type stretch struct {
	timeline wal.Timeline
	pieces   []*piece
	end      wal.LSN // exclusive
}

func (s stretch) start() wal.LSN { return s.pieces[0].Start }

// server is the one that is compared with.
type server struct {
	conninfo *pgrepl.Conninfo
	host     int // index
	options  pgrepl.Options
	name     string
	id       pgrepl.Identity
	history  wal.History // of its timeline
}

// errEnough ends a stream that has told what was asked.
var errEnough = errors.New("enough")

// compare compares the archive with the WAL that a server still has: its own timeline's, and that of its ancestors.
// It streams without a slot, so that nothing is kept for it there, and acknowledges nothing.
func (r *run) compare(ctx context.Context) error {
	s, err := r.connect(ctx)
	if err != nil {
		return err
	}
	tried, older := false, false
	for _, st := range r.stretches() {
		end, ok := s.history.End(st.timeline)
		if st.end = min(st.end, end, s.id.XLogPos); !ok || st.start() >= st.end {
			continue
		}
		tried = true
		older, err = r.compareStretch(ctx, s, st)
		if ctx.Err() != nil {
			r.report.NotChecked = append(r.report.NotChecked, "all that the server has")
			return nil
		}
		if err != nil {
			return err
		}
	}
	switch {
	case len(r.report.Compared) > 0 || slices.ContainsFunc(r.report.Faults, func(f Fault) bool { return f.Kind == Differs }):
		return nil
	case tried && older:
		return fmt.Errorf("%s has none of the archive's WAL any more", s.name)
	}
	return fmt.Errorf("%s, on timeline %d up to %s, never had any of the archive's WAL", s.name, s.id.Timeline, s.id.XLogPos)
}

// connect finds the first host that answers, and makes sure that it is of the archive's cluster.
func (r *run) connect(ctx context.Context) (*server, error) {
	conninfo, err := pgrepl.ParseConninfo(r.o.Against)
	if err != nil {
		return nil, err
	}
	s := &server{conninfo: conninfo, options: pgrepl.Options{ApplicationName: pgrepl.MonitorName, Timeout: r.o.Timeout}}
	var failed error
	for _, host := range conninfo.Order() {
		conn, err := conninfo.Connect(ctx, host, s.options)
		if err != nil {
			failed = errors.Join(failed, err)
			continue
		}
		defer conn.Close()
		s.host, s.name = host, conn.Host()
		if s.id, err = conn.Identify(ctx); err != nil {
			return nil, err
		}
		want := r.c.Identity
		if got := (archive.Identity{SystemID: s.id.SystemID, SegmentSize: s.id.SegmentSize}); got != want {
			return nil, fmt.Errorf("%s is another cluster: its system identifier is %d and its segments have %d bytes, the archive's %d and %d",
				s.name, got.SystemID, got.SegmentSize, want.SystemID, want.SegmentSize)
		}
		s.history = wal.History{Timeline: s.id.Timeline}
		if s.id.Timeline > 1 {
			data, err := conn.TimelineHistory(ctx, s.id.Timeline)
			if err != nil {
				return nil, err
			}
			if s.history, err = wal.ParseHistory(s.id.Timeline, data); err != nil {
				return nil, fmt.Errorf("%s: %w", s.name, err)
			}
		}
		return s, nil
	}
	return nil, failed
}

// stretches are ordered by timeline, then start.
func (r *run) stretches() (all []stretch) {
	pieces := slices.Clone(r.pieces)
	slices.SortFunc(pieces, func(a, b *piece) int {
		return cmp.Or(cmp.Compare(a.Timeline, b.Timeline), cmp.Compare(a.Start, b.Start))
	})
	for _, p := range pieces {
		end := p.End()
		if p.partial {
			if end = r.partialEnds[p]; end <= p.Start {
				continue
			}
		}
		if last := len(all) - 1; last >= 0 && all[last].timeline == p.Timeline && all[last].end == p.Start && !r.restarts(p) {
			all[last].pieces = append(all[last].pieces, p)
			all[last].end = end
		} else {
			all = append(all, stretch{p.Timeline, []*piece{p}, end})
		}
	}
	return all
}

// compareStretch compares what the server still has of a stretch. It tells whether that lacks some of the stretch's
// beginning.
func (r *run) compareStretch(ctx context.Context, s *server, st stretch) (older bool, err error) {
	// What a server removes it removes from the oldest on.
	first := sort.Search(len(st.pieces), func(i int) bool {
		if err != nil || st.pieces[i].Start >= st.end {
			return true
		}
		switch begun := s.stream(ctx, st.timeline, st.pieces[i].Start, st.end, func([]byte) error { return errEnough }); {
		case pgrepl.Code(begun) == pgrepl.CodeUndefinedFile:
			return false
		case begun != nil && !errors.Is(begun, errEnough):
			err = begun
		}
		return true
	})
	if err != nil {
		return false, err
	}
	if first == len(st.pieces) || st.pieces[first].Start >= st.end {
		return true, nil
	}
	c := &comparison{worker: &worker{run: r, buf: make([]byte, bufSize)}, server: s, stretch: st, left: st.pieces[first:], pos: st.pieces[first].Start}
	from := c.pos
	defer c.close()
	err = s.stream(ctx, st.timeline, from, st.end, func(data []byte) error { return c.take(ctx, data) })
	if errors.Is(err, errEnough) {
		err = nil
	}
	if c.pos > from {
		r.report.Compared = append(r.report.Compared, Compared{st.timeline, from.String(), c.pos.String()})
	}
	if err == nil && first > 0 {
		r.report.Notes = append(r.report.Notes, fmt.Sprintf("%s has no WAL of timeline %d before %s any more", s.name, st.timeline, from))
	}
	return first > 0, err
}

// stream gives consume the server's WAL of a timeline, from from (inclusive) to to (exclusive), in its order. It
// ends when that is complete, or with the error of consume; and when nothing came for the timeout.
func (s *server) stream(ctx context.Context, tli wal.Timeline, from, to wal.LSN, consume func([]byte) error) error {
	conn, err := s.conninfo.Connect(ctx, s.host, s.options)
	if err != nil {
		return err
	}
	defer conn.Close()
	in, next, err := conn.StartStream(ctx, "", tli, from)
	if err != nil {
		return err
	}
	if in == nil {
		return fmt.Errorf("%s goes on with timeline %d at %s at once, instead of sending timeline %d from %s", s.name, next.Timeline, next.Start, tli, from)
	}
	defer context.AfterFunc(ctx, func() { in.Interrupt(0) })()
	for pos := from; pos < to; {
		if err := in.SetDeadline(time.Now().Add(s.options.Timeout)); err != nil {
			return err
		}
		if ctx.Err() != nil { // it may have come before the deadline was set
			return ctx.Err()
		}
		m, err := in.Receive()
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return fmt.Errorf("%s, at %s: %w", s.name, pos, err)
		case m.Kind == pgrepl.Done:
			return fmt.Errorf("%s ended timeline %d at %s, before %s", s.name, tli, pos, to)
		case m.Kind == pgrepl.Keepalive:
			if m.ReplyRequested {
				if err := in.SendStatus(pgrepl.Status{}); err != nil {
					return err
				}
			}
			continue
		case m.Start != pos:
			return fmt.Errorf("%s sent WAL from %s, expected %s", s.name, m.Start, pos)
		}
		data := m.Data[:min(uint64(len(m.Data)), uint64(to-pos))]
		if err := consume(data); err != nil {
			return err
		}
		pos += wal.LSN(len(data))
	}
	return nil
}

// comparison is a stretch's WAL being read beside the server's.
type comparison struct {
	*worker
	server *server
	stretch
	left []*piece        // those to come, the one that is open included
	open *archive.Reader // nil: none is
	pos  wal.LSN         // that is compared next
}

func (c *comparison) close() {
	if c.open != nil {
		c.open.Close()
		c.open = nil
	}
}

// take compares data, the server's WAL at pos. At the first difference it is errEnough.
func (c *comparison) take(ctx context.Context, data []byte) error {
	for len(data) > 0 {
		p := c.left[0]
		if c.open == nil {
			if c.open = c.worker.open(p); c.open == nil {
				return errEnough
			}
		}
		part := data[:min(uint64(len(data)), uint64(p.End()-c.pos), uint64(len(c.buf)))]
		n, err := c.read(ctx, c.open, c.buf[:len(part)])
		i := firstDifference(c.buf[:n], part)
		switch {
		case ctx.Err() != nil:
			return ctx.Err()
		case i >= 0 && i < n:
			c.pos += wal.LSN(i)
			c.fault(Fault{File: c.open.Name, Offset: int64(c.pos - p.Start), at: c.pos, end: c.end, Kind: Differs,
				Text: fmt.Sprintf("%s has other bytes from here on, on timeline %d", c.server.name, c.timeline)})
			return errEnough
		case n < len(part): // it is damaged, which was said already
			c.pos += wal.LSN(n)
			return cmp.Or(err, errEnough)
		}
		data = data[n:]
		if c.pos += wal.LSN(n); c.pos == p.End() {
			c.close()
			c.left = c.left[1:]
		}
	}
	return nil
}
