//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/walfleet/walfleet/internal/postgres"
	"github.com/walfleet/walfleet/internal/wal"
)

// server is a running throwaway server. It listens on 127.0.0.1 alone, where it trusts everyone.
type server struct {
	bench *bench
	dir   string
	port  int
}

// serverSettings are those of every server. Later ones count more.
var serverSettings = []string{
	"listen_addresses='127.0.0.1'", "unix_socket_directories=''",
	"max_wal_senders=200", "max_replication_slots=200", "max_connections=120",
	"shared_buffers=512MB", "autovacuum=off", // nothing in the background at a moment of its own
	"checkpoint_timeout=1h", "max_wal_size=64GB",
	"log_checkpoints=off",
}

// startServer creates and starts a server with segments of segmentSize bytes and the settings "name=value".
func (b *bench) startServer(ctx context.Context, segmentSize wal.SegmentSize, settings ...string) (_ *server, err error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Minute)
	defer cancel()
	s := &server{bench: b}
	if s.dir, err = os.MkdirTemp(b.dir, "server-"); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(fmt.Errorf("starting a server: %w", err), s.stop())
		}
	}()
	if err := b.owner.Give(s.dir); err != nil {
		return nil, err
	}
	if s.port, err = postgres.FreePort(); err != nil {
		return nil, err
	}
	if _, err := s.program(ctx, "initdb", "-D", s.data(), "-U", "postgres", "--auth=trust", "--no-sync", "--encoding=UTF8",
		"--locale=C", "--wal-segsize="+strconv.Itoa(int(segmentSize)>>20)); err != nil {
		return nil, err
	}
	lines := append(append([]string{fmt.Sprintf("port=%d", s.port)}, serverSettings...), settings...)
	if err := appendFile(filepath.Join(s.data(), "postgresql.conf"), "\n"+strings.Join(lines, "\n")+"\n"); err != nil {
		return nil, err
	}
	if _, err := s.program(ctx, "pg_ctl", "start", "-w", "-s", "-t", "120", "-D", s.data(), "-l", filepath.Join(s.dir, "log")); err != nil {
		log, _ := os.ReadFile(filepath.Join(s.dir, "log"))
		return nil, fmt.Errorf("%w\n%s", err, lastLines(log, 10))
	}
	_, err = s.sql(ctx, awaitFlushed)
	return s, err
}

// stop ends the server and removes it, even where the run was interrupted.
func (s *server) stop() error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	var err error
	if _, missing := os.Stat(filepath.Join(s.data(), "postmaster.pid")); missing == nil {
		_, err = s.program(ctx, "pg_ctl", "stop", "-w", "-s", "-m", "immediate", "-D", s.data())
	}
	return errors.Join(err, os.RemoveAll(s.dir))
}

func (s *server) data() string { return filepath.Join(s.dir, "data") }

// program runs a program of PostgreSQL as the servers' user and returns what it prints.
func (s *server) program(ctx context.Context, name string, args ...string) (string, error) {
	cmd := s.command(ctx, name, args...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	if name == "pg_ctl" { // the server would keep a pipe open
		cmd.Stdout, cmd.Stderr = nil, nil
	}
	if err := cmd.Run(); err != nil {
		if ctx.Err() != nil {
			err = context.Cause(ctx)
		}
		return "", fmt.Errorf("%s: %w: %s", name, err, lastLines(errOut.Bytes(), 5))
	}
	return strings.TrimSpace(out.String()), nil
}

// command is a program of PostgreSQL, run as the servers' user in the server's directory.
func (s *server) command(ctx context.Context, name string, args ...string) *exec.Cmd {
	cmd := command(ctx, s.bench.pg.Path(name), args...)
	cmd.Dir = s.dir
	cmd.SysProcAttr.Credential = s.bench.owner.Credential()
	return cmd
}

// sql runs one statement, or several that return nothing, and returns the rows, their columns separated by "|".
func (s *server) sql(ctx context.Context, query string) (string, error) {
	out, err := s.program(ctx, "psql", "-XqAtw", "-v", "ON_ERROR_STOP=1", "-d", s.conninfo()+local, "-c", query)
	if err != nil {
		return "", fmt.Errorf("%s: %w", query, err)
	}
	return out, nil
}

// conninfo leads the superuser to the server.
func (s *server) conninfo() string {
	return fmt.Sprintf("host=127.0.0.1 port=%d user=postgres dbname=postgres sslmode=disable", s.port)
}

// local is added to a conninfo where commits are not to wait for a synchronous standby.
const local = " options='-c synchronous_commit=local'"

// initPgbench creates pgbench's tables.
func (s *server) initPgbench(ctx context.Context, scale int) error {
	_, err := s.program(ctx, "pgbench", "-i", "-q", "-s", strconv.Itoa(scale), s.conninfo()+local)
	return err
}

// flushed is the end of the WAL on the server's disk.
func (s *server) flushed(ctx context.Context) (wal.LSN, error) {
	out, err := s.sql(ctx, "SELECT pg_current_wal_flush_lsn()")
	if err != nil {
		return 0, err
	}
	return wal.ParseLSN(out)
}

// emit writes n bytes of WAL as few large records. They are not flushed before the next commit.
func (s *server) emit(ctx context.Context, n int64) error {
	const most = 8 << 20
	_, err := s.sql(ctx, fmt.Sprintf(`SELECT count(pg_logical_emit_message(false, 'bench', repeat('x', least(%d, %d - i)::int)))
		FROM generate_series(0, %d, %[1]d) i; SELECT txid_current()`, most, n, n-1))
	return err
}

// awaitFlushed creates the function await_flushed(n, timeout): it returns once n receivers are streaming and
// have reported all WAL that the server has at its call as flushed, and returns the seconds that took.
// pg_stat_get_wal_senders() is what pg_stat_replication shows, without what that keeps for a transaction.
const awaitFlushed = `CREATE FUNCTION await_flushed(n int, timeout float8) RETURNS float8 LANGUAGE plpgsql AS $$
DECLARE
	began timestamptz := clock_timestamp();
	target pg_lsn := pg_current_wal_flush_lsn();
BEGIN
	LOOP
		IF (SELECT count(*) FROM pg_stat_get_wal_senders() WHERE state = 'streaming' AND flush_lsn >= target) >= n THEN
			RETURN extract(epoch FROM clock_timestamp() - began);
		END IF;
		IF clock_timestamp() > began + timeout * interval '1 s' THEN
			RAISE 'not % receivers have flushed % after % s', n, target, timeout;
		END IF;
		PERFORM pg_sleep(0.001);
	END LOOP;
END $$`

// fill writes WAL until just before target.
func (s *server) fill(ctx context.Context, target wal.LSN) error {
	for {
		now, err := s.flushed(ctx)
		if err != nil || now+64<<10 > target {
			return err
		}
		left := int64(target - now)
		if err := s.emit(ctx, left-left/256); err != nil { // headers of pages take 24 bytes of each 8192
			return err
		}
	}
}

// awaitArchivers waits until n archivers have flushed all WAL, a minute at most.
func (s *server) awaitArchivers(ctx context.Context, n int) error {
	_, err := s.sql(ctx, fmt.Sprintf("SELECT await_flushed(%d, 60)", n))
	return err
}

// createSlot creates a physical slot that keeps WAL from now on.
func (s *server) createSlot(ctx context.Context, name string) error {
	_, err := s.sql(ctx, fmt.Sprintf("SELECT pg_create_physical_replication_slot('%s', true)", name))
	return err
}

// dropSlot drops a slot once its walsender has noticed that its receiver is gone.
func (s *server) dropSlot(ctx context.Context, name string) error {
	_, err := s.sql(ctx, fmt.Sprintf(`DO $$ BEGIN
		FOR i IN 1..10000 LOOP
			EXIT WHEN NOT (SELECT active FROM pg_replication_slots WHERE slot_name = '%s');
			PERFORM pg_sleep(0.001);
		END LOOP;
		PERFORM pg_drop_replication_slot('%[1]s');
	END $$`, name))
	return err
}

// command is a program that this process ends: with SIGTERM when ctx is done, and 10 seconds later with SIGKILL. The
// terminal's Ctrl-C does not reach it. libpq's variables of the environment, which may lead elsewhere, do not either.
func command(ctx context.Context, path string, args ...string) *exec.Cmd {
	cmd := exec.CommandContext(ctx, path, args...)
	for _, v := range os.Environ() {
		if !strings.HasPrefix(v, "PG") && !strings.HasPrefix(v, "LC_") {
			cmd.Env = append(cmd.Env, v)
		}
	}
	cmd.Env = append(cmd.Env, "LC_ALL=C")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	return cmd
}

func appendFile(name, text string) error {
	f, err := os.OpenFile(name, os.O_APPEND|os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteString(text)
	return errors.Join(err, f.Close())
}

// lastLines are the last n lines of a text.
func lastLines(text []byte, n int) string {
	lines := strings.Split(strings.TrimSpace(string(text)), "\n")
	return strings.Join(lines[max(0, len(lines)-n):], "\n")
}
