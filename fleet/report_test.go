package fleet

import (
	"bytes"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/receiver"
)

var reportTime = time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)

// status is a cluster's with values of all kinds.
func status(name string, state receiver.State, reason string, since time.Duration) ClusterStatus {
	cfg := defaultCluster()
	cfg.Name, cfg.Dir, cfg.Conninfo = name, "/archive/"+name, "host=db1,db2 user=archiver password=never-shown"
	return ClusterStatus{Name: name, configured: configured(cfg), Status: receiver.Status{
		State: state, Reason: reason, Since: reportTime.Add(-since), DiskFree: -1,
	}}
}

func testReport() Report {
	good := status("good", receiver.Streaming, "", 50*time.Hour)
	good.Host, good.ServerVersion, good.PolarDB = "db1:5432", "15.12", "2.0.15"
	good.SystemID, good.SegmentSize, good.Timeline = 7710980023744152150, 1<<30, 3
	good.ServerEnd, good.Written, good.Synced, good.Flushed = 0x1_00001000, 0x1_00000C00, 0x1_00000B00, 0x1_00000A00
	good.LastData, good.CaughtUp = reportTime.Add(-time.Second), reportTime.Add(-2*time.Second)
	good.Rate, good.ReceivedBytes, good.ReceivedAgain = 1.5*(1<<20), 5<<30, 12000
	good.SegmentsSealed, good.SegmentsCompressed, good.CompressBacklog, good.Reconnects = 9, 7, 2, 1
	good.DiskFree, good.Gaps = 10<<30, 1
	good.LastError, good.LastErrorAt = "the server went away", reportTime.Add(-51*time.Hour)
	good.Slots = []receiver.SlotView{
		{Host: "db1:5432", Answered: reportTime.Add(-20 * time.Second), SlotWatch: pgrepl.SlotWatch{Exists: true, RestartLSN: 0x1_00001000 - 3<<20, Retained: 3 << 20,
			Status: "extended", SafeWALSize: 1 << 30, ActivePID: 77, SyncState: "sync"}},
		{Host: "db2:5432", Note: "connection refused"},
	}
	good.Warnings = []receiver.Warning{{Kind: receiver.WarnSlotRetained, Host: "db1:5432", Since: reportTime.Add(-time.Minute), Text: "the slot retains much", Hint: "look why"}}
	halted := status("halted", receiver.Halted, "the server no longer has the WAL that comes next: "+strings.Repeat("really ", 30), 90*time.Second)
	stuck := status("stuck", receiver.Backoff, "connection refused", 3*time.Second)
	stuck.Stopping = reportTime.Add(-31 * time.Second)
	idle := status("idle", receiver.Streaming, "", time.Second)
	r := Report{Time: reportTime, Daemon: &DaemonReport{PID: 1, Version: "v1", Since: reportTime.Add(-100 * time.Hour), Config: "/etc/walfleet/walfleet.toml"}}
	for _, c := range []ClusterStatus{good, idle, stuck, halted} {
		r.Clusters = append(r.Clusters, reportOf(c, r.Time))
	}
	return r
}

func wantText(t *testing.T, got, want string) {
	t.Helper()
	if want = strings.TrimPrefix(want, "\n"); got != want {
		t.Errorf("got\n%s\nwant\n%s", got, want)
	}
}

func TestTableHasTroubleFirst(t *testing.T) {
	var b bytes.Buffer
	if err := testReport().WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	wantText(t, b.String(), `
CLUSTER  STATE      TLI  FLUSHED  LAG     BEHIND  RATE      SLOT      FREE   SINCE  REASON
halted   halted     -    -        -       -       0 B/s     walfleet  -      1m30s  the server no longer has the WAL that comes next: really really really really really really really really really really…
stuck    backoff    -    -        -       -       0 B/s     walfleet  -      3s     told to stop 31s ago by a reload, and has not stopped; connection refused
good     streaming  3    1/A00    1.5 kB  2s      1.5 MB/s  walfleet  10 GB  2d02h  the slot retains much; gaps on record: 1
idle     streaming  -    -        -       0s      0 B/s     walfleet  -      1s
4 clusters: 1 halted, 1 backoff, 2 streaming
`)
}

// A halted cluster is looked at again every half a minute, and is another one for a moment then. That does not make
// the outage younger.
func TestAnOutageHasOneBeginning(t *testing.T) {
	s := status("a", receiver.Halted, "a gap", time.Second)
	if r := reportOf(s, reportTime); !r.Since.Equal(reportTime.Add(-time.Second)) {
		t.Errorf("since %s", r.Since)
	}
	s.TroubleSince = reportTime.Add(-time.Hour)
	for _, state := range []receiver.State{receiver.Halted, receiver.Blocked, receiver.Backoff, receiver.Connecting} {
		s.State = state
		if r := reportOf(s, reportTime); !r.Since.Equal(s.TroubleSince) {
			t.Errorf("%s since %s", state, r.Since)
		}
	}
}

// A receiver that reads slowly has old news of the server's end. What the monitor saw counts as well, but for the time
// that is lacking: that is measured.
func TestLagKnowsWhatTheMonitorSaw(t *testing.T) {
	s := status("slow", receiver.Streaming, "", time.Hour)
	s.Host, s.Flushed, s.ServerEnd, s.CaughtUp = "db1:5432", 0x1000, 0x1000, reportTime
	s.Slots = []receiver.SlotView{
		{Host: "db0:5432", SlotWatch: pgrepl.SlotWatch{Exists: true, RestartLSN: 0x1000, Retained: 1 << 30}},
		{Host: "db1:5432", SlotWatch: pgrepl.SlotWatch{Exists: true, RestartLSN: 0x800, Retained: 0x5000}},
	}
	if r := reportOf(s, reportTime); r.LagBytes == nil || *r.LagBytes != 0x4800 || r.ServerLSN != "0/5800" || r.BehindSeconds == nil || *r.BehindSeconds != 0 {
		t.Errorf("%+v", r)
	}
	s.ServerEnd = 0x9000 // newer
	if r := reportOf(s, reportTime); *r.LagBytes != 0x8000 || r.ServerLSN != "0/9000" {
		t.Errorf("%+v", r)
	}
}

func TestTableSaysThatTheLastReloadFailed(t *testing.T) {
	r := testReport()
	r.Daemon.LastReload = &Outcome{Time: reportTime.Add(-5 * time.Minute), Error: "walfleet.toml:3: a\nwalfleet.toml:9: b"}
	var b bytes.Buffer
	if err := r.WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	if !strings.HasPrefix(b.String(), "LAST RELOAD FAILED, 5m00s ago: walfleet.toml:3: a\n  walfleet.toml:9: b\n\nCLUSTER") {
		t.Errorf("%s", &b)
	}
}

func TestDetailsAreComplete(t *testing.T) {
	r, ok := testReport().Cluster("good")
	if !ok {
		t.Fatal("no such cluster")
	}
	r.Clusters[0].Hint = "see why"
	r.Clusters[0].Archive = &ArchiveReport{
		OriginLSN: "0/1000000", OriginSource: "slot", OriginTime: reportTime.Add(-240 * time.Hour),
		Segments: 12, Compressed: 7, Bytes: 9 << 30, FirstSegment: "000000010000000000000001", LastSegment: "000000030000000000000003", SealedLSN: "1/0",
		Partial:     []PartialReport{{"000000030000000100000000", reportTime.Add(-time.Second)}},
		Gaps:        []GapReport{{1, "0/2000000", "0/3000000", reportTime.Add(-48 * time.Hour), "removed (accepted by \x1b[31m accept-gap)"}},
		Divergences: []DivergenceReport{{2, "0/5003E80", "0/5000000", reportTime.Add(-47 * time.Hour), "differs"}},
		Aside:       3,
	}
	var b bytes.Buffer
	if err := r.WriteDetails(&b); err != nil {
		t.Fatal(err)
	}
	wantText(t, b.String(), `
good
  state              streaming, since 2026-01-29 10:00:00 UTC (2d02h ago)
  reason             the slot retains much; gaps on record: 1
  hint               see why
  connected to       db1:5432
  hosts              db1:5432, db2:5432
  user               archiver
  slot               walfleet
  slot on db1:5432   retains 3.0 MB, extended, safe for another 1.0 GB, sync, 20s ago
  slot on db2:5432   connection refused
  WARNING            the slot retains much, since 2026-01-31 11:59:00 UTC (1m00s ago); look why
  server version     PostgreSQL 15.12, PolarDB 2.0.15
  system identifier  7710980023744152150
  segment size       1.0 GB
  timeline           3
  server LSN         1/1000
  written LSN        1/C00
  synced LSN         1/B00
  flushed LSN        1/A00 (acknowledged)
  lag                1.5 kB, at most 2s behind
  last message       2026-01-31 11:59:59 UTC (1s ago)
  received           5.0 GB, 12 kB of it again; now 1.5 MB/s
  segments sealed    9 since 2026-01-27 08:00:00 UTC (4d04h ago)
  compression        7 segments compressed, 2 waiting (2.0 GB)
  reconnects         1
  last error         2026-01-29 09:00:00 UTC (2d03h ago): the server went away
  directory          /archive/good
  disk free          10 GB
  archive begins     0/1000000, from slot, 2026-01-21 12:00:00 UTC (10d00h ago)
  complete segments  12 (7 of them compressed), 9.0 GB
  first, last        000000010000000000000001, 000000030000000000000003 (ends at 1/0)
  in progress        000000030000000100000000, modified 2026-01-31 11:59:59 UTC (1s ago)
  gap                0/2000000 to 0/3000000 is missing for good, timeline 1, recorded 2026-01-29 12:00:00 UTC (2d00h ago): removed (accepted by  [31m accept-gap)
  divergence         at 0/5003E80, timeline 2, the archive goes on from 0/5000000, accepted 2026-01-29 13:00:00 UTC (1d23h ago): differs
  kept aside         3 files
  compress           none
  create_slot        true
  flush_interval     10s
  keep_age           0
  keep_size          0
  max_rate           0
  max_slot_retained  0
  min_free           100MB
  monitor            true
  monitor_interval   30s
  on_gap             halt
  receive_timeout    1m
  source             primary
  status_interval    10s
  synchronous        true
`)
}

// The JSON's names are documented, and programs depend on them.
func TestJSONHasStableNames(t *testing.T) {
	r := testReport()
	r.Clusters = r.Clusters[:1]
	r.Clusters[0].Archive = &ArchiveReport{}
	out := Outcome{}
	out.finish(reportTime, nil)
	r.Daemon.LastReload = &out
	data, err := json.Marshal(r)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(data), "never-shown") || strings.Contains(string(data), "conninfo") {
		t.Errorf("a secret: %s", data)
	}
	var got map[string]any
	if err := json.Unmarshal(data, &got); err != nil {
		t.Fatal(err)
	}
	c := got["clusters"].([]any)[0].(map[string]any)
	for name, want := range map[string]any{
		"name": "good", "state": "streaming", "since": "2026-01-29T10:00:00Z", "host": "db1:5432",
		"server_version": "15.12", "polardb_version": "2.0.15", "system_identifier": "7710980023744152150", "segment_size": float64(1 << 30),
		"timeline": 3.0, "written_lsn": "1/C00", "synced_lsn": "1/B00", "flushed_lsn": "1/A00", "server_lsn": "1/1000",
		"lag_bytes": 1536.0, "behind_seconds": 2.0, "last_message": "2026-01-31T11:59:59Z", "bytes_per_second": 1.5 * (1 << 20),
		"received_bytes": float64(5 << 30), "received_again_bytes": 12000.0, "segments_sealed": 9.0, "segments_compressed": 7.0,
		"compress_backlog": 2.0, "compress_backlog_bytes": float64(2 << 30), "reconnects": 1.0, "panics": 0.0, "gaps": 1.0,
		"last_error": "the server went away", "last_error_time": "2026-01-29T09:00:00Z",
		"directory": "/archive/good", "disk_free_bytes": float64(10 << 30), "slot": "walfleet", "user": "archiver",
		"hosts": []any{"db1:5432", "db2:5432"},
		"slots": []any{
			map[string]any{"host": "db1:5432", "time": "2026-01-31T11:59:40Z", "exists": true, "retained_bytes": float64(3 << 20), "restart_lsn": "0/FFD01000",
				"wal_status": "extended", "safe_wal_bytes": float64(1 << 30), "active_pid": 77.0, "sync_state": "sync"},
			map[string]any{"host": "db2:5432", "note": "connection refused", "exists": false, "retained_bytes": 0.0},
		},
		"warnings": []any{map[string]any{"kind": "slot_retained", "host": "db1:5432", "since": "2026-01-31T11:59:00Z", "text": "the slot retains much", "hint": "look why"}},
	} {
		if !reflect.DeepEqual(c[name], want) {
			t.Errorf("%s is %v, want %v", name, c[name], want)
		}
	}
	settings := c["settings"].(map[string]any)
	for _, s := range defaultSettings {
		if _, ok := settings[s.key]; !ok {
			t.Errorf("settings lack %s", s.key)
		}
	}
	last := got["daemon"].(map[string]any)["last_reload"].(map[string]any)
	for _, name := range []string{"not_stopped", "notes"} {
		if _, ok := last[name].([]any); !ok {
			t.Errorf("%s is %v, want a list", name, last[name])
		}
	}
	for _, name := range []string{"start", "stop", "restart", "adjust", "keep"} {
		if _, ok := last["done"].(map[string]any)[name].([]any); !ok {
			t.Errorf("%s is no list", name)
		}
	}
}

// docs/json.md has every name, and no other.
func TestJSONIsDocumented(t *testing.T) {
	text, err := os.ReadFile("../docs/json.md")
	if err != nil {
		t.Fatal(err)
	}
	documented := map[string]bool{}
	for _, cell := range regexp.MustCompile("(?m)^\\| (`.*?`) \\|").FindAllStringSubmatch(string(text), -1) {
		for _, name := range strings.Split(cell[1], ", ") {
			documented[strings.Trim(name, "`")] = true
		}
	}
	known := map[string]bool{}
	var note func(reflect.Type)
	note = func(typ reflect.Type) {
		for typ.Kind() == reflect.Pointer || typ.Kind() == reflect.Slice {
			typ = typ.Elem()
		}
		if typ.Kind() != reflect.Struct || typ == reflect.TypeFor[time.Time]() {
			return
		}
		for i := range typ.NumField() {
			name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			if name == "-" {
				continue
			}
			if name == "" || !strings.Contains(string(text), "`"+name+"`") {
				t.Errorf("%v.%s: %q is not documented", typ, typ.Field(i).Name, name)
			}
			known[name] = true
			note(typ.Field(i).Type)
		}
	}
	note(reflect.TypeFor[Report]())
	note(reflect.TypeFor[Contents]())
	note(reflect.TypeFor[Pruning]())
	for name := range documented {
		if !known[name] {
			t.Errorf("%q is documented, and there is no such name", name)
		}
	}
	if len(documented) < 50 {
		t.Errorf("only %d names were found", len(documented))
	}
}

// Without a daemon a report has what the directories say, and says why.
func TestReportWithoutADaemon(t *testing.T) {
	dir := t.TempDir()
	a := newCluster(t, "a")
	d, file, _, stop := daemon(t, fileOf(dir, nil, a))
	awaitStates(t, d, "a streaming")
	a.wal.FillTo(2 << 20)
	a.wal.Append(make([]byte, 1000))
	a.Publish(a.wal)
	a.awaitAcknowledged(t, d)
	stop()
	none := newCluster(t, "none")
	write(t, file, fileOf(dir, nil, a, none))
	cfg, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	before := names(t, filepath.Join(dir, "a"))
	r := Configured(cfg, errors.New("no walfleet answers at /run")).Peek(t.Context())
	if after := names(t, filepath.Join(dir, "a")); after != before {
		t.Errorf("the directory was changed, from %s to %s", before, after)
	}
	var b bytes.Buffer
	if err := r.WriteTable(&b); err != nil {
		t.Fatal(err)
	}
	for _, words := range []string{"NO DAEMON: no walfleet answers at /run\n", "\na ", "0/200000", "\nnone ", "there is no directory yet"} {
		if !strings.Contains(b.String(), words) {
			t.Errorf("it lacks %q:\n%s", words, &b)
		}
	}
	if _, err := os.Stat(filepath.Join(dir, "none")); err == nil {
		t.Error("a directory was made")
	}
}

func names(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var all []string
	for _, e := range entries {
		info, err := e.Info()
		if err != nil {
			t.Fatal(err)
		}
		all = append(all, e.Name(), info.ModTime().String())
	}
	return strings.Join(all, " ")
}

func TestOutcomeForPeople(t *testing.T) {
	for _, tt := range []struct {
		out  Outcome
		want string
	}{
		{Outcome{Error: "walfleet.toml:3: no"}, "refused, nothing changed: walfleet.toml:3: no\n"},
		{Outcome{File: "w.toml", Applied: true, Seconds: 0.31, Plan: Plan{Keep: []string{"a", "b"}}}, "reloaded w.toml in 310ms\n  kept  2\n"},
		{
			Outcome{
				File: "w.toml", Applied: true, Error: "not stopped", Stuck: []string{"c"}, Notes: []string{"runtime_dir"},
				Plan: Plan{
					Start: []string{"new1", "new2"}, Stop: []string{"gone"}, Restart: []string{"r"}, Adjust: []string{"x"},
					Changed: map[string][]string{"r": {"conninfo", "slot"}, "x": {"min_free"}},
				},
			}, `
reload of w.toml incomplete: not stopped
  not stopped  c     told to stop; what replaces it starts when it has
  started      new1
               new2
  stopped      gone  its files stay, and so does its slot, which retains WAL on the primary until it is dropped
  restarted    r     conninfo, slot
  adjusted     x     min_free
  kept         0
  note               runtime_dir
`,
		},
	} {
		var b bytes.Buffer
		if err := tt.out.Write(&b); err != nil {
			t.Fatal(err)
		}
		wantText(t, b.String(), tt.want)
	}
}

func TestBytesAndDurationsForPeople(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1023: "1023 B", 1024: "1.0 kB", 10188: "9.9 kB", 10189: "10 kB", 1023487: "999 kB", 1023488: "1.0 MB",
		1 << 30: "1.0 GB", 1<<63 - 1: "8.0 EB",
	} {
		if got := BytesText(n); got != want {
			t.Errorf("%d bytes are %q, want %q", n, got, want)
		}
	}
	for d, want := range map[time.Duration]string{
		-time.Second: "0s", 999 * time.Millisecond: "0s", 59 * time.Second: "59s", time.Minute: "1m00s",
		time.Hour - 1: "59m59s", time.Hour: "1h00m", 24*time.Hour - 1: "23h59m", 100 * time.Hour: "4d04h",
	} {
		if got := roughly(d); got != want {
			t.Errorf("%s is %q, want %q", d, got, want)
		}
	}
}

func TestLocateFindsTheSocketOfABrokenFile(t *testing.T) {
	for content, want := range map[string]string{
		"archive_dir = \"/a/\"\n[log\nlevel=":                        "/a",
		"archive_dir = \"/a\"\nruntime_dir = '/r'\n[[cluster]]\nx =": "/r",
		"archive_dir = \"/a\nruntime_dir = '/r'\n":                   "/r",
		"broken =\narchive_dir = '/a'\nbroken too = \n":              "/a",
		"archive_dir = \"a\"\n":                                      "",
		"shutdown_timeout = \"5s\"\n":                                "",
	} {
		file := filepath.Join(t.TempDir(), "walfleet.toml")
		write(t, file, content)
		if got := Locate(file); got != want {
			t.Errorf("%q: %q, want %q", content, got, want)
		}
	}
	if got := Locate("/nowhere"); got != "" {
		t.Errorf("no file: %q", got)
	}
}
