package wal

import (
	"fmt"
	"math"
	"strconv"
	"strings"
)

// History is the ancestry of a timeline: what its history file says.
type History struct {
	Timeline Timeline // the timeline whose history this is
	Forks    []Fork   // its ancestors, oldest first; none for timeline 1
}

// Fork is the end of an ancestor: where the next timeline (of the next Fork, or the History's own)
// branched off.
type Fork struct {
	Timeline Timeline // the ancestor
	End      LSN      // exclusive end of the ancestor's WAL in this history
	Reason   string   // why, in the server's words; not to be shown unescaped
}

// ParseHistory reads the content of timeline tli's history file by the rules of readTimeLineHistory in
// timeline.c: a line names an ancestor and the position where it was left, and may go on with a reason;
// blank lines and those that begin with # do not count; timelines ascend, and are below tli.
//
// Positions may descend in a file that PostgreSQL wrote: recovery along timeline 2 that was told to stop
// before the position where 2 left 1 makes a timeline 3 whose file says "1 X, 2 Y" with Y below X.
// Nothing of 2, and of 1 only what is before Y, belongs to 3 then, so a Fork's End is never above that of
// a later one.
func ParseHistory(tli Timeline, data []byte) (History, error) {
	h := History{Timeline: tli}
	n := 0
	for line := range strings.SplitSeq(string(data), "\n") {
		n++
		f, ok, err := parseFork(line)
		if err != nil {
			return History{}, fmt.Errorf("history of timeline %d, line %d: %w", tli, n, err)
		}
		if !ok {
			continue
		}
		if k := len(h.Forks); k > 0 && f.Timeline <= h.Forks[k-1].Timeline {
			return History{}, fmt.Errorf("history of timeline %d, line %d: timelines do not ascend", tli, n)
		}
		if f.Timeline >= tli {
			return History{}, fmt.Errorf("history of timeline %d, line %d: ancestor %d is not below it", tli, n, f.Timeline)
		}
		h.Forks = append(h.Forks, f)
	}
	for i := len(h.Forks) - 2; i >= 0; i-- {
		h.Forks[i].End = min(h.Forks[i].End, h.Forks[i+1].End)
	}
	return h, nil
}

// parseFork reads one line; ok is false for one that holds nothing. PostgreSQL's pattern is
// "%u\t%X/%X" with the rest of the line ignored.
func parseFork(line string) (f Fork, ok bool, err error) {
	const space = " \t\r\v\f"
	line = strings.Trim(line, space)
	if line == "" || line[0] == '#' {
		return Fork{}, false, nil
	}
	word := func() (w string) {
		i := strings.IndexAny(line, space)
		if i < 0 {
			i = len(line)
		}
		w, line = line[:i], strings.TrimLeft(line[i:], space)
		return w
	}
	id := word()
	tli, err := strconv.ParseUint(id, 10, 32)
	if err != nil || tli == 0 {
		return Fork{}, false, fmt.Errorf("expected a timeline, got %s", quote(id))
	}
	end, err := ParseLSN(word())
	if err != nil {
		return Fork{}, false, err
	}
	if end == 0 {
		return Fork{}, false, fmt.Errorf("timeline %d ends at 0/0", tli)
	}
	return Fork{Timeline: Timeline(tli), End: end, Reason: line}, true, nil
}

// HistoryName is the name of timeline tli's history file (TLHistoryFileName in xlog_internal.h).
func HistoryName(tli Timeline) string {
	return fmt.Sprintf("%08X.history", uint32(tli))
}

// ParseHistoryName reads the name of a history file, without any further suffix.
func ParseHistoryName(name string) (Timeline, error) {
	digits, ok := strings.CutSuffix(name, ".history")
	if ok {
		if tli, ok := parseUpperHex8(digits); ok && tli != 0 {
			return Timeline(tli), nil
		}
	}
	return 0, fmt.Errorf("invalid history file name %s", quote(name))
}

// End is the exclusive end of timeline tli's WAL in this history: the largest LSN for h.Timeline itself,
// which has not ended. ok is false when tli is neither that nor an ancestor.
func (h History) End(tli Timeline) (end LSN, ok bool) {
	if tli == h.Timeline {
		return math.MaxUint64, true
	}
	for _, f := range h.Forks {
		if f.Timeline == tli {
			return f.End, true
		}
	}
	return 0, false
}

// Next is the timeline that follows tli in this history; ok is false when tli is no ancestor. It may
// hold no WAL of its own, and end where tli does.
func (h History) Next(tli Timeline) (next Timeline, ok bool) {
	for i, f := range h.Forks {
		if f.Timeline != tli {
			continue
		}
		if i+1 < len(h.Forks) {
			return h.Forks[i+1].Timeline, true
		}
		return h.Timeline, true
	}
	return 0, false
}

// At is the timeline that WAL position l belongs to in this history
// (tliOfPointInHistory in timeline.c).
func (h History) At(l LSN) Timeline {
	for _, f := range h.Forks {
		if l < f.End {
			return f.Timeline
		}
	}
	return h.Timeline
}
