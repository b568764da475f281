package pgrepl

import (
	"bytes"
	"context"
	"encoding/binary"
	"errors"
	"io"
	"net"
	"os"
	"runtime"
	"slices"
	"strings"
	"testing"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// FuzzParseCopyData: a message is refused, or what was understood of it makes the same message again.
func FuzzParseCopyData(f *testing.F) {
	for _, m := range []pgproto3.BackendMessage{pgtest.WALData(1<<32+5, 7, []byte("data")), pgtest.WALData(^wal.LSN(0), 7, []byte("data")),
		pgtest.WALData(^wal.LSN(3), 7, []byte("data")), pgtest.WALData(8, 7, nil), pgtest.Keepalive(8, true), pgtest.Keepalive(8, false)} {
		f.Add(m.(*pgproto3.CopyData).Data)
	}
	f.Add([]byte(nil))
	f.Add([]byte("w too short"))
	f.Add([]byte("z"))
	f.Fuzz(func(t *testing.T, p []byte) {
		p = slices.Clip(p)
		m, err := parseCopyData(p)
		if err != nil {
			checkError(t, err)
			return
		}
		var again []byte
		switch m.Kind {
		case WALData:
			if m.Start+wal.LSN(len(m.Data)) < m.Start {
				t.Errorf("%q: %d bytes of WAL from %s on", p, len(m.Data), m.Start)
			}
			if rest := p[25:]; len(rest) > 0 && &m.Data[0] != &rest[0] || cap(m.Data) > len(rest) {
				t.Errorf("%q: the data is not what is in the message", p)
			}
			again = binary.BigEndian.AppendUint64([]byte{'w'}, uint64(m.Start))
			again = binary.BigEndian.AppendUint64(again, uint64(m.ServerEnd))
			again = append(append(again, p[17:25]...), m.Data...) // the time is not looked at
		case Keepalive:
			again = binary.BigEndian.AppendUint64([]byte{'k'}, uint64(m.ServerEnd))
			again = append(again, p[9:]...)
			if m.ReplyRequested != (p[len(p)-1] != 0) || len(p) != 18 {
				t.Errorf("%q: %+v", p, m)
			}
		default:
			t.Errorf("%q: %+v", p, m)
		}
		if !bytes.Equal(again, p) {
			t.Errorf("%q was understood as %q", p, again)
		}
	})
}

// checkError expects an error that a receiver can tell apart, with a text that is safe to show.
func checkError(t *testing.T, err error) {
	t.Helper()
	if text := err.Error(); !utf8.ValidString(text) || strings.ContainsFunc(text, func(r rune) bool { return !unicode.IsPrint(r) }) {
		t.Errorf("the error shows %q", text)
	}
	var (
		protocol *ProtocolError
		server   *ServerError
		safe     *shown
	)
	if !errors.As(err, &protocol) && !errors.As(err, &server) && !errors.As(err, &safe) && !errors.Is(err, ErrShutdown) {
		t.Errorf("an error of no kind: %T %v", err, err)
	}
}

// FuzzReceive has a server that sends anything: in answer to START_REPLICATION (moment 0), in the stream (1), or after
// we ended it (2).
func FuzzReceive(f *testing.F) {
	encode := func(msgs ...pgproto3.BackendMessage) (p []byte) {
		for _, m := range msgs {
			p, _ = m.Encode(p)
		}
		return p
	}
	next := pgtest.Result("START_STREAMING", []string{"next_tli", "next_tli_startpos"}, []any{int64(2), "0/5000"})
	ready := &pgproto3.ReadyForQuery{TxStatus: 'I'}
	fatal := pgtest.Fatal("57P01", "going\x1b[2J\xff down")
	f.Add(byte(1), encode(pgtest.WALData(0x1000000, 0x1000004, []byte("data")), pgtest.Keepalive(8, true), &pgproto3.CopyDone{}))
	f.Add(byte(1), encode(&pgproto3.NoticeResponse{}, &pgproto3.ParameterStatus{Name: "a", Value: "b"}, &pgproto3.CommandComplete{CommandTag: []byte("COPY 0")}))
	f.Add(byte(1), encode(pgtest.Keepalive(8, true), fatal))
	f.Add(byte(1), []byte{'d', 0x40, 0, 0, 0})
	f.Add(byte(1), []byte{'d', 0, 0, 0, 3})
	f.Add(byte(1), []byte{'d', 0, 0x10, 0, 0, 'w'})
	f.Add(byte(1), []byte{'D', 0, 0, 0, 6, 0xff, 0xff})
	f.Add(byte(1), []byte{0})
	f.Add(byte(1), []byte{0x1b, 0, 0, 0, 4})
	f.Add(byte(0), encode(&pgproto3.CopyBothResponse{}, pgtest.Keepalive(8, false)))
	f.Add(byte(0), encode(append(next, ready)...))
	f.Add(byte(0), encode(fatal))
	f.Add(byte(0), encode(ready))
	f.Add(byte(2), encode(append([]pgproto3.BackendMessage{&pgproto3.CopyDone{}}, append(next, ready)...)...))
	f.Add(byte(2), encode(&pgproto3.DataRow{Values: [][]byte{[]byte("\x9b2J"), nil}}))
	isolate(f)
	c, err := ParseConninfo("host=db user=archiver sslmode=disable")
	if err != nil {
		f.Fatal(err)
	}
	f.Fuzz(func(t *testing.T, moment byte, p []byte) {
		client, server := net.Pipe()
		ended := make(chan struct{})
		go func() {
			defer close(ended)
			defer server.Close()
			sendAnything(server, moment%3, p)
		}()
		defer func() {
			client.Close()
			<-ended
		}()
		before := allocated()
		defer func() {
			// A message can be 1 MiB long; what is read is copied a few times over at most.
			if n := allocated() - before; n > 8<<20+16*uint64(len(p)) {
				t.Errorf("%d bytes allocated for %d that came", n, len(p))
			}
		}()
		conn, err := c.Connect(t.Context(), 0, Options{Timeout: patience, Dial: func(context.Context, string, string) (net.Conn, error) { return client, nil }})
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		st, _, err := conn.StartStream(t.Context(), "s", 1, 0x1000000)
		for err == nil && st != nil && moment%3 != 2 {
			var m Message
			if m, err = st.Receive(); err == nil && m.Kind == Done {
				break
			}
		}
		if err == nil && st != nil {
			_, err = st.Finish(t.Context())
		}
		if err != nil {
			checkError(t, err)
		}
		if errors.Is(err, os.ErrDeadlineExceeded) {
			t.Errorf("it took a minute: %v", err)
		}
	})
}

// sendAnything plays a server that lets a client in, and then sends p and hangs up.
func sendAnything(c net.Conn, moment byte, p []byte) {
	be := pgproto3.NewBackend(c, c)
	if _, err := be.ReceiveStartupMessage(); err != nil {
		return
	}
	be.Send(&pgproto3.AuthenticationOk{})
	be.Send(&pgproto3.ParameterStatus{Name: "server_version", Value: "17.2"})
	be.Send(&pgproto3.BackendKeyData{ProcessID: 1, SecretKey: []byte{0, 0, 0, 1}})
	be.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	if be.Flush() != nil {
		return
	}
	if _, err := be.Receive(); err != nil { // START_REPLICATION
		return
	}
	if moment > 0 {
		be.Send(&pgproto3.CopyBothResponse{})
		if be.Flush() != nil {
			return
		}
	}
	sent := make(chan struct{})
	go func() { // the client may be writing, too
		defer close(sent)
		_, _ = c.Write(p)
		c.Close()
	}()
	_, _ = io.Copy(io.Discard, c)
	<-sent
}

// allocated is how many bytes this process has allocated so far.
func allocated() uint64 {
	var m runtime.MemStats
	runtime.ReadMemStats(&m)
	return m.TotalAlloc
}
