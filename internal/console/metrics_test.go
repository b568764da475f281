package console

import (
	"fmt"
	"maps"
	"net/http"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil/promlint"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/receiver"
)

// knownCluster is one of which everything is known, on two hosts.
func knownCluster(name string) fleet.ClusterReport {
	at := time.Unix(1_700_000_000, 500_000_000)
	p, f := func(n int64) *int64 { return &n }, func(x float64) *float64 { return &x }
	syncs := &fleet.HistogramReport{Count: 9, Sum: 2.5}
	for i, limit := range receiver.SyncLimits() {
		syncs.Buckets = append(syncs.Buckets, fleet.BucketReport{Seconds: limit.Seconds(), Count: int64(i) / 2})
	}
	return fleet.ClusterReport{
		Name: name, State: "streaming", Health: fleet.Warning, Host: "db1:5432", Timeline: 3,
		WrittenLSN: "1/10", FlushedLSN: "1/8", ServerLSN: "FFFFFFFF/FFFFFFFF", LagBytes: p(8), BehindSeconds: f(0.25), LastMessage: at,
		ReceivedBytes: 100, ReceivedAgainBytes: 10, SegmentsSealed: 5, SegmentsCompressed: 4, CompressBacklog: 1, CompressBytes: 16 << 20,
		Reconnects: 2, Switchovers: 1, StatusUpdates: 77, Panics: 0, Gaps: 1, Failures: map[string]int64{"network": 3}, Syncs: syncs,
		DiskFreeBytes: p(1 << 30), SecondsToFull: f(3600),
		Slots: []fleet.SlotReport{
			{Host: "db1:5432", Time: at, Exists: true, RetainedBytes: 4096, Status: "extended", SafeBytes: p(1 << 20)},
			{Host: "db2:5432", Time: at, Exists: true, RetainedBytes: 0, Status: "reserved", SafeBytes: p(1 << 20)},
		},
		Warnings: []fleet.WarningReport{{Kind: "slot_retained"}, {Kind: "slot_retained"}},
		Archive: &fleet.ArchiveReport{Time: at, Segments: 5, Bytes: 80 << 20, Oldest: at, Modified: at, DiskFreeBytes: 1, DiskTotalBytes: 4 << 30,
			Gaps:       []fleet.GapReport{{Time: at}, {Time: at.Add(-time.Hour)}},
			LastVerify: &fleet.VerifyReport{Time: at, Faults: 2}, LastDrill: &fleet.DrillReport{Time: at, OK: true}},
	}
}

// fleetOf is a fleet of clusters with these names.
func fleetOf(names ...string) *fake {
	f := someFleet()
	f.report.Clusters = nil
	for _, name := range names {
		f.report.Clusters = append(f.report.Clusters, knownCluster(name))
	}
	return f
}

// series are the lines of a scrape with a name that begins with prefix: series to value.
func series(t testing.TB, body, prefix string) map[string]string {
	t.Helper()
	found := map[string]string{}
	for line := range strings.Lines(body) {
		if i := strings.LastIndexByte(line, ' '); i > 0 && strings.HasPrefix(line, prefix) {
			found[line[:i]] = strings.TrimSpace(line[i:])
		}
	}
	return found
}

func scrape(t testing.TB, f *fake) string {
	t.Helper()
	response, body := serve(t, f, fleet.HTTPConfig{}, usual).get(t, "/metrics", nil)
	if response.StatusCode != 200 {
		t.Fatalf("%s: %s", response.Status, body)
	}
	return body
}

// Every metric has the value that the report has.
func TestMetrics(t *testing.T) {
	t.Parallel()
	body := scrape(t, fleetOf("a"))
	got := series(t, body, "walfleet_")
	for line := range strings.Lines(`
walfleet_build_info{goversion="*",version="v1"} 1
walfleet_start_timestamp_seconds 8e+08
walfleet_config_last_reload_successful 1
walfleet_config_last_reload_success_timestamp_seconds 9e+08
walfleet_health{cluster="a"} 1
walfleet_state{cluster="a",state="backoff"} 0
walfleet_state{cluster="a",state="blocked"} 0
walfleet_state{cluster="a",state="catching_up"} 0
walfleet_state{cluster="a",state="connecting"} 0
walfleet_state{cluster="a",state="halted"} 0
walfleet_state{cluster="a",state="stopped"} 0
walfleet_state{cluster="a",state="streaming"} 1
walfleet_connected{cluster="a"} 1
walfleet_written_lsn_bytes{cluster="a"} 4.294967312e+09
walfleet_flushed_lsn_bytes{cluster="a"} 4.294967304e+09
walfleet_server_lsn_bytes{cluster="a"} 1.8446744073709552e+19
walfleet_lag_bytes{cluster="a"} 8
walfleet_lag_seconds{cluster="a"} 0.25
walfleet_last_message_timestamp_seconds{cluster="a"} 1.7000000005e+09
walfleet_timeline{cluster="a"} 3
walfleet_received_bytes_total{cluster="a"} 100
walfleet_received_again_bytes_total{cluster="a"} 10
walfleet_segments_sealed_total{cluster="a"} 5
walfleet_segments_compressed_total{cluster="a"} 4
walfleet_status_updates_total{cluster="a"} 77
walfleet_reconnects_total{cluster="a"} 2
walfleet_switchovers_total{cluster="a"} 1
walfleet_failures_total{class="archive",cluster="a"} 0
walfleet_failures_total{class="authentication",cluster="a"} 0
walfleet_failures_total{class="disk",cluster="a"} 0
walfleet_failures_total{class="internal",cluster="a"} 0
walfleet_failures_total{class="limit",cluster="a"} 0
walfleet_failures_total{class="network",cluster="a"} 3
walfleet_failures_total{class="server",cluster="a"} 0
walfleet_failures_total{class="slot",cluster="a"} 0
walfleet_failures_total{class="tls",cluster="a"} 0
walfleet_panics_total{cluster="a"} 0
walfleet_slot_retained_bytes{cluster="a",host="db1:5432"} 4096
walfleet_slot_retained_bytes{cluster="a",host="db2:5432"} 0
walfleet_slot_safe_wal_bytes{cluster="a",host="db1:5432"} 1.048576e+06
walfleet_slot_safe_wal_bytes{cluster="a",host="db2:5432"} 1.048576e+06
walfleet_slot_wal_status{cluster="a",host="db1:5432",wal_status="extended"} 1
walfleet_slot_wal_status{cluster="a",host="db1:5432",wal_status="lost"} 0
walfleet_slot_wal_status{cluster="a",host="db1:5432",wal_status="reserved"} 0
walfleet_slot_wal_status{cluster="a",host="db1:5432",wal_status="unreserved"} 0
walfleet_slot_wal_status{cluster="a",host="db2:5432",wal_status="extended"} 0
walfleet_slot_wal_status{cluster="a",host="db2:5432",wal_status="lost"} 0
walfleet_slot_wal_status{cluster="a",host="db2:5432",wal_status="reserved"} 1
walfleet_slot_wal_status{cluster="a",host="db2:5432",wal_status="unreserved"} 0
walfleet_warnings{cluster="a",kind="retention"} 0
walfleet_warnings{cluster="a",kind="slot_lost"} 0
walfleet_warnings{cluster="a",kind="slot_retained"} 2
walfleet_warnings{cluster="a",kind="slot_unreserved"} 0
walfleet_archive_bytes{cluster="a"} 8.388608e+07
walfleet_archive_segments{cluster="a"} 5
walfleet_archive_oldest_timestamp_seconds{cluster="a"} 1.7000000005e+09
walfleet_archive_newest_timestamp_seconds{cluster="a"} 1.7000000005e+09
walfleet_archive_gaps{cluster="a"} 1
walfleet_last_gap_timestamp_seconds{cluster="a"} 1.7000000005e+09
walfleet_disk_free_bytes{cluster="a"} 1.073741824e+09
walfleet_disk_total_bytes{cluster="a"} 4.294967296e+09
walfleet_disk_time_to_full_seconds{cluster="a"} 3600
walfleet_compression_backlog_segments{cluster="a"} 1
walfleet_compression_backlog_bytes{cluster="a"} 1.6777216e+07
walfleet_last_verify_timestamp_seconds{cluster="a"} 1.7000000005e+09
walfleet_last_verify_faults{cluster="a"} 2
walfleet_last_verify_successful{cluster="a"} 0
walfleet_last_drill_timestamp_seconds{cluster="a"} 1.7000000005e+09
walfleet_last_drill_successful{cluster="a"} 1
walfleet_fsync_duration_seconds_count{cluster="a"} 9
walfleet_fsync_duration_seconds_sum{cluster="a"} 2.5
walfleet_fsync_duration_seconds_bucket{cluster="a",le="+Inf"} 9
`) {
		name, want, ok := strings.Cut(strings.TrimSpace(line), " ")
		if !ok {
			continue
		}
		if before, after, any := strings.Cut(name, "*"); any {
			for n := range got {
				if strings.HasPrefix(n, before) && strings.HasSuffix(n, after) {
					name = n
				}
			}
		}
		if got[name] != want {
			t.Errorf("%s is %q, want %s", name, got[name], want)
		}
		delete(got, name)
	}
	limits := receiver.SyncLimits()
	for i, limit := range limits {
		name := fmt.Sprintf(`walfleet_fsync_duration_seconds_bucket{cluster="a",le="%v"}`, limit.Seconds())
		if want := fmt.Sprint(i / 2); got[name] != want {
			t.Errorf("%s is %q, want %s", name, got[name], want)
		}
		delete(got, name)
	}
	for name := range got {
		t.Errorf("%s is there, and not in this test", name)
	}
	for _, own := range []string{"go_goroutines ", "process_start_time_seconds ", "process_open_fds "} {
		if !strings.Contains(body, "\n"+own) {
			t.Errorf("%sis missing", own)
		}
	}
}

// What is not known is absent, never 0.
func TestMetricsOfTheUnknown(t *testing.T) {
	t.Parallel()
	f := someFleet()
	f.report.Daemon.LastReload = &fleet.Outcome{Time: time.Unix(1e9, 0), Error: "no"}
	f.report.Clusters = []fleet.ClusterReport{{Name: "a", State: "connecting", Health: fleet.Healthy, Archive: &fleet.ArchiveReport{Error: "there is no directory yet"},
		Slots: []fleet.SlotReport{{Host: "never"}, {Host: "none", Time: time.Unix(1, 0)}, {Host: "odd", Time: time.Unix(1, 0), Exists: true, Status: "new"}, {Host: "odd", Time: time.Unix(1, 0), Exists: true}}}}
	got := series(t, scrape(t, f), "walfleet_")
	names := map[string]int{}
	for name := range got {
		name, _, _ := strings.Cut(name, "{")
		names[name]++
	}
	want := map[string]int{
		"walfleet_build_info": 1, "walfleet_start_timestamp_seconds": 1, "walfleet_config_last_reload_successful": 1, "walfleet_config_last_reload_success_timestamp_seconds": 1,
		"walfleet_health": 1, "walfleet_state": 7, "walfleet_connected": 1, "walfleet_received_bytes_total": 1, "walfleet_received_again_bytes_total": 1,
		"walfleet_segments_sealed_total": 1, "walfleet_segments_compressed_total": 1, "walfleet_status_updates_total": 1, "walfleet_reconnects_total": 1,
		"walfleet_switchovers_total": 1, "walfleet_failures_total": 9, "walfleet_panics_total": 1, "walfleet_slot_retained_bytes": 1, "walfleet_warnings": 4,
		"walfleet_compression_backlog_segments": 1, "walfleet_compression_backlog_bytes": 1,
	}
	if !maps.Equal(names, want) {
		t.Errorf("got  %v\nwant %v", names, want)
	}
	if got["walfleet_config_last_reload_successful"] != "0" {
		t.Error("a reload that failed counts as successful")
	}
}

// Names, types and help texts are as Prometheus wants them.
func TestMetricsLint(t *testing.T) {
	t.Parallel()
	problems, err := promlint.New(strings.NewReader(scrape(t, fleetOf("a")))).Lint()
	if err != nil || len(problems) != 0 {
		t.Errorf("%v, %v", problems, err)
	}
}

// A cluster costs as many series in a large fleet as in a small one, and none once it is
// gone; counters that a name has are not another's.
func TestMetricsAreBoundedByTheClusters(t *testing.T) {
	t.Parallel()
	count := func(body, cluster string) (n int) {
		for name := range series(t, body, "walfleet_") {
			if strings.Contains(name, `cluster="`+cluster+`"`) {
				n++
			}
		}
		return n
	}
	f := fleetOf("a", "b", "c")
	s := serve(t, f, fleet.HTTPConfig{}, usual)
	_, three := s.get(t, "/metrics", nil)
	f.mu.Lock()
	f.report.Clusters = f.report.Clusters[:1]
	f.mu.Unlock()
	_, one := s.get(t, "/metrics", nil)
	if n := count(three, "a"); n == 0 || n != count(three, "b") || n != count(three, "c") || n != count(one, "a") {
		t.Errorf("a has %d series, b %d, c %d, and a %d alone", n, count(three, "b"), count(three, "c"), count(one, "a"))
	}
	t.Logf("%d series for a cluster with two hosts", count(one, "a"))
	if strings.Contains(one, `"b"`) || strings.Contains(one, `"c"`) {
		t.Error("clusters that are gone have series")
	}
	if got, want := len(series(t, three, "walfleet_")), 3*count(three, "a")+len(fleetMetrics); got != want {
		t.Errorf("%d series, want %d", got, want)
	}
}

// Whatever a label is made of, the scrape is whole.
func TestMetricsWithBadText(t *testing.T) {
	t.Parallel()
	f := fleetOf("a\xff\n\"b")
	f.report.Clusters[0].Slots[0].Host = "h\xc0\x80\n\"} 7\nwalfleet_health 3"
	body := scrape(t, f)
	if strings.Contains(body, "\nwalfleet_health 3") || !strings.Contains(body, `walfleet_health{cluster="a`+"\ufffd"+`\n\"b"} 1`) {
		t.Errorf("%s", body)
	}
}

// documentation is the table of docs/metrics.md.
func documentation() string {
	var rows []string
	row := func(name, kind, help string, labels []string) {
		quoted := []string{}
		for _, l := range labels {
			quoted = append(quoted, "`"+l+"`")
		}
		rows = append(rows, fmt.Sprintf("| `%s` | %s | %s | %s |\n", name, kind, strings.Join(quoted, ", "), help))
	}
	kinds := map[prometheus.ValueType]string{counter: "counter", gauge: "gauge"}
	for _, m := range fleetMetrics {
		row(m.name, kinds[m.kind], m.help, m.labels)
	}
	for _, m := range clusterMetrics {
		row(m.name, kinds[m.kind], m.help, m.labels)
	}
	row(syncSeconds.name, "histogram", syncSeconds.help, syncSeconds.labels)
	return strings.Join(rows, "")
}

// docs/metrics.md has every metric, and no other, as Prometheus is told about it.
func TestMetricsAreDocumented(t *testing.T) {
	doc, err := os.ReadFile("../../docs/metrics.md")
	if err != nil {
		t.Fatal(err)
	}
	if _, table, _ := strings.Cut(string(doc), "|---|---|---|---|\n"); table != documentation() {
		t.Errorf("the table at the end of docs/metrics.md has to be:\n%s", documentation())
	}
	descs := make(chan *prometheus.Desc, 1000)
	(&collector{}).Describe(descs)
	close(descs)
	described := 0
	for d := range descs {
		described++
		if !slices.ContainsFunc(strings.Split(documentation(), "\n"), func(row string) bool {
			cells := strings.Split(row, " | ")
			return len(cells) == 4 && strings.Contains(d.String(), fmt.Sprintf("fqName: %q, help: %q", strings.Trim(cells[0], "|` "), strings.TrimSuffix(cells[3], " |")))
		}) {
			t.Errorf("not documented: %s", d)
		}
	}
	if rows := strings.Count(documentation(), "\n"); rows != described {
		t.Errorf("%d metrics are described, %d documented", described, rows)
	}
}

func BenchmarkScrape500(b *testing.B) {
	var names []string
	for i := range 500 {
		names = append(names, fmt.Sprintf("cluster-%03d", i))
	}
	s := serve(b, fleetOf(names...), fleet.HTTPConfig{}, usual)
	for _, encoding := range []string{"identity", "gzip"} {
		b.Run(encoding, func(b *testing.B) {
			size := 0
			for b.Loop() {
				response, body := s.get(b, "/metrics", func(r *http.Request) { r.Header.Set("Accept-Encoding", encoding) })
				if size = len(body); response.StatusCode != 200 {
					b.Fatal(response.Status)
				}
			}
			b.ReportMetric(float64(size), "bytes/scrape")
		})
	}
}
