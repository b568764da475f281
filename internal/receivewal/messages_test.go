package receivewal

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"os"
	"syscall"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// logged is what a receiver's events become.
func logged(verbose int, log func(*slog.Logger)) string {
	var b bytes.Buffer
	log(slog.New(&messages{verbose: verbose, out: &b}).With("cluster", program))
	return b.String()
}

func TestEventsBecomeTheOriginalsLines(t *testing.T) {
	life := func(l *slog.Logger) {
		l.Info(receiver.MsgConnected, "host", "db:5432", "server_version", "17.2")
		l.Info("archive begins", "timeline", wal.Timeline(1), "lsn", wal.LSN(0x4000000))
		l.Debug(receiver.MsgStarting, "timeline", wal.Timeline(1), "lsn", wal.LSN(0x4000000))
		l.Info(receiver.MsgSealed, "segment", "000000010000000000000004", "timeline", wal.Timeline(1), "end", wal.LSN(0x5000000))
		l.Debug(receiver.MsgPartial, "segment", "000000010000000000000005", "timeline", wal.Timeline(1))
		l.Info(receiver.MsgFollowing, "timeline", wal.Timeline(2), "from_timeline", wal.Timeline(1), "fork", wal.LSN(0x5000100))
		l.Debug(receiver.MsgStarting, "timeline", wal.Timeline(2), "lsn", wal.LSN(0x5000000))
		l.Info(receiver.MsgEndReached, "timeline", wal.Timeline(2), "lsn", wal.LSN(0x1_05000200))
		l.Debug(receiver.MsgPartial, "segment", "000000020000000000000005", "timeline", wal.Timeline(2))
		l.Warn("something odd", "file", "a\nb", "n", 3)
		l.Error("something bad", "error", errors.New("why"))
		// A connection that begins with a new timeline has not switched to it.
		l.Info(receiver.MsgConnected, "host", "db:5432", "server_version", "17.2")
		l.Info(receiver.MsgFollowing, "timeline", wal.Timeline(3), "from_timeline", wal.Timeline(2), "fork", wal.LSN(0x5000300))
		l.Debug(receiver.MsgStarting, "timeline", wal.Timeline(3), "lsn", wal.LSN(0x5000000))
		l.Info(receiver.MsgStopped, "timeline", wal.Timeline(3), "flushed", wal.LSN(0))
	}
	const always = `pg_receivewal: not renaming "000000010000000000000005.partial", segment is not complete
pg_receivewal: not renaming "000000020000000000000005.partial", segment is not complete
pg_receivewal: warning: something odd: file "a\nb", n 3
pg_receivewal: error: something bad: error why
`
	if got := logged(0, life); got != always {
		t.Errorf("without -v\n got %s\nwant %s", got, always)
	}
	const verbose = `pg_receivewal: starting log streaming at 0/4000000 (timeline 1)
pg_receivewal: finished segment at 0/5000000 (timeline 1)
pg_receivewal: not renaming "000000010000000000000005.partial", segment is not complete
pg_receivewal: switched to timeline 2 at 0/5000100
pg_receivewal: stopped log streaming at 1/5000200 (timeline 2)
pg_receivewal: not renaming "000000020000000000000005.partial", segment is not complete
pg_receivewal: warning: something odd: file "a\nb", n 3
pg_receivewal: error: something bad: error why
pg_receivewal: starting log streaming at 0/5000000 (timeline 3)
`
	if got := logged(1, life); got != verbose {
		t.Errorf("with -v\n got %s\nwant %s", got, verbose)
	}
	const begins = "pg_receivewal: archive begins: timeline 1, lsn 0/4000000\n"
	if got := logged(2, life); !bytes.Contains([]byte(got), []byte(begins)) {
		t.Errorf("with -vv\n got %s\nwithout %s", got, begins)
	}
}

// The texts are those of pg_receivewal 17 and its libpq.
func TestErrorsAreToldAsTheOriginalTellsThem(t *testing.T) {
	connect := func(attempts ...pgrepl.Attempt) error { return &pgrepl.ConnectError{Host: "x", Attempts: attempts} }
	refused := &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	role := &pgrepl.ServerError{Doing: "connecting to x", Severity: "FATAL", Code: "28000", Message: `role "a" does not exist`}
	server := func(doing, message string) error {
		return fmt.Errorf("%s: %w", doing, &pgrepl.ServerError{Doing: doing, Severity: "ERROR", Code: "X", Message: message})
	}
	for _, c := range []struct {
		err  error
		want string
	}{
		{connect(pgrepl.Attempt{Host: "127.0.0.1", Address: "127.0.0.1:1", Err: refused}),
			"connection to server at \"127.0.0.1\", port 1 failed: Connection refused\n\tIs the server running on that host and accepting TCP/IP connections?"},
		{connect(pgrepl.Attempt{Host: "localhost", Address: "[::1]:1", Err: refused}),
			"connection to server at \"localhost\" (::1), port 1 failed: Connection refused\n\tIs the server running on that host and accepting TCP/IP connections?"},
		{connect(pgrepl.Attempt{Host: "/tmp", Address: "/tmp/.s.PGSQL.2", Err: &net.OpError{Op: "dial", Err: os.NewSyscallError("connect", syscall.ENOENT)}}),
			"connection to server on socket \"/tmp/.s.PGSQL.2\" failed: No such file or directory\n\tIs the server running locally and accepting connections on that socket?"},
		{connect(pgrepl.Attempt{Host: "nosuch", Err: &net.DNSError{Err: "no such host", Name: "nosuch", IsNotFound: true}}),
			`could not translate host name "nosuch" to address: Name or service not known`},
		{connect(pgrepl.Attempt{Host: "a", Address: "1.2.3.4:5", Err: role}), `connection to server at "a" (1.2.3.4), port 5 failed: FATAL:  role "a" does not exist`},
		{connect(pgrepl.Attempt{Host: "a", Address: "1.2.3.4:5", Err: errors.Join(pgrepl.ErrNoPassword, role)}),
			`connection to server at "a" (1.2.3.4), port 5 failed: fe_sendauth: no password supplied`},
		{connect(pgrepl.Attempt{Host: "a", Address: "1.2.3.4:5", Err: os.ErrDeadlineExceeded}), `connection to server at "a" (1.2.3.4), port 5 failed: timeout expired`},
		{connect(pgrepl.Attempt{Host: "a", Address: "1.2.3.4:5", Err: role}, pgrepl.Attempt{Host: "a", Address: "1.2.3.4:5", Err: role}),
			"connection to server at \"a\" (1.2.3.4), port 5 failed: FATAL:  role \"a\" does not exist\nconnection to server at \"a\" (1.2.3.4), port 5 failed: FATAL:  role \"a\" does not exist"},
		{receiver.HostsError{connect(pgrepl.Attempt{Host: "a", Address: "1.2.3.4:5", Err: role}), errors.New("b: not the archive's")},
			"connection to server at \"a\" (1.2.3.4), port 5 failed: FATAL:  role \"a\" does not exist\nb: not the archive's"},
		{server(`CREATE_REPLICATION_SLOT "s" PHYSICAL`, `replication slot "s" already exists`),
			`could not send replication command "CREATE_REPLICATION_SLOT "s" PHYSICAL": ERROR:  replication slot "s" already exists`},
		{server("START_REPLICATION PHYSICAL 0/1 TIMELINE 1", "no"), `could not send replication command "START_REPLICATION": ERROR:  no`},
		{server("TIMELINE_HISTORY 2", "no"), `could not send replication command "TIMELINE_HISTORY": ERROR:  no`},
		{server(`READ_REPLICATION_SLOT "a b"`, "no"), `could not send replication command "READ_REPLICATION_SLOT": ERROR:  no`},
		{server(pgrepl.Receiving, "requested WAL segment 0 has already been removed"),
			`unexpected termination of replication stream: ERROR:  requested WAL segment 0 has already been removed`},
		{&pgrepl.ServerError{Doing: "SHOW x", Severity: "ERROR", Message: "a\x1b[2Jb", Detail: "d", Hint: "h"},
			"could not send replication command \"SHOW x\": ERROR:  a\\x1b[2Jb\nDETAIL:  d\nHINT:  h"},
		{fmt.Errorf("receiving: %w", pgrepl.ErrShutdown), "replication stream was terminated before stop point"},
		{fmt.Errorf("receiving: %w", io.ErrUnexpectedEOF), "could not receive data from WAL stream: server closed the connection unexpectedly\n" +
			"\tThis probably means the server terminated abnormally\n\tbefore or while processing the request."},
		{errors.New("anything else"), "anything else"},
	} {
		if got := describe(c.err); got != c.want {
			t.Errorf("%v\n got %s\nwant %s", c.err, got, c.want)
		}
	}
}

func TestALineThatIsShownMakesRoomForMessages(t *testing.T) {
	var b bytes.Buffer
	m := &messages{out: &b}
	m.endLine()
	m.show("1 %")
	m.show("2 %")
	m.print("hello")
	m.print("again")
	m.show("3 %")
	m.endLine()
	m.endLine()
	const want = "\r\x1b[K1 %\r\x1b[K2 %\r\x1b[Kpg_receivewal: hello\npg_receivewal: again\n\r\x1b[K3 %\n"
	if b.String() != want {
		t.Errorf("\n got %q\nwant %q", b.String(), want)
	}
}

func TestProgressLine(t *testing.T) {
	const mb = 1 << 20
	for _, c := range []struct {
		received, missing int64
		elapsed           time.Duration
		want              string
	}{
		{0, 0, 0, "0.0 MB / 0.0 MB"},
		{0, 100 * mb, time.Second, "0.0 MB / 100.0 MB (0 %)"},
		{25 * mb, 75 * mb, 5 * time.Second, "25.0 MB / 100.0 MB (25 %), 5.0 MB/s, 15s left"},
		{100 * mb, 0, 4 * time.Second, "100.0 MB / 100.0 MB (100 %), 25.0 MB/s, 0s left"},
		{1, 1 << 50, 1 * time.Hour, "0.0 MB / 1073741824.0 MB (0 %), 0.0 MB/s, a long time left"},
	} {
		if got := progressLine(c.received, c.missing, c.elapsed); got != c.want || len(got) >= 80 {
			t.Errorf("%+v: got %q", c, got)
		}
	}
}
