package restore

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"text/tabwriter"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/postgres"
	"github.com/walfleet/walfleet/internal/wal"
)

// DrillOptions say what is rehearsed. Archive, Backup, User and Program are needed.
type DrillOptions struct {
	Archive string // the archive's directory
	Backup  string // of pg_basebackup: a data directory, a tar file, or a directory with base.tar
	To      Target // where recovery is to end
	User    string // a superuser of the cluster
	Work    string // where the drill makes a directory of its own; "": TMPDIR, or /var/tmp where that has too little room
	Program string // walfleet, for restore_command

	Progress func(text string) // is told what is being done; nil: nobody is
}

// Target is where a recovery is to end. The zero value is the archive's end.
type Target struct {
	Time time.Time // recovery_target_time
	LSN  wal.LSN   // recovery_target_lsn
}

// targetLayouts are how a person may write a time. The last ones are times of this
// machine's zone.
var targetLayouts = []string{
	"2006-01-02T15:04:05Z07:00", "2006-01-02 15:04:05Z07:00", "2006-01-02 15:04:05Z07", "2006-01-02 15:04:05 Z07:00",
	"2006-01-02T15:04:05", "2006-01-02 15:04:05", "2006-01-02 15:04",
}

// ParseTarget reads a position or a time. The empty text is the archive's end.
func ParseTarget(text string) (Target, error) {
	if text == "" {
		return Target{}, nil
	}
	if lsn, err := wal.ParseLSN(text); err == nil && lsn != 0 {
		return Target{LSN: lsn}, nil
	}
	for _, layout := range targetLayouts {
		if t, err := time.ParseInLocation(layout, text, time.Local); err == nil {
			return Target{Time: t}, nil
		}
	}
	return Target{}, fmt.Errorf("%q is neither a position such as 0/3000060 nor a time such as \"2026-01-31 10:00:00+01\"", text)
}

func (t Target) String() string {
	switch {
	case t.LSN != 0:
		return t.LSN.String()
	case !t.Time.IsZero():
		return t.Time.Format(time.RFC3339Nano)
	}
	return ""
}

// DrillReport is what a drill has found. What it did not come to is zero.
type DrillReport struct {
	Time  time.Time `json:"time"` // of the beginning
	OK    bool      `json:"ok"`
	Error string    `json:"error,omitempty"` // why not
	Log   []string  `json:"log,omitempty"`   // what the server's log says about that, escaped

	Archive          string `json:"archive"` // its directory
	Backup           string `json:"backup"`
	Target           string `json:"target,omitempty"` // "": the archive's end
	SystemIdentifier string `json:"system_identifier,omitempty"`
	ServerVersion    string `json:"server_version,omitempty"`
	ServerUser       string `json:"server_user,omitempty"` // "": this process's own

	Confined bool `json:"confined"` // the server could change nothing outside of the drill's directory

	BackupLSN   string  `json:"backup_lsn,omitempty"` // where recovery begins
	CopiedBytes int64   `json:"copied_bytes"`         // of the backup
	CopySeconds float64 `json:"copy_seconds"`

	Opened          bool      `json:"opened"`                  // it was promoted, and answers
	RecoveredLSN    string    `json:"recovered_lsn,omitempty"` // exclusive end of the last record that was replayed
	Timeline        uint32    `json:"timeline,omitempty"`      // on which that was
	LastCommit      time.Time `json:"last_commit,omitzero"`    // the last commit or abort that was replayed
	WALBytes        int64     `json:"wal_bytes"`               // from backup_lsn to recovered_lsn
	RecoverySeconds float64   `json:"recovery_seconds"`        // from the server's start until it took writes
	BytesPerSecond  float64   `json:"bytes_per_second"`        // the one by the other

	Databases []DrillDatabase `json:"databases"`
	Seconds   float64         `json:"seconds"` // all in all
}

// DrillDatabase is a database that the drill connected to after recovery.
type DrillDatabase struct {
	Name         string `json:"name"`
	Error        string `json:"error,omitempty"` // why it could not be read
	Relations    int64  `json:"relations"`       // rows of pg_class
	MissingFiles int64  `json:"missing_files"`   // relations that have no file
	Bytes        int64  `json:"bytes"`           // pg_database_size
}

// drill is one rehearsal.
type drill struct {
	DrillOptions
	report  *DrillReport
	dir     string // its own, with everything that it makes
	owner   *postgres.Owner
	bin     postgres.Installation
	control control
	start   wal.LSN // where recovery begins

	followed wal.Timeline // recovery's target timeline, when it is over
}

// Drill restores a base backup into a directory of its own, lets a throwaway server
// recover from the archive alone, looks into each database, and removes everything.
// Nothing of the backup's configuration is used, and of its pg_wal neither: the server
// contacts nobody, and nobody can contact it but the user that it runs as.
//
// The error says why the recovery, or its rehearsal, failed; the report has what was
// found until then. When ctx is done everything is removed, too.
func Drill(ctx context.Context, o DrillOptions) (report DrillReport, err error) {
	begin := time.Now()
	report = DrillReport{Time: begin.UTC().Truncate(time.Second), Archive: o.Archive, Backup: o.Backup, Target: o.To.String(), Databases: []DrillDatabase{}}
	d := &drill{DrillOptions: o, report: &report}
	defer func() {
		// A panic comes through here as well.
		if d.dir != "" {
			d.say("cleaning up")
			if removeErr := removeDir(d.dir); removeErr != nil {
				err = errors.Join(err, fmt.Errorf("cleaning up: %w", removeErr))
			}
		}
		report.Seconds = time.Since(begin).Seconds()
		if err != nil {
			report.Error = err.Error()
		}
		report.OK = err == nil
	}()
	err = d.run(ctx)
	if cause := context.Cause(ctx); err != nil && cause != nil && !errors.Is(err, cause) {
		err = fmt.Errorf("%w (%w)", cause, err)
	}
	return
}

// removeDir removes a directory, into which a process that makes segments ready may
// still write for a moment after its server has ended.
func removeDir(dir string) (err error) {
	for range 50 {
		if err = os.RemoveAll(dir); err == nil {
			return nil
		}
		time.Sleep(100 * time.Millisecond)
	}
	return err
}

func (d *drill) say(format string, args ...any) {
	if d.Progress != nil {
		d.Progress(fmt.Sprintf(format, args...))
	}
}

func (d *drill) run(ctx context.Context) error {
	c, err := archive.ReadCatalogue(ctx, d.Archive)
	if err != nil {
		return err
	}
	if len(c.Files) == 0 {
		return fmt.Errorf("the archive %s has no WAL", d.Archive)
	}
	if d.owner, err = postgres.OwnerOf(d.Archive); err != nil {
		return fmt.Errorf("%w: run walfleet as a user of its own, and the drill as that user", err)
	}
	if d.owner != nil {
		d.report.ServerUser = d.owner.Name
	}
	b, err := findBackup(d.Backup)
	if err != nil {
		return err
	}
	if err := d.makeDir(ctx, b, c.Identity.SegmentSize); err != nil {
		return err
	}
	if err := d.copyBackup(ctx, b); err != nil {
		return fmt.Errorf("copying the backup: %w", err)
	}
	if err := d.inspect(ctx, c); err != nil {
		return err
	}
	if err := d.recover(ctx); err != nil {
		return err
	}
	if d.To == (Target{}) {
		return d.atEnd(c)
	}
	return nil
}

// makeDir makes the drill's directory, where there is room.
func (d *drill) makeDir(ctx context.Context, b backup, segment wal.SegmentSize) error {
	size, err := b.size(ctx)
	if err != nil {
		return fmt.Errorf("measuring the backup: %w", err)
	}
	need := size + int64(maxWAL(segment))<<20 + reserve
	parents := []string{os.TempDir(), "/var/tmp"}
	if d.Work != "" {
		parents = []string{d.Work}
	}
	var errs []error
	for _, parent := range parents {
		err := d.makeDirIn(parent, need)
		if err == nil {
			return nil
		}
		errs = append(errs, err)
	}
	return fmt.Errorf("no room for a drill, which takes %s and what changes in the data: %w", megabytes(need), errors.Join(errs...))
}

func (d *drill) makeDirIn(parent string, need int64) error {
	parent, err := filepath.Abs(parent)
	if err != nil {
		return err
	}
	free, err := postgres.FreeSpace(parent)
	if err != nil {
		return err
	}
	if free < need {
		return fmt.Errorf("%s has %s free; --work names another directory", parent, megabytes(free))
	}
	// The name's random part has at most ten digits (os.MkdirTemp).
	if n := len(filepath.Join(parent, dirPrefix+"0123456789", socketName)); n > longestSocket {
		return fmt.Errorf("below %s the server's socket would have a path of %d bytes, of %d that are possible: --work must name a shorter one", parent, n, longestSocket)
	}
	d.dir, err = os.MkdirTemp(parent, dirPrefix)
	return err
}

// dirPrefix is how the names of drills' directories begin. One whose process was
// killed leaves it.
const dirPrefix = "walfleet-drill-"

// reserve is what a drill leaves free on the disk, in bytes: others use it too, maybe
// the archive.
const reserve = 500 << 20

// room fails when the disk is about to be full.
func (d *drill) room() error {
	free, err := postgres.FreeSpace(d.dir)
	if err != nil {
		return err
	}
	if free < reserve {
		return fmt.Errorf("only %s are free for %s: the drill stops before it fills the disk; --work names another directory", megabytes(free), d.dir)
	}
	return nil
}

// inspect finds out what has been copied, whether it fits the archive, and what can
// run it.
func (d *drill) inspect(ctx context.Context, c archive.Catalogue) error {
	major, err := readMajor(d.data())
	if err != nil {
		return err
	}
	if d.bin, err = findServer(ctx, major); err != nil {
		return err
	}
	d.report.ServerVersion = d.bin.Version
	if d.control, err = d.readControl(ctx); err != nil {
		return err
	}
	d.report.SystemIdentifier = strconv.FormatUint(d.control.systemID, 10)
	have, want := archive.Identity{SystemID: d.control.systemID, SegmentSize: d.control.segmentSize}, c.Identity
	if have != want {
		return fmt.Errorf("the backup is of another cluster than the archive: system identifier %d with segments of %d bytes, the archive's is %d with %d",
			have.SystemID, have.SegmentSize, want.SystemID, want.SegmentSize)
	}
	d.start, err = readLabel(d.data())
	if errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("%s has no backup_label: it is no base backup that is whole, and recovery could not tell from where on it needs WAL", d.Backup)
	}
	if err != nil {
		return err
	}
	d.report.BackupLSN = d.start.String()
	return nil
}

// findServer finds the programs of that very version.
func findServer(ctx context.Context, major int) (postgres.Installation, error) {
	bin, ok := postgres.FindMajor(ctx, major, "psql", "pg_controldata")
	if !ok {
		return bin, fmt.Errorf("the backup is of PostgreSQL %d, whose programs (postgres, psql, pg_controldata) are not on this machine: "+
			"install postgresql-%[1]d (Debian, Ubuntu) or postgresql%[1]d-server (Red Hat), or put their directory into PATH", major)
	}
	return bin, nil
}

// atEnd fails when recovery ended before the end of what the archive had at the
// beginning of the drill. A server takes a damaged record for the end of WAL and opens;
// so it does at a timeline whose history is missing.
func (d *drill) atEnd(c archive.Catalogue) error {
	last := lastTimeline(c)
	if d.followed < last {
		return fmt.Errorf("recovery followed timeline %d, and the archive goes on to timeline %d: is %s missing?", d.followed, last, wal.HistoryName(d.followed+1))
	}
	recovered, err := wal.ParseLSN(d.report.RecoveredLSN)
	if err != nil {
		return fmt.Errorf("the server's last position: %w", err)
	}
	// One that stops on an ancestor follows the last timeline by its name alone.
	h, err := c.History(last)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if n := len(h.Forks); err == nil && n > 0 && recovered < h.Forks[n-1].End {
		return fmt.Errorf("recovery ended at %s, and the archive's timeline %d begins at %s: "+
			"what comes after %[1]s is lost to a recovery; \"walfleet verify\" says what is wrong there", recovered, last, h.Forks[n-1].End)
	}
	for _, s := range c.Sealed() {
		if s.Timeline != last || s.End() <= recovered {
			continue
		}
		return fmt.Errorf("recovery ended at %s, and the archive has the complete segment %s, which ends at %s: "+
			"what comes after %[1]s is lost to a recovery; \"walfleet verify\" says what is wrong there", recovered, s.Name(), s.End())
	}
	return nil
}

// lastTimeline is the highest one that the archive has WAL of.
func lastTimeline(c archive.Catalogue) wal.Timeline {
	var last wal.Timeline
	for _, f := range c.Files {
		last = max(last, f.Timeline)
	}
	return last
}

// Write writes the report for people.
func (r DrillReport) Write(w io.Writer) error {
	t := tabwriter.NewWriter(w, 0, 0, 2, ' ', 0)
	line := func(name, format string, args ...any) {
		fmt.Fprintf(t, "%s\t%s\n", name, printable(fmt.Sprintf(format, args...)))
	}
	line("archive", "%s", r.Archive)
	line("backup", "%s", r.Backup)
	target := r.Target
	if target == "" {
		target = "the archive's end"
	}
	line("target", "%s", target)
	if r.CopiedBytes > 0 {
		line("copied", "%s in %s", megabytes(r.CopiedBytes), seconds(r.CopySeconds))
	}
	if r.ServerVersion != "" {
		as := ""
		if r.ServerUser != "" {
			as = ", as user " + r.ServerUser
		}
		if r.Confined {
			as += ", confined to the drill's directory"
		}
		line("server", "PostgreSQL %s%s", r.ServerVersion, as)
	}
	if r.Opened {
		line("recovered", "from %s to %s on timeline %d", r.BackupLSN, r.RecoveredLSN, r.Timeline)
		commit := "none was replayed"
		if !r.LastCommit.IsZero() {
			commit = r.LastCommit.UTC().Format("2006-01-02 15:04:05.000 UTC")
		}
		line("last commit", "%s", commit)
		line("replayed", "%s of WAL in %s, %s/s", megabytes(r.WALBytes), seconds(r.RecoverySeconds), megabytes(int64(r.BytesPerSecond)))
		var relations, bytes int64
		for _, db := range r.Databases {
			relations, bytes = relations+db.Relations, bytes+db.Bytes
		}
		line("opened", "%d databases with %d relations, %s", len(r.Databases), relations, megabytes(bytes))
	}
	if err := t.Flush(); err != nil {
		return err
	}
	verdict := "OK: this backup and this archive recover.\n"
	if !r.OK {
		verdict = fmt.Sprintf("FAILED: %s\n", strings.ReplaceAll(r.Error, "\n", "\n  "))
		if len(r.Log) > 0 {
			verdict += "The server's log:\n  " + strings.Join(r.Log, "\n  ") + "\n"
		}
	}
	_, err := fmt.Fprintf(w, "%s", verdict)
	return err
}

func seconds(s float64) string { return fmt.Sprintf("%.1f s", s) }

// megabytes is a size for people.
func megabytes(n int64) string {
	if n >= 10<<30 {
		return fmt.Sprintf("%.1f GB", float64(n)/(1<<30))
	}
	return fmt.Sprintf("%.1f MB", float64(n)/(1<<20))
}

// printable makes one line of a text, and escapes what a terminal might obey.
func printable(text string) string {
	quoted := strconv.Quote(text)
	return strings.ReplaceAll(quoted[1:len(quoted)-1], `\"`, `"`)
}
