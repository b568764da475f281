package receivewal

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"net"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"unicode"
	"unicode/utf8"

	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/receiver"
)

// program is the name that messages begin with, whatever the binary is called:
// scripts look for it.
const program = "pg_receivewal"

// messages prints what pg_receivewal would, in its words where it has some. It is
// the slog.Handler of the receiver, whose events become such lines.
type messages struct {
	verbose int // as often as --verbose was given

	// Of the connection under way.
	begins, streams bool   // it has not begun to stream yet; it has
	stopped         string // what --verbose said about the end

	mu    sync.Mutex
	out   io.Writer
	shown bool // a line that show has left open
}

// eraseLine returns to the beginning of a terminal's line and empties it.
const eraseLine = "\r\x1b[K"

func (m *messages) print(format string, args ...any) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.shown {
		fmt.Fprint(m.out, eraseLine)
		m.shown = false
	}
	fmt.Fprintf(m.out, program+": "+format+"\n", args...)
}

// show puts a line on the terminal that the next one replaces.
func (m *messages) show(line string) {
	m.mu.Lock()
	defer m.mu.Unlock()
	fmt.Fprint(m.out, eraseLine+line)
	m.shown = true
}

// endLine leaves what show has put there last.
func (m *messages) endLine() {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.shown {
		fmt.Fprintln(m.out)
		m.shown = false
	}
}

// fail prints an error.
func (m *messages) fail(format string, args ...any) { m.print("error: "+format, args...) }

// detail prints what --verbose asks for.
func (m *messages) detail(format string, args ...any) {
	if m.verbose > 0 {
		m.print(format, args...)
	}
}

// stop says with --verbose why archiving ends.
func (m *messages) stop(format string, args ...any) {
	m.detail(format, args...)
	m.mu.Lock()
	defer m.mu.Unlock()
	m.stopped = fmt.Sprintf(format, args...)
}

// stopAgain says it once more when WAL was streamed, as pg_receivewal does after it
// has closed its file.
func (m *messages) stopAgain() {
	m.mu.Lock()
	text := m.stopped
	m.mu.Unlock()
	if m.streams && text != "" {
		m.detail("%s", text)
	}
}

// commandLine prints what is wrong with a command line.
func (m *messages) commandLine(e *commandLineError) {
	if e.getopt {
		m.print("%s", e.text)
	} else {
		m.fail("%s", e.text)
	}
	if e.hint {
		m.print("hint: Try \"%s --help\" for more information.", program)
	}
}

// Enabled, Handle, WithAttrs and WithGroup make it a slog.Handler.
func (m *messages) Enabled(context.Context, slog.Level) bool { return true }
func (m *messages) WithAttrs([]slog.Attr) slog.Handler       { return m }
func (m *messages) WithGroup(string) slog.Handler            { return m }

func (m *messages) Handle(_ context.Context, r slog.Record) error {
	attrs := map[string]slog.Value{}
	r.Attrs(func(a slog.Attr) bool {
		attrs[a.Key] = a.Value.Resolve()
		return true
	})
	switch r.Message {
	case receiver.MsgConnected:
		m.begins, m.streams = true, false
	case receiver.MsgStarting:
		if m.begins {
			m.detail("starting log streaming at %s (timeline %s)", attrs["lsn"], attrs["timeline"])
		}
		m.begins = false
	case receiver.MsgStreaming:
		m.streams = true
		m.more(r)
	case receiver.MsgFollowing:
		if !m.begins {
			m.detail("switched to timeline %s at %s", attrs["timeline"], attrs["fork"])
		}
	case receiver.MsgSealed:
		m.detail("finished segment at %s (timeline %s)", attrs["end"], attrs["timeline"])
	case receiver.MsgEndReached:
		m.stop("stopped log streaming at %s (timeline %s)", attrs["lsn"], attrs["timeline"])
	case receiver.MsgPartial:
		m.print("not renaming \"%s.partial\", segment is not complete", attrs["segment"])
	default:
		switch {
		case r.Level >= slog.LevelError:
			m.fail("%s", line(r))
		case r.Level >= slog.LevelWarn:
			m.print("warning: %s", line(r))
		default:
			m.more(r)
		}
	}
	return nil
}

// more prints what --verbose twice asks for.
func (m *messages) more(r slog.Record) {
	if m.verbose > 1 {
		m.print("%s", line(r))
	}
}

// line is a record in one line.
func line(r slog.Record) string {
	var b strings.Builder
	b.WriteString(r.Message)
	separator := ": "
	r.Attrs(func(a slog.Attr) bool {
		value := a.Value.Resolve().String()
		if strings.ContainsFunc(value, func(c rune) bool { return !unicode.IsPrint(c) }) {
			value = strconv.Quote(value)
		}
		b.WriteString(separator + a.Key + " " + value)
		separator = ", "
		return true
	})
	return b.String()
}

// describe says what ended a connection, as pg_receivewal and libpq would.
func describe(err error) string {
	var (
		hosts   receiver.HostsError
		connect *pgrepl.ConnectError
		server  *pgrepl.ServerError
	)
	switch {
	case errors.As(err, &hosts):
		lines := make([]string, len(hosts))
		for i, e := range hosts {
			lines[i] = describe(e)
		}
		return strings.Join(lines, "\n")
	case errors.As(err, &connect):
		lines := make([]string, len(connect.Attempts))
		for i, a := range connect.Attempts {
			lines[i] = describeAttempt(a)
		}
		return strings.Join(lines, "\n")
	case errors.As(err, &server) && server.Doing == pgrepl.Receiving:
		return "unexpected termination of replication stream: " + server.Lines()
	case errors.As(err, &server):
		return fmt.Sprintf("could not send replication command \"%s\": %s", commandName(server.Doing), server.Lines())
	case errors.Is(err, pgrepl.ErrShutdown):
		return "replication stream was terminated before stop point"
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET):
		return "could not receive data from WAL stream: server closed the connection unexpectedly\n" +
			"\tThis probably means the server terminated abnormally\n\tbefore or while processing the request."
	}
	var file *fs.PathError
	if errors.As(err, &file) {
		return fmt.Sprintf("could not %s file \"%s\": %s", file.Op, file.Path, errnoText(file.Err))
	}
	return err.Error()
}

// errnoText is the C library's text, which begins with a capital letter.
func errnoText(err error) string {
	var errno syscall.Errno
	if errors.As(err, &errno) {
		return upperFirst(errno.Error())
	}
	return err.Error()
}

// commandName is what pg_receivewal calls a command: some by their first word.
func commandName(command string) string {
	first, _, _ := strings.Cut(command, " ")
	switch first {
	case "START_REPLICATION", "READ_REPLICATION_SLOT", "TIMELINE_HISTORY":
		return first
	}
	return command
}

// describeAttempt is libpq's message about one address.
func describeAttempt(a pgrepl.Attempt) string {
	if a.Address == "" {
		var lookup *net.DNSError
		if !errors.As(a.Err, &lookup) {
			return a.Err.Error()
		}
		reason := lookup.Err
		if lookup.IsNotFound {
			reason = "Name or service not known" // EAI_NONAME
		}
		return fmt.Sprintf("could not translate host name \"%s\" to address: %s", a.Host, reason)
	}
	where, hint := fmt.Sprintf("on socket \"%s\"", a.Address), "locally and accepting connections on that socket"
	if !filepath.IsAbs(a.Address) {
		host, port, _ := net.SplitHostPort(a.Address)
		where, hint = fmt.Sprintf("at \"%s\"", a.Host), "on that host and accepting TCP/IP connections"
		if host != a.Host {
			where += " (" + host + ")"
		}
		where += ", port " + port
	}
	var (
		server *pgrepl.ServerError
		errno  syscall.Errno
		wait   net.Error
		reason string
	)
	switch {
	case errors.Is(a.Err, pgrepl.ErrNoPassword):
		reason = "fe_sendauth: no password supplied"
	case errors.As(a.Err, &server):
		reason = server.Lines()
	case errors.As(a.Err, &errno):
		reason = fmt.Sprintf("%s\n\tIs the server running %s?", errnoText(errno), hint)
	case errors.As(a.Err, &wait) && wait.Timeout():
		reason = "timeout expired"
	case errors.Is(a.Err, pgrepl.ErrNoTLS):
		reason = "server does not support SSL, but SSL was required"
	default:
		reason = a.Err.Error()
	}
	return fmt.Sprintf("connection to server %s failed: %s", where, reason)
}

func upperFirst(s string) string {
	r, n := utf8.DecodeRuneInString(s)
	return string(unicode.ToUpper(r)) + s[n:]
}
