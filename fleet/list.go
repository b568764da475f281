package fleet

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

// Contents is what an archive holds, and what can be recovered from it.
type Contents struct {
	Time      time.Time `json:"time"`
	Cluster   string    `json:"cluster,omitempty"`
	Directory string    `json:"directory"`
	Error     string    `json:"error,omitempty"` // why something is missing here

	SystemIdentifier string    `json:"system_identifier,omitempty"`
	SegmentSize      int64     `json:"segment_size,omitempty"`
	OriginLSN        string    `json:"origin_lsn,omitempty"` // where the archive began
	OriginSource     string    `json:"origin_source,omitempty"`
	OriginTime       time.Time `json:"origin_time,omitzero"`
	PrunedLSN        string    `json:"pruned_lsn,omitempty"` // all WAL before it was pruned
	PrunedTime       time.Time `json:"pruned_time,omitzero"`

	Segments int   `json:"segments"`  // complete ones, each counted once
	Bytes    int64 `json:"bytes"`     // of their files, as they are stored
	WALBytes int64 `json:"wal_bytes"` // of WAL in them
	Aside    int   `json:"aside"`     // files that are kept aside

	Timelines   []TimelineContents `json:"timelines"`
	Holes       []HoleReport       `json:"holes"`
	Recoverable []WindowReport     `json:"recoverable"`
}

// TimelineContents is what an archive holds of one timeline.
type TimelineContents struct {
	Timeline uint32          `json:"timeline"`
	Parent   uint32          `json:"parent,omitempty"`
	ForkLSN  string          `json:"fork_lsn,omitempty"` // where it left its parent
	Reason   string          `json:"reason,omitempty"`   // why, in the server's words
	Problem  string          `json:"problem,omitempty"`  // why its parent is not known
	Ranges   []RangeReport   `json:"ranges"`
	Partial  []PartialReport `json:"partial"`
}

// RangeReport is WAL without a hole, of one timeline.
type RangeReport struct {
	StartLSN    string    `json:"start_lsn"` // inclusive
	EndLSN      string    `json:"end_lsn"`   // exclusive
	Segments    int       `json:"segments"`
	Bytes       int64     `json:"bytes"`
	WALBytes    int64     `json:"wal_bytes"`
	FirstCommit time.Time `json:"first_commit,omitzero"`
	LastCommit  time.Time `json:"last_commit,omitzero"`
	Problem     string    `json:"problem,omitempty"` // why times are not known
}

// HoleReport is WAL that is missing, or does not continue what is before it.
type HoleReport struct {
	Kind     string    `json:"kind"`     // "gap", "divergence", or "hole", which nobody recorded
	Timeline uint32    `json:"timeline"` // on which the archive goes on
	From     string    `json:"from"`     // inclusive
	To       string    `json:"to"`       // exclusive
	Time     time.Time `json:"time,omitzero"`
	Reason   string    `json:"reason,omitempty"`
}

// WindowReport is what can be recovered with one base backup and the archive: from a
// backup whose WAL begins at FromLSN or later, everything up to ToLSN, and with the
// partial segments up to PartialLSN.
type WindowReport struct {
	Timeline     uint32    `json:"timeline"`      // for recovery_target_timeline
	FromTimeline uint32    `json:"from_timeline"` // that has FromLSN
	FromLSN      string    `json:"from_lsn"`
	FirstCommit  time.Time `json:"first_commit,omitzero"`
	ToLSN        string    `json:"to_lsn"`
	LastCommit   time.Time `json:"last_commit,omitzero"` // before ToLSN
	PartialLSN   string    `json:"partial_lsn,omitempty"`
	PartialTime  time.Time `json:"partial_commit,omitzero"` // the last commit before PartialLSN
	Problem      string    `json:"problem,omitempty"`       // why times or the partial end are not known
}

// ReadContents looks into the archive of a cluster, which may have no name, without
// locking or changing anything. Where something cannot be read, the Contents say so.
// The error is the directory's own: it is not there, or its disk fails.
func ReadContents(ctx context.Context, cluster, dir string) (Contents, error) {
	for attempt := 1; ; attempt++ {
		c, err := archive.ReadCatalogue(ctx, dir)
		if err != nil && !errors.As(err, new(*archive.FileError)) {
			return Contents{}, err
		}
		out, changed := contentsOf(ctx, c, err)
		if changed && attempt < 5 && ctx.Err() == nil { // a segment was sealed or pruned meanwhile
			continue
		}
		out.Cluster = cluster
		return out, context.Cause(ctx)
	}
}

// contentsOf reads what a Catalogue does not have. changed says that a file was not there
// any more.
func contentsOf(ctx context.Context, c archive.Catalogue, problem error) (out Contents, changed bool) {
	var err error
	lineage := c.Lineage(c.ReadHistories())
	out = Contents{
		Time: time.Now(), Directory: c.Path, SystemIdentifier: systemIdentifier(c.Identity.SystemID), SegmentSize: int64(c.Identity.SegmentSize),
		OriginLSN: lsn(c.Origin.LSN), OriginSource: c.Origin.Source, OriginTime: c.Origin.Time, PrunedLSN: lsn(c.Pruned.LSN), PrunedTime: c.Pruned.Time,
		Aside: len(c.Aside), Timelines: []TimelineContents{}, Holes: []HoleReport{}, Recoverable: []WindowReport{},
	}
	if problem != nil {
		out.Error = problem.Error()
	}
	for _, b := range lineage.Branches {
		t := TimelineContents{Timeline: uint32(b.Timeline), Parent: uint32(b.Parent), ForkLSN: lsn(b.Fork), Reason: b.Reason, Ranges: []RangeReport{}, Partial: []PartialReport{}}
		if b.Problem != nil {
			t.Problem = b.Problem.Error()
		}
		for _, r := range b.Ranges {
			report := RangeReport{StartLSN: r.Start.String(), EndLSN: r.End.String(), Segments: r.Segments, Bytes: r.Bytes, WALBytes: int64(r.End - r.Start)}
			report.FirstCommit, report.LastCommit, err = commitTimes(ctx, c, r.All(c.Identity.SegmentSize))
			if err != nil {
				report.Problem = err.Error()
				changed = changed || errors.Is(err, fs.ErrNotExist)
			}
			t.Ranges = append(t.Ranges, report)
			out.Segments, out.Bytes, out.WALBytes = out.Segments+r.Segments, out.Bytes+r.Bytes, out.WALBytes+report.WALBytes
		}
		for _, p := range b.Partials {
			t.Partial = append(t.Partial, PartialReport{p.Name(), p.Modified})
		}
		out.Timelines = append(out.Timelines, t)
	}
	for _, h := range lineage.Holes {
		report := HoleReport{Kind: "hole", Timeline: uint32(h.Timeline), From: h.From.String(), To: h.To.String()}
		switch {
		case h.Gap != nil:
			report.Kind, report.Time, report.Reason = "gap", h.Gap.Time, h.Gap.Reason
		case h.Divergence != nil:
			report.Kind, report.Time, report.Reason = "divergence", h.Divergence.Time, h.Divergence.Reason
		}
		out.Holes = append(out.Holes, report)
	}
	out.Recoverable, err = windows(ctx, c, lineage)
	changed = changed || errors.Is(err, fs.ErrNotExist)
	return out, changed
}

// windows reads what a Catalogue's lineage does not have. The error is one of reading, which
// the reports have too; fs.ErrNotExist when a file was not there any more.
func windows(ctx context.Context, c archive.Catalogue, lineage archive.Lineage) (reports []WindowReport, err error) {
	reports = []WindowReport{}
	for _, w := range lineage.Windows {
		report := WindowReport{Timeline: uint32(w.Timeline), FromTimeline: uint32(w.FromTimeline), FromLSN: w.From.String(), ToLSN: w.To.String()}
		var err1 error
		report.FirstCommit, report.LastCommit, err1 = commitTimes(ctx, c, w.Segments)
		u, err2 := c.ReadPartials(ctx, w)
		if problem := cmp.Or(err1, err2); problem != nil {
			report.Problem = problem.Error()
			err = errors.Join(err, problem)
		}
		if w.Continued != 0 && u.End <= w.Continued && err2 == nil {
			continue
		}
		if u.End > w.To {
			report.PartialLSN, report.PartialTime = u.End.String(), u.Last.Time
			if report.PartialTime.IsZero() {
				report.PartialTime = report.LastCommit
			}
			if report.FirstCommit.IsZero() && report.LastCommit.IsZero() { // else there is one before, too far in to be looked for
				report.FirstCommit = u.First.Time
			}
		}
		reports = append(reports, report)
	}
	return reports, err
}

// commitTimes are the first and the last one in segments that follow each other.
func commitTimes(ctx context.Context, c archive.Catalogue, segments []wal.Segment) (first, last time.Time, err error) {
	from, err1 := c.FirstCommit(ctx, segments)
	to, err2 := c.LastCommit(ctx, segments)
	return from.Time, to.Time, cmp.Or(err1, err2)
}

// Write writes the contents for people.
func (c Contents) Write(w io.Writer) error {
	var b strings.Builder
	fmt.Fprintf(&b, "%s\n", oneLine(strings.TrimSpace(c.Cluster+"  "+c.Directory)))
	if c.Error != "" {
		fmt.Fprintf(&b, "PROBLEM: %s\n", oneLine(c.Error))
	}
	if c.SystemIdentifier != "" {
		fmt.Fprintf(&b, "system identifier %s, segments of %s\n", c.SystemIdentifier, showSize(c.SegmentSize))
	}
	if c.OriginLSN != "" {
		fmt.Fprintf(&b, "begun at %s on %s (%s)\n", c.OriginLSN, moment(c.OriginTime), quoted(c.OriginSource))
	}
	if c.PrunedLSN != "" {
		fmt.Fprintf(&b, "pruned before %s on %s\n", c.PrunedLSN, moment(c.PrunedTime))
	}
	fmt.Fprintf(&b, "%d complete segments, %s of WAL in %s", c.Segments, BytesText(c.WALBytes), BytesText(c.Bytes))
	if c.Aside > 0 {
		fmt.Fprintf(&b, "; %d files are kept aside", c.Aside)
	}
	b.WriteString("\n\n")
	c.writeTimelines(&b)
	c.writeHoles(&b)
	c.writeRecoverable(&b)
	_, err := io.WriteString(w, b.String())
	return err
}

func (c Contents) writeTimelines(b *strings.Builder) {
	if len(c.Timelines) == 0 {
		b.WriteString("There is no WAL.\n")
		return
	}
	t := newTable(b)
	t.row("TIMELINE", "FROM", "TO", "SEGMENTS", "WAL", "STORED", "FIRST COMMIT", "LAST COMMIT", "NOTE")
	for _, root := range c.Timelines {
		if !c.has(root.Parent) {
			c.writeTree(t, root, "")
		}
	}
	t.flush()
}

func (c Contents) has(timeline uint32) bool {
	for _, t := range c.Timelines {
		if t.Timeline == timeline {
			return true
		}
	}
	return false
}

// writeTree writes a timeline and those that left it, which are all above it.
func (c Contents) writeTree(t *table, tl TimelineContents, indent string) {
	name, note := fmt.Sprintf("%s%d", indent, tl.Timeline), ""
	switch {
	case tl.Problem != "":
		note = "ITS PARENT IS NOT KNOWN: " + tl.Problem
	case tl.Parent != 0:
		note = fmt.Sprintf("left %d at %s: %s", tl.Parent, tl.ForkLSN, quoted(tl.Reason))
	}
	row := func(cells ...string) {
		t.row(append([]string{name}, append(cells, note)...)...)
		name, note = "", ""
	}
	for _, r := range tl.Ranges {
		if r.Problem != "" {
			note = strings.TrimPrefix(note+"; "+r.Problem, "; ")
		}
		row(r.StartLSN, r.EndLSN, fmt.Sprint(r.Segments), BytesText(r.WALBytes), BytesText(r.Bytes), moment(r.FirstCommit), moment(r.LastCommit))
	}
	for _, p := range tl.Partial {
		note = strings.TrimPrefix(note+"; in progress: "+p.Segment+".partial", "; ")
		row("-", "-", "-", "-", "-", "-", "-")
	}
	if name != "" {
		row("-", "-", "0", "-", "-", "-", "-")
	}
	for _, child := range c.Timelines {
		if child.Parent == tl.Timeline {
			c.writeTree(t, child, indent+"  ")
		}
	}
}

func (c Contents) writeHoles(b *strings.Builder) {
	if len(c.Holes) == 0 {
		return
	}
	b.WriteString("\nMissing, and no recovery passes it:\n")
	t := newTable(b)
	t.row("  TIMELINE", "FROM", "TO", "")
	for _, h := range c.Holes {
		note := "A HOLE THAT NOBODY RECORDED: files are gone"
		switch h.Kind {
		case "gap":
			note = fmt.Sprintf("gap, recorded on %s: %s", moment(h.Time), quoted(h.Reason))
		case "divergence":
			note = fmt.Sprintf("what follows does not continue what is before it, accepted on %s: %s", moment(h.Time), quoted(h.Reason))
		}
		t.row(fmt.Sprintf("  %d", h.Timeline), h.From, h.To, note)
	}
	t.flush()
}

func (c Contents) writeRecoverable(b *strings.Builder) {
	if len(c.Recoverable) == 0 {
		return
	}
	b.WriteString("\nWhat can be recovered, with a base backup that begins there or later:\n")
	writeWindows(b, c.Recoverable)
}

func writeWindows(b *strings.Builder, windows []WindowReport) {
	t := newTable(b)
	t.row("  TIMELINE", "BACKUP FROM", "FIRST COMMIT", "UP TO", "LAST COMMIT", "WITH .partial", "LAST COMMIT", "")
	for _, w := range windows {
		from := w.FromLSN
		if w.FromTimeline != w.Timeline {
			from += fmt.Sprintf(" on %d", w.FromTimeline)
		}
		t.row(fmt.Sprintf("  %d", w.Timeline), from, moment(w.FirstCommit), w.ToLSN, moment(w.LastCommit), orDash(w.PartialLSN), moment(w.PartialTime), w.Problem)
	}
	t.flush()
}

// moment is a time for people; "-": not known.
func moment(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return t.UTC().Format("2006-01-02 15:04:05.000Z")
}

// quoted shows text of a server or a file, escaped and not too long.
func quoted(s string) string { return fmt.Sprintf("%q", shorten(s, reasonLimit)) }
