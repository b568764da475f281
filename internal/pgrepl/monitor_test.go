package pgrepl

import (
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/walfleet/walfleet/internal/pgtest"
)

func TestWatchedSlotIsParsed(t *testing.T) {
	text := func(columns ...any) (row [][]byte) {
		for _, c := range columns {
			if c == nil {
				row = append(row, nil)
				continue
			}
			row = append(row, []byte(c.(string)))
		}
		return row
	}
	for _, test := range []struct {
		name string
		row  [][]byte
		want SlotWatch
		err  string
	}{
		{"no slot", text("f", nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil), SlotWatch{SafeWALSize: -1}, ""},
		{"in use", text("f", "physical", "0/3000000", "1024", "reserved", nil, nil, "77", "walfleet", "streaming", "sync", "77"),
			SlotWatch{Exists: true, RestartLSN: 0x3000000, Retained: 1024, Status: "reserved", SafeWALSize: -1, ActivePID: 77, Application: "walfleet", State: "streaming", SyncState: "sync"}, ""},
		{"details hidden", text("f", "physical", "0/3000000", "1024", "extended", "5", nil, "77", nil, nil, nil, "77"),
			SlotWatch{Exists: true, RestartLSN: 0x3000000, Retained: 1024, Status: "extended", SafeWALSize: 5, ActivePID: 77, Hidden: true}, ""},
		{"about to be lost", text("f", "physical", "0/3000000", "1024", "unreserved", "-7", nil, nil, nil, nil, nil, nil),
			SlotWatch{Exists: true, RestartLSN: 0x3000000, Retained: 1024, Status: "unreserved"}, ""},
		{"lost", text("f", "physical", nil, nil, "lost", nil, "wal_removed", nil, nil, nil, nil, nil),
			SlotWatch{Exists: true, Status: "lost", SafeWALSize: -1, Invalid: "wal_removed"}, ""},
		{"invalidated, with its position", text("f", "physical", "0/3000000", "1024", "lost", nil, "idle_timeout", nil, nil, nil, nil, nil),
			SlotWatch{Exists: true, RestartLSN: 0x3000000, Status: "lost", SafeWALSize: -1, Invalid: "idle_timeout"}, ""},
		{"a standby ahead of its slot", text("t", "physical", "0/3000000", "-1024", "reserved", nil, nil, nil, nil, nil, nil, nil),
			SlotWatch{InRecovery: true, Exists: true, RestartLSN: 0x3000000, Status: "reserved", SafeWALSize: -1}, ""},
		{"logical", text("f", "logical", nil, nil, nil, nil, nil, nil, nil, nil, nil, nil), SlotWatch{Exists: true, Logical: true, SafeWALSize: -1}, ""},
		{"escapes", text("f", "physical", nil, nil, "re\x1b[31m", nil, nil, nil, nil, nil, nil, nil), SlotWatch{Exists: true, Status: `re\x1b[31m`, SafeWALSize: -1}, ""},
		{"no position", text("f", "physical", "x", nil, nil, nil, nil, nil, nil, nil, nil, nil), SlotWatch{}, "restart_lsn"},
		{"no number", text("f", "physical", nil, "x", nil, nil, nil, nil, nil, nil, nil, nil), SlotWatch{}, "no number"},
	} {
		got, err := parseWatch("watching", test.row)
		if test.err != "" {
			if err == nil || !strings.Contains(err.Error(), test.err) {
				t.Errorf("%s: %v", test.name, err)
			}
			continue
		}
		if err != nil || got != test.want {
			t.Errorf("%s: got  %+v, %v\nwant %+v", test.name, got, err, test.want)
		}
	}
}

func TestMemorySettings(t *testing.T) {
	for s, want := range map[string]int64{"-1": -1, "0": 0, "64MB": 64 << 20, "2GB": 2 << 30, "3TB": 3 << 40, "512kB": 512 << 10} {
		if got, err := parseMemory(s); got != want || err != nil {
			t.Errorf("%s: %d, %v", s, got, err)
		}
	}
	for _, s := range []string{"", "x", "1PB", "MB", "1 MB", "99999999999999GB"} {
		if got, err := parseMemory(s); err == nil {
			t.Errorf("%q: %d", s, got)
		}
	}
}

// monitored connects by SQL to a scripted server.
func monitored(t *testing.T, answer func(q pgtest.Query) []pgproto3.BackendMessage) *SQLConn {
	t.Helper()
	srv := pgtest.NewServer(t, pgtest.State{})
	srv.OnQuery = answer
	c, err := ParseConninfo("host=db user=archiver sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := c.ConnectSQL(t.Context(), 0, Options{ApplicationName: "walfleet", Timeout: time.Minute, Dial: srv.Dial})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return conn
}

func TestOrdinaryConnectionIsNoWalsender(t *testing.T) {
	var startup map[string]string
	var args [][]byte
	conn := monitored(t, func(q pgtest.Query) []pgproto3.BackendMessage {
		startup, args = q.Startup, q.Args
		return pgtest.Result("SELECT 1", make([]string, 12), []any{"f", nil, nil, nil, nil, nil, nil, nil, nil, nil, nil, nil})
	})
	if _, err := conn.WatchSlot(t.Context(), "my_slot"); err != nil {
		t.Fatal(err)
	}
	// Commits may wait for the receiver's name.
	if startup["replication"] != "" || startup["application_name"] != MonitorName || startup["database"] != "postgres" {
		t.Errorf("connected with %q", startup)
	}
	if len(args) != 1 || string(args[0]) != "my_slot" {
		t.Errorf("arguments %q", args)
	}
}

func TestClockIsComparedWithTheMiddleOfTheQuery(t *testing.T) {
	conn := monitored(t, func(pgtest.Query) []pgproto3.BackendMessage {
		now := time.Now().Add(time.Hour)
		return pgtest.Result("SELECT 1", make([]string, 6), []any{"3", "2", "1", "t", "f", fmt.Sprintf("%.6f", float64(now.UnixMicro())/1e6)})
	})
	u, err := conn.ServerUse(t.Context(), 4711)
	if err != nil {
		t.Fatal(err)
	}
	if off := (u.ClockAhead - time.Hour).Abs(); off > u.ClockError+time.Millisecond {
		t.Errorf("the clock is %s ahead, which may be wrong by %s", u.ClockAhead, u.ClockError)
	}
	if u.Senders != 3 || u.Slots != 2 || u.SyncSenders != 1 || u.Hidden || u.RemoteApply {
		t.Errorf("%+v", u)
	}
}

func TestAuthenticationMethodIsNoted(t *testing.T) {
	for method, password := range map[string]string{AuthPassword: "secret", AuthNone: ""} {
		srv := pgtest.NewServer(t, pgtest.State{Password: password})
		c, err := ParseConninfo("host=db user=archiver password=secret sslmode=disable")
		if err != nil {
			t.Fatal(err)
		}
		conn, err := c.Connect(t.Context(), 0, Options{Timeout: time.Minute, Dial: srv.Dial, NoteAuth: true})
		if err != nil {
			t.Fatal(err)
		}
		if got := conn.AuthMethod(); got != method {
			t.Errorf("%q, want %q", got, method)
		}
		conn.Close()
	}
	// As pgproto3 traces them.
	for line, want := range map[string]string{
		"B\tAuthenticationMD5Password\t13\n": AuthMD5, "B\tAuthenticationSASL\t24\n": AuthSCRAM, "B\tAuthenticationGSS\t9\n": AuthGSS,
		"B\tAuthenticationOk\t9\n": AuthNone, "F\tPassword\t40\n": AuthNone, "": AuthNone,
	} {
		m := authMethod{AuthNone}
		if n, err := m.Write([]byte(line)); m.name != want || n != len(line) || err != nil {
			t.Errorf("%q: %q, want %q", line, m.name, want)
		}
	}
}

func TestSSLMode(t *testing.T) {
	for _, mode := range []string{"disable", "allow", "prefer", "require", "verify-ca", "verify-full"} {
		c, err := ParseConninfo("host=db user=archiver sslmode=" + mode)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.SSLMode(0); got != mode {
			t.Errorf("%s, want %s", got, mode)
		}
	}
}
