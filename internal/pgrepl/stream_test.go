package pgrepl

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strings"
	"testing"
	"testing/synctest"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

func TestParseSegmentSize(t *testing.T) {
	for s, want := range map[string]wal.SegmentSize{
		"1MB": 1 << 20, "16MB": 16 << 20, "512MB": 512 << 20, "1GB": 1 << 30, "1024MB": 1 << 30, "1024kB": 1 << 20,
		"": 0, "16": 0, "MB": 0, "16 MB": 0, "-16MB": 0, "+16MB": 0, "17MB": 0, "512kB": 0, "2GB": 0, "0MB": 0, "16TB": 0,
		"16mb": 0, "16MB\n": 0, "99999999999999999999MB": 0, "4194305GB": 0,
	} {
		got, err := parseSegmentSize(s)
		var pe *ProtocolError
		if got != want || (want == 0) != errors.As(err, &pe) {
			t.Errorf("%q: %d, %v; want %d", s, got, err, want)
		}
	}
}

func TestQuoteIdentifier(t *testing.T) {
	for name, want := range map[string]string{
		"walfleet": `"walfleet"`, "Big Slot": `"Big Slot"`, `a"b`: `"a""b"`, `"; DROP_REPLICATION_SLOT x; --`: `"""; DROP_REPLICATION_SLOT x; --"`, "": `""`,
	} {
		if got := QuoteIdentifier(name); got != want {
			t.Errorf("%s: %s, want %s", name, got, want)
		}
	}
}

func TestCleanMakesOneSafeLine(t *testing.T) {
	for s, want := range map[string]string{
		"":                        "",
		"no such slot":            "no such slot",
		"ключ “x” 鍵":              "ключ “x” 鍵",
		"two\nlines":              "two; lines",
		"\x1b[2J\x07":             `\x1b[2J\a`,
		"a\x00b\r\tc":             `a\x00b\r\tc`,
		"\u202egnp.exe":           `\u202egnp.exe`,
		"\xff\xfe":                "\uFFFD",
		"\x9b2J":                  "\uFFFD2J",
		strings.Repeat("x", 2001): strings.Repeat("x", 2000) + "…",
	} {
		if got := clean(s); got != want {
			t.Errorf("%q: %q, want %q", s, got, want)
		}
	}
}

func FuzzCleanMakesOneSafeLine(f *testing.F) {
	for _, s := range []string{"a", "\x1b", "\xff", "\u009b", "\u202e", "a\nb", strings.Repeat("ж", 1001)} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, s string) {
		got := clean(s)
		if !utf8.ValidString(got) || strings.ContainsFunc(got, func(r rune) bool { return !unicode.IsPrint(r) }) {
			t.Errorf("%q: %q", s, got)
		}
		if utf8.ValidString(s) && len(s) < 2000 && clean(got) != got {
			t.Errorf("%q: %q, and again %q", s, got, clean(got))
		}
	})
}

func TestServerErrorIsEscaped(t *testing.T) {
	err := fmt.Errorf("doing: %w", &ServerError{Receiving, "ERROR\x1b", "42704", "no\nslot", "de\x07tail", "hi\x00nt"})
	if got, want := err.Error(), `doing: ERROR\x1b: no; slot (SQLSTATE 42704), detail: de\atail, hint: hi\x00nt`; got != want {
		t.Errorf(" got %s\nwant %s", got, want)
	}
	if Code(err) != CodeUndefinedObject || Code(errors.New("x")) != "" {
		t.Error("Code")
	}
}

// connect gives a connection to s, in a bubble.
func connect(t *testing.T, s *pgtest.Server, dial func(context.Context, string, string) (net.Conn, error)) *Conn {
	t.Helper()
	isolate(t)
	c, err := ParseConninfo("host=db user=archiver sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := c.Connect(t.Context(), 0, Options{Timeout: patience, Dial: dial})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(conn.Close)
	return conn
}

// recorder keeps the last thing that was written.
type recorder struct {
	net.Conn
	last []byte
}

func (r *recorder) Write(p []byte) (int, error) {
	r.last = append(r.last[:0], p...)
	return r.Conn.Write(p)
}

func TestStatusUpdateOnTheWire(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := pgtest.NewServer(t, pgtest.State{WALEnd: 0x1000000, Slots: map[string]*pgtest.Slot{`odd "slot"`: {}}})
		var r *recorder
		conn := connect(t, s, func(ctx context.Context, network, address string) (net.Conn, error) {
			c, err := s.Dial(ctx, network, address)
			r = &recorder{Conn: c}
			return r, err
		})
		st, _, err := conn.StartStream(t.Context(), `odd "slot"`, 1, 0x1000000)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := string(r.last[5:len(r.last)-1]), `START_REPLICATION SLOT "odd ""slot""" PHYSICAL 0/1000000 TIMELINE 1`; got != want {
			t.Errorf(" got %s\nwant %s", got, want)
		}
		time.Sleep(1500 * time.Microsecond)
		for _, tt := range []struct {
			status Status
			want   string
		}{
			{Status{}, "d 00000026 r 0000000000000000 0000000000000000 0000000000000000 00000000000005dc 00"},
			{Status{Write: 0x123456789, Flush: 0x12345678}, "d 00000026 r 0000000123456789 0000000012345678 0000000000000000 00000000000005dc 00"},
			{Status{Write: ^wal.LSN(0), ReplyRequested: true}, "d 00000026 r ffffffffffffffff 0000000000000000 0000000000000000 00000000000005dc 01"},
		} {
			if err := st.SendStatus(tt.status); err != nil {
				t.Fatal(err)
			}
			b := r.last
			if got := fmt.Sprintf("%c %x %c %x %x %x %x %x", b[0], b[1:5], b[5], b[6:14], b[14:22], b[22:30], b[30:38], b[38:]); got != tt.want {
				t.Errorf("%+v\n got %s\nwant %s", tt.status, got, tt.want)
			}
		}
	})
}

func TestReceiveDeadlineLeavesTheStreamUsable(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		s := pgtest.NewServer(t, pgtest.State{WALEnd: 0x1000000, Slots: map[string]*pgtest.Slot{"s": {}}})
		part := pgtest.Keepalive(77, true)
		whole, _ := part.Encode(nil)
		s.OnStream = func(st *pgtest.Stream) {
			for _, b := range whole { // comes byte by byte
				_ = st.SendBytes([]byte{b})
				time.Sleep(time.Second)
			}
			_ = st.EndTimeline(3, 0x1000000)
		}
		conn := connect(t, s, s.Dial)
		st, _, err := conn.StartStream(t.Context(), "s", 1, 0x1000000)
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		var m Message
		for err = os.ErrDeadlineExceeded; errors.Is(err, os.ErrDeadlineExceeded); n++ {
			if err := st.SetDeadline(time.Now().Add(900 * time.Millisecond)); err != nil {
				t.Fatal(err)
			}
			m, err = st.Receive()
		}
		if err != nil || m.Kind != Keepalive || m.ServerEnd != 77 || !m.ReplyRequested || n < 10 {
			t.Errorf("%+v, %v after %d attempts", m, err, n)
		}

		// Woken, it gives up at once, until it is given a deadline: the one that it had too.
		deadline := time.Now().Add(time.Minute)
		if err := st.SetDeadline(deadline); err != nil {
			t.Fatal(err)
		}
		go func() {
			time.Sleep(100 * time.Millisecond)
			st.Wake()
		}()
		begun := time.Now()
		for range 2 {
			if _, err := st.Receive(); !errors.Is(err, os.ErrDeadlineExceeded) || time.Since(begun) != 100*time.Millisecond {
				t.Errorf("woken after %s: %v", time.Since(begun), err)
			}
		}
		if err := st.SetDeadline(deadline); err != nil {
			t.Fatal(err)
		}
		st.Interrupt(time.Second)
		if _, err := st.Receive(); !errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("interrupted: %v", err)
		}
		if err := st.SetDeadline(time.Now().Add(time.Minute)); err != nil {
			t.Fatal(err)
		}
		if m, err := st.Receive(); err != nil || m.Kind != Done {
			t.Errorf("%+v, %v", m, err)
		}
		if next, err := st.Finish(t.Context()); err != nil || next != (NextTimeline{3, 0x1000000}) {
			t.Errorf("%+v, %v", next, err)
		}
		if _, err := conn.Identify(t.Context()); err != nil {
			t.Errorf("the connection is not usable afterwards: %v", err)
		}
	})
}

// What a hostile or broken server answers is an error, and no more.
func TestAnswersThatNoServerGives(t *testing.T) {
	row := func(values ...any) []pgproto3.BackendMessage {
		columns := make([]string, len(values))
		for i := range columns {
			columns[i] = "c"
		}
		return pgtest.Result("X", columns, values)
	}
	identify := func(c *Conn) error { _, err := c.Identify(context.Background()); return err }
	slot := func(c *Conn) error { _, err := c.ReadSlot(context.Background(), Identity{Major: 17}, "s"); return err }
	history := func(c *Conn) error { _, err := c.TimelineHistory(context.Background(), 2); return err }
	start := func(c *Conn) error { _, _, err := c.StartStream(context.Background(), "s", 1, 0); return err }
	for _, tt := range []struct {
		query  string
		answer []pgproto3.BackendMessage
		call   func(*Conn) error
	}{
		{"IDENTIFY_SYSTEM", row("x", 1, "0/0", nil), identify},
		{"IDENTIFY_SYSTEM", row("-1", 1, "0/0", nil), identify},
		{"IDENTIFY_SYSTEM", row("1", 0, "0/0", nil), identify},
		{"IDENTIFY_SYSTEM", row("1", -5, "0/0", nil), identify},
		{"IDENTIFY_SYSTEM", row("1", 1, "0-0", nil), identify},
		{"IDENTIFY_SYSTEM", row("1"), identify},
		{"IDENTIFY_SYSTEM", pgtest.Result("X", []string{"a"}), identify},
		{"SHOW wal_segment_size", row("17MB"), identify},
		{"SHOW wal_segment_size", row("1MB", "2MB"), identify},
		{"SHOW wal_segment_size", pgtest.Result("X", []string{"a"}, []any{"1MB"}, []any{"1MB"}), identify},
		{"SHOW wal_segment_size", pgtest.Result("X", []string{"a"}), identify},
		{"SHOW wal_block_size", row("4096\x1b"), identify},
		{"SHOW in_hot_standby", pgtest.Result("X", []string{"a"}), identify},
		{"SHOW polar_version", []pgproto3.BackendMessage{pgtest.Error("XX000", "crash")}, identify},
		{"READ_REPLICATION_SLOT", row("physical"), slot},
		{"READ_REPLICATION_SLOT", row("physical", "x/y", 1), slot},
		{"READ_REPLICATION_SLOT", row("logical", "0/1", 1), slot},
		{"TIMELINE_HISTORY", row("x"), history},
		{"START_REPLICATION", row(2), start},
		{"START_REPLICATION", row("two", "0/1"), start},
		{"START_REPLICATION", row(-2, "0/1"), start},
		{"START_REPLICATION", row(2, "0.1"), start},
		{"START_REPLICATION", []pgproto3.BackendMessage{&pgproto3.CopyOutResponse{}}, start},
		{"START_REPLICATION", []pgproto3.BackendMessage{&pgproto3.NoticeResponse{}}, start},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := pgtest.NewServer(t, pgtest.State{})
			s.OnQuery = func(q pgtest.Query) []pgproto3.BackendMessage {
				if strings.HasPrefix(q.SQL, tt.query) {
					return tt.answer
				}
				return nil
			}
			err := tt.call(connect(t, s, s.Dial))
			if err == nil || strings.ContainsFunc(err.Error(), unicode.IsControl) {
				t.Errorf("%s, %+v: %v", tt.query, tt.answer, err)
			}
		})
	}
}

func TestIdentify(t *testing.T) {
	for _, tt := range []struct {
		state pgtest.State
		want  Identity
	}{
		{pgtest.State{Version: "13.4 (Debian 13.4-1)", WALEnd: 5, Standby: true, SegmentSize: 1 << 30},
			Identity{SystemID: 7000000000000000001, Timeline: 1, XLogPos: 5, SegmentSize: 1 << 30, Major: 13, Version: "13.4 (Debian 13.4-1)", InRecovery: true}},
		{pgtest.State{Version: "18beta1", SystemID: 1<<64 - 1, Timeline: 12, Settings: map[string]string{"data_directory_mode": "0750"}},
			Identity{SystemID: 1<<64 - 1, Timeline: 12, SegmentSize: 16 << 20, Major: 18, Version: "18beta1", GroupReadable: true}},
		{pgtest.State{Version: "15.8", Settings: map[string]string{"polar_version": "2.0.15.2.0\n"}},
			Identity{SystemID: 7000000000000000001, Timeline: 1, SegmentSize: 16 << 20, Major: 15, Version: "15.8", PolarDB: "2.0.15.2.0; "}},
	} {
		synctest.Test(t, func(t *testing.T) {
			s := pgtest.NewServer(t, tt.state)
			if got, err := connect(t, s, s.Dial).Identify(t.Context()); got != tt.want || err != nil {
				t.Errorf(" got %+v, %v\nwant %+v", got, err, tt.want)
			}
		})
	}
}
