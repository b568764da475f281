package receiver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/wal"
)

// trouble is what an error means for a receiver.
type trouble struct {
	state State
	kind  string        // the same trouble again has the same kind
	class string        // one of FailureClasses
	pause time.Duration // until the next attempt; 0 in Backoff: exponential
	hint  string        // what a person can do
}

// historyError says that the server's history and the archive's do not fit. It
// needs a person.
type historyError struct{ reason string }

func (e *historyError) Error() string { return e.reason }

// gapError says that the server no longer has the WAL that comes next.
type gapError struct {
	tli  wal.Timeline
	next wal.LSN // inclusive: the end of what is archived
	to   wal.LSN // exclusive: from where on the server's slot has WAL; not above next when that is not known
	err  error
}

func (e *gapError) Error() string {
	missing := "on"
	if e.to > e.next {
		missing = fmt.Sprintf("to %s (%s)", e.to, megabytes(int64(e.to-e.next)))
	}
	return fmt.Sprintf("the server no longer has the WAL that comes next, timeline %d from %s %s: %v", e.tli, e.next, missing, e.err)
}
func (e *gapError) Unwrap() error { return e.err }

// strayHostError says that one of several hosts has other WAL than the archive:
// an old PolarDB primary that still runs, say, whose timeline is the new one's.
type strayHostError struct {
	host string
	err  error
}

func (e *strayHostError) Error() string {
	return fmt.Sprintf("%s is passed over, another host can be archived: %v", e.host, e.err)
}

// slotError says that the slot cannot be used as it is.
type slotError struct{ reason string }

func (e *slotError) Error() string { return e.reason }

// refusedError is a server that answers and is not to be archived now.
type refusedError struct{ reason string }

func (e *refusedError) Error() string { return e.reason }

// HostsError is what each of the hosts had to say, of which none could be archived.
type HostsError []error

func (e HostsError) Error() string {
	texts := make([]string, len(e))
	for i, err := range e {
		texts[i] = err.Error()
	}
	return strings.Join(texts, "; ")
}
func (e HostsError) Unwrap() []error { return e }

// errSilent is a server of which nothing was heard for receive_timeout.
var errSilent = errors.New("(receive_timeout)")

// panicError is a panic that was recovered.
type panicError struct{ value any }

func (e *panicError) Error() string { return fmt.Sprintf("internal error: panic: %v", e.value) }

// FailureClasses are what failures are counted by: what a person would look at first.
var FailureClasses = []string{"archive", "authentication", "disk", "internal", "limit", "network", "server", "slot", "tls"}

// A rule is a row of the table of troubles: errors, and what they mean.
type rule struct {
	kind  string // names the row and its trouble; where perCode is set, the SQLSTATE does
	class string // one of FailureClasses
	match func(error) bool
	state State
	pause time.Duration // 0: Backoff's own, blockedRetry, haltedRetry
	// hint is what a person can do, as far as it can be typed. {cluster}, {slot} and
	// {role} stand for the names.
	hint    string
	perCode bool
}

const (
	hintPerson = "is this the right server? An old primary that still runs, or a restored one, must not be archived into this directory"
	hintDisk   = "the disk does not do what it should: see the kernel's log (dmesg); nothing that it failed to write was acknowledged"
	hintPooler = "a pooler such as PgBouncer cannot pass on WAL: the conninfo must name the server itself"
	hintServer = "see the server's log"
	hintPath   = "correct archive_dir: each part of the path but the last must be an existing directory"
)

// rules are all troubles that there are. The first row that matches counts. Errors are told apart by
// type, errno and SQLSTATE (PostgreSQL's errcodes.txt), never by their texts.
var rules = []rule{
	// What the receiver itself found out.
	{kind: "aborted record", class: "archive", match: as[*archive.AbortedRecordError], state: Backoff, pause: atOnce},
	{kind: "gap recorded", class: "archive", match: is(errGapRecorded), state: Backoff, pause: atOnce},
	{kind: "gap", class: "archive", match: as[*gapError], state: Halted,
		hint: "no recovery can pass the missing WAL: run \"walfleet accept-gap {cluster}\" to write the gap down and go on behind it, then take a base backup; or move the cluster's directory away to begin a new archive"},
	{kind: "stray host", class: "server", match: as[*strayHostError], state: Backoff, pause: time.Second},
	{kind: "divergence", class: "archive", match: as[*archive.DivergenceError], state: Halted,
		hint: hintPerson + ". If it is, \"walfleet accept-divergence {cluster}\" keeps the archive's bytes aside and goes on with the server's; then take a base backup"},
	{kind: "history", class: "archive", match: as[*historyError], state: Halted, hint: hintPerson},
	{kind: "identity", class: "archive", match: as[*archive.IdentityError], state: Halted,
		hint: "another cluster answers at this address: correct the conninfo, or give the new cluster another name"},
	{kind: "file", class: "archive", match: as[*archive.FileError], state: Halted,
		hint: "look at the file that is named; move it out of the directory if it does not belong there"},
	{kind: "slot", class: "slot", match: as[*slotError], state: Halted},
	{kind: "unusable", class: "server", match: as[*pgrepl.UnusableError], state: Halted},
	{kind: "refused", class: "server", match: as[*refusedError], state: Backoff},
	{kind: "superseded", class: "server", match: is(errSuperseded), state: Backoff},
	{kind: "locked", class: "archive", match: is(archive.ErrLocked), state: Blocked,
		hint: "stop the other walfleet, or give this one another archive_dir"},
	{kind: "panic", class: "internal", match: as[*panicError], state: Backoff,
		hint: "report it, with the stack that was logged"},

	// Limits of this process come before all that they make fail.
	{kind: "descriptors", class: "limit", match: errnos(syscall.EMFILE, syscall.ENFILE), state: Backoff,
		hint: "too many files are open: raise LimitNOFILE in walfleet's unit (ulimit -n), or sysctl fs.file-max"},
	{kind: "password file", class: "authentication", match: as[*pgrepl.PasswordFileError], state: Halted,
		hint: "password_file must exist and be readable for the user that runs walfleet"},

	// What a server answers, by SQLSTATE.
	{kind: "no password", class: "authentication", match: is(pgrepl.ErrNoPassword), state: Halted,
		hint: "the server wants a password: set password_file, or add a line to the passfile (~/.pgpass, mode 0600)"},
	{kind: "08P01", class: "server", match: code("08P01"), state: Backoff, hint: hintPooler},
	{kind: "08", class: "server", match: class("08"), state: Backoff, hint: hintPooler, perCode: true},
	// READ_REPLICATION_SLOT of a logical slot (ReadReplicationSlot in walsender.c), for one.
	{kind: "0A", class: "slot", match: class("0A"), state: Halted, hint: "the slot must be a physical one, and the server one that streams WAL: give the cluster another slot", perCode: true},
	{kind: "22", class: "server", match: class("22"), state: Halted, hint: "the server does not take a value of the conninfo: look at options and application_name", perCode: true},
	{kind: pgrepl.CodeInvalidPassword, class: "authentication", match: code(pgrepl.CodeInvalidPassword), state: Halted,
		hint: "check the password in password_file, or in the conninfo's passfile; psql \"CONNINFO\" asks for another"},
	{kind: pgrepl.CodeInvalidAuth, class: "authentication", match: code(pgrepl.CodeInvalidAuth), state: Halted,
		hint: "the role must exist and may LOGIN, and pg_hba.conf needs a line such as: host replication {role} ADDRESS scram-sha-256; then SELECT pg_reload_conf()"},
	{kind: "28", class: "authentication", match: class("28"), state: Halted, hint: "the server lets nobody in like this: look at pg_hba.conf", perCode: true},
	{kind: "3D", class: "server", match: class("3D"), state: Halted, hint: hintPooler, perCode: true},
	{kind: pgrepl.CodeInsufficientRight, class: "authentication", match: code(pgrepl.CodeInsufficientRight), state: Halted,
		hint: "grant the right with: ALTER ROLE {role} REPLICATION"},
	{kind: pgrepl.CodeUndefinedObject, class: "slot", match: code(pgrepl.CodeUndefinedObject), state: Halted,
		hint: "the slot is gone, or the conninfo's options name a parameter that this server does not have"},
	{kind: pgrepl.CodeDuplicateObject, class: "slot", match: code(pgrepl.CodeDuplicateObject), state: Backoff}, // somebody else was faster
	{kind: "42", class: "server", match: class("42"), state: Halted,
		hint: "this does not answer as a PostgreSQL server does: " + hintPooler, perCode: true},
	{kind: "53100", class: "server", match: code("53100"), state: Backoff, hint: "the server's disk is full: make room there"},
	{kind: "53200", class: "server", match: code("53200"), state: Backoff, hint: "the server is out of memory: " + hintServer},
	{kind: pgrepl.CodeTooManyConns, class: "server", match: code(pgrepl.CodeTooManyConns), state: Backoff, // max_wal_senders too (InitWalSenderSlot)
		hint: "raise max_wal_senders or max_connections on the server (wal_level = minimal allows no walsender at all)"},
	{kind: "53400", class: "slot", match: code("53400"), state: Halted, // ReplicationSlotCreate
		hint: "all replication slots are in use: drop one with SELECT pg_drop_replication_slot('NAME'), or raise max_replication_slots on the server"},
	{kind: "53", class: "server", match: class("53"), state: Backoff, hint: "the server lacks something: " + hintServer, perCode: true},
	{kind: pgrepl.CodeObjectInUse, class: "slot", match: code(pgrepl.CodeObjectInUse), state: Blocked, // ReplicationSlotAcquire
		hint: "another receiver uses slot {slot}; stop it, or give this cluster a slot of its own"},
	{kind: pgrepl.CodeNotPrerequisite, class: "slot", match: code(pgrepl.CodeNotPrerequisite), state: Halted,
		hint: "the server needs wal_level = replica (or logical) and max_replication_slots above 0; a slot that was invalidated, or is a logical one, must be dropped: SELECT pg_drop_replication_slot('{slot}')"},
	{kind: "55P02", class: "server", match: code("55P02"), state: Halted, hint: "the conninfo's options set what cannot be set by a session"},
	{kind: "55", class: "server", match: class("55"), state: Backoff, perCode: true},
	{kind: "57014", class: "server", match: code("57014"), state: Backoff, hint: "the server gave up on a command: ALTER ROLE {role} SET statement_timeout = 0"},
	{kind: "57P01", class: "server", match: code("57P01"), state: Backoff}, // a shutdown, or pg_terminate_backend
	{kind: "57P02", class: "server", match: code("57P02"), state: Backoff, hint: "the server restarts after a crash: " + hintServer},
	{kind: "57P03", class: "server", match: code("57P03"), state: Backoff}, // starting up, shutting down, or in recovery
	{kind: "57P04", class: "server", match: code("57P04"), state: Backoff},
	{kind: "57P05", class: "server", match: code("57P05"), state: Backoff, hint: "the server ends idle sessions: ALTER ROLE {role} SET idle_session_timeout = 0"},
	{kind: "57", class: "server", match: class("57"), state: Backoff, perCode: true},
	{kind: "58030", class: "server", match: code("58030"), state: Backoff, hint: "the server cannot read or write its disk: " + hintServer},
	{kind: pgrepl.CodeUndefinedFile, class: "server", match: code(pgrepl.CodeUndefinedFile), state: Backoff, // WAL that is gone is a gap, above
		hint: "the server lacks a file; right after a promotion it may come: " + hintServer},
	{kind: "58", class: "server", match: class("58"), state: Backoff, hint: hintServer, perCode: true},
	{kind: "F0", class: "server", match: class("F0"), state: Backoff, hint: "the server's configuration files have a mistake: " + hintServer, perCode: true},
	{kind: "XX001", class: "server", match: code("XX001"), state: Backoff, hint: "the server says that its data is damaged: " + hintServer},
	{kind: "XX", class: "server", match: class("XX"), state: Backoff, hint: hintServer, perCode: true},
	{kind: "SQLSTATE", class: "server", match: as[*pgrepl.ServerError], state: Backoff, perCode: true},

	// TLS. A server that takes its plain connections back is as unfit as one with a wrong certificate.
	{kind: "no TLS", class: "tls", match: is(pgrepl.ErrNoTLS), state: Halted,
		hint: "set ssl = on and a certificate on the server, or another sslmode in the conninfo"},
	{kind: "unknown authority", class: "tls", match: as[x509.UnknownAuthorityError], state: Halted,
		hint: "sslrootcert in the conninfo must hold the certificate of the authority that signed the server's (sslrootcert=system: that of the operating system)"},
	{kind: "expired certificate", class: "tls", match: invalidCertificate(x509.Expired), state: Halted,
		hint: "renew the certificate that is named, and look at the clock here: timedatectl"},
	{kind: "host name", class: "tls", match: as[x509.HostnameError], state: Halted,
		hint: "the server's certificate is for another name: use that in the conninfo (with hostaddr for the address), or give the server a certificate for this one"},
	{kind: "revoked certificate", class: "tls", match: as[*pgrepl.RevokedError], state: Halted, hint: "give the server a new certificate"},
	{kind: "certificate", class: "tls", match: either(as[x509.CertificateInvalidError], as[*tls.CertificateVerificationError]), state: Halted,
		hint: "the server's certificate, or one that signed it, is not fit for this: openssl x509 -text shows it"},
	{kind: "no TLS answer", class: "tls", match: as[tls.RecordHeaderError], state: Backoff,
		hint: "what answers does not speak TLS: look at the port in the conninfo"},
	// An alert: the server does not take our certificate, or there is no version in common.
	{kind: "TLS alert", class: "tls", match: remoteAlert, state: Halted,
		hint: "the server ended the TLS handshake: look at sslcert, sslkey and ssl_min_protocol_version in the conninfo, and at the server's log"},

	// The network.
	{kind: "no such host", class: "network", match: dns(func(e *net.DNSError) bool { return e.IsNotFound }), state: Backoff,
		hint: "look at the host in the conninfo: getent hosts NAME"},
	{kind: "name server", class: "network", match: as[*net.DNSError], state: Backoff,
		hint: "the name servers do not answer: see /etc/resolv.conf"},
	{kind: "connection refused", class: "network", match: errnos(syscall.ECONNREFUSED), state: Backoff,
		hint: "nothing listens there: is the server running, and are port and listen_addresses right?"},
	{kind: "no socket", class: "network", match: onNetwork(syscall.ENOENT), state: Backoff,
		hint: "there is no such unix socket: is the server running, and are host (its unix_socket_directories) and port right?"},
	{kind: "network permission", class: "network", match: onNetwork(syscall.EACCES, syscall.EPERM), state: Backoff,
		hint: "the system does not allow the connection: a firewall here, or the unix socket's permissions"},
	{kind: "unreachable", class: "network", match: errnos(syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.ENETDOWN), state: Backoff,
		hint: "there is no way to the server: ip route get ADDRESS"},
	{kind: "no local address", class: "network", match: errnos(syscall.EADDRNOTAVAIL), state: Backoff,
		hint: "there is no address or port to connect from: is IPv6 off, or sysctl net.ipv4.ip_local_port_range used up?"},
	{kind: "silent", class: "network", match: is(errSilent), state: Backoff,
		hint: "the server, or something between, has stopped: compare receive_timeout with the server's wal_sender_timeout"},
	{kind: "timeout", class: "network", match: either(errnos(syscall.ETIMEDOUT), timedOut), state: Backoff,
		hint: "no answer: a firewall that drops packets, or a server that hangs"},
	{kind: "connection lost", class: "network", match: either(errnos(syscall.ECONNRESET, syscall.ECONNABORTED, syscall.EPIPE), is(io.EOF), is(io.ErrUnexpectedEOF), is(net.ErrClosed)),
		state: Backoff, hint: "the server, or something between, ended the connection: " + hintServer},
	{kind: "shutdown", class: "server", match: is(pgrepl.ErrShutdown), state: Backoff},
	{kind: "protocol", class: "server", match: as[*pgrepl.ProtocolError], state: Backoff,
		hint: "no PostgreSQL server sends this: is there something between?"},
	{kind: "corrupt WAL", class: "server", match: as[*wal.CorruptError], state: Backoff, hint: "the server's WAL does not hold together: " + hintServer},

	// The archive's file system.
	{kind: "disk full", class: "disk", match: errnos(syscall.ENOSPC, syscall.EDQUOT), state: Blocked,
		hint: "make room in archive_dir; nothing that was acknowledged is lost, and archiving goes on by itself"},
	{kind: "file size", class: "limit", match: errnos(syscall.EFBIG), state: Blocked,
		hint: "files may not get as large as a segment: raise LimitFSIZE in walfleet's unit (ulimit -f)"},
	{kind: "read-only", class: "disk", match: errnos(syscall.EROFS), state: Blocked,
		hint: "archive_dir is read-only: mount -o remount,rw it if that was meant, else see the kernel's log (dmesg); in a unit, ReadWritePaths must name it"},
	{kind: "permission", class: "disk", match: errnos(syscall.EACCES, syscall.EPERM), state: Blocked,
		hint: "the file or directory named must be accessible for the user that runs walfleet"},
	{kind: "disk error", class: "disk", match: either(errnos(syscall.EIO, syscall.ENXIO, syscall.ENODEV), damaged), state: Backoff, hint: hintDisk},
	{kind: "stale mount", class: "disk", match: errnos(syscall.ESTALE, syscall.ENOTCONN), state: Blocked, hint: "archive_dir's file server forgot it: mount it again"},
	{kind: "no locks", class: "disk", match: errnos(syscall.ENOLCK), state: Blocked, hint: "archive_dir's file system has no locks to give: over NFS, lockd must run"},
	{kind: "path", class: "disk", match: errnos(syscall.ENAMETOOLONG, syscall.ENOTDIR, syscall.EISDIR, syscall.ELOOP), state: Halted, hint: hintPath},
	{kind: "name taken", class: "disk", match: errnos(syscall.EEXIST), state: Backoff, hint: "a file has appeared that walfleet did not write; does somebody else write into the directory?"},
	{kind: "missing", class: "disk", match: errnos(syscall.ENOENT), state: Backoff, hint: "a file or directory of the archive was taken away: is archive_dir mounted?"},
	{kind: "memory", class: "limit", match: errnos(syscall.ENOMEM), state: Backoff, hint: "this machine is out of memory, or a limit of walfleet's unit is reached: MemoryMax"},

	{kind: "other", class: "internal", match: func(error) bool { return true }, state: Backoff},
}

// classify says what to do about an error that ended a session.
func classify(err error) trouble {
	var hosts HostsError
	if errors.As(err, &hosts) {
		return classifyHosts(hosts)
	}
	r := ruleFor(err)
	t := trouble{state: r.state, kind: r.kind, class: r.class, pause: r.pause, hint: r.hint}
	if r.perCode {
		t.kind = pgrepl.Code(err)
	}
	if t.pause == 0 {
		t.pause = map[State]time.Duration{Blocked: blockedRetry, Halted: haltedRetry}[r.state]
	}
	return t
}

func ruleFor(err error) rule {
	return rules[slices.IndexFunc(rules, func(r rule) bool { return r.match(err) })]
}

func is(target error) func(error) bool {
	return func(err error) bool { return errors.Is(err, target) }
}

func as[T error](err error) bool {
	var target T
	return errors.As(err, &target)
}

func either(matches ...func(error) bool) func(error) bool {
	return func(err error) bool {
		return slices.ContainsFunc(matches, func(m func(error) bool) bool { return m(err) })
	}
}

// code matches one SQLSTATE, and class all that begin with two characters.
func code(c string) func(error) bool {
	return func(err error) bool { return pgrepl.Code(err) == c }
}

func class(c string) func(error) bool {
	return func(err error) bool { return strings.HasPrefix(pgrepl.Code(err), c) }
}

func errnos(list ...syscall.Errno) func(error) bool {
	return func(err error) bool {
		return slices.ContainsFunc(list, func(e syscall.Errno) bool { return errors.Is(err, e) })
	}
}

// damaged matches EUCLEAN, a file system that needs fsck, which only Linux has.
func damaged(err error) bool {
	var e syscall.Errno
	return errors.As(err, &e) && unix.ErrnoName(e) == "EFSCORRUPTED" // its other name
}

// onNetwork matches what files can give too.
func onNetwork(list ...syscall.Errno) func(error) bool {
	return func(err error) bool {
		return (as[*pgrepl.ConnectError](err) || as[*net.OpError](err)) && errnos(list...)(err)
	}
}

func dns(f func(*net.DNSError) bool) func(error) bool {
	return func(err error) bool {
		var e *net.DNSError
		return errors.As(err, &e) && f(e)
	}
}

// timedOut matches a deadline, and a host that was not waited for once another one
// had answered.
func timedOut(err error) bool {
	var wait net.Error
	return errors.Is(err, context.DeadlineExceeded) || errors.Is(err, context.Canceled) || errors.As(err, &wait) && wait.Timeout()
}

func invalidCertificate(reason x509.InvalidReason) func(error) bool {
	return func(err error) bool {
		var e x509.CertificateInvalidError
		return errors.As(err, &e) && e.Reason == reason
	}
}

// remoteAlert matches an alert of the other side to a handshake; crypto/tls has no type for it. One
// that comes later ends a connection that was fine.
func remoteAlert(err error) bool {
	var e *net.OpError
	return as[*pgrepl.ConnectError](err) && errors.As(err, &e) && e.Op == "remote error"
}

// classifyHosts is the mildest trouble of several hosts: one that may come back
// by itself is waited for, whatever is wrong with the others.
func classifyHosts(hosts HostsError) trouble {
	rank := map[State]int{Backoff: 0, Blocked: 1, Halted: 2}
	mildest := trouble{state: Halted}
	for i, err := range hosts {
		if t := classify(err); i == 0 || rank[t.state] < rank[mildest.state] {
			mildest = t
		}
	}
	return mildest
}
