package archive

import (
	"cmp"
	"errors"
	"iter"
	"slices"

	"github.com/walfleet/walfleet/internal/wal"
)

// Lineage is how an archive's timelines hang together, and what of their WAL can be
// recovered. It is a value, computed from what the archive's files are called and what
// its histories say.
type Lineage struct {
	Branches []Branch // ascending by timeline: all that have a file of a segment, or a history
	Windows  []Window // by timeline, then position
	Holes    []Hole   // between them, and ahead of the first, by position
}

// Branch is one timeline.
type Branch struct {
	Timeline wal.Timeline
	Parent   wal.Timeline // 0: none, or not known
	Fork     wal.LSN      // where it left Parent
	Reason   string       // in the server's words; not to be shown unescaped
	Problem  error        // why Parent is not known; nil: it is, or there is none

	Ranges   []BranchRange // its own complete segments
	Partials []StoredFile  // its own partial ones, by position
}

// BranchRange is WAL of one timeline without a hole, and how it is stored.
type BranchRange struct {
	Range
	Segments int
	Bytes    int64 // of all files, as stored
}

// Window is WAL without a hole along a timeline's history. From a base backup whose WAL
// begins at or behind From, on that timeline or the ancestor that has the position, every
// position up to To can be recovered with Timeline as recovery_target_timeline, and what
// is WAL of Partials behind that.
type Window struct {
	Timeline     wal.Timeline
	FromTimeline wal.Timeline // that has From
	From         wal.LSN      // inclusive, the start of a segment
	To           wal.LSN      // exclusive end of the last complete segment
	Segments     []wal.Segment
	Partials     []StoredFile // that go on at To, one after the other; plain ones where there are two of a segment

	// Continued is where another timeline that the archive has left this one: up to there
	// that one's Window says the same. 0: no other has all complete segments of this one.
	Continued wal.LSN

	limit wal.LSN // exclusive end of the WAL that the last one of Partials has of this history
}

// Hole is WAL that is missing, or does not continue what is before it.
type Hole struct {
	Timeline   wal.Timeline // on which the archive goes on
	From       wal.LSN      // inclusive
	To         wal.LSN      // exclusive, where it goes on; From where nothing is missing
	Gap        *Gap         // the record of it
	Divergence *Divergence  // a decision for WAL that does not continue what is before To; with neither nobody wrote it down
}

// ReadHistories reads all stored histories. Those that cannot be read are in problems.
func (c Catalogue) ReadHistories() (histories map[wal.Timeline]wal.History, problems map[wal.Timeline]error) {
	histories, problems = map[wal.Timeline]wal.History{}, map[wal.Timeline]error{}
	for _, tli := range c.Histories {
		if h, err := c.History(tli); err != nil {
			problems[tli] = err
		} else {
			histories[tli] = h
		}
	}
	return histories, problems
}

// Begin is where the archive begins, by what is written down: where archiving began, or
// what was pruned since; 0: not known. WAL of any timeline before it is not missing.
func (c Catalogue) Begin() wal.LSN {
	if !c.Bound {
		return 0
	}
	return max(c.Origin.LSN, c.Pruned.LSN)
}

// Lineage puts together what the archive has by what histories say. problems are of
// histories that are there and could not be read.
func (c Catalogue) Lineage(histories map[wal.Timeline]wal.History, problems map[wal.Timeline]error) Lineage {
	b := lineageBuilder{c, histories, map[wal.Timeline][]wal.Segment{}, map[wal.Timeline][]StoredFile{}}
	for _, s := range c.Sealed() {
		b.sealed[s.Timeline] = append(b.sealed[s.Timeline], s)
	}
	for _, f := range c.Files {
		if f.Partial {
			b.partials[f.Timeline] = append(b.partials[f.Timeline], f)
		}
	}
	var timelines []wal.Timeline
	for tli := range histories {
		timelines = append(timelines, tli)
	}
	for tli := range problems {
		timelines = append(timelines, tli)
	}
	for _, f := range c.Files {
		timelines = append(timelines, f.Timeline)
	}
	slices.Sort(timelines)
	var l Lineage
	for _, tli := range slices.Compact(timelines) {
		l.Branches = append(l.Branches, b.branch(tli, problems[tli]))
		if !b.has(tli) {
			continue
		}
		windows, holes := b.follow(b.history(tli))
		for _, w := range windows {
			w.Continued = b.continued(w)
			if w.Continued == 0 || len(w.Partials) > 0 {
				l.Windows = append(l.Windows, w)
			}
		}
		for _, h := range holes {
			if !slices.ContainsFunc(l.Holes, func(o Hole) bool { return o.Timeline == h.Timeline && o.From == h.From && o.To == h.To }) {
				l.Holes = append(l.Holes, h)
			}
		}
	}
	slices.SortStableFunc(l.Holes, func(a, b Hole) int { return cmp.Or(cmp.Compare(a.To, b.To), cmp.Compare(a.Timeline, b.Timeline)) })
	return l
}

type lineageBuilder struct {
	Catalogue
	histories map[wal.Timeline]wal.History
	sealed    map[wal.Timeline][]wal.Segment // by position
	partials  map[wal.Timeline][]StoredFile  // by position
}

// has tells whether a timeline has a file of a segment.
func (b lineageBuilder) has(tli wal.Timeline) bool {
	return len(b.sealed[tli])+len(b.partials[tli]) > 0
}

// history is a timeline's, without ancestors where none are known.
func (b lineageBuilder) history(tli wal.Timeline) wal.History {
	h := b.histories[tli]
	h.Timeline = tli
	return h
}

func (b lineageBuilder) branch(tli wal.Timeline, problem error) Branch {
	br := Branch{Timeline: tli, Partials: b.partials[tli]}
	_, known := b.histories[tli]
	if forks := b.histories[tli].Forks; len(forks) > 0 {
		last := forks[len(forks)-1]
		br.Parent, br.Fork, br.Reason = last.Timeline, last.End, last.Reason
	}
	if tli > 1 && !known {
		br.Problem = cmp.Or[error](problem, errNoHistory)
	}
	for _, r := range b.Ranges() {
		if r.Timeline == tli {
			br.Ranges = append(br.Ranges, BranchRange{Range: r, Segments: int((r.End - r.Start) / wal.LSN(b.Identity.SegmentSize))})
		}
	}
	for _, f := range b.Files {
		if f.Timeline != tli || f.Partial {
			continue
		}
		i, _ := slices.BinarySearchFunc(br.Ranges, f.Start, func(r BranchRange, at wal.LSN) int { return cmp.Compare(r.End-1, at) })
		br.Ranges[i].Bytes += f.Bytes
	}
	return br
}

var errNoHistory = errors.New("its history is not in the archive")

// follow walks along a timeline's history. Of a segment in which a timeline forks off,
// the new timeline's file counts, as it does for a server (XLogFileReadAnyTLI in
// xlogrecovery.c): it has what is before the fork too.
func (b lineageBuilder) follow(h wal.History) (windows []Window, holes []Hole) {
	size := b.Identity.SegmentSize
	for s := range b.path(h) {
		var last *Window
		end := wal.LSN(0)
		if n := len(windows); n > 0 {
			last = &windows[n-1]
			end = last.To
		}
		missing := b.missing(h, last != nil, end, s)
		holes = append(holes, missing...)
		if last == nil || end != s.Start || len(missing) > 0 {
			windows = append(windows, Window{Timeline: h.Timeline, FromTimeline: s.Timeline, From: s.Start})
			last = &windows[len(windows)-1]
		}
		last.To, last.Segments = s.End(), append(last.Segments, s)
	}
	for _, f := range b.pathPartials(h) {
		i := slices.IndexFunc(windows, func(w Window) bool { return w.To+wal.LSN(len(w.Partials))*wal.LSN(size) == f.Start })
		if i >= 0 && b.GapBefore(f.Segment) == nil {
			windows[i].Partials = append(windows[i].Partials, f)
			windows[i].limit, _ = h.End(f.Timeline)
			continue
		}
		var last *Window
		end := wal.LSN(0)
		if n := len(windows); n > 0 {
			last = &windows[n-1]
			end = last.To + wal.LSN(len(last.Partials))*wal.LSN(size)
		}
		if f.Start < end {
			continue // left over: what it has is complete in another file
		}
		holes = append(holes, b.missing(h, last != nil, end, f.Segment)...)
		limit, _ := h.End(f.Timeline)
		windows = append(windows, Window{Timeline: h.Timeline, FromTimeline: f.Timeline, From: f.Start, To: f.Start, Partials: []StoredFile{f}, limit: limit})
	}
	return windows, holes
}

// pathPartials are the partial files along a history, one of each position: that of the
// newest timeline that has the position.
func (b lineageBuilder) pathPartials(h wal.History) []StoredFile {
	var all []StoredFile
	for _, f := range b.Files {
		if end, ok := h.End(f.Timeline); f.Partial && ok && f.Start < end {
			all = append(all, f)
		}
	}
	slices.SortStableFunc(all, func(x, y StoredFile) int {
		return cmp.Or(cmp.Compare(x.Start, y.Start), cmp.Compare(y.Timeline, x.Timeline))
	})
	return slices.CompactFunc(all, func(x, y StoredFile) bool { return x.Start == y.Start })
}

// path yields the complete segments along a history, by position: of each position the
// one of the timeline that its last byte belongs to.
func (b lineageBuilder) path(h wal.History) iter.Seq[wal.Segment] {
	return func(yield func(wal.Segment) bool) {
		begin := wal.LSN(0)
		for _, f := range append(slices.Clone(h.Forks), wal.Fork{Timeline: h.Timeline, End: ^wal.LSN(0)}) {
			for _, s := range b.sealed[f.Timeline] {
				if begin < s.End() && s.End() <= f.End && !yield(s) {
					return
				}
			}
			begin = f.End
		}
	}
}

// missing is what is not there between end, where a window ends, and the segment with
// which the archive goes on. Without a window that is the archive's beginning.
func (b lineageBuilder) missing(h wal.History, window bool, end wal.LSN, s wal.Segment) (holes []Hole) {
	if !window {
		end = s.Start
		if begin := b.Begin(); begin != 0 && h.At(b.Origin.LSN) == b.Origin.Timeline { // what began there is of this history
			end = begin
		}
	}
	if gap := b.GapBefore(s); gap != nil { // its WAL may end inside a segment, of which a partial file has the rest
		if whole := b.Identity.SegmentSize.Start(gap.From); whole > end {
			holes = append(holes, Hole{Timeline: s.Timeline, From: end, To: whole}) // the gap is not all that is missing
		}
		if s.Start > b.Begin() {
			holes = append(holes, Hole{Timeline: s.Timeline, From: gap.From, To: gap.To, Gap: gap})
		}
		return holes
	}
	for i := range b.Divergences {
		if d := &b.Divergences[i]; d.Timeline == s.Timeline && d.Restart == s.Start && d.LSN == s.Start && window {
			return append(holes, Hole{Timeline: s.Timeline, From: end, To: s.Start, Divergence: d})
		}
	}
	if end = max(end, b.Pruned.LSN); end < s.Start {
		holes = append(holes, Hole{Timeline: s.Timeline, From: end, To: s.Start})
	}
	return holes
}

// continued is a Window's Continued.
func (b lineageBuilder) continued(w Window) (at wal.LSN) {
	for tli, h := range b.histories {
		if end, ok := h.End(w.Timeline); ok && tli != w.Timeline && b.has(tli) && len(w.Segments) > 0 && w.To <= end {
			at = max(at, end)
		}
	}
	return at
}
