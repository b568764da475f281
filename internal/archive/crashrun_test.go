package archive

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math/rand/v2"
	"path"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/walfleet/walfleet/internal/wal"
)

// promises are what an archive has said to be durable.
type promises struct {
	bound  bool
	acks   []ack
	sealed []wal.Segment
	gaps   []Gap
	pruned wal.LSN // what is before it may be gone, if archive.json says so
}

func (p promises) clone() promises {
	p.acks, p.sealed, p.gaps = slices.Clone(p.acks), slices.Clone(p.sealed), slices.Clone(p.gaps)
	return p
}

// ack is an acknowledged flush position: all WAL from from to to, in the history of timeline tli.
type ack struct {
	tli      wal.Timeline
	from, to wal.LSN
}

// run drives an archive through a plan, with the calls that a receiver makes and in their order, and checks all
// promises on the way.
type run struct {
	*plan
	r     *rand.Rand
	disk  *memDisk
	made  promises
	epoch int
	calm  bool // large pieces, and no trouble but what the disk makes
	dirty bool // a process was killed and left its files open

	// What a receiver has in memory.
	dir  *Dir
	w    *Writer
	hold wal.LSN
}

// errAgain ends a session without any fault.
var errAgain = errors.New("connect again")

// brokenError is a broken promise.
type brokenError struct{ text string }

func (e *brokenError) Error() string { return e.text }

func broken(format string, args ...any) error { return &brokenError{fmt.Sprintf(format, args...)} }

// finish goes on from wherever the archive is to the plan's end.
func (v *run) finish() error {
	for tries := 0; v.epoch < len(v.epochs); tries++ {
		err := v.session()
		var aborted *AbortedRecordError
		var errno syscall.Errno
		switch {
		case err == nil:
			v.epoch++
			tries = 0
		case errors.Is(err, errAgain), errors.As(err, &aborted):
		case errors.As(err, &errno) && slices.Contains(faultErrnos, errno) && v.disk.faults != nil:
			if v.r.IntN(3) == 0 { // and a person starts the daemon again
				v.dropWriter()
				v.dir = nil
			}
		default:
			return fmt.Errorf("epoch %d (%s): %w", v.epoch, v.epochs[v.epoch].what, err)
		}
		if tries > 100 {
			return broken("epoch %d (%s): no progress: %v", v.epoch, v.epochs[v.epoch].what, err)
		}
	}
	return v.checkEnd()
}

// session is receiver.session: a connection to the server of the current epoch, up to the end of what it has.
func (v *run) session() error {
	if v.dir == nil {
		d := &Dir{path: "archive", disk: v.disk}
		if err := d.load(); err != nil {
			return err
		}
		v.dir, v.hold = d, 0
		if err := v.checkMeta(); err != nil {
			return err
		}
		if err := v.compressSealed(); err != nil {
			return err
		}
	}
	if err := v.dir.Check(crashIdentity); err != nil {
		return err
	}
	e := &v.epochs[v.epoch]
	for tli := wal.Timeline(2); tli <= e.tli; tli++ {
		if err := v.storeHistory(tli); err != nil {
			return err
		}
	}
	if err := v.chooseStart(e); err != nil {
		return err
	}
	for {
		if err := v.stream(e); err != nil {
			return err
		}
		if v.w.Timeline() == e.tli {
			return nil
		}
		if err := v.follow(e); err != nil {
			return err
		}
	}
}

func (v *run) storeHistory(tli wal.Timeline) error {
	_, err := v.dir.StoreHistory(tli, []byte(v.lines[tli].history))
	return err
}

func (v *run) openWriter(tli wal.Timeline, start wal.LSN) (err error) {
	v.w, err = v.dir.OpenWriter(context.Background(), crashIdentity, tli, start)
	if err != nil {
		v.w = nil
		return err
	}
	return v.checkReopened(start)
}

func (v *run) dropWriter() {
	if v.w != nil {
		v.w.Close() // its error is that of a receiver that drops it
		v.w = nil
	}
}

func (v *run) chooseStart(e *epoch) error {
	if v.w != nil {
		v.w.Rewind()
	} else {
		tail, ok, err := v.dir.Tail(crashSegment)
		if err != nil {
			return err
		}
		bind := Origin{Timeline: 1, LSN: crashSegment.Start(v.origin), Source: "slot", Time: time.Unix(1e9, 0)}
		if ok {
			bind.LSN, bind.Source = tail.First.Start, "existing files"
		} else {
			tail.Timeline, tail.Start = 1, bind.LSN
		}
		if !v.dir.Bound() {
			if err := v.dir.Bind(crashIdentity, bind); err != nil {
				return err
			}
		}
		v.made.bound = true
		if err := v.openWriter(tail.Timeline, tail.Start); err != nil {
			return err
		}
	}
	tli, end := v.w.Timeline(), v.w.Durable()
	if tli < e.tli && end > v.lines[tli+1].fork {
		return v.follow(e) // the archive is ahead of the fork
	}
	if tli == e.tli && end > e.end {
		return broken("the archive is ahead of its server: durable up to %s, the server ends at %s", end, e.end)
	}
	if v.w.Pos() < e.oldest {
		return v.skipGap(e)
	}
	return nil
}

// skipGap goes on where the server's WAL begins.
func (v *run) skipGap(e *epoch) error {
	from := v.w.Durable()
	g := Gap{Timeline: v.historyOf(e.tli).At(e.oldest), From: from, To: e.oldest, Reason: "removed", Time: time.Unix(2e9, 0)}
	if g.To <= from {
		return broken("the server has WAL from %s on, the archive up to %s, and that is no gap", g.To, from)
	}
	if err := v.dir.RecordGap(g); err != nil {
		return err
	}
	v.made.gaps = v.dir.Gaps()
	v.dropWriter()
	v.hold = 0
	return v.openWriter(g.Timeline, g.To)
}

func (v *run) follow(e *epoch) error {
	next := v.w.Timeline() + 1
	if err := v.storeHistory(next); err != nil {
		return err
	}
	v.hold = 0
	v.dropWriter()
	if err := v.openWriter(next, crashSegment.Start(v.lines[next].fork)); err != nil {
		return err
	}
	if v.w.Pos() < e.oldest {
		return errAgain // and the server says so
	}
	if next < e.tli && v.w.Durable() > v.lines[next+1].fork {
		return v.follow(e)
	}
	return nil
}

// stream is receiver.receive: up to the end of the writer's timeline, or of what the server has.
func (v *run) stream(e *epoch) error {
	tli, end := v.w.Timeline(), e.end
	if tli < e.tli {
		end = v.lines[tli+1].fork
	}
	if tli > 1 {
		v.hold = max(v.hold, v.lines[tli].fork)
	}
	v.hold = max(v.hold, v.w.Durable())
	if v.w.Pos() == v.w.Written() {
		v.hold = max(v.hold, v.w.Durable()+1)
	}
	pieces := v.pieces()
	for v.w.Pos() < end {
		if v.w.SealDue() || v.r.IntN(3) == 0 {
			if err := v.flush(end); err != nil {
				return err
			}
		}
		to := min(end, v.w.Pos()+wal.LSN(pieces()))
		if err := v.w.Write(v.w.Pos(), e.bytes(v.w.Pos(), to)); err != nil {
			var diverged *DivergenceError
			if !errors.As(err, &diverged) {
				v.dropWriter()
			}
			return err
		}
		if err := v.acknowledge(end); err != nil {
			return err
		}
		if err := v.trouble(end); err != nil {
			return err
		}
	}
	return v.flush(end)
}

// pieces chooses how WAL comes in.
func (v *run) pieces() func() int {
	if v.calm {
		return func() int { return 128 << 10 }
	}
	switch v.r.IntN(3) {
	case 0:
		return func() int { return 1 + v.r.IntN(20<<10) }
	case 1:
		return func() int { return []int{100, 3000, 128 << 10, 128 << 10}[v.r.IntN(4)] }
	}
	return func() int { return 1 + v.r.IntN(100<<10) }
}

// trouble ends some sessions: the connection is lost, the process is stopped, the process is killed.
func (v *run) trouble(end wal.LSN) error {
	if v.calm {
		return nil
	}
	switch v.r.IntN(120) {
	case 0, 1:
		return cmpErr(v.flush(end), errAgain)
	case 2:
		err := v.flush(end)
		if err == nil {
			err = v.w.Trim()
		}
		v.dropWriter()
		v.dir = nil
		return cmpErr(err, errAgain)
	case 3:
		v.w, v.dir, v.dirty = nil, nil, true
		return errAgain
	}
	return nil
}

func cmpErr(err, otherwise error) error {
	if err != nil {
		return err
	}
	return otherwise
}

func (v *run) flush(end wal.LSN) error {
	sealed, err := v.w.Flush()
	v.made.sealed = append(v.made.sealed, sealed...)
	if err != nil {
		v.dropWriter()
		return err
	}
	if len(sealed) > 0 && v.r.IntN(3) > 0 {
		if err := v.compressSealed(); err != nil {
			return err
		}
	}
	if len(sealed) > 0 {
		if err := v.prune(); err != nil {
			return err
		}
	}
	if err := v.acknowledge(end); err != nil || v.calm || v.r.IntN(2) == 0 {
		return err
	}
	v.w.Prepare()
	return nil
}

// compressSealed is what a receiver does beside all else: a fault of the disk is for the next time.
func (v *run) compressSealed() error {
	if v.compress.Method == "" {
		return nil
	}
	plain, err := v.dir.Plain(crashSegment)
	if err != nil {
		return err
	}
	for _, s := range plain {
		if _, err := v.dir.Compress(context.Background(), s, v.compress); err != nil && !(isDiskError(err) && v.disk.faults != nil) {
			return broken("compressing %s: %v", s, err)
		}
	}
	return nil
}

// prune removes old WAL, as the retention does beside all else: a fault of the disk is for the next time.
func (v *run) prune() error {
	if !v.prunes || v.r.IntN(2) == 0 {
		return nil
	}
	limit := crashSegment.Start(v.w.Written() - wal.LSN(v.r.IntN(3<<20)))
	v.made.pruned = max(v.made.pruned, limit)
	if _, err := v.dir.Prune(context.Background(), limit); err != nil && !(isDiskError(err) && v.disk.faults != nil) {
		return broken("pruning before %s: %v", limit, err)
	}
	return nil
}

// checkPruned expects a segment that is gone to be one that archive.json has as pruned, on the disk.
func (v *run) checkPruned(s wal.Segment) error {
	if s.End() > v.made.pruned {
		return broken("%s is gone, and nobody pruned it", s)
	}
	i := v.disk.durable[metaName]
	if i == nil {
		return broken("%s is gone, and so is archive.json", s)
	}
	d := &Dir{path: "archive", disk: &memDisk{names: map[string]*inode{metaName: {cache: i.disk, size: i.syncedSize}}}}
	if err := d.readMeta(); err != nil || d.Pruned().LSN < s.End() {
		return broken("%s was pruned, and archive.json has %+v, %v", s, d.Pruned(), err)
	}
	return nil
}

// sealedName is the name of a sealed segment's file; "": there is none.
func sealedName(names map[string]*inode, s wal.Segment) string {
	for _, suffix := range sealedSuffixes {
		if names[s.Name()+suffix] != nil {
			return s.Name() + suffix
		}
	}
	return ""
}

// unpack is what a compressed file has, in a view of it. A segment is all that it can have.
func unpack(name string, pages []*page, size int64) []byte {
	z, err := decompress(bytes.NewReader(contentOf(pages, size)), path.Ext(name))
	if err != nil {
		return nil
	}
	defer z.Close()
	content := make([]byte, crashSegment+1)
	n, err := io.ReadFull(z, content)
	if err != io.ErrUnexpectedEOF {
		return nil
	}
	return content[:n]
}

// acknowledge is receiver.flushPosition. What is acknowledged must be durable by now.
func (v *run) acknowledge(end wal.LSN) error {
	durable := v.w.Durable()
	if v.w.Pos() < v.w.Written() || durable < v.hold {
		return nil
	}
	a := ack{v.w.Timeline(), v.base(), min(durable, end)}
	n := len(v.made.acks)
	if n > 0 && v.made.acks[n-1].tli == a.tli && v.made.acks[n-1].from == a.from {
		old := v.made.acks[n-1]
		if a.to <= old.to {
			return nil
		}
		v.made.acks[n-1] = a
		a.from = old.to
	} else {
		v.made.acks = append(v.made.acks, a)
		if err := v.checkHistories(a.tli); err != nil {
			return err
		}
	}
	return v.checkAck(a)
}

// base is where the part of the archive begins that has no gap.
func (v *run) base() wal.LSN {
	base := crashSegment.Start(v.origin)
	for _, g := range v.dir.Gaps() {
		base = max(base, g.To)
	}
	return base
}

// checkAck expects acknowledged WAL to be on the disk, under names that are.
func (v *run) checkAck(a ack) error {
	for at := a.from; at < a.to; {
		s := crashSegment.Segment(v.owner(a.tli, at), at)
		to := min(a.to, s.End())
		want := v.lines[s.Timeline].wal[at-crashBegin : to-crashBegin]
		if name := sealedName(v.disk.durable, s); len(name) > len(s.Name()) {
			i := v.disk.durable[name]
			content := unpack(name, i.disk, i.syncedSize)
			if len(content) != int(crashSegment) || !bytes.Equal(content[at-s.Start:to-s.Start], want) {
				return broken("timeline %d is acknowledged up to %s, but %s does not have it", a.tli, a.to, name)
			}
			at = to
			continue
		}
		i := v.disk.durable[s.Name()]
		if i == nil {
			i = v.disk.durable[s.Name()+partialSuffix]
		}
		if i == nil && s.End() <= v.made.pruned {
			if err := v.checkPruned(s); err != nil {
				return err
			}
			at = to
			continue
		}
		if i == nil || i.syncedSize != int64(crashSegment) || !has(i.disk, int64(at-s.Start), want) {
			return broken("timeline %d is acknowledged up to %s, but %s from %s to %s is not on the disk", a.tli, a.to, s, at, to)
		}
		at = to
	}
	return nil
}

// checkHistories expects the histories of a timeline of which WAL is acknowledged to be on the disk.
func (v *run) checkHistories(tli wal.Timeline) error {
	for ; tli > 1; tli-- {
		i := v.disk.durable[wal.HistoryName(tli)]
		if want := v.lines[tli].history; i == nil || i.syncedSize != int64(len(want)) || !has(i.disk, 0, []byte(want)) {
			return broken("WAL is acknowledged, but the history of timeline %d is not on the disk", tli)
		}
	}
	return nil
}

// checkDisk expects a disk to keep all promises, as it is, before anything is mended.
func (v *run) checkDisk() error {
	for _, a := range v.made.acks {
		if err := v.checkAck(a); err != nil {
			return err
		}
	}
	for _, s := range v.made.sealed {
		if sealedName(v.disk.durable, s) == "" {
			if err := v.checkPruned(s); err != nil {
				return fmt.Errorf("it was sealed, and has lost its name: %w", err)
			}
		}
	}
	for name, i := range v.disk.names {
		if s, err := wal.ParseSegment(name[:min(len(name), 24)], crashSegment); err == nil && slices.Contains(compressedSuffixes(), name[24:]) {
			all := v.lines[s.Timeline].wal
			if !bytes.Equal(unpack(name, i.cache, i.size), all[s.Start-crashBegin:min(int(s.End()-crashBegin), len(all))]) {
				return broken("%s is named as a complete segment, and is none (%d bytes)", name, i.size)
			}
		}
		if s, err := wal.ParseSegment(name, crashSegment); err == nil {
			all := v.lines[s.Timeline].wal
			from, to := s.Start-crashBegin, s.End()-crashBegin
			if i.size != int64(crashSegment) || int(to) > len(all) || !has(i.cache, 0, all[from:to]) {
				return broken("%s is named as a complete segment, and is none (%d bytes)", name, i.size)
			}
		}
		if tli, err := wal.ParseHistoryName(name); err == nil {
			if want := v.lines[tli].history; i.size != int64(len(want)) || !has(i.cache, 0, []byte(want)) {
				return broken("%s has %d bytes that are not the server's", name, i.size)
			}
		}
	}
	return nil
}

// checkMeta expects archive.json to have what was written down.
func (v *run) checkMeta() error {
	tli, lsn, bound := v.dir.Origin()
	if v.made.bound && !bound || bound && (tli != 1 || lsn != crashSegment.Start(v.origin)) {
		return broken("the archive's origin was written down, and is %d, %s, %v", tli, lsn, bound)
	}
	gaps := v.dir.Gaps()
	if len(gaps) < len(v.made.gaps) || !slices.Equal(gaps[:len(v.made.gaps)], v.made.gaps) {
		return broken("gaps %v were written down, now they are %v", v.made.gaps, gaps)
	}
	return nil
}

// checkReopened expects a writer that was just opened to have at least what was acknowledged of its timeline.
func (v *run) checkReopened(start wal.LSN) error {
	for _, a := range v.made.acks {
		if a.tli != v.w.Timeline() || a.from != v.base() {
			continue
		}
		want := a.to
		for _, s := range v.lines[a.tli].abandoned {
			if s.end > start && s.start < want {
				want = max(start, s.start) // by design: no CRC speaks for the bytes of that record
			}
		}
		if v.w.Durable() < want {
			return broken("timeline %d is acknowledged up to %s, opened again the archive ends at %s", a.tli, a.to, v.w.Durable())
		}
	}
	return nil
}

// checkEnd expects the archive to have all that the server ever had, but for the gaps.
func (v *run) checkEnd() error {
	last := v.epochs[len(v.epochs)-1]
	complete := v.lines[last.tli].complete
	if v.w.Timeline() != last.tli || v.w.Written() != last.end || v.w.Durable() != complete {
		return broken("the end is timeline %d, written %s, durable %s; not timeline %d, %s, %s", v.w.Timeline(), v.w.Written(), v.w.Durable(), last.tli, last.end, complete)
	}
	whole := ack{last.tli, v.base(), complete}
	v.made.acks = slices.DeleteFunc(v.made.acks, func(a ack) bool { return a.tli == whole.tli && a.from == whole.from })
	v.made.acks = append(v.made.acks, whole)
	for start := whole.from; start+wal.LSN(crashSegment) <= complete; start += wal.LSN(crashSegment) {
		s := crashSegment.Segment(v.owner(last.tli, start), start)
		if sealedName(v.disk.names, s) == "" && s.End() > v.made.pruned {
			return broken("%s is not sealed in the end", s)
		}
	}
	if err := v.checkDisk(); err != nil {
		return fmt.Errorf("at the end: %w", err)
	}
	if err := v.w.Close(); err != nil {
		return err
	}
	v.dir = &Dir{path: "archive", disk: v.disk}
	err := v.dir.load()
	for tries := 0; err != nil && isDiskError(err) && v.disk.faults != nil && tries < 100; tries++ { // as a session does
		err = v.dir.load()
	}
	if err != nil {
		return err
	}
	if err := v.checkMeta(); err != nil {
		return err
	}
	for range 100 { // until the disk is well again
		if err := v.compressSealed(); err != nil {
			return err
		}
	}
	if err := v.checkNames(complete); err != nil {
		return err
	}
	if v.disk.open != 0 && !v.dirty {
		return broken("%d files are still open", v.disk.open)
	}
	return nil
}

// checkNames expects nothing else to be there in the end.
func (v *run) checkNames(complete wal.LSN) error {
	names, _ := v.disk.Names()
	for _, name := range names {
		_, err := wal.ParseHistoryName(name)
		base, partial := strings.CutSuffix(name, partialSuffix)
		packed := slices.Contains(compressedSuffixes(), path.Ext(base))
		base = strings.TrimSuffix(base, path.Ext(base))
		s, serr := wal.ParseSegment(base, crashSegment)
		switch {
		case name == metaName, err == nil, strings.HasSuffix(name, ".aborted"):
		case serr != nil, partial && packed:
			return broken("%s was left behind", name)
		case !partial && packed == (v.compress.Method == ""):
			return broken("%s is there, and segments are compressed with %s", name, v.compress)
		case partial && v.disk.names[base] != nil:
			return broken("%s is there as well as %s", name, base)
		case partial && s.Timeline == v.w.Timeline() && s.Start < complete && s.End() <= complete && s.Start >= max(v.base(), v.made.pruned):
			return broken("%s is still partial, the archive ends at %s", name, complete)
		}
	}
	return nil
}

// place puts the files of a pg_receivewal there, which has synced none of them as far as is known. Where the plan
// compresses, it has too; some are of one that was killed while it filled its last file with zeros.
func (v *run) place() error {
	e := &v.epochs[0]
	for at := crashSegment.Start(v.origin); at < e.end; at += wal.LSN(crashSegment) {
		s := crashSegment.Segment(1, at)
		name := s.Name()
		if s.End() > v.lines[1].complete || s.End() > e.end {
			name += partialSuffix
		}
		content, size := e.bytes(at, min(s.End(), e.end)), int64(crashSegment)
		suffix := v.compress.suffix()
		switch {
		case suffix == ".zst": // not known to it
		case suffix != "":
			base, partial := strings.CutSuffix(name, partialSuffix)
			name = base + suffix
			if partial {
				name += partialSuffix
			}
			content = pack(v.compress, content)
			size = int64(len(content))
		case s.End() > e.end && v.seed%2 == 0:
			size = int64(len(content))
		}
		f, err := v.disk.Create(name, fs.FileMode(0o600))
		if err != nil {
			return err
		}
		_, err = f.WriteAt(content, 0)
		if err := errors.Join(err, f.Allocate(size), f.Close()); err != nil {
			return err
		}
	}
	return nil
}
