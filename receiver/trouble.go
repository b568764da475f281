package receiver

import (
	"errors"
	"fmt"
	"strings"
	"syscall"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/wal"
)

// trouble is what an error means for a receiver.
type trouble struct {
	state State
	kind  string        // the same trouble again has the same kind
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

// codes says what SQLSTATEs mean. What is not here is transient.
var codes = map[string]trouble{
	pgrepl.CodeObjectInUse: {state: Blocked, pause: blockedRetry,
		hint: "another receiver uses the slot; stop it, or give this cluster a slot of its own"},
	pgrepl.CodeInvalidPassword: {state: Halted, pause: haltedRetry,
		hint: "check the password in the conninfo's passfile or password_file"},
	pgrepl.CodeInvalidAuth: {state: Halted, pause: haltedRetry,
		hint: "the role must exist, and pg_hba.conf needs a line such as: host replication ROLE ADDRESS scram-sha-256"},
	pgrepl.CodeInsufficientRight: {state: Halted, pause: haltedRetry,
		hint: "grant the right with: ALTER ROLE … REPLICATION"},
	pgrepl.CodeNotPrerequisite: {state: Halted, pause: haltedRetry,
		hint: "the server needs wal_level = replica (or logical) and max_replication_slots above 0; a slot that was invalidated must be dropped"},
	pgrepl.CodeTooManyConns: {state: Backoff,
		hint: "raise max_wal_senders or max_connections on the server (wal_level = minimal allows no walsender at all)"},
}

// classify says what to do about an error that ended a session.
func classify(err error) trouble {
	var hosts HostsError
	if errors.As(err, &hosts) {
		return classifyHosts(hosts)
	}
	var (
		aborted  *archive.AbortedRecordError
		identity *archive.IdentityError
		diverged *archive.DivergenceError
		file     *archive.FileError
		history  *historyError
		gap      *gapError
		stray    *strayHostError
		slot     *slotError
		refused  *refusedError
		unusable *pgrepl.UnusableError
		errno    syscall.Errno
	)
	halted := func(kind, hint string) trouble { return trouble{Halted, kind, haltedRetry, hint} }
	switch {
	case errors.As(err, &aborted):
		return trouble{Backoff, "aborted record", atOnce, ""}
	case errors.Is(err, errGapRecorded):
		return trouble{Backoff, "gap recorded", atOnce, ""}
	case errors.As(err, &gap):
		return halted("gap", "no recovery can pass the missing WAL: run \"walfleet accept-gap CLUSTER\" to write the gap down and go on behind it, then take a base backup; or move the cluster's directory away to begin a new archive")
	case errors.As(err, &stray):
		return trouble{Backoff, "stray host", time.Second, ""}
	case errors.As(err, &diverged):
		return halted("divergence", "is this the right server? An old primary that still runs, or a restored one, must not be archived into this directory. "+
			"If it is, \"walfleet accept-divergence CLUSTER\" keeps the archive's bytes aside and goes on with the server's; then take a base backup")
	case errors.As(err, &history):
		return halted("history", "is this the right server? An old primary that still runs, or a restored one, must not be archived into this directory")
	case errors.As(err, &identity):
		return halted("identity", "another cluster answers at this address: correct the conninfo, or give the new cluster another name")
	case errors.As(err, &file):
		return halted("file", "")
	case errors.As(err, &slot):
		return halted("slot", "")
	case errors.As(err, &unusable):
		return halted("unusable", "")
	case errors.As(err, &refused), errors.Is(err, errSuperseded):
		return trouble{Backoff, "refused", 0, ""}
	case errors.Is(err, archive.ErrLocked):
		return trouble{Blocked, "locked", blockedRetry, "stop the other walfleet, or give this one another archive_dir"}
	}
	if code := pgrepl.Code(err); code != "" {
		t, ok := codes[code]
		if !ok {
			t = trouble{state: Backoff}
		}
		t.kind = code
		return t
	}
	if errors.As(err, &errno) {
		switch errno {
		case syscall.ENOSPC, syscall.EDQUOT:
			return trouble{Blocked, "disk full", blockedRetry, "make room in archive_dir; nothing that was acknowledged is lost, and archiving goes on by itself"}
		case syscall.EACCES, syscall.EPERM, syscall.EROFS:
			return trouble{Blocked, "permission", blockedRetry, "the file or directory named must be accessible for the user that runs walfleet"}
		case syscall.EIO:
			return trouble{Backoff, "disk error", 0, "the disk does not do what it should: see the kernel's log; nothing that it failed to write was acknowledged"}
		}
	}
	return trouble{Backoff, "connection", 0, ""}
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
