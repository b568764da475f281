package pgrepl

import (
	"errors"
	"fmt"
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
	CodeTooManyConns      = "53300" // also: max_wal_senders reached
	CodeNotPrerequisite   = "55000" // e.g. a slot needs wal_level >= replica
)

// ServerError is an error that the server reported. Its texts came over the
// network and are escaped before they are shown.
type ServerError struct {
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
		return fmt.Errorf("%s: %w", doing, &ServerError{pe.Severity, pe.Code, pe.Message, pe.Detail, pe.Hint})
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
