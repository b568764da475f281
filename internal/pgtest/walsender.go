package pgtest

import (
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/walfleet/walfleet/internal/wal"
)

// Server is a PostgreSQL server of which only the replication side exists: it lives in the test's
// process and speaks the protocol over net.Pipe, or over what Accept is given. With Dial it uses no socket
// and no time but the test's, so it runs in a testing/synctest bubble when NewServer is called there. What it answers follows
// walsender.c, repl_gram.y and slot.c, and was compared with a PostgreSQL 15 on the wire.
//
// Without scripts it behaves as a server would: it streams the WAL of its State, keeps slots, ends
// timelines. OnQuery and OnStream, both set before the first Dial, replace any part of that.
type Server struct {
	// OnQuery answers a query in place of the server; nil leaves it to the server. The ReadyForQuery
	// after it is sent by the server, and a FATAL error closes the connection. See Result and Error.
	OnQuery func(Query) []pgproto3.BackendMessage
	// OnStream takes over after START_REPLICATION was accepted and CopyBothResponse sent; nil is
	// (*Stream).Serve. When it returns without having ended the stream, the connection is closed.
	OnStream func(*Stream)

	t       T
	wg      sync.WaitGroup
	mu      sync.Mutex
	state   State
	changed chan struct{} // closed and replaced whenever anything below mu changes
	conns   map[*conn]struct{}
	streams []*Stream
	lastPID uint32
	closed  bool
}

// State is what a Server says of itself and keeps. Zero values get a default where one is named.
type State struct {
	SystemID    uint64          // default 7000000000000000001
	Timeline    wal.Timeline    // the server's current timeline; default 1
	SegmentSize wal.SegmentSize // default 16 MiB
	Version     string          // server_version; default "17.2"
	Standby     bool            // in recovery: in_hot_standby and transaction_read_only are on

	// Settings are further answers to SHOW, and replace those that follow from the other fields. A name
	// without an answer is SQLSTATE 42704, as on a real server.
	Settings map[string]string

	WALEnd    wal.LSN                 // exclusive end of the WAL that is flushed; Publish moves it
	Oldest    wal.LSN                 // segments before the one that has it were removed
	Redo      wal.LSN                 // what RESERVE_WAL gives a new slot: the last checkpoint's redo; default WALEnd
	Histories map[wal.Timeline][]byte // contents of the history files
	Slots     map[string]*Slot

	Password      string                  // asked for in clear text when not empty
	DialError     error                   // Dial fails with it
	StartupError  *pgproto3.ErrorResponse // refuses connections after their startup message; see Fatal
	ShuttingDown  bool                    // Serve ends as in a fast shutdown, once the client has everything
	SenderTimeout time.Duration           // wal_sender_timeout; default 60 s, negative: none
	MaxMessage    int                     // bytes of WAL in a message of Serve at most; default 128 KiB
	Batch         int                     // messages of Serve that one write carries at most; default 1

	Last StatusUpdate // the latest status update of any client; set by the server

	wal map[wal.Timeline]*WAL // what Serve streams: snapshots, see Publish
}

// Slot is a replication slot. A status update whose flush position is not 0 sets RestartLSN to it,
// forwards or backwards (ProcessStandbyReplyMessage in walsender.c).
type Slot struct {
	RestartLSN wal.LSN // 0: no WAL is reserved
	ActivePID  uint32  // the walsender that uses the slot; 0: none. A test may set it to occupy the slot.
	Logical    bool
}

// Query is one query of a client, sent by the simple or the extended protocol.
type Query struct {
	SQL     string
	Args    [][]byte          // parameters of the extended protocol, in text
	Startup map[string]string // the connection's startup parameters: user, replication, application_name, …
}

// T is what a Server needs of a testing.TB. A program that is no test brings its own.
type T interface {
	Errorf(format string, args ...any)
	Cleanup(func())
}

// NewServer makes a server that is closed when t ends. The maps in s are the server's from then on.
func NewServer(t T, s State) *Server {
	s.SystemID = cmp.Or(s.SystemID, 7000000000000000001)
	s.Timeline = cmp.Or(s.Timeline, 1)
	s.SegmentSize = cmp.Or(s.SegmentSize, 16<<20)
	s.Version = cmp.Or(s.Version, "17.2")
	s.SenderTimeout = cmp.Or(s.SenderTimeout, 60*time.Second)
	s.MaxMessage = cmp.Or(s.MaxMessage, 16*wal.PageSize) // MAX_SEND_SIZE in walsender.c
	s.Batch = cmp.Or(s.Batch, 1)
	s.wal = map[wal.Timeline]*WAL{}
	if s.Histories == nil {
		s.Histories = map[wal.Timeline][]byte{}
	}
	if s.Slots == nil {
		s.Slots = map[string]*Slot{}
	}
	srv := &Server{t: t, state: s, changed: make(chan struct{}), conns: map[*conn]struct{}{}, lastPID: 4710}
	t.Cleanup(srv.Close)
	return srv
}

// Do lets f read or change the state, and tells everyone who waits for a change of it. f must not keep
// the pointer.
func (s *Server) Do(f func(*State)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.state)
	s.wake()
}

// look lets f read the state; nobody is told.
func (s *Server) look(f func(*State)) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f(&s.state)
}

// Publish is State.Publish.
func (s *Server) Publish(w *WAL) { s.Do(func(st *State) { st.Publish(w) }) }

// Publish gives the server a copy of all that w has now, in place of what it had of w's timeline. When that
// is the current timeline, WALEnd moves to w's end. The segment size becomes w's, and so does the system
// identifier, if w has one. Call it again whenever w has grown.
func (s *State) Publish(w *WAL) {
	s.SegmentSize = w.c.Size
	if w.c.SystemID != 0 {
		s.SystemID = w.c.SystemID
	}
	snapshot := *w
	snapshot.buf = slices.Clone(w.buf)
	s.wal[w.c.Timeline] = &snapshot
	if w.c.Timeline == s.Timeline {
		s.WALEnd = w.End()
	}
}

// Promote makes the server go on with w, which forked off the current timeline at at, and writes the new
// timeline's history. It is no standby any more. Streams of the old timeline end there.
func (s *State) Promote(w *WAL, at wal.LSN) {
	line := fmt.Sprintf("%d\t%s\tno recovery target specified\n", s.Timeline, at)
	s.Histories[w.c.Timeline] = append(slices.Clone(s.Histories[s.Timeline]), line...)
	s.Timeline, s.Standby = w.c.Timeline, false
	s.Publish(w)
}

// Wait returns nil as soon as cond holds. It is asked under the lock, first at once and then after every
// change.
func (s *Server) Wait(ctx context.Context, cond func(*State) bool) error {
	return s.wait(ctx, func() (bool, error) { return cond(&s.state), nil })
}

func (s *Server) wait(ctx context.Context, cond func() (bool, error)) error {
	for {
		s.mu.Lock()
		ok, err := cond()
		changed := s.changed
		s.mu.Unlock()
		if ok || err != nil {
			return err
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// wake tells everyone who waits; the caller holds mu.
func (s *Server) wake() {
	close(s.changed)
	s.changed = make(chan struct{})
}

// Streams are all streams that were started so far, oldest first.
func (s *Server) Streams() []*Stream {
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.streams)
}

// Disconnect cuts every connection, as when the server is killed, and waits until they are gone.
// It must not be called by OnQuery or OnStream.
func (s *Server) Disconnect() {
	s.mu.Lock()
	var conns []*conn
	for c := range s.conns {
		conns = append(conns, c)
	}
	s.mu.Unlock()
	for _, c := range conns {
		c.hangUp()
	}
	for _, c := range conns {
		<-c.finished
	}
}

// Close refuses further connections, cuts those that there are, and waits for every goroutine of the
// server. It may be called more than once, but not by OnQuery or OnStream.
func (s *Server) Close() {
	s.mu.Lock()
	s.closed = true
	s.mu.Unlock()
	s.Disconnect()
	s.wg.Wait()
}

// Lookup fits pgconn.LookupFunc, and keeps clients of Dial from asking a name server.
func Lookup(_ context.Context, host string) ([]string, error) { return []string{host}, nil }

// Dial connects to the server, whatever the address says. It fits pgconn.DialFunc.
func (s *Server) Dial(ctx context.Context, network, _ string) (net.Conn, error) {
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.state.DialError != nil {
		return nil, s.state.DialError
	}
	if s.closed {
		return nil, &net.OpError{Op: "dial", Net: network, Err: os.NewSyscallError("connect", syscall.ECONNREFUSED)}
	}
	client, server := net.Pipe()
	return &clientEnd{Conn: client, closed: s.serve(server).hangUp}, nil
}

// Accept serves a client that is connected already, on a socket say. The connection is the server's from then on.
func (s *Server) Accept(client net.Conn) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed {
		_ = client.Close()
		return
	}
	s.serve(client)
}

// serve serves a connection; the caller holds mu.
func (s *Server) serve(server net.Conn) *conn {
	s.lastPID++
	c := &conn{srv: s, pid: s.lastPID, net: server, be: pgproto3.NewBackend(server, server), gone: make(chan struct{}), finished: make(chan struct{})}
	s.conns[c] = struct{}{}
	s.wg.Go(c.serve)
	return c
}

// clientEnd is the client's end of a connection. The server knows at once that it was closed: a client
// that connects again finds its slot free.
type clientEnd struct {
	net.Conn
	closed func()
}

func (c *clientEnd) Close() error {
	err := c.Conn.Close()
	c.closed()
	return err
}

// Error is an error that leaves the connection usable.
func Error(code, format string, args ...any) *pgproto3.ErrorResponse {
	return &pgproto3.ErrorResponse{Severity: "ERROR", SeverityUnlocalized: "ERROR", Code: code, Message: fmt.Sprintf(format, args...)}
}

// Fatal is an error that ends the connection.
func Fatal(code, format string, args ...any) *pgproto3.ErrorResponse {
	e := Error(code, format, args...)
	e.Severity, e.SeverityUnlocalized = "FATAL", "FATAL"
	return e
}

// Result is a result set with its command tag. A nil value is NULL; int32 and int64 columns are int4 and
// int8, all others text.
func Result(tag string, columns []string, rows ...[]any) []pgproto3.BackendMessage {
	desc := &pgproto3.RowDescription{}
	for i, name := range columns {
		f := pgproto3.FieldDescription{Name: []byte(name), DataTypeOID: 25, DataTypeSize: -1, TypeModifier: -1}
		for _, row := range rows {
			switch row[i].(type) {
			case int32:
				f.DataTypeOID, f.DataTypeSize = 23, 4
			case int64:
				f.DataTypeOID, f.DataTypeSize = 20, 8
			}
		}
		desc.Fields = append(desc.Fields, f)
	}
	msgs := []pgproto3.BackendMessage{desc}
	for _, row := range rows {
		values := make([][]byte, len(row))
		for i, v := range row {
			switch v := v.(type) {
			case nil:
			case []byte:
				values[i] = v
			default:
				values[i] = fmt.Append([]byte{}, v)
			}
		}
		msgs = append(msgs, &pgproto3.DataRow{Values: values})
	}
	return append(msgs, done(tag))
}

func done(tag string) *pgproto3.CommandComplete {
	return &pgproto3.CommandComplete{CommandTag: []byte(tag)}
}

// conn is one client's connection: serve answers and streams, and read, which starts after the
// handshake, takes in everything that the client sends, so that neither side's writes block the other's.
type conn struct {
	srv      *Server
	pid      uint32
	net      net.Conn
	be       *pgproto3.Backend // read receives, serve sends
	startup  map[string]string
	standby  string        // in_hot_standby as last reported
	once     sync.Once     // hangUp
	gone     chan struct{} // closed by hangUp
	finished chan struct{} // closed when serve has returned

	// under srv.mu
	queue  []request
	stream *Stream // in copy mode
	dead   bool    // hung up
}

type request struct {
	sql      string
	args     [][]byte
	extended bool
}

// hangUp closes the connection and gives its slot free.
func (c *conn) hangUp() {
	c.once.Do(func() {
		s := c.srv
		s.mu.Lock()
		s.state.release(c.pid)
		c.dead = true
		close(c.gone)
		s.wake()
		s.mu.Unlock()
		_ = c.net.Close()
	})
}

// release is ReplicationSlotRelease of slot.c.
func (s *State) release(pid uint32) {
	for _, slot := range s.Slots {
		if slot.ActivePID == pid {
			slot.ActivePID = 0
		}
	}
}

func (c *conn) serve() {
	defer func() {
		c.hangUp()
		c.srv.mu.Lock()
		delete(c.srv.conns, c)
		c.srv.mu.Unlock()
		close(c.finished)
	}()
	if c.handshake() != nil {
		return
	}
	c.srv.wg.Go(c.read)
	for {
		var r request
		err := c.wait(func() bool {
			if len(c.queue) == 0 {
				return false
			}
			r, c.queue = c.queue[0], c.queue[1:]
			return true
		})
		if err != nil || c.answer(r) != nil {
			return
		}
	}
}

// wait waits for cond, under srv.mu, or for the end of the connection, which is io.EOF.
func (c *conn) wait(cond func() bool) error {
	return c.srv.wait(context.Background(), func() (bool, error) {
		if c.dead {
			return false, io.EOF
		}
		return cond(), nil
	})
}

// errFatal ends a connection after a FATAL error was sent.
var errFatal = errors.New("fatal error sent")

// send writes messages at once. A FATAL error among them, and a client that is gone, give an error.
func (c *conn) send(msgs ...pgproto3.BackendMessage) error {
	var fatal error
	for _, m := range msgs {
		c.be.Send(m)
		if e, ok := m.(*pgproto3.ErrorResponse); ok && e.Severity != "ERROR" {
			fatal = errFatal
			break
		}
	}
	if err := c.be.Flush(); err != nil {
		return err
	}
	return fatal
}

func (c *conn) handshake() error {
	var startup *pgproto3.StartupMessage
	for startup == nil {
		msg, err := c.be.ReceiveStartupMessage()
		if err != nil {
			return err
		}
		switch msg := msg.(type) {
		case *pgproto3.SSLRequest, *pgproto3.GSSEncRequest:
			if _, err := c.net.Write([]byte("N")); err != nil {
				return err
			}
		case *pgproto3.StartupMessage:
			startup = msg
		default: // CancelRequest
			return errFatal
		}
	}
	c.startup = startup.Parameters
	var major int
	var password string
	var refused *pgproto3.ErrorResponse
	c.srv.look(func(s *State) { major, password, refused = s.major(), s.Password, s.StartupError })
	if startup.ProtocolVersion != pgproto3.ProtocolVersion30 && major < 18 {
		if err := c.send(&pgproto3.NegotiateProtocolVersion{}); err != nil {
			return err
		}
	}
	if refused != nil {
		return errors.Join(c.send(refused), errFatal)
	}
	if password != "" {
		if err := c.send(&pgproto3.AuthenticationCleartextPassword{}); err != nil {
			return err
		}
		msg, err := c.be.Receive()
		if err != nil {
			return err
		}
		if p, ok := msg.(*pgproto3.PasswordMessage); !ok || p.Password != password {
			return c.send(Fatal("28P01", "password authentication failed for user %q", c.startup["user"]))
		}
	}
	msgs := []pgproto3.BackendMessage{&pgproto3.AuthenticationOk{}}
	c.srv.look(func(s *State) {
		for _, name := range []string{"default_transaction_read_only", "in_hot_standby", "integer_datetimes", "server_encoding", "server_version", "standard_conforming_strings"} {
			if v, ok := s.setting(name); ok {
				msgs = append(msgs, &pgproto3.ParameterStatus{Name: name, Value: v})
			}
		}
		c.standby, _ = s.setting("in_hot_standby")
	})
	return c.send(append(msgs, &pgproto3.BackendKeyData{ProcessID: c.pid, SecretKey: []byte{0, 0, 0, 1}}, ready)...)
}

var ready = &pgproto3.ReadyForQuery{TxStatus: 'I'}

// finish sends the answer to a query and ReadyForQuery, after the report of a promotion.
func (c *conn) finish(msgs ...pgproto3.BackendMessage) error {
	var standby string
	c.srv.look(func(s *State) { standby, _ = s.setting("in_hot_standby") })
	if standby != c.standby {
		c.standby = standby
		msgs = append(msgs, &pgproto3.ParameterStatus{Name: "in_hot_standby", Value: standby})
	}
	return c.send(append(msgs, ready)...)
}

// read takes in what the client sends until it is gone.
func (c *conn) read() {
	defer c.hangUp()
	s := c.srv
	var extended request
	for {
		msg, err := c.be.Receive()
		if err != nil {
			if !isGone(err) {
				s.t.Errorf("pgtest: from the client: %v", err)
			}
			return
		}
		s.mu.Lock()
		st := c.stream
		switch msg := msg.(type) {
		case *pgproto3.Query:
			c.queue = append(c.queue, request{sql: msg.String})
		case *pgproto3.Parse:
			extended = request{sql: msg.Query, extended: true}
		case *pgproto3.Bind:
			for _, p := range msg.Parameters {
				extended.args = append(extended.args, slices.Clone(p))
			}
		case *pgproto3.Describe, *pgproto3.Execute, *pgproto3.Flush:
		case *pgproto3.Sync:
			c.queue = append(c.queue, extended)
		case *pgproto3.CopyData: // outside of copy mode it is skipped, as in PostgresMain
			if st != nil && !st.ended.CopyDone {
				err = st.feedback(msg.Data)
			}
		case *pgproto3.CopyDone:
			if st != nil {
				st.ended.CopyDone = true
			}
		case *pgproto3.Terminate:
			if st != nil {
				st.ended.Terminate = true
			}
			s.mu.Unlock()
			return
		default:
			err = fmt.Errorf("unexpected %T", msg)
		}
		if _, copying := msg.(*pgproto3.CopyData); st != nil && !copying && !st.ended.CopyDone && err == nil {
			err = fmt.Errorf("%T in a stream (invalid standby message type)", msg)
		}
		s.wake()
		s.mu.Unlock()
		if err != nil {
			s.t.Errorf("pgtest: from the client: %v", err)
			return
		}
	}
}

// isGone tells an error of reading that says that the connection was closed, by either side.
func isGone(err error) bool {
	return errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.ErrClosedPipe) || errors.Is(err, net.ErrClosed) || errors.Is(err, syscall.ECONNRESET)
}

// answer answers one query, and streams when it began a stream. An error ends the connection.
func (c *conn) answer(r request) error {
	var msgs []pgproto3.BackendMessage
	if c.srv.OnQuery != nil {
		msgs = c.srv.OnQuery(Query{SQL: r.sql, Args: r.args, Startup: c.startup})
	}
	if msgs == nil && r.extended && c.replication() {
		msgs = failed("08P01", "extended query protocol not supported in a replication connection")
	}
	var st *Stream
	if msgs == nil {
		c.srv.Do(func(s *State) { msgs = c.execute(s, r.sql); st = c.stream })
	}
	if _, failed := msgs[0].(*pgproto3.ErrorResponse); r.extended && !failed {
		pre := []pgproto3.BackendMessage{&pgproto3.ParseComplete{}, &pgproto3.BindComplete{}}
		if _, rows := msgs[0].(*pgproto3.RowDescription); !rows {
			pre = append(pre, &pgproto3.NoData{})
		}
		msgs = append(pre, msgs...)
	}
	if st == nil {
		return c.finish(msgs...)
	}
	if err := c.send(msgs...); err != nil {
		return err
	}
	if c.srv.OnStream != nil {
		c.srv.OnStream(st)
	} else {
		st.Serve()
	}
	if !st.over {
		return errors.New("the stream was not ended")
	}
	return nil
}

// setting answers SHOW.
func (s *State) setting(name string) (value string, ok bool) {
	name = strings.ToLower(name)
	if value, ok = s.Settings[name]; ok {
		return value, true
	}
	onOff := map[bool]string{true: "on", false: "off"}
	switch name {
	case "server_version":
		return s.Version, true
	case "wal_segment_size":
		if s.SegmentSize == 1<<30 {
			return "1GB", true
		}
		return fmt.Sprintf("%dMB", s.SegmentSize>>20), true
	case "in_hot_standby":
		return onOff[s.Standby], s.major() >= 14
	case "transaction_read_only":
		return onOff[s.Standby], true
	}
	value, ok = map[string]string{
		"data_directory_mode":           "0700",
		"default_transaction_read_only": "off",
		"integer_datetimes":             "on",
		"server_encoding":               "UTF8",
		"standard_conforming_strings":   "on",
		"wal_block_size":                strconv.Itoa(wal.PageSize),
		"wal_level":                     "replica",
	}[name]
	return value, ok
}

// major is the number of the major version.
func (s *State) major() int {
	digits := s.Version
	if i := strings.IndexFunc(digits, func(r rune) bool { return r < '0' || r > '9' }); i >= 0 {
		digits = digits[:i]
	}
	n, _ := strconv.Atoi(digits)
	return n
}

// tag is the command tag of a replication command; before PostgreSQL 14 all had the same.
func (s *State) tag(command string) string {
	if s.major() < 14 {
		return "SELECT"
	}
	return command
}

// history is the ancestry of the server's timeline.
func (s *State) history() wal.History {
	h, err := wal.ParseHistory(s.Timeline, s.Histories[s.Timeline])
	if err != nil {
		h = wal.History{Timeline: s.Timeline}
	}
	return h
}

// grammar is what there is of repl_gram.y here. In a syntax a space stands for white space, ~ for white
// space or nothing, and NAME for an identifier. run is called under srv.mu with the parts in parentheses.
var grammar = []struct {
	keyword string
	since   int // major version
	syntax  *regexp.Regexp
	run     func(c *conn, s *State, args []string) []pgproto3.BackendMessage
}{
	{"IDENTIFY_SYSTEM", 0, syntax(`IDENTIFY_SYSTEM`), (*conn).identifySystem},
	{"SHOW", 0, syntax(`(?i:SHOW) (NAME(?:\.NAME)*)`), (*conn).show},
	{"READ_REPLICATION_SLOT", 15, syntax(`READ_REPLICATION_SLOT (NAME)`), (*conn).readSlot},
	{"CREATE_REPLICATION_SLOT", 0, syntax(`CREATE_REPLICATION_SLOT (NAME) PHYSICAL(?: (RESERVE_WAL)|~\(~(NAME)~\))?`), (*conn).createSlot},
	{"DROP_REPLICATION_SLOT", 0, syntax(`DROP_REPLICATION_SLOT (NAME)`), (*conn).dropSlot},
	{"TIMELINE_HISTORY", 0, syntax(`TIMELINE_HISTORY ([0-9]+)`), (*conn).timelineHistory},
	{"START_REPLICATION", 0, syntax(`START_REPLICATION(?: SLOT (NAME))?(?: PHYSICAL)? ([0-9A-Fa-f]+/[0-9A-Fa-f]+)(?: TIMELINE ([0-9]+))?`), (*conn).startReplication},
}

func syntax(s string) *regexp.Regexp {
	s = strings.NewReplacer(" ", `\s+`, "~", `\s*`, "NAME", identifier).Replace(s)
	return regexp.MustCompile(`^\s*` + s + `\s*;?\s*$`)
}

const identifier = `(?:[A-Za-z_][A-Za-z0-9_$]*|"(?:[^"]|"")*")`

// unquote gives the name that an identifier stands for.
func unquote(identifier string) string {
	if name, ok := strings.CutPrefix(identifier, `"`); ok {
		return strings.ReplaceAll(strings.TrimSuffix(name, `"`), `""`, `"`)
	}
	return strings.ToLower(identifier)
}

var firstWord = regexp.MustCompile(`^\s*([A-Za-z_]*)`)

// execute runs a command under srv.mu. When it leaves a stream in c.stream, that begins after the answer.
func (c *conn) execute(s *State, sql string) []pgproto3.BackendMessage {
	keyword := firstWord.FindStringSubmatch(sql)[1]
	if !c.physical() && strings.EqualFold(keyword, "SHOW") { // which is also SQL
		keyword = "SHOW"
	}
	for _, g := range grammar {
		if g.keyword != keyword || s.major() < g.since || !c.replication() && keyword != "SHOW" {
			continue
		}
		m := g.syntax.FindStringSubmatch(sql)
		if m == nil {
			return failed("42601", "syntax error")
		}
		return g.run(c, s, m[1:])
	}
	switch {
	case c.physical():
		return failed("0A000", "cannot execute SQL commands in WAL sender for physical replication")
	case strings.Trim(sql, "; \t\n") == "":
		return []pgproto3.BackendMessage{&pgproto3.EmptyQueryResponse{}}
	}
	return failed("42601", "pgtest: no answer to this query; Server.OnQuery can give one")
}

// replication tells a walsender from an ordinary backend.
func (c *conn) replication() bool { return c.startup["replication"] != "" }

// physical tells a walsender that has no database, and so no SQL.
func (c *conn) physical() bool { return c.replication() && c.startup["replication"] != "database" }

func failed(code, format string, args ...any) []pgproto3.BackendMessage {
	return []pgproto3.BackendMessage{Error(code, format, args...)}
}

func (c *conn) identifySystem(s *State, _ []string) []pgproto3.BackendMessage {
	var database any
	if !c.physical() {
		database = c.startup["database"]
	}
	return Result(s.tag("IDENTIFY_SYSTEM"), []string{"systemid", "timeline", "xlogpos", "dbname"},
		[]any{s.SystemID, int32(s.Timeline), s.WALEnd, database})
}

func (c *conn) show(s *State, args []string) []pgproto3.BackendMessage {
	name := unquote(args[0])
	value, ok := s.setting(name)
	if !ok {
		return failed("42704", "unrecognized configuration parameter %q", name)
	}
	return Result(s.tag("SHOW"), []string{name}, []any{value})
}

func (c *conn) readSlot(s *State, args []string) []pgproto3.BackendMessage {
	row := []any{nil, nil, nil}
	if slot := s.Slots[unquote(args[0])]; slot != nil {
		if slot.Logical {
			return failed("0A000", "cannot use READ_REPLICATION_SLOT with a logical replication slot")
		}
		row[0] = "physical"
		if slot.RestartLSN != 0 {
			row[1], row[2] = slot.RestartLSN, int64(s.timelineOf(slot.RestartLSN))
		}
	}
	return Result("READ_REPLICATION_SLOT", []string{"slot_type", "restart_lsn", "restart_tli"}, row)
}

func (c *conn) createSlot(s *State, args []string) []pgproto3.BackendMessage {
	name, reserve, option := unquote(args[0]), args[1] != "", unquote(args[2])
	switch {
	case option != "" && s.major() < 15:
		return failed("42601", "syntax error")
	case option != "" && option != "reserve_wal":
		return failed("XX000", "unrecognized option: %s", option)
	case name == "":
		return failed("42602", "replication slot name %q is too short", name)
	case strings.Trim(name, "abcdefghijklmnopqrstuvwxyz0123456789_") != "":
		return failed("42602", "replication slot name %q contains invalid character", name)
	case s.Slots[name] != nil:
		return failed("42710", "replication slot %q already exists", name)
	}
	slot := &Slot{}
	if reserve || option != "" {
		slot.RestartLSN = cmp.Or(s.Redo, s.WALEnd)
	}
	s.Slots[name] = slot
	return Result(s.tag("CREATE_REPLICATION_SLOT"), []string{"slot_name", "consistent_point", "snapshot_name", "output_plugin"},
		[]any{name, "0/0", nil, nil})
}

func (c *conn) dropSlot(s *State, args []string) []pgproto3.BackendMessage {
	name := unquote(args[0])
	if e := s.acquire(name, 0); e != nil {
		return []pgproto3.BackendMessage{e}
	}
	delete(s.Slots, name)
	return []pgproto3.BackendMessage{done("DROP_REPLICATION_SLOT")}
}

func (c *conn) timelineHistory(s *State, args []string) []pgproto3.BackendMessage {
	tli, err := parseTimeline(args[0])
	if err != nil {
		return []pgproto3.BackendMessage{err}
	}
	columns := []string{"filename", "content"}
	content, ok := s.Histories[tli]
	if !ok { // the columns are described before the file is opened
		return []pgproto3.BackendMessage{Result("", columns)[0],
			Error("58P01", `could not open file "pg_wal/%s": No such file or directory`, wal.HistoryName(tli))}
	}
	return Result(s.tag("TIMELINE_HISTORY"), columns, []any{wal.HistoryName(tli), content})
}

func parseTimeline(digits string) (wal.Timeline, *pgproto3.ErrorResponse) {
	n, err := strconv.ParseUint(digits, 10, 32)
	if err != nil || n == 0 {
		return 0, Error("42601", "invalid timeline %s", digits)
	}
	return wal.Timeline(n), nil
}

// timelineOf is the timeline in the server's history to which a position belongs (tliOfPointInHistory).
func (s *State) timelineOf(l wal.LSN) wal.Timeline {
	for _, f := range s.history().Forks {
		if l < f.End {
			return f.Timeline
		}
	}
	return s.Timeline
}

// acquire is ReplicationSlotAcquire of slot.c.
func (s *State) acquire(name string, pid uint32) *pgproto3.ErrorResponse {
	slot := s.Slots[name]
	if slot == nil {
		return Error("42704", "replication slot %q does not exist", name)
	}
	if slot.ActivePID != 0 {
		return Error("55006", "replication slot %q is active for PID %d", name, slot.ActivePID)
	}
	slot.ActivePID = pid
	return nil
}

// StartReplication is what a client asked for.
type StartReplication struct {
	Slot     string // "": none
	LSN      wal.LSN
	Timeline wal.Timeline // 0: not given, which means the server's
}

// startReplication is the first part of StartReplication in walsender.c.
func (c *conn) startReplication(s *State, args []string) []pgproto3.BackendMessage {
	r := StartReplication{Slot: unquote(args[0])}
	var err error
	if r.LSN, err = wal.ParseLSN(args[1]); err != nil {
		return failed("42601", "invalid streaming start location")
	}
	if args[2] != "" {
		var e *pgproto3.ErrorResponse
		if r.Timeline, e = parseTimeline(args[2]); e != nil {
			return []pgproto3.BackendMessage{e}
		}
	}
	if args[0] != "" {
		if e := s.acquire(r.Slot, c.pid); e != nil {
			return []pgproto3.BackendMessage{e}
		}
	}
	st := &Stream{c: c, request: r, timeline: cmp.Or(r.Timeline, s.Timeline), pos: r.LSN}
	msgs, streaming := st.start(s)
	if !streaming {
		s.release(c.pid)
		return msgs
	}
	st.postpone()
	c.stream = st
	c.srv.streams = append(c.srv.streams, st)
	return msgs
}

// start is what a client hears first, and whether that begins a stream.
func (st *Stream) start(s *State) (msgs []pgproto3.BackendMessage, streaming bool) {
	slot, l := s.Slots[st.request.Slot], st.request.LSN
	h := s.history()
	end, known := h.End(st.timeline)
	next, _ := h.Next(st.timeline)
	switch {
	case slot != nil && slot.Logical:
		return failed("55000", "cannot use a logical replication slot for physical replication"), false
	case !known:
		return failed("XX000", "requested timeline %d is not in this server's history", st.timeline), false
	case l > end:
		e := Error("XX000", "requested starting point %s on timeline %d is not in this server's history", l, st.timeline)
		e.Detail = fmt.Sprintf("This server's history forked from timeline %d at %s.", st.timeline, end)
		return []pgproto3.BackendMessage{e}, false
	case l == end:
		return s.endOfStream(next, l), false
	}
	msgs = append(msgs, &pgproto3.CopyBothResponse{})
	switch {
	case l > s.WALEnd:
		return append(msgs, Error("XX000", "requested starting point %s is ahead of the WAL flush position of this server %s", l, s.WALEnd)), false
	case s.removed(st.timeline, l):
		return append(msgs, Error("58P01", "requested WAL segment %s has already been removed", s.SegmentSize.Segment(st.timeline, l))), false
	}
	return msgs, true
}

// removed tells WAL that the server no longer has. A timeline's own files begin with the segment in which it
// forked off.
func (s *State) removed(tli wal.Timeline, l wal.LSN) bool {
	oldest := s.SegmentSize.Start(s.Oldest)
	h := s.history()
	for _, f := range h.Forks {
		if next, _ := h.Next(f.Timeline); next == tli {
			oldest = max(oldest, s.SegmentSize.Start(f.End))
		}
	}
	w := s.wal[tli]
	return l < oldest || len(s.wal) > 0 && (w == nil || l < w.c.Start)
}

// endOfStream is the last part of an answer to START_REPLICATION: where the WAL goes on, in two messages, and
// the command tags of StartReplication and of exec_replication_command.
func (s *State) endOfStream(next wal.Timeline, pos wal.LSN) []pgproto3.BackendMessage {
	return append(Result("START_STREAMING", []string{"next_tli", "next_tli_startpos"}, []any{int64(next), pos}),
		done(s.tag("START_REPLICATION")))
}

// StatusUpdate is a client's standby status update.
type StatusUpdate struct {
	Write, Flush, Apply wal.LSN   // exclusive ends; 0: not known
	ClientTime          time.Time // the client's clock
	ReplyRequested      bool
	At                  time.Time // when the server had it
	PID                 uint32    // the walsender that it was sent to
}

// Ended tells how a client has said goodbye so far.
type Ended struct {
	CopyDone  bool // it ended the stream
	Terminate bool // it ended the connection in good order
	Gone      bool // the connection is closed, by either side
}

// Stream is the server's side of one replication stream. What sends is for OnStream's goroutine;
// everything else for any.
type Stream struct {
	c        *conn
	request  StartReplication
	timeline wal.Timeline

	sentDone bool    // our CopyDone was sent
	over     bool    // back to commands
	pos      wal.LSN // Serve: exclusive end of what was sent

	// under srv.mu
	statuses  []StatusUpdate
	seen      int // statuses that WaitStatus has gone through
	answered  int // statuses whose wish for a reply Serve has met
	ended     Ended
	lastReply time.Time
	pinged    bool // a keepalive has asked for a reply since lastReply
}

// Request is what the client asked for.
func (st *Stream) Request() StartReplication { return st.request }

// PID identifies the connection, as pg_stat_replication's pid does.
func (st *Stream) PID() uint32 { return st.c.pid }

// Startup are the connection's startup parameters: application_name and the rest.
func (st *Stream) Startup() map[string]string { return st.c.startup }

// Gone is closed when the connection is.
func (st *Stream) Gone() <-chan struct{} { return st.c.gone }

// Ended tells how the client has said goodbye so far.
func (st *Stream) Ended() Ended {
	st.c.srv.mu.Lock()
	defer st.c.srv.mu.Unlock()
	e := st.ended
	e.Gone = st.c.dead
	return e
}

// Statuses are all status updates so far, oldest first.
func (st *Stream) Statuses() []StatusUpdate {
	st.c.srv.mu.Lock()
	defer st.c.srv.mu.Unlock()
	return slices.Clone(st.statuses)
}

// WaitStatus returns the first status update that matches, of those that no earlier call has gone
// through; a nil match is the next one. The error is io.EOF when the connection ends before.
func (st *Stream) WaitStatus(ctx context.Context, match func(StatusUpdate) bool) (u StatusUpdate, err error) {
	err = st.c.srv.wait(ctx, func() (bool, error) {
		for st.seen < len(st.statuses) {
			u = st.statuses[st.seen]
			st.seen++
			if match == nil || match(u) {
				return true, nil
			}
		}
		if st.c.dead {
			return false, io.EOF
		}
		return false, nil
	})
	return u, err
}

// feedback takes in the client's copy data, as ProcessStandbyMessage does; the caller holds srv.mu.
func (st *Stream) feedback(p []byte) error {
	switch {
	case len(p) == 34 && p[0] == 'r':
	case len(p) > 0 && p[0] == 'h': // hot standby feedback
		st.postpone()
		return nil
	default:
		return fmt.Errorf("copy data is no standby status update: %q", p)
	}
	lsn := func(i int) wal.LSN { return wal.LSN(binary.BigEndian.Uint64(p[i:])) }
	u := StatusUpdate{
		Write: lsn(1), Flush: lsn(9), Apply: lsn(17),
		ClientTime: epoch.Add(time.Duration(binary.BigEndian.Uint64(p[25:])) * time.Microsecond), ReplyRequested: p[33] != 0,
		At: time.Now(), PID: st.c.pid,
	}
	st.statuses = append(st.statuses, u)
	state := &st.c.srv.state
	state.Last = u
	if slot := state.Slots[st.request.Slot]; slot != nil && u.Flush != 0 {
		slot.RestartLSN = u.Flush
	}
	st.postpone()
	return nil
}

// postpone begins wal_sender_timeout anew; it also bounds writes to a client that does not read.
func (st *Stream) postpone() {
	st.lastReply, st.pinged = time.Now(), false
	if timeout := st.c.srv.state.SenderTimeout; timeout > 0 {
		_ = st.c.net.SetWriteDeadline(st.lastReply.Add(timeout))
	}
}

// epoch is where PostgreSQL's time begins.
var epoch = time.Date(2000, 1, 1, 0, 0, 0, 0, time.UTC)

// WALData is an XLogData message: data begins at start, and walEnd is the end of the server's WAL.
func WALData(start, walEnd wal.LSN, data []byte) pgproto3.BackendMessage {
	p := binary.BigEndian.AppendUint64([]byte{'w'}, uint64(start))
	p = binary.BigEndian.AppendUint64(p, uint64(walEnd))
	p = binary.BigEndian.AppendUint64(p, uint64(time.Since(epoch).Microseconds()))
	return &pgproto3.CopyData{Data: append(p, data...)}
}

// Keepalive is a primary keepalive message.
func Keepalive(walEnd wal.LSN, replyRequested bool) pgproto3.BackendMessage {
	p := binary.BigEndian.AppendUint64([]byte{'k'}, uint64(walEnd))
	p = binary.BigEndian.AppendUint64(p, uint64(time.Since(epoch).Microseconds()))
	if replyRequested {
		return &pgproto3.CopyData{Data: append(p, 1)}
	}
	return &pgproto3.CopyData{Data: append(p, 0)}
}

// Send sends WAL that begins at start; walEnd is the end of the server's WAL.
func (st *Stream) Send(start, walEnd wal.LSN, data []byte) error {
	return st.SendMessage(WALData(start, walEnd, data))
}

// Keepalive sends a keepalive.
func (st *Stream) Keepalive(walEnd wal.LSN, replyRequested bool) error {
	return st.SendMessage(Keepalive(walEnd, replyRequested))
}

// SendMessage sends any messages in one write; &pgproto3.CopyData{Data: …} has any content in copy mode.
func (st *Stream) SendMessage(msgs ...pgproto3.BackendMessage) error { return st.c.send(msgs...) }

// SendBytes writes bytes to the connection, of whatever they are a part.
func (st *Stream) SendBytes(p []byte) error {
	_, err := st.c.net.Write(p)
	return err
}

// CopyDone says that nothing more will be sent.
func (st *Stream) CopyDone() error {
	st.sentDone = true
	return st.c.send(&pgproto3.CopyDone{})
}

// End ends the stream on the current timeline, mostly because the client asked for it: CopyDone unless
// that was sent, the client's CopyDone, and back to commands.
func (st *Stream) End() error {
	return st.end(func(s *State) []pgproto3.BackendMessage { return s.endOfStream(0, 0)[2:] })
}

// EndTimeline ends the stream because its timeline ended at pos and next follows; PolarDB can say 0
// there. Otherwise it is End.
func (st *Stream) EndTimeline(next wal.Timeline, pos wal.LSN) error {
	return st.end(func(s *State) []pgproto3.BackendMessage { return s.endOfStream(next, pos) })
}

func (st *Stream) end(last func(*State) []pgproto3.BackendMessage) error {
	if !st.sentDone {
		if err := st.CopyDone(); err != nil {
			return err
		}
	}
	if err := st.c.wait(func() bool { return st.ended.CopyDone }); err != nil {
		return err
	}
	var msgs []pgproto3.BackendMessage
	st.c.srv.Do(func(s *State) {
		st.c.stream = nil
		s.release(st.c.pid)
		msgs = last(s)
	})
	_ = st.c.net.SetWriteDeadline(time.Time{})
	if err := st.c.finish(msgs...); err != nil {
		return err
	}
	st.over = true
	return nil
}

// Serve streams the server's WAL from the requested position as WalSndLoop does, as it grows, until the
// client or its timeline ends the stream, or the connection ends. It answers status updates that ask for
// a reply, and keeps wal_sender_timeout.
func (st *Stream) Serve() {
	s := st.c.srv
	for {
		s.mu.Lock()
		step, sleep := st.next(&s.state)
		changed := s.changed
		s.mu.Unlock()
		if step != nil {
			if step() != nil || st.over {
				return
			}
			continue
		}
		var timer <-chan time.Time
		if sleep > 0 {
			timer = time.After(sleep)
		}
		select {
		case <-changed:
		case <-timer:
		case <-st.c.gone:
			return
		}
	}
}

// next is what Serve does next; nil: wait for a change, or for sleep to pass when it is not 0. An error of
// step ends the connection. The caller holds srv.mu, step's does not.
func (st *Stream) next(s *State) (step func() error, sleep time.Duration) {
	h := s.history()
	end, known := h.End(st.timeline)
	follower, historic := h.Next(st.timeline)
	if !historic {
		end = s.WALEnd
	}
	w, have := s.wal[st.timeline], wal.LSN(0) // exclusive end of what can be sent
	if w != nil {
		have = min(end, w.End())
	}
	timeline := func() error { return st.EndTimeline(follower, end) }
	keepalive := func(reply bool) func() error {
		pos := st.pos
		return func() error { return st.Keepalive(pos, reply) }
	}
	asked := slices.ContainsFunc(st.statuses[st.answered:], func(u StatusUpdate) bool { return u.ReplyRequested })
	st.answered = len(st.statuses)
	switch {
	case !known:
		return func() error { return errors.New("the server has left the timeline") }, 0
	case st.ended.CopyDone && historic:
		return timeline, 0
	case st.ended.CopyDone:
		return st.End, 0
	case asked:
		return keepalive(false), 0
	case st.pos < have:
		var msgs []pgproto3.BackendMessage
		for len(msgs) < s.Batch && st.pos < have {
			to := st.pos + wal.LSN(s.MaxMessage)
			if page := to - to%wal.PageSize; to < have && page > st.pos {
				to = page // XLogSendPhysical: a record is only split at a page's end
			}
			to = min(to, have)
			msgs = append(msgs, WALData(st.pos, end, w.Bytes(st.pos, to)))
			st.pos = to
		}
		return func() error { return st.SendMessage(msgs...) }, 0
	case historic && st.pos >= end:
		return timeline, 0
	}
	if s.ShuttingDown { // WalSndDone
		var last StatusUpdate
		if n := len(st.statuses); n > 0 {
			last = st.statuses[n-1]
		}
		if last.Flush == 0 {
			last.Flush = last.Write
		}
		if last.Flush == st.pos {
			return func() error { return errors.Join(st.SendMessage(done("COPY 0")), io.EOF) }, 0
		}
		if !st.pinged {
			st.pinged = true
			return keepalive(true), 0
		}
	}
	if s.SenderTimeout < 0 {
		return nil, 0
	}
	silence := time.Since(st.lastReply)
	switch {
	case silence >= s.SenderTimeout:
		return func() error { return os.ErrDeadlineExceeded }, 0
	case st.pinged:
		return nil, s.SenderTimeout - silence
	case silence >= s.SenderTimeout/2:
		st.pinged = true
		return keepalive(true), 0
	}
	return nil, s.SenderTimeout/2 - silence
}
