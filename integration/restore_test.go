package integration

import (
	"fmt"
	"maps"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/walfleet/walfleet/receiver"
)

// restoreScript is bash: "restoreScript PREPARE SETTINGS" lets a server in the container, with nothing but the base backup
// and the archive, recover with our restore_command, and prints "opened" and the marks that it has, or "stopped", and its
// log. PREPARE is bash that runs before, with $archive, a copy, and $data, the new data directory.
const restoreScript = `
dir=$(mktemp -d)
trap 'kill -QUIT $postgres 2>/dev/null && wait $postgres; rm -rf "$dir"' EXIT
cp -r /opt/restore/backup "$dir/data"
cp -r /opt/restore/archive "$dir/archive"
chmod 700 "$dir/data"
archive=$dir/archive data=$dir/data
eval "$1"
printf '%s\n' "${2//ARCHIVE/$archive}" "unix_socket_directories = '$dir'" "listen_addresses = ''" "fsync = off" >>"$data/postgresql.auto.conf"
touch "$data/recovery.signal"
postgres -D "$data" >"$dir/log" 2>&1 &
postgres=$!
ask() { psql -XAtq -h "$dir" -d postgres -c "$1" 2>/dev/null; }
until [ "$(ask 'SELECT pg_is_in_recovery()')" = f ]; do
	kill -0 $postgres 2>/dev/null || { echo stopped; cat "$dir/log"; exit 0; }
	sleep 0.05
done
echo opened "$(ask "SELECT string_agg(n::text, ' ' ORDER BY n) FROM marks")"
cat "$dir/log"`

// TestRestoreWAL recovers servers from a base backup and an archive with every kind of file, and with all that must keep
// them from opening too early. A mark is in each segment.
func TestRestoreWAL(t *testing.T) {
	t.Parallel()
	s := receivewalServer(t, serverOptions{})
	dir := t.TempDir()
	orders := filepath.Join(dir, "orders")
	marks := 0
	mark := func() {
		marks++
		s.query(t, fmt.Sprintf("CREATE TABLE IF NOT EXISTS marks (n int); INSERT INTO marks VALUES (%d)", marks))
	}
	for i, compression := range []struct{ method, suffix string }{{"gzip", ".gz"}, {"lz4", ".lz4"}, {"zstd", ".zst"}, {"none", ""}} {
		d := startDaemon(t, configText(dir, cluster("orders", s.conninfo(), fmt.Sprintf("compress = %q", compression.method))))
		d.awaitState(t, "orders", receiver.Streaming)
		if i == 0 {
			s.shell(t, `mkdir -p /opt/restore/backup; chown postgres /opt/restore/backup`)
			s.shell(t, `exec setpriv --reuid=postgres --regid=postgres --init-groups pg_basebackup --no-sync --checkpoint=fast --wal-method=none --pgdata=/opt/restore/backup 2>&1`)
		}
		for range 3 {
			mark()
			s.switchWAL(t)
		}
		await(t, patience, "sealed segments with the suffix "+compression.suffix, func() (bool, string) {
			n := 0
			have, temporary := sealedFiles(t, orders, s.size)
			for _, f := range have {
				if f.suffix == compression.suffix {
					n++
				}
			}
			return n >= 3 && len(temporary) == 0, fmt.Sprint(have, temporary)
		})
		if compression.suffix == "" {
			mark() // in what is not complete
		}
		d.archived(t, "orders", s)
		d.stop(t)
	}
	s.push(t, orders, "/opt/restore/archive")
	s.shell(t, `chown -R postgres /opt/restore`)

	all := ""
	for n := range marks {
		all = strings.TrimSpace(fmt.Sprint(all, " ", n+1))
	}
	sealed := strings.TrimSuffix(all, fmt.Sprint(" ", marks))
	command := "restore_command = '" + ours.path + `/walfleet restore-wal --archive ARCHIVE %s "%%f" "%%p"%s'`
	have, _ := sealedFiles(t, orders, s.size)
	names := slices.Sorted(maps.Keys(have))
	middle := have[names[len(names)-6]] // with mark 7
	gap := fmt.Sprintf(`sed -i 's|^  "origin"|  "gaps": [{"timeline": 1, "from": "%s", "to": "%s", "time": "2026-01-31T09:30:00Z", "reason": ""}],\n&|' "$archive/archive.json"`,
		middle.Start+256, middle.End())
	last := `last=$(cd "$archive"; ls | grep partial | tail -1); `
	for _, tt := range []struct {
		what, flags, otherwise, prepare string
		want                            string // marks; "": it stops
		log                             string
	}{
		{what: "what is complete", want: sealed, log: "which is not complete; \"restore-wal --partial\" takes what it has"},
		{what: "what is complete, one by one", flags: "--prefetch=0", want: sealed, log: "which is not complete"},
		{what: "all", flags: "--partial", want: all, log: "redo done"},
		{what: "a fuller segment of its own", flags: "--partial", want: all, log: "redo done",
			prepare: last + `cp "` + s.data + `/pg_wal/${last%.partial}" "$data/pg_wal"; truncate -s 500 "$archive/$last"`},
		{what: "an emptier segment of its own", flags: "--partial", want: all, log: "redo done",
			prepare: last + `cp "$archive/$last" "$data/pg_wal/${last%.partial}"; truncate -s 500 "$data/pg_wal/${last%.partial}"; truncate -s 1M "$data/pg_wal/${last%.partial}"`},
		{what: "a gap", flags: "--partial", prepare: gap, log: fmt.Sprintf("lacks the WAL from %s to %s for good", middle.Start+256, middle.End())},
		{what: "up to a gap, by decision", flags: "--partial", otherwise: " || exit 1", prepare: gap, want: "1 2 3 4 5 6", log: "for good"},
		{what: "a hole", flags: "--partial", prepare: `rm "$(ls "$archive"/*.lz4 | tail -1)"`, log: "recovery would end in the middle of the WAL"},
		{what: "a hole that the server fills", flags: "--partial", want: all, log: "redo done",
			prepare: `hole=$(ls "$archive"/*.lz4 | tail -1); rm "$hole"; hole=${hole##*/}; cp "` + s.data + `/pg_wal/${hole%.lz4}" "$data/pg_wal"`},
		{what: "damage", flags: "--partial", prepare: `truncate -s -1 "$(ls "$archive"/*.zst | tail -1)"`, log: "in the archive is damaged"},
		{what: "an archive that is not mounted", flags: "--partial", prepare: `rm "$archive"/*`, log: "has no archive.json"},
		{what: "another cluster's archive", flags: "--partial", prepare: `sed -i '/system_identifier/s/"[0-9]*"/"7"/' "$archive/archive.json"`, log: "correct the restore_command"},
		{what: "a wrong command line", flags: "--parital", log: "unknown flag"},
	} {
		t.Run(tt.what, func(t *testing.T) {
			out := s.shell(t, `exec setpriv --reuid=postgres --regid=postgres --init-groups bash -euc "$@"`, restoreScript, "bash", tt.prepare, fmt.Sprintf(command, tt.flags, tt.otherwise))
			want := "opened " + tt.want + "\n"
			if tt.want == "" {
				want = "stopped\n"
			}
			if !strings.HasPrefix(out, want) || !strings.Contains(out, tt.log) || tt.want == "" != strings.Contains(out, "FATAL:  could not restore file") {
				t.Errorf("want %s and a log that says %q:\n%s", want, tt.log, out)
			}
		})
	}
}
