package archive

import (
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/walfleet/walfleet/internal/wal"
)

// WAL that the archive had and the server does not go on with is kept beside the
// segments, under names that no reader of the archive takes for a segment, and
// archive.json names it.

// Aborted is an incomplete record that the archive had received, and that the
// server replaced by something else after a crash or a promotion.
type Aborted struct {
	Timeline wal.Timeline
	LSN      wal.LSN // inclusive start of the record
	End      wal.LSN // exclusive end of the bytes that were kept
	File     string  // name of the file that has them
	Time     time.Time
}

// Divergence is a place at which the server's WAL is not the archive's, and from
// which on a person decided for the server's.
type Divergence struct {
	Timeline wal.Timeline
	LSN      wal.LSN // where the server's WAL was seen to differ, or to end
	Restart  wal.LSN // where the archive goes on, the start of a segment; at most LSN
	Kept     []Kept  // the files from there on
	Reason   string
	Time     time.Time
}

// Kept is a file that was put aside.
type Kept struct {
	Name string `json:"name"` // that it had
	File string `json:"file"` // that it has now
}

type metaAborted struct {
	Timeline uint32    `json:"timeline"`
	LSN      string    `json:"lsn"`
	End      string    `json:"end"`
	File     string    `json:"file"`
	Time     time.Time `json:"time"`
}

func (m metaAborted) value() (Aborted, error) {
	lsn, err1 := wal.ParseLSN(m.LSN)
	end, err2 := wal.ParseLSN(m.End)
	if err1 != nil || err2 != nil || m.Timeline == 0 || lsn >= end || !segmentName(m.File) || !strings.HasSuffix(m.File, abortedSuffix) {
		return Aborted{}, errors.New("no record")
	}
	return Aborted{wal.Timeline(m.Timeline), lsn, end, m.File, m.Time}, nil
}

type metaDivergence struct {
	Timeline uint32    `json:"timeline"`
	LSN      string    `json:"lsn"`
	Restart  string    `json:"restart"`
	Kept     []Kept    `json:"kept"`
	Gaps     []metaGap `json:"gaps,omitempty"`    // recorded before, from there on
	Pending  bool      `json:"pending,omitempty"` // not all of Kept have their new names yet
	Time     time.Time `json:"time"`
	Reason   string    `json:"reason"`
}

func (m metaDivergence) value() (Divergence, error) {
	lsn, err1 := wal.ParseLSN(m.LSN)
	restart, err2 := wal.ParseLSN(m.Restart)
	if err1 != nil || err2 != nil || m.Timeline == 0 || restart > lsn {
		return Divergence{}, errors.New("no divergence")
	}
	for _, k := range m.Kept {
		if !segmentName(k.Name) || !segmentName(k.File) || !strings.HasSuffix(k.File, divergedSuffix) {
			return Divergence{}, errors.New("no file name")
		}
	}
	return Divergence{wal.Timeline(m.Timeline), lsn, restart, m.Kept, m.Reason, m.Time}, nil
}

// segmentName tells a name that begins with a segment's from all others, paths
// above all: archive.json may have been edited.
func segmentName(name string) bool {
	if len(name) < 24 || strings.ContainsAny(name, "/\x00") {
		return false
	}
	_, err := wal.ParseSegment(name[:24], smallestSegment)
	return err == nil
}

// Aborted lists the incomplete records that were kept aside, oldest first.
func (d *Dir) Aborted() []Aborted {
	m := d.meta.Load()
	if m == nil {
		return nil
	}
	all := make([]Aborted, len(m.Aborted))
	for i, a := range m.Aborted {
		all[i], _ = a.value() // checked when they were read
	}
	return all
}

// Divergences lists the divergences that were accepted, oldest first.
func (d *Dir) Divergences() []Divergence {
	m := d.meta.Load()
	if m == nil {
		return nil
	}
	all := make([]Divergence, len(m.Divergences))
	for i, v := range m.Divergences {
		all[i], _ = v.value() // checked when they were read
	}
	return all
}

// saveAborted keeps the bytes from from to to, which partial files of a timeline
// have, in a file of their own, and notes that in archive.json. All is durable
// when it returns.
func (d *Dir) saveAborted(size wal.SegmentSize, tli wal.Timeline, from, to wal.LSN) (a Aborted, err error) {
	a = Aborted{Timeline: tli, LSN: from, End: to, Time: time.Now().UTC()}
	// PostgreSQL names its .backup files in the same way.
	prefix := fmt.Sprintf("%s.%08X", size.Segment(tli, from).Name(), size.Offset(from))
	if a.File, err = d.freeName(prefix, abortedSuffix); err != nil {
		return a, err
	}
	f, err := writeTemp(d.disk, a.File, d.fileMode(), func(f file) error {
		for lsn := from; lsn < to; {
			s := size.Segment(tli, lsn)
			n := min(to, s.End()) - lsn
			if err := copyRange(d.disk, s.Name()+partialSuffix, int64(lsn-s.Start), f, int64(lsn-from), int64(n)); err != nil {
				return err
			}
			lsn += n
		}
		return nil
	})
	if err != nil {
		return a, err
	}
	if err := errors.Join(f.Close(), publish(d.disk, a.File, d.disk.Rename)); err != nil {
		return a, err
	}
	if d.meta.Load() == nil {
		return a, nil
	}
	return a, d.change(func(m *meta) {
		m.Aborted = append(slices.Clone(m.Aborted), metaAborted{uint32(tli), from.String(), to.String(), a.File, a.Time})
	})
}

// AcceptDivergence decides for the server's WAL from lsn on, where it differs
// from the archive's or ends before it: the archive goes on at the start of that
// segment, and what it has from there on is kept under other names. The decision
// is in archive.json before the first file gets its new name; opening the
// directory goes on with what a crash interrupted. No Writer may be open.
func (d *Dir) AcceptDivergence(tli wal.Timeline, lsn wal.LSN, reason string) (Divergence, error) {
	if d.meta.Load() == nil {
		return Divergence{}, fmt.Errorf("archive directory %s is not bound to a cluster yet", d.path)
	}
	size := d.SegmentSize()
	v := Divergence{Timeline: tli, LSN: lsn, Restart: size.Start(lsn), Reason: reason, Time: time.Now().UTC()}
	c, err := d.scan(size)
	if err != nil {
		return v, err
	}
	for _, name := range slices.Sorted(maps.Keys(c.files)) {
		if s := c.files[name]; s.Timeline != tli || s.End() <= v.Restart {
			continue
		}
		aside, err := d.freeName(name, divergedSuffix)
		if err != nil {
			return v, err
		}
		v.Kept = append(v.Kept, Kept{name, aside})
	}
	err = d.change(func(m *meta) {
		var gaps []metaGap
		for i, g := range d.Gaps() {
			if g.Timeline == tli && g.To > v.Restart {
				gaps = append(gaps, m.Gaps[i])
			}
		}
		m.Gaps = slices.DeleteFunc(slices.Clone(m.Gaps), func(g metaGap) bool { return slices.Contains(gaps, g) })
		m.Divergences = append(slices.Clone(m.Divergences), metaDivergence{
			uint32(tli), lsn.String(), v.Restart.String(), v.Kept, gaps, true, v.Time, reason,
		})
	})
	if err != nil {
		return v, err
	}
	return v, d.putAside()
}

// putAside gives the files of a divergence that was just accepted their new
// names, as far as a crash has not done that already.
func (d *Dir) putAside() error {
	m := d.meta.Load()
	if m == nil {
		return nil
	}
	pending := false
	for _, v := range m.Divergences {
		if !v.Pending {
			continue
		}
		for _, k := range v.Kept {
			if err := d.putFileAside(k); err != nil {
				return err
			}
		}
		pending = true
	}
	if !pending {
		return nil
	}
	if err := d.disk.Sync(); err != nil {
		return err
	}
	return d.change(func(m *meta) {
		m.Divergences = slices.Clone(m.Divergences)
		for i := range m.Divergences {
			m.Divergences[i].Pending = false
		}
	})
}

func (d *Dir) putFileAside(k Kept) error {
	there, err := exists(d.disk, k.File)
	switch {
	case err != nil:
		return err
	case !there:
		err = d.disk.Rename(k.Name, k.File)
	case d.disk.Same(k.Name, k.File): // half of a rename that is a link and a removal
		err = errors.Join(d.disk.Sync(), d.disk.Remove(k.Name))
	}
	if errors.Is(err, fs.ErrNotExist) {
		return nil // a person has moved it away
	}
	return err
}

// accepted tells whether a person decided that the archive goes on at start with
// WAL that does not continue what is before it.
func (d *Dir) accepted(tli wal.Timeline, start wal.LSN) bool {
	return slices.ContainsFunc(d.Divergences(), func(v Divergence) bool {
		return v.Timeline == tli && v.Restart == start && v.LSN == start
	})
}

// freeName is a name that no file has: base and suffix, if need be with a number
// between them.
func (d *Dir) freeName(base, suffix string) (string, error) {
	for n := 1; ; n++ {
		name := base + suffix
		if n > 1 {
			name = fmt.Sprintf("%s.%d%s", base, n, suffix)
		}
		if there, err := exists(d.disk, name); err != nil || !there {
			return name, err
		}
	}
}

// exists tells whether there is a file of that name.
func exists(d disk, name string) (bool, error) {
	f, err := d.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	if err != nil {
		return false, err
	}
	return true, f.Close()
}

// copyRange copies n bytes from offset of the file of that name to to.
func copyRange(d disk, name string, offset int64, to file, at, n int64) error {
	from, err := d.Open(name)
	if err != nil {
		return err
	}
	defer from.Close()
	buf := make([]byte, min(1<<20, n))
	for done := int64(0); done < n; {
		p := buf[:min(int64(len(buf)), n-done)]
		if _, err := from.ReadAt(p, offset+done); err != nil {
			return err
		}
		if _, err := to.WriteAt(p, at+done); err != nil {
			return err
		}
		done += int64(len(p))
	}
	return nil
}
