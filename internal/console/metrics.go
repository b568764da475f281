package console

import (
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime"
	"runtime/debug"
	"slices"
	"strings"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/collectors"
	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// metricsHandler answers Prometheus, with a registry of its own.
func metricsHandler(s source, log *slog.Logger, l limits) http.Handler {
	registry := prometheus.NewRegistry()
	registry.MustRegister(&collector{s, log}, collectors.NewGoCollector(), collectors.NewProcessCollector(collectors.ProcessCollectorOpts{}))
	return promhttp.HandlerFor(registry, promhttp.HandlerOpts{
		ErrorLog:            slog.NewLogLogger(log.Handler(), slog.LevelDebug), // of clients that hang up, too
		ErrorHandling:       promhttp.HTTPErrorOnError,                         // loud: with half of the clusters alerts would be quiet
		MaxRequestsInFlight: l.scrapes,
		Timeout:             l.write,
	})
}

// collector makes metrics of one report for each scrape. So there is nothing to forget
// about a cluster that is gone, and a counter begins anew with the receiver that counts.
type collector struct {
	source source
	log    *slog.Logger
}

// Describe is for prometheus.Collector.
func (c *collector) Describe(descs chan<- *prometheus.Desc) {
	for _, m := range fleetMetrics {
		descs <- m.desc
	}
	for _, m := range clusterMetrics {
		descs <- m.desc
	}
	descs <- syncSeconds.desc
}

// Collect is for prometheus.Collector, which answers with a panic's stack: this says less.
func (c *collector) Collect(metrics chan<- prometheus.Metric) {
	defer func() {
		if reason := recover(); reason != nil {
			c.log.Error("no metrics", "panic", fmt.Sprint(reason), "stack", string(debug.Stack()))
			metrics <- prometheus.NewInvalidMetric(fleetMetrics[0].desc, errors.New("this is a fault of walfleet; its log says more"))
		}
	}()
	r := c.source.Report()
	for _, m := range fleetMetrics {
		m.of(&r, func(value float64, labels ...string) {
			metrics <- prometheus.MustNewConstMetric(m.desc, m.kind, value, valid(labels)...)
		})
	}
	for i := range r.Clusters {
		one := &r.Clusters[i]
		for _, m := range clusterMetrics {
			m.of(one, func(value float64, labels ...string) {
				metrics <- prometheus.MustNewConstMetric(m.desc, m.kind, value, valid(append([]string{one.Name}, labels...))...)
			})
		}
		if h := one.Syncs; h != nil {
			buckets := make(map[float64]uint64, len(h.Buckets))
			for _, b := range h.Buckets {
				buckets[b.Seconds] = uint64(b.Count)
			}
			metrics <- prometheus.MustNewConstHistogram(syncSeconds.desc, uint64(h.Count), h.Sum, buckets, valid([]string{one.Name})...)
		}
	}
}

// valid makes labels of what a server or the file may have said.
func valid(labels []string) []string {
	for i, l := range labels {
		labels[i] = strings.ToValidUTF8(l, "\ufffd")
	}
	return labels
}

const (
	counter = prometheus.CounterValue
	gauge   = prometheus.GaugeValue
)

// emit adds a series of a metric. What is not known is not added.
type emit = func(value float64, labels ...string)

// metric is one of the fleet or of each cluster, and how a report becomes its series.
type metric[T any] struct {
	name   string
	help   string
	labels []string
	desc   *prometheus.Desc
	kind   prometheus.ValueType
	of     func(T, emit)
}

func define[T any](name string, kind prometheus.ValueType, help string, of func(T, emit), labels ...string) metric[T] {
	return metric[T]{name, help, labels, prometheus.NewDesc(name, help, labels, nil), kind, of}
}

func ofFleet(name string, kind prometheus.ValueType, help string, of func(*fleet.Report, emit), labels ...string) metric[*fleet.Report] {
	return define(name, kind, help, of, labels...)
}

func ofCluster(name string, kind prometheus.ValueType, help string, of func(*fleet.ClusterReport, emit), labels ...string) metric[*fleet.ClusterReport] {
	return define(name, kind, help, of, append([]string{"cluster"}, labels...)...)
}

// number is a metric whose value is always known.
func number[T int | int64](of func(*fleet.ClusterReport) T) func(*fleet.ClusterReport, emit) {
	return func(c *fleet.ClusterReport, emit emit) { emit(float64(of(c))) }
}

// optional is a metric whose value is not always known.
func optional[T int64 | float64](of func(*fleet.ClusterReport) *T) func(*fleet.ClusterReport, emit) {
	return func(c *fleet.ClusterReport, emit emit) {
		if v := of(c); v != nil {
			emit(float64(*v))
		}
	}
}

// position is a place in the WAL. A float64 is exact up to 2^53, 8 PB of WAL.
func position(of func(*fleet.ClusterReport) string) func(*fleet.ClusterReport, emit) {
	return func(c *fleet.ClusterReport, emit emit) {
		if lsn, err := wal.ParseLSN(of(c)); err == nil {
			emit(float64(lsn))
		}
	}
}

// ofArchive is a metric of what the directory said, where it did.
func ofArchive(of func(*fleet.ArchiveReport, emit)) func(*fleet.ClusterReport, emit) {
	return func(c *fleet.ClusterReport, emit emit) {
		if c.Archive != nil && c.Archive.Error == "" {
			of(c.Archive, emit)
		}
	}
}

func ofVerify(of func(*fleet.VerifyReport, emit)) func(*fleet.ClusterReport, emit) {
	return func(c *fleet.ClusterReport, emit emit) {
		if c.Archive != nil && c.Archive.LastVerify != nil {
			of(c.Archive.LastVerify, emit)
		}
	}
}

func ofDrill(of func(*fleet.DrillReport, emit)) func(*fleet.ClusterReport, emit) {
	return func(c *fleet.ClusterReport, emit emit) {
		if c.Archive != nil && c.Archive.LastDrill != nil {
			of(c.Archive.LastDrill, emit)
		}
	}
}

// ofSlots is a metric of the slot on each host where it was seen.
func ofSlots(of func(fleet.SlotReport, emit)) func(*fleet.ClusterReport, emit) {
	return func(c *fleet.ClusterReport, emit emit) {
		for i, s := range c.Slots {
			again := slices.ContainsFunc(c.Slots[:i], func(other fleet.SlotReport) bool { return other.Host == s.Host })
			if s.Exists && !s.Time.IsZero() && !again {
				of(s, emit)
			}
		}
	}
}

func when(t time.Time, emit emit) {
	if !t.IsZero() {
		emit(float64(t.UnixMilli()) / 1000)
	}
}

func list[T ~string](words []T) string {
	return strings.Trim(strings.ReplaceAll(fmt.Sprint(words), " ", ", "), "[]")
}

func truth(b bool) float64 {
	if b {
		return 1
	}
	return 0
}

var (
	states       = []receiver.State{receiver.Connecting, receiver.CatchingUp, receiver.Streaming, receiver.Backoff, receiver.Blocked, receiver.Halted, receiver.Stopped}
	healths      = []fleet.Health{fleet.Healthy, fleet.Warning, fleet.Critical}
	walStatuses  = []string{"reserved", "extended", "unreserved", "lost"}
	warningKinds = []string{receiver.WarnSlotLost, receiver.WarnSlotRetained, receiver.WarnSlotUnreserved, receiver.WarnRetention}
)

var fleetMetrics = []metric[*fleet.Report]{
	ofFleet("walfleet_build_info", gauge, "The version of walfleet and of the Go that it was built with; always 1.",
		func(r *fleet.Report, emit emit) { emit(1, r.Daemon.Version, runtime.Version()) }, "version", "goversion"),
	ofFleet("walfleet_start_timestamp_seconds", gauge, "When the daemon was started, in seconds since 1970.",
		func(r *fleet.Report, emit emit) { when(r.Daemon.Since, emit) }),
	ofFleet("walfleet_config_last_reload_successful", gauge, "1 while the fleet runs as the configuration file was when it was read last; 0 after a reload that was refused or incomplete.",
		func(r *fleet.Report, emit emit) {
			emit(truth(r.Daemon.LastReload == nil || r.Daemon.LastReload.Error == ""))
		}),
	ofFleet("walfleet_config_last_reload_success_timestamp_seconds", gauge, "When the configuration file was last applied as a whole, at the start or by a reload, in seconds since 1970.",
		func(r *fleet.Report, emit emit) { when(r.Daemon.Applied, emit) }),
}

var clusterMetrics = []metric[*fleet.ClusterReport]{
	ofCluster("walfleet_health", gauge, "Whether the cluster wants a person: 0 ok, 1 warning (not all WAL is archived, or that is in danger; it may pass), 2 critical (WAL is not archived, and that does not pass by itself or has not for a while).",
		number(func(c *fleet.ClusterReport) int { return slices.Index(healths, c.Health) })),
	ofCluster("walfleet_state", gauge, "1 for the state that the cluster is in, 0 for the others: "+list(states)+".",
		func(c *fleet.ClusterReport, emit emit) {
			for _, s := range states {
				emit(truth(c.State == string(s)), string(s))
			}
		}, "state"),
	ofCluster("walfleet_connected", gauge, "1 while WAL comes over a connection, in the states catching_up and streaming; else 0.",
		func(c *fleet.ClusterReport, emit emit) {
			emit(truth(c.State == string(receiver.CatchingUp) || c.State == string(receiver.Streaming)))
		}),

	ofCluster("walfleet_written_lsn_bytes", gauge, "End of the WAL in the archive's files, as a number of bytes since the cluster's WAL began.",
		position(func(c *fleet.ClusterReport) string { return c.WrittenLSN })),
	ofCluster("walfleet_flushed_lsn_bytes", gauge, "End of the complete records that are synced to the archive's disk, which the server is told, in bytes since the cluster's WAL began.",
		position(func(c *fleet.ClusterReport) string { return c.FlushedLSN })),
	ofCluster("walfleet_server_lsn_bytes", gauge, "End of the server's WAL when it spoke last, in bytes since the cluster's WAL began.",
		position(func(c *fleet.ClusterReport) string { return c.ServerLSN })),
	ofCluster("walfleet_lag_bytes", gauge, "WAL that the server was known to have and the archive had not synced, in bytes.",
		optional(func(c *fleet.ClusterReport) *int64 { return c.LagBytes })),
	ofCluster("walfleet_lag_seconds", gauge, "How old the WAL can be that the archive lacks, in seconds; 0 while it is caught up, absent until it has been once since the start.",
		optional(func(c *fleet.ClusterReport) *float64 { return c.BehindSeconds })),
	ofCluster("walfleet_last_message_timestamp_seconds", gauge, "When the server spoke last, in seconds since 1970.",
		func(c *fleet.ClusterReport, emit emit) { when(c.LastMessage, emit) }),
	ofCluster("walfleet_timeline", gauge, "The timeline that is archived.",
		func(c *fleet.ClusterReport, emit emit) {
			if c.Timeline != 0 {
				emit(float64(c.Timeline))
			}
		}),

	ofCluster("walfleet_received_bytes_total", counter, "WAL that was received, with what was received again, in bytes.",
		number(func(c *fleet.ClusterReport) int64 { return c.ReceivedBytes })),
	ofCluster("walfleet_received_again_bytes_total", counter, "WAL that was received though the archive had it, in bytes; it was compared.",
		number(func(c *fleet.ClusterReport) int64 { return c.ReceivedAgainBytes })),
	ofCluster("walfleet_segments_sealed_total", counter, "Segments that were completed.",
		number(func(c *fleet.ClusterReport) int64 { return c.SegmentsSealed })),
	ofCluster("walfleet_segments_compressed_total", counter, "Segments that were compressed.",
		number(func(c *fleet.ClusterReport) int64 { return c.SegmentsCompressed })),
	ofCluster("walfleet_status_updates_total", counter, "Reports of progress that were sent to the server.",
		number(func(c *fleet.ClusterReport) int64 { return c.StatusUpdates })),
	ofCluster("walfleet_reconnects_total", counter, "Connections that were made after the first one.",
		number(func(c *fleet.ClusterReport) int64 { return c.Reconnects })),
	ofCluster("walfleet_switchovers_total", counter, "Changes of the host or the timeline that is archived.",
		number(func(c *fleet.ClusterReport) int64 { return c.Switchovers })),
	ofCluster("walfleet_failures_total", counter, "Attempts and connections that failed, by the part that a person would look at: "+list(receiver.FailureClasses)+".",
		func(c *fleet.ClusterReport, emit emit) {
			for _, class := range receiver.FailureClasses {
				emit(float64(c.Failures[class]), class)
			}
		}, "class"),
	ofCluster("walfleet_panics_total", counter, "Faults of walfleet in archiving this cluster, after each of which it began anew.",
		number(func(c *fleet.ClusterReport) int64 { return c.Panics })),

	ofCluster("walfleet_slot_retained_bytes", gauge, "WAL that the host keeps for the slot, in bytes.",
		ofSlots(func(s fleet.SlotReport, emit emit) { emit(float64(s.RetainedBytes), s.Host) }), "host"),
	ofCluster("walfleet_slot_safe_wal_bytes", gauge, "WAL that the host may write before the slot can be lost, in bytes; absent where that is not limited.",
		ofSlots(func(s fleet.SlotReport, emit emit) {
			if s.SafeBytes != nil {
				emit(float64(*s.SafeBytes), s.Host)
			}
		}), "host"),
	ofCluster("walfleet_slot_wal_status", gauge, "1 for the slot's wal_status on the host, 0 for the others: "+list(walStatuses)+".",
		ofSlots(func(s fleet.SlotReport, emit emit) {
			if slices.Contains(walStatuses, s.Status) {
				for _, status := range walStatuses {
					emit(truth(s.Status == status), s.Host, status)
				}
			}
		}), "host", "wal_status"),
	ofCluster("walfleet_warnings", gauge, "Dangers that do not end the archiving, by kind: "+list(warningKinds)+".",
		func(c *fleet.ClusterReport, emit emit) {
			n := map[string]int{}
			for _, w := range c.Warnings {
				n[w.Kind]++
			}
			for _, kind := range warningKinds {
				emit(float64(n[kind]), kind)
			}
		}, "kind"),

	ofCluster("walfleet_archive_bytes", gauge, "Size of the files of complete segments in the archive, as they are stored, in bytes.",
		ofArchive(func(a *fleet.ArchiveReport, emit emit) { emit(float64(a.Bytes)) })),
	ofCluster("walfleet_archive_segments", gauge, "Complete segments in the archive.",
		ofArchive(func(a *fleet.ArchiveReport, emit emit) { emit(float64(a.Segments)) })),
	ofCluster("walfleet_archive_oldest_timestamp_seconds", gauge, "When the first complete segment in the archive was written to last, in seconds since 1970.",
		ofArchive(func(a *fleet.ArchiveReport, emit emit) { when(a.Oldest, emit) })),
	ofCluster("walfleet_archive_newest_timestamp_seconds", gauge, "When a segment in the archive was written to last, in seconds since 1970.",
		ofArchive(func(a *fleet.ArchiveReport, emit emit) { when(a.Modified, emit) })),
	ofCluster("walfleet_archive_gaps", gauge, "Gaps on record in the archive; no recovery passes one.",
		func(c *fleet.ClusterReport, emit emit) {
			if c.Gaps > 0 || c.Archive != nil && c.Archive.Error == "" { // else 0 is only what nobody has looked for
				emit(float64(c.Gaps))
			}
		}),
	ofCluster("walfleet_last_gap_timestamp_seconds", gauge, "When the newest gap on record in the archive was written down, in seconds since 1970.",
		ofArchive(func(a *fleet.ArchiveReport, emit emit) {
			var last time.Time
			for _, g := range a.Gaps {
				if g.Time.After(last) {
					last = g.Time
				}
			}
			when(last, emit)
		})),
	ofCluster("walfleet_disk_free_bytes", gauge, "What is free of the archive's file system, in bytes.",
		optional(func(c *fleet.ClusterReport) *int64 { return c.DiskFreeBytes })),
	ofCluster("walfleet_disk_total_bytes", gauge, "Size of the archive's file system, in bytes.",
		ofArchive(func(a *fleet.ArchiveReport, emit emit) {
			if a.DiskTotalBytes > 0 {
				emit(float64(a.DiskTotalBytes))
			}
		})),
	ofCluster("walfleet_disk_time_to_full_seconds", gauge, "When the archive's file system has no more than min_free left, if it fills as in the last quarter of an hour, in seconds from now; absent while it does not fill.",
		optional(func(c *fleet.ClusterReport) *float64 { return c.SecondsToFull })),
	ofCluster("walfleet_compression_backlog_segments", gauge, "Complete segments that wait to be compressed.",
		number(func(c *fleet.ClusterReport) int64 { return c.CompressBacklog })),
	ofCluster("walfleet_compression_backlog_bytes", gauge, "WAL in complete segments that wait to be compressed, in bytes.",
		number(func(c *fleet.ClusterReport) int64 { return c.CompressBytes })),

	ofCluster("walfleet_last_verify_timestamp_seconds", gauge, "When \"walfleet verify\" last ended for the archive, in seconds since 1970.",
		ofVerify(func(v *fleet.VerifyReport, emit emit) { when(v.Time, emit) })),
	ofCluster("walfleet_last_verify_faults", gauge, "Faults that \"walfleet verify\" last found in the archive.",
		ofVerify(func(v *fleet.VerifyReport, emit emit) { emit(float64(v.Faults)) })),
	ofCluster("walfleet_last_verify_successful", gauge, "1 when \"walfleet verify\" last checked everything that was to be, without a fault; else 0.",
		ofVerify(func(v *fleet.VerifyReport, emit emit) { emit(truth(v.Whole)) })),
	ofCluster("walfleet_last_drill_timestamp_seconds", gauge, "When \"walfleet drill\" last ended for the archive, in seconds since 1970.",
		ofDrill(func(d *fleet.DrillReport, emit emit) { when(d.Time, emit) })),
	ofCluster("walfleet_last_drill_successful", gauge, "1 when \"walfleet drill\" last recovered the cluster from the archive; else 0.",
		ofDrill(func(d *fleet.DrillReport, emit emit) { emit(truth(d.OK)) })),
}

// syncSeconds is the one histogram.
var syncSeconds = define[any]("walfleet_fsync_duration_seconds", prometheus.UntypedValue, "How long it took to sync received WAL to the archive's disk, in seconds.", nil, "cluster")
