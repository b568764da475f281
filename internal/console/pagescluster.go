package console

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/walfleet/walfleet/fleet"
)

// clusterScene is a cluster's page. r is a report of that one.
func clusterScene(r fleet.Report, archive reading) *scene {
	c := r.Clusters[0]
	s := newScene(r)
	s.add(&part{id: "removed", template: "removed", view: false})
	head := clusterHeadlineOf(c)
	s.add(&part{id: "headline", template: "cluster-headline", view: head})
	s.add(&part{id: "spoken", template: "cluster-spoken", view: head.Answer})
	s.add(&part{id: "live-facts", template: "live", view: liveOf(c)})
	s.add(&part{id: "map", template: "map", view: mapOf(archive)})
	for _, f := range []factsView{positionOf(c), serverOf(c), archiveOf(c), checksOf(c)} {
		s.add(&part{id: f.ID, template: "facts", view: f})
	}
	s.add(&part{id: "slots", template: "slots", view: slotsOf(c)})
	s.add(&part{id: "events", template: "events", view: eventsOf(c)})
	s.add(&part{id: "settings", template: "settings", view: configOf(r, c)})
	return s
}

// goneScene is the page of a cluster that is not in the configuration any more: as it was, and that it is gone.
func goneScene(r fleet.Report, was *scene) *scene {
	s := newScene(r)
	s.add(&part{id: "removed", template: "removed", view: true})
	if was != nil {
		for _, a := range was.parts {
			if a.id != "removed" {
				s.add(a)
			}
		}
	}
	return s
}

// clusterHeadline says how a cluster is, why, and what to do.
type clusterHeadline struct {
	Name          string
	State         string
	Health        fleet.Health
	Since         moment
	Answer        string // key
	Stopping      moment
	Reason, Hint  string
	Warnings      []warningView
	Faults        int
	DrillFailed   moment
	Gaps          int64
	LastError     string
	LastErrorTime moment
}

type warningView struct {
	Kind, Host, Text, Hint string
	Since                  moment
}

func clusterHeadlineOf(c fleet.ClusterReport) clusterHeadline {
	v := clusterHeadline{
		Name: visible(c.Name), State: stateOf(c.State), Health: c.Health, Since: momentOf(c.Since), Stopping: momentOf(c.Stopping),
		Reason: visible(c.Reason), Hint: visible(c.Hint), Faults: faultsOf(c), DrillFailed: drillFailedOf(c), Gaps: c.Gaps, LastError: visible(c.LastError), LastErrorTime: momentOf(c.LastErrorTime),
	}
	switch {
	case c.Health == fleet.Healthy:
		v.Answer = "answer.ok"
	case c.Health == fleet.Critical && receives(c) && v.Faults > 0:
		v.Answer = "answer.cluster.damaged"
	case c.Health == fleet.Critical && receives(c):
		v.Answer = "answer.cluster.danger"
	default:
		v.Answer = "answer.cluster." + string(c.Health)
	}
	if v.LastError == v.Reason || strings.Contains(v.Reason, v.LastError) {
		v.LastError = "" // is said already
	}
	for _, w := range c.Warnings {
		v.Warnings = append(v.Warnings, warningView{visible(w.Kind), visible(w.Host), visible(w.Text), visible(w.Hint), momentOf(w.Since)})
	}
	if text := c.Unreadable(); text != "" {
		v.Warnings = append(v.Warnings, warningView{Kind: "archive", Text: visible(text), Since: momentOf(c.Archive.Time)})
	}
	return v
}

// liveView is what changes all the time.
type liveView struct {
	Lag     lagView
	Flushed string
	Message moment
	Rate    amount
	Spark   sparkView
}

func liveOf(c fleet.ClusterReport) liveView {
	return liveView{lagOf(c, ""), visible(c.FlushedLSN), momentOf(c.LastMessage), rateOf(c.BytesPerSecond), sparkView{"spark", c.History}}
}

// factsView is a section of names and values.
type factsView struct {
	ID    string
	Facts []fact
}

// fact is one of them. Its value is a text, a text of ours by its key, an age, or a time.
type fact struct {
	Name    string // as the JSON has it
	Value   string // exactly, for scripts
	Text    string
	Say     string
	Age     int64 // seconds
	At      moment
	Note    string
	Mono    bool // Text is a position or a name
	Foreign bool // Text is somebody else's
	Alarm   bool
}

// facts is a list under construction: what is not known is left out.
type facts []fact

func (f *facts) text(name, text string) {
	if text != "" {
		*f = append(*f, fact{Name: name, Value: visible(text), Text: visible(text), Mono: true, Foreign: true})
	}
}

func (f *facts) number(name string, n int64) {
	*f = append(*f, fact{Name: name, Value: strconv.FormatInt(n, 10), Text: strconv.FormatInt(n, 10)})
}

func (f *facts) bytes(name string, n *int64) {
	if n != nil {
		b := bytesOf(n)
		*f = append(*f, fact{Name: name, Value: b.Value, Text: b.Text})
	}
}

func (f *facts) at(name string, t time.Time) {
	if s := momentOf(t); s != "" {
		*f = append(*f, fact{Name: name, Value: string(s), At: s})
	}
}

func positionOf(c fleet.ClusterReport) factsView {
	var f facts
	f.text("server_lsn", c.ServerLSN)
	f.text("written_lsn", c.WrittenLSN)
	f.text("synced_lsn", c.SyncedLSN)
	f.bytes("received_bytes", &c.ReceivedBytes)
	if c.ReceivedAgainBytes > 0 {
		f.bytes("received_again_bytes", &c.ReceivedAgainBytes)
	}
	f.number("reconnects", c.Reconnects)
	f.number("switchovers", c.Switchovers)
	if c.Panics > 0 {
		f = append(f, fact{Name: "panics", Value: fmt.Sprint(c.Panics), Text: fmt.Sprint(c.Panics), Alarm: true})
	}
	return factsView{ID: "position", Facts: f}
}

func serverOf(c fleet.ClusterReport) factsView {
	var f facts
	f.text("host", c.Host)
	f.text("hosts", strings.Join(c.Hosts, "\n"))
	f.text("user", c.User)
	f.text("server_version", c.ServerVersion)
	f.text("polardb_version", c.PolarDBVersion)
	f.text("system_identifier", c.SystemIdentifier)
	if c.SegmentSize > 0 {
		f.bytes("segment_size", &c.SegmentSize)
	}
	if c.Timeline > 0 {
		f.number("timeline", int64(c.Timeline))
	}
	return factsView{ID: "server", Facts: f}
}

func archiveOf(c fleet.ClusterReport) factsView {
	var f facts
	f.text("directory", c.Directory)
	if a := c.Archive; a != nil {
		if a.Error != "" {
			f = append(f, fact{Name: "archive_error", Text: visible(a.Error), Foreign: true, Alarm: true})
		}
		f.number("segments", int64(a.Segments))
		f.bytes("bytes", &a.Bytes)
		f.at("oldest", a.Oldest)
		f.at("modified", a.Modified)
		if a.OriginLSN != "" {
			f = append(f, fact{Name: "origin_lsn", Value: visible(a.OriginLSN), Text: visible(a.OriginLSN), Mono: true, At: momentOf(a.OriginTime), Note: visible(a.OriginSource)})
		}
		if a.Aside > 0 {
			f.number("aside", int64(a.Aside))
		}
	}
	if c.CompressBacklog > 0 {
		f = append(f, fact{Name: "compress_backlog", Value: fmt.Sprint(c.CompressBacklog), Text: fmt.Sprintf("%d (%s)", c.CompressBacklog, fleet.BytesText(c.CompressBytes))})
	}
	f.bytes("disk_free_bytes", c.DiskFreeBytes)
	if a := c.Archive; a != nil && a.DiskTotalBytes > 0 {
		f.bytes("disk_total_bytes", &a.DiskTotalBytes)
	}
	switch disk := diskOf(c); {
	case disk.Full < 0:
		f = append(f, fact{Name: "seconds_to_full", Value: "0", Say: "disk.full.now", Alarm: true})
	case disk.Full > 0:
		f = append(f, fact{Name: "seconds_to_full", Value: fmt.Sprint(disk.Full), Age: disk.Full, Alarm: disk.Alarm})
	}
	return factsView{ID: "archive", Facts: f}
}

func checksOf(c fleet.ClusterReport) factsView {
	a := c.Archive
	if a == nil {
		a = &fleet.ArchiveReport{}
	}
	var f facts
	if v := a.LastVerify; v == nil {
		f = append(f, fact{Name: "last_verify", Say: "verify.never"})
	} else {
		outcome := fact{Name: "last_verify", Value: strconv.FormatBool(v.Whole), Say: "verify.whole", At: momentOf(v.Time), Note: visible(v.Error)}
		if !v.Whole {
			outcome.Say, outcome.Alarm = "verify.faulty", true
		}
		f = append(f, outcome, fact{Name: "last_verify_faults", Value: fmt.Sprint(v.Faults), Text: fmt.Sprint(v.Faults), Alarm: v.Faults > 0},
			fact{Name: "last_verify_segments", Value: fmt.Sprint(v.Segments), Text: fmt.Sprintf("%d (%s)", v.Segments, fleet.BytesText(v.CheckedBytes))})
	}
	if d := a.LastDrill; d == nil {
		f = append(f, fact{Name: "last_drill", Say: "drill.never"})
	} else {
		outcome := fact{Name: "last_drill", Value: strconv.FormatBool(d.OK), Say: "drill.ok", At: momentOf(d.Time), Note: visible(d.Error)}
		if !d.OK {
			outcome.Say, outcome.Alarm = "drill.failed", true
		}
		f = append(f, outcome)
		f.text("last_drill_lsn", d.RecoveredLSN)
		f.at("last_drill_last_commit", d.LastCommit)
	}
	return factsView{ID: "checks", Facts: f}
}

// slotsView is the slot on each host.
type slotsView struct {
	Slot string
	Rows []slotRow
}

type slotRow struct {
	Host            string
	Never, Exists   bool
	Status, Invalid string
	Retained, Safe  amount
	Restart         string
	PID             uint32
	Sync            string
	Time            moment
	Note            string
	Alarm           bool
}

func slotsOf(c fleet.ClusterReport) slotsView {
	v := slotsView{Slot: visible(c.Slot)}
	for _, s := range c.Slots {
		row := slotRow{Host: visible(s.Host), Never: s.Time.IsZero(), Exists: s.Exists, Status: visible(s.Status), Invalid: visible(s.Invalid), Safe: bytesOf(s.SafeBytes),
			Restart: visible(s.RestartLSN), PID: s.ActivePID, Sync: visible(s.SyncState), Time: momentOf(s.Time), Note: visible(s.Note), Alarm: alarming(s)}
		if s.Exists {
			row.Retained = bytesOf(&s.RetainedBytes)
		}
		v.Rows = append(v.Rows, row)
	}
	return v
}

type eventView struct {
	Time        moment
	Level, Text string
}

// eventsOf are the events, the newest first.
func eventsOf(c fleet.ClusterReport) (list []eventView) {
	for _, e := range slices.Backward(c.Events) {
		level := e.Level
		if level != "warn" && level != "error" {
			level = "info"
		}
		list = append(list, eventView{momentOf(e.Time), level, visible(e.Text)})
	}
	return list
}

// settingsView is how to recover from the archive, and the configuration in effect.
type settingsView struct {
	Link     string
	Config   string
	Restore  string
	Settings []settingView
}

type settingView struct{ Key, Value string }

func configOf(r fleet.Report, c fleet.ClusterReport) settingsView {
	v := settingsView{Link: link(c.Name)}
	if r.Daemon != nil {
		v.Config = visible(r.Daemon.Config)
		v.Restore = visible(restoreCommand(r.Daemon.Config, c.Name))
	}
	for _, key := range slices.Sorted(maps.Keys(c.Settings)) {
		v.Settings = append(v.Settings, settingView{visible(key), visible(fmt.Sprint(cmp.Or[any](c.Settings[key], "")))})
	}
	return v
}

// restoreCommand is a line of postgresql.conf. The path goes through three readers: the shell, restore_command with
// its "%", and the file with its quotes and backslashes.
func restoreCommand(config, cluster string) string {
	command := fmt.Sprintf("walfleet -c %s restore-wal %s", shellWord(config), shellWord(cluster))
	command = strings.ReplaceAll(command, "%", "%%") + ` "%f" "%p"`
	return "restore_command = '" + strings.NewReplacer(`\`, `\\`, `'`, `''`, "\n", `\n`).Replace(command) + "'"
}

// shellWord is s as one word for a shell.
func shellWord(s string) string {
	plain := func(r rune) bool {
		return r >= 'a' && r <= 'z' || r >= 'A' && r <= 'Z' || r >= '0' && r <= '9' || strings.ContainsRune("/._-+,:@=", r)
	}
	if s != "" && strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	return "'" + strings.ReplaceAll(s, "'", `'\''`) + "'"
}
