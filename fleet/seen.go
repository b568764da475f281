package fleet

import (
	"context"
	"log/slog"
	"slices"
	"strconv"
	"strings"
	"sync"
	"time"

	"github.com/walfleet/walfleet/receiver"
)

const (
	// sampleInterval and historySamples make a history of the last quarter of an hour.
	sampleInterval = 10 * time.Second
	historySamples = 90
	// keptEvents is how many lines of the log about a cluster are kept.
	keptEvents = 50
	// eventLimit bounds each, in characters; a panic's has its stack.
	eventLimit = 500
	// lookInterval is the time between two looks into an archive's directory, and
	// lookShare how much longer it is than such a look takes: of a hundred thousand
	// segments' names, none costs more than a percent of a processor.
	lookInterval = time.Minute
	lookShare    = 100
	// looksAtOnce is how many directories are begun to be looked into each second. One
	// whose disk does not answer holds up no other.
	looksAtOnce = 10
	// leastTrend is the least time that a trend is taken from, and mostTrend when a disk
	// that fills up slowly is of no interest.
	leastTrend = 5 * time.Minute
	mostTrend  = 365 * 24 * time.Hour
)

// seen is what is remembered of a cluster for people: what it did lately, and what its
// directory holds. Any goroutine may use it; it goes with the cluster.
type seen struct {
	mu      sync.Mutex
	samples []sample // oldest first, sampleInterval apart
	events  []EventReport
	archive *ArchiveReport // as it was looked into last; nil: not yet
	looking bool           // it is looked into
	lookAt  time.Time      // when to look again
}

// sample is a cluster at a time.
type sample struct {
	at       time.Time
	received int64 // bytes, since the receiver was made
	free     int64 // bytes of the archive's file system; -1: not known
}

// inherit takes over what was seen of a cluster's receiver before, and, where it has the same
// directory, of that. What that received counts for nothing, so rates begin anew.
func (s *seen) inherit(before *seen, sameDir bool) {
	before.mu.Lock()
	events, archive := slices.Clone(before.events), before.archive
	before.mu.Unlock()
	s.mu.Lock()
	defer s.mu.Unlock()
	s.events = last(append(events, s.events...), keptEvents)
	if s.archive == nil && sameDir {
		s.archive = archive
	}
}

// last is the last n of a list, or all of it.
func last[T any](list []T, n int) []T { return list[max(0, len(list)-n):] }

// take remembers how a cluster is.
func (s *seen) take(now time.Time, c receiver.Status) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.samples = append(s.samples, sample{now, c.ReceivedBytes, c.DiskFree})
	if extra := len(s.samples) - (historySamples + 1); extra > 0 {
		s.samples = slices.Delete(s.samples, 0, extra)
	}
}

// memory is what is remembered of a cluster at a time, but for the events.
type memory struct {
	archive       *ArchiveReport
	history       *HistoryReport
	secondsToFull *float64
}

// memory is for a cluster that leaves minFree bytes free.
func (s *seen) memory(minFree int64) memory {
	s.mu.Lock()
	defer s.mu.Unlock()
	history := &HistoryReport{sampleInterval.Seconds(), []int64{}}
	for i := 1; i < len(s.samples); i++ {
		a, b := s.samples[i-1], s.samples[i]
		history.BytesPerSecond = append(history.BytesPerSecond, int64(float64(max(b.received-a.received, 0))/b.at.Sub(a.at).Seconds()))
	}
	return memory{s.archive, history, s.secondsToFull(minFree)}
}

// secondsToFull is when the archive's file system has no more than minFree bytes, going by
// how fast others and we filled it in the history; nil: it does not get fuller, in a year.
func (s *seen) secondsToFull(minFree int64) *float64 {
	known := func(x sample) bool { return x.free >= 0 }
	i := slices.IndexFunc(s.samples, known)
	if i < 0 {
		return nil
	}
	from, to := s.samples[i], s.samples[len(s.samples)-1]
	took := to.at.Sub(from.at)
	filled := from.free - to.free
	if !known(to) || took < leastTrend || filled <= 0 {
		return nil
	}
	left := float64(max(to.free-max(minFree, 0), 0)) / float64(filled) * took.Seconds()
	if left > mostTrend.Seconds() {
		return nil
	}
	return &left
}

// look looks into a cluster's directory, unless that is under way or not due. The
// goroutine that it starts ends when the disk has answered, and nobody waits for it: a
// disk that never does must not hold the daemon's end.
func (s *seen) look(ctx context.Context, now time.Time, dir string, log *slog.Logger) (began bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.looking || now.Before(s.lookAt) {
		return false
	}
	s.looking = true
	go func() {
		began := time.Now()
		var a *ArchiveReport
		if fault := guarded(func() { a = peek(ctx, dir) }); fault != nil {
			log.Error("looking into an archive panicked; this is a bug in walfleet", "directory", dir, "panic", fault.value, "stack", fault.stack)
			a = &ArchiveReport{Time: began, Error: fault.Error(), Partial: []PartialReport{}, Gaps: []GapReport{}, Divergences: []DivergenceReport{}}
		}
		s.mu.Lock()
		defer s.mu.Unlock()
		s.archive, s.looking = a, false
		s.lookAt = time.Now().Add(max(lookInterval, lookShare*time.Since(began)))
	}()
	return true
}

// watch looks at all clusters now and then, until ctx is done.
func (f *Fleet) watch(ctx context.Context) {
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	var sampled time.Time
	for {
		var now time.Time
		select {
		case <-ctx.Done():
			return
		case now = <-tick.C:
		}
		type place struct {
			*member
			dir string // of its cfg, which a reload changes
		}
		f.mu.Lock()
		members := make([]place, 0, len(f.members))
		for _, m := range f.members { // in any order, so that each has its turn
			members = append(members, place{m, m.cfg.Dir})
		}
		f.mu.Unlock()
		if now.Sub(sampled) >= sampleInterval-time.Second/2 {
			sampled = now
			for _, m := range members {
				m.seen.take(now, m.receiver.Status())
			}
		}
		looks := 0
		for _, m := range members {
			if looks < looksAtOnce && m.seen.look(ctx, now, m.dir, f.log) {
				looks++
			}
		}
	}
}

// everySegment are the lines that each segment has, which would leave room for nothing else.
var everySegment = []string{receiver.MsgSealed, receiver.MsgCompressed}

// recorder is a log's handler that also keeps the last lines about a cluster.
type recorder struct {
	slog.Handler
	attrs []slog.Attr // of all lines, but for the cluster's name
	seen  *seen
}

// Enabled keeps what matters also where the log leaves it out.
func (h *recorder) Enabled(ctx context.Context, level slog.Level) bool {
	return level >= slog.LevelInfo || h.Handler.Enabled(ctx, level)
}

func (h *recorder) WithAttrs(attrs []slog.Attr) slog.Handler {
	own := slices.Clone(h.attrs)
	for _, a := range attrs {
		if a.Key != "cluster" {
			own = append(own, a)
		}
	}
	return &recorder{h.Handler.WithAttrs(attrs), own, h.seen}
}

// WithGroup is not used by receivers; their lines would lose the group's name here.
func (h *recorder) WithGroup(name string) slog.Handler {
	return &recorder{h.Handler.WithGroup(name), h.attrs, h.seen}
}

func (h *recorder) Handle(ctx context.Context, line slog.Record) error {
	if line.Level >= slog.LevelInfo && !slices.Contains(everySegment, line.Message) {
		var text strings.Builder
		text.WriteString(line.Message)
		add := func(a slog.Attr) bool {
			value := a.Value.Resolve().String()
			if value == "" || strings.ContainsFunc(value, func(r rune) bool { return r <= ' ' || r == '"' || r == '=' || !strconv.IsPrint(r) }) {
				value = strconv.Quote(value)
			}
			text.WriteString(" " + a.Key + "=" + value)
			return true
		}
		for _, a := range h.attrs {
			add(a)
		}
		line.Attrs(add)
		h.seen.record(EventReport{line.Time, strings.ToLower(line.Level.String()), shorten(text.String(), eventLimit)})
	}
	if !h.Handler.Enabled(ctx, line.Level) {
		return nil
	}
	return h.Handler.Handle(ctx, line)
}

func (s *seen) record(e EventReport) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.events) >= keptEvents {
		s.events = slices.Delete(s.events, 0, 1)
	}
	s.events = append(s.events, e)
}

// events are the last lines of the log about a cluster, oldest first.
func (f *Fleet) events(cluster string) []EventReport {
	f.mu.Lock()
	m := f.members[cluster]
	f.mu.Unlock()
	if m == nil {
		return nil
	}
	m.seen.mu.Lock()
	defer m.seen.mu.Unlock()
	return slices.Clone(m.seen.events)
}
