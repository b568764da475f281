package fleet

import (
	"fmt"
	"math"
	"slices"
	"strings"
	"time"
	"unicode"

	"golang.org/x/text/width"

	"github.com/walfleet/walfleet/receiver"
)

// View is a terminal on which a report is looked at.
type View struct {
	Width, Height int       // in columns and lines
	Color         bool      // whether it may have any
	Details       bool      // all that is known of each cluster; else a line for each
	Top           int       // how many rows were scrolled past
	Now           time.Time // of the clock that is shown
	Lost          string    // why the report is an old one; "": it is not
}

// Draw makes the lines that fill a terminal, those of the worst clusters first. None is
// wider than the terminal is, and there are at most as many as it has. top is the view's,
// but not beyond the last row.
func (r Report) Draw(v View) (lines []string, top int) {
	add := func(parts ...part) { lines = append(lines, v.line(parts)) }

	words, health := r.headline()
	clock := v.Now.UTC().Format(time.TimeOnly + " UTC")
	if space := v.Width - columns(clock) - 2; space >= columns(clock) {
		words = fit(words, space)
		words += strings.Repeat(" ", space-columns(words)+2) + clock
	}
	add(part{words, healthStyle[health]})
	for _, notice := range r.notices(v) {
		add(part{notice, styleNotice})
	}
	if r.Daemon != nil {
		add(part{r.summary(), ""})
	}
	add()

	var rows [][]part
	switch {
	case v.Details:
		rows = r.detailRows()
	default:
		var header []part
		header, rows = r.tableRows(v.Width)
		add(header...)
	}
	space := max(v.Height-len(lines)-1, 1) // the last line tells of the keys
	top = max(min(v.Top, len(rows)-space), 0)
	shown := rows[top:min(top+space, len(rows))]
	for _, row := range shown {
		add(row...)
	}
	keys := "q quits"
	if more := len(rows) - len(shown); more > 0 {
		keys = fmt.Sprintf("… %d more; ↑↓ PgUp PgDn Home End scroll, %s", more, keys)
	}
	for len(lines) < v.Height-1 {
		lines = append(lines, "")
	}
	add(part{keys, styleFaint})
	return lines[:min(len(lines), max(v.Height, 0))], top
}

// A part of a line, in a style: parameters of the terminal's "select graphic rendition".
type part struct{ text, style string }

const (
	styleFaint  = "2"
	styleTitle  = "1"    // bold
	styleAlarm  = "1;31" // bold, red
	styleNotice = "1;7"  // bold, reversed
)

var healthStyle = map[Health]string{Healthy: "32", Warning: "33", Critical: styleAlarm} // green, yellow

// healthMark tells without colour which clusters want a person.
var healthMark = map[Health]string{Healthy: "", Warning: "! ", Critical: "!! "}

// line joins parts into a line that is no wider than the view. In an old report all is
// faint but the notice that says so.
func (v View) line(parts []part) string {
	var b strings.Builder
	left := v.Width
	for _, p := range parts {
		text, style := fit(p.text, left), p.style
		left -= columns(text)
		if v.Lost != "" && style != styleNotice {
			style = styleFaint
		}
		if !v.Color || style == "" || text == "" {
			b.WriteString(text)
			continue
		}
		b.WriteString("\x1b[" + style + "m" + text + "\x1b[0m")
	}
	return strings.TrimRight(b.String(), " ")
}

// headline says in words how the fleet is, and how bad that is. It names whom a person
// would look for, worst first.
func (r Report) headline() (words string, health Health) {
	if r.Daemon == nil {
		return "NO DAEMON: what the archives say by themselves", Critical
	}
	health = Healthy
	var lost, endangered, doubtful []string
	gaps := 0
	for i, c := range r.urgentFirst() {
		if i == 0 {
			health = c.Health
		}
		name := oneLine(c.Name)
		comes := c.State == string(receiver.Streaming) || c.State == string(receiver.CatchingUp)
		switch {
		case c.Health == Critical && !comes:
			lost = append(lost, name)
		case c.Health == Critical:
			endangered = append(endangered, name)
		case c.Health != Healthy:
			doubtful = append(doubtful, name)
		}
		if c.Gaps > 0 {
			gaps++
		}
	}
	var parts []string
	say := func(names []string, noun, one, many string) {
		switch len(names) {
		case 0:
			return
		case 1:
			many = one
		}
		parts = append(parts, fmt.Sprintf("%d of %s %s: %s", len(names), count(len(r.Clusters), noun), many, strings.Join(names, ", ")))
	}
	say(lost, "database", "is NOT being archived", "are NOT being archived")
	say(endangered, "archive", "is damaged or in danger", "are damaged or in danger")
	say(doubtful, "database", "needs attention", "need attention")
	switch {
	case len(parts) > 0:
	case len(r.Clusters) == 1:
		parts = append(parts, "The database is archived: "+oneLine(r.Clusters[0].Name))
	default:
		parts = append(parts, fmt.Sprintf("All %s are archived", count(len(r.Clusters), "database")))
	}
	if gaps > 0 {
		parts = append(parts, "WAL is missing for good in "+count(gaps, "archive"))
	}
	return strings.Join(parts, "; "), health
}

// notices are what a reader must know before the clusters.
func (r Report) notices(v View) (notices []string) {
	switch {
	case v.Lost != "" && r.Daemon == nil:
		notices = append(notices, v.Lost)
	case v.Lost != "":
		notices = append(notices, fmt.Sprintf("NO NEWS for %s: %s", roughly(v.Now.Sub(r.Time)), v.Lost),
			"What follows is how it was at "+r.Time.UTC().Format(time.TimeOnly+" UTC"))
	}
	if r.Daemon != nil && r.Daemon.LastReload != nil && r.Daemon.LastReload.Error != "" {
		last := r.Daemon.LastReload
		notices = append(notices, fmt.Sprintf("LAST RELOAD FAILED, %s ago: %s", roughly(r.Time.Sub(last.Time)), last.Error))
	}
	return notices
}

// watchColumn is a column of the table, which is there on terminals of some width.
type watchColumn struct {
	title string
	from  int
	cell  func(r Report, c ClusterReport) string
}

var watchColumns = []watchColumn{
	{"CLUSTER", 0, func(_ Report, c ClusterReport) string { return c.Name }},
	{"STATE", 0, func(_ Report, c ClusterReport) string { return healthMark[c.Health] + c.State }},
	{"SINCE", 60, func(r Report, c ClusterReport) string { return since(r.Time, c.Since) }},
	{"LAG", 0, func(_ Report, c ClusterReport) string { return lagText(c) }},
	{"BEHIND", 60, func(_ Report, c ClusterReport) string { return behindText(c) }},
	{"LAST 15 MINUTES", 76, func(_ Report, c ClusterReport) string { return sparkline(c.History, sparkCells) }},
	{"RATE", 120, func(_ Report, c ClusterReport) string { return rateText(c) }},
	{"TLI", 150, func(_ Report, c ClusterReport) string { return number(c.Timeline) }},
	{"FLUSHED", 160, func(_ Report, c ClusterReport) string { return orDash(c.FlushedLSN) }},
	{"RETAINED", 130, func(_ Report, c ClusterReport) string { return retainedText(c) }},
	{"FREE", 140, func(_ Report, c ClusterReport) string { return freeText(c) }},
	{"REASON", 0, func(r Report, c ClusterReport) string { return strings.Join(c.Why(r.Time), "; ") }},
}

// stateColumn is the one that has the colour.
const stateColumn = 1

// tableRows are a line for each cluster, and the titles above them.
func (r Report) tableRows(terminal int) (header []part, rows [][]part) {
	clusters := r.urgentFirst()
	var cells [][]string
	if r.Daemon == nil {
		cells = r.archiveCells(clusters)
	} else {
		shown := slices.DeleteFunc(slices.Clone(watchColumns), func(c watchColumn) bool { return c.from > terminal })
		cells = make([][]string, 1+len(clusters))
		for _, column := range shown {
			cells[0] = append(cells[0], column.title)
			for i, c := range clusters {
				cells[1+i] = append(cells[1+i], column.cell(r, c))
			}
		}
	}
	widths := make([]int, len(cells[0])) // over all rows, so that nothing jumps when they scroll
	for _, row := range cells {
		for i, cell := range row {
			row[i] = oneLine(cell)
			widths[i] = max(widths[i], columns(row[i]))
		}
	}
	for n, row := range cells {
		parts := make([]part, len(row))
		for i, cell := range row {
			if parts[i].text = cell; i < len(row)-1 {
				parts[i].text += strings.Repeat(" ", widths[i]-columns(cell)+2)
			}
			switch {
			case n == 0:
				parts[i].style = styleTitle
			case i == stateColumn && r.Daemon != nil:
				parts[i].style = healthStyle[clusters[n-1].Health]
			}
		}
		rows = append(rows, parts)
	}
	return rows[0], rows[1:]
}

// detailRows are the lines of all that is known of each cluster.
func (r Report) detailRows() (rows [][]part) {
	var b strings.Builder
	for _, c := range r.Clusters {
		r.writeCluster(&b, c)
	}
	for line := range strings.Lines(b.String()) {
		rows = append(rows, []part{{strings.TrimSuffix(line, "\n"), ""}})
	}
	return rows
}

// retainedText is what the slot retains on the host where that is most.
func retainedText(c ClusterReport) string {
	most := int64(-1)
	for _, s := range c.Slots {
		if s.Exists {
			most = max(most, s.RetainedBytes)
		}
	}
	if most < 0 {
		return "-"
	}
	return BytesText(most)
}

const (
	sparkTime        = 15 * time.Minute
	sparkCells       = 15 // in the table: a minute each
	detailSparkCells = 60
)

// sparkline draws what was received in the last quarter of an hour, each cell as high as
// the fastest of its samples is beside the fastest of all. Only nothing at all is lowest.
// Before the daemon was started there is nothing.
func sparkline(h *HistoryReport, cells int) string {
	if h == nil || h.IntervalSeconds <= 0 || len(h.BytesPerSecond) == 0 {
		return ""
	}
	const levels = "▁▂▃▄▅▆▇█"
	peaks := make([]int64, cells)
	for i := range peaks {
		peaks[i] = -1
	}
	n := len(h.BytesPerSecond)
	for i, rate := range h.BytesPerSecond {
		age := float64(n-1-i) * h.IntervalSeconds
		if cell := cells - 1 - int(age/sparkTime.Seconds()*float64(cells)); cell >= 0 {
			peaks[cell] = max(peaks[cell], rate)
		}
	}
	heights, most := []rune(levels), slices.Max(peaks)
	var b strings.Builder
	for _, peak := range peaks {
		switch {
		case peak < 0:
			b.WriteByte(' ')
		case peak == 0:
			b.WriteRune(heights[0])
		default:
			b.WriteRune(heights[int(math.Ceil(float64(peak)/float64(most)*float64(len(heights)-1)))])
		}
	}
	return b.String()
}

// columnsOf is how many columns of a terminal a character takes. Those that take none
// may be part of the one before them, or tell a terminal to write from right to left.
func columnsOf(c rune) int {
	if unicode.In(c, unicode.Mn, unicode.Me, unicode.Cf) {
		return 0
	}
	switch width.LookupRune(c).Kind() {
	case width.EastAsianWide, width.EastAsianFullwidth:
		return 2
	}
	return 1
}

// columns is how many columns of a terminal a text takes.
func columns(s string) (n int) {
	for _, c := range s {
		n += columnsOf(c)
	}
	return n
}

// fit is a text on one line of at most so many columns, cut where it is longer.
func fit(s string, limit int) string {
	s = strings.Map(func(c rune) rune {
		if unicode.Is(unicode.Cf, c) {
			return -1
		}
		return c
	}, oneLine(s))
	if over := columns(s) - limit; over <= len(s)-len(strings.TrimRight(s, " ")) { // spaces go in silence
		return s[:len(s)-max(over, 0)]
	}
	if limit < 1 {
		return ""
	}
	var b strings.Builder
	for _, c := range s {
		if limit -= columnsOf(c); limit < 1 { // the last column is the ellipsis's
			break
		}
		b.WriteRune(c)
	}
	return b.String() + "…"
}
