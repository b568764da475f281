package console

import (
	"cmp"
	"fmt"
	"math"
	"slices"
	"strings"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/wal"
)

// mapView is what an archive holds, drawn and in words: a lane for each timeline, on an axis of positions. All
// widths are in percent of the drawing, so that it fills what room there is, and Width is the least that it needs.
type mapView struct {
	State string // "reading": not read yet; "failed"; "ready"
	Error string
	Time  moment

	Width, Height, Bottom int // pixels; Bottom is where the axis is
	Ticks                 []tick
	Lanes                 []lane
	Forks                 []fork
	Marks                 []mark
	Spans                 []windowSpan

	Holes   []holeView
	Windows []windowView
}

type tick struct{ X, Label, Anchor string }

type lane struct {
	Timeline, Parent uint32
	Fork             string
	TextY, RailY     int
	Bars             []bar
}

// bar is WAL that is there; Class is "range", or "partial" for a segment in progress.
type bar struct {
	Class, From, To, X, W string
	Y                     int
}

type fork struct {
	From, To uint32
	X        string
	Y1, Y2   int
}

// mark is WAL that is missing.
type mark struct {
	Kind   string
	Number int // in the list
	X, W   string
	Y      int
	Label  string // its size, where there is room for it
}

type windowSpan struct {
	Number    int
	X1, X2    string
	Y, Y1, Y2 int
}

type holeView struct {
	Kind, From, To, Size, Reason string
	Timeline                     uint32
	Time                         moment
}

type windowView struct {
	Timeline, FromTimeline uint32
	From, To, Partial      string
	First, Last            moment
	PartialTime            moment
	Problem                string
}

const (
	leastStretch = 16  // pixels between any two positions that the map shows
	leastMap     = 560 // pixels
	tickRoom     = 88  // pixels for the label of a position
	markRoom     = 110 // pixels for that of what is missing
	laneHeight   = 76
	laneBar      = 30 // from the lane's top to its bar
	barHeight    = 14
	windowHeight = 26
)

// mapOf is the map of an archive that was read, or what is known without.
func mapOf(r reading) mapView {
	switch {
	case r.ended.IsZero():
		return mapView{State: "reading"}
	case r.contents.Time.IsZero():
		return mapView{State: "failed", Error: visible(r.err.Error())}
	}
	v := drawMap(r.contents)
	v.State, v.Time = "ready", momentOf(r.contents.Time)
	if r.err != nil {
		v.Error = strings.Join(slices.DeleteFunc([]string{v.Error, visible(r.err.Error())}, func(s string) bool { return s == "" }), "; ")
	}
	return v
}

// drawMap is a pure function of the contents.
func drawMap(c fleet.Contents) mapView {
	v := mapView{Error: visible(c.Error)}
	shown := positions(c)
	a := newAxis(shown)
	v.Width = a.width

	laneOf := map[uint32]int{} // its index
	for i, t := range c.Timelines {
		laneOf[t.Timeline] = i
	}
	top := func(i int) int { return 14 + i*laneHeight } // of a lane
	for i, t := range c.Timelines {
		l := lane{Timeline: t.Timeline, Parent: t.Parent, Fork: visible(t.ForkLSN), TextY: top(i) + 12, RailY: top(i) + laneBar + barHeight/2}
		for _, r := range t.Ranges {
			l.Bars = append(l.Bars, a.bar("range", r.StartLSN, r.EndLSN, top(i)+laneBar))
		}
		for _, p := range t.Partial {
			if s, ok := partialOf(p, c.SegmentSize); ok {
				l.Bars = append(l.Bars, a.bar("partial", s.Start.String(), s.End().String(), top(i)+laneBar))
			}
		}
		v.Lanes = append(v.Lanes, l)
		if parent, ok := laneOf[t.Parent]; ok && t.ForkLSN != "" {
			v.Forks = append(v.Forks, fork{t.Parent, t.Timeline, percent(a.x(lsnOf(t.ForkLSN))), top(parent) + laneBar + barHeight/2, top(i) + laneBar + barHeight/2})
		}
	}

	free := map[int]float64{} // of each lane, from where on a label has room
	for i, h := range c.Holes {
		from, to := lsnOf(h.From), lsnOf(h.To)
		size := fleet.BytesText(int64(max(to, from) - from))
		v.Holes = append(v.Holes, holeView{kindOf(h.Kind), visible(h.From), visible(h.To), size, visible(h.Reason), h.Timeline, momentOf(h.Time)})
		on, ok := laneOf[h.Timeline]
		if !ok {
			continue // the list has it
		}
		m := mark{Kind: kindOf(h.Kind), Number: i + 1, X: percent(a.x(from)), W: percent(a.x(to) - a.x(from)), Y: top(on) + laneBar - 4}
		if to <= from {
			m.W = fmt.Sprint(leastStretch)
		}
		middle := (a.x(from) + a.x(to)) / 2
		if half := a.percentOf(markRoom / 2); middle-half >= free[on] && middle+half <= 100 {
			m.Label, free[on] = size, middle+half
		}
		v.Marks = append(v.Marks, m)
	}

	y := top(len(c.Timelines)) + 8
	for i, w := range c.Recoverable {
		end := cmp.Or(w.PartialLSN, w.ToLSN)
		v.Spans = append(v.Spans, windowSpan{i + 1, percent(a.x(lsnOf(w.FromLSN))), percent(a.x(lsnOf(end))), y + 10, y + 5, y + 15})
		v.Windows = append(v.Windows, windowView{w.Timeline, w.FromTimeline, visible(w.FromLSN), visible(w.ToLSN), visible(w.PartialLSN),
			momentOf(w.FirstCommit), momentOf(w.LastCommit), momentOf(w.PartialTime), visible(w.Problem)})
		y += windowHeight
	}
	v.Bottom, v.Height = y, y+20
	v.Ticks = a.ticks(holesFirst(c, shown))
	return v
}

// kindOf is a kind of hole that the pages have words for.
func kindOf(kind string) string {
	if kind == "gap" || kind == "divergence" {
		return kind
	}
	return "hole"
}

// lsnOf is an LSN of a report, which comes from walfleet itself.
func lsnOf(s string) wal.LSN {
	l, _ := wal.ParseLSN(s)
	return l
}

func partialOf(p fleet.PartialReport, size int64) (wal.Segment, bool) {
	s, err := wal.ParseSegment(p.Segment, wal.SegmentSize(size))
	return s, err == nil
}

// positions are all that the map shows, ascending, each once.
func positions(c fleet.Contents) (list []wal.LSN) {
	add := func(texts ...string) {
		for _, s := range texts {
			if s != "" {
				list = append(list, lsnOf(s))
			}
		}
	}
	for _, t := range c.Timelines {
		add(t.ForkLSN)
		for _, r := range t.Ranges {
			add(r.StartLSN, r.EndLSN)
		}
		for _, p := range t.Partial {
			if s, ok := partialOf(p, c.SegmentSize); ok {
				list = append(list, s.Start, s.End())
			}
		}
	}
	for _, h := range c.Holes {
		add(h.From, h.To)
	}
	for _, w := range c.Recoverable {
		add(w.FromLSN, w.ToLSN, w.PartialLSN)
	}
	slices.Sort(list)
	return slices.Compact(list)
}

// axis gives positions a place. Each stretch between two that are shown has a least width, and of what is left as
// much as the square root of its length asks for: a gap of a segment in an archive of terabytes is seen, and what
// is long still looks long.
type axis struct {
	at    []wal.LSN
	place []float64 // percent
	width int       // pixels that the least widths need
}

func newAxis(at []wal.LSN) axis {
	a := axis{at: at, place: make([]float64, len(at)), width: leastMap}
	n := len(at) - 1
	if n < 1 {
		return a
	}
	a.width = max(leastMap, 2*n*leastStretch)
	least := a.percentOf(leastStretch)
	roots := 0.0
	for i := range n {
		roots += math.Sqrt(float64(at[i+1] - at[i]))
	}
	rest := 100 - float64(n)*least
	for i := range n {
		a.place[i+1] = a.place[i] + least + rest*math.Sqrt(float64(at[i+1]-at[i]))/roots
	}
	a.place[n] = 100
	return a
}

func (a axis) percentOf(pixels int) float64 { return 100 * float64(pixels) / float64(a.width) }

// x is the place of a position that is shown.
func (a axis) x(l wal.LSN) float64 {
	i, ok := slices.BinarySearch(a.at, l)
	if !ok {
		return 0
	}
	return a.place[i]
}

func (a axis) bar(class, from, to string, y int) bar {
	x1, x2 := a.x(lsnOf(from)), a.x(lsnOf(to))
	return bar{class, visible(from), visible(to), percent(x1), percent(x2 - x1), y}
}

// holesFirst are the positions of the ends, of what is missing, of forks, and then all.
func holesFirst(c fleet.Contents, all []wal.LSN) []wal.LSN {
	if len(all) == 0 {
		return nil
	}
	list := []wal.LSN{all[0], all[len(all)-1]}
	for _, h := range c.Holes {
		list = append(list, lsnOf(h.From))
	}
	for _, t := range c.Timelines {
		if t.ForkLSN != "" {
			list = append(list, lsnOf(t.ForkLSN))
		}
	}
	return append(list, all...)
}

// ticks are lines at positions, with labels as long as there is room for them.
func (a axis) ticks(at []wal.LSN) (list []tick) {
	room := a.percentOf(tickRoom)
	var taken [][2]float64
	done := map[wal.LSN]bool{}
	for _, l := range at {
		if done[l] {
			continue
		}
		done[l] = true
		x := a.x(l)
		t, begin := tick{X: percent(x), Anchor: "middle"}, x-room/2
		switch {
		case x < room/2:
			t.Anchor, begin = "start", x
		case x > 100-room/2:
			t.Anchor, begin = "end", x-room
		}
		if !slices.ContainsFunc(taken, func(other [2]float64) bool { return begin < other[1] && begin+room > other[0] }) {
			t.Label = l.String()
			taken = append(taken, [2]float64{begin, begin + room})
		}
		list = append(list, t)
	}
	return list
}

func percent(x float64) string { return fmt.Sprintf("%.3f%%", x) }
