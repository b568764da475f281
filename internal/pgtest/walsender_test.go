package pgtest

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"strings"
	"sync"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/walfleet/walfleet/internal/wal"
)

// connect gives a client of s, which is closed before t ends. settings are libpq keywords.
func connect(t *testing.T, s *Server, settings string) (*pgconn.PgConn, error) {
	t.Helper()
	config, err := pgconn.ParseConfig("host=db user=archiver password=secret sslmode=disable application_name=arch " + settings)
	if err != nil {
		t.Fatal(err)
	}
	config.DialFunc, config.LookupFunc = s.Dial, Lookup
	c, err := pgconn.ConnectConfig(t.Context(), config)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() {
		_ = c.Close(context.Background())
		<-c.CleanupDone()
	})
	return c, nil
}

func mustConnect(t *testing.T, s *Server) *pgconn.PgConn {
	t.Helper()
	c, err := connect(t, s, "replication=true")
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// ask gives a query's answer in one line: the rows and the tag, or the SQLSTATE and message.
func ask(c *pgconn.PgConn, sql string) string {
	results, err := c.Exec(context.Background(), sql).ReadAll()
	var pe *pgconn.PgError
	if errors.As(err, &pe) {
		return pe.Code + " " + pe.Message
	}
	if err != nil {
		return err.Error()
	}
	var b strings.Builder
	for _, r := range results {
		for _, row := range r.Rows {
			for _, v := range row {
				if v == nil {
					b.WriteString("NULL ")
				} else {
					fmt.Fprintf(&b, "%s ", v)
				}
			}
		}
		b.WriteString(r.CommandTag.String())
	}
	return b.String()
}

// stream starts a stream on c.
func stream(t *testing.T, c *pgconn.PgConn, sql string) {
	t.Helper()
	c.Frontend().Send(&pgproto3.Query{String: sql})
	if err := c.Frontend().Flush(); err != nil {
		t.Fatal(err)
	}
	expect[*pgproto3.CopyBothResponse](t, c)
}

// expect receives the next message, which has to be an M.
func expect[M pgproto3.BackendMessage](t *testing.T, c *pgconn.PgConn) M {
	t.Helper()
	msg, err := c.Frontend().Receive()
	if err != nil {
		t.Fatal(err)
	}
	if e, ok := msg.(*pgproto3.ErrorResponse); ok {
		t.Logf("%s %s", e.Code, e.Message)
	}
	m, ok := msg.(M)
	if !ok {
		t.Fatalf("got %T, want %T", msg, m)
	}
	return m
}

// receive takes size bytes of WAL from start out of the stream, and gives the sizes of its messages.
func receive(t *testing.T, c *pgconn.PgConn, start wal.LSN, size int) (data []byte, sizes []int) {
	t.Helper()
	for len(data) < size {
		p := expect[*pgproto3.CopyData](t, c).Data
		if p[0] != 'w' {
			t.Fatalf("message %q", p)
		}
		if at := wal.LSN(binary.BigEndian.Uint64(p[1:])); at != start+wal.LSN(len(data)) {
			t.Fatalf("WAL from %s, want %s", at, start+wal.LSN(len(data)))
		}
		data = append(data, p[25:]...)
		sizes = append(sizes, len(p)-25)
	}
	return data, sizes
}

func status(t *testing.T, c *pgconn.PgConn, write, flush wal.LSN, reply bool) {
	t.Helper()
	p := make([]byte, 34)
	p[0] = 'r'
	binary.BigEndian.PutUint64(p[1:], uint64(write))
	binary.BigEndian.PutUint64(p[9:], uint64(flush))
	if reply {
		p[33] = 1
	}
	c.Frontend().Send(&pgproto3.CopyData{Data: p})
	if err := c.Frontend().Flush(); err != nil {
		t.Fatal(err)
	}
}

func copyDone(t *testing.T, c *pgconn.PgConn) {
	t.Helper()
	c.Frontend().Send(&pgproto3.CopyDone{})
	if err := c.Frontend().Flush(); err != nil {
		t.Fatal(err)
	}
}

// some is WAL of more than n bytes.
func some(n int) *WAL {
	w := NewWAL(WALConfig{SystemID: 42})
	for int(w.End()-w.c.Start) <= n {
		w.Append(bytes.Repeat([]byte{byte(w.End())}, 1000))
	}
	return w
}

func TestServerCommands(t *testing.T) {
	const history = "1\t0/3000110\tno recovery target specified\n"
	base := func() State {
		return State{
			SystemID: 7, Timeline: 2, WALEnd: 0x5000060, Redo: 0x5000028,
			Settings:  map[string]string{"polar_version": "2.0"},
			Histories: map[wal.Timeline][]byte{2: []byte(history)},
			Slots:     map[string]*Slot{"old": {RestartLSN: 0x3000000}, "new": {RestartLSN: 0x4000000}, "busy": {ActivePID: 99}, "lg": {Logical: true}},
		}
	}
	tests := []struct{ version, settings, sql, want string }{
		{"", "", "IDENTIFY_SYSTEM", "7 2 0/5000060 NULL IDENTIFY_SYSTEM"},
		{"", "", "IDENTIFY_SYSTEM;", "7 2 0/5000060 NULL IDENTIFY_SYSTEM"},
		{"13.4", "", "IDENTIFY_SYSTEM", "7 2 0/5000060 NULL SELECT"},
		{"", "replication=database dbname=d", "IDENTIFY_SYSTEM", "7 2 0/5000060 d IDENTIFY_SYSTEM"},
		{"", "", "IDENTIFY_SYSTEM x", "42601 syntax error"},
		{"", "", "IDENTIFY_SYSTEM §", "42601 syntax error"},
		{"", "", "identify_system", "0A000 cannot execute SQL commands in WAL sender for physical replication"},
		{"", "", "SELECT 1", "0A000 cannot execute SQL commands in WAL sender for physical replication"},
		{"", "replication=database", "SELECT 1", "42601 pgtest: no answer to this query; Server.OnQuery can give one"},
		{"", "replication=", ";", ""},
		{"", "", "SHOW wal_segment_size", "16MB SHOW"},
		{"", "", "SHOW WAL_segment_size", "16MB SHOW"},
		{"", "", "SHOW in_hot_standby", "off SHOW"},
		{"13.4", "", "SHOW in_hot_standby", `42704 unrecognized configuration parameter "in_hot_standby"`},
		{"", "", "SHOW polar_version", "2.0 SHOW"},
		{"", "", "SHOW no.such", `42704 unrecognized configuration parameter "no.such"`},
		{"", "replication=", "show wal_level", "replica SHOW"},
		{"", "replication=database", "show wal_level", "replica SHOW"},
		{"", "", "show wal_level", "0A000 cannot execute SQL commands in WAL sender for physical replication"},
		{"", "", "READ_REPLICATION_SLOT nope", "NULL NULL NULL READ_REPLICATION_SLOT"},
		{"", "", `READ_REPLICATION_SLOT "old"`, "physical 0/3000000 1 READ_REPLICATION_SLOT"},
		{"", "", "READ_REPLICATION_SLOT NEW", "physical 0/4000000 2 READ_REPLICATION_SLOT"},
		{"", "", `READ_REPLICATION_SLOT busy`, "physical NULL NULL READ_REPLICATION_SLOT"},
		{"", "", `READ_REPLICATION_SLOT lg`, "0A000 cannot use READ_REPLICATION_SLOT with a logical replication slot"},
		{"14.9", "", `READ_REPLICATION_SLOT old`, "0A000 cannot execute SQL commands in WAL sender for physical replication"},
		{"", "", `CREATE_REPLICATION_SLOT "x" PHYSICAL`, "x 0/0 NULL NULL CREATE_REPLICATION_SLOT"},
		{"", "", `CREATE_REPLICATION_SLOT "x" PHYSICAL RESERVE_WAL`, "x 0/0 NULL NULL CREATE_REPLICATION_SLOT"},
		{"", "", `CREATE_REPLICATION_SLOT "x" PHYSICAL (RESERVE_WAL)`, "x 0/0 NULL NULL CREATE_REPLICATION_SLOT"},
		{"14.9", "", `CREATE_REPLICATION_SLOT "x" PHYSICAL (RESERVE_WAL)`, "42601 syntax error"},
		{"", "", `CREATE_REPLICATION_SLOT "x" PHYSICAL (foo)`, "XX000 unrecognized option: foo"},
		{"", "", `CREATE_REPLICATION_SLOT old PHYSICAL`, `42710 replication slot "old" already exists`},
		{"", "", `CREATE_REPLICATION_SLOT "A-b" PHYSICAL`, `42602 replication slot name "A-b" contains invalid character`},
		{"", "", `CREATE_REPLICATION_SLOT "" PHYSICAL`, `42602 replication slot name "" is too short`},
		{"", "", `DROP_REPLICATION_SLOT old`, "DROP_REPLICATION_SLOT"},
		{"", "", `DROP_REPLICATION_SLOT nope`, `42704 replication slot "nope" does not exist`},
		{"", "", `DROP_REPLICATION_SLOT busy`, `55006 replication slot "busy" is active for PID 99`},
		{"", "", "TIMELINE_HISTORY 2", "00000002.history " + history + " TIMELINE_HISTORY"},
		{"", "", "TIMELINE_HISTORY 3", `58P01 could not open file "pg_wal/00000003.history": No such file or directory`},
		{"", "", "TIMELINE_HISTORY 0", "42601 invalid timeline 0"},
		{"", "", "START_REPLICATION SLOT nope PHYSICAL 0/5000000", `42704 replication slot "nope" does not exist`},
		{"", "", "START_REPLICATION SLOT busy PHYSICAL 0/5000000", `55006 replication slot "busy" is active for PID 99`},
		{"", "", "START_REPLICATION SLOT lg PHYSICAL 0/5000000", "55000 cannot use a logical replication slot for physical replication"},
		{"", "", "START_REPLICATION 0/5000000 TIMELINE 3", "XX000 requested timeline 3 is not in this server's history"},
		{"", "", "START_REPLICATION 0/5000000 TIMELINE 1", "XX000 requested starting point 0/5000000 on timeline 1 is not in this server's history"},
		{"", "", "START_REPLICATION 0/5000000 TIMELINE 0", "42601 invalid timeline 0"},
		{"", "", "START_REPLICATION SLOT old PHYSICAL 0/3000110 TIMELINE 1", "2 0/3000110 START_STREAMINGSTART_REPLICATION"},
		{"", "", "START_REPLICATION", "42601 syntax error"},
	}
	for _, tt := range tests {
		t.Run(tt.version+tt.settings+tt.sql, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				state := base()
				state.Version = tt.version
				settings := tt.settings
				if settings == "" {
					settings = "replication=true"
				}
				s := NewServer(t, state)
				c, err := connect(t, s, settings)
				if err != nil {
					t.Fatal(err)
				}
				if got := ask(c, tt.sql); got != tt.want {
					t.Errorf("%s\n got: %s\nwant: %s", tt.sql, got, tt.want)
				}
				if got := ask(c, "SHOW wal_block_size"); !strings.HasPrefix(got, "8192 ") {
					t.Errorf("the connection is no longer in step: %s", got)
				}
			})
		})
	}
}

func TestServerSlots(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(t, State{WALEnd: 0x5000060})
		c := mustConnect(t, s)
		ask(c, "CREATE_REPLICATION_SLOT a PHYSICAL")
		ask(c, "CREATE_REPLICATION_SLOT b PHYSICAL RESERVE_WAL")
		s.Do(func(s *State) { s.Redo = 0x5000028 })
		ask(c, "CREATE_REPLICATION_SLOT c PHYSICAL (RESERVE_WAL)")
		ask(c, "DROP_REPLICATION_SLOT a")
		s.Do(func(s *State) {
			if len(s.Slots) != 2 || s.Slots["b"].RestartLSN != 0x5000060 || s.Slots["c"].RestartLSN != 0x5000028 {
				t.Errorf("slots: %+v", s.Slots)
			}
		})
	})
}

func TestServerRefuses(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(t, State{Password: "other"})
		code := func() string {
			_, err := connect(t, s, "replication=true")
			var pe *pgconn.PgError
			if !errors.As(err, &pe) {
				return fmt.Sprint(err)
			}
			return pe.Code
		}
		if got := code(); got != "28P01" {
			t.Errorf("wrong password: %s", got)
		}
		s.Do(func(s *State) { s.Password = "secret" })
		if got := ask(mustConnect(t, s), "SHOW wal_level"); got != "replica SHOW" {
			t.Errorf("right password: %s", got)
		}
		s.Do(func(s *State) { s.StartupError = Fatal("57P03", "the database system is starting up") })
		if got := code(); got != "57P03" {
			t.Errorf("starting up: %s", got)
		}
		lost := errors.New("no route to host")
		s.Do(func(s *State) { s.DialError = lost })
		if _, err := s.Dial(t.Context(), "tcp", "db:5432"); err != lost {
			t.Errorf("Dial: %v", err)
		}
		s.Do(func(s *State) { s.DialError = nil })
		s.Close()
		if _, err := s.Dial(t.Context(), "tcp", "db:5432"); !errors.Is(err, syscall.ECONNREFUSED) {
			t.Errorf("Dial after Close: %v", err)
		}
	})
}

// A client that prefers encryption is told that there is none.
func TestServerRefusesTLS(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		c, err := connect(t, NewServer(t, State{}), "sslmode=prefer max_protocol_version=latest replication=true")
		if err != nil {
			t.Fatal(err)
		}
		if v := c.ParameterStatus("server_version"); v != "17.2" {
			t.Errorf("server_version %q", v)
		}
	})
}

func TestServerOnQuery(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(t, State{Version: "14.9"})
		s.OnQuery = func(q Query) []pgproto3.BackendMessage {
			switch {
			case strings.Contains(q.SQL, "pg_replication_slots"):
				return Result("SELECT 1", []string{"slot_type", "restart_lsn", "n"}, []any{q.Args[0], wal.LSN(16), nil})
			case q.SQL == "SHOW wal_level":
				return []pgproto3.BackendMessage{Error("42501", "permission denied")}
			case q.SQL == "IDENTIFY_SYSTEM":
				return []pgproto3.BackendMessage{Fatal("57P01", "terminating connection")}
			}
			return nil
		}
		c, err := connect(t, s, "")
		if err != nil {
			t.Fatal(err)
		}
		r := c.ExecParams(t.Context(), "SELECT * FROM pg_replication_slots WHERE slot_name = $1", [][]byte{[]byte("x")}, nil, nil, nil).Read()
		if r.Err != nil || len(r.Rows) != 1 || string(r.Rows[0][0]) != "x" || string(r.Rows[0][1]) != "0/10" || r.Rows[0][2] != nil {
			t.Errorf("extended query: %q, %v", r.Rows, r.Err)
		}
		c = mustConnect(t, s)
		r = c.ExecParams(t.Context(), "SELECT 1", nil, nil, nil, nil).Read()
		var pe *pgconn.PgError
		if !errors.As(r.Err, &pe) || pe.Code != "08P01" {
			t.Errorf("extended query on a replication connection: %v", r.Err)
		}
		for sql, want := range map[string]string{
			"SHOW wal_level":      "42501 permission denied",
			"SHOW wal_block_size": "8192 SHOW",
		} {
			if got := ask(c, sql); got != want {
				t.Errorf("%s: %s", sql, got)
			}
		}
		if got := ask(c, "IDENTIFY_SYSTEM"); got != "57P01 terminating connection" || !c.IsClosed() {
			t.Errorf("fatal error: %s, closed %t", got, c.IsClosed())
		}
	})
}

// Serve streams what there is and what comes, and a slot follows the client's flush position.
func TestServe(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := some(300_000)
		s := NewServer(t, State{Slots: map[string]*Slot{"a": {}}})
		s.Publish(w)
		c := mustConnect(t, s)
		if got := ask(c, "IDENTIFY_SYSTEM"); got != fmt.Sprintf("42 1 %s NULL IDENTIFY_SYSTEM", w.End()) {
			t.Errorf("IDENTIFY_SYSTEM: %s", got)
		}
		start := w.c.Start + 100
		stream(t, c, fmt.Sprintf("START_REPLICATION SLOT a PHYSICAL %s TIMELINE 1", start))
		data, sizes := receive(t, c, start, int(w.End()-start))
		if !bytes.Equal(data, w.Bytes(start, w.End())) {
			t.Error("other WAL")
		}
		if sizes[0] != 16*wal.PageSize-100 || sizes[1] != 16*wal.PageSize || len(sizes) != 3 {
			t.Errorf("messages of %d bytes", sizes)
		}
		st := s.Streams()[0]
		if got := ask(mustConnect(t, s), "START_REPLICATION SLOT a 0/100000"); got != fmt.Sprintf(`55006 replication slot "a" is active for PID %d`, st.PID()) {
			t.Errorf("second stream: %s", got)
		}
		if st.Startup()["application_name"] != "arch" || st.Request() != (StartReplication{"a", start, 1}) {
			t.Errorf("%+v, %+v", st.Startup(), st.Request())
		}

		// More WAL, a reply that was asked for.
		end := w.End()
		w.Append(make([]byte, 100))
		s.Publish(w)
		if more, _ := receive(t, c, end, int(w.End()-end)); !bytes.Equal(more, w.Bytes(end, w.End())) {
			t.Error("other WAL")
		}
		status(t, c, w.End(), end, true)
		if p := expect[*pgproto3.CopyData](t, c).Data; len(p) != 18 || p[0] != 'k' || wal.LSN(binary.BigEndian.Uint64(p[1:])) != w.End() || p[17] != 0 {
			t.Errorf("keepalive %q", p)
		}
		status(t, c, w.End(), 0, false)
		if err := s.Wait(t.Context(), func(s *State) bool { return s.Last.Flush == 0 }); err != nil {
			t.Error(err)
		}
		u, err := st.WaitStatus(t.Context(), nil)
		if want := (StatusUpdate{Write: w.End(), Flush: end, ReplyRequested: true, ClientTime: epoch, At: time.Now(), PID: st.PID()}); u != want || err != nil {
			t.Errorf("status %+v, %v", u, err)
		}
		if u, err = st.WaitStatus(t.Context(), func(u StatusUpdate) bool { return u.Flush == 0 }); err != nil {
			t.Errorf("status %+v, %v", u, err)
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		defer cancel()
		if u, err = st.WaitStatus(ctx, nil); err != context.DeadlineExceeded {
			t.Errorf("status %+v, %v", u, err)
		}
		s.Do(func(s *State) {
			if slot := *s.Slots["a"]; slot != (Slot{RestartLSN: end, ActivePID: st.PID()}) {
				t.Errorf("slot %+v", slot)
			}
		})

		// The client stops.
		copyDone(t, c)
		expect[*pgproto3.CopyDone](t, c)
		expect[*pgproto3.CommandComplete](t, c)
		expect[*pgproto3.CommandComplete](t, c)
		expect[*pgproto3.ReadyForQuery](t, c)
		if got := st.Ended(); got != (Ended{CopyDone: true}) {
			t.Errorf("ended: %+v", got)
		}
		if got := ask(c, "READ_REPLICATION_SLOT a"); got != fmt.Sprintf("physical %s 1 READ_REPLICATION_SLOT", end) {
			t.Errorf("READ_REPLICATION_SLOT: %s", got)
		}
		stream(t, c, fmt.Sprintf("START_REPLICATION SLOT a PHYSICAL %s", end)) // the slot is free
		if err := c.Close(t.Context()); err != nil {
			t.Error(err)
		}
		if _, err := s.Streams()[1].WaitStatus(t.Context(), nil); err != io.EOF {
			t.Errorf("status after the end: %v", err)
		}
		if got := s.Streams()[1].Ended(); got != (Ended{Terminate: true, Gone: true}) {
			t.Errorf("ended: %+v", got)
		}
		if n := len(st.Statuses()); n != 2 {
			t.Errorf("%d statuses", n)
		}
	})
}

func TestServeErrors(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := some(3 << 20)
		s := NewServer(t, State{Oldest: 0x210000})
		s.Publish(w)
		c := mustConnect(t, s)
		for sql, want := range map[string]string{
			"START_REPLICATION 0/1FFFFF": "58P01 requested WAL segment 000000010000000000000001 has already been removed",
			"START_REPLICATION 0/0":      "58P01 requested WAL segment 000000010000000000000000 has already been removed",
			"START_REPLICATION 1/0":      "XX000 requested starting point 1/0 is ahead of the WAL flush position of this server " + w.End().String(),
		} {
			if got := ask(c, sql); got != want {
				t.Errorf("%s: %s", sql, got)
			}
		}
		stream(t, c, "START_REPLICATION 0/200000")
	})
}

// Batch and MaxMessage decide what the client finds in its buffer, and at which lengths.
func TestServeBatch(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := some(10_000)
		s := NewServer(t, State{MaxMessage: 1000, Batch: 3})
		s.Publish(w)
		c := mustConnect(t, s)
		stream(t, c, "START_REPLICATION 0/100000")
		_, sizes := receive(t, c, 0x100000, 9000)
		if want := []int{1000, 1000, 1000, 1000, 1000, 1000, 1000, 1000, 192, 1000}; fmt.Sprint(sizes) != fmt.Sprint(want) {
			t.Errorf("messages of %d bytes", sizes)
		}
	})
}

// A promotion ends the stream of the old timeline, and the same connection goes on with the new one.
func TestServePromotion(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := some(2_200_000)
		s := NewServer(t, State{Slots: map[string]*Slot{"a": {}}, Standby: true})
		s.Publish(w)
		c := mustConnect(t, s)
		if v := c.ParameterStatus("in_hot_standby"); v != "on" {
			t.Errorf("in_hot_standby %s", v)
		}
		start := w.End() - 1000
		stream(t, c, fmt.Sprintf("START_REPLICATION SLOT a PHYSICAL %s TIMELINE 1", start))
		receive(t, c, start, 1000)

		end := w.End()
		forked := w.Fork(end, 2)
		forked.Append(make([]byte, 5000))
		s.Do(func(s *State) { s.Promote(forked, end) })
		expect[*pgproto3.CopyDone](t, c)
		status(t, c, end, 0, false)
		copyDone(t, c)
		expect[*pgproto3.RowDescription](t, c)
		if row := expect[*pgproto3.DataRow](t, c).Values; string(row[0]) != "2" || string(row[1]) != end.String() {
			t.Errorf("next timeline: %q", row)
		}
		for _, tag := range []string{"START_STREAMING", "START_REPLICATION"} {
			if got := expect[*pgproto3.CommandComplete](t, c).CommandTag; string(got) != tag {
				t.Errorf("tag %s, want %s", got, tag)
			}
		}
		expect[*pgproto3.ParameterStatus](t, c)
		expect[*pgproto3.ReadyForQuery](t, c)
		if n := len(s.Streams()[0].Statuses()); n != 1 {
			t.Errorf("%d statuses", n)
		}

		for sql, want := range map[string]string{
			"TIMELINE_HISTORY 2": fmt.Sprintf("00000002.history 1\t%s\tno recovery target specified\n TIMELINE_HISTORY", end),
			fmt.Sprintf("START_REPLICATION %s TIMELINE 1", end):                   fmt.Sprintf("2 %s START_STREAMINGSTART_REPLICATION", end),
			"START_REPLICATION 0/200000 TIMELINE 2":                               "58P01 requested WAL segment 000000020000000000000002 has already been removed",
			fmt.Sprintf("START_REPLICATION SLOT a PHYSICAL %s TIMELINE 1", end+1): fmt.Sprintf("XX000 requested starting point %s on timeline 1 is not in this server's history", end+1),
		} {
			if got := ask(c, sql); got != want {
				t.Errorf("%s\n got: %s\nwant: %s", sql, got, want)
			}
		}
		start = w.c.Size.Start(end)
		stream(t, c, fmt.Sprintf("START_REPLICATION SLOT a PHYSICAL %s TIMELINE 2", start))
		data, _ := receive(t, c, start, int(forked.End()-start))
		if !bytes.Equal(data, forked.Bytes(start, forked.End())) {
			t.Error("other WAL")
		}
	})
}

// Each half of wal_sender_timeout without a word of the client has its effect, also while the server
// cannot write because the client does not read.
func TestServeTimeout(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := some(3000)
		s := NewServer(t, State{})
		s.Publish(w)
		c := mustConnect(t, s)
		began := time.Now()
		stream(t, c, fmt.Sprintf("START_REPLICATION %s", w.End()))
		if p := expect[*pgproto3.CopyData](t, c).Data; p[0] != 'k' || p[17] != 1 || time.Since(began) != 30*time.Second {
			t.Errorf("%q after %s", p, time.Since(began))
		}
		time.Sleep(20 * time.Second)
		status(t, c, w.End(), 0, false)
		if p := expect[*pgproto3.CopyData](t, c).Data; p[0] != 'k' || p[17] != 1 || time.Since(began) != 80*time.Second {
			t.Errorf("%q after %s", p, time.Since(began))
		}
		if _, err := c.Frontend().Receive(); !errors.Is(err, io.ErrUnexpectedEOF) || time.Since(began) != 110*time.Second {
			t.Errorf("%v after %s", err, time.Since(began))
		}

		began = time.Now()
		c = mustConnect(t, s)
		stream(t, c, "START_REPLICATION 0/100000")
		for range 5 {
			time.Sleep(50 * time.Second)
			status(t, c, 0, 0, false)
		}
		synctest.Wait()
		st := s.Streams()[1]
		if st.Ended().Gone {
			t.Error("cut in spite of status updates")
		}
		<-st.Gone()
		if d := time.Since(began); d != 310*time.Second {
			t.Errorf("cut after %s", d)
		}
	})
}

// A fast shutdown waits for the client to have everything, and says COPY 0.
func TestServeShutdown(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		w := some(3000)
		s := NewServer(t, State{ShuttingDown: true})
		s.Publish(w)
		c := mustConnect(t, s)
		stream(t, c, "START_REPLICATION 0/100000")
		receive(t, c, 0x100000, int(w.End()-0x100000))
		if p := expect[*pgproto3.CopyData](t, c).Data; p[0] != 'k' || p[17] != 1 {
			t.Errorf("%q", p)
		}
		status(t, c, w.End(), 0x100000, false)
		expect[*pgproto3.CopyData](t, c)
		status(t, c, w.End(), w.End(), false)
		if tag := expect[*pgproto3.CommandComplete](t, c).CommandTag; string(tag) != "COPY 0" {
			t.Errorf("tag %s", tag)
		}
		if _, err := c.Frontend().Receive(); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Error(err)
		}
	})
}

func TestOnStream(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(t, State{WALEnd: 0x2000000})
		scripts := []func(*Stream){
			func(st *Stream) { // two messages in one write, and what no server sends
				_ = st.SendMessage(WALData(0x1000000, 0x2000000, []byte("abc")), Keepalive(0x2000000, true))
				_ = st.Send(0x1000003, 0x2000000, []byte("d"))
				_ = st.Keepalive(0x2000000, false)
				_ = st.SendMessage(&pgproto3.CopyData{Data: []byte("?")})
				_ = st.SendBytes([]byte{'d', 0x7f, 0xff, 0xff, 0xff})
			},
			func(st *Stream) { _ = st.EndTimeline(0, st.Request().LSN) }, // as PolarDB
			func(st *Stream) { _ = st.CopyDone(); _ = st.End() },
			func(st *Stream) { <-st.Gone() },
		}
		s.OnStream = func(st *Stream) { scripts[len(s.Streams())-1](st) }

		c := mustConnect(t, s)
		c.Frontend().SetMaxBodyLen(1 << 20)
		stream(t, c, "START_REPLICATION 0/1000000")
		data, _ := receive(t, c, 0x1000000, 3)
		if string(data) != "abc" {
			t.Errorf("%q", data)
		}
		expect[*pgproto3.CopyData](t, c)
		receive(t, c, 0x1000003, 1)
		expect[*pgproto3.CopyData](t, c)
		if p := expect[*pgproto3.CopyData](t, c).Data; string(p) != "?" {
			t.Errorf("%q", p)
		}
		var long *pgproto3.ExceededMaxBodyLenErr
		if _, err := c.Frontend().Receive(); !errors.As(err, &long) {
			t.Error(err)
		}

		c = mustConnect(t, s)
		stream(t, c, "START_REPLICATION 0/1000000")
		expect[*pgproto3.CopyDone](t, c)
		copyDone(t, c)
		expect[*pgproto3.RowDescription](t, c)
		if row := expect[*pgproto3.DataRow](t, c).Values; string(row[0]) != "0" || string(row[1]) != "0/1000000" {
			t.Errorf("%q", row)
		}
		for range 2 {
			expect[*pgproto3.CommandComplete](t, c)
		}
		expect[*pgproto3.ReadyForQuery](t, c)

		stream(t, c, "START_REPLICATION 0/1000000")
		copyDone(t, c)
		expect[*pgproto3.CopyDone](t, c)
		for range 2 {
			expect[*pgproto3.CommandComplete](t, c)
		}
		expect[*pgproto3.ReadyForQuery](t, c)

		stream(t, c, "START_REPLICATION 0/1000000")
		s.Disconnect()
		if _, err := c.Frontend().Receive(); !errors.Is(err, io.ErrUnexpectedEOF) {
			t.Error(err)
		}
	})
}

// A client that drops its connection finds the slot free at once.
func TestServerSlotIsFreeAfterClose(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := NewServer(t, State{WALEnd: 0x2000000, Slots: map[string]*Slot{"a": {}}})
		for range 20 {
			c := mustConnect(t, s)
			stream(t, c, "START_REPLICATION SLOT a PHYSICAL 0/2000000")
			_ = c.Conn().Close()
		}
	})
}

// complaints is a testing.TB that keeps errors to itself.
type complaints struct {
	testing.TB
	mu   sync.Mutex
	list []string
}

func (c *complaints) Errorf(format string, args ...any) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.list = append(c.list, fmt.Sprintf(format, args...))
}

// What no client may send fails the test that the client is in, and ends the connection.
func TestServerComplains(t *testing.T) {
	for name, message := range map[string]pgproto3.FrontendMessage{
		"query":        &pgproto3.Query{String: "IDENTIFY_SYSTEM"},
		"empty":        &pgproto3.CopyData{},
		"short status": &pgproto3.CopyData{Data: make([]byte, 33)},
		"not a status": &pgproto3.CopyData{Data: make([]byte, 34)},
		"copy fail":    &pgproto3.CopyFail{},
	} {
		t.Run(name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				tb := &complaints{TB: t}
				s := NewServer(tb, State{WALEnd: 0x2000000})
				c := mustConnect(t, s)
				stream(t, c, "START_REPLICATION 0/2000000")
				c.Frontend().Send(message)
				_ = c.Frontend().Flush()
				if _, err := c.Frontend().Receive(); !errors.Is(err, io.ErrUnexpectedEOF) {
					t.Error(err)
				}
				tb.mu.Lock()
				defer tb.mu.Unlock()
				if len(tb.list) != 1 {
					t.Errorf("complaints: %q", tb.list)
				}
			})
		})
	}
}

var _ pgconn.DialFunc = (*Server)(nil).Dial
var _ net.Conn = (*clientEnd)(nil)
