package pgrepl

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"

	"github.com/walfleet/walfleet/internal/wal"
)

// MonitorName is the application_name of connections that only look. It must not be
// that of a receiver, which synchronous_standby_names may have.
const MonitorName = "walfleet monitor"

// SQLConn is an ordinary connection to a database, for what the replication protocol
// does not tell. It is used by one goroutine at a time.
type SQLConn struct {
	pg      *pgconn.PgConn
	timeout time.Duration
}

// ConnectSQL opens an ordinary connection to the host at index i of Hosts, to the
// conninfo's database, or postgres where it has none. It takes at most
// connect_timeout for each address of the host. The role needs the right to connect,
// and a line in pg_hba.conf that is not one for "replication".
func (c *Conninfo) ConnectSQL(ctx context.Context, i int, o Options) (*SQLConn, error) {
	o.ApplicationName = MonitorName
	config, dialled, err := c.configure(i, o)
	if err != nil {
		return nil, err
	}
	delete(config.RuntimeParams, "replication")
	config.Database = c.Database(i)
	pg, err := dialUp(ctx, config)
	if err != nil {
		return nil, c.connectError(c.hosts[i].name, dialled.list(), config.Password, err)
	}
	return &SQLConn{pg: pg, timeout: o.Timeout}, nil
}

// Close says goodbye and closes the connection, within a second, or the timeout where that is shorter.
func (c *SQLConn) Close() { hangUp(c.pg, c.timeout) }

// row runs a query that returns one row of n columns, within the timeout.
func (c *SQLConn) row(ctx context.Context, doing, query string, n int, args ...string) ([][]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	values := make([][]byte, len(args))
	for i, arg := range args {
		values[i] = []byte(arg)
	}
	var row [][]byte
	rows := 0
	r := c.pg.ExecParams(ctx, query, values, nil, nil, nil)
	for r.NextRow() { // a hostile server's are not collected
		if rows++; rows == 1 {
			for _, column := range r.Values() {
				row = append(row, bytes.Clone(column))
			}
		}
	}
	if _, err := r.Close(); err != nil {
		return nil, wrap(doing, err)
	}
	if rows != 1 || len(row) != n {
		return nil, protocolErrorf("%s: not one row of %d columns", doing, n)
	}
	return row, nil
}

// SlotWatch is our slot on one host, with what it costs that host.
type SlotWatch struct {
	InRecovery bool // the host is a standby, or a PolarDB read-only node
	Exists     bool
	Logical    bool // it is a logical slot, which cannot be archived from

	RestartLSN wal.LSN // oldest WAL that the slot retains; 0: none
	Retained   int64   // bytes of WAL from there to the end of the host's

	// What follows comes from pg_replication_slots and pg_stat_replication alone, and
	// is empty where it is not known.
	Status      string // wal_status: reserved, extended, unreserved or lost
	SafeWALSize int64  // bytes that may be written before the slot can be lost; below 0: not limited, or not known
	Invalid     string // invalidation_reason, PostgreSQL 17 and later
	ActivePID   uint32 // the walsender that uses the slot; 0: none
	Application string // that walsender's application_name
	State       string // and its state: startup, catchup, streaming, …
	SyncState   string // async, potential, sync or quorum
	Hidden      bool   // the role may not see those three: it is no member of pg_read_all_stats
}

// Lost tells that the slot retains nothing any more.
func (w SlotWatch) Lost() bool { return w.Status == "lost" || w.Invalid != "" }

// watchQuery works on PostgreSQL 13 and later, PolarDB too. invalidation_reason came
// with 17: through JSON a column that is not there is NULL. A slot is retained from
// the position that is written, and on a standby from what was received or replayed.
const watchQuery = `SELECT pg_catalog.pg_is_in_recovery(), s.slot_type, s.restart_lsn::text,
	pg_catalog.pg_wal_lsn_diff(p.pos, s.restart_lsn)::int8, s.wal_status, s.safe_wal_size,
	pg_catalog.to_jsonb(s) ->> 'invalidation_reason', s.active_pid,
	r.application_name, r.state, r.sync_state, r.pid
FROM (SELECT CASE WHEN pg_catalog.pg_is_in_recovery()
		THEN GREATEST(pg_catalog.pg_last_wal_receive_lsn(), pg_catalog.pg_last_wal_replay_lsn())
		ELSE pg_catalog.pg_current_wal_lsn() END) AS p (pos)
	LEFT JOIN pg_catalog.pg_replication_slots s ON s.slot_name = $1
	LEFT JOIN pg_catalog.pg_stat_replication r ON r.pid = s.active_pid`

// WatchSlot reads a slot. It may do so as any role: for a plain one the walsender's
// state stays Hidden.
func (c *SQLConn) WatchSlot(ctx context.Context, name string) (SlotWatch, error) {
	const doing = "reading pg_replication_slots"
	row, err := c.row(ctx, doing, watchQuery, 12, name)
	if err != nil {
		return SlotWatch{}, err
	}
	return parseWatch(doing, row)
}

func parseWatch(doing string, row [][]byte) (w SlotWatch, err error) {
	number := func(column []byte) int64 {
		n, nerr := strconv.ParseInt(string(column), 10, 64)
		if nerr != nil && err == nil {
			err = protocolErrorf("%s: %q is no number", doing, clean(string(column)))
		}
		return n
	}
	w.InRecovery = string(row[0]) == "t"
	w.SafeWALSize = -1
	if row[1] == nil {
		return w, nil
	}
	w.Exists, w.Logical = true, string(row[1]) != "physical"
	if row[2] != nil {
		if w.RestartLSN, err = wal.ParseLSN(string(row[2])); err != nil {
			return w, protocolErrorf("%s: restart_lsn: %v", doing, err)
		}
	}
	if row[3] != nil {
		w.Retained = max(0, number(row[3]))
	}
	w.Status, w.Invalid = clean(string(row[4])), clean(string(row[6]))
	if row[5] != nil {
		w.SafeWALSize = max(0, number(row[5])) // below 0 once the slot is unreserved
	}
	if row[7] != nil {
		w.ActivePID = uint32(number(row[7]))
	}
	w.Application, w.State, w.SyncState = clean(string(row[8])), clean(string(row[9])), clean(string(row[10]))
	w.Hidden = row[11] != nil && row[9] == nil
	if w.Lost() {
		w.Retained = 0 // its restart_lsn may still be shown
	}
	return w, err
}

// WatchSlot reads a slot over the replication protocol, on PostgreSQL 15 and later:
// where it begins, and what it retains, but nothing of its state. Before, it is
// ErrSlotUnreadable.
func (c *Conn) WatchSlot(ctx context.Context, id Identity, name string) (SlotWatch, error) {
	if id.Major < 15 {
		return SlotWatch{}, ErrSlotUnreadable
	}
	slot, err := c.ReadSlot(ctx, id, name)
	if err != nil {
		return SlotWatch{}, err
	}
	w := SlotWatch{InRecovery: id.InRecovery, Exists: slot.Exists, RestartLSN: slot.RestartLSN, SafeWALSize: -1}
	if slot.RestartLSN != 0 && slot.RestartLSN < id.XLogPos {
		w.Retained = int64(id.XLogPos - slot.RestartLSN)
	}
	return w, nil
}

// Refused tells that a server answered and did not let us in, or do this: which does
// not change until a person changes it.
func Refused(err error) bool {
	switch Code(err) {
	case CodeInvalidPassword, CodeInvalidAuth, CodeInsufficientRight, CodeUndefinedDatabase:
		return true
	}
	return errors.Is(err, ErrNoPassword)
}

// Settings are those of a server that archiving depends on.
type Settings struct {
	WALLevel      string
	MaxWALSenders int
	MaxSlots      int    // max_replication_slots
	MaxSlotKeep   int64  // max_slot_wal_keep_size in bytes; below 0: no limit
	SyncNames     string // synchronous_standby_names
	SyncCommit    string // synchronous_commit, as it is for our role
}

// Settings asks for them with SHOW, which every role may do.
func (c *Conn) Settings(ctx context.Context) (s Settings, err error) {
	ctx, cancel := context.WithTimeout(ctx, c.timeout)
	defer cancel()
	show := func(name string) string {
		if err != nil {
			return ""
		}
		var value string
		value, err = c.show(ctx, name)
		return value
	}
	number := func(name string) int {
		n, nerr := strconv.Atoi(show(name))
		if nerr != nil && err == nil {
			err = protocolErrorf("SHOW %s: no number", name)
		}
		return n
	}
	s.WALLevel = clean(show("wal_level"))
	s.MaxWALSenders = number("max_wal_senders")
	s.MaxSlots = number("max_replication_slots")
	s.SyncNames = clean(show("synchronous_standby_names"))
	s.SyncCommit = clean(show("synchronous_commit"))
	keep := show("max_slot_wal_keep_size")
	if err != nil {
		return Settings{}, err
	}
	if s.MaxSlotKeep, err = parseMemory(keep); err != nil {
		return Settings{}, protocolErrorf("SHOW max_slot_wal_keep_size: %v", err)
	}
	return s, nil
}

// parseMemory reads a size as SHOW prints it: "-1", "0", "64MB", "2GB". The result is
// in bytes.
func parseMemory(s string) (int64, error) {
	digits := strings.TrimRight(s, "kMGTB")
	n, err := strconv.ParseInt(digits, 10, 40)
	unit, ok := map[string]int64{"": 1, "B": 1, "kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}[s[len(digits):]]
	if err != nil || !ok || n > 1<<20 && unit == 1<<40 {
		return 0, fmt.Errorf("%q is no size", clean(s))
	}
	return n * unit, nil
}

// ServerUse is what else of a server matters to an archive, and only SQL tells.
type ServerUse struct {
	Senders     int           // walsenders that run, without the one that was named
	Slots       int           // replication slots that exist
	SyncSenders int           // walsenders that are a synchronous standby now; not known when Hidden
	Hidden      bool          // the role is no member of pg_read_all_stats
	RemoteApply bool          // synchronous_commit is remote_apply for some role or database
	ClockAhead  time.Duration // of the server's clock, compared with ours
	ClockError  time.Duration // by which that may be wrong
}

const useQuery = `SELECT (SELECT count(*) FROM pg_catalog.pg_stat_replication WHERE pid <> $1::int4),
	(SELECT count(*) FROM pg_catalog.pg_replication_slots),
	(SELECT count(*) FROM pg_catalog.pg_stat_replication WHERE sync_state IN ('sync', 'quorum')),
	pg_catalog.pg_has_role(current_user, 'pg_read_all_stats', 'USAGE'),
	EXISTS (SELECT FROM pg_catalog.pg_db_role_setting WHERE 'synchronous_commit=remote_apply' = ANY (setconfig)),
	extract(epoch FROM pg_catalog.clock_timestamp())`

// ServerUse asks for it. besides is the process of a walsender that is not to count,
// since it is only there to ask.
func (c *SQLConn) ServerUse(ctx context.Context, besides uint32) (ServerUse, error) {
	const doing = "reading pg_stat_replication"
	begun := time.Now()
	row, err := c.row(ctx, doing, useQuery, 6, strconv.FormatInt(int64(int32(besides)), 10))
	took := time.Since(begun)
	if err != nil {
		return ServerUse{}, err
	}
	var u ServerUse
	for i, n := range []*int{&u.Senders, &u.Slots, &u.SyncSenders} {
		if *n, err = strconv.Atoi(string(row[i])); err != nil {
			return ServerUse{}, protocolErrorf("%s: %q is no number", doing, clean(string(row[i])))
		}
	}
	u.Hidden, u.RemoteApply = string(row[3]) != "t", string(row[4]) == "t"
	clock, err := strconv.ParseFloat(string(row[5]), 64)
	if err != nil || clock < 0 || clock > 1e11 {
		return ServerUse{}, protocolErrorf("%s: %q is no time", doing, clean(string(row[5])))
	}
	server := time.UnixMicro(int64(clock * 1e6))
	u.ClockAhead, u.ClockError = server.Sub(begun.Add(took/2)), took/2
	return u, nil
}
