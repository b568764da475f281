package restore

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/walfleet/walfleet/internal/wal"
)

// control is what a drill needs of pg_control.
type control struct {
	systemID    uint64
	segmentSize wal.SegmentSize
	limits      map[string]int // settings that recovery needs at least as high, by their names
}

// limitNames are what pg_controldata calls the settings that recovery cannot do with
// less of (CheckRequiredParameterValues in xlogrecovery.c; prepared transactions need
// theirs in any case).
var limitNames = map[string]string{
	"max_connections setting":      "max_connections",
	"max_worker_processes setting": "max_worker_processes",
	"max_wal_senders setting":      "max_wal_senders",
	"max_prepared_xacts setting":   "max_prepared_transactions",
	"max_locks_per_xact setting":   "max_locks_per_transaction",
}

func (d *drill) readControl(ctx context.Context) (control, error) {
	cmd := exec.CommandContext(ctx, d.bin.Path("pg_controldata"), "-D", d.data())
	cmd.Env = environment()
	out, err := cmd.Output()
	if err != nil {
		return control{}, fmt.Errorf("the backup's pg_control: %w", withStderr(err))
	}
	return parseControl(string(out))
}

// parseControl reads what pg_controldata prints.
func parseControl(out string) (control, error) {
	c := control{limits: map[string]int{}}
	for line := range strings.Lines(out) {
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		n, err := strconv.ParseUint(value, 10, 64)
		if err != nil {
			continue
		}
		switch name {
		case "Database system identifier":
			c.systemID = n
		case "Bytes per WAL segment":
			c.segmentSize = wal.SegmentSize(n)
		}
		if setting, ok := limitNames[name]; ok {
			c.limits[setting] = int(n)
		}
	}
	if c.systemID == 0 || !c.segmentSize.Valid() || len(c.limits) < len(limitNames) {
		return control{}, errors.New("the backup's pg_control makes no sense: pg_controldata does not say whose it is")
	}
	return c, nil
}

const (
	// socketName is the name of the server's socket: the port tells servers in one
	// directory apart, and nothing listens on it.
	socketName = ".s.PGSQL.5432"

	// longestSocket is the longest path of a Unix socket, in bytes: sun_path without its
	// end, 107 on Linux, 103 on macOS and the BSDs.
	longestSocket = 103
)

// maxWAL is the server's max_wal_size in megabytes: about as much of what it has
// restored stays in its pg_wal.
func maxWAL(segment wal.SegmentSize) int { return max(1024, 4*int(segment)>>20) }

// settings are the server's, all on its command line. Its file of settings is empty:
// the backup's is not read, so nothing in it can matter, secrets and libraries included.
func (d *drill) settings() []string {
	file := func(name string) string { return filepath.Join(d.dir, name) }
	list := []string{
		"config_file=" + file(emptyFile),
		"hba_file=" + file(hbaFile),
		"ident_file=" + file(emptyFile),

		// Reached by one user of this machine, reaching nobody.
		"listen_addresses=",
		`unix_socket_directories="` + strings.ReplaceAll(d.dir, `"`, `""`) + `"`,
		"unix_socket_permissions=0700",
		"archive_mode=off",
		"max_logical_replication_workers=0", // the cluster's subscriptions would connect to their publishers

		"restore_command=" + d.restoreCommand(),
		"recovery_target_timeline=latest",
		"recovery_target_action=promote",
		// Until it is promoted nobody asks it anything; and it would stop where the primary had
		// raised one of its limits.
		"hot_standby=off",

		// Nothing of it is to survive a crash, or to be served.
		"fsync=off",
		"full_page_writes=off",
		"restart_after_crash=off",
		"autovacuum=off",
		"shared_buffers=256MB",
		"huge_pages=off",
		fmt.Sprintf("min_wal_size=%dMB", max(80, 2*int(d.control.segmentSize)>>20)), // at least two segments, checked by the server
		fmt.Sprintf("max_wal_size=%dMB", maxWAL(d.control.segmentSize)),

		// Its log is read.
		"logging_collector=off",
		"log_destination=stderr",
		"log_line_prefix=",
		"log_checkpoints=off",
		"log_min_error_statement=panic",
		"lc_messages=C",
		"log_timezone=UTC",
		"timezone=UTC",
	}
	switch {
	case d.To.LSN != 0:
		list = append(list, "recovery_target_lsn="+d.To.LSN.String())
	case !d.To.Time.IsZero():
		list = append(list, "recovery_target_time="+d.To.Time.UTC().Format("2006-01-02 15:04:05.999999+00"))
	}
	for name, n := range d.control.limits {
		list = append(list, fmt.Sprintf("%s=%d", name, n))
	}
	return list
}

const (
	emptyFile = "empty.conf"
	hbaFile   = "pg_hba.conf"
	logFile   = "log"
)

// restoreCommand is this program's. The server replaces %f and %p, and makes %% a
// percent sign (RestoreArchivedFile in xlogarchive.c).
func (d *drill) restoreCommand() string {
	quote := func(text string) string {
		return "'" + strings.ReplaceAll(strings.ReplaceAll(text, "'", `'\''`), "%", "%%") + "'"
	}
	return quote(d.Program) + " restore-wal --partial --archive " + quote(d.Archive) + ` "%f" "%p"`
}

// environment is this process's, without what changes what PostgreSQL's programs do.
func environment(more ...string) []string {
	env := slices.DeleteFunc(os.Environ(), func(v string) bool { return strings.HasPrefix(v, "PG") || strings.HasPrefix(v, "LC_") })
	return append(append(env, "LC_ALL=C", "TZ=UTC"), more...)
}

// server is a postmaster that is a child of ours.
type server struct {
	process *os.Process
	exited  chan struct{} // closed when it has ended

	confined bool // it can change nothing outside of the drill's directory
}

// startServer starts the server on the copy of the backup.
func (d *drill) startServer() (*server, error) {
	for name, text := range map[string]string{
		emptyFile:              "",
		hbaFile:                "local all all trust\n",
		"data/recovery.signal": "",
	} {
		if err := os.WriteFile(filepath.Join(d.dir, name), []byte(text), 0o600); err != nil {
			return nil, err
		}
	}
	if d.owner != nil {
		err := filepath.WalkDir(d.dir, func(name string, _ fs.DirEntry, err error) error { return errors.Join(err, d.owner.Give(name)) })
		if err != nil {
			return nil, err
		}
	}
	log, err := os.OpenFile(filepath.Join(d.dir, logFile), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return nil, err
	}
	defer func() { _ = log.Close() }() // the child has its own descriptor
	args := []string{"-D", d.data()}
	for _, s := range d.settings() {
		args = append(args, "-c", s)
	}
	cmd := exec.Command(d.bin.Path("postgres"), args...)
	cmd.Env, cmd.Dir, cmd.Stdout, cmd.Stderr = environment(), d.dir, log, log
	cmd.SysProcAttr = endsWithParent(&syscall.SysProcAttr{Setpgid: true, Credential: d.owner.Credential()}, syscall.SIGQUIT)
	s := &server{exited: make(chan struct{})}
	started := make(chan error)
	go func() {
		// The child ends with the thread that started it, not only with the process. The
		// thread is confined too, and must not be used for anything else: it ends with this
		// goroutine, which does not unlock it.
		runtime.LockOSThread()
		s.confined = confine(d.dir)
		err := cmd.Start()
		s.process = cmd.Process
		started <- err
		if err == nil {
			_ = cmd.Wait() // how it ended stands in its log
			close(s.exited)
		}
	}()
	if err := <-started; err != nil {
		return nil, fmt.Errorf("starting the server: %w", err)
	}
	return s, nil
}

// stop ends the server: PostgreSQL's immediate shutdown, for nobody needs its data any
// more. It ends its own processes within seconds, and kills those that do not listen.
func (s *server) stop() error {
	for _, sig := range []syscall.Signal{syscall.SIGQUIT, syscall.SIGKILL} {
		_ = s.process.Signal(sig) // it may have ended
		select {
		case <-s.exited:
			return nil
		case <-time.After(stopTimeout):
		}
	}
	return fmt.Errorf("the server (process %d) does not end, killed as it is", s.process.Pid)
}

const stopTimeout = 20 * time.Second

// recover lets the server recover, and asks it what it has.
func (d *drill) recover(ctx context.Context) (err error) {
	s, err := d.startServer()
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()
	d.report.Confined = s.confined
	begin := time.Now()
	if err := d.await(ctx, s); err != nil {
		return err
	}
	d.report.RecoverySeconds = time.Since(begin).Seconds()
	d.say("recovered, looking at the databases")
	return d.ask(ctx)
}

// await returns when the server takes writes. Its log says why it does not.
func (d *drill) await(ctx context.Context, s *server) error {
	told := time.Now()
	for {
		select {
		case <-ctx.Done():
			d.report.Log = d.decisive()
			return fmt.Errorf("recovering: %w", context.Cause(ctx))
		case <-s.exited:
		case <-time.After(50 * time.Millisecond):
		}
		// Where the server is not confined, nothing has been written yet, with luck.
		if place := d.strayTablespace(); place != "" {
			d.report.Log = d.decisive()
			return fmt.Errorf("the archive's WAL creates a tablespace in %q, outside of the drill's directory: rehearse with a base backup that is newer than that", place)
		}
		select {
		case <-s.exited:
			d.report.Log = d.decisive()
			return fmt.Errorf("recovery failed: %s", reason(d.report.Log))
		default:
		}
		if d.serverIsReady() {
			return nil
		}
		if err := d.room(); err != nil {
			return err
		}
		if time.Since(told) > 5*time.Second {
			told = time.Now()
			if restored := lastRestored(d.logTail()); restored != "" {
				d.say("recovering, %s was the last file from the archive", restored)
			}
		}
	}
}

// strayTablespace is where a tablespace is that the drill has not made; "": there is none.
func (d *drill) strayTablespace() string {
	dir := filepath.Join(d.data(), tablespaceDir)
	links, _ := os.ReadDir(dir) // without it the server does not start
	for _, link := range links {
		if place, err := os.Readlink(filepath.Join(dir, link.Name())); err == nil && place != d.tablespace(link.Name()) {
			return place
		}
	}
	return ""
}

// serverIsReady reads what the postmaster says of itself in the eighth line of its lock
// file (LOCK_FILE_LINE_PM_STATUS in pidfile.h), as pg_ctl does.
func (d *drill) serverIsReady() bool {
	text, err := os.ReadFile(filepath.Join(d.data(), "postmaster.pid"))
	if err != nil {
		return false
	}
	lines := strings.Split(string(text), "\n")
	return len(lines) >= 8 && strings.TrimSpace(lines[7]) == "ready"
}

// ask fills in what the server says after its promotion. What it replayed last stays
// known until it is stopped.
func (d *drill) ask(ctx context.Context) error {
	r := d.report
	var got struct {
		LSN, File string
		Time      *time.Time
		Databases []string
	}
	err := d.query(ctx, "template1", `SELECT json_build_object('lsn', pg_last_wal_replay_lsn(), 'time', pg_last_xact_replay_timestamp(),
		'file', pg_walfile_name(pg_current_wal_insert_lsn()),
		'databases', (SELECT json_agg(datname ORDER BY datname) FROM pg_database WHERE datallowconn))`, &got)
	if err != nil {
		return fmt.Errorf("the server recovered, and does not answer: %w", err)
	}
	r.Opened, r.RecoveredLSN = true, got.LSN
	if got.Time != nil {
		r.LastCommit = *got.Time
	}
	// The timeline that the promotion began says which one was followed; where recovery
	// stopped before it came to that one, it was on an ancestor, which ends there too.
	segment, err := wal.ParseSegment(got.File, d.control.segmentSize)
	if err != nil {
		return err
	}
	text, err := os.ReadFile(filepath.Join(d.data(), "pg_wal", wal.HistoryName(segment.Timeline)))
	if err != nil {
		return err
	}
	history, err := wal.ParseHistory(segment.Timeline, text)
	if err != nil {
		return err
	}
	for _, fork := range history.Forks {
		d.followed = fork.Timeline
	}
	for _, fork := range slices.Backward(history.Forks) {
		if fork.End == history.Forks[len(history.Forks)-1].End {
			r.Timeline = uint32(fork.Timeline)
		}
	}
	if lsn, err := wal.ParseLSN(got.LSN); err == nil && lsn > d.start {
		r.WALBytes = int64(lsn - d.start)
		r.BytesPerSecond = float64(r.WALBytes) / r.RecoverySeconds
	}
	var errs []error
	for _, name := range got.Databases {
		db := DrillDatabase{Name: name}
		err := d.query(ctx, name, `SELECT json_build_object('relations', count(*), 'bytes', pg_database_size(current_database()),
			'missing_files', count(*) FILTER (WHERE relkind IN ('r', 'i', 't', 'm', 'S') AND relpersistence <> 't'
				AND (pg_stat_file(pg_relation_filepath(oid), true)).size IS NULL)) FROM pg_class`, &db)
		switch {
		case err != nil:
			db.Error = err.Error()
			errs = append(errs, fmt.Errorf("database %q cannot be read: %w", name, err))
		case db.MissingFiles > 0:
			errs = append(errs, fmt.Errorf("database %q has %d relations without a file: the backup is not whole", name, db.MissingFiles))
		}
		r.Databases = append(r.Databases, db)
	}
	return errors.Join(errs...)
}

// query runs one query in a database, and reads the JSON that it returns. What roles
// and databases bring with them is left out: libraries, a search_path, event triggers.
func (d *drill) query(ctx context.Context, database, sql string, answer any) error {
	ctx, cancel := context.WithTimeoutCause(ctx, queryTimeout, fmt.Errorf("no answer within %s", queryTimeout))
	defer cancel()
	conninfo := ""
	for _, kv := range [][2]string{{"host", d.dir}, {"port", "5432"}, {"user", d.User}, {"dbname", database}} {
		conninfo += kv[0] + "='" + strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(kv[1]) + "' "
	}
	options := "-c session_preload_libraries= -c local_preload_libraries= -c search_path=pg_catalog"
	if d.bin.Major >= 17 {
		options += " -c event_triggers=off"
	}
	cmd := exec.CommandContext(ctx, d.bin.Path("psql"), "-XqAtw", "-v", "ON_ERROR_STOP=1", "-d", conninfo, "-c", sql)
	cmd.Env, cmd.Dir = environment("PGOPTIONS="+options, "PGCLIENTENCODING=UTF8"), d.dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Credential: d.owner.Credential()}
	out, err := cmd.Output()
	if err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		err = withStderr(err)
		if strings.Contains(err.Error(), fmt.Sprintf("role %q does not exist", d.User)) {
			err = fmt.Errorf("%w (--user names a superuser of the cluster)", err)
		}
		return err
	}
	return json.Unmarshal(out, answer)
}

const queryTimeout = 10 * time.Minute

// withStderr adds to a program's failure what it said, on one line.
func withStderr(err error) error {
	var exit *exec.ExitError
	if errors.As(err, &exit) && len(exit.Stderr) > 0 {
		return errors.New(printable(strings.Join(strings.Fields(string(exit.Stderr)), " ")))
	}
	return err
}

// logTail is the end of the server's log.
func (d *drill) logTail() []byte {
	const most = 64 << 10
	file, err := os.Open(filepath.Join(d.dir, logFile))
	if err != nil {
		return nil
	}
	defer func() { _ = file.Close() }() // it was only read
	info, err := file.Stat()
	if err != nil {
		return nil
	}
	begin := max(0, info.Size()-most)
	tail := make([]byte, info.Size()-begin)
	n, _ := file.ReadAt(tail, begin) // it grows meanwhile, and never shrinks
	return tail[:n]
}

const restoredLine = `LOG:  restored log file "`

// lastRestored is the last file that a log says was restored; "": none.
func lastRestored(log []byte) string {
	i := bytes.LastIndex(log, []byte(restoredLine))
	if i < 0 {
		return ""
	}
	name, _, _ := bytes.Cut(log[i+len(restoredLine):], []byte(`"`))
	return printable(string(name))
}

// decisive are the last lines of the server's log that are no routine, escaped.
func (d *drill) decisive() []string {
	const most = 12
	var lines []string
	for line := range strings.Lines(string(d.logTail())) {
		line = strings.TrimSuffix(line, "\n")
		if line != "" && !slices.ContainsFunc(routine, func(prefix string) bool { return strings.HasPrefix(line, "LOG:  "+prefix) }) {
			lines = append(lines, printable(line))
		}
	}
	return lines[max(0, len(lines)-most):]
}

// routine is how messages begin that explain nothing.
var routine = []string{
	"starting PostgreSQL", "listening on", "database system was ", "starting archive recovery", "starting point-in-time recovery",
	"skipping missing configuration file", "creating missing WAL directory", "starting backup recovery",
	"restored log file", "startup process (PID", "aborting startup due to", "shutting down", "database system is shut down",
	"terminating any other", "received immediate shutdown",
}

// reason is the message of a log that ended the server. What restore-wal said before it
// says more than the server, which knows its exit status alone.
func reason(lines []string) string {
	for i, line := range slices.Backward(lines) {
		for _, severity := range []string{"PANIC:  ", "FATAL:  "} {
			text, ok := strings.CutPrefix(line, severity)
			if !ok {
				continue
			}
			if i > 0 && strings.HasPrefix(text, "could not restore file") {
				if said, ok := strings.CutPrefix(lines[i-1], "walfleet: "); ok {
					return said
				}
			}
			return text
		}
	}
	return "the server ended"
}
