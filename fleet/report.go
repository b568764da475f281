package fleet

import (
	"cmp"
	"context"
	"errors"
	"io/fs"
	"math"
	"slices"
	"strconv"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// Report is the state of a fleet at a time: what "walfleet status" shows, and prints
// as JSON. Names in the JSON stay; new ones may come. What is not known is left out.
// Positions are in PostgreSQL's form, and system identifiers are text, since a JSON
// number would lose digits.
type Report struct {
	Time     time.Time       `json:"time"`
	Daemon   *DaemonReport   `json:"daemon"`          // null: no daemon answered, and only archives tell
	Error    string          `json:"error,omitempty"` // why no daemon answered
	Clusters []ClusterReport `json:"clusters"`        // in the file's order
}

// DaemonReport is what a daemon says about itself.
type DaemonReport struct {
	PID        int       `json:"pid"`
	Version    string    `json:"version"`
	Since      time.Time `json:"since"`
	Config     string    `json:"config"`      // the file's path
	Applied    time.Time `json:"applied"`     // when all of it was applied last, by the start or a reload
	LastReload *Outcome  `json:"last_reload"` // null: there was none
}

// ClusterReport is the state of one cluster.
type ClusterReport struct {
	Name     string    `json:"name"`
	State    string    `json:"state"`             // a receiver's; "unknown": no daemon answered
	Since    time.Time `json:"since,omitzero"`    // of the state; in an outage, whose states take turns, since when nothing is archived
	Reason   string    `json:"reason,omitempty"`  // of the state, in words
	Hint     string    `json:"hint,omitempty"`    // what a person can do about it
	Stopping time.Time `json:"stopping,omitzero"` // when a reload told it to stop, and it has not yet
	Health   Health    `json:"health"`            // of the state and all else: whether a person is wanted

	Host             string `json:"host,omitempty"` // "host:port" that was connected last
	ServerVersion    string `json:"server_version,omitempty"`
	PolarDBVersion   string `json:"polardb_version,omitempty"`
	SystemIdentifier string `json:"system_identifier,omitempty"`
	SegmentSize      int64  `json:"segment_size,omitempty"` // bytes

	Timeline   uint32 `json:"timeline,omitempty"`
	WrittenLSN string `json:"written_lsn,omitempty"` // exclusive end of what is in the archive's files
	SyncedLSN  string `json:"synced_lsn,omitempty"`  // exclusive end of what of it is synced
	FlushedLSN string `json:"flushed_lsn,omitempty"` // exclusive end of complete records that are synced: what the server is told
	ServerLSN  string `json:"server_lsn,omitempty"`  // exclusive end of the server's WAL, as last told

	LagBytes      *int64    `json:"lag_bytes,omitempty"`      // from flushed_lsn to server_lsn
	BehindSeconds *float64  `json:"behind_seconds,omitempty"` // how old the WAL can be that is missing; absent: not known since the start
	LastMessage   time.Time `json:"last_message,omitzero"`

	BytesPerSecond     float64 `json:"bytes_per_second"` // received lately
	ReceivedBytes      int64   `json:"received_bytes"`   // since the start, with what was received again
	ReceivedAgainBytes int64   `json:"received_again_bytes"`
	SegmentsSealed     int64   `json:"segments_sealed"`
	SegmentsCompressed int64   `json:"segments_compressed"`
	CompressBacklog    int64   `json:"compress_backlog"`       // segments
	CompressBytes      int64   `json:"compress_backlog_bytes"` // the same in bytes
	Reconnects         int64   `json:"reconnects"`
	Switchovers        int64   `json:"switchovers"`    // changes of the host or the timeline since the start
	StatusUpdates      int64   `json:"status_updates"` // that were sent since the start
	Panics             int64   `json:"panics"`
	Gaps               int64   `json:"gaps"` // on record in the archive

	Failures map[string]int64 `json:"failures"`               // of attempts and connections since the start, by class; see receiver.FailureClasses
	Syncs    *HistogramReport `json:"sync_seconds,omitempty"` // how long it took to sync WAL, since the start

	LastError     string    `json:"last_error,omitempty"` // what ended a session last, whatever came after
	LastErrorTime time.Time `json:"last_error_time,omitzero"`

	Directory     string `json:"directory"`
	DiskFreeBytes *int64 `json:"disk_free_bytes,omitempty"`
	// SecondsToFull is when the archive's file system is full, if it fills as it did in the History; absent: it does
	// not fill, or is not known to.
	SecondsToFull *float64 `json:"seconds_to_full,omitempty"`

	Slot     string         `json:"slot"`
	Hosts    []string       `json:"hosts"`          // of the conninfo
	User     string         `json:"user,omitempty"` // of the conninfo
	Settings map[string]any `json:"settings"`       // the file's keys and values, but for conninfo

	Slots    []SlotReport    `json:"slots"`    // on each host, as the monitor saw them last
	Warnings []WarningReport `json:"warnings"` // dangers that do not end the archiving

	Archive *ArchiveReport `json:"archive,omitempty"` // where the directory was looked into; a daemon does so now and then
	History *HistoryReport `json:"history,omitempty"` // of a daemon
	Events  []EventReport  `json:"events,omitempty"`  // of a daemon that was asked about this cluster: its last lines of the log, oldest first
}

// HistogramReport is how often something took how long.
type HistogramReport struct {
	Count   int64          `json:"count"`
	Sum     float64        `json:"sum"`     // seconds
	Buckets []BucketReport `json:"buckets"` // ascending; what took longer than the last is in Count alone
}

// BucketReport is how often it took at most so long.
type BucketReport struct {
	Seconds float64 `json:"le"` // inclusive
	Count   int64   `json:"count"`
}

// HistoryReport is what a cluster did in the last quarter of an hour. A daemon that was
// started since has less.
type HistoryReport struct {
	IntervalSeconds float64 `json:"interval_seconds"` // between two samples
	BytesPerSecond  []int64 `json:"bytes_per_second"` // received in each interval, oldest first
}

// EventReport is a line of the log about a cluster.
type EventReport struct {
	Time  time.Time `json:"time"`
	Level string    `json:"level"` // "info", "warn" or "error"
	Text  string    `json:"text"`  // the message and its attributes
}

// readRecord reads what was last found out about an archive; nil: nothing was.
func readRecord[T any](dir, name string) (*T, error) {
	var record T
	err := archive.ReadRecord(dir, name, &record)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, nil
	case err != nil:
		return nil, err
	}
	return &record, nil
}

// Record keeps what a verification came to in the archive's directory, where a Report
// finds it.
func (v VerifyReport) Record(dir string) error {
	return archive.StoreRecord(dir, archive.VerifyRecord, v)
}

// Record keeps what a drill came to in the archive's directory, where a Report finds it.
func (d DrillReport) Record(dir string) error {
	return archive.StoreRecord(dir, archive.DrillRecord, d)
}

func errorText(err error) string {
	if err == nil {
		return ""
	}
	return err.Error()
}

// VerifyReport is what the last verify of an archive came to.
type VerifyReport struct {
	Time         time.Time `json:"time"` // when it ended
	Seconds      float64   `json:"seconds"`
	Whole        bool      `json:"whole"` // everything was checked that was to be, without a fault
	Error        string    `json:"error,omitempty"`
	Faults       int       `json:"faults"`
	Unproven     int       `json:"unproven"`
	Segments     int       `json:"segments"`
	Skipped      int       `json:"skipped"` // segments that were left out
	CheckedBytes int64     `json:"checked_bytes"`
}

// DrillReport is what the last drill with an archive came to.
type DrillReport struct {
	Time         time.Time `json:"time"` // when it ended
	Seconds      float64   `json:"seconds"`
	OK           bool      `json:"ok"`
	Error        string    `json:"error,omitempty"`
	Backup       string    `json:"backup"`
	RecoveredLSN string    `json:"recovered_lsn,omitempty"`
	Timeline     uint32    `json:"timeline,omitempty"`
	LastCommit   time.Time `json:"last_commit,omitzero"`
}

// SlotReport is what a cluster's slot costs one host.
type SlotReport struct {
	Host          string    `json:"host"`
	Time          time.Time `json:"time,omitzero"`  // when the host answered last; absent: never
	Note          string    `json:"note,omitempty"` // what it did not tell the last time, and why
	Exists        bool      `json:"exists"`
	RetainedBytes int64     `json:"retained_bytes"` // WAL that the host keeps for the slot
	RestartLSN    string    `json:"restart_lsn,omitempty"`
	Status        string    `json:"wal_status,omitempty"`
	SafeBytes     *int64    `json:"safe_wal_bytes,omitempty"` // that may be written before the slot can be lost; absent: not limited, or not known
	Invalid       string    `json:"invalidation_reason,omitempty"`
	ActivePID     uint32    `json:"active_pid,omitempty"`
	SyncState     string    `json:"sync_state,omitempty"`
}

// WarningReport is a danger that wants a person.
type WarningReport struct {
	Kind  string    `json:"kind"`
	Host  string    `json:"host"`
	Since time.Time `json:"since"`
	Text  string    `json:"text"`
	Hint  string    `json:"hint"`
}

// ArchiveReport is what a cluster's directory says by itself.
type ArchiveReport struct {
	Time  time.Time `json:"time,omitzero"`   // when it was looked into
	Error string    `json:"error,omitempty"` // why it says nothing, or not everything

	SystemIdentifier string    `json:"system_identifier,omitempty"`
	SegmentSize      int64     `json:"segment_size,omitempty"`
	OriginLSN        string    `json:"origin_lsn,omitempty"` // where the archive began
	OriginSource     string    `json:"origin_source,omitempty"`
	OriginTime       time.Time `json:"origin_time,omitzero"`

	Timeline     uint32          `json:"timeline,omitempty"` // the highest
	Segments     int             `json:"segments"`           // complete ones
	Compressed   int             `json:"compressed"`         // those of them that are
	Bytes        int64           `json:"bytes"`              // of complete segments, as they are stored
	FirstSegment string          `json:"first_segment,omitempty"`
	LastSegment  string          `json:"last_segment,omitempty"`
	SealedLSN    string          `json:"sealed_lsn,omitempty"` // exclusive end of the last one
	Partial      []PartialReport `json:"partial"`
	Aside        int             `json:"aside"`           // files *.aborted and *.diverged
	Oldest       time.Time       `json:"oldest,omitzero"` // when the first complete segment was written to last
	Modified     time.Time       `json:"modified,omitzero"`

	LastVerify *VerifyReport `json:"last_verify,omitempty"`
	LastDrill  *DrillReport  `json:"last_drill,omitempty"`

	Gaps        []GapReport        `json:"gaps"`
	Divergences []DivergenceReport `json:"divergences"`

	DiskFreeBytes  int64 `json:"disk_free_bytes"`
	DiskTotalBytes int64 `json:"disk_total_bytes"`
}

// PartialReport is a segment that is not complete.
type PartialReport struct {
	Segment  string    `json:"segment"`
	Modified time.Time `json:"modified"`
}

// GapReport is WAL that is missing for good, by a decision.
type GapReport struct {
	Timeline uint32    `json:"timeline"`
	From     string    `json:"from"` // inclusive
	To       string    `json:"to"`   // exclusive
	Time     time.Time `json:"time"`
	Reason   string    `json:"reason"`
}

// DivergenceReport is where an archive went on with other WAL than it had, by a
// decision.
type DivergenceReport struct {
	Timeline uint32    `json:"timeline"`
	LSN      string    `json:"lsn"`
	Restart  string    `json:"restart"`
	Time     time.Time `json:"time"`
	Reason   string    `json:"reason"`
}

// stateUnknown is the state of a cluster whose daemon does not answer.
const stateUnknown = "unknown"

// reportOf is the report of a cluster that runs.
func reportOf(c ClusterStatus, now time.Time) ClusterReport {
	r := c.configured
	r.State, r.Since, r.Reason, r.Hint, r.Stopping = string(c.State), c.Since, c.Reason, c.Hint, c.Stopping
	if !c.TroubleSince.IsZero() { // its states take turns, also that of a halted one, which is looked at again
		r.Since = c.TroubleSince
	}
	r.Host, r.ServerVersion, r.PolarDBVersion = c.Host, c.ServerVersion, c.PolarDB
	r.SystemIdentifier, r.SegmentSize = systemIdentifier(c.SystemID), int64(c.SegmentSize)
	r.Timeline = uint32(c.Timeline)
	if behind, known := c.Behind(now); known {
		seconds := behind.Seconds()
		r.BehindSeconds = &seconds
	}
	for _, s := range c.Slots { // a message that is read late tells of the server's end when it was sent; the monitor may know better
		if s.Host == c.Host && s.Exists {
			c.ServerEnd = max(c.ServerEnd, s.RestartLSN+wal.LSN(s.Retained))
		}
	}
	r.WrittenLSN, r.SyncedLSN, r.FlushedLSN, r.ServerLSN = lsn(c.Written), lsn(c.Synced), lsn(c.Flushed), lsn(c.ServerEnd)
	if c.Flushed != 0 && c.ServerEnd != 0 {
		lag := c.Lag()
		r.LagBytes = &lag
	}
	r.LastMessage = c.LastData
	r.BytesPerSecond = math.Round(c.Rate)
	r.ReceivedBytes, r.ReceivedAgainBytes = c.ReceivedBytes, c.ReceivedAgain
	r.SegmentsSealed, r.SegmentsCompressed = c.SegmentsSealed, c.SegmentsCompressed
	r.CompressBacklog, r.CompressBytes = c.CompressBacklog, c.CompressBacklog*int64(c.SegmentSize)
	r.Reconnects, r.Panics, r.Gaps = c.Reconnects, c.Panics, c.Gaps
	r.LastError, r.LastErrorTime = c.LastError, c.LastErrorAt
	if c.DiskFree >= 0 {
		r.DiskFreeBytes = &c.DiskFree
	}
	r.Slots, r.Warnings = []SlotReport{}, []WarningReport{}
	for _, s := range c.Slots {
		view := SlotReport{Host: s.Host, Time: s.Answered, Note: s.Note, Exists: s.Exists, RetainedBytes: s.Retained, RestartLSN: lsn(s.RestartLSN),
			Status: s.SlotWatch.Status, Invalid: s.Invalid, ActivePID: s.ActivePID, SyncState: s.SyncState}
		if s.Exists && s.SafeWALSize >= 0 {
			safe := s.SafeWALSize
			view.SafeBytes = &safe
		}
		r.Slots = append(r.Slots, view)
	}
	for _, w := range c.Warnings {
		r.Warnings = append(r.Warnings, WarningReport{w.Kind, w.Host, w.Since, w.Text, w.Hint})
	}
	r.Switchovers, r.StatusUpdates, r.Failures, r.Syncs = c.Switchovers, c.StatusUpdates, c.Failures, syncReport(c.Syncs)
	r.Archive, r.History, r.SecondsToFull = c.memory.archive, c.memory.history, c.memory.secondsToFull
	if r.Gaps == 0 && r.Archive != nil { // a receiver that has not opened the archive yet knows of none
		r.Gaps = int64(len(r.Archive.Gaps))
	}
	r.Health = healthOf(r, c.TroubleSince, now)
	return r
}

func syncReport(t receiver.SyncTimes) *HistogramReport {
	h := &HistogramReport{Count: t.Count, Sum: t.Sum.Seconds(), Buckets: []BucketReport{}}
	for i, limit := range receiver.SyncLimits() {
		h.Buckets = append(h.Buckets, BucketReport{limit.Seconds(), t.Within[i]})
	}
	return h
}

// configured is what the configuration says about a cluster, without secrets.
func configured(c receiver.Config) ClusterReport {
	r := ClusterReport{Name: c.Name, State: stateUnknown, Directory: c.Dir, Slot: c.Slot, Hosts: []string{}, Settings: map[string]any{},
		Health: Critical, Failures: map[string]int64{}, Slots: []SlotReport{}, Warnings: []WarningReport{}}
	if info, err := pgrepl.ParseConninfo(c.Conninfo); err == nil {
		r.Hosts, r.User = info.Hosts(), info.User()
	}
	for _, s := range slices.Concat(defaultSettings, retentionSettings) {
		r.Settings[s.key] = s.show(&c)
	}
	return r
}

func lsn(l wal.LSN) string {
	if l == 0 {
		return ""
	}
	return l.String()
}

func systemIdentifier(id uint64) string {
	if id == 0 {
		return ""
	}
	return strconv.FormatUint(id, 10)
}

// Cluster is the report with one cluster alone; ok is false when there is none of that
// name.
func (r Report) Cluster(name string) (one Report, ok bool) {
	one = r
	for _, c := range r.Clusters {
		if c.Name == name {
			one.Clusters = []ClusterReport{c}
			return one, true
		}
	}
	return r, false
}

// Configured is the report of a configuration whose daemon does not answer, for the
// reason given.
func Configured(cfg *Config, reason error) Report {
	r := Report{Time: time.Now(), Error: reason.Error()}
	for _, c := range cfg.Clusters {
		r.Clusters = append(r.Clusters, configured(c))
	}
	return r
}

// peekTimeout is how long directories have to be looked into.
const peekTimeout = 10 * time.Second

// Peek adds what the clusters' directories say by themselves. Nothing in them is
// changed or locked. A directory whose disk does not answer for peekTimeout is
// reported as such; its goroutine ends when the disk answers.
func (r Report) Peek(ctx context.Context) Report {
	ctx, cancel := context.WithTimeout(ctx, peekTimeout)
	defer cancel()
	clusters := make([]ClusterReport, len(r.Clusters))
	found := make([]chan *ArchiveReport, len(r.Clusters))
	few := make(chan struct{}, 64) // directories at a time
	for i, c := range r.Clusters {
		found[i] = make(chan *ArchiveReport, 1)
		go func() {
			select {
			case few <- struct{}{}:
				defer func() { <-few }()
				found[i] <- peek(ctx, c.Directory)
			case <-ctx.Done():
			}
		}()
	}
	for i, c := range r.Clusters {
		select {
		case c.Archive = <-found[i]:
		case <-ctx.Done():
			select {
			case c.Archive = <-found[i]:
			default:
				c.Archive = &ArchiveReport{Error: "the file system did not answer within " + peekTimeout.String()}
			}
		}
		if r.Daemon == nil && c.Archive.Error == "" {
			free := c.Archive.DiskFreeBytes
			c.Gaps, c.DiskFreeBytes = int64(len(c.Archive.Gaps)), &free
		}
		clusters[i] = c
	}
	r.Clusters = clusters
	return r
}

func peek(ctx context.Context, dir string) *ArchiveReport {
	h, err := archive.Peek(ctx, dir)
	a := &ArchiveReport{
		Time: time.Now(), SystemIdentifier: systemIdentifier(h.Identity.SystemID), SegmentSize: int64(h.Identity.SegmentSize),
		OriginLSN: lsn(h.Origin.LSN), OriginSource: h.Origin.Source, OriginTime: h.Origin.Time,
		Timeline: uint32(h.Timeline), Segments: h.Segments, Compressed: h.Compressed, Bytes: h.Bytes,
		SealedLSN: lsn(h.Sealed()), Aside: h.Aside, Oldest: h.Oldest, Modified: h.Modified,
		Partial: []PartialReport{}, Gaps: []GapReport{}, Divergences: []DivergenceReport{},
		DiskFreeBytes: h.Free, DiskTotalBytes: h.Total,
	}
	switch {
	case errors.Is(err, fs.ErrNotExist):
		a.Error = "there is no directory yet"
	case err != nil:
		a.Error = err.Error()
	}
	a.LastVerify, err = readRecord[VerifyReport](dir, archive.VerifyRecord)
	a.Error = cmp.Or(a.Error, errorText(err))
	a.LastDrill, err = readRecord[DrillReport](dir, archive.DrillRecord)
	a.Error = cmp.Or(a.Error, errorText(err))
	if h.Segments > 0 {
		a.FirstSegment, a.LastSegment = h.First.Name(), h.Last.Name()
	}
	for _, p := range h.Partial {
		a.Partial = append(a.Partial, PartialReport{p.Name(), p.Modified})
	}
	for _, g := range h.Gaps {
		a.Gaps = append(a.Gaps, GapReport{uint32(g.Timeline), g.From.String(), g.To.String(), g.Time, g.Reason})
	}
	for _, v := range h.Divergences {
		a.Divergences = append(a.Divergences, DivergenceReport{uint32(v.Timeline), v.LSN.String(), v.Restart.String(), v.Time, v.Reason})
	}
	return a
}
