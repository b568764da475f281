package console

import (
	"cmp"
	"fmt"
	"math"
	"net/url"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/walfleet/walfleet/fleet"
)

// inOrder are the states in the order in which the pages name them.
var inOrder = []string{"halted", "blocked", "backoff", "connecting", "catching_up", "streaming", "stopped", "unknown"}

// amount is a number for people, and exactly, for scripts; both are empty where it is not known.
type amount struct {
	Text  string
	Value string
}

func bytesOf(n *int64) amount {
	if n == nil {
		return amount{}
	}
	return amount{fleet.BytesText(*n), strconv.FormatInt(*n, 10)}
}

func rateOf(bytesPerSecond float64) amount {
	n := int64(bytesPerSecond)
	return amount{fleet.BytesText(n) + "/s", strconv.FormatInt(n, 10)}
}

// link is a cluster's name in a URL.
func link(name string) string { return url.PathEscape(name) }

// stateOf is a state that the pages have words and a shape for.
func stateOf(state string) string {
	if slices.Contains(inOrder, state) {
		return state
	}
	return "unknown"
}

// fleetScene is the fleet's page.
func fleetScene(r fleet.Report) *scene {
	clusters := slices.Clone(r.Clusters)
	slices.SortStableFunc(clusters, fleet.Urgent)
	s := newScene(r)
	s.add(&part{id: "headline", template: "fleet-headline", view: headlineOf(clusters)})
	s.add(&part{id: "reload", template: "reload", view: reloadOf(r.Daemon)})
	counts := countsOf(clusters)
	s.add(&part{id: "spoken", template: "spoken", view: spokenOf(clusters)})
	s.add(&part{id: "totals", template: "totals", view: totalsOf(clusters)})
	s.add(&part{id: "states", template: "states", view: counts})
	for _, c := range clusters {
		row := rowOf(c)
		s.rows = append(s.rows, row.ID)
		s.add(&part{id: row.ID, template: "row", view: row, compare: row.rowFields})
		s.add(&part{id: row.Lag.ID, template: "lag", view: row.Lag, within: row.ID})
		s.add(&part{id: row.Rate.ID, template: "rate", view: row.Rate, within: row.ID})
		s.add(&part{id: row.Spark.ID, template: "spark", view: row.Spark, within: row.ID})
	}
	return s
}

// fleetHeadline answers whether any database could not be recovered.
type fleetHeadline struct {
	Health fleet.Health
	Title  string // key of the window's title
	sentence
	Also []sentence
}

// sentence is a text about some of the clusters.
type sentence struct {
	Text  string // its key
	Count int
	Total int
	Names []nameLink
	More  int    // that are not named
	After string // key of what follows
}

type nameLink struct{ Name, Link string }

// namesLimit is how many clusters a headline names: it is read at a glance.
const namesLimit = 8

func about(text string, total int, of []fleet.ClusterReport) sentence {
	s := sentence{Text: text, Count: len(of), Total: total}
	for i, c := range of {
		if i == namesLimit {
			s.More = len(of) - i
			break
		}
		s.Names = append(s.Names, nameLink{visible(c.Name), "clusters/" + link(c.Name)})
	}
	return s
}

func headlineOf(clusters []fleet.ClusterReport) fleetHeadline {
	total := len(clusters)
	with := func(is func(fleet.ClusterReport) bool) (list []fleet.ClusterReport) {
		for _, c := range clusters {
			if is(c) {
				list = append(list, c)
			}
		}
		return list
	}
	bad := with(func(c fleet.ClusterReport) bool { return c.Health == fleet.Critical && !receives(c) })
	risk := with(func(c fleet.ClusterReport) bool { return c.Health == fleet.Critical && receives(c) })
	warning := with(func(c fleet.ClusterReport) bool { return c.Health == fleet.Warning })
	gaps := with(func(c fleet.ClusterReport) bool { return c.Gaps > 0 })
	var h fleetHeadline
	switch {
	case total == 0:
		h = fleetHeadline{Health: fleet.Warning, Title: "title", sentence: sentence{Text: "answer.none"}}
	case len(bad) > 0:
		h = fleetHeadline{Health: fleet.Critical, Title: "title.bad", sentence: about("answer.bad", total, bad)}
		if len(risk) > 0 {
			h.Also = append(h.Also, about("also.risk", total, risk))
		}
	case len(risk) > 0:
		h = fleetHeadline{Health: fleet.Critical, Title: "title.risk", sentence: about("answer.risk", total, risk)}
	case len(warning) > 0:
		h = fleetHeadline{Health: fleet.Warning, Title: "title.warn", sentence: about("answer.warn", total, warning)}
	default:
		h = fleetHeadline{Health: fleet.Healthy, Title: "title", sentence: sentence{Text: "answer.all", Count: total, Total: total}}
	}
	if h.Health == fleet.Critical && len(warning) > 0 {
		h.Also = append(h.Also, about("also.warn", total, warning))
	}
	if len(gaps) > 0 {
		also := about("also.gaps", total, gaps)
		also.After = "also.gaps.mean"
		h.Also = append(h.Also, also)
	}
	return h
}

// receives tells whether WAL comes from the server.
func receives(c fleet.ClusterReport) bool { return c.State == "streaming" || c.State == "catching_up" }

// reloadView is the last reload, when it failed.
type reloadView struct {
	Text  string // key
	Time  moment
	Error string
}

func reloadOf(d *fleet.DaemonReport) reloadView {
	if d == nil || d.LastReload == nil || d.LastReload.Error == "" {
		return reloadView{}
	}
	v := reloadView{"reload.failed", momentOf(d.LastReload.Time), visible(d.LastReload.Error)}
	if d.LastReload.Applied {
		v.Text = "reload.part"
	}
	return v
}

// count is how many clusters are in a state, or wanted by a filter of another name.
type count struct {
	State  string // as the filter has it
	Text   string // key
	Mark   bool   // State is a state
	Count  int
	Health fleet.Health // the worst among them
}

type counts []count

func countsOf(clusters []fleet.ClusterReport) counts {
	worst := func(a, b fleet.Health) fleet.Health {
		for _, h := range []fleet.Health{fleet.Critical, fleet.Warning} {
			if a == h || b == h {
				return h
			}
		}
		return fleet.Healthy
	}
	all, attention := count{Text: "filter.all", Count: len(clusters)}, count{State: "attention", Text: "filter.attention"}
	by := map[string]count{}
	for _, c := range clusters {
		state := stateOf(c.State)
		n := by[state]
		by[state] = count{state, "state." + state, true, n.Count + 1, worst(n.Health, c.Health)}
		if c.Health != fleet.Healthy {
			attention.Count++
			attention.Health = worst(attention.Health, c.Health)
		}
	}
	list := counts{all, attention}
	for _, state := range inOrder {
		if n, ok := by[state]; ok {
			list = append(list, n)
		}
	}
	return list
}

// spokenOf are the counts that a screen reader speaks when they change: by health, since the state of a server that is
// down changes with each attempt to reach it.
func spokenOf(clusters []fleet.ClusterReport) (list counts) {
	for _, h := range []fleet.Health{fleet.Critical, fleet.Warning, fleet.Healthy} {
		n := count{Text: "spoken." + string(h)}
		for _, c := range clusters {
			if c.Health == h {
				n.Count++
			}
		}
		if n.Count > 0 {
			list = append(list, n)
		}
	}
	return list
}

// totalsView is the fleet in four numbers.
type totalsView struct {
	Rate     amount
	Archives struct {
		amount
		Missing int // clusters of which it is not known
	}
	Slot, Disk struct {
		amount
		Of string // the cluster
	}
}

func totalsOf(clusters []fleet.ClusterReport) totalsView {
	var v totalsView
	rate, archives := 0.0, int64(0)
	var slot, disk *int64
	for _, c := range clusters {
		rate += c.BytesPerSecond
		if c.Archive != nil && c.Archive.Error == "" {
			archives += c.Archive.Bytes
		} else {
			v.Archives.Missing++
		}
		for _, s := range c.Slots {
			if s.Exists && (slot == nil || s.RetainedBytes > *slot) {
				slot, v.Slot.Of = &s.RetainedBytes, visible(c.Name)
			}
		}
		if free := c.DiskFreeBytes; free != nil && (disk == nil || *free < *disk) {
			disk, v.Disk.Of = free, visible(c.Name)
		}
	}
	v.Rate = rateOf(rate)
	if v.Archives.Missing < len(clusters) {
		v.Archives.amount = bytesOf(&archives)
	}
	v.Slot.amount, v.Disk.amount = bytesOf(slot), bytesOf(disk)
	for _, a := range []*amount{&v.Archives.amount, &v.Slot.amount, &v.Disk.amount} {
		a.Text = cmp.Or(a.Text, "–")
	}
	return v
}

// rowView is a cluster in the fleet's table. What changes all the time is apart from the rest of it.
type rowView struct {
	rowFields
	Lag   lagView
	Rate  rateView
	Spark sparkView
}

type rowFields struct {
	ID, Name, Link string
	State          string
	Health         fleet.Health
	Since          moment
	Host           string
	Timeline       string
	Slot           slotCell
	Disk           diskCell
	Stopping       moment
	Reason         string
	Warnings       []string
	Faults         int    // that the last verify found
	DrillFailed    moment // when the last drill did
	Gaps           int64
}

// slotCell is the host on which the slot retains most.
type slotCell struct {
	amount
	Status  string // where it is not what is hoped for
	Lacking bool   // hosts have answered, and none has it
	Alarm   bool
}

type diskCell struct {
	amount
	Full  int64 // seconds until it is; 0: not soon, or not known; -1: it is
	Alarm bool
}

type lagView struct {
	ID string
	amount
	Seconds string // exact
	Known   bool
	Age     int64 // seconds
	Never   bool  // it receives, and has not caught up since the start
	Late    bool
}

type rateView struct {
	ID string
	amount
}

func rowOf(c fleet.ClusterReport) rowView {
	id := "c:" + link(c.Name)
	row := rowView{rowFields: rowFields{
		ID: id, Name: visible(c.Name), Link: "clusters/" + link(c.Name), State: stateOf(c.State), Health: c.Health, Since: momentOf(c.Since), Host: visible(c.Host),
		Slot: slotOf(c), Disk: diskOf(c), Stopping: momentOf(c.Stopping), Reason: visible(c.Reason), Gaps: c.Gaps,
	}}
	if c.Timeline != 0 {
		row.Timeline = fmt.Sprint(c.Timeline)
	}
	for _, w := range c.Warnings {
		row.Warnings = append(row.Warnings, visible(w.Text))
	}
	if text := c.Unreadable(); text != "" {
		row.Warnings = append(row.Warnings, visible(text))
	}
	row.Faults, row.DrillFailed = faultsOf(c), drillFailedOf(c)
	row.Lag = lagOf(c, id+":lag")
	row.Rate = rateView{id + ":rate", rateOf(c.BytesPerSecond)}
	row.Spark = sparkView{id + ":spark", c.History}
	return row
}

// faultsOf is how many faults the last verify found.
func faultsOf(c fleet.ClusterReport) int {
	if c.Archive == nil || c.Archive.LastVerify == nil {
		return 0
	}
	return c.Archive.LastVerify.Faults
}

// drillFailedOf is when the last drill failed; "": it did not.
func drillFailedOf(c fleet.ClusterReport) moment {
	if c.Archive == nil || c.Archive.LastDrill == nil || c.Archive.LastDrill.OK {
		return ""
	}
	return momentOf(c.Archive.LastDrill.Time)
}

func lagOf(c fleet.ClusterReport, id string) lagView {
	v := lagView{ID: id, amount: bytesOf(c.LagBytes)}
	if s := c.BehindSeconds; s != nil {
		v.Seconds, v.Known, v.Age = strconv.FormatFloat(*s, 'f', 3, 64), true, int64(*s)
		v.Late = c.Health != fleet.Healthy && *s >= fleet.LateAfter.Seconds()
	} else {
		v.Never = receives(c)
	}
	return v
}

// alarming are the states of a slot in which its server may remove WAL, or has.
func alarming(s fleet.SlotReport) bool {
	return s.Exists && (s.Status == "unreserved" || s.Status == "lost" || s.Invalid != "")
}

func slotOf(c fleet.ClusterReport) (v slotCell) {
	asked := false
	var most *int64
	for _, s := range c.Slots {
		asked = asked || !s.Time.IsZero()
		if !s.Exists {
			continue
		}
		if most == nil || s.RetainedBytes > *most {
			most = &s.RetainedBytes
		}
		if s.Status != "reserved" && s.Status != "" && (v.Status == "" || alarming(s)) {
			v.Status = visible(s.Status)
		}
		v.Alarm = v.Alarm || alarming(s)
	}
	v.amount, v.Lacking = bytesOf(most), asked && most == nil
	for _, w := range c.Warnings {
		v.Alarm = v.Alarm || strings.HasPrefix(w.Kind, "slot_")
	}
	return v
}

const fullSoon = 24 * 3600 // seconds

func diskOf(c fleet.ClusterReport) diskCell {
	v := diskCell{amount: bytesOf(c.DiskFreeBytes)}
	switch s := c.SecondsToFull; {
	case s == nil || *s >= 30*fullSoon:
	case *s <= 0:
		v.Full, v.Alarm = -1, true
	default:
		v.Full, v.Alarm = max(60, coarse(*s)), *s < fullSoon
	}
	return v
}

// coarse is an estimate of seconds, rounded, so that it does not change all the time.
func coarse(seconds float64) int64 {
	step := 60.0
	switch {
	case seconds >= fullSoon:
		step = 3600
	case seconds >= 3600:
		step = 600
	}
	return int64(math.Round(seconds/step) * step)
}

// sparkView is the rate in the last quarter of an hour. It is drawn when it is sent, not each time that it is looked
// at.
type sparkView struct {
	ID      string
	History *fleet.HistoryReport
}

// drawing is a sparkView's.
type drawing struct {
	Width  int    // of the drawing, one for each sample and the next
	Points string // "x,y …": y from 1, the peak, to 23, nothing
	Peak   string
}

const (
	sparkSpan   = 15 * time.Minute
	sparkLimit  = 90        // samples in the drawing; neighbours are joined until there are no more
	sparkBottom = 23        // y of nothing
	sparkFloor  = 16 * 1024 // the least rate that is drawn at full height, so that next to nothing looks like it
)

// Draw draws it, the newest at the right.
func (s sparkView) Draw() drawing {
	h, v := s.History, drawing{Width: sparkLimit - 1, Peak: fleet.BytesText(0) + "/s"}
	if h == nil || h.IntervalSeconds <= 0 || len(h.BytesPerSecond) == 0 {
		return v
	}
	all := int(min(max(sparkSpan.Seconds()/h.IntervalSeconds, 2), 100_000)) // samples in the span
	rates := h.BytesPerSecond[max(0, len(h.BytesPerSecond)-all):]
	join := (all + sparkLimit - 1) / sparkLimit
	peak := slices.Max(rates)
	v.Peak = fleet.BytesText(max(peak, 0)) + "/s"
	v.Width = max((all+join-1)/join-1, 1)
	var b strings.Builder
	groups := (len(rates) + join - 1) / join
	for i := groups; i > 0; i-- { // counted from the end, where the newest is, so that an old one keeps its neighbours
		end := len(rates) - (i-1)*join
		rate := slices.Max(rates[max(0, end-join):end])
		y := sparkBottom - (sparkBottom-1)*float64(max(rate, 0))/float64(max(peak, sparkFloor))
		x := v.Width - (i - 1)
		if i == groups {
			fmt.Fprintf(&b, "%d,%d ", x, sparkBottom)
		}
		fmt.Fprintf(&b, "%d,%s ", x, strconv.FormatFloat(y, 'f', 1, 64))
	}
	fmt.Fprintf(&b, "%d,%d", v.Width, sparkBottom)
	v.Points = b.String()
	return v
}
