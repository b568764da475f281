package integration

import (
	"context"
	"fmt"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"text/tabwriter"
	"time"

	"github.com/walfleet/walfleet/receiver"
)

// Where recovery tests have things in a server's container.
const (
	backupPath  = "/opt/recovery/backup"  // what pg_basebackup made, without any WAL
	archivePath = "/opt/recovery/archive" // a copy of walfleet's
)

// restoreCommand is a recovery's, of the end of the archive too.
var restoreCommand = fmt.Sprintf(`restore_command = '%s/walfleet restore-wal --archive %s --partial "%%f" "%%p"'`, ours.path, archivePath)

// afterDisaster gives a server that starts with nothing but a base backup and an archive, once there is a file that says
// so.
var afterDisaster = fmt.Sprintf(`
if [ -e /opt/recovery/disaster ]; then
	rm -rf /opt/recovery/disaster "$PGDATA"/*
	cp -r %s/. "$PGDATA"
	cat >>"$PGDATA/postgresql.auto.conf" <<'LINES'
synchronous_standby_names = ''
%s
LINES
	touch "$PGDATA/recovery.signal"
fi`, backupPath, restoreCommand)

// asPostgres runs a script of bash in the container as the server's user, and returns what it prints.
func (s *server) asPostgres(t testing.TB, script string, args ...string) string {
	t.Helper()
	return s.shell(t, `exec setpriv --reuid=postgres --regid=postgres --init-groups bash -euc "$@"`, append([]string{script, "bash"}, args...)...)
}

// takeBackup makes a base backup that has no WAL.
func (s *server) takeBackup(t testing.TB) {
	t.Helper()
	s.shell(t, `rm -rf "$1"; mkdir -p "$1"; chown postgres "$1"`, backupPath)
	s.asPostgres(t, `pg_basebackup --no-sync --checkpoint=fast --wal-method=none --pgdata="$1" 2>&1`, backupPath)
}

// pushArchive gives the container a copy of an archive, instead of the one that it has.
func (s *server) pushArchive(t testing.TB, dir string) {
	t.Helper()
	s.shell(t, `rm -rf "$1"; mkdir "$1"`, archivePath)
	s.pushInto(t, dir, archivePath)
}

// ledger is what clients were told of their commits: each inserts the numbers from 1 on, one by one.
type ledger struct {
	acknowledged []atomic.Int64 // by client: the last number whose commit returned
	end          context.CancelFunc
	clients      sync.WaitGroup
}

// startLedger starts clients that insert until their server is gone.
func startLedger(t testing.TB, s *server, clients int) *ledger {
	t.Helper()
	s.query(t, "DROP TABLE IF EXISTS ledger; CREATE TABLE ledger (client int, n int, filler text)")
	ctx, cancel := context.WithCancel(context.Background())
	l := &ledger{acknowledged: make([]atomic.Int64, clients), end: cancel}
	for i := range l.acknowledged {
		conn, err := s.connect(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		l.clients.Go(func() {
			defer conn.Close(ctx)
			for n := int64(1); ; n++ {
				// Up to 32 kB: records cross pages, and now and then a segment's end.
				sql := fmt.Sprintf("INSERT INTO ledger SELECT %d, %d, string_agg(md5(i::text), '') FROM generate_series(1, %d) i", i, n, 1<<(n%11))
				if _, err := conn.Exec(ctx, sql).ReadAll(); err != nil {
					return
				}
				l.acknowledged[i].Store(n)
			}
		})
	}
	t.Cleanup(l.stop)
	return l
}

func (l *ledger) stop() {
	l.end()
	l.clients.Wait()
}

func (l *ledger) total() (sum int64) {
	for i := range l.acknowledged {
		sum += l.acknowledged[i].Load()
	}
	return sum
}

// compare counts the commits that were acknowledged, that the server has, and that were acknowledged and it has not.
func (l *ledger) compare(t testing.TB, s *server) (acknowledged, recovered, lost int64) {
	t.Helper()
	have := map[string]int64{}
	for _, row := range s.query(t, "SELECT client, max(n), count(DISTINCT n), count(*) FROM ledger GROUP BY client") {
		var last, distinct, rows int64
		fmt.Sscan(strings.Join(row[1:], " "), &last, &distinct, &rows)
		if last != distinct || last != rows {
			t.Errorf("client %s has %d rows, %d different ones, up to %d", row[0], rows, distinct, last)
		}
		have[row[0]] = last
	}
	for i := range l.acknowledged {
		promised, got := l.acknowledged[i].Load(), have[fmt.Sprint(i)]
		acknowledged += promised
		recovered += got
		lost += max(0, promised-got)
		if got > promised+1 { // one may have been committed when the server died
			t.Errorf("client %d was told of %d commits, and the server has %d", i, promised, got)
		}
	}
	return acknowledged, recovered, lost
}

// TestNoCommitIsLost kills a primary whose commits wait for walfleet, at a random moment, in half of the rounds walfleet
// as well, removes the primary's data, and recovers from a base backup and the archive alone.
func TestNoCommitIsLost(t *testing.T) {
	t.Parallel()
	var mu sync.Mutex
	var table strings.Builder
	lines := tabwriter.NewWriter(&table, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(lines, "version\tround\tseed\tkilled with it\tacknowledged\trecovered\tlost\t")
	t.Run("versions", func(t *testing.T) {
		for _, image := range images() {
			t.Run(filepath.Base(image), func(t *testing.T) {
				t.Parallel()
				s := receivewalServer(t, serverOptions{image: image, before: afterDisaster})
				s.shell(t, "mkdir -p /opt/recovery")
				for round := range rounds(1, 5) {
					r := loseServer(t, s)
					mu.Lock()
					fmt.Fprintf(lines, "%s\t%d\t%d\t%s\t%d\t%d\t%d\t\n", filepath.Base(image), round+1, r.seed, r.with, r.acknowledged, r.recovered, r.lost)
					mu.Unlock()
				}
				t.Run("drill", func(t *testing.T) {
					got := s.drill(t, "--backup", backupPath)
					if !got.OK || !got.Opened || len(got.Databases) < 2 || got.WALBytes == 0 {
						t.Errorf("%+v", got)
					}
				})
			})
		}
	})
	lines.Flush()
	t.Logf("\n%s", table.String())
}

// disaster is what a round found.
type disaster struct {
	seed                          uint64
	with                          string // what was killed beside the primary
	acknowledged, recovered, lost int64
}

// loseServer is one round. Afterwards s is the recovered server, which archives nowhere.
func loseServer(t *testing.T, s *server) (r disaster) {
	r.seed = rand.Uint64()
	random := rand.New(rand.NewPCG(r.seed, 0))
	dir := t.TempDir()
	p := startProgram(t, configText(dir, cluster("orders", s.conninfo())))
	p.stderr.await(t, "streaming started")
	s.takeBackup(t)
	s.shell(t, `rm -rf "$1"; mkdir "$1"`, archivePath)
	s.set(t, "synchronous_standby_names", "walfleet")
	await(t, patience, "walfleet is the synchronous standby", func() (bool, string) {
		got := s.sender(t, "walfleet")
		return got.sync == "sync", fmt.Sprintf("%+v", got)
	})
	l := startLedger(t, s, 4)
	await(t, patience, "commits", func() (bool, string) { return l.total() >= 20, fmt.Sprint(l.total()) })
	moment(random, 1500*time.Millisecond)
	if random.IntN(2) == 0 {
		r.with = "walfleet"
		p.signal(t, syscall.SIGKILL)
	}
	s.kill(t)
	l.stop()
	if r.with == "" { // it goes on running
		p.stderr.await(t, "not archiving")
	}
	s.pushInto(t, filepath.Join(dir, "orders"), archivePath)
	if r.with == "" {
		p.signal(t, syscall.SIGTERM)
	}
	p.exit(t)
	flag := t.TempDir()
	if err := os.WriteFile(filepath.Join(flag, "disaster"), nil, 0o600); err != nil {
		t.Fatal(err)
	}
	s.pushInto(t, flag, "/opt/recovery")
	s.start(t)
	s.awaitPrimary(t)
	r.acknowledged, r.recovered, r.lost = l.compare(t, s)
	if r.lost > 0 {
		t.Errorf("seed %d: %d of %d acknowledged commits are lost", r.seed, r.lost, r.acknowledged)
	}
	return r
}

func (s *server) awaitPrimary(t testing.TB) {
	t.Helper()
	await(t, patience, "recovery ends", func() (bool, string) {
		v := s.value(t, "SELECT pg_is_in_recovery()")
		return v == "f", v
	})
}

// recovered lets a server of its own, in the container of s, recover from the base backup and the archive there, with
// more lines of postgresql.conf, and returns what a query gives after its promotion.
func (s *server) recovered(t testing.TB, sql string, settings ...string) string {
	t.Helper()
	settings = append([]string{
		restoreCommand, "listen_addresses = ''", "recovery_target_action = promote", "synchronous_standby_names = ''", "fsync = off",
	}, settings...)
	return s.asPostgres(t, `
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
cp -r "$1" "$dir/data"
printf '%s\n' "$3" "unix_socket_directories = '$dir'" >>"$dir/data/postgresql.auto.conf"
touch "$dir/data/recovery.signal"
chmod 700 "$dir/data"
postgres -D "$dir/data" >"$dir/log" 2>&1 &
ask() { psql -XAtq -h "$dir" -d postgres -c "$1" 2>/dev/null; }
until [ "$(ask 'SELECT pg_is_in_recovery()')" = f ]; do
	kill -0 $! || { cat "$dir/log"; exit 1; }
	sleep 0.05
done
ask "$2"
kill -QUIT $!
wait $! || true`, backupPath, sql, strings.Join(settings, "\n"))
}

// TestPointInTime recovers to a time, a position and a name, and across a promotion, on either side of it.
func TestPointInTime(t *testing.T) {
	t.Parallel()
	s := receivewalServer(t, serverOptions{})
	d := startDaemon(t, configText(t.TempDir(), cluster("orders", s.conninfo())))
	d.awaitState(t, "orders", receiver.Streaming)
	s.shell(t, "mkdir -p /opt/recovery")
	s.takeBackup(t)
	mark := func(n int) {
		s.query(t, fmt.Sprintf("CREATE TABLE IF NOT EXISTS marks (n int); INSERT INTO marks VALUES (%d)", n))
		s.write(t, 1)
	}
	mark(1)
	at := s.value(t, "SELECT clock_timestamp()")
	mark(2)
	lsn := s.value(t, "SELECT pg_current_wal_insert_lsn()")
	mark(3)
	s.query(t, "SELECT pg_create_restore_point('before the accident')")
	mark(4)

	// A server that was down and is promoted goes on with timeline 2.
	s.shell(t, `touch "$1/standby.signal"`, s.data)
	s.stop(t)
	s.start(t)
	s.promote(t)
	mark(5)
	st := d.archived(t, "orders", s)
	if st.Timeline != 2 {
		t.Fatalf("the archive is on timeline %d, want 2", st.Timeline)
	}
	s.pushArchive(t, d.clusterDir("orders"))

	const marks = "SELECT string_agg(n::text, ' ' ORDER BY n) FROM marks"
	for _, tt := range []struct {
		name, settings, want string
	}{
		{"time", "recovery_target_time = '" + at + "'", "1"},
		{"position", "recovery_target_lsn = '" + lsn + "'", "1 2"},
		{"name", "recovery_target_name = 'before the accident'", "1 2 3"},
		{"the old timeline", "recovery_target_timeline = 1", "1 2 3 4"},
		{"the new timeline", "recovery_target_timeline = 2", "1 2 3 4 5"},
		{"the latest timeline", "", "1 2 3 4 5"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			if got := s.recovered(t, marks, tt.settings); got != tt.want {
				t.Errorf("recovered the marks %q, want %q", got, tt.want)
			}
		})
	}
	t.Run("drill", func(t *testing.T) {
		for _, tt := range []struct {
			to       string
			timeline uint32
		}{{lsn, 1}, {at, 1}, {"", 2}} {
			got := s.drill(t, "--backup", backupPath, "--to", tt.to)
			if !got.OK || got.Timeline != tt.timeline {
				t.Errorf("to %q: %+v", tt.to, got)
			}
			switch tt.to {
			case lsn:
				if parseLSN(t, got.RecoveredLSN) <= parseLSN(t, lsn) || parseLSN(t, got.RecoveredLSN) > parseLSN(t, lsn)+1000 {
					t.Errorf("recovered to %s, the target was %s", got.RecoveredLSN, lsn)
				}
			case "":
				if end := parseLSN(t, got.RecoveredLSN); end != st.Flushed {
					t.Errorf("recovered to %s, the archive ends at %s", end, st.Flushed)
				}
			}
		}
	})
}
