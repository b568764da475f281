package check

import (
	"cmp"
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgrepl"
)

// The names of the tests, in the order of the output.
const (
	testConfiguration  = "configuration"
	testConnection     = "connection"
	testTLS            = "tls"
	testAuthentication = "authentication"
	testHBA            = "pg_hba"
	testRight          = "replication right"
	testVersion        = "server version"
	testRole           = "role"
	testWALLevel       = "wal_level"
	testSenders        = "max_wal_senders"
	testSlots          = "max_replication_slots"
	testSlot           = "slot"
	testSlotKeep       = "max_slot_wal_keep_size"
	testSynchronous    = "synchronous standby"
	testClock          = "clock"
	testMonitor        = "monitor"
	testArchive        = "archive"
	testDirectory      = "directory"
	testSpace          = "free space"
	testTime           = "time to full"
)

const (
	// fewSegments is how many segments max_slot_wal_keep_size should allow at least: a
	// reconnect takes a while, and so does a new segment.
	fewSegments = 4
	// clockLimit is the difference between two clocks that is worth a word.
	clockLimit = 2 * time.Second
	// soonFull is when a disk is nearly full in time.
	soonFull = 24 * time.Hour
)

// judging collects a cluster's results.
type judging struct {
	*facts
	results []Result
}

func (j *judging) add(level Level, test, host, hint, format string, args ...any) {
	if len(j.hosts) < 2 {
		host = "" // there is no other one
	}
	j.results = append(j.results, Result{test, host, level, fmt.Sprintf(format, args...), hint})
}

func (j *judging) ok(test, host, format string, args ...any) {
	j.add(OK, test, host, "", format, args...)
}

func (j *judging) warn(test, host, hint, format string, args ...any) {
	j.add(Warning, test, host, hint, format, args...)
}

func (j *judging) fail(test, host, hint, format string, args ...any) {
	j.add(Failed, test, host, hint, format, args...)
}

// has tells whether there is a result of a test.
func (j *judging) has(test string) bool {
	return slices.ContainsFunc(j.results, func(r Result) bool { return r.Test == test })
}

// judge makes results of facts. disk is what the fleet does with the archive's file
// system.
func (f *facts) judge(disk diskUse) []Result {
	j := &judging{facts: f}
	if f.err != nil {
		j.fail(testConfiguration, "", "correct the cluster's conninfo in the configuration file", "%v", f.err)
	} else if f.warning != "" {
		j.warn(testConfiguration, "", "chmod 600 the passfile, which is not used as it is", "%s", f.warning)
	}
	chosen := f.chosen()
	for i := range f.hosts {
		h := &f.hosts[i]
		before := len(j.results)
		j.host(h)
		if chosen == nil || h == chosen {
			continue
		}
		for k := range j.results[before:] { // another one can be archived
			j.results[before+k].Level = min(j.results[before+k].Level, Warning)
		}
	}
	j.role(chosen)
	if chosen != nil {
		j.settings(chosen)
		for i := range f.hosts {
			if h := &f.hosts[i]; h.err == nil {
				j.slot(h, h == chosen)
			}
		}
		j.slotKeep(chosen)
		j.synchronous(chosen)
		j.clock(chosen)
	}
	j.monitor()
	j.archive()
	j.directory()
	j.space(disk)
	return j.results
}

// host judges how a host was reached, and as whom.
func (j *judging) host(h *host) {
	if h.err != nil && !h.connected {
		j.unreached(h)
		return
	}
	var unusable *pgrepl.UnusableError
	isUnusable := errors.As(h.err, &unusable)
	if h.err != nil && !isUnusable {
		j.fail(testConnection, h.name, "see the server's log", "%v", h.err)
	} else {
		j.ok(testConnection, h.name, "%s answers", h.name)
	}
	j.encryption(h)
	j.authentication(h)
	j.ok(testHBA, h.name, "role %s is admitted for replication", j.user)
	j.ok(testRight, h.name, "role %s has it", j.user)
	switch {
	case isUnusable:
		j.fail(testVersion, h.name, "archive this server with its own pg_receivewal, or upgrade it", "%v", unusable)
	case h.err != nil:
	case h.id.PolarDB != "":
		j.ok(testVersion, h.name, "PostgreSQL %s, PolarDB %s; segments of %s", h.id.Version, h.id.PolarDB, size(int64(h.id.SegmentSize)))
	default:
		j.ok(testVersion, h.name, "PostgreSQL %s; segments of %s", h.id.Version, size(int64(h.id.SegmentSize)))
	}
}

// unreached says what stood in the way of a connection, by the error's type and
// SQLSTATE. Tests that came before that one have passed.
func (j *judging) unreached(h *host) {
	line := h.hbaLine("replication", j.user) + "; and the role must exist"
	reached := func(test, hint string) {
		j.ok(testConnection, h.name, "%s answers", h.name)
		j.fail(test, h.name, hint, "%s", reason(h.err))
	}
	if errors.Is(h.err, pgrepl.ErrNoPassword) {
		reached(testAuthentication, "give a password: set password_file, or a line in ~/.pgpass: HOST:PORT:replication:"+j.user+":PASSWORD (mode 0600)")
		return
	}
	switch pgrepl.Code(h.err) {
	case pgrepl.CodeInvalidPassword:
		reached(testAuthentication, "correct the password in password_file, ~/.pgpass or the conninfo; or set it on the server: \\password "+j.user)
		return
	case pgrepl.CodeInvalidAuth:
		reached(testHBA, line)
		return
	case pgrepl.CodeInsufficientRight:
		reached(testRight, "on the server: ALTER ROLE "+j.user+" REPLICATION")
		return
	case pgrepl.CodeTooManyConns:
		reached(testSenders, "on the server: ALTER SYSTEM SET max_wal_senders = …, or max_connections; then restart it")
		return
	case "":
	default:
		j.fail(testConnection, h.name, "the server answers and does not take connections now: see its log", "%s", reason(h.err))
		return
	}
	var (
		dns      *net.DNSError
		path     *fs.PathError
		verify   *tls.CertificateVerificationError
		alert    tls.AlertError
		record   tls.RecordHeaderError
		unknown  x509.UnknownAuthorityError
		hostname x509.HostnameError
		netError net.Error
	)
	switch {
	case errors.As(h.err, &hostname):
		reached(testTLS, "connect by a name that the certificate has, or give the server one with this name")
	case errors.As(h.err, &unknown), errors.As(h.err, &verify):
		reached(testTLS, "name the file of the authority that signed the server's certificate: sslrootcert=FILE in the conninfo (sslrootcert=system for the system's)")
	case errors.As(h.err, &alert), errors.As(h.err, &record):
		reached(testTLS, "the server and the conninfo do not agree about TLS: see ssl on the server, sslmode, sslcert and sslkey in the conninfo")
	case errors.As(h.err, &path):
		j.fail(testAuthentication, h.name, "the file must be readable for the user that runs walfleet", "%s", reason(h.err))
	case errors.As(h.err, &dns):
		j.fail(testConnection, h.name, "correct the host in the conninfo, or the name server's entry", "%s", reason(h.err))
	case errors.Is(h.err, syscall.ECONNREFUSED):
		j.fail(testConnection, h.name, "start the server; if it runs, its listen_addresses and port must be those of the conninfo", "%s", reason(h.err))
	case errors.Is(h.err, context.DeadlineExceeded), errors.As(h.err, &netError) && netError.Timeout():
		j.fail(testConnection, h.name, "no answer: is the address right, and does a firewall let the port pass?", "%s", reason(h.err))
	default:
		j.fail(testConnection, h.name, "is the server up, and sslmode right for it? See its log", "%s", reason(h.err))
	}
}

// hbaLine is a hint to admit a role to a database, or for replication.
func (h *host) hbaLine(database, user string) string {
	kind, from := "hostssl", " ARCHIVE_HOST/32"
	switch {
	case h.socket:
		kind, from = "local", ""
	case h.sslMode == "disable", h.connected && h.tls == "":
		kind = "host"
	}
	return fmt.Sprintf("add to pg_hba.conf on the server: %s %s %s%s scram-sha-256; then SELECT pg_reload_conf()", kind, database, user, from)
}

// reason says why a connection failed: for each address what the server or the network
// said.
func reason(err error) string {
	var connect *pgrepl.ConnectError
	if !errors.As(err, &connect) {
		return err.Error()
	}
	var texts []string
	for _, a := range connect.Attempts {
		text := a.Err.Error()
		var op *net.OpError
		var server *pgrepl.ServerError
		switch {
		case errors.As(a.Err, &server):
			text = server.Error()
		case errors.As(a.Err, &op):
			text = op.Err.Error()
		}
		texts = append(texts, cmp.Or(a.Address, a.Host)+": "+text)
	}
	return strings.Join(texts, "; ")
}

// encryption judges what protects the connection.
func (j *judging) encryption(h *host) {
	const verify = "sslmode=verify-full and sslrootcert=FILE (or system) in the conninfo, ssl = on on the server"
	switch {
	case h.socket:
		j.ok(testTLS, h.name, "a unix socket needs none")
	case h.tls == "" && h.local:
		j.ok(testTLS, h.name, "not encrypted, and does not leave this machine")
	case h.tls == "":
		j.warn(testTLS, h.name, verify, "the connection is not encrypted (sslmode=%s): WAL is readable on its way", h.sslMode)
	case h.sslMode == "verify-full" || h.sslMode == "verify-ca" || h.local:
		j.ok(testTLS, h.name, "%s, sslmode=%s", h.tls, h.sslMode)
	case h.requires:
		j.warn(testTLS, h.name, verify, "%s, but with sslmode=%s nothing tells whose server it is", h.tls, h.sslMode)
	default:
		j.warn(testTLS, h.name, verify+"; or at least require_auth=scram-sha-256", "%s, but with sslmode=%s nothing tells whose server it is", h.tls, h.sslMode)
	}
}

// authentication judges how the server made sure who we are.
func (j *judging) authentication(h *host) {
	scram := "on the server: SET password_encryption = 'scram-sha-256'; \\password " + j.user + "; and scram-sha-256 in pg_hba.conf"
	switch h.auth {
	case pgrepl.AuthMD5:
		j.warn(testAuthentication, h.name, scram, "md5, which is weak and goes away with a later PostgreSQL")
	case pgrepl.AuthPassword:
		j.warn(testAuthentication, h.name, scram, "the password goes to the server as it is")
	case pgrepl.AuthNone:
		switch {
		case h.socket:
			j.ok(testAuthentication, h.name, "by the operating system's user, or trusted")
		case h.tls != "" && h.cert:
			j.ok(testAuthentication, h.name, "by certificate, or trusted")
		default:
			j.warn(testAuthentication, h.name, scram, "the server asks for no password (trust): whoever reaches it can copy the whole cluster")
		}
	default:
		j.ok(testAuthentication, h.name, "%s", h.auth)
	}
}

// role judges which of the hosts can be archived.
func (j *judging) role(chosen *host) {
	primaries := j.primaries()
	answered := 0
	for _, h := range j.hosts {
		if h.err == nil {
			answered++
		}
	}
	switch {
	case answered == 0:
		return
	case chosen == nil && len(primaries) == 0:
		j.fail(testRole, "", `put the primary into the conninfo as well; or set source = "any" to archive a standby`, "no host is a primary")
	case chosen == nil:
		return // of another cluster: see the archive
	case len(primaries) > 1:
		j.warn(testRole, "", "stop the old primary; walfleet archives the one with the newest timeline", "more than one host says it is the primary: %s", strings.Join(primaries, ", "))
	case chosen.id.InRecovery:
		j.ok(testRole, "", `%s is a standby, timeline %d; source = "any"`, chosen.name, chosen.id.Timeline)
	default:
		j.ok(testRole, "", "%s is the primary, timeline %d", chosen.name, chosen.id.Timeline)
	}
}

// settings judges what the server that is archived must allow.
func (j *judging) settings(h *host) {
	if h.settingsErr != nil {
		j.fail(testWALLevel, "", "see the server's log", "the server's settings cannot be read: %v", h.settingsErr)
		return
	}
	s := h.settings
	if s.WALLevel == "replica" || s.WALLevel == "logical" {
		j.ok(testWALLevel, "", "%s", s.WALLevel)
	} else {
		j.fail(testWALLevel, "", "on the server: ALTER SYSTEM SET wal_level = replica; then restart it", "%s", s.WALLevel)
	}

	ours := h.watch.ActivePID != 0
	left := s.MaxWALSenders - h.use.Senders
	raise := "on the server: ALTER SYSTEM SET max_wal_senders = %d; then restart it"
	switch {
	case h.sqlErr != nil:
		j.ok(testSenders, "", "%d; how many are in use is not known", s.MaxWALSenders)
	case left <= 0 && !ours:
		j.fail(testSenders, "", fmt.Sprintf(raise, s.MaxWALSenders+4), "all %d are in use", s.MaxWALSenders)
	case left <= 0:
		j.warn(testSenders, "", fmt.Sprintf(raise, s.MaxWALSenders+4), "all %d are in use, the archive's among them: a reconnect may find none", s.MaxWALSenders)
	default:
		j.ok(testSenders, "", "%d of %d are free", left, s.MaxWALSenders)
	}

	left = s.MaxSlots - h.use.Slots
	switch {
	case h.sqlErr != nil:
		j.ok(testSlots, "", "%d; how many are in use is not known", s.MaxSlots)
	case left <= 0 && !h.watch.Exists:
		j.fail(testSlots, "", fmt.Sprintf("on the server: ALTER SYSTEM SET max_replication_slots = %d; then restart it. Or drop a slot that nobody needs: SELECT slot_name, active, restart_lsn FROM pg_replication_slots", s.MaxSlots+4), "all %d are in use", s.MaxSlots)
	default:
		j.ok(testSlots, "", "%d of %d are free", max(left, 0), s.MaxSlots)
	}
}

// slot judges our slot on a host; archived is the one that the archive comes from.
func (j *judging) slot(h *host, archived bool) {
	name, w := j.cfg.Slot, h.watch
	drop := fmt.Sprintf("SELECT pg_drop_replication_slot('%s')", name)
	if h.watchErr != nil {
		if archived {
			j.warn(testSlot, h.name, "let the role connect to a database as well; see monitor", "nothing is known of slot %q: %v", name, h.watchErr)
		}
		return
	}
	if !archived {
		j.otherSlot(h, drop)
		return
	}
	create := fmt.Sprintf("SELECT pg_create_physical_replication_slot('%s', true)", name)
	switch {
	case !w.Exists && !j.cfg.CreateSlot:
		j.fail(testSlot, h.name, "on the server: "+create, "slot %q does not exist, and create_slot is false", name)
	case !w.Exists && j.dir.holdings.Timeline != 0:
		j.warn(testSlot, h.name, "start walfleet soon, which makes it again; until then: "+create, "slot %q does not exist, and nothing keeps the WAL that the archive needs next", name)
	case !w.Exists:
		j.ok(testSlot, h.name, "slot %q does not exist yet; walfleet run makes it", name)
	case w.Logical:
		j.fail(testSlot, h.name, `set slot to another name for this cluster`, "slot %q is a logical one", name)
	case w.Lost():
		reason := w.Invalid
		if reason == "" {
			reason = "wal_status is lost"
		}
		j.fail(testSlot, h.name, "on the server: "+drop+"; walfleet makes it again. If WAL is missing then: walfleet accept-gap "+j.cfg.Name+", and take a base backup", "slot %q was invalidated (%s): it retains no WAL", name, reason)
	case w.Status == "unreserved":
		j.warn(testSlot, h.name, "on the server, now: ALTER SYSTEM SET max_slot_wal_keep_size = '…'; SELECT pg_reload_conf()", "slot %q is about to be invalidated: it retains %s, and the next checkpoint may remove that", name, size(w.Retained))
	case j.cfg.MaxSlotRetained > 0 && w.Retained > j.cfg.MaxSlotRetained:
		j.warn(testSlot, h.name, "see why the archive is behind: walfleet status "+j.cfg.Name, "slot %q retains %s of WAL, more than max_slot_retained = %s", name, size(w.Retained), size(j.cfg.MaxSlotRetained))
	default:
		use := "in use"
		if w.ActivePID == 0 {
			use = "not in use"
			if h.sqlErr != nil {
				use = "whether it is in use is not known"
			}
		}
		safe := ""
		if w.SafeWALSize >= 0 {
			safe = ", safe for another " + size(w.SafeWALSize)
		}
		status := ""
		if w.Status != "" {
			status = " (" + w.Status + safe + ")"
		}
		j.ok(testSlot, h.name, "%s, retains %s%s", use, size(w.Retained), status)
	}
}

// otherSlot judges our slot on a host that is not archived: what an earlier failover
// left behind.
func (j *judging) otherSlot(h *host, drop string) {
	w := h.watch
	few := 2 * int64(h.id.SegmentSize)
	switch {
	case !w.Exists || w.Lost():
		return
	case w.ActivePID == 0 && w.Retained > few, j.cfg.MaxSlotRetained > 0 && w.Retained > j.cfg.MaxSlotRetained:
		j.warn(testSlot, h.name, "if this host is not to be archived again soon, there: "+drop, "slot %q retains %s of WAL on a host that is not archived", j.cfg.Slot, size(w.Retained))
	default:
		j.ok(testSlot, h.name, "retains %s", size(w.Retained))
	}
}

// slotKeep judges how much WAL the server lets a slot retain.
func (j *judging) slotKeep(h *host) {
	if h.settingsErr != nil {
		return
	}
	keep, segment := h.settings.MaxSlotKeep, int64(h.id.SegmentSize)
	hint := fmt.Sprintf("on the server: ALTER SYSTEM SET max_slot_wal_keep_size = '%dMB' or more; SELECT pg_reload_conf()", max(fewSegments*segment, 1<<30)>>20)
	switch {
	case keep < 0:
		j.ok(testSlotKeep, "", "no limit: WAL is kept until it is archived, whatever room that takes on the server")
	case keep < segment:
		j.fail(testSlotKeep, "", hint, "%s is less than one segment (%s): the slot is lost at any checkpoint", size(keep), size(segment))
	case keep < fewSegments*segment:
		j.warn(testSlotKeep, "", hint, "%s is only %d segments of %s: the slot is lost when the archive is away for long", size(keep), keep/segment, size(segment))
	default:
		j.ok(testSlotKeep, "", "%s, %d segments", size(keep), keep/segment)
	}
}

// synchronous judges whether commits wait for this archive, and whether they may.
func (j *judging) synchronous(h *host) {
	if h.settingsErr != nil {
		return
	}
	s := h.settings
	names, err := parseSyncNames(s.SyncNames)
	if err != nil {
		j.warn(testSynchronous, "", "SHOW synchronous_standby_names on the server", "%v: %q", err, s.SyncNames)
		return
	}
	if len(names.names) == 0 {
		j.ok(testSynchronous, "", "commits wait for no standby")
		return
	}
	place := names.place(j.app)
	remoteApply := s.SyncCommit == "remote_apply" || h.use.RemoteApply
	setOn := "on the server: ALTER SYSTEM SET synchronous_commit = 'on'; SELECT pg_reload_conf(); and look for ALTER ROLE or DATABASE … SET synchronous_commit (\\drds)"
	switch {
	case place < 0 && h.sqlErr == nil && !h.use.Hidden && h.use.SyncSenders > 0:
		j.ok(testSynchronous, "", "commits wait for others, not for %q", j.app)
	case place < 0:
		j.warn(testSynchronous, "", fmt.Sprintf("if they should: on the server: ALTER SYSTEM SET synchronous_standby_names = '\"%s\"'; or set application_name in the configuration file", j.app),
			"commits do not wait for %q, which synchronous_standby_names = %q does not name, and no other standby is known that they wait for", j.app, s.SyncNames)
	case remoteApply && names.needs(place):
		j.fail(testSynchronous, "", setOn, "commits wait for %q, and with synchronous_commit = remote_apply for ever: an archive applies nothing", j.app)
	case remoteApply:
		j.warn(testSynchronous, "", setOn, "commits would wait for %q for ever once another standby is gone: synchronous_commit is remote_apply, and an archive applies nothing", j.app)
	case s.SyncCommit == "off" || s.SyncCommit == "local":
		j.warn(testSynchronous, "", setOn, "synchronous_standby_names has %q, but with synchronous_commit = %s commits wait for no standby", j.app, s.SyncCommit)
	case !j.cfg.Synchronous:
		j.warn(testSynchronous, "", "set synchronous = true for this cluster in the configuration file", "commits wait for %q, which with synchronous = false is up to flush_interval = %s", j.app, j.cfg.FlushInterval)
	case h.watch.SyncState != "":
		j.ok(testSynchronous, "", "commits wait for %q, which is %s now", j.app, h.watch.SyncState)
	default:
		j.ok(testSynchronous, "", "commits wait for %q", j.app)
	}
}

func (j *judging) clock(h *host) {
	if h.sqlErr != nil {
		return
	}
	off := h.use.ClockAhead.Abs()
	which := "ahead of"
	if h.use.ClockAhead < 0 {
		which = "behind"
	}
	if off-h.use.ClockError > clockLimit {
		j.warn(testClock, "", "run a time service (chrony, systemd-timesyncd) on both machines", "the server's clock is %s %s this machine's: times in logs and lags do not fit together", off.Round(100*time.Millisecond), which)
		return
	}
	j.ok(testClock, "", "within %s of the server's", max(off+h.use.ClockError, time.Millisecond).Round(time.Millisecond))
}

// monitor judges whether the monitor sees all that it could.
func (j *judging) monitor() {
	if !j.cfg.Monitor {
		return
	}
	for i := range j.hosts {
		h := &j.hosts[i]
		switch {
		case h.err != nil:
		case pgrepl.Code(h.sqlErr) == pgrepl.CodeInsufficientRight:
			j.warn(testMonitor, h.name, fmt.Sprintf("on the server: GRANT CONNECT ON DATABASE %s TO %s; GRANT pg_monitor TO %s. Or set monitor = false", h.database, j.user, j.user), "the role may not ask: %s", reason(h.sqlErr))
		case h.sqlErr != nil:
			j.warn(testMonitor, h.name, h.hbaLine(h.database, j.user)+". Or set monitor = false",
				"wal_status and sync_state cannot be watched: %s", reason(h.sqlErr))
		case h.use.Hidden:
			j.warn(testMonitor, h.name, "on the server: GRANT pg_monitor TO "+j.user, "role %s does not see whether commits wait for the archive", j.user)
		default:
			j.ok(testMonitor, h.name, "role %s sees all", j.user)
		}
	}
}

// archive judges whether the directory's archive is of this cluster.
func (j *judging) archive() {
	d := j.dir
	if d.err != nil || !d.exists && len(j.hosts) == 0 {
		return
	}
	if d.damaged != nil {
		j.fail(testArchive, "", "see docs/archive-format.md", "%v", d.damaged)
		return
	}
	have := d.holdings.Identity
	if have == (archive.Identity{}) {
		j.ok(testArchive, "", "nothing is archived yet")
		return
	}
	for _, h := range j.hosts {
		if h.err != nil {
			continue
		}
		server := archive.Identity{SystemID: h.id.SystemID, SegmentSize: h.id.SegmentSize}
		if have == server {
			continue
		}
		add := j.fail
		if j.chosen() != nil {
			add = j.warn
		}
		add(testArchive, h.name, "correct the conninfo, or give the new cluster another name in the configuration file", "%s is of the cluster with system identifier %d and segments of %s, the server %s has %d and %s",
			d.path, have.SystemID, size(int64(have.SegmentSize)), h.name, server.SystemID, size(int64(server.SegmentSize)))
	}
	h := j.chosen()
	switch {
	case h == nil:
		if !j.has(testArchive) {
			j.ok(testArchive, "", "of the cluster with system identifier %d, %d complete segments", have.SystemID, d.holdings.Segments)
		}
	case d.holdings.Timeline > h.id.Timeline:
		j.fail(testArchive, "", "connect to the primary: this may be an old one, or one that was restored", "the archive is on timeline %d, the server on %d", d.holdings.Timeline, h.id.Timeline)
	case d.holdings.Last.Timeline == h.id.Timeline && d.holdings.Sealed() > h.id.XLogPos && h.id.SegmentSize.Start(h.id.XLogPos) < d.holdings.Last.Start:
		j.fail(testArchive, "", "is this the right server? An old primary, or a restored one, must not be archived here", "the archive reaches %s, the server only %s", d.holdings.Sealed(), h.id.XLogPos)
	case len(d.holdings.Gaps) > 0:
		gap := d.holdings.Gaps[len(d.holdings.Gaps)-1]
		j.ok(testArchive, "", "of this cluster (system identifier %d); %d accepted gaps, the last one up to %s: base backups must be younger", have.SystemID, len(d.holdings.Gaps), gap.To)
	default:
		j.ok(testArchive, "", "of this cluster (system identifier %d), %d complete segments", have.SystemID, d.holdings.Segments)
	}
}

// directory judges who may do what with the archive's directory.
func (j *judging) directory() {
	d := j.dir
	switch {
	case errors.Is(d.err, fs.ErrPermission):
		j.fail(testDirectory, "", "run this as the user that runs walfleet, which must be able to read and write there", "%v", d.err)
	case d.err != nil:
		j.fail(testDirectory, "", "is archive_dir right, and its file system mounted?", "%v", d.err)
	case !d.writable:
		j.fail(testDirectory, "", "chown it to the user that runs walfleet (and run this as that user)", "%s is not writable", d.parent)
	case !d.exists:
		j.ok(testDirectory, "", "%s does not exist yet; walfleet run makes it", d.path)
	case d.mode&0o007 != 0:
		j.warn(testDirectory, "", "chmod o= "+d.path, "%s has mode %04o: every user of this machine gets at the WAL", d.path, d.mode.Perm())
	default:
		j.ok(testDirectory, "", "%s, mode %04o", d.path, d.mode.Perm())
	}
}

// space judges the room that is left, for this cluster and for all that fill the same
// file system.
func (j *judging) space(disk diskUse) {
	d := j.dir
	if d.err != nil {
		return
	}
	reserve := max(j.cfg.MinFree, 0)
	own := j.segmentSize()
	hint := "make room on the file system of " + d.parent + ", or lower min_free"
	switch {
	case d.free < reserve:
		j.fail(testSpace, "", hint, "%s is free, less than min_free = %s: the cluster is blocked", size(d.free), size(reserve))
	case d.free < reserve+own:
		j.fail(testSpace, "", hint, "%s is free, and the next segment needs %s above min_free = %s", size(d.free), size(own), size(reserve))
	case d.free < reserve+disk.next:
		j.warn(testSpace, "", hint, "%s is free; min_free = %s and the next segments of the %d clusters on this file system (%s) do not fit together", size(d.free), size(reserve), disk.clusters, size(disk.next))
	default:
		j.ok(testSpace, "", "%s of %s is free; min_free = %s, and %s for the next segments of %d clusters", size(d.free), size(d.total), size(reserve), size(disk.next), disk.clusters)
	}
	if disk.rate <= 0 {
		j.ok(testTime, "", "not known: nothing was archived lately, or not for long enough")
		return
	}
	left := time.Duration(max(0, float64(d.free-reserve)/disk.rate)) * time.Second
	if seconds := float64(d.free-reserve) / disk.rate; seconds > 1e9 {
		left = 1e9 * time.Second // 30 years
	}
	if left < soonFull {
		j.warn(testTime, "", "make room, or see docs/operations.md on pruning", "full in %s at the rate of the last day, %s an hour in all archives on this file system", roughly(left), size(int64(disk.rate*3600)))
		return
	}
	j.ok(testTime, "", "%s at the rate of the last day, %s an hour in all archives on this file system", roughly(left), size(int64(disk.rate*3600)))
}

// roughly is a duration in its largest unit.
func roughly(d time.Duration) string {
	switch {
	case d >= 2*365*24*time.Hour:
		return "more than 2 years"
	case d >= 48*time.Hour:
		return fmt.Sprintf("%d days", int(d.Hours()/24))
	case d >= 2*time.Hour:
		return fmt.Sprintf("%d hours", int(d.Hours()))
	}
	return fmt.Sprintf("%d minutes", int(d.Minutes()))
}

// size is a number of bytes with a unit of 1024.
func size(n int64) string {
	for _, unit := range []struct {
		name  string
		bytes int64
	}{{"TB", 1 << 40}, {"GB", 1 << 30}, {"MB", 1 << 20}, {"kB", 1 << 10}} {
		if n >= unit.bytes {
			s := fmt.Sprintf("%.1f", float64(n)/float64(unit.bytes))
			return strings.TrimSuffix(s, ".0") + " " + unit.name
		}
	}
	return fmt.Sprintf("%d bytes", n)
}
