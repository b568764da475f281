package console

import (
	"context"
	"fmt"
	"math"
	"math/rand/v2"
	"sync"
	"time"

	"github.com/walfleet/walfleet/fleet"
)

// sample is a source that shows what a test puts there.
type sample struct {
	mu       sync.Mutex
	report   fleet.Report
	reports  int  // how often it was asked for
	failing  bool // panics
	contents func(ctx context.Context, cluster string) (fleet.Contents, error)
}

func (s *sample) Report() fleet.Report {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.reports++
	if s.failing {
		panic("an impossible fleet")
	}
	return s.report
}

func (s *sample) ReportOf(cluster string) (fleet.Report, bool) { return s.Report().Cluster(cluster) }

func (s *sample) Contents(ctx context.Context, cluster string) (fleet.Contents, error) {
	if s.contents == nil {
		return sampleContents(), nil
	}
	return s.contents(ctx, cluster)
}

func (s *sample) Ready() error { return nil }

// fail makes it panic, or not any more.
func (s *sample) fail(on bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.failing = on
}

// taken is how many reports were.
func (s *sample) taken() int {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.reports
}

// change makes what follows of it the state of the fleet. The clusters are a copy: reports that were given away stay.
func (s *sample) change(f func(*fleet.Report)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.report.Clusters = append([]fleet.ClusterReport(nil), s.report.Clusters...)
	f(&s.report)
}

// sampleTime is when the samples are so.
var sampleTime = time.Date(2026, 3, 14, 9, 26, 53, 0, time.UTC)

func pointer[T any](v T) *T { return &v }

// sampleCluster is a cluster that is well.
func sampleCluster(name string, seed uint64, now time.Time) fleet.ClusterReport {
	random := rand.New(rand.NewPCG(seed, 7))
	history := &fleet.HistoryReport{IntervalSeconds: 10}
	base, wave := random.Float64()*8e6, random.Float64()*20+5
	for i := range 90 {
		rate := base * (1 + 0.6*math.Sin(float64(i)/wave)) * (0.6 + random.Float64()*0.8)
		if random.IntN(30) == 0 {
			rate *= 3
		}
		history.BytesPerSecond = append(history.BytesPerSecond, int64(rate))
	}
	at := uint64(0x2A)<<32 | uint64(random.Uint32())
	lsn := func(l uint64) string { return fmt.Sprintf("%X/%X", l>>32, uint32(l)) }
	host := name + "-a.db.example.net:5432"
	return fleet.ClusterReport{
		Name: name, State: "streaming", Since: now.Add(-time.Duration(random.IntN(20*24*3600)) * time.Second), Health: fleet.Healthy,
		Host: host, ServerVersion: "17.5", SystemIdentifier: fmt.Sprint(7300000000000000000 + seed), SegmentSize: 16 << 20,
		Timeline: 1 + uint32(random.IntN(3)), WrittenLSN: lsn(at), SyncedLSN: lsn(at), FlushedLSN: lsn(at), ServerLSN: lsn(at),
		LagBytes: pointer(int64(0)), BehindSeconds: pointer(0.0), LastMessage: now.Add(-time.Duration(random.IntN(3)) * time.Second),
		BytesPerSecond: float64(history.BytesPerSecond[89]), ReceivedBytes: 1 << 40, SegmentsSealed: 65536, Reconnects: 2, Switchovers: 0, StatusUpdates: 90210,
		Failures: map[string]int64{}, Directory: "/var/lib/walfleet/" + name, DiskFreeBytes: pointer(int64(412) << 30), Slot: "walfleet",
		Hosts: []string{host, name + "-b.db.example.net:5432"}, User: "walfleet",
		Settings: map[string]any{"slot": "walfleet", "create_slot": true, "synchronous": true, "status_interval": "10s", "compress": "zstd:3", "min_free": "10GB", "max_rate": "",
			"monitor": true, "monitor_interval": "30s", "on_gap": "halt", "keep_age": "14d", "source": "primary", "application_name": ""},
		Slots: []fleet.SlotReport{{Host: host, Time: now.Add(-12 * time.Second), Exists: true, RetainedBytes: int64(random.IntN(40 << 20)), RestartLSN: lsn(at - 0x10000), Status: "reserved",
			SafeBytes: pointer(int64(8) << 30), ActivePID: 41213, SyncState: "sync"},
			{Host: name + "-b.db.example.net:5432", Time: now.Add(-14 * time.Second)}},
		Warnings: []fleet.WarningReport{},
		Archive: &fleet.ArchiveReport{Time: now.Add(-40 * time.Second), Segments: 20512, Compressed: 20500, Bytes: int64(random.IntN(900)+100) << 30, OriginLSN: "1/A3000000", OriginSource: "slot",
			OriginTime: now.Add(-100 * 24 * time.Hour), Oldest: now.Add(-14 * 24 * time.Hour), Modified: now.Add(-3 * time.Second), DiskFreeBytes: 412 << 30, DiskTotalBytes: 2 << 40,
			LastVerify: &fleet.VerifyReport{Time: now.Add(-7 * time.Hour), Seconds: 512, Whole: true, Segments: 20480, CheckedBytes: 20480 << 24},
			LastDrill:  &fleet.DrillReport{Time: now.Add(-3 * 24 * time.Hour), Seconds: 301, OK: true, Backup: "/backup/" + name, RecoveredLSN: lsn(at - 1<<33), Timeline: 1, LastCommit: now.Add(-3*24*time.Hour - time.Minute)}},
		History: history,
		Events: []fleet.EventReport{
			{Time: now.Add(-5 * time.Hour), Level: "info", Text: "connected host=" + host + " server_version=17.5"},
			{Time: now.Add(-5*time.Hour + 3*time.Second), Level: "info", Text: "streaming timeline=2 lsn=" + lsn(at-1<<30)},
			{Time: now.Add(-2 * time.Hour), Level: "warn", Text: "syncing WAL took long seconds=2.31"},
			{Time: now.Add(-15 * time.Minute), Level: "error", Text: `connection lost error="read tcp 10.0.0.7:41002->10.0.0.12:5432: connection reset by peer"`},
			{Time: now.Add(-15*time.Minute + time.Second), Level: "info", Text: "connected host=" + host},
		},
	}
}

// sampleFleet has a cluster in each kind of trouble among those that are well.
func sampleFleet(now time.Time) fleet.Report {
	r := fleet.Report{Time: now, Daemon: &fleet.DaemonReport{PID: 4711, Version: "0.8.0", Since: now.Add(-30 * 24 * time.Hour), Config: "/etc/walfleet/walfleet.toml"}}
	for i, name := range []string{"accounts", "billing", "catalog", "crm", "eu-orders", "inventory", "ledger", "mail", "search", "sessions", "telemetry", "warehouse"} {
		r.Clusters = append(r.Clusters, sampleCluster(name, uint64(i), now))
	}
	cluster := func(name string) *fleet.ClusterReport {
		for i := range r.Clusters {
			if r.Clusters[i].Name == name {
				return &r.Clusters[i]
			}
		}
		panic("no cluster " + name)
	}
	quiet := func(c *fleet.ClusterReport, from int) {
		c.BytesPerSecond = 0
		for i := from; i < len(c.History.BytesPerSecond); i++ {
			c.History.BytesPerSecond[i] = 0
		}
	}

	halted := cluster("ledger")
	quiet(halted, 40)
	halted.State, halted.Health, halted.Since, halted.Gaps = "halted", fleet.Critical, now.Add(-8*time.Minute-21*time.Second), 1
	halted.Reason = "the server no longer has WAL from 2A/41000000 on, which the archive needs next: requested WAL segment 000000020000002A00000041 has already been removed (58P01)"
	halted.Hint = "bring the missing segments back, or accept the gap with: walfleet accept-gap ledger; take a base backup at once after that"
	halted.LagBytes, halted.BehindSeconds = pointer(int64(3)<<30), pointer(501.4)
	halted.ServerLSN, halted.FlushedLSN, halted.WrittenLSN, halted.SyncedLSN = "2A/F1A00028", "2A/40FFFF60", "2A/41000000", "2A/41000000"
	halted.Slots[0].Status, halted.Slots[0].Invalid, halted.Slots[0].RetainedBytes, halted.Slots[0].SafeBytes = "lost", "wal_removed", 0, nil
	halted.Warnings = []fleet.WarningReport{{Kind: "slot_lost", Host: halted.Host, Since: now.Add(-9 * time.Minute), Text: "the slot walfleet on " + halted.Host + " was invalidated (wal_removed): it retains nothing",
		Hint: "raise max_slot_wal_keep_size, and drop the slot: walfleet creates it again"}}
	halted.Archive.LastVerify = &fleet.VerifyReport{Time: now.Add(-26 * time.Hour), Seconds: 700, Faults: 2, Segments: 20480, CheckedBytes: 20480 << 24}
	halted.Events = append(halted.Events, fleet.EventReport{Time: now.Add(-8 * time.Minute), Level: "error", Text: "halted reason=\"" + halted.Reason + "\""})

	down := cluster("telemetry")
	quiet(down, 70)
	down.State, down.Health, down.Since = "backoff", fleet.Critical, now.Add(-3*time.Minute-12*time.Second)
	down.Reason, down.LastError = "no host of the cluster answers: dial tcp 10.20.0.14:5432: connect: connection refused", "dial tcp 10.20.0.14:5432: connect: connection refused"
	down.LastErrorTime = now.Add(-4 * time.Second)
	down.BehindSeconds, down.LagBytes = pointer(192.3), pointer(int64(1)<<20)
	down.Hint = "see whether the server runs and listens: pg_isready -h telemetry-a.db.example.net"
	down.Slots[0].Note, down.Slots[0].Time = "connection refused", now.Add(-4*time.Minute)

	blocked := cluster("warehouse")
	quiet(blocked, 82)
	blocked.State, blocked.Health, blocked.Since = "blocked", fleet.Critical, now.Add(-74*time.Second)
	blocked.Reason = "9.8 GB are free on the archive's file system, and min_free is 10 GB"
	blocked.Hint = "make room, or lower min_free and reload"
	blocked.DiskFreeBytes, blocked.SecondsToFull = pointer(int64(9)<<30+int64(820)<<20), pointer(0.0)
	blocked.BehindSeconds, blocked.LagBytes = pointer(74.0), pointer(int64(611)<<20)
	blocked.Slots[0].RetainedBytes = 3 << 30
	blocked.CompressBacklog, blocked.CompressBytes = 120, 120<<24

	late := cluster("eu-orders")
	late.State, late.Health, late.Since = "catching_up", fleet.Warning, now.Add(-41*time.Minute)
	late.BehindSeconds, late.LagBytes, late.BytesPerSecond = pointer(2431.0), pointer(int64(48)<<30), 61e6
	late.Slots[0].RetainedBytes, late.Slots[0].Status = 49<<30, "extended"
	late.Warnings = []fleet.WarningReport{{Kind: "slot_retained", Host: late.Host, Since: now.Add(-12 * time.Minute), Text: "the slot retains 49 GB of WAL, more than max_slot_retained of 20 GB", Hint: "see why the archive is behind; the server's disk fills meanwhile"}}
	late.SecondsToFull = pointer(2.7 * 86400)

	fresh := cluster("mail")
	fresh.State, fresh.Health, fresh.Since, fresh.BehindSeconds, fresh.LagBytes = "connecting", fleet.Healthy, now.Add(-2*time.Second), pointer(2.0), pointer(int64(4096))
	fresh.Reason = "connecting to mail-a.db.example.net:5432"
	fresh.PolarDBVersion = "15.13.4.0"

	cluster("catalog").Gaps = 1
	idle := cluster("sessions")
	quiet(idle, 0)
	return r
}

// largeFleet has that many clusters, a few of them in trouble.
func largeFleet(n int, now time.Time) fleet.Report {
	r := fleet.Report{Time: now, Daemon: &fleet.DaemonReport{PID: 4711, Version: "0.8.0", Since: now.Add(-time.Hour), Config: "/etc/walfleet/walfleet.toml"}}
	for i := range n {
		c := sampleCluster(fmt.Sprintf("shard-%03d", i), uint64(i), now)
		if i%97 == 50 {
			c.State, c.Health, c.Reason = "backoff", fleet.Critical, "dial tcp 10.1.2.3:5432: connect: connection refused"
		}
		r.Clusters = append(r.Clusters, c)
	}
	return r
}

// sampleContents has three timelines, a gap, a hole and a divergence, the smallest beside what is huge.
func sampleContents() fleet.Contents {
	return fleet.Contents{
		Time: sampleTime, Cluster: "ledger", Directory: "/var/lib/walfleet/ledger", SystemIdentifier: "7300000000000000006", SegmentSize: 16 << 20,
		OriginLSN: "1/A3000000", OriginSource: "slot", OriginTime: sampleTime.Add(-100 * 24 * time.Hour), Segments: 20512, Bytes: 90 << 30, WALBytes: 320 << 30,
		Timelines: []fleet.TimelineContents{
			{Timeline: 1, Ranges: []fleet.RangeReport{
				{StartLSN: "1/A3000000", EndLSN: "18/41000000", FirstCommit: sampleTime.Add(-99 * 24 * time.Hour), LastCommit: sampleTime.Add(-40 * 24 * time.Hour)},
				{StartLSN: "18/43000000", EndLSN: "22/10000000"}}, Partial: []fleet.PartialReport{{Segment: "000000010000002200000010", Modified: sampleTime.Add(-20 * 24 * time.Hour)}}},
			{Timeline: 2, Parent: 1, ForkLSN: "22/10A3F148", Reason: "no recovery target specified", Ranges: []fleet.RangeReport{
				{StartLSN: "22/10000000", EndLSN: "25/0"}, {StartLSN: "25/1000000", EndLSN: "28/7000000"}}, Partial: []fleet.PartialReport{}},
			{Timeline: 3, Parent: 2, ForkLSN: "28/6D00028", Reason: "no recovery target specified", Ranges: []fleet.RangeReport{{StartLSN: "28/6000000", EndLSN: "2A/41000000"}},
				Partial: []fleet.PartialReport{{Segment: "000000030000002A00000041", Modified: sampleTime}}},
		},
		Holes: []fleet.HoleReport{
			{Kind: "gap", Timeline: 1, From: "18/41000000", To: "18/43000000", Time: sampleTime.Add(-40 * 24 * time.Hour), Reason: "accepted by dba: slot lost during the migration"},
			{Kind: "hole", Timeline: 2, From: "25/0", To: "25/1000000"},
		},
		Recoverable: []fleet.WindowReport{
			{Timeline: 1, FromTimeline: 1, FromLSN: "1/A3000000", ToLSN: "18/41000000", FirstCommit: sampleTime.Add(-99 * 24 * time.Hour), LastCommit: sampleTime.Add(-40 * 24 * time.Hour)},
			{Timeline: 2, FromTimeline: 1, FromLSN: "18/43000000", ToLSN: "25/0", FirstCommit: sampleTime.Add(-40 * 24 * time.Hour), LastCommit: sampleTime.Add(-12 * 24 * time.Hour)},
			{Timeline: 3, FromTimeline: 2, FromLSN: "25/1000000", ToLSN: "2A/41000000", FirstCommit: sampleTime.Add(-12 * 24 * time.Hour), LastCommit: sampleTime.Add(-9 * time.Minute),
				PartialLSN: "2A/4106F3A8", PartialTime: sampleTime.Add(-8 * time.Minute)},
		},
	}
}
