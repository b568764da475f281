package pgrepl

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"time"

	"github.com/jackc/pglogrepl"
	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walfleet/walfleet/internal/wal"
)

// MinServerVersion is the oldest major version of PostgreSQL that is archived.
const MinServerVersion = 13

// Options are the parts of a connection that are not in the conninfo.
type Options struct {
	// ApplicationName is shown in pg_stat_replication and matched by
	// synchronous_standby_names. Empty: the conninfo's, PGAPPNAME, "walfleet".
	ApplicationName string
	// PasswordFile, when set, holds the password on its first line.
	PasswordFile string
	// Timeout bounds each command on the connection, and closing it.
	Timeout time.Duration
	// Dial replaces the network, for tests. It gets what net.Dialer would.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
	// NoteAuth makes the connection remember how the server authenticated us; see
	// Conn.AuthMethod.
	NoteAuth bool
}

// Conn is a connection in physical replication mode. It is used by one
// goroutine at a time.
type Conn struct {
	pg      *pgconn.PgConn
	host    string
	config  *pgconn.Config
	timeout time.Duration
	method  string // of authentication, if it was noted
}

// Identity is what a server says of itself on a new connection.
type Identity struct {
	SystemID      uint64          // pg_control's system identifier
	Timeline      wal.Timeline    // the timeline it writes, or replays as a standby
	XLogPos       wal.LSN         // exclusive end of the WAL it has flushed (or replayed)
	SegmentSize   wal.SegmentSize // wal_segment_size
	Major         int             // 13, 15, …
	Version       string          // server_version as it is reported
	PolarDB       string          // polar_version, empty on PostgreSQL
	InRecovery    bool            // a standby, or a PolarDB read-only node
	GroupReadable bool            // data_directory_mode lets the group read
}

// Connect opens a replication connection to the host at index i of Hosts. It
// takes at most connect_timeout to look the host up, and for each address of it.
func (c *Conninfo) Connect(ctx context.Context, i int, o Options) (*Conn, error) {
	config, dialled, err := c.configure(i, o)
	if err != nil {
		return nil, err
	}
	method, noting := new(authMethod), config
	if o.NoteAuth {
		noting = config.Copy()
		noting.BuildFrontend = method.frontend
	}
	pg, err := dialUp(ctx, noting)
	if err != nil {
		return nil, c.connectError(c.hosts[i].name, dialled.list(), config.Password, err)
	}
	pg.Frontend().Untrace()
	return &Conn{pg: pg, host: c.hosts[i].name, config: config, timeout: o.Timeout, method: method.name}, nil
}

// configure is how to connect to the host at index i, and where it is noted which
// addresses that dials.
func (c *Conninfo) configure(i int, o Options) (*pgconn.Config, *addresses, error) {
	h := c.hosts[i]
	config := h.config.Copy()
	dialer := h.dialer
	dialer.Timeout = config.ConnectTimeout
	dial := dialer.DialContext
	if o.Dial != nil {
		dial = o.Dial
		config.LookupFunc = func(_ context.Context, host string) ([]string, error) { return []string{host}, nil }
	}
	lookup := config.LookupFunc
	config.LookupFunc = func(ctx context.Context, host string) ([]string, error) {
		ctx, cancel := context.WithTimeout(ctx, config.ConnectTimeout) // pgconn bounds what comes after it
		defer cancel()
		return lookup(ctx, host)
	}
	dialled := new(addresses)
	config.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		dialled.add(address)
		return dial(ctx, network, address)
	}
	config.RuntimeParams["application_name"] = applicationName(config, o.ApplicationName)
	if o.PasswordFile != "" {
		data, err := os.ReadFile(o.PasswordFile)
		if err != nil {
			return nil, nil, &PasswordFileError{err}
		}
		line, _, _ := strings.Cut(string(data), "\n")
		config.Password = strings.TrimSuffix(line, "\r")
	}
	return config, dialled, nil
}

// addresses are those that were dialled. pgconn dials in a goroutine of its own
// when it cancels what a connection does that breaks.
type addresses struct {
	mu  sync.Mutex
	all []string
}

func (a *addresses) add(address string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.all = append(a.all, address)
}

func (a *addresses) list() []string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return slices.Clone(a.all)
}

// Host is the server's "host:port".
func (c *Conn) Host() string { return c.host }

// Close says goodbye and closes the connection, within a second, or the timeout where that is shorter.
func (c *Conn) Close() { hangUp(c.pg, c.timeout) }

// dialUp is pgconn.ConnectConfig, but that the connection sends no cancel request
// when it breaks: that is another connection to a server that may hang, and Close would
// wait for it.
func dialUp(ctx context.Context, config *pgconn.Config) (*pgconn.PgConn, error) {
	config = config.Copy()
	dial := config.DialFunc
	var connected atomic.Bool
	config.DialFunc = func(ctx context.Context, network, address string) (net.Conn, error) {
		if connected.Load() {
			return nil, net.ErrClosed
		}
		return dial(ctx, network, address)
	}
	pg, err := pgconn.ConnectConfig(ctx, config)
	connected.Store(true)
	return pg, err
}

// hangUp says goodbye and closes a connection. A server that does not hang up too
// within a second, or timeout where that is shorter, is not waited for.
func hangUp(pg *pgconn.PgConn, timeout time.Duration) {
	ctx, cancel := context.WithTimeout(context.Background(), min(timeout, time.Second))
	defer cancel()
	_ = pg.Close(ctx)
	select {
	case <-pg.CleanupDone():
	case <-ctx.Done():
		_ = pg.Conn().Close()
		<-pg.CleanupDone()
	}
}

// Identify asks the server who it is. A server that cannot be archived at all
// (too old, or with WAL pages of another size) is an error.
func (c *Conn) Identify(ctx context.Context) (Identity, error) {
	id := Identity{Version: clean(c.pg.ParameterStatus("server_version"))}
	digits := strings.IndexFunc(id.Version, func(r rune) bool { return r < '0' || r > '9' })
	if digits < 0 {
		digits = len(id.Version)
	}
	id.Major, _ = strconv.Atoi(id.Version[:digits])
	if id.Major < MinServerVersion {
		return id, &UnusableError{fmt.Sprintf("server version %q is not supported; PostgreSQL %d or later is needed", id.Version, MinServerVersion)}
	}

	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	sys, err := pglogrepl.IdentifySystem(ctx, c.pg)
	if err != nil {
		return id, wrap("IDENTIFY_SYSTEM", err)
	}
	if id.SystemID, err = strconv.ParseUint(sys.SystemID, 10, 64); err != nil {
		return id, protocolErrorf("IDENTIFY_SYSTEM: system identifier %q", clean(sys.SystemID))
	}
	if sys.Timeline < 1 {
		return id, protocolErrorf("IDENTIFY_SYSTEM: timeline %d", sys.Timeline)
	}
	id.Timeline, id.XLogPos = wal.Timeline(sys.Timeline), wal.LSN(sys.XLogPos)

	size, err := c.show(ctx, "wal_segment_size")
	if err != nil {
		return id, err
	}
	if id.SegmentSize, err = parseSegmentSize(size); err != nil {
		return id, err
	}
	page, err := c.show(ctx, "wal_block_size")
	if err != nil {
		return id, err
	}
	if page != strconv.Itoa(wal.PageSize) {
		return id, &UnusableError{fmt.Sprintf("wal_block_size is %s; only servers built with %d are supported", clean(page), wal.PageSize)}
	}
	mode, err := c.show(ctx, "data_directory_mode")
	if err != nil {
		return id, err
	}
	if bits, err := strconv.ParseUint(mode, 8, 32); err == nil {
		id.GroupReadable = bits&0o040 != 0
	}
	if id.InRecovery, err = c.inRecovery(ctx, id.Major); err != nil {
		return id, err
	}
	switch polar, err := c.show(ctx, "polar_version"); {
	case err == nil:
		id.PolarDB = clean(polar)
	case Code(err) != CodeUndefinedObject:
		return id, err
	}
	return id, nil
}

// inRecovery tells a standby from a primary. PostgreSQL 13 has no in_hot_standby;
// there a session is read-only either because of recovery or because that is
// its default, and in doubt the server counts as a standby.
func (c *Conn) inRecovery(ctx context.Context, major int) (bool, error) {
	parameter := "in_hot_standby"
	if major < 14 {
		parameter = "transaction_read_only"
	}
	v, err := c.show(ctx, parameter)
	return v == "on", err
}

func (c *Conn) show(ctx context.Context, parameter string) (string, error) {
	results, err := c.pg.Exec(ctx, "SHOW "+parameter).ReadAll()
	if err != nil {
		return "", wrap("SHOW "+parameter, err)
	}
	if len(results) != 1 || len(results[0].Rows) != 1 || len(results[0].Rows[0]) != 1 {
		return "", protocolErrorf("SHOW %s: not one row of one column", parameter)
	}
	return string(results[0].Rows[0][0]), nil
}

// parseSegmentSize reads SHOW wal_segment_size, such as "16MB" or "1GB".
func parseSegmentSize(s string) (wal.SegmentSize, error) {
	for suffix, unit := range map[string]uint64{"kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30} {
		digits, ok := strings.CutSuffix(s, suffix)
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 20)
		if size := wal.SegmentSize(n * unit); err == nil && n*unit <= 1<<30 && size.Valid() {
			return size, nil
		}
	}
	return 0, protocolErrorf("SHOW wal_segment_size: %q is no power of two from 1MB to 1GB", clean(s))
}

// UnusableError is a server that cannot be archived until a person changes it.
type UnusableError struct{ Reason string }

func (e *UnusableError) Error() string { return e.Reason }

// TimelineHistory fetches the content of a timeline's history file.
func (c *Conn) TimelineHistory(ctx context.Context, tli wal.Timeline) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	r, err := pglogrepl.TimelineHistory(ctx, c.pg, int32(tli))
	if err != nil {
		return nil, wrap(fmt.Sprintf("TIMELINE_HISTORY %d", tli), err)
	}
	return r.Content, nil
}

// Slot is a physical replication slot as the server knows it.
type Slot struct {
	Exists     bool
	RestartLSN wal.LSN // oldest WAL that the slot retains; 0: none
	Lost       bool    // invalidated: it retains nothing any more. Known from pg_replication_slots alone
}

// ErrSlotUnreadable says that this server (PostgreSQL 13 or 14, which have no
// READ_REPLICATION_SLOT) did not let us read pg_replication_slots.
var ErrSlotUnreadable = errors.New("pg_replication_slots cannot be read")

// ReadSlot reads a slot; before PostgreSQL 15 as SelectSlot does.
func (c *Conn) ReadSlot(ctx context.Context, id Identity, name string) (Slot, error) {
	if id.Major < 15 {
		return c.SelectSlot(ctx, name)
	}
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	doing := "READ_REPLICATION_SLOT " + QuoteIdentifier(name)
	results, err := c.pg.Exec(ctx, doing).ReadAll()
	if err != nil {
		return Slot{}, wrap(doing, err)
	}
	if len(results) != 1 || len(results[0].Rows) != 1 || len(results[0].Rows[0]) != 3 {
		return Slot{}, protocolErrorf("%s: not one row of three columns", doing)
	}
	row := results[0].Rows[0]
	return makeSlot(doing, row[0], row[1], nil)
}

func makeSlot(doing string, kind, restartLSN, walStatus []byte) (Slot, error) {
	if kind == nil {
		return Slot{}, nil
	}
	if string(kind) != "physical" {
		return Slot{}, &UnusableError{doing + ": the slot is a " + clean(string(kind)) + " one; a physical one is needed"}
	}
	slot := Slot{Exists: true, Lost: string(walStatus) == "lost"}
	if restartLSN != nil {
		lsn, err := wal.ParseLSN(string(restartLSN))
		if err != nil {
			return Slot{}, protocolErrorf("%s: restart_lsn: %v", doing, err)
		}
		slot.RestartLSN = lsn
	}
	return slot, nil
}

// SelectSlot reads a slot from pg_replication_slots, over an ordinary connection
// to the conninfo's database (or postgres). Where that fails the error is
// ErrSlotUnreadable.
func (c *Conn) SelectSlot(ctx context.Context, name string) (Slot, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	config := c.config.Copy()
	delete(config.RuntimeParams, "replication")
	if config.Database == "" {
		config.Database = "postgres"
	}
	unreadable := func(err error) (Slot, error) {
		return Slot{}, fmt.Errorf("%w on database %s: %w", ErrSlotUnreadable, clean(config.Database), wrap("asking", err))
	}
	pg, err := dialUp(ctx, config)
	if err != nil {
		return unreadable(err)
	}
	defer hangUp(pg, c.timeout)
	const query = "SELECT slot_type, restart_lsn::text, wal_status FROM pg_catalog.pg_replication_slots WHERE slot_name = $1"
	r := pg.ExecParams(ctx, query, [][]byte{[]byte(name)}, nil, nil, nil).Read()
	if r.Err != nil {
		return unreadable(r.Err)
	}
	if len(r.Rows) == 0 {
		return Slot{}, nil
	}
	row := r.Rows[0]
	if len(row) != 3 {
		return Slot{}, protocolErrorf("reading pg_replication_slots: a row of %d columns, not 3", len(row))
	}
	return makeSlot("reading pg_replication_slots", row[0], row[1], row[2])
}

// CreateSlot creates a physical slot that retains WAL from now on when reserve is
// true, else from the first time that it is streamed from. A slot that exists
// already is a ServerError with CodeDuplicateObject.
func (c *Conn) CreateSlot(ctx context.Context, name string, reserve bool) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	action := ""
	if reserve {
		action = "RESERVE_WAL"
	}
	_, err := pglogrepl.CreateReplicationSlot(ctx, c.pg, QuoteIdentifier(name), "", pglogrepl.CreateReplicationSlotOptions{
		Mode: pglogrepl.PhysicalReplication, SnapshotAction: action,
	})
	return wrap("CREATE_REPLICATION_SLOT "+QuoteIdentifier(name)+" PHYSICAL", err)
}

// DropSlot drops a slot that nobody uses.
func (c *Conn) DropSlot(ctx context.Context, name string) error {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	return wrap("DROP_REPLICATION_SLOT "+QuoteIdentifier(name),
		pglogrepl.DropReplicationSlot(ctx, c.pg, QuoteIdentifier(name), pglogrepl.DropReplicationSlotOptions{}))
}

// QuoteIdentifier makes a name fit for a statement.
func QuoteIdentifier(name string) string {
	return `"` + strings.ReplaceAll(name, `"`, `""`) + `"`
}
