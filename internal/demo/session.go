package demo

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"os/exec"
	"strings"
	"time"

	"github.com/walfleet/walfleet/internal/wal"
)

// endOfAnswer is what psql echoes after each statement. No query of the demo
// returns it.
const endOfAnswer = "-- walfleet demo: end of answer --"

// closeTimeout bounds how long psql may take to end.
const closeTimeout = 5 * time.Second

// A session is one connection of the superuser: a psql that is fed statements
// and read from. It is not for concurrent use, and ends with its first error.
type session struct {
	cmd    *exec.Cmd
	in     io.WriteCloser
	out    io.ReadCloser
	lines  *bufio.Scanner // of out
	stderr *tail
}

// connect opens a session and waits for the connection.
func connect(ctx context.Context, s server) (*session, error) {
	// The process outlives ctx, which bounds connecting only.
	cmd := s.psql(context.WithoutCancel(ctx))
	ownGroup(cmd)
	cmd.WaitDelay = closeTimeout
	in, err := cmd.StdinPipe()
	if err != nil {
		return nil, err
	}
	out, err := cmd.StdoutPipe()
	if err != nil {
		return nil, err
	}
	db := &session{cmd: cmd, in: in, out: out, lines: bufio.NewScanner(out), stderr: new(tail)}
	cmd.Stderr = db.stderr
	if err := cmd.Start(); err != nil {
		return nil, err
	}
	if _, err := db.query(ctx, "SELECT 1"); err != nil {
		return nil, err
	}
	return db, nil
}

// query runs SQL and returns its rows, columns separated by "|". When ctx is
// done first the session is ended, and the server left to notice.
func (db *session) query(ctx context.Context, sql string) ([]string, error) {
	stop := context.AfterFunc(ctx, db.kill)
	defer stop()
	// A write that fails shows below as the end of the output.
	_, _ = fmt.Fprintf(db.in, "%s;\n\\echo %s\n", sql, endOfAnswer)
	var rows []string
	for db.lines.Scan() {
		if db.lines.Text() == endOfAnswer {
			return rows, nil
		}
		rows = append(rows, db.lines.Text())
	}
	// psql ended, or printed a line too long to scan.
	db.kill()
	err := db.close()
	switch {
	case ctx.Err() != nil:
		return nil, context.Cause(ctx)
	case db.stderr.String() != "":
		return nil, errors.New("psql: " + strings.TrimSpace(db.stderr.String()))
	}
	return nil, fmt.Errorf("psql: %w", err)
}

// value runs a query of one row and one column.
func (db *session) value(ctx context.Context, sql string) (string, error) {
	rows, err := db.query(ctx, sql)
	if err != nil {
		return "", err
	}
	if len(rows) != 1 {
		return "", fmt.Errorf("%d rows instead of one from %q", len(rows), sql)
	}
	return rows[0], nil
}

// lsn runs a query that returns one pg_lsn.
func (db *session) lsn(ctx context.Context, sql string) (wal.LSN, error) {
	v, err := db.value(ctx, sql)
	if err != nil {
		return 0, err
	}
	return wal.ParseLSN(v)
}

// close disconnects and waits for psql's end. Its error says how psql ended.
func (db *session) close() error {
	_ = db.in.Close()
	late := time.AfterFunc(closeTimeout, db.kill)
	defer late.Stop()
	return db.cmd.Wait()
}

// kill ends psql, and query's reading even if another process has inherited
// its output.
func (db *session) kill() {
	_ = db.cmd.Process.Kill()
	_ = db.out.Close()
}

// once connects, runs f and disconnects.
func once(ctx context.Context, s server, f func(db *session) error) error {
	db, err := connect(ctx, s)
	if err != nil {
		return err
	}
	defer func() { _ = db.close() }()
	return f(db)
}

// tail keeps the last bytes written to it.
type tail struct{ b []byte }

const tailSize = 2048

func (t *tail) Write(p []byte) (int, error) {
	t.b = append(t.b, p...)
	if n := len(t.b) - tailSize; n > 0 {
		t.b = append(t.b[:0], t.b[n:]...)
	}
	return len(p), nil
}

func (t *tail) String() string { return string(t.b) }
