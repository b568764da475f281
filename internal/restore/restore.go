// Package restore is the way back out of an archive: what a server in recovery
// asks its restore_command for. It reads archives without locking or changing
// anything in them, while somebody archives into them or not.
package restore

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

// Request is what a server asks its restore_command for.
type Request struct {
	Archive  string // the archive's directory
	Name     string // of the file: %f
	Path     string // where to put it: %p, usually pg_wal/RECOVERYXLOG below the working directory
	Partial  bool   // what a segment's .partial file has will do, where there is nothing better
	Prefetch int    // how many segments are made ready for the next calls; 0: none
}

// NotFoundError says that the archive does not have a file, and that nothing is
// wrong with that: the server may look into its own pg_wal, try another timeline,
// or end recovery.
type NotFoundError struct {
	Reason string
	Hint   string // for a person who expected more; usually ""
}

func (e *NotFoundError) Error() string { return e.Reason }

// Run puts the file that the server asks for at its place, whole and durable, or
// leaves that as it is.
//
// The error is a *NotFoundError when recovery may go on without the file. After
// any other one it must not: PostgreSQL takes a file that it does not get for the
// end of all WAL, and opens for writing there.
func Run(ctx context.Context, r Request) error {
	c, err := r.open()
	if err != nil {
		return err
	}
	if tli, err := wal.ParseHistoryName(r.Name); err == nil {
		return r.history(ctx, c, tli)
	}
	s, err := wal.ParseSegment(r.Name, c.Identity.SegmentSize)
	if err == nil {
		return r.segment(ctx, c, s)
	}
	// PostgreSQL asks for nothing but segments and histories (the callers of
	// RestoreArchivedFile). A person may try what else archives have.
	if segment, rest, _ := strings.Cut(r.Name, "."); isName(segment) && (rest == "partial" || strings.HasSuffix(rest, "backup")) {
		return &NotFoundError{Reason: "neither a complete segment nor a history"}
	}
	return fmt.Errorf("%q is no name of a history, or of a segment of %d MB as the archive %s has them: "+
		"the restore_command needs this cluster's archive, %%f, and %%p", r.Name, c.Identity.SegmentSize>>20, r.Archive)
}

// isName tells whether a name is a segment's of a cluster whatever size its
// segments have.
func isName(name string) bool {
	_, err := wal.ParseSegment(name, 1<<20) // whose names are all others' too
	return err == nil
}

// open reads whose archive this is, and makes sure that the server is of the same
// cluster: it would take the WAL of another one for the end of its own.
func (r Request) open() (archive.Catalogue, error) {
	if _, err := os.Stat(r.Archive); err != nil {
		return archive.Catalogue{}, fmt.Errorf("the archive cannot be read: %w; is it mounted?", err)
	}
	c, err := archive.ReadMeta(r.Archive)
	if err != nil {
		return c, err
	}
	if !c.Bound {
		return c, fmt.Errorf("%s has no archive.json: it is not an archive of walfleet, or not mounted", r.Archive)
	}
	// Before anything is written: this may be a person who tries the command, with the archive as the working directory.
	inside, err := sameFile(r.Archive, filepath.Dir(r.Path))
	if err != nil {
		return c, fmt.Errorf("the directory to restore into: %w", err)
	}
	if inside {
		return c, fmt.Errorf("%q is in the archive itself: give a path in the server's pg_wal", r.Path)
	}
	if id, ok := r.serverID(); ok && id != c.Identity.SystemID {
		return c, fmt.Errorf("the archive %s is of the cluster with system identifier %d, this server is of %d: correct the restore_command",
			r.Archive, c.Identity.SystemID, id)
	}
	return c, nil
}

// serverID reads the system identifier of the server that asks, the first field
// of its control file (ControlFileData in pg_control.h). ok is false when the
// path is in no data directory.
func (r Request) serverID() (id uint64, ok bool) {
	f, err := os.Open(r.inData("global/pg_control"))
	if err != nil {
		return 0, false
	}
	defer f.Close()
	var b [8]byte
	if _, err := io.ReadFull(f, b[:]); err != nil {
		return 0, false
	}
	return binary.LittleEndian.Uint64(b[:]), true
}

func sameFile(a, b string) (bool, error) {
	x, err := os.Stat(a)
	if err != nil {
		return false, err
	}
	y, err := os.Stat(b)
	if err != nil {
		return false, err
	}
	return os.SameFile(x, y), nil
}

// history restores a timeline's history file. One that is missing though there is
// WAL of the timeline, or a younger one's history names it, is damage: the server would recover along an older timeline,
// and open where that ends.
func (r Request) history(ctx context.Context, c archive.Catalogue, tli wal.Timeline) error {
	r.forgetAhead() // a server asks before the first segment and after the last one
	_, err := c.History(tli)
	if errors.Is(err, fs.ErrNotExist) {
		c, err := archive.ReadCatalogue(ctx, r.Archive)
		if err != nil {
			return err
		}
		none := &NotFoundError{Reason: fmt.Sprintf("there is no timeline %d", tli)}
		// Timeline 1 has no history, which is asked for all the same when 2 begins.
		has := slices.ContainsFunc(c.Files, func(f archive.StoredFile) bool { return f.Timeline == tli && tli > 1 })
		for _, younger := range c.Histories {
			if h, err := c.History(younger); err == nil && tli > 1 && slices.ContainsFunc(h.Forks, func(f wal.Fork) bool { return f.Timeline == tli }) {
				has = true // a server looks no further than a timeline that there is not
			}
		}
		if _, err := os.Stat(r.own(r.Name)); !has || err == nil {
			return none
		}
		return fmt.Errorf("the archive %s knows of timeline %d, and lost its history: put %s back, from a server's pg_wal or another copy",
			r.Archive, tli, r.Name)
	}
	if err != nil {
		return err
	}
	f, err := os.Open(filepath.Join(r.Archive, r.Name))
	if err != nil {
		return err
	}
	defer f.Close()
	out, err := createOutput(r.Path)
	if err != nil {
		return err
	}
	if _, err := io.Copy(out, f); err != nil {
		return errors.Join(err, out.discard())
	}
	return out.publish()
}

// inData is the path of a file in the server's data directory, if %p is in its
// pg_wal, which may be a link to somewhere else.
func (r Request) inData(name string) string {
	return filepath.Join(filepath.Dir(filepath.Dir(r.Path)), name)
}

// own is the path of a file in the server's own pg_wal.
func (r Request) own(name string) string { return filepath.Join(filepath.Dir(r.Path), name) }

// segment restores a complete segment, or says what it means that there is none.
func (r Request) segment(ctx context.Context, c archive.Catalogue, s wal.Segment) error {
	gap, err := gapIn(c, s)
	if err != nil {
		return err
	}
	if gap != nil {
		return r.unlessOwn(ctx, c, s, gapError(c, gap))
	}
	for range retries {
		err := r.sealed(ctx, c, s)
		if !errors.Is(err, errNoSegment) {
			return err
		}
		full, err := archive.ReadCatalogue(ctx, r.Archive)
		if err != nil {
			return err
		}
		if slices.Contains(full.Sealed(), s) {
			continue // since a moment ago
		}
		err = r.missing(ctx, full, s)
		if !errors.Is(err, errNoSegment) {
			return err
		}
	}
	return fmt.Errorf("the files of %s come and go in %s; look at what happens there", s, r.Archive)
}

// errNoSegment says that a file went away between two looks at the archive, which
// is what sealing and compressing look like.
var errNoSegment = errors.New("no such segment in the archive")

// retries bounds how often that is believed.
const retries = 5

// sealed restores a complete segment that is there.
func (r Request) sealed(ctx context.Context, c archive.Catalogue, s wal.Segment) error {
	in, err := c.Open(s)
	if errors.Is(err, fs.ErrNotExist) {
		return errNoSegment
	}
	if err != nil {
		return err
	}
	defer in.Close()
	if r.prefetches() {
		name, err := r.aheadName(c, s, in)
		if err != nil {
			return err
		}
		if ready, err := r.takeReady(name, s.Size); ready || err != nil {
			return err
		}
	}
	out, err := createOutput(r.Path)
	if err != nil {
		return err
	}
	if err := copySegment(ctx, out, in, s, c.Identity.SystemID); err != nil {
		return errors.Join(err, out.discard())
	}
	return out.publish()
}

// damaged is the error for a file of the archive that is not what its name says.
func damaged(in *archive.Reader, s wal.Segment, why error) error {
	return fmt.Errorf("%s in the archive is damaged: %w; put a good copy there, or %s", in.Name, why, orStop(s.Start))
}

// copySegment copies a complete segment, and makes sure that it is one: of that
// size, with checksums as they are in compressed files and nothing behind, with
// pages of that place, timeline and cluster, and records that follow each other, with
// right checksums: a server takes a damaged record for the end of all WAL, and opens.
func copySegment(ctx context.Context, out io.Writer, in *archive.Reader, s wal.Segment, systemID uint64) error {
	walker := wal.NewWalker(wal.WalkerConfig{Start: s.Start, Timeline: s.Timeline, Size: s.Size, SystemID: systemID, CheckCRC: true})
	buf := make([]byte, copyBuffer)
	for at := int64(0); at < int64(s.Size); {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, err := io.ReadFull(in, buf[:min(copyBuffer, int64(s.Size)-at)])
		if err != nil {
			return damaged(in, s, fmt.Errorf("it ends at offset %d of %d: %w", at+int64(n), s.Size, err))
		}
		if err := walker.Feed(buf[:n]); err != nil {
			return damaged(in, s, err)
		}
		if _, err := out.Write(buf[:n]); err != nil {
			return err
		}
		at += int64(n)
	}
	// What compressed files are checked by is at their end.
	if n, err := io.ReadFull(in, buf[:1]); n > 0 {
		return damaged(in, s, fmt.Errorf("it has more than %d bytes", s.Size))
	} else if err != io.EOF {
		return damaged(in, s, fmt.Errorf("at its end: %w", err))
	}
	return nil
}

const copyBuffer = 256 << 10 // bytes

// missing says what it means that a segment is not there.
func (r Request) missing(ctx context.Context, c archive.Catalogue, s wal.Segment) error {
	none := &NotFoundError{Reason: "the archive does not have it"}
	h, err := c.History(s.Timeline)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if n := len(h.Forks); err == nil && n > 0 && s.End() <= h.Forks[n-1].End {
		return none // the timeline begins later; what was before is asked for under its ancestors' names
	}
	later, err := needsIt(c, s)
	if err != nil {
		return err
	}
	partials := slices.DeleteFunc(slices.Clone(c.Files), func(f archive.StoredFile) bool { return f.Segment != s || !f.Partial })
	switch {
	case r.Partial && len(partials) > 0:
		return r.partial(ctx, c, s, partials, later)
	case later != nil:
		return r.unlessOwn(ctx, c, s, holeError(c, s, *later))
	case len(partials) > 0 && !r.standby():
		none.Hint = fmt.Sprintf("the archive has %s, which is not complete; \"restore-wal --partial\" takes what it has", partials[0].File)
	}
	return none
}

// standby tells whether the server that asks is a standby, which asks again and
// again for what is not there yet.
func (r Request) standby() bool {
	_, err := os.Stat(r.inData("standby.signal"))
	return err == nil
}

// unlessOwn is err, which tells why recovery must not end at s, or a
// *NotFoundError when the server has all of that segment itself.
func (r Request) unlessOwn(ctx context.Context, c archive.Catalogue, s wal.Segment, err error) error {
	f, openErr := os.Open(r.own(s.Name()))
	if openErr != nil {
		return err
	}
	defer f.Close()
	walker := wal.NewWalker(wal.WalkerConfig{Start: s.Start, Timeline: s.Timeline, Size: s.Size, SystemID: c.Identity.SystemID, CheckCRC: true})
	if feed(ctx, walker, f, s.Size) != nil {
		return err
	}
	return &NotFoundError{Reason: "the archive does not have it, but this server does"}
}

// feed gives a segment to the walker. The error is io.EOF or io.ErrUnexpectedEOF
// when there is less.
func feed(ctx context.Context, walker *wal.Walker, r io.Reader, size wal.SegmentSize) error {
	buf := make([]byte, copyBuffer)
	for at := int64(0); at < int64(size); {
		if err := ctx.Err(); err != nil {
			return err
		}
		n, readErr := io.ReadFull(r, buf[:min(copyBuffer, int64(size)-at)])
		if err := cmp.Or(walker.Feed(buf[:n]), readErr); err != nil {
			return err
		}
		at += int64(n)
	}
	return nil
}

// inLine tells whether all of s is part of what a timeline consists of.
func inLine(c archive.Catalogue, tli wal.Timeline, s wal.Segment) (bool, error) {
	if tli <= s.Timeline {
		return tli == s.Timeline, nil
	}
	h, err := c.History(tli)
	if errors.Is(err, fs.ErrNotExist) {
		return false, nil
	}
	end, ok := h.End(s.Timeline)
	return ok && s.End() <= end, err
}

// gapIn is the recorded gap that s has a part in; nil: none.
func gapIn(c archive.Catalogue, s wal.Segment) (*archive.Gap, error) {
	for i := range c.Gaps {
		g := &c.Gaps[i]
		if s.End() <= g.From || s.Start >= g.To {
			continue
		}
		if in, err := inLine(c, g.Timeline, s); in || err != nil {
			return g, err
		}
	}
	return nil, nil
}

// needsIt is the first complete segment that only a server which has replayed s
// comes to; nil: there is none.
func needsIt(c archive.Catalogue, s wal.Segment) (*wal.Segment, error) {
	lines := map[wal.Timeline]bool{}
	for _, later := range c.Sealed() {
		if later.Start <= s.Start {
			continue
		}
		in, known := lines[later.Timeline]
		if !known {
			var err error
			if in, err = inLine(c, later.Timeline, s); err != nil {
				return nil, err
			}
			lines[later.Timeline] = in
		}
		if in {
			return &later, nil
		}
	}
	return nil, nil
}

// orStop is what is left to do where WAL cannot be had: to be content with what is before.
func orStop(at wal.LSN) string {
	return fmt.Sprintf("recover to a target before %s, or as far as it goes with \"|| exit 1\" at the end of the restore_command", at)
}

func gapError(c archive.Catalogue, g *archive.Gap) error {
	return fmt.Errorf("the archive %s lacks the WAL from %s to %s for good, a gap that was accepted on %s: no recovery can pass it; "+
		"begin with a base backup that was started after %s, or %s",
		c.Path, g.From, g.To, g.Time.UTC().Format(time.DateOnly), g.To, orStop(c.Identity.SegmentSize.Start(g.From)))
}

func holeError(c archive.Catalogue, s, later wal.Segment) error {
	if s.End() <= c.Origin.LSN {
		return fmt.Errorf("the archive %s began at %s, behind it: this base backup is too old; take one that was started after that",
			c.Path, c.Origin.LSN)
	}
	if s.End() <= c.Pruned.LSN { // some of what is before may be there still
		return fmt.Errorf("the archive %s was pruned up to %s, behind it: this base backup is too old; take one that was started after that",
			c.Path, c.Pruned.LSN)
	}
	if first := c.Sealed()[0]; s.Start < first.Start {
		return fmt.Errorf("the archive %s has WAL from %s on, behind it: this base backup is too old, or segments were removed; "+
			"take a base backup that was started after that, or put them back", c.Path, first.Start)
	}
	return fmt.Errorf("it is missing in the archive %s, which has %s: recovery would end in the middle of the WAL; "+
		"put it back, from a server's pg_wal or another copy, or begin with a base backup that was started after %s, or %s",
		c.Path, later.Name(), s.End(), orStop(s.Start))
}
