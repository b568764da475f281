package archive

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"time"

	"github.com/walfleet/walfleet/internal/wal"
)

// Pruning removes the beginning of an archive: all WAL before one position, of every
// timeline. So no timeline's WAL gets a hole, whatever its ancestors are: each loses what is
// before that position, and keeps what comes after it.
//
// The position is in archive.json, durably, before the first file goes. What is before it
// is not a part of the archive any more, so a prune that is cut off, by a power loss too,
// leaves an archive without a hole; the next one removes the rest.

// PruneRule says what may go. Before, OlderThan and KeepSize each let WAL go by
// themselves, those that are not zero; Backups hold it.
type PruneRule struct {
	Before    wal.LSN   // WAL before the segment that has it
	OlderThan time.Time // WAL of segments that were last written to, and whose last commit was, before it
	KeepSize  int64     // the oldest WAL, until the files of segments have at most so many bytes
	Backups   []Backup  // which keep all WAL from their beginnings on
}

// PrunePlan is what a prune removes.
type PrunePlan struct {
	Limit wal.LSN      // exclusive, the start of a segment: where the archive begins afterwards; 0: nothing goes
	Files []StoredFile // oldest first
	Held  []string     // what kept WAL that the rule would let go, in words
}

// PlanPrune finds out what a rule lets go. It changes nothing, and reads segments only to
// see the times of their last commits, for OlderThan.
func (c Catalogue) PlanPrune(ctx context.Context, rule PruneRule) (p PrunePlan, err error) {
	if !c.Bound {
		return p, fmt.Errorf("%s has no archive.json: what pg_receivewal archived alone is pruned with pg_archivecleanup", c.Path)
	}
	size := c.Identity.SegmentSize
	p.Limit = size.Start(rule.Before)
	if rule.KeepSize > 0 {
		p.Limit = max(p.Limit, c.beyondSize(rule.KeepSize))
	}
	if !rule.OlderThan.IsZero() {
		limit, err := c.beforeTime(ctx, rule.OlderThan)
		if err != nil {
			return PrunePlan{}, err
		}
		p.Limit = max(p.Limit, limit)
	}
	hold := func(limit wal.LSN, format string, args ...any) {
		if limit < p.Limit {
			p.Limit = limit
			p.Held = append(p.Held, fmt.Sprintf(format, args...))
		}
	}
	for _, b := range rule.Backups {
		hold(size.Start(b.Start), "the base backup %q needs WAL from %s on", b.Path, b.Start)
	}
	hold(c.listing().essential(c.restarts(), size), "WAL that was archived last stays")
	for _, f := range c.Files {
		if f.End() <= p.Limit {
			p.Files = append(p.Files, f)
		}
	}
	if len(p.Files) == 0 {
		p.Limit = 0
	}
	return p, nil
}

// Without is the Catalogue after a prune.
func (c Catalogue) Without(p PrunePlan) Catalogue {
	c.Files = slices.DeleteFunc(slices.Clone(c.Files), func(f StoredFile) bool { return f.End() <= p.Limit })
	c.Pruned.LSN = max(c.Pruned.LSN, p.Limit)
	return c
}

// Newest is when the archive was written to last, or now, if that is earlier. From there
// ages count: an archive that stands still, as when its primary is dead, does not get older.
func (c Catalogue) Newest(now time.Time) time.Time {
	var newest time.Time
	for _, f := range c.Files {
		if f.Modified.After(newest) {
			newest = f.Modified
		}
	}
	if newest.After(now) {
		return now
	}
	return newest
}

// beyondSize is the position before which WAL has to go for the files to have at most
// size bytes.
func (c Catalogue) beyondSize(size int64) wal.LSN {
	total := int64(0)
	byEnd := map[wal.LSN]int64{}
	for _, f := range c.Files {
		total += f.Bytes
		byEnd[f.End()] += f.Bytes
	}
	limit := wal.LSN(0)
	for _, end := range slices.Sorted(maps.Keys(byEnd)) {
		if total <= size {
			break
		}
		total -= byEnd[end]
		limit = end
	}
	return limit
}

// beforeTime is the position before which all segments are older than when. Files tell by
// when they were written, which is after the commits in them; but a clock can be set back,
// so the commits of the last segments that would go have to agree.
func (c Catalogue) beforeTime(ctx context.Context, when time.Time) (wal.LSN, error) {
	limit := ^wal.LSN(0)
	for _, f := range c.Files {
		if !f.Modified.Before(when) {
			limit = min(limit, f.Start)
		}
	}
	for _, timeline := range c.lastBefore(limit) {
		for i, s := range slices.Backward(timeline) {
			last, err := c.LastCommit(ctx, timeline[:i+1]) // an idle segment tells nothing by itself
			if err != nil {
				return 0, fmt.Errorf("the time of the last commit in %s: %w", s.Name(), err)
			}
			if last.Time.Before(when) {
				break
			}
			limit = min(limit, s.Start)
		}
	}
	if limit == ^wal.LSN(0) { // all are older
		limit = 0
		for _, f := range c.Files {
			limit = max(limit, f.End())
		}
	}
	return limit, nil
}

// lastBefore lists the complete segments of each timeline that end by limit.
func (c Catalogue) lastBefore(limit wal.LSN) map[wal.Timeline][]wal.Segment {
	all := map[wal.Timeline][]wal.Segment{}
	for _, s := range c.Sealed() {
		if s.End() <= limit {
			all[s.Timeline] = append(all[s.Timeline], s)
		}
	}
	return all
}

// essential is where what is needed to go on archiving begins: the segment before the
// archive's tail, with whose last record the next one is compared.
func (n listing) essential(restarts map[wal.Timeline]wal.LSN, size wal.SegmentSize) wal.LSN {
	t, _ := n.tail(restarts)
	return t.Start - min(t.Start, wal.LSN(size))
}

// Prune removes all WAL before limit, of every timeline, but nothing that archiving goes
// on with. It returns the names of the files that it has removed, also with an error, or
// when ctx was done before all was. Another goroutine than the one that uses d may call it.
func (d *Dir) Prune(ctx context.Context, limit wal.LSN) (removed []string, err error) {
	size := d.SegmentSize()
	if size == 0 {
		return nil, fmt.Errorf("archive directory %s is not bound to a cluster yet", d.path)
	}
	n, err := d.scan(size)
	if err != nil {
		return nil, fmt.Errorf("archive directory: %w", err)
	}
	limit = min(size.Start(limit), n.essential(d.restarts(), size))
	var segments []wal.Segment
	for _, s := range n.files {
		if s.End() <= limit {
			segments = append(segments, s)
		}
	}
	if len(segments) == 0 {
		return nil, nil
	}
	slices.SortFunc(segments, olderSegment)
	segments = slices.Compact(segments)
	if limit > d.Pruned().LSN {
		err := d.change(func(m *meta) { m.Pruned = &metaPruned{limit.String(), time.Now().UTC().Truncate(time.Second)} })
		if err != nil {
			return nil, err
		}
	}
	for _, s := range segments {
		if err = ctx.Err(); err != nil {
			break
		}
		names, rerr := d.removeSegment(s)
		removed = append(removed, names...)
		if err = rerr; err != nil {
			break
		}
	}
	if len(removed) > 0 {
		err = cmp.Or(err, d.disk.Sync())
	}
	if err != nil {
		err = fmt.Errorf("pruning: %w", err)
	}
	return removed, err
}

// removeSegment removes all files of a segment. One that is being compressed does not
// come back: see writeCompressed.
func (d *Dir) removeSegment(s wal.Segment) (removed []string, err error) {
	d.names.Lock()
	defer d.names.Unlock()
	for _, partial := range []string{partialSuffix, ""} {
		for _, suffix := range sealedSuffixes {
			name := s.Name() + suffix + partial
			switch err := d.disk.Remove(name); {
			case err == nil:
				removed = append(removed, name)
			case !errors.Is(err, fs.ErrNotExist):
				return removed, err
			}
		}
	}
	return removed, nil
}
