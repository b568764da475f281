package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"testing"

	"github.com/testcontainers/testcontainers-go"

	"github.com/walfleet/walfleet/internal/wal"
)

// A tool is what the name pg_receivewal means in a server's container.
type tool struct {
	name string
	path string // a directory that comes first in PATH; "": the image's own
}

var (
	original = tool{name: "original"}
	ours     = tool{name: "ours", path: "/opt/walfleet"}
)

// static is walfleet for the servers' containers, built once.
var static struct {
	build sync.Once
	err   error
}

// receivewalServer starts a server whose container has walfleet, as pg_receivewal too. Over TCP it asks for
// passwords, over its Unix socket it does not. It writes no WAL by itself but for what its background writer
// logs, and copies of the slot "base" begin where its own WAL did.
func receivewalServer(t testing.TB, o serverOptions) *server {
	t.Helper()
	binary := walfleet.path + "-static"
	static.build.Do(func() {
		build := exec.Command("go", "build", "-o", binary, "../cmd/walfleet")
		build.Env = append(os.Environ(), "CGO_ENABLED=0", "GOOS=linux")
		if out, err := build.CombinedOutput(); err != nil {
			static.err = fmt.Errorf("go build: %w\n%s", err, out)
		}
	})
	if static.err != nil {
		t.Fatal(static.err)
	}
	o.segment = megabyte
	o.settings = append(o.settings, "autovacuum = off", "checkpoint_timeout = 1h",
		"max_replication_slots = 1000", "max_wal_senders = 40")
	o.sql += "; CREATE ROLE limited LOGIN PASSWORD '" + password + "'"
	o.shell += "\n" + `sed -i '/^host/s/trust$/md5/' "$PGDATA/pg_hba.conf"`
	o.files = append(o.files, testcontainers.ContainerFile{
		HostFilePath: binary, ContainerFilePath: ours.path + "/walfleet", FileMode: 0o755,
	})
	s := startServer(t, o)
	s.shell(t, `ln -s walfleet "$1"/pg_receivewal`, ours.path)
	s.query(t, "SELECT pg_create_physical_replication_slot('base', true)")
	return s
}

// A row is a way to call pg_receivewal. Its script is bash, run by the server's user. It calls "receivewal" where an
// operator calls pg_receivewal, and may use
//
//	$dir     an empty directory, mode 0700
//	$slot    a slot of its own that begins with the WAL of the server
//	$start   where that slot begins, in the middle of a segment
//	$middle  a position inside the second segment
//	$full    the second segment's beginning, which is the first one's end
//	$before  the position one byte before that
//	$inside  the beginning of a segment inside a record that is longer than two segments
//	$after   a position after that record, at least a segment later
//	$last    a position a segment behind that
//	$secret  the password of the roles walfleet and limited, which the Unix socket does not need
//	$open    options that archive from $slot into $dir, up to $middle
//
// What is compared is everything that receivewal printed, its last exit status, and what is in $dir at the end.
type row struct {
	name   string
	script string
	since  int // the first major version whose own tool is like this; 0: all
}

// sighting is what was seen of one tool in one row.
type sighting struct {
	status, stdout, stderr string
	files                  string // what filesFunctions print
}

// filesFunctions are bash: "files DIR" prints a line for each file of an archive: name, mode, owner, and the SHA-256 of
// its WAL or "-".
//
// The WAL of a file is what a reader finds in it: decompressed, without the zeros at a partial file's end. The
// name of a partial file is the segment's: the original appends to a compressed file, ours keeps it plain.
const filesFunctions = `
wal() {
	case $1 in
	*.lz4 | *.lz4.partial) return 1 ;;
	*.gz) gzip -dc "$1" ;;
	*.gz.partial) gzip -dcf "$1" 2>/dev/null | trimmed ;;
	*.partial) trimmed <"$1" ;;
	*) cat "$1" ;;
	esac
}

trimmed() {
	perl -0777 -ne '$_ = reverse; /^\0*/; print scalar reverse substr($_, $+[0])'
}

files() {
	local file name sum
	cd "$1" 2>/dev/null || return
	for file in * .[!.]*; do
		case $file in archive.json | .lock | '*' | '.[!.]*') continue ;; esac
		name=$file
		case $file in *.partial) name=${file%%.*}.partial ;; esac
		if sum=$(set -o pipefail; wal "$file" | sha256sum); then sum=${sum%% *}; else sum=-; fi
		echo "$name $(stat -c '%A %U:%G' "$file") $sum"
	done
}
`

// rowsScript runs rows with both tools and prints what was seen. Processes never outlive the one that started them:
// orphans become children of the postmaster, which takes one that was killed for a crash of its own.
const rowsScript = filesFunctions + `
set -u
export PGUSER=walfleet PGPASSFILE=/nonexistent PGHOST=/var/run/postgresql LC_ALL=C
unset PGPASSWORD PGDATABASE
work=/tmp/rows; rm -rf $work; mkdir $work; cd $work
usual=$PATH

receivewal() {
	timeout --kill-after=10 --signal=INT 40 pg_receivewal "$@" </dev/null >>$work/stdout 2>>$work/stderr
	echo $? >$work/status
}

row() { # number, tool, its directory: runs the function row_NUMBER
	rm -rf $work/*; mkdir -m 700 $work/dir; : >$work/stdout; : >$work/stderr; : >$work/status
	(
		[ -z "$3" ] || PATH=$3:$usual
		dir=$work/dir slot=row_$1_$2
		open="-n -S $slot -E $middle -D $dir"
		row_$1
	) >$work/noise 2>&1
	printf '\n@@@ %s %s status\n' $1 $2; cat $work/status
	printf '\n@@@ %s %s stdout\n' $1 $2; cat $work/stdout
	printf '\n@@@ %s %s stderr\n' $1 $2; cat $work/stderr $work/noise
	printf '\n@@@ %s %s files\n' $1 $2; (files $work/dir)
}
`

// runRows runs rows with two tools in a server's container.
func (s *server) runRows(t testing.TB, rows []row, tools [2]tool) []map[string]sighting {
	t.Helper()
	var slots, script strings.Builder
	fmt.Fprintf(&slots, "SELECT slot FROM unnest(ARRAY['']) slot")
	script.WriteString(rowsScript)
	start := s.lsn(t, "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'base'")
	second := s.size.Start(start) + wal.LSN(s.size)
	long := s.end(t)
	s.query(t, "SELECT pg_logical_emit_message(true, 'walfleet', repeat('long ', 500000))")
	after := s.end(t) + wal.LSN(s.size)
	s.write(t, 3)
	for _, v := range []struct {
		name  string
		value any
	}{
		{"start", start}, {"full", second}, {"before", second - 1}, {"middle", second + 0x34567},
		{"inside", s.size.Start(long) + wal.LSN(s.size)}, {"after", after}, {"last", after + wal.LSN(s.size)}, {"secret", password},
	} {
		fmt.Fprintf(&script, "%s='%s'\n", v.name, v.value)
	}
	for i, r := range rows {
		fmt.Fprintf(&script, "row_%d() {\n%s\n}\n", i, r.script)
	}
	for i := range rows {
		for _, tool := range tools {
			fmt.Fprintf(&slots, "; SELECT pg_copy_physical_replication_slot('base', 'row_%d_%s')", i, tool.name)
			fmt.Fprintf(&script, "row %d %s '%s'\n", i, tool.name, tool.path)
		}
	}
	s.query(t, slots.String())
	out := s.shell(t, `exec setpriv --reuid=postgres --regid=postgres --init-groups bash -c "$1"`, script.String())

	seen := make([]map[string]sighting, len(rows))
	for _, section := range strings.Split("\n"+out, "\n@@@ ")[1:] {
		header, text, _ := strings.Cut(section, "\n")
		fields := strings.Fields(header)
		if len(fields) != 3 {
			t.Fatalf("unexpected output: %s", header)
		}
		n, err := strconv.Atoi(fields[0])
		if err != nil {
			t.Fatal(err)
		}
		if seen[n] == nil {
			seen[n] = map[string]sighting{}
		}
		one, text := seen[n][fields[1]], strings.TrimRight(text, "\n")
		switch fields[2] {
		case "status":
			one.status = text
		case "stdout":
			one.stdout = comparable(text)
		case "stderr":
			one.stderr = comparable(text)
		case "files":
			one.files = text
		}
		seen[n][fields[1]] = one
	}
	return seen
}

var (
	ownSlot       = regexp.MustCompile(`row_(\d+)_(original|ours)`)
	ownProcess    = regexp.MustCompile(`active for PID \d+`)
	partialSuffix = regexp.MustCompile(`\.(gz|lz4)\.partial`)
)

// comparable takes out of a tool's output what differs from one run to the next, and the suffix of partial files
// that only the original gives them.
func comparable(text string) string {
	text = ownSlot.ReplaceAllString(text, "row_$1")
	text = ownProcess.ReplaceAllString(text, "active for PID")
	return partialSuffix.ReplaceAllString(text, ".partial")
}

// compareSightings says how two tools differ; "" when they do not.
func compareSightings(a, b sighting) string {
	var diff strings.Builder
	field := func(name, a, b string) {
		if a != b {
			fmt.Fprintf(&diff, "%s\n  of the original:\n%s\n  of ours:\n%s\n", name, indented(a), indented(b))
		}
	}
	field("exit status", a.status, b.status)
	field("stdout", a.stdout, b.stdout)
	field("stderr", a.stderr, b.stderr)
	if !sameFiles(a.files, b.files) {
		field("files", a.files, b.files)
	}
	return diff.String()
}

// sameFiles compares listings; a sum of "-" is not known, and equals every other.
func sameFiles(a, b string) bool {
	as, bs := strings.Split(a, "\n"), strings.Split(b, "\n")
	if len(as) != len(bs) {
		return false
	}
	for i := range as {
		aFile, aSum := cutLast(as[i])
		bFile, bSum := cutLast(bs[i])
		if aFile != bFile || aSum != bSum && aSum != "-" && bSum != "-" {
			return false
		}
	}
	return true
}

func cutLast(line string) (before, last string) {
	i := strings.LastIndexByte(line, ' ')
	return line[:max(i, 0)], line[i+1:]
}

func indented(text string) string {
	return "    " + strings.ReplaceAll(text, "\n", "\n    ")
}

// major is the major version of a server.
func (s *server) major(t testing.TB) int {
	t.Helper()
	n, err := strconv.Atoi(s.value(t, "SELECT current_setting('server_version_num')::int / 10000"))
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// TestReceivewalOptions calls the server's own pg_receivewal and ours in the same ways, and compares what they print,
// return and leave.
func TestReceivewalOptions(t *testing.T) {
	for _, image := range images() {
		t.Run(filepath.Base(image), func(t *testing.T) {
			t.Parallel()
			s := receivewalServer(t, serverOptions{image: image})
			s.write(t, 3)
			s.switchWAL(t)
			version := s.major(t)
			var rows []row
			for _, r := range optionRows {
				if version >= r.since {
					rows = append(rows, r)
				}
			}
			for i, seen := range s.runRows(t, rows, [2]tool{original, ours}) {
				t.Run(rows[i].name, func(t *testing.T) {
					theirs, mine := seen[original.name], seen[ours.name]
					if theirs.status == "" || theirs.status == "124" || theirs.status == "137" {
						t.Fatalf("the original did not come to an end: exit status %q, %s", theirs.status, theirs.stderr)
					}
					if endsInside[rows[i].name] {
						theirs.files = withoutCrossing(theirs.files)
					}
					if allowed, ok := differences[rows[i].name]; ok {
						allowed.mask(&theirs)
						allowed.mask(&mine)
					}
					if diff := compareSightings(theirs, mine); diff != "" {
						t.Errorf("%s\n%s", strings.TrimSpace(rows[i].script), diff)
					}
				})
			}
		})
	}
}

// TestReceivewalHelp has the options that ours must name, and which version of pg_receivewal it says that it is.
func TestReceivewalHelp(t *testing.T) {
	t.Parallel()
	s := receivewalServer(t, serverOptions{})
	options := regexp.MustCompile(`(?m)^ +(?:(-.), )?(--[a-z-]+(?:=\S+)?)`)
	help := options.FindAllString(s.shell(t, `pg_receivewal --help`), -1)
	if len(help) < 20 {
		t.Fatalf("the original's help has %d options", len(help))
	}
	for _, args := range []string{"--help", "-?", "-n --help", "-v '-?'", "--hel"} {
		text := s.shell(t, `PATH=$1:$PATH; eval "pg_receivewal $2"`, ours.path, args)
		for _, option := range help {
			if !strings.Contains("\n"+text, "\n"+option) {
				t.Errorf("%s does not name%s as the original does", args, option)
			}
		}
	}
	for _, args := range []string{"-V", "--version", "-n -V"} {
		text := s.shell(t, `PATH=$1:$PATH; eval "pg_receivewal $2"`, ours.path, args)
		if !strings.HasPrefix(text, "pg_receivewal (PostgreSQL) 17.") {
			t.Errorf("%s: %s", args, text)
		}
	}
}
