package pgrepl

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"sync/atomic"
	"syscall"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
	"golang.org/x/sys/unix"

	"github.com/walfleet/walfleet/internal/wal"
)

// Kind tells what a Message is.
type Kind int

const (
	WALData   Kind = iota // XLogData: a piece of WAL
	Keepalive             // primary keepalive
	Done                  // the server ended the copy: the end of a timeline, or a shutdown
)

// Message is one message of a replication stream
// (https://www.postgresql.org/docs/current/protocol-replication.html).
type Message struct {
	Kind           Kind
	Start          wal.LSN // WALData: position of Data's first byte
	Data           []byte  // WALData: aliases the read buffer, valid until the next Receive
	ServerEnd      wal.LSN // exclusive end of WAL on the server
	ReplyRequested bool    // Keepalive: the server wants a status update at once
}

// Status is a standby status update. The apply position is always 0: nothing is
// replayed here, and a remote_apply commit must not be told otherwise.
type Status struct {
	Write, Flush   wal.LSN // exclusive ends; 0: not known, which servers ignore
	ReplyRequested bool
}

// Stream is a replication connection in copy-both mode.
type Stream struct {
	conn     *Conn
	net      net.Conn
	raw      syscall.RawConn // nil: the connection cannot be peeked at
	queued   int             // result of the last peek
	peek     func(fd uintptr)
	deadline time.Time
	woken    atomic.Bool  // the connection's deadline is not deadline any more
	grace    atomic.Int64 // longest time for a SendStatus after an Interrupt, in ns; 0: none came
	out      [39]byte
}

// NextTimeline is where WAL goes on after the end of a timeline. Timeline 0
// means that the server did not say: connect again and identify.
type NextTimeline struct {
	Timeline wal.Timeline
	Start    wal.LSN
}

// StartStream begins streaming tli from start, which counts as a byte of a
// segment's page, on a slot, or on none when slot is empty. When the requested
// timeline has nothing to stream, the server names the next one at once: then the
// Stream is nil.
func (c *Conn) StartStream(ctx context.Context, slot string, tli wal.Timeline, start wal.LSN) (*Stream, NextTimeline, error) {
	if slot != "" {
		slot = "SLOT " + QuoteIdentifier(slot) + " "
	}
	sql := fmt.Sprintf("START_REPLICATION %sPHYSICAL %s TIMELINE %d", slot, start, tli)
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	s := newStream(c)
	release := s.watch(ctx)
	defer release()
	frontend := c.pg.Frontend()
	frontend.SendQuery(&pgproto3.Query{String: sql})
	if err := frontend.Flush(); err != nil {
		return nil, NextTimeline{}, wrap(sql, err)
	}
	var failed error
	for {
		msg, err := frontend.Receive()
		if err != nil {
			return nil, NextTimeline{}, wrap(sql, contextError(ctx, err))
		}
		switch msg := msg.(type) {
		case *pgproto3.NoticeResponse, *pgproto3.ParameterStatus:
		case *pgproto3.ErrorResponse:
			// The walsender stays usable after an error in a command.
			failed = wrap(sql, pgconn.ErrorResponseToPgError(msg))
			if msg.Severity == "FATAL" || msg.Severity == "PANIC" {
				return nil, NextTimeline{}, failed
			}
		case *pgproto3.ReadyForQuery:
			if failed == nil {
				failed = protocolErrorf("%s: ended without an answer", sql)
			}
			return nil, NextTimeline{}, failed
		case *pgproto3.CopyBothResponse:
			return s, NextTimeline{}, nil
		case *pgproto3.RowDescription:
			next, err := s.readNextTimeline()
			return nil, next, wrap(sql, contextError(ctx, err))
		default:
			return nil, NextTimeline{}, protocolErrorf("%s: unexpected %T", sql, msg)
		}
	}
}

func newStream(c *Conn) *Stream {
	s := &Stream{conn: c, net: c.pg.Conn()}
	plain := s.net
	if t, ok := plain.(interface{ NetConn() net.Conn }); ok { // TLS
		plain = t.NetConn()
	}
	if sc, ok := plain.(syscall.Conn); ok {
		if raw, err := sc.SyscallConn(); err == nil {
			s.raw = raw
		}
	}
	s.peek = func(fd uintptr) {
		n, err := unix.IoctlGetInt(int(fd), queuedBytes)
		if err != nil {
			n = 0
		}
		s.queued = n
	}
	return s
}

// watch makes reads and writes end when ctx does. The caller calls release
// before it uses the connection without ctx.
func (s *Stream) watch(ctx context.Context) (release func()) {
	if d, ok := ctx.Deadline(); ok {
		_ = s.net.SetDeadline(d)
	}
	fired := make(chan struct{})
	stop := context.AfterFunc(ctx, func() {
		defer close(fired)
		_ = s.net.SetDeadline(time.Unix(1, 0))
	})
	return func() {
		if !stop() {
			<-fired
		}
		s.deadline = time.Time{}
		_ = s.net.SetDeadline(time.Time{})
	}
}

func contextError(ctx context.Context, err error) error {
	if err != nil && ctx.Err() != nil {
		return ctx.Err()
	}
	return err
}

// ErrShutdown says that the server ended the stream because it shuts down.
var ErrShutdown = errors.New("the server is shutting down")

// SetDeadline says when Receive gives up waiting.
func (s *Stream) SetDeadline(t time.Time) error {
	if t.Equal(s.deadline) && !s.woken.Load() {
		return nil
	}
	s.woken.Store(false) // before the deadline is set: a Wake after that counts
	s.deadline = t
	return wrap(Receiving, s.net.SetReadDeadline(t))
}

// Receive returns the next message. When the deadline passes first the error is
// os.ErrDeadlineExceeded and the stream stays usable; every other error ends it.
func (s *Stream) Receive() (Message, error) {
	for {
		msg, err := s.conn.pg.Frontend().Receive()
		if err != nil {
			if errors.Is(err, os.ErrDeadlineExceeded) {
				return Message{}, os.ErrDeadlineExceeded
			}
			var tooLong *pgproto3.ExceededMaxBodyLenErr
			if errors.As(err, &tooLong) {
				return Message{}, protocolErrorf("message of %d bytes, more than the %d that a server may send", tooLong.ActualBodyLen, tooLong.MaxExpectedBodyLen)
			}
			return Message{}, wrap(Receiving, err)
		}
		switch msg := msg.(type) {
		case *pgproto3.CopyData:
			return parseCopyData(msg.Data)
		case *pgproto3.CopyDone:
			return Message{Kind: Done}, nil
		case *pgproto3.ErrorResponse:
			return Message{}, wrap(Receiving, pgconn.ErrorResponseToPgError(msg))
		case *pgproto3.CommandComplete: // WalSndDone in walsender.c
			return Message{}, ErrShutdown
		case *pgproto3.NoticeResponse, *pgproto3.ParameterStatus:
		default:
			return Message{}, protocolErrorf("unexpected %T in a replication stream", msg)
		}
	}
}

// parseCopyData takes a message of the stream apart.
func parseCopyData(p []byte) (Message, error) {
	if len(p) == 0 {
		return Message{}, protocolErrorf("empty copy data message")
	}
	switch p[0] {
	case pglogrepl.XLogDataByteID:
		x, err := pglogrepl.ParseXLogData(p[1:])
		if err != nil {
			return Message{}, protocolErrorf("XLogData of %d bytes is too short", len(p))
		}
		m := Message{Kind: WALData, Start: wal.LSN(x.WALStart), Data: x.WALData, ServerEnd: wal.LSN(x.ServerWALEnd)}
		if uint64(m.Start)+uint64(len(m.Data)) < uint64(m.Start) {
			return Message{}, protocolErrorf("XLogData at %s of %d bytes passes the end of all WAL", m.Start, len(m.Data))
		}
		return m, nil
	case pglogrepl.PrimaryKeepaliveMessageByteID:
		k, err := pglogrepl.ParsePrimaryKeepaliveMessage(p[1:])
		if err != nil {
			return Message{}, protocolErrorf("keepalive of %d bytes, not 18", len(p))
		}
		return Message{Kind: Keepalive, ServerEnd: wal.LSN(k.ServerWALEnd), ReplyRequested: k.ReplyRequested}, nil
	}
	return Message{}, protocolErrorf("unknown copy data message %q", p[0])
}

// Drained reports whether nothing more waits to be read: neither in the read
// buffer nor in the socket.
func (s *Stream) Drained() bool {
	if s.conn.pg.Frontend().ReadBufferLen() > 0 {
		return false
	}
	if s.raw == nil {
		return true
	}
	s.queued = 0
	_ = s.raw.Control(s.peek)
	return s.queued == 0
}

// Interrupt makes the Receive or SendStatus under way fail with
// os.ErrDeadlineExceeded, and every later Receive until the deadline is changed.
// A later SendStatus takes at most grace. It may be called from any goroutine.
func (s *Stream) Interrupt(grace time.Duration) {
	s.grace.Store(int64(grace))
	_ = s.net.SetDeadline(time.Unix(1, 0))
}

// Wake makes the Receive under way, or else the next one, fail with
// os.ErrDeadlineExceeded, and so every later one until SetDeadline is called. It may
// be called from any goroutine.
func (s *Stream) Wake() {
	_ = s.net.SetReadDeadline(time.Unix(1, 0))
	s.woken.Store(true) // after it: until then SetDeadline is the one that counts
}

// postgresEpoch is 2000-01-01 in microseconds of Unix time.
const postgresEpoch = 946684800 * 1000000

// SendStatus sends a standby status update, within the connection's timeout.
// (pglogrepl's own replaces a flush position of 0 by the write position, which
// would acknowledge WAL that is not synced.)
func (s *Stream) SendStatus(st Status) error {
	b := s.out[:]
	b[0] = 'd' // CopyData
	binary.BigEndian.PutUint32(b[1:], uint32(len(b)-1))
	b[5] = pglogrepl.StandbyStatusUpdateByteID
	binary.BigEndian.PutUint64(b[6:], uint64(st.Write))
	binary.BigEndian.PutUint64(b[14:], uint64(st.Flush))
	binary.BigEndian.PutUint64(b[22:], 0) // apply
	now := time.Now()
	binary.BigEndian.PutUint64(b[30:], uint64(now.UnixMicro()-postgresEpoch))
	b[38] = 0
	if st.ReplyRequested {
		b[38] = 1
	}
	// The deadline is set before grace is looked at; an Interrupt after that ends
	// the write.
	err := s.net.SetWriteDeadline(now.Add(s.conn.timeout))
	if grace := s.grace.Load(); grace != 0 && err == nil {
		err = s.net.SetWriteDeadline(now.Add(time.Duration(grace)))
	}
	if err != nil {
		return wrap("sending a standby status update", err)
	}
	return wrap("sending a standby status update", s.conn.pg.Frontend().SendUnbufferedEncodedCopyData(b))
}

// Finish says CopyDone, in answer to the server's or to end the stream from our
// side, and reads until the server has ended it too, and where WAL goes on. What
// WAL still arrives is dropped; it will be sent again. The connection can then
// be used for commands again, unless there was an error.
func (s *Stream) Finish(ctx context.Context) (NextTimeline, error) {
	const doing = "ending the stream"
	ctx, cancel := context.WithTimeout(ctx, s.conn.timeout)
	defer cancel()
	release := s.watch(ctx)
	defer release()
	frontend := s.conn.pg.Frontend()
	frontend.Send(&pgproto3.CopyDone{})
	if err := frontend.Flush(); err != nil {
		return NextTimeline{}, wrap(doing, contextError(ctx, err))
	}
	next, err := s.readNextTimeline()
	return next, wrap(doing, contextError(ctx, err))
}

// readNextTimeline reads (next_tli, next_tli_startpos), where the server sends
// it, and everything else up to ReadyForQuery.
func (s *Stream) readNextTimeline() (next NextTimeline, err error) {
	for {
		msg, err := s.conn.pg.Frontend().Receive()
		if err != nil {
			return NextTimeline{}, err
		}
		switch msg := msg.(type) {
		case *pgproto3.DataRow:
			if len(msg.Values) != 2 {
				return NextTimeline{}, protocolErrorf("end of timeline: a row of %d columns, not 2", len(msg.Values))
			}
			tli, err := strconv.ParseUint(string(msg.Values[0]), 10, 31)
			if err != nil {
				return NextTimeline{}, protocolErrorf("end of timeline: next timeline %q", clean(string(msg.Values[0])))
			}
			lsn, err := wal.ParseLSN(string(msg.Values[1]))
			if err != nil {
				return NextTimeline{}, protocolErrorf("end of timeline: %v", err)
			}
			next = NextTimeline{Timeline: wal.Timeline(tli), Start: lsn}
		case *pgproto3.ErrorResponse:
			return NextTimeline{}, pgconn.ErrorResponseToPgError(msg)
		case *pgproto3.ReadyForQuery:
			return next, nil
		case *pgproto3.RowDescription, *pgproto3.CommandComplete, *pgproto3.NoticeResponse, *pgproto3.ParameterStatus,
			*pgproto3.CopyDone, *pgproto3.CopyData:
		default:
			return NextTimeline{}, protocolErrorf("end of timeline: unexpected %T", msg)
		}
	}
}
