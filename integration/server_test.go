package integration

import (
	"context"
	"fmt"
	"io"
	"math/rand/v2"
	"net"
	"net/netip"
	"strconv"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/moby/moby/api/types/container"
	"github.com/moby/moby/api/types/network"
	"github.com/moby/moby/client"
	"github.com/testcontainers/testcontainers-go"
	tcexec "github.com/testcontainers/testcontainers-go/exec"
	tcnetwork "github.com/testcontainers/testcontainers-go/network"
	"github.com/testcontainers/testcontainers-go/wait"

	"github.com/walfleet/walfleet/internal/wal"
)

const (
	megabyte = 1 << 20

	// host is where the ports of all containers are published.
	host = "127.0.0.1"

	// Roles of every server: the superuser postgres, and walfleet with the REPLICATION attribute.
	superPassword = "superuser's password"
	password      = "never-shown-anywhere"
)

// serverOptions say how a server differs from a plain one.
type serverOptions struct {
	image    string          // default: defaultImage
	segment  wal.SegmentSize // wal_segment_size in bytes; default: 16 MB
	port     int             // published port; default: a free one
	settings []string        // more lines of postgresql.conf
	hba      []string        // lines of pg_hba.conf that come before the usual one
	sql      string          // run when the data directory has been made
	shell    string          // the same, with $PGDATA; the server listens on no port yet
	files    []testcontainers.ContainerFile
	network  *testcontainers.DockerNetwork
	alias    string // name in that network

	// before is shell that runs in the container at each start, before the server, with its $PGDATA.
	before string

	// standbyOf makes the server a standby, with its data from the primary of this alias.
	standbyOf string
}

// server is a PostgreSQL server in a container. Its port stays the same over restarts, and it keeps all
// of its WAL.
type server struct {
	ctr  *testcontainers.DockerContainer
	port int
	data string // the data directory in the container
	size wal.SegmentSize
}

// startServer starts a server that lives until the end of the test, and waits until it answers.
func startServer(t testing.TB, o serverOptions) *server {
	t.Helper()
	if o.image == "" {
		o.image = defaultImage
	}
	if o.segment == 0 {
		o.segment = 16 * megabyte
	}
	if o.port == 0 {
		o.port = freePort(t)
	}
	published := network.PortMap{network.MustParsePort("5432/tcp"): {{HostIP: netip.MustParseAddr(host), HostPort: strconv.Itoa(o.port)}}}
	custom := []testcontainers.ContainerCustomizer{
		testcontainers.WithEnv(map[string]string{
			"POSTGRES_PASSWORD":    superPassword,
			"POSTGRES_INITDB_ARGS": o.initdbArgs(),
		}),
		testcontainers.WithExposedPorts("5432/tcp"),
		testcontainers.WithHostConfigModifier(func(c *container.HostConfig) { c.PortBindings = published }),
		testcontainers.WithFiles(append(o.files, testcontainers.ContainerFile{
			Reader:            strings.NewReader(o.initScript()),
			ContainerFilePath: "/docker-entrypoint-initdb.d/walfleet.sh",
			FileMode:          0o755,
		})...),
		testcontainers.WithCmd("postgres", "-c", "fsync=on"),
		testcontainers.WithWaitStrategy(wait.ForExposedPort().SkipInternalCheck().SkipExternalCheck()),
	}
	if o.network != nil {
		custom = append(custom, tcnetwork.WithNetwork([]string{o.alias}, o.network))
	}
	if o.before != "" {
		custom = append(custom, testcontainers.WithEntrypoint("sh", "-ec", o.before+"\nexec docker-entrypoint.sh \"$@\"", "sh"))
	}
	if o.standbyOf != "" {
		custom = append(custom, testcontainers.WithEntrypoint("sh", "-ec", cloneScript, "sh", o.standbyOf))
	}
	ctr, err := testcontainers.Run(t.Context(), imageName(o.image), custom...)
	testcontainers.CleanupContainer(t, ctr, testcontainers.StopTimeout(0))
	if ctr != nil {
		t.Cleanup(func() { showLog(t, ctr) })
	}
	if err != nil {
		t.Fatalf("starting a server from the image %s: %v\n(\"make images\" makes the images, \"make test\" finds them)", o.image, err)
	}
	s := &server{ctr: ctr, port: o.port, size: o.segment}
	s.awaitReady(t)
	s.data = s.value(t, "SHOW data_directory")
	return s
}

func (o serverOptions) initdbArgs() string {
	args := fmt.Sprintf("--no-sync --encoding=UTF8 --locale=C --wal-segsize=%d", o.segment/megabyte)
	version, official := strings.CutPrefix(o.image, "postgres:")
	if major, err := strconv.Atoi(version); official && err == nil && major >= 16 {
		args += " -c wal_init_zero=off"
	}
	return args
}

// initScript is run by the image's entrypoint once the data directory is made. The entrypoint allows
// ordinary connections only. The method md5 takes what the password is stored as.
func (o serverOptions) initScript() string {
	return fmt.Sprintf(`#!/bin/sh
set -e
psql -v ON_ERROR_STOP=1 -U "$POSTGRES_USER" -d "$POSTGRES_DB" <<'SQL'
CREATE ROLE walfleet LOGIN REPLICATION PASSWORD '%s';
%s
SQL
cat >>"$PGDATA/postgresql.conf" <<'LINES'
%s
%s
LINES
cat >>"$PGDATA/pg_hba.conf" <<'LINES'
%s
host replication all all md5
LINES
%s
`, password, o.sql, usualSettings, strings.Join(o.settings, "\n"), strings.Join(o.hba, "\n"), o.shell)
}

// usualSettings make a server keep all WAL. Not to fill segments with zeros saves much writing with large
// ones.
const usualSettings = `wal_keep_size = 16GB
max_wal_size = 16GB
wal_init_zero = off
wal_recycle = off
shared_buffers = 64MB
log_min_messages = info
log_replication_commands = on`

// cloneScript makes a standby at the first start. The entrypoint gives the files to the right user.
const cloneScript = `
if [ ! -s "$PGDATA/PG_VERSION" ]; then
	PGPASSWORD='` + password + `' pg_basebackup --host="$1" --username=walfleet --checkpoint=fast \
		--wal-method=stream --write-recovery-conf --pgdata="$PGDATA"
fi
shift
exec docker-entrypoint.sh "$@"`

func showLog(t testing.TB, ctr *testcontainers.DockerContainer) {
	if !t.Failed() {
		return
	}
	logs, err := ctr.Logs(context.Background())
	if err != nil {
		t.Log(err)
		return
	}
	defer logs.Close()
	text, _ := io.ReadAll(logs)
	t.Logf("the end of the server's log:\n%s", text[max(0, len(text)-8000):])
}

var ports struct {
	sync.Mutex
	taken map[int]bool
}

// freePort finds a port that stays free while its server restarts: below the range that the kernel
// takes ports from.
func freePort(t testing.TB) int {
	t.Helper()
	ports.Lock()
	defer ports.Unlock()
	for range 100 {
		port := 20000 + rand.IntN(10000)
		if ports.taken[port] {
			continue
		}
		l, err := net.Listen("tcp", net.JoinHostPort(host, strconv.Itoa(port)))
		if err != nil {
			continue
		}
		l.Close()
		if ports.taken == nil {
			ports.taken = map[int]bool{}
		}
		ports.taken[port] = true
		return port
	}
	t.Fatal("no free port found")
	return 0
}

// conninfo is a connection string for the role walfleet; more keywords can be added, and the last one of
// its kind counts.
func (s *server) conninfo(more ...string) string {
	base := fmt.Sprintf("host=%s port=%d user=walfleet password=%s sslmode=disable connect_timeout=3", host, s.port, password)
	return strings.Join(append([]string{base}, more...), " ")
}

// connect opens a connection as superuser.
func (s *server) connect(ctx context.Context) (*pgconn.PgConn, error) {
	config, err := pgconn.ParseConfig(fmt.Sprintf("host=%s port=%d user=postgres dbname=postgres password='%s' sslmode=disable connect_timeout=5",
		host, s.port, strings.ReplaceAll(superPassword, "'", `\'`)))
	if err != nil {
		return nil, err
	}
	return pgconn.ConnectConfig(ctx, config)
}

// query runs SQL on a connection of its own, as superuser, and returns the last statement's rows as text.
func (s *server) query(t testing.TB, sql string) [][]string {
	t.Helper()
	rows, err := s.try(context.Background(), sql)
	if err != nil {
		t.Fatalf("%s: %v", sql, err)
	}
	return rows
}

func (s *server) try(ctx context.Context, sql string) ([][]string, error) {
	ctx, cancel := context.WithTimeout(ctx, patience)
	defer cancel()
	conn, err := s.connect(ctx)
	if err != nil {
		return nil, err
	}
	defer conn.Close(context.WithoutCancel(ctx))
	results, err := conn.Exec(ctx, sql).ReadAll()
	if err != nil || len(results) == 0 {
		return nil, err
	}
	var rows [][]string
	for _, row := range results[len(results)-1].Rows {
		var texts []string
		for _, column := range row {
			texts = append(texts, string(column)) // NULL is ""
		}
		rows = append(rows, texts)
	}
	return rows, nil
}

// value is the one value that a query returns.
func (s *server) value(t testing.TB, sql string) string {
	t.Helper()
	rows := s.query(t, sql)
	if len(rows) != 1 || len(rows[0]) != 1 {
		t.Fatalf("%s: got %q, want one value", sql, rows)
	}
	return rows[0][0]
}

// set changes a setting of the running server.
func (s *server) set(t testing.TB, name, value string) {
	t.Helper()
	s.query(t, fmt.Sprintf("ALTER SYSTEM SET %s = '%s'", name, value))
	s.query(t, "SELECT pg_reload_conf()")
	await(t, patience, name+" is set", func() (bool, string) {
		v := s.value(t, "SHOW "+name)
		return v == value, v
	})
}

func (s *server) lsn(t testing.TB, sql string) wal.LSN {
	t.Helper()
	return parseLSN(t, s.value(t, sql))
}

func parseLSN(t testing.TB, text string) wal.LSN {
	t.Helper()
	if text == "" {
		return 0
	}
	lsn, err := wal.ParseLSN(text)
	if err != nil {
		t.Fatal(err)
	}
	return lsn
}

// end is the exclusive end of the WAL that the server has flushed.
func (s *server) end(t testing.TB) wal.LSN {
	t.Helper()
	return s.lsn(t, "SELECT pg_current_wal_flush_lsn()")
}

func (s *server) awaitReady(t testing.TB) {
	t.Helper()
	await(t, patience, "the server answers", func() (bool, string) {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err := s.try(ctx, "SELECT 1")
		if state, stateErr := s.ctr.State(ctx); err != nil && stateErr == nil && !state.Running {
			t.Fatalf("the server has ended with exit status %d", state.ExitCode)
		}
		return err == nil, fmt.Sprint(err)
	})
}

// engine gives f the Docker engine's own interface.
func (s *server) engine(t testing.TB, f func(ctx context.Context, c *testcontainers.DockerClient, id string) error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(context.Background(), patience)
	defer cancel()
	c, err := testcontainers.NewDockerClientWithOpts(ctx)
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := f(ctx, c, s.ctr.GetContainerID()); err != nil {
		t.Fatal(err)
	}
}

// kill ends all of the server's processes with SIGKILL.
func (s *server) kill(t testing.TB) {
	t.Helper()
	s.engine(t, func(ctx context.Context, c *testcontainers.DockerClient, id string) error {
		gone := c.ContainerWait(ctx, id, client.ContainerWaitOptions{Condition: container.WaitConditionNotRunning})
		if _, err := c.ContainerKill(ctx, id, client.ContainerKillOptions{Signal: "KILL"}); err != nil {
			return err
		}
		select {
		case <-gone.Result:
			return nil
		case err := <-gone.Error:
			return err
		}
	})
}

// stop is a fast shutdown, which waits for walsenders. It returns how long that took.
func (s *server) stop(t testing.TB) time.Duration {
	t.Helper()
	begin := time.Now()
	s.engine(t, func(ctx context.Context, c *testcontainers.DockerClient, id string) error {
		limit := int(patience.Seconds())
		_, err := c.ContainerStop(ctx, id, client.ContainerStopOptions{Signal: "SIGINT", Timeout: &limit})
		return err
	})
	return time.Since(begin)
}

// start starts a server that was killed or stopped, and waits until it answers.
func (s *server) start(t testing.TB) {
	t.Helper()
	s.engine(t, func(ctx context.Context, c *testcontainers.DockerClient, id string) error {
		_, err := c.ContainerStart(ctx, id, client.ContainerStartOptions{})
		return err
	})
	s.awaitReady(t)
}

// pause makes the server silent: its connections stay, nothing answers. A busy container is not always frozen at
// the first attempt.
func (s *server) pause(t testing.TB) {
	t.Helper()
	s.engine(t, func(ctx context.Context, c *testcontainers.DockerClient, id string) error {
		await(t, patience, "the container is paused", func() (bool, string) {
			_, err := c.ContainerPause(ctx, id, client.ContainerPauseOptions{})
			return err == nil, fmt.Sprint(err)
		})
		return nil
	})
}

func (s *server) unpause(t testing.TB) {
	t.Helper()
	s.engine(t, func(ctx context.Context, c *testcontainers.DockerClient, id string) error {
		_, err := c.ContainerUnpause(ctx, id, client.ContainerUnpauseOptions{})
		return err
	})
}

// promote ends recovery, and returns when the server takes writes.
func (s *server) promote(t testing.TB) {
	t.Helper()
	if got := s.value(t, "SELECT pg_promote()"); got != "t" {
		t.Fatalf("pg_promote() returned %q", got)
	}
	await(t, patience, "the server is a primary", func() (bool, string) {
		v := s.value(t, "SELECT pg_is_in_recovery()")
		return v == "f", v
	})
}

// shell runs a script in the container and returns what it prints.
func (s *server) shell(t testing.TB, script string, args ...string) string {
	t.Helper()
	code, out, err := s.ctr.Exec(context.Background(), append([]string{"sh", "-ec", script, "sh"}, args...), tcexec.Multiplexed())
	if err != nil {
		t.Fatalf("exec in the container: %v", err)
	}
	text, err := io.ReadAll(out)
	if err != nil {
		t.Fatalf("exec in the container: %v", err)
	}
	if code != 0 {
		t.Fatalf("exec in the container: exit status %d: %s", code, text)
	}
	return strings.TrimSpace(string(text))
}

// sender is a row of pg_stat_replication, of the walsender that uses a slot.
type sender struct {
	pid                       string // "": there is none
	state, sync               string
	sent, write, flush, apply wal.LSN // 0: NULL
}

func (s *server) sender(t testing.TB, slot string) sender {
	t.Helper()
	rows := s.query(t, `SELECT r.pid, r.state, r.sync_state, r.sent_lsn, r.write_lsn, r.flush_lsn, r.replay_lsn
		FROM pg_replication_slots s JOIN pg_stat_replication r ON r.pid = s.active_pid WHERE s.slot_name = '`+slot+`'`)
	if len(rows) == 0 {
		return sender{}
	}
	r := rows[0]
	return sender{r[0], r[1], r[2], parseLSN(t, r[3]), parseLSN(t, r[4]), parseLSN(t, r[5]), parseLSN(t, r[6])}
}
