package fleet

import (
	"bytes"
	"cmp"
	"fmt"
	"io"
	"maps"
	"slices"
	"strings"
	"text/tabwriter"
	"time"
	"unicode/utf8"

	"github.com/walfleet/walfleet/receiver"
)

// urgency orders states for a person: what needs one comes first.
var urgency = []string{
	string(receiver.Halted), string(receiver.Blocked), string(receiver.Backoff), string(receiver.Connecting),
	string(receiver.CatchingUp), string(receiver.Streaming), string(receiver.Stopped), stateUnknown,
}

// reasonLimit is how much of a reason stands in a table, in characters; the cluster's
// own page has all of it.
const reasonLimit = 120

// shownEvents is how many of a cluster's last lines of the log stand among its details.
const shownEvents = 10

// WriteTable writes the report for people, a line for each cluster. Those in trouble
// come first, for of a hundred clusters they are why somebody looks, and within a state
// the file's order stays. The last line counts the states, where it is seen when a
// long table has scrolled.
func (r Report) WriteTable(w io.Writer) error {
	var b strings.Builder
	r.writeHead(&b)
	t := newTable(&b)
	clusters := r.urgentFirst()
	if r.Daemon == nil {
		for _, cells := range r.archiveCells(clusters) {
			t.row(cells...)
		}
	} else {
		t.row("CLUSTER", "STATE", "TLI", "FLUSHED", "LAG", "BEHIND", "RATE", "SLOT", "FREE", "SINCE", "REASON")
		for _, c := range clusters {
			t.row(c.Name, c.State, number(c.Timeline), orDash(c.FlushedLSN), lagText(c), behindText(c), rateText(c), c.Slot,
				freeText(c), since(r.Time, c.Since), shorten(strings.Join(c.Why(r.Time), "; "), reasonLimit))
		}
	}
	t.flush()
	if r.Daemon != nil {
		fmt.Fprintln(&b, r.summary())
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// urgentFirst are the clusters, those in trouble first.
func (r Report) urgentFirst() []ClusterReport {
	clusters := slices.Clone(r.Clusters)
	slices.SortStableFunc(clusters, Urgent)
	return clusters
}

// archiveCells are the titles and a row for each cluster of what its archive says by
// itself.
func (r Report) archiveCells(clusters []ClusterReport) [][]string {
	rows := [][]string{{"CLUSTER", "TLI", "SEALED", "SEGMENTS", "SIZE", "IN PROGRESS", "MODIFIED", "SLOT", "FREE", "GAPS", "NOTE"}}
	for _, c := range clusters {
		a := c.Archive
		if a == nil {
			a = &ArchiveReport{}
		}
		progress := "-"
		if n := len(a.Partial); n > 0 {
			progress = a.Partial[n-1].Segment
		}
		rows = append(rows, []string{c.Name, number(a.Timeline), orDash(a.SealedLSN), fmt.Sprint(a.Segments), BytesText(a.Bytes), progress,
			ago(r.Time, a.Modified), c.Slot, freeText(c), fmt.Sprint(len(a.Gaps)), shorten(a.Error, reasonLimit)})
	}
	return rows
}

// WriteDetails writes all that is known about each cluster of the report, for people.
func (r Report) WriteDetails(w io.Writer) error {
	var b strings.Builder
	r.writeHead(&b)
	for i, c := range r.Clusters {
		if i > 0 {
			b.WriteByte('\n')
		}
		r.writeCluster(&b, c)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// writeHead says what a reader must know before the clusters.
func (r Report) writeHead(b *strings.Builder) {
	if r.Daemon == nil {
		fmt.Fprintf(b, "NO DAEMON: %s\nWhat the archives say by themselves:\n\n", oneLine(r.Error))
		return
	}
	if last := r.Daemon.LastReload; last != nil && last.Error != "" {
		fmt.Fprintf(b, "LAST RELOAD FAILED, %s ago: %s\n\n", roughly(r.Time.Sub(last.Time)), strings.ReplaceAll(last.Error, "\n", "\n  "))
	}
}

// summary counts the states.
func (r Report) summary() string {
	count := map[string]int{}
	for _, c := range r.Clusters {
		count[c.State]++
	}
	var parts []string
	for _, state := range urgency {
		if n := count[state]; n > 0 {
			parts = append(parts, fmt.Sprintf("%d %s", n, state))
		}
	}
	noun := "clusters"
	if len(r.Clusters) == 1 {
		noun = "cluster"
	}
	return fmt.Sprintf("%d %s: %s", len(r.Clusters), noun, strings.Join(parts, ", "))
}

// writeCluster writes one cluster in full.
func (r Report) writeCluster(b *strings.Builder, c ClusterReport) {
	fmt.Fprintln(b, c.Name)
	t := newTable(b)
	line := func(name, format string, args ...any) { t.row("  "+name, oneLine(fmt.Sprintf(format, args...))) }
	known := func(name, text string) {
		if text != "" {
			line(name, "%s", text)
		}
	}
	at := func(when time.Time) string {
		return fmt.Sprintf("%s (%s ago)", when.UTC().Format(time.DateTime+" UTC"), roughly(r.Time.Sub(when)))
	}

	if r.Daemon != nil {
		line("state", "%s, since %s", c.State, at(c.Since))
		known("reason", strings.Join(c.Why(r.Time), "; "))
		known("hint", c.Hint)
		line("connected to", "%s", orDash(c.Host))
	}
	line("hosts", "%s", strings.Join(c.Hosts, ", "))
	known("user", c.User)
	line("slot", "%s", c.Slot)
	for _, s := range c.Slots {
		line("slot on "+s.Host, "%s", s.text(r.Time))
	}
	for _, w := range c.Warnings {
		line("WARNING", "%s, since %s; %s", w.Text, at(w.Since), w.Hint)
	}
	server := c.ServerVersion
	if server != "" {
		server = "PostgreSQL " + server
	}
	if c.PolarDBVersion != "" {
		server += ", PolarDB " + c.PolarDBVersion
	}
	known("server version", server)
	a := c.Archive
	if a == nil {
		a = &ArchiveReport{}
	}
	known("system identifier", cmp.Or(c.SystemIdentifier, a.SystemIdentifier))
	if size := cmp.Or(c.SegmentSize, a.SegmentSize); size > 0 {
		line("segment size", "%s", BytesText(size))
	}
	if tli := cmp.Or(c.Timeline, a.Timeline); tli > 0 {
		line("timeline", "%d", tli)
	}

	if r.Daemon != nil {
		line("server LSN", "%s", orDash(c.ServerLSN))
		line("written LSN", "%s", orDash(c.WrittenLSN))
		line("synced LSN", "%s", orDash(c.SyncedLSN))
		line("flushed LSN", "%s (acknowledged)", orDash(c.FlushedLSN))
		line("lag", "%s, %s", lagText(c), behindWords(c))
		if !c.LastMessage.IsZero() {
			line("last message", "%s", at(c.LastMessage))
		}
		line("received", "%s, %s of it again; now %s", BytesText(c.ReceivedBytes), BytesText(c.ReceivedAgainBytes), rateText(c))
		known("last 15 minutes", sparkline(c.History, detailSparkCells))
		line("segments sealed", "%d since %s", c.SegmentsSealed, at(r.Daemon.Since))
		line("compression", "%d segments compressed, %d waiting (%s)", c.SegmentsCompressed, c.CompressBacklog, BytesText(c.CompressBytes))
		line("reconnects", "%d", c.Reconnects)
		var failures []string
		for _, class := range slices.Sorted(maps.Keys(c.Failures)) {
			if n := c.Failures[class]; n > 0 {
				failures = append(failures, fmt.Sprintf("%d %s", n, class))
			}
		}
		known("failures", strings.Join(failures, ", "))
		if c.Panics > 0 {
			line("panics", "%d: each is a bug in walfleet, and its stack is in the log", c.Panics)
		}
		if c.LastError != "" {
			line("last error", "%s: %s", at(c.LastErrorTime), c.LastError)
		}
	}

	line("directory", "%s", c.Directory)
	line("disk free", "%s", freeText(c)+fullText(c))
	if c.Archive != nil {
		known("archive", a.Error)
		if a.OriginLSN != "" {
			line("archive begins", "%s, from %s, %s", a.OriginLSN, a.OriginSource, at(a.OriginTime))
		}
		line("complete segments", "%d (%d of them compressed), %s", a.Segments, a.Compressed, BytesText(a.Bytes))
		if a.Segments > 0 {
			line("first, last", "%s, %s (ends at %s)", a.FirstSegment, a.LastSegment, a.SealedLSN)
		}
		for _, p := range a.Partial {
			line("in progress", "%s, modified %s", p.Segment, at(p.Modified))
		}
		for _, g := range a.Gaps {
			line("gap", "%s to %s is missing for good, timeline %d, recorded %s: %s", g.From, g.To, g.Timeline, at(g.Time), g.Reason)
		}
		for _, v := range a.Divergences {
			line("divergence", "at %s, timeline %d, the archive goes on from %s, accepted %s: %s", v.LSN, v.Timeline, v.Restart, at(v.Time), v.Reason)
		}
		if a.Aside > 0 {
			line("kept aside", "%d files", a.Aside)
		}
		if v := a.LastVerify; v != nil {
			result := "whole"
			switch {
			case v.Error != "":
				result = v.Error
			case v.Faults > 0:
				result = fmt.Sprintf("%d FAULTS", v.Faults)
			case !v.Whole:
				result = "not everything was checked"
			}
			line("last verify", "%s: %s; %d segments checked, %d left out", at(v.Time), result, v.Segments, v.Skipped)
		}
		if d := a.LastDrill; d != nil {
			result := "recovered to " + orDash(d.RecoveredLSN)
			if !d.OK {
				result = "FAILED: " + d.Error
			}
			line("last drill", "%s, with %s: %s", at(d.Time), d.Backup, result)
		}
	}
	for _, e := range last(c.Events, shownEvents) {
		line("event", "%s: %s, %s", at(e.Time), e.Level, e.Text)
	}
	for _, key := range slices.Sorted(maps.Keys(c.Settings)) {
		if key != "slot" && c.Settings[key] != "" {
			line(key, "%v", c.Settings[key])
		}
	}
	t.flush()
}

// text is what is known of a slot.
func (s SlotReport) text(now time.Time) string {
	var parts []string
	switch {
	case s.Time.IsZero():
	case !s.Exists:
		parts = append(parts, "does not exist")
	default:
		parts = append(parts, "retains "+BytesText(s.RetainedBytes))
		if s.Status != "" {
			parts = append(parts, s.Status)
		}
		if s.Invalid != "" {
			parts = append(parts, s.Invalid)
		}
		if s.SafeBytes != nil {
			parts = append(parts, "safe for another "+BytesText(*s.SafeBytes))
		}
		if s.SyncState != "" {
			parts = append(parts, s.SyncState)
		}
	}
	if !s.Time.IsZero() {
		parts = append(parts, roughly(now.Sub(s.Time))+" ago")
	}
	if s.Note != "" {
		parts = append(parts, s.Note)
	}
	return strings.Join(parts, ", ")
}

// Write writes what became of a reload, for people.
func (o Outcome) Write(w io.Writer) error {
	var b strings.Builder
	switch {
	case !o.Applied:
		fmt.Fprintf(&b, "refused, nothing changed: %s\n", o.Error)
		_, err := io.WriteString(w, b.String())
		return err
	case o.Error != "":
		fmt.Fprintf(&b, "reload of %s incomplete: %s\n", o.File, o.Error)
	default:
		fmt.Fprintf(&b, "reloaded %s in %s\n", o.File, seconds(o.Seconds).Round(time.Millisecond))
	}
	o.writePlan(&b, [...]string{"started", "stopped", "restarted", "adjusted", "kept"})
	_, err := io.WriteString(w, b.String())
	return err
}

// WritePreview writes what a reload would do, for people.
func (o Outcome) WritePreview(w io.Writer) error {
	var b strings.Builder
	if o.Error != "" {
		fmt.Fprintf(&b, "a reload would be refused: %s\n", o.Error)
	} else {
		fmt.Fprintf(&b, "a reload of %s would\n", o.File)
		o.writePlan(&b, [...]string{"start", "stop", "restart", "adjust", "keep"})
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// writePlan writes what becomes of each cluster. verbs are those for starting, stopping,
// restarting, adjusting and keeping.
func (o Outcome) writePlan(b *strings.Builder, verbs [5]string) {
	t := newTable(b)
	list := func(verb string, names []string, note string) {
		for _, name := range names {
			text := note
			if keys := o.Plan.Changed[name]; len(keys) > 0 {
				text = strings.Join(keys, ", ")
			}
			t.row("  "+verb, name, text)
			verb = ""
		}
	}
	list("not stopped", o.Stuck, "told to stop; what replaces it starts when it has")
	list(verbs[0], o.Plan.Start, "")
	list(verbs[1], o.Plan.Stop, "its files stay, and so does its slot, which retains WAL on the primary until it is dropped")
	list(verbs[2], o.Plan.Restart, "")
	list(verbs[3], o.Plan.Adjust, "")
	t.row("  "+verbs[4], fmt.Sprint(len(o.Plan.Keep)), "")
	for _, note := range o.Notes {
		t.row("  note", "", note)
	}
	t.flush()
}

// table aligns columns.
type table struct {
	out   *strings.Builder
	lines bytes.Buffer
	cells *tabwriter.Writer
}

func newTable(out *strings.Builder) *table {
	t := &table{out: out}
	t.cells = tabwriter.NewWriter(&t.lines, 0, 0, 2, ' ', 0)
	return t
}

// row writes cells, as many as every row of the table has.
func (t *table) row(cells ...string) {
	for i, c := range cells {
		cells[i] = oneLine(c)
	}
	fmt.Fprintln(t.cells, strings.Join(cells, "\t"))
}

// flush writes the table, without spaces at the end of lines.
func (t *table) flush() {
	_ = t.cells.Flush() // into memory
	for line := range strings.Lines(t.lines.String()) {
		t.out.WriteString(strings.TrimRight(line, " \n") + "\n")
	}
}

// shorten cuts a text at a number of characters.
func shorten(s string, limit int) string {
	if utf8.RuneCountInString(s) <= limit {
		return s
	}
	return string([]rune(s)[:limit-1]) + "…"
}

func orDash(s string) string { return cmp.Or(s, "-") }

func number(n uint32) string {
	if n == 0 {
		return "-"
	}
	return fmt.Sprint(n)
}

func lagText(c ClusterReport) string {
	if c.LagBytes == nil {
		return "-"
	}
	return BytesText(*c.LagBytes)
}

func behindText(c ClusterReport) string {
	if c.BehindSeconds == nil {
		return "-"
	}
	return roughly(seconds(*c.BehindSeconds))
}

func behindWords(c ClusterReport) string {
	if c.BehindSeconds == nil {
		return "has not caught up since the start"
	}
	return "at most " + behindText(c) + " behind"
}

func seconds(s float64) time.Duration { return time.Duration(s * float64(time.Second)) }

func rateText(c ClusterReport) string { return BytesText(int64(c.BytesPerSecond)) + "/s" }

func freeText(c ClusterReport) string {
	if c.DiskFreeBytes == nil {
		return "-"
	}
	return BytesText(*c.DiskFreeBytes)
}

// fullText says when the disk will be full, where that is known.
func fullText(c ClusterReport) string {
	if c.SecondsToFull == nil {
		return ""
	}
	return ", full in " + roughly(seconds(*c.SecondsToFull)) + " if it fills as in the last 15 minutes"
}

// BytesText is a number of bytes with at most three digits or one decimal, in
// PostgreSQL's units of 1024.
func BytesText(n int64) string {
	if n < 1024 {
		return fmt.Sprintf("%d B", n)
	}
	f, units := float64(n), []string{"kB", "MB", "GB", "TB", "PB", "EB"}
	for i, unit := range units {
		f /= 1024
		switch {
		case f < 9.95:
			return fmt.Sprintf("%.1f %s", f, unit)
		case f < 999.5 || i == len(units)-1:
			return fmt.Sprintf("%.0f %s", f, unit)
		}
	}
	return ""
}

func since(now, then time.Time) string {
	if then.IsZero() {
		return "-"
	}
	return roughly(now.Sub(then))
}

func ago(now, then time.Time) string {
	if then.IsZero() {
		return "-"
	}
	return roughly(now.Sub(then)) + " ago"
}

// roughly is a duration in its two largest units, rounded down: "3d04h", "2h05m",
// "35m10s", "12s".
func roughly(d time.Duration) string {
	s := int64(max(d, 0) / time.Second)
	switch {
	case s >= 24*3600:
		return fmt.Sprintf("%dd%02dh", s/(24*3600), s/3600%24)
	case s >= 3600:
		return fmt.Sprintf("%dh%02dm", s/3600, s/60%60)
	case s >= 60:
		return fmt.Sprintf("%dm%02ds", s/60, s%60)
	}
	return fmt.Sprintf("%ds", s)
}
