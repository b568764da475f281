package pgrepl

import (
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"
	"unicode"

	"github.com/jackc/pgx/v5/pgconn"
)

// SQLSTATEs that decide what a receiver does next (errcodes.txt).
const (
	CodeDuplicateObject   = "42710" // the slot exists already
	CodeUndefinedObject   = "42704" // no such slot, or no such parameter
	CodeObjectInUse       = "55006" // the slot is active for another walsender
	CodeUndefinedFile     = "58P01" // the requested WAL segment has been removed
	CodeInsufficientRight = "42501" // the role may not do this
	CodeInvalidPassword   = "28P01"
	CodeInvalidAuth       = "28000" // no pg_hba.conf entry, no such role, …
	CodeUndefinedDatabase = "3D000"
	CodeTooManyConns      = "53300" // also: max_wal_senders reached
	CodeNotPrerequisite   = "55000" // e.g. a slot needs wal_level >= replica
)

// ErrNoTLS says that a server has no TLS, and that the conninfo's sslmode wants it.
var ErrNoTLS = errors.New("the server does not support TLS, which sslmode asks for")

// refusedTLS is pgconn's text for a server that answers an SSLRequest with no; there is no
// type for it.
const refusedTLS = "server refused TLS connection"

// PasswordFileError is a password_file that cannot be read.
type PasswordFileError struct{ err error }

func (e *PasswordFileError) Error() string { return "password_file: " + e.err.Error() }
func (e *PasswordFileError) Unwrap() error { return e.err }

// RevokedError is a server's certificate that sslcrl revokes.
type RevokedError struct{ reason string }

func (e *RevokedError) Error() string { return e.reason }

// Receiving is what is being done when an error ends a stream.
const Receiving = "receiving"

// ErrNoPassword says that a server wanted a password, and neither the conninfo nor
// what it stands for had one.
var ErrNoPassword = errors.New("no password was supplied")

// ConnectError is a host that could not be connected to.
type ConnectError struct {
	Host     string    // "host:port"
	Attempts []Attempt // at least one
	err      error
}

// Attempt is one address of a host that was tried, or the name that has none.
type Attempt struct {
	Host    string // as the conninfo has it: a name, an address, or a socket's directory
	Address string // "address:port", or a socket's path; "": Host could not be looked up
	Err     error  // a ServerError, ErrNoPassword, or what the network said
}

func (e *ConnectError) Error() string { return e.err.Error() }

// Unwrap gives all causes.
func (e *ConnectError) Unwrap() []error {
	causes := []error{e.err}
	for _, a := range e.Attempts {
		causes = append(causes, a.Err)
	}
	return causes
}

// connectError takes pgconn's error apart. dialled are the addresses that were
// tried, in order. An address that was tried again without TLS, as sslmode=prefer
// does, failed for the last reason, and for what the server said before.
func (c *Conninfo) connectError(host string, dialled []string, password string, err error) *ConnectError {
	e := &ConnectError{Host: host, err: wrap("connecting to "+host, err)}
	causes := []error{err}
	if joined := (interface{ Unwrap() []error })(nil); errors.As(err, &joined) {
		causes = joined.Unwrap()
	}
	name, _, _ := splitHostPort(host)
	unresolved := max(0, len(causes)-len(dialled))
	for i, cause := range causes {
		a := Attempt{Host: name, Err: &shown{clean(cause.Error()), cause}}
		if i >= unresolved {
			a.Address = dialled[i-unresolved]
			if inner := errors.Unwrap(cause); inner != nil { // without the address
				a.Err = &shown{clean(inner.Error()), cause}
			}
		}
		if inner := innermost(cause); inner.Error() == refusedTLS {
			a.Err = ErrNoTLS
		}
		if pe := (*pgconn.PgError)(nil); errors.As(cause, &pe) {
			a.Err = &ServerError{"connecting to " + host, pe.Severity, pe.Code, pe.Message, pe.Detail, pe.Hint}
			if pe.Code == CodeInvalidPassword && password == "" {
				a.Err = errors.Join(ErrNoPassword, a.Err)
				if c.warning != "" {
					e.err = fmt.Errorf("%w (%s)", e.err, c.warning)
				}
			}
		}
		again := slices.IndexFunc(e.Attempts, func(b Attempt) bool { return b.Address == a.Address && Code(b.Err) == "" })
		if again >= 0 {
			e.Attempts[again] = a
			continue
		}
		e.Attempts = append(e.Attempts, a)
	}
	return e
}

// innermost is the end of err's chain.
func innermost(err error) error {
	for next := err; next != nil; next = errors.Unwrap(err) {
		err = next
	}
	return err
}

// ServerError is an error that the server reported. Its texts came over the
// network and are escaped before they are shown.
type ServerError struct {
	Doing                                 string // the command that it answers, or Receiving, or what else was being done
	Severity, Code, Message, Detail, Hint string
}

func (e *ServerError) Error() string {
	s := fmt.Sprintf("%s: %s (SQLSTATE %s)", clean(e.Severity), clean(e.Message), clean(e.Code))
	if e.Detail != "" {
		s += ", detail: " + clean(e.Detail)
	}
	if e.Hint != "" {
		s += ", hint: " + clean(e.Hint)
	}
	return s
}

// Lines is the error as psql shows it, with a detail and a hint in lines of their own.
func (e *ServerError) Lines() string {
	s := clean(e.Severity) + ":  " + clean(e.Message)
	if e.Detail != "" {
		s += "\nDETAIL:  " + clean(e.Detail)
	}
	if e.Hint != "" {
		s += "\nHINT:  " + clean(e.Hint)
	}
	return s
}

// Code returns the SQLSTATE of a ServerError in err's chain, or "".
func Code(err error) string {
	var se *ServerError
	if errors.As(err, &se) {
		return se.Code
	}
	return ""
}

// ProtocolError is a message that no PostgreSQL server would send.
type ProtocolError struct{ Reason string }

func (e *ProtocolError) Error() string { return "protocol error: " + e.Reason }

func protocolErrorf(format string, args ...any) error {
	return &ProtocolError{Reason: fmt.Sprintf(format, args...)}
}

// shown is an error whose text is safe to print, with its chain kept.
type shown struct {
	text string
	err  error
}

func (e *shown) Error() string { return e.text }
func (e *shown) Unwrap() error { return e.err }

// wrap says what was being done, and turns pgconn's errors into ours.
func wrap(doing string, err error) error {
	if err == nil {
		return nil
	}
	var pe *pgconn.PgError
	if errors.As(err, &pe) {
		return fmt.Errorf("%s: %w", doing, &ServerError{doing, pe.Severity, pe.Code, pe.Message, pe.Detail, pe.Hint})
	}
	return &shown{text: doing + ": " + clean(err.Error()), err: err}
}

// clean makes text that came from outside fit for one line of a log or a
// terminal: control and other unprintable characters are escaped, and very long
// texts are cut.
func clean(s string) string {
	const limit = 2000
	if len(s) > limit {
		s = s[:limit] + "…"
	}
	s = strings.ToValidUTF8(s, "\uFFFD")
	if !strings.ContainsFunc(s, func(r rune) bool { return !unicode.IsPrint(r) }) {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if unicode.IsPrint(r) {
			b.WriteRune(r)
			continue
		}
		if r == '\n' { // multi-line texts of servers and joined errors
			b.WriteString("; ")
			continue
		}
		q := strconv.QuoteRune(r)
		b.WriteString(q[1 : len(q)-1])
	}
	return b.String()
}
