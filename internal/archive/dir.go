// Package archive is one cluster's directory: its identity, its lock, and the
// durable writing of segments and histories. docs/archive-format.md describes
// what is on disk.
package archive

import (
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/gofrs/flock"

	"github.com/walfleet/walfleet/internal/wal"
)

const (
	metaName      = "archive.json"
	lockName      = ".lock"
	partialSuffix = ".partial"
	metaFormat    = 1

	// What is kept aside; see aside.go.
	abortedSuffix  = ".aborted"
	divergedSuffix = ".diverged"
)

// ErrLocked says that another process archives into the directory.
var ErrLocked = errors.New("locked by another walfleet")

// Identity is what binds a directory to one cluster.
type Identity struct {
	SystemID    uint64
	SegmentSize wal.SegmentSize
}

// Origin is where an archive began.
type Origin struct {
	Timeline wal.Timeline
	LSN      wal.LSN // inclusive start of the first segment
	Source   string  // what decided it: "slot", "current position", "existing files"
	Time     time.Time
}

// Gap is WAL that is missing in an archive for good, by a decision.
type Gap struct {
	Timeline wal.Timeline // on which the archive goes on
	From     wal.LSN      // inclusive: the end of what was archived
	To       wal.LSN      // exclusive: where the archive goes on, the start of a segment
	Reason   string
	Time     time.Time
}

// IdentityError says that the directory belongs to another cluster.
type IdentityError struct{ Reason string }

func (e *IdentityError) Error() string { return e.Reason }

// FileError is a file that does not fit into the archive and needs a person.
type FileError struct{ Path, Reason string }

func (e *FileError) Error() string { return fmt.Sprintf("%s: %s", e.Path, e.Reason) }

// Dir is a cluster's directory, locked by this process until Close. It is used
// by one goroutine at a time, but for what says otherwise.
type Dir struct {
	path  string
	disk  disk
	lock  *flock.Flock
	meta  atomic.Pointer[meta] // nil until the directory is bound; who changes it holds changing
	group atomic.Bool
	// names excludes the two steps that put a compressed segment in the place of a
	// plain one from a listing, which could miss both.
	names    sync.Mutex
	changing sync.Mutex // held while archive.json is rewritten
	// observe is told how long each sync of WAL took; nil: nobody is.
	observe func(time.Duration)
	// distrusted are names of partial files that a sync failed for. A second sync
	// would return nil all the same, so they are replaced before they are used.
	distrusted map[string]bool
}

// meta is archive.json.
type meta struct {
	Format      int         `json:"format"`
	SystemID    string      `json:"system_identifier"` // decimal; a JSON number would lose digits
	SegmentSize uint32      `json:"segment_size"`      // bytes
	Origin      metaOrigin  `json:"origin"`
	Pruned      *metaPruned `json:"pruned,omitempty"`
	Gaps        []metaGap   `json:"gaps,omitempty"`

	Aborted     []metaAborted    `json:"aborted,omitempty"`
	Divergences []metaDivergence `json:"divergences,omitempty"`
}

type metaGap struct {
	Timeline uint32    `json:"timeline"`
	From     string    `json:"from"`
	To       string    `json:"to"`
	Time     time.Time `json:"time"`
	Reason   string    `json:"reason"`
}

type metaOrigin struct {
	Timeline uint32    `json:"timeline"`
	LSN      string    `json:"lsn"`
	Source   string    `json:"source"`
	Time     time.Time `json:"time"`
}

type metaPruned struct {
	LSN  string    `json:"lsn"`
	Time time.Time `json:"time"`
}

// Open makes the directory when it is missing, and locks it. The error is
// ErrLocked when another process has it.
func Open(path string) (*Dir, error) { return open(path, osDisk(path)) }

// OpenUnsynced is Open for an archive that nothing is synced for: what a crash of
// the machine leaves of it may have holes.
func OpenUnsynced(path string) (*Dir, error) { return open(path, unsynced{osDisk(path)}) }

func open(path string, disk disk) (*Dir, error) {
	if err := MakeDir(path, 0o700); err != nil {
		return nil, fmt.Errorf("archive directory: %w", err)
	}
	lock := flock.New(filepath.Join(path, lockName), flock.SetPermissions(0o600))
	locked, err := lock.TryLock()
	if err != nil {
		return nil, fmt.Errorf("archive directory: lock: %w", err)
	}
	if !locked {
		return nil, fmt.Errorf("archive directory %s: %w", path, ErrLocked)
	}
	d := &Dir{path: path, disk: disk, lock: lock}
	if err := d.load(); err != nil {
		return nil, errors.Join(err, d.Close())
	}
	return d, nil
}

// load makes durable what is there, mends what a crash left, and reads
// archive.json. A sealed segment is trusted by its name from then on, and a
// pg_receivewal that was told not to sync may have given it that.
func (d *Dir) load() error {
	if err := d.disk.SyncAll(); err != nil {
		return fmt.Errorf("archive directory: %w", err)
	}
	if err := d.mend(); err != nil {
		return fmt.Errorf("archive directory: %w", err)
	}
	if err := d.readMeta(); err != nil {
		return err
	}
	if info, err := os.Stat(d.pathOf(metaName)); err == nil {
		d.group.Store(info.Mode()&0o040 != 0) // until a server says so
	}
	if err := d.putAside(); err != nil {
		return fmt.Errorf("archive directory: %w", err)
	}
	return nil
}

// Close releases the lock.
func (d *Dir) Close() error { return d.lock.Close() }

// Path is the directory's path.
func (d *Dir) Path() string { return d.path }

// SetGroupReadable decides the mode of files made from now on: 0640 instead of
// 0600, as pg_receivewal does where the server's data directory is readable by
// the group.
func (d *Dir) SetGroupReadable(group bool) { d.group.Store(group) }

// ObserveSyncs has f told how long each sync of WAL takes from now on, whether it succeeds
// or not. f is called by the goroutine that flushes, one call at a time.
func (d *Dir) ObserveSyncs(f func(time.Duration)) { d.observe = f }

// synced tells how long a sync of WAL took that began at a time.
func (d *Dir) synced(began time.Time) {
	if d.observe != nil {
		d.observe(time.Since(began))
	}
}

func (d *Dir) fileMode() fs.FileMode {
	if d.group.Load() {
		return 0o640
	}
	return 0o600
}

// mend removes what a crash can leave behind: unfinished temporary files, and
// the first of a segment's two names where sealing is not one operation.
func (d *Dir) mend() error {
	names, err := d.disk.Names()
	if err != nil {
		return err
	}
	for _, name := range names {
		remove := isTemporary(name)
		if base, ok := strings.CutSuffix(name, partialSuffix); ok {
			if remove = d.disk.Same(name, base); remove {
				if err := d.disk.Sync(); err != nil { // the other name may not be durable yet
					return err
				}
			}
		}
		if remove {
			if err := d.disk.Remove(name); err != nil {
				return err
			}
		}
	}
	return nil
}

// isTemporary tells whether a name is one that writeTemp makes.
func isTemporary(name string) bool {
	base, ok := strings.CutSuffix(name, tempSuffix)
	_, history := wal.ParseHistoryName(base)
	return ok && (base == metaName || slices.Contains(records, base) || history == nil || segmentName(base) && slices.Contains(tempOf, path.Ext(base)))
}

// tempOf are the suffixes of segments' files that are written under a temporary
// name first.
var tempOf = append([]string{partialSuffix, abortedSuffix}, compressedSuffixes()...)

func (d *Dir) readMeta() error {
	path := d.pathOf(metaName)
	data, err := readFile(d.disk, metaName)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var m meta
	if err := json.Unmarshal(data, &m); err != nil {
		return &FileError{path, fmt.Sprintf("is damaged (%v); restore it from a copy, or move the directory away", err)}
	}
	if m.Format != metaFormat {
		return &FileError{path, fmt.Sprintf("has format %d, this walfleet knows %d", m.Format, metaFormat)}
	}
	_, err1 := strconv.ParseUint(m.SystemID, 10, 64)
	lsn, err2 := wal.ParseLSN(m.Origin.LSN)
	size := wal.SegmentSize(m.SegmentSize)
	if err1 != nil || err2 != nil || !size.Valid() || size.Offset(lsn) != 0 || m.Origin.Timeline == 0 {
		return &FileError{path, "is damaged: it lacks a valid system_identifier, segment_size or origin"}
	}
	if p := m.Pruned; p != nil {
		if lsn, err := wal.ParseLSN(p.LSN); err != nil || lsn == 0 || size.Offset(lsn) != 0 {
			return &FileError{path, "is damaged: what it says was pruned makes no sense"}
		}
	}
	for _, g := range m.Gaps {
		from, err1 := wal.ParseLSN(g.From)
		to, err2 := wal.ParseLSN(g.To)
		if err1 != nil || err2 != nil || g.Timeline == 0 || from >= to || size.Offset(to) != 0 {
			return &FileError{path, "is damaged: it has a gap that makes no sense"}
		}
	}
	for _, a := range m.Aborted {
		if _, err := a.value(); err != nil {
			return &FileError{path, "is damaged: it has an aborted record that makes no sense"}
		}
	}
	for _, g := range m.Divergences {
		if v, err := g.value(); err != nil || size.Offset(v.Restart) != 0 {
			return &FileError{path, "is damaged: it has a divergence that makes no sense"}
		}
	}
	d.meta.Store(&m)
	return nil
}

// Check compares the directory's cluster with the one that a server belongs to,
// and returns an IdentityError when they differ. A directory that is not bound
// yet, but holds segments (of a pg_receivewal, say), is judged by their headers.
func (d *Dir) Check(id Identity) error {
	if m := d.meta.Load(); m != nil {
		systemID, _ := strconv.ParseUint(m.SystemID, 10, 64)
		return compareIdentity(d.path, Identity{systemID, wal.SegmentSize(m.SegmentSize)}, id)
	}
	c, err := d.scan(smallestSegment) // whose names are all others' too
	if err != nil {
		return err
	}
	for name := range c.files {
		got, ok, err := d.readIdentity(name)
		if err != nil {
			return err
		}
		if ok {
			return compareIdentity(d.pathOf(name), got, id)
		}
	}
	if len(c.sealed) > 0 {
		return &FileError{d.path, "holds segments and no archive.json, and none of them tells which cluster it is of; begin with an empty directory"}
	}
	return nil
}

const smallestSegment = wal.SegmentSize(1 << 20)

func compareIdentity(what string, have, server Identity) error {
	if have.SystemID != server.SystemID {
		return &IdentityError{fmt.Sprintf("%s belongs to the cluster with system identifier %d, the server has %d", what, have.SystemID, server.SystemID)}
	}
	if have.SegmentSize != server.SegmentSize {
		return &IdentityError{fmt.Sprintf("%s has segments of %d bytes, the server has %d", what, have.SegmentSize, server.SegmentSize)}
	}
	return nil
}

// readIdentity reads a segment's long page header (XLogLongPageHeaderData,
// xlog_internal.h). ok is false when nothing has been written there.
func (d *Dir) readIdentity(name string) (id Identity, ok bool, err error) {
	f, err := d.disk.Open(name)
	if err != nil {
		return id, false, err
	}
	defer f.Close()
	r, err := decompress(from(f, 0), path.Ext(strings.TrimSuffix(name, partialSuffix)))
	if err != nil {
		return id, false, onlyDiskErrors(err)
	}
	defer r.Close()
	page := make([]byte, wal.PageSize)
	if _, err := io.ReadFull(r, page); err != nil {
		return id, false, onlyDiskErrors(err)
	}
	id.SystemID, id.SegmentSize, ok = wal.ParseLongHeader(page)
	return id, ok, nil
}

// Bound reports whether the directory belongs to a cluster already.
func (d *Dir) Bound() bool { return d.meta.Load() != nil }

// SegmentSize is the size of a bound directory's segments; 0: it is not bound.
func (d *Dir) SegmentSize() wal.SegmentSize {
	m := d.meta.Load()
	if m == nil {
		return 0
	}
	return wal.SegmentSize(m.SegmentSize)
}

// Origin is where the archive of a bound directory began, or is going to.
func (d *Dir) Origin() (tli wal.Timeline, lsn wal.LSN, bound bool) {
	m := d.meta.Load()
	if m == nil {
		return 0, 0, false
	}
	lsn, _ = wal.ParseLSN(m.Origin.LSN) // checked when it was read
	return wal.Timeline(m.Origin.Timeline), lsn, true
}

// Bind writes archive.json, which binds an unbound directory to a cluster for
// ever and says where its archive began.
func (d *Dir) Bind(id Identity, origin Origin) error {
	d.changing.Lock()
	defer d.changing.Unlock()
	if d.meta.Load() != nil {
		return fmt.Errorf("archive directory %s is bound already", d.path)
	}
	// Files that another program put here count as durable from here on.
	c, err := d.scan(id.SegmentSize)
	if err != nil {
		return err
	}
	for name := range c.files {
		if err := syncFile(d.disk, name); err != nil {
			return err
		}
	}
	m := &meta{
		Format:      metaFormat,
		SystemID:    strconv.FormatUint(id.SystemID, 10),
		SegmentSize: uint32(id.SegmentSize),
		Origin: metaOrigin{
			Timeline: uint32(origin.Timeline), LSN: origin.LSN.String(), Source: origin.Source, Time: origin.Time.UTC(),
		},
	}
	return d.writeMeta(m)
}

// change rewrites archive.json, whose directory is bound, with what do changes in a
// copy. What do appends to or deletes from it must clone first.
func (d *Dir) change(do func(*meta)) error {
	d.changing.Lock()
	defer d.changing.Unlock()
	m := *d.meta.Load()
	do(&m)
	return d.writeMeta(&m)
}

// writeMeta makes m the content of archive.json. What is there was read, or
// written in vain by an earlier attempt. d.changing is held.
func (d *Dir) writeMeta(m *meta) error {
	data, err := json.MarshalIndent(m, "", "  ")
	if err != nil {
		return err
	}
	if err := storeFile(d.disk, metaName, append(data, '\n'), d.fileMode(), d.disk.Replace); err != nil {
		return fmt.Errorf("archive directory: %w", err)
	}
	d.meta.Store(m)
	return nil
}

// RecordGap writes down that the WAL of a gap is missing for good. From then on
// the archive's tail is behind the gap.
func (d *Dir) RecordGap(g Gap) error {
	return d.change(func(m *meta) {
		m.Gaps = append(slices.Clone(m.Gaps), metaGap{
			Timeline: uint32(g.Timeline), From: g.From.String(), To: g.To.String(), Time: g.Time.UTC(), Reason: g.Reason,
		})
	})
}

// Pruned is what was removed of an archive: all WAL before LSN, of every timeline.
type Pruned struct {
	LSN  wal.LSN // exclusive, the start of a segment; 0: nothing was removed
	Time time.Time
}

// Pruned is what was removed last, or is going to be.
func (d *Dir) Pruned() Pruned {
	m := d.meta.Load()
	if m == nil || m.Pruned == nil {
		return Pruned{}
	}
	lsn, _ := wal.ParseLSN(m.Pruned.LSN) // checked when it was read
	return Pruned{lsn, m.Pruned.Time}
}

// Gaps lists the gaps that were recorded, in the order in which that was done.
func (d *Dir) Gaps() []Gap {
	m := d.meta.Load()
	if m == nil {
		return nil
	}
	gaps := make([]Gap, len(m.Gaps))
	for i, g := range m.Gaps {
		from, _ := wal.ParseLSN(g.From) // checked when they were read
		to, _ := wal.ParseLSN(g.To)
		gaps[i] = Gap{wal.Timeline(g.Timeline), from, to, g.Reason, g.Time}
	}
	return gaps
}

// History reads a stored timeline history; ok is false when there is none.
func (d *Dir) History(tli wal.Timeline) (h wal.History, ok bool, err error) {
	name := wal.HistoryName(tli)
	data, err := readFile(d.disk, name)
	if errors.Is(err, fs.ErrNotExist) {
		return wal.History{}, false, nil
	}
	if err != nil {
		return wal.History{}, false, err
	}
	if h, err = wal.ParseHistory(tli, data); err != nil {
		return wal.History{}, false, &FileError{d.pathOf(name), err.Error()}
	}
	return h, true, nil
}

// StoreHistory stores a timeline's history file. One that is there with other
// content is never replaced: the error is an IdentityError, for the server's
// history is not the archive's.
func (d *Dir) StoreHistory(tli wal.Timeline, data []byte) (wal.History, error) {
	h, err := wal.ParseHistory(tli, data)
	if err != nil {
		return h, err
	}
	name := wal.HistoryName(tli)
	have, err := readFile(d.disk, name)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		err = storeFile(d.disk, name, data, d.fileMode(), d.disk.Rename)
	case err == nil && string(have) != string(data):
		err = &IdentityError{fmt.Sprintf("the server's history of timeline %d differs from the archive's %s", tli, d.pathOf(name))}
	}
	return h, err
}

// Free is how many bytes of the directory's file system this process may still
// use.
func (d *Dir) Free() (int64, error) {
	free, err := d.disk.Free()
	if err != nil {
		return 0, fmt.Errorf("free space of %s: %w", d.path, err)
	}
	return free, nil
}

// distrust remembers that a sync of a file failed.
func (d *Dir) distrust(name string) {
	if d.distrusted == nil {
		d.distrusted = map[string]bool{}
	}
	d.distrusted[name] = true
}

// pathOf is a file's path, for errors.
func (d *Dir) pathOf(name string) string { return filepath.Join(d.path, name) }

// listing is what a directory holds, by the names of its files.
type listing struct {
	sealed  map[wal.Segment]bool
	partial map[wal.Segment]bool
	files   map[string]wal.Segment // the names of both
	plain   map[string]bool        // those that are not compressed
}

// scan reads the directory.
func (d *Dir) scan(size wal.SegmentSize) (listing, error) {
	d.names.Lock()
	all, err := d.disk.Names()
	d.names.Unlock()
	return segmentNames(all, size), err
}

// segmentNames picks the names of segments, which are all that is of concern to
// us.
func segmentNames(all []string, size wal.SegmentSize) listing {
	n := listing{map[wal.Segment]bool{}, map[wal.Segment]bool{}, map[string]wal.Segment{}, map[string]bool{}}
	for _, name := range all {
		whole, partial := strings.CutSuffix(name, partialSuffix)
		for _, suffix := range sealedSuffixes {
			base, ok := strings.CutSuffix(whole, suffix)
			s, err := wal.ParseSegment(base, size)
			if !ok || err != nil {
				continue
			}
			n.files[name] = s
			if suffix == "" {
				n.plain[name] = true
			}
			if partial {
				n.partial[s] = true
			} else {
				n.sealed[s] = true
			}
		}
	}
	return n
}

// restarts are where the archive went on, on each timeline, by the last decision
// about a divergence or a gap.
func (d *Dir) restarts() map[wal.Timeline]wal.LSN { return restartsOf(d.Divergences(), d.Gaps()) }

func restartsOf(divergences []Divergence, gaps []Gap) map[wal.Timeline]wal.LSN {
	restarts := map[wal.Timeline]wal.LSN{}
	for _, v := range divergences {
		restarts[v.Timeline] = v.Restart
	}
	for _, g := range gaps { // those behind a divergence were put aside with it
		restarts[g.Timeline] = max(restarts[g.Timeline], g.To)
	}
	return restarts
}

// checkSealedSize refuses a file that has a complete segment's name and is none:
// a copy that was cut short, say. One that is gone was compressed since it was
// listed, and had its size.
func (d *Dir) checkSealedSize(name string, size wal.SegmentSize) error {
	f, err := d.disk.Open(name)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	defer f.Close()
	have, err := f.Size()
	if err == nil && have != int64(size) {
		err = &FileError{d.pathOf(name), fmt.Sprintf("has %d bytes, a complete segment has %d; move it away and the server sends the segment again, if it still has it", have, size)}
	}
	return err
}

// Tail is where an archive ends.
type Tail struct {
	Timeline wal.Timeline
	Start    wal.LSN     // start of the first segment that is not sealed
	First    wal.Segment // the archive's oldest segment
}

// Tail finds the end of the archive: on the highest timeline that has a segment,
// after the highest sealed one or the last gap, else at the lowest partial one.
// ok is false for an archive without segments.
func (d *Dir) Tail(size wal.SegmentSize) (t Tail, ok bool, err error) {
	c, err := d.scan(size)
	if err != nil {
		return Tail{}, false, err
	}
	t, ok = c.tail(d.restarts())
	if !ok || t.Start == 0 {
		return t, ok, nil
	}
	if restart, ok := d.restarts()[t.Timeline]; ok && restart >= t.Start {
		return t, true, nil // nothing before it counts
	}
	if last := size.Segment(t.Timeline, t.Start-1).Name(); c.plain[last] {
		return t, ok, d.checkSealedSize(last, size)
	}
	return t, ok, nil
}

// tail is Tail by names alone.
func (n listing) tail(restarts map[wal.Timeline]wal.LSN) (t Tail, ok bool) {
	for _, set := range []map[wal.Segment]bool{n.sealed, n.partial} {
		for s := range set {
			t.Timeline = max(t.Timeline, s.Timeline)
			if !ok || s.Start < t.First.Start || s.Start == t.First.Start && s.Timeline < t.First.Timeline {
				t.First, ok = s, true
			}
		}
	}
	for tli := range restarts {
		t.Timeline = max(t.Timeline, tli)
	}
	if ok = ok || len(restarts) > 0; !ok {
		return Tail{}, false
	}
	lowest := wal.LSN(math.MaxUint64)
	for s := range n.partial {
		if s.Timeline == t.Timeline {
			lowest = min(lowest, s.Start)
		}
	}
	for s := range n.sealed {
		if s.Timeline == t.Timeline {
			t.Start = max(t.Start, s.End())
		}
	}
	if restart, ok := restarts[t.Timeline]; ok && restart >= t.Start {
		t.Start = restart
		return t, true
	}
	if t.Start == 0 {
		t.Start = lowest
	}
	return t, true
}
