package verify

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

// piece is a segment that the archive has: its complete files or, where there is none, its partial ones.
type piece struct {
	wal.Segment
	partial bool
	files   []archive.StoredFile // at least one
}

// layout is how an archive's segments hang together, by their names and the histories.
type layout struct {
	c         archive.Catalogue
	pieces    []*piece // by start, then timeline
	by        map[wal.Segment]*piece
	histories map[wal.Timeline]wal.History
	before    map[*piece]*piece   // the complete piece that one goes on with
	after     map[*piece][]*piece // and the other way round, complete ones first

	faults []Fault // of names, histories and holes
}

// newLayout judges a catalogue; damaged is why archive.json makes no sense, nil: it does.
func newLayout(c archive.Catalogue, damaged *archive.FileError) *layout {
	l := &layout{
		c: c, by: map[wal.Segment]*piece{}, histories: map[wal.Timeline]wal.History{1: {Timeline: 1}},
		before: map[*piece]*piece{}, after: map[*piece][]*piece{},
	}
	for _, f := range c.Files { // complete ones come before partial ones
		p := l.by[f.Segment]
		if p == nil {
			p = &piece{Segment: f.Segment, partial: f.Partial}
			l.by[f.Segment] = p
			l.pieces = append(l.pieces, p)
		}
		if p.partial == f.Partial {
			p.files = append(p.files, f)
		}
	}
	l.readHistories()
	for _, p := range l.pieces {
		if b := l.precedes(p); b != nil {
			l.before[p] = b
			l.after[b] = append(l.after[b], p)
		}
	}
	for _, after := range l.after {
		slices.SortStableFunc(after, func(a, b *piece) int { return compareBool(a.partial, b.partial) })
	}
	for _, name := range c.Unknown {
		l.fault(Fault{File: name, Kind: Name, Text: "neither a segment, nor a history, nor anything else of an archive"})
	}
	if damaged != nil {
		l.fault(Fault{File: "archive.json", Kind: Metadata, Text: fmt.Sprintf("%q", damaged.Reason)})
	} else if !c.Bound {
		l.fault(Fault{File: "archive.json", Kind: Metadata, Text: "is not there"})
	}
	l.checkTimelines()
	l.checkHoles()
	l.checkGaps()
	l.checkAside()
	return l
}

func compareBool(a, b bool) int {
	switch {
	case a == b:
		return 0
	case b:
		return -1
	}
	return 1
}

// fault notes a fault, once: what is missing is missing to several timelines.
func (l *layout) fault(f Fault) {
	if !slices.ContainsFunc(l.faults, func(have Fault) bool { return have.File == f.File && have.at == f.at && have.Kind == f.Kind }) {
		l.faults = append(l.faults, f)
	}
}

// readHistories reads the histories of all timelines that have a file, and compares them with each other.
func (l *layout) readHistories() {
	for _, tli := range l.c.Histories {
		h, err := l.c.History(tli)
		switch damaged := new(archive.FileError); {
		case err == nil:
			l.histories[tli] = h
		case errors.As(err, &damaged):
			l.fault(Fault{File: wal.HistoryName(tli), Kind: History, Text: fmt.Sprintf("%q", damaged.Reason)})
		case !errors.Is(err, fs.ErrNotExist):
			l.fault(Fault{File: wal.HistoryName(tli), Kind: Unreadable, Text: fmt.Sprintf("%q", err)})
		}
	}
	for _, tli := range l.c.Histories {
		h, ok := l.histories[tli]
		if !ok {
			continue
		}
		for i, f := range h.Forks {
			parent, ok := l.histories[f.Timeline]
			if ok && !slices.EqualFunc(h.Forks[:i], parent.Forks, func(a, b wal.Fork) bool {
				return a.Timeline == b.Timeline && a.End == min(b.End, f.End) // as ParseHistory bounds them
			}) {
				l.fault(Fault{File: wal.HistoryName(tli), Kind: History, at: f.End,
					Text: fmt.Sprintf("has other ancestors for timeline %d than %s has", f.Timeline, wal.HistoryName(f.Timeline))})
				break
			}
		}
	}
}

// checkTimelines checks that timelines have histories, and no segment that is older than they are. A timeline can have no WAL of
// its own and be needed: a server that recovers from an older one to the latest asks for one history after the other, and takes the
// first that is not there for the end.
func (l *layout) checkTimelines() {
	missing := map[wal.Timeline]bool{}
	for _, p := range l.pieces {
		h, ok := l.histories[p.Timeline]
		if !ok && !slices.Contains(l.c.Histories, p.Timeline) && !missing[p.Timeline] {
			missing[p.Timeline] = true
			l.fault(Fault{File: wal.HistoryName(p.Timeline), Kind: History, at: p.Start,
				Text: fmt.Sprintf("is not there, and %s is of timeline %d", p.files[0].File, p.Timeline)})
		}
		if ok && len(h.Forks) > 0 && p.End() <= begin(h) {
			l.fault(Fault{File: p.files[0].File, Kind: Timeline, at: p.Start, end: p.End(),
				Text: fmt.Sprintf("is of before %s, where timeline %d began", begin(h), p.Timeline)})
		}
	}
	for _, tli := range l.c.Histories {
		forks := l.histories[tli].Forks
		for i := 1; i < len(forks); i++ { // the oldest one is timeline 1, which has none
			f := forks[i]
			older := slices.ContainsFunc(l.pieces, func(p *piece) bool {
				return slices.ContainsFunc(forks[:i], func(o wal.Fork) bool { return o.Timeline == p.Timeline })
			})
			if older && !missing[f.Timeline] && !slices.Contains(l.c.Histories, f.Timeline) {
				missing[f.Timeline] = true
				l.fault(Fault{File: wal.HistoryName(f.Timeline), Kind: History, at: forks[i-1].End,
					Text: fmt.Sprintf("is not there, and %s names it as an ancestor", wal.HistoryName(tli))})
			}
		}
	}
}

// begin is where a timeline that has ancestors left the last one.
func begin(h wal.History) wal.LSN { return h.Forks[len(h.Forks)-1].End }

// ancestry is the history of a timeline; of one whose history is not known, that it has no ancestors.
func (l *layout) ancestry(tli wal.Timeline) wal.History {
	if h, ok := l.histories[tli]; ok {
		return h
	}
	return wal.History{Timeline: tli}
}

// belongs tells whether recovery along a timeline can use p: all of it up to the start of the segment in which its
// timeline is left.
func (l *layout) belongs(p *piece, tli wal.Timeline) bool {
	end, ok := l.ancestry(tli).End(p.Timeline)
	return ok && p.End() <= end
}

// precedes is the complete piece before p that p's first record goes on with; nil: there is none.
func (l *layout) precedes(p *piece) *piece {
	if l.restarts(p) {
		return nil
	}
	b := l.pieceBefore(p)
	if b == nil || b.partial {
		return nil
	}
	return b
}

// pieceBefore is the one that ends where p starts, of p's timeline or of the youngest ancestor that has it.
func (l *layout) pieceBefore(p *piece) *piece {
	if p.Start == 0 {
		return nil
	}
	h := l.ancestry(p.Timeline)
	timelines := []wal.Timeline{p.Timeline}
	for _, f := range slices.Backward(h.Forks) {
		timelines = append(timelines, f.Timeline)
	}
	for _, tli := range timelines {
		if b := l.by[p.Size.Segment(tli, p.Start-1)]; b != nil && l.belongs(b, p.Timeline) {
			return b
		}
	}
	return nil
}

// restarts tells whether the archive began anew with p, by a decision: what is before it goes on with something else.
func (l *layout) restarts(p *piece) bool {
	return l.c.GapBefore(p.Segment) != nil || slices.ContainsFunc(l.c.Divergences, func(v archive.Divergence) bool {
		return v.Timeline == p.Timeline && v.Restart == p.Start && v.LSN == p.Start
	})
}

// latest is the piece with the highest end of those that start before lsn, and that recovery along the timeline needs.
func (l *layout) latest(tli wal.Timeline, lsn wal.LSN) (latest *piece) {
	for _, p := range l.pieces {
		if p.Start >= lsn {
			break
		}
		if l.belongs(p, tli) && (latest == nil || p.Start >= latest.Start) {
			latest = p
		}
	}
	return latest
}

// checkHoles looks for segments that are missing, or not complete, before others.
func (l *layout) checkHoles() {
	for _, p := range l.pieces {
		if l.restarts(p) {
			continue
		}
		if l.pieceBefore(p) == nil {
			if last := l.latest(p.Timeline, p.Start); last != nil {
				l.hole(p.Timeline, last.End(), p.Start, p.files[0].File)
			}
		}
		if p.partial {
			l.checkLeftBehind(p)
		}
	}
}

// hole notes that segments are missing, unless they were pruned: of what is before that, any number may be left.
// File is what comes after them.
func (l *layout) hole(tli wal.Timeline, from, to wal.LSN, file string) {
	if from = max(from, l.c.Pruned.LSN); from >= to {
		return
	}
	size := l.c.Identity.SegmentSize
	first := size.Segment(tli, from)
	first.Timeline = l.ancestry(tli).At(first.End() - 1)
	n := (to - first.Start + wal.LSN(size) - 1) / wal.LSN(size)
	l.fault(Fault{File: first.Name(), Kind: Missing, at: from, end: to, Offset: size.Offset(from),
		Text: fmt.Sprintf("%d of the segments that %s needs are not there, and no gap is recorded", n, file)})
}

// checkLeftBehind looks whether recovery needs all of a partial segment, to get to complete ones.
func (l *layout) checkLeftBehind(p *piece) {
	if p.End() <= l.c.Pruned.LSN {
		return
	}
	for _, g := range l.c.Gaps {
		if g.From > p.Start && g.From <= p.End() {
			return // it ends there
		}
	}
	for _, later := range l.pieces {
		if !later.partial && later.Start >= p.End() && l.belongs(p, later.Timeline) && !l.restartedBetween(p, later) {
			l.fault(Fault{File: p.files[0].File, Kind: Partial, at: p.Start, end: p.End(),
				Text: fmt.Sprintf("is not complete, although %s is", later.files[0].File)})
			return
		}
	}
}

// restartedBetween tells whether the archive began anew between the end of p and that of later.
func (l *layout) restartedBetween(p, later *piece) bool {
	return slices.ContainsFunc(l.c.Divergences, func(v archive.Divergence) bool {
		return v.Timeline == later.Timeline && v.LSN == v.Restart && v.Restart >= p.End() && v.Restart <= later.Start
	})
}

// checkGaps compares the gaps that are recorded with what is there.
func (l *layout) checkGaps() {
	for _, g := range l.c.Gaps {
		last := l.latest(g.Timeline, g.From)
		if last != nil && last.End() < g.From {
			l.hole(g.Timeline, last.End(), g.From, "the gap that is recorded from "+g.From.String())
		}
		for _, p := range l.pieces {
			if p.Timeline == g.Timeline && !p.partial && p.End() > g.From && p.Start < g.To {
				l.fault(Fault{File: p.files[0].File, Kind: Gap, at: p.Start, end: p.End(),
					Text: fmt.Sprintf("is there, and from %s to %s a gap is recorded", g.From, g.To)})
			}
		}
	}
}

// checkAside compares the aborted records that archive.json names with their files, which a person may have deleted.
func (l *layout) checkAside() {
	for _, a := range l.c.Aborted {
		info, err := os.Lstat(filepath.Join(l.c.Path, a.File))
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			l.fault(Fault{File: a.File, Kind: Unreadable, Text: fmt.Sprintf("%q", err)})
			continue
		}
		if want := int64(a.End - a.LSN); info.Size() != want {
			l.fault(Fault{File: a.File, Kind: Aside, at: a.LSN, end: a.End,
				Text: fmt.Sprintf("has %d bytes, archive.json says %d", info.Size(), want)})
		}
	}
}

// stay keeps of the faults of one layout those that another one has too: what was seen once may have been a change
// of the directory under way.
func stay(faults, again []Fault) []Fault {
	return slices.DeleteFunc(faults, func(f Fault) bool { return !slices.Contains(again, f) })
}

// spans puts segments together for people: "from NAME to NAME".
func spans(segments []wal.Segment) (text []string) {
	slices.SortFunc(segments, func(a, b wal.Segment) int {
		return cmp.Or(cmp.Compare(a.Timeline, b.Timeline), cmp.Compare(a.Start, b.Start))
	})
	segments = slices.Compact(segments)
	for i := 0; i < len(segments); {
		j := i + 1
		for j < len(segments) && segments[j] == segments[j-1].Next() {
			j++
		}
		if j == i+1 {
			text = append(text, segments[i].Name())
		} else {
			text = append(text, fmt.Sprintf("%s to %s (%d segments)", segments[i], segments[j-1], j-i))
		}
		i = j
	}
	return text
}
