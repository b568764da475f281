package integration

import (
	"context"
	"fmt"
	"path/filepath"
	"testing"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/walfleet/walfleet/receiver"
)

// occupy streams with a slot, as another receiver does, until the connection that it returns is closed.
func (s *server) occupy(t testing.TB, slot string) *pgconn.PgConn {
	t.Helper()
	ctx := t.Context()
	conn, err := pgconn.Connect(ctx, s.conninfo("replication=true"))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { conn.Close(context.Background()) })
	start := s.value(t, "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = '"+slot+"'")
	conn.Frontend().SendQuery(&pgproto3.Query{String: fmt.Sprintf("START_REPLICATION SLOT %s PHYSICAL %s", slot, start)})
	if err := conn.Frontend().Flush(); err != nil {
		t.Fatal(err)
	}
	for {
		msg, err := conn.ReceiveMessage(ctx)
		if err != nil {
			t.Fatal(err)
		}
		if _, ok := msg.(*pgproto3.CopyBothResponse); ok {
			return conn
		}
	}
}

func TestWaitsForSlotInUse(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{segment: megabyte})
	s.query(t, "SELECT pg_create_physical_replication_slot('shared', true)")
	other := s.occupy(t, "shared")
	s.write(t, 2)

	d := startDaemon(t, configText(t.TempDir(),
		cluster("waits", s.conninfo(), `slot = "shared"`),
		cluster("free", s.conninfo(), `slot = "own"`)))
	d.awaitState(t, "waits", receiver.Blocked, "shared", "active")
	d.log.await(t, "not archiving", "cluster=waits", "another receiver uses slot shared")
	d.awaitState(t, "free", receiver.Streaming)

	if err := other.Close(t.Context()); err != nil {
		t.Fatal(err)
	}
	d.awaitState(t, "waits", receiver.Streaming)
	s.write(t, 2)
	st := d.archived(t, "waits", s)
	compareArchive(t, d.clusterDir("waits"), st, origins{1: s})
}

func TestDoesNotCreateSlotWhenToldSo(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{segment: megabyte})
	d := startDaemon(t, configText(t.TempDir(),
		cluster("orders", s.conninfo(), `slot = "by_hand"`, `create_slot = false`)))
	d.awaitState(t, "orders", receiver.Halted, `"by_hand" does not exist`, "create_slot is false", "pg_create_physical_replication_slot")
	if n := s.value(t, "SELECT count(*) FROM pg_replication_slots"); n != "0" {
		t.Errorf("%s slots, want none", n)
	}
	s.query(t, "SELECT pg_create_physical_replication_slot('by_hand', true)")
	s.write(t, 2)
	d.awaitState(t, "orders", receiver.Streaming) // by itself
	s.write(t, 2)
	st := d.archived(t, "orders", s)
	segments := compareArchive(t, d.clusterDir("orders"), st, origins{1: s})
	checkOrigin(t, d.clusterDir("orders"), s, segments[0], "slot")
}

// TestSlotDropped has a slot that is dropped while the archive is behind. Where the server still has the WAL, it
// is made again and nothing is missed; where it has not, the gap is a person's decision.
func TestSlotDropped(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{segment: megabyte, settings: []string{"min_wal_size = 2MB", "max_wal_size = 2MB"}})
	config := configText(t.TempDir(), cluster("orders", s.conninfo()))
	d := startDaemon(t, config)
	s.write(t, 2)
	first := d.archived(t, "orders", s)

	s.query(t, "SELECT pg_drop_replication_slot('walfleet')")
	s.write(t, 4)
	d = startDaemon(t, config)
	second := d.archived(t, "orders", s)
	segments := compareArchive(t, d.clusterDir("orders"), second, origins{1: s})
	if segments[0].Start > first.Flushed || second.Flushed < first.Flushed {
		t.Errorf("the archive goes from %s to %s", segments[0], second.Flushed)
	}
	d.log.await(t, "replication slot created")

	s.query(t, "SELECT pg_drop_replication_slot('walfleet')")
	s.set(t, "wal_keep_size", "0")
	missing := s.size.Segment(1, second.Flushed).Name()
	await(t, patience, "the server has removed "+missing, func() (bool, string) {
		s.write(t, 2)
		s.query(t, "CHECKPOINT")
		v := s.value(t, "SELECT count(*) FROM pg_ls_waldir() WHERE name <= '"+missing+"'")
		return v == "0", v
	})
	before := listing(t, filepath.Join(d.dir, "orders"))
	d = startDaemon(t, config)
	d.awaitState(t, "orders", receiver.Halted, "no longer has the WAL that comes next", missing)
	d.log.await(t, "not archiving", missing, "hint=")
	d.stop(t)
	if after := listing(t, filepath.Join(d.dir, "orders")); after != before {
		t.Errorf("the archive has changed at the gap, from\n%sto\n%s", before, after)
	}
}
