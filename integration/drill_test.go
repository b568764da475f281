package integration

import (
	"context"
	"encoding/json"
	"io"
	"strings"
	"testing"

	tcexec "github.com/testcontainers/testcontainers-go/exec"

	"github.com/walfleet/walfleet/internal/restore"
	"github.com/walfleet/walfleet/receiver"
)

// drill runs walfleet drill on the copy of an archive in the container, as the server's user, makes sure that it leaves
// nothing behind, and returns its report.
func (s *server) drill(t testing.TB, args ...string) (report restore.DrillReport) {
	t.Helper()
	return s.drillAs(t, "postgres", args...)
}

func (s *server) drillAs(t testing.TB, user string, args ...string) (report restore.DrillReport) {
	t.Helper()
	const script = `
program=$1 archive=$2 user=$3
shift 3
cd /
setpriv --reuid="$user" --regid="$user" --init-groups "$program" drill --json --archive "$archive" "$@" || [ $? = 1 ]
ls -d /tmp/walfleet-drill-* 2>/dev/null && exit 9
grep -l 'walfleet-drill-[0-9]' /proc/[0-9]*/cmdline 2>/dev/null && exit 9
exit 0`
	cmd := append([]string{"bash", "-euc", script, "bash", ours.path + "/walfleet", archivePath, user}, args...)
	code, out, err := s.ctr.Exec(context.Background(), cmd, tcexec.Multiplexed())
	if err != nil {
		t.Fatal(err)
	}
	text, err := io.ReadAll(out)
	if err == nil {
		err = json.Unmarshal(text, &report)
	}
	if err != nil || code != 0 {
		t.Fatalf("exit status %d, %v:\n%s", code, err, text)
	}
	if strings.Contains(string(text), password) || strings.Contains(string(text), superPassword) {
		t.Errorf("a password is shown: %s", text)
	}
	return report
}

// TestDrill rehearses with every form of a backup, and with what makes a recovery fail. The cluster's own configuration
// would do harm.
func TestDrill(t *testing.T) {
	t.Parallel()
	s := receivewalServer(t, serverOptions{settings: []string{
		"recovery_end_command = 'touch /tmp/harm'",
		"archive_cleanup_command = 'touch /tmp/harm'",
		"restore_command = 'touch /tmp/harm; false'",
		"primary_conninfo = 'host=/nowhere password=" + password + "'",
		"max_connections = 150",
	}})
	d := startDaemon(t, configText(t.TempDir(), cluster("orders", s.conninfo())))
	d.awaitState(t, "orders", receiver.Streaming)
	s.shell(t, `install -d -o postgres "$1" /opt/recovery /opt/recovery/elsewhere /opt/recovery/tar /opt/recovery/gz /opt/recovery/plain /opt/recovery/older`, "/opt/tablespace")
	s.asPostgres(t, `pg_basebackup --no-sync -c fast --wal-method=none --pgdata=/opt/recovery/older 2>&1`)
	s.query(t, "CREATE TABLESPACE elsewhere LOCATION '/opt/tablespace'")
	s.query(t, "CREATE TABLE there TABLESPACE elsewhere AS SELECT generate_series(1, 1000) i")
	s.query(t, "CREATE DATABASE \"a 'strange' \\ name\"")
	s.asPostgres(t, `
cd /opt/recovery
pg_basebackup --no-sync -c fast --pgdata=plain --tablespace-mapping=/opt/tablespace=/opt/recovery/elsewhere
pg_basebackup --no-sync -c fast --pgdata=tar --format=tar --write-recovery-conf
pg_basebackup --no-sync -c fast --pgdata=gz --format=tar --gzip --wal-method=none 2>/dev/null
# The tablespace of the cluster itself stays as it is.
md5sum /opt/tablespace/*/*/* >/opt/recovery/sums`)
	s.write(t, 4)
	st := d.archived(t, "orders", s)
	s.pushArchive(t, d.clusterDir("orders"))
	s.shell(t, `chown -R postgres "$1"; chmod 700 "$1"`, archivePath)
	segments, _ := listArchive(t, d.clusterDir("orders"), s.size)
	last := segments[0]
	for _, segment := range segments {
		if segment.sealed {
			last = segment
		}
	}
	middle := s.size.Segment(1, last.Start-megabyte)

	for _, tt := range []struct{ name, user, backup string }{
		{"plain", "postgres", "/opt/recovery/plain"},
		{"tar", "postgres", "/opt/recovery/tar"},
		{"a compressed tar file, as root", "root", "/opt/recovery/gz/base.tar.gz"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			got := s.drillAs(t, tt.user, "--backup", tt.backup)
			if !got.OK || !got.Opened || len(got.Databases) != 3 || got.Timeline != 1 || got.LastCommit.IsZero() {
				t.Errorf("%+v", got)
			}
			if parseLSN(t, got.RecoveredLSN) != st.Flushed {
				t.Errorf("recovered to %s, the archive ends at %s", got.RecoveredLSN, st.Flushed)
			}
			s.shell(t, `[ ! -e /tmp/harm ]; md5sum --quiet -c /opt/recovery/sums`)
		})
	}

	s.asPostgres(t, `
cd /opt/recovery
for copy in torn unlabelled; do mkdir $copy; (cd plain; tar c --exclude=pg_wal/* .) | tar x -C $copy; done
rm torn/base/1/2613 unlabelled/backup_label
mkdir old; echo 12 >old/PG_VERSION`)
	for _, tt := range []struct {
		name, spoil string // shell, in a copy of the archive
		args        []string
		says        string
	}{
		{"a target that the archive does not have", "", []string{"--to", "F/0"}, "recovery ended before configured recovery target was reached"},
		{"a hole", "rm " + middle.Name(), nil, middle.Name()},
		{"a damaged segment", "printf x | dd of=" + middle.Name() + " bs=1 seek=600000 conv=notrunc status=none", nil, middle.Name()},
		{"a damaged last segment", "printf x | dd of=" + last.Name() + " bs=1 seek=600000 conv=notrunc status=none", nil, "is lost to a recovery"},
		{"zeros in the last segment", "truncate -s 8192 " + last.Name() + "; truncate -s 1M " + last.Name(), nil, last.Name()},
		{"another cluster", `sed -i 's/"system_identifier": "7/"system_identifier": "6/' archive.json`, nil, "another cluster"},
		{"WAL of a tablespace of this machine", "", []string{"--backup", "/opt/recovery/older"}, "creates a tablespace in \"/opt/tablespace\""},
		{"no superuser", "", []string{"--user", "nobody"}, "--user names a superuser"},
		{"no time", "", []string{"--timeout", "1ms"}, "not done after 1ms (--timeout)"},
		{"a file of the backup is missing", "", []string{"--backup", "/opt/recovery/torn"}, "relations without a file"},
		{"no backup_label", "", []string{"--backup", "/opt/recovery/unlabelled"}, "no backup_label"},
		{"a server that is not here", "", []string{"--backup", "/opt/recovery/old"}, "install postgresql-12"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			s.asPostgres(t, `rm -rf /tmp/spoilt; cp -a "$1" /tmp/spoilt; cd /tmp/spoilt; eval "$2"`, archivePath, tt.spoil)
			got := s.drill(t, append([]string{"--archive", "/tmp/spoilt", "--backup", "/opt/recovery/plain"}, tt.args...)...)
			if got.OK || !strings.Contains(got.Error, tt.says) {
				t.Errorf("it says %q, want %q: %+v", got.Error, tt.says, got)
			}
			s.shell(t, `md5sum --quiet -c /opt/recovery/sums`)
		})
	}

	t.Run("an archive of root, as root", func(t *testing.T) {
		s.shell(t, `chown -R root /tmp/spoilt`)
		if got := s.drillAs(t, "root", "--archive", "/tmp/spoilt", "--backup", "/opt/recovery/plain"); got.OK || !strings.Contains(got.Error, "belongs to root") {
			t.Errorf("%+v", got)
		}
	})

	// The postmaster is stopped, so that the drill is not over before it is told to end.
	for _, signal := range []string{"TERM", "HUP", "KILL"} {
		t.Run("SIG"+signal, func(t *testing.T) {
			left := s.asPostgres(t, `
cd /
"$1/walfleet" drill --archive "$2" --backup /opt/recovery/plain >/tmp/told 2>&1 &
until server=$(head -n 1 /tmp/walfleet-drill-*/data/postmaster.pid 2>/dev/null) && [ -n "$server" ]; do sleep 0.01; done
kill -STOP "$server"
kill -"$3" $!
kill -CONT "$server"
status=0; wait $! || status=$?
for i in $(seq 200); do
	grep -qs 'walfleet-drill-[0-9]' /proc/[0-9]*/cmdline || break
	sleep 0.05
done
[ $i -lt 200 ] || { echo "the server goes on"; exit 1; }
[ "$3" = KILL ] || [ $status = 1 ] || { echo "exit status $status"; exit 1; }
ls -d /tmp/walfleet-drill-* 2>/dev/null || true
rm -rf /tmp/walfleet-drill-*`, ours.path, archivePath, signal)
			if (left == "") != (signal != "KILL") {
				t.Errorf("left behind: %q", left)
			}
		})
	}
}
