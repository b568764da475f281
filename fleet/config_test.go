package fleet

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/BurntSushi/toml"
	"pgregory.net/rapid"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/receiver"
)

const examplePath = "../config.example.toml"

// withoutLibpqEnv hides what the environment and the home directory of whoever
// runs the test would add to a conninfo.
func withoutLibpqEnv(t testing.TB) {
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); strings.HasPrefix(name, "PG") {
			t.Setenv(name, "")
		}
	}
	t.Setenv("HOME", t.TempDir())
}

func parse(t *testing.T, file string) *Config {
	t.Helper()
	cfg, err := Parse("/etc/walfleet/walfleet.toml", []byte(file))
	if err != nil {
		t.Fatalf("Parse: %v", err)
	}
	return cfg
}

func TestParseFillsInDefaults(t *testing.T) {
	withoutLibpqEnv(t)
	got := parse(t, `
archive_dir = "/archive/"
[[cluster]]
name = "a"
conninfo = "host=db1"
[[cluster]]
name = "B-2.x_"
conninfo = "postgresql://db2/"
`)
	cluster := receiver.Config{
		Slot: "walfleet", CreateSlot: true, Synchronous: true, Source: "primary", Monitor: true,
		Adjustable: receiver.Adjustable{
			OnGap: "halt", MinFree: 100 << 20,
			StatusInterval: 10 * time.Second, ReceiveTimeout: time.Minute, FlushInterval: 10 * time.Second,
			MonitorInterval: 30 * time.Second,
		},
	}
	a, b := cluster, cluster
	a.Name, a.Dir, a.Conninfo = "a", "/archive/a", "host=db1"
	b.Name, b.Dir, b.Conninfo = "B-2.x_", "/archive/B-2.x_", "postgresql://db2/"
	want := &Config{
		ArchiveDir: "/archive", RuntimeDir: "/archive", ShutdownTimeout: 30 * time.Second,
		Log:      LogConfig{Level: "info", Format: "text"},
		HTTP:     HTTPConfig{Listen: "127.0.0.1:9851"},
		Clusters: []receiver.Config{a, b},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

// A key that is given counts, also where it gives a zero value; one that is
// absent does not.
func TestParsePrecedence(t *testing.T) {
	withoutLibpqEnv(t)
	got := parse(t, `
archive_dir = "/archive"
runtime_dir = "/run/walfleet/"
shutdown_timeout = "1m"
log = { level = "debug", format = "json" }
http = { listen = "" }

[[cluster]]
name = "own"
conninfo = "host=db1"
create_slot = true
synchronous = true
status_interval = "1s"
receive_timeout = "2h"
flush_interval = "1s"
source = "primary"
on_gap = "halt"
compress = "none"
min_free = "3GB"
max_rate = "0"
monitor = true
monitor_interval = "1s"
max_slot_retained = "0"
slot = "own"
application_name = ""
password_file = ""

[[cluster]]
name = "default"
conninfo = "host=db1"

[defaults] # at the end of the file, and counts all the same
create_slot = false
synchronous = false
status_interval = "0s"
receive_timeout = "1s"
flush_interval = "10ms"
source = "any"
on_gap = "record"
compress = "gzip:9"
min_free = "0"
max_rate = "50MB"
monitor = false
monitor_interval = "24h"
max_slot_retained = "50GB"
slot = "common"
application_name = "archive of db1"
password_file = "/run/secrets/pw"
`)
	own := receiver.Config{
		Name: "own", Dir: "/archive/own", Conninfo: "host=db1",
		CreateSlot: true, Synchronous: true, Source: "primary", Slot: "own", Monitor: true,
		Adjustable: receiver.Adjustable{
			StatusInterval: time.Second, ReceiveTimeout: 2 * time.Hour,
			FlushInterval: time.Second, OnGap: "halt", MinFree: 3 << 30,
			MonitorInterval: time.Second,
		},
	}
	def := receiver.Config{
		Name: "default", Dir: "/archive/default", Conninfo: "host=db1",
		Source: "any", Slot: "common",
		Compress:        archive.Compression{Method: "gzip", Level: 9},
		ApplicationName: "archive of db1", PasswordFile: "/run/secrets/pw",
		Adjustable: receiver.Adjustable{
			ReceiveTimeout: time.Second, FlushInterval: 10 * time.Millisecond, OnGap: "record", MaxRate: 50 << 20,
			MonitorInterval: 24 * time.Hour, MaxSlotRetained: 50 << 30,
		},
	}
	want := &Config{
		ArchiveDir: "/archive", RuntimeDir: "/run/walfleet", ShutdownTimeout: time.Minute,
		Log:      LogConfig{Level: "debug", Format: "json"},
		Clusters: []receiver.Config{own, def},
	}
	if !reflect.DeepEqual(got, want) {
		t.Errorf("got  %+v\nwant %+v", got, want)
	}
}

func TestParseHTTP(t *testing.T) {
	withoutLibpqEnv(t)
	got := parse(t, fine+`
[http]
listen = ":0"
tls_certificate = "/c.pem"
tls_key = "/k.pem"
user = "prometheus"
password_hash = "`+hashOfSecret+`"
`).HTTP
	if want := (HTTPConfig{":0", "/c.pem", "/k.pem", "prometheus", hashOfSecret}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
	for _, listen := range []string{"", "localhost:80", "[::1]:9851", "[::]:65535", "console.example.com:9851"} {
		if got := parse(t, fmt.Sprintf("%s[http]\nlisten = %q\n", fine, listen)).HTTP.Listen; got != listen {
			t.Errorf("listen = %q is %q", listen, got)
		}
	}
}

func TestParseAcceptsInlineClusters(t *testing.T) {
	withoutLibpqEnv(t)
	got := parse(t, `
archive_dir = "/archive"
defaults.source = "any"
cluster = [ { name = "a", conninfo = "host=db1" }, { name = "b", conninfo = "host=db2" } ]
`)
	if len(got.Clusters) != 2 || got.Clusters[1].Name != "b" || got.Clusters[1].Source != "any" {
		t.Errorf("got %+v", got)
	}
}

// hashOfSecret is what "htpasswd -nbB -C 5 USER secret" prints after the colon.
const hashOfSecret = "$2y$05$n9aJ/lOVDNAm76Eu9EVMe.bbmvyH3aQZYRS8nvN4erzpryIfdbcqC"

// fine is a valid file. Its line 1 is free for a key at the top, and what is
// appended from line 6 on belongs to the cluster.
const fine = `
archive_dir = "/archive"
[[cluster]]
name = "a"
conninfo = "host=db1"
`

func TestParseErrors(t *testing.T) {
	withoutLibpqEnv(t)
	cluster := func(lines string) string { return fine + lines + "\n" }
	named := func(name string) string {
		return "archive_dir = \"/archive\"\n[[cluster]]\nconninfo = 'host=db1'\nname = " + name + "\n"
	}
	second := func(lines string) string { return fine + "[[cluster]]\n" + lines + "\n" }

	for _, tt := range []struct {
		name string
		file string
		want string // one line for each problem, without "w.toml"
	}{
		// The file.
		{"empty", "", `
: archive_dir is missing; name the directory below which each cluster gets its own, such as archive_dir = "/var/lib/walfleet"
: no [[cluster]] in the file; an empty fleet is taken for a mistake, to stop archiving stop walfleet`},
		{"syntax", fine + "slot = \n", `
:6:8: expected value but found '\n' instead`},
		{"syntax, duplicate key", cluster("slot = 'a'\nslot = 'b'"), `
:7:1: Key 'cluster.slot' has already been defined.`},
		{"not UTF-8", cluster("slot = '\xff'"), `
:6:8: invalid UTF-8 byte: 0xff`},

		// Keys.
		{"typing mistake", cluster(`status_intervall = "1s"`), `
:6: cluster "a": unknown key status_intervall; did you mean status_interval?`},
		{"dash for underscore", cluster(`create-slot = true`), `
:6: cluster "a": unknown key create-slot; did you mean create_slot?`},
		{"other case", cluster(`Slot = "x"`), `
:6: cluster "a": unknown key Slot; did you mean slot?`},
		{"password", cluster(`password = "x"`), `
:6: cluster "a": unknown key password; did you mean password_file?`},
		{"nothing like it", cluster(`"k\u0000 k" = 1`), `
:6: cluster "a": unknown key "k\x00 k"; known in [[cluster]]: name, conninfo, slot, create_slot, synchronous, status_interval, receive_timeout, flush_interval, source, on_gap, compress, min_free, max_rate, monitor, monitor_interval, max_slot_retained, application_name, password_file, retention`},
		{"cluster key at the top", `slot = "x"` + fine, `
:1: slot belongs to [defaults] or [[cluster]], not to the top of the file`},
		{"top key below a header", cluster(`shutdown_timeout = "1s"`), `
:6: cluster "a": shutdown_timeout belongs to the top of the file, not to [[cluster]]`},
		{"name for all", cluster("[defaults]\nname = 'x'"), `
:7: [defaults]: name belongs to [[cluster]], not to [defaults]`},
		{"unknown section", cluster("[Defaults]\n"), `
:6: unknown key Defaults; did you mean defaults?`},
		{"unknown section array", cluster("[[clusters]]\n"), `
:6: unknown key clusters; did you mean cluster?`},
		{"unknown table in a cluster", cluster("[cluster.tls]\nverify = true"), `
:6: cluster "a": unknown key tls; known in [[cluster]]: name, conninfo, slot, create_slot, synchronous, status_interval, receive_timeout, flush_interval, source, on_gap, compress, min_free, max_rate, monitor, monitor_interval, max_slot_retained, application_name, password_file, retention`},
		{"unknown key in log", cluster("[log]\nfile = 'x'"), `
:7: [log]: unknown key file; known in [log]: level, format`},

		// [http].
		{"listen", cluster("[http]\nlisten = '9851'"), `
:7: [http]: listen: "9851" is not HOST:PORT; write it as "127.0.0.1:9851", "[::1]:9851", ":9851" for all addresses, or "" to listen nowhere`},
		{"port too high", cluster("[http]\nlisten = ':65536'"), `
:7: [http]: listen: ":65536" is not HOST:PORT; write it as "127.0.0.1:9851", "[::1]:9851", ":9851" for all addresses, or "" to listen nowhere`},
		{"certificate without a key", cluster("[http]\ntls_certificate = '/c'"), `
:7: [http]: tls_certificate needs tls_key with it`},
		{"key without a certificate", cluster("[http]\ntls_certificate = ''\ntls_key = '/k'"), `
:8: [http]: tls_key needs tls_certificate with it`},
		{"certificate relative", cluster("[http]\ntls_certificate = 'c'\ntls_key = '/k'"), `
:7: [http]: tls_certificate: "c" is not an absolute path`},
		{"user without a hash", cluster("[http]\nuser = 'u'"), `
:7: [http]: user needs password_hash with it`},
		{"hash without a user", cluster("[http]\npassword_hash = '" + hashOfSecret + "'"), `
:7: [http]: password_hash needs user with it`},
		{"user is a line of htpasswd", cluster("[http]\nuser = 'u:" + hashOfSecret + "'\npassword_hash = '" + hashOfSecret + "'"), `
:7: [http]: user: must be a name alone, of at most 63 bytes and without colons and control characters`},
		{"hash is a password", cluster("[http]\nuser = 'u'\npassword_hash = 'hunter2'"), `
:8: [http]: password_hash: is not a bcrypt hash (not shown here); take what "htpasswd -nB USER" prints after the colon`},
		{"hash of an unknown kind", cluster("[http]\nuser = 'u'\npassword_hash = '" + strings.Replace(hashOfSecret, "y", "x", 1) + "'"), `
:8: [http]: password_hash: is not a bcrypt hash (not shown here); take what "htpasswd -nB USER" prints after the colon`},
		{"hash cut", cluster("[http]\nuser = 'u'\npassword_hash = '" + hashOfSecret[:59] + "'"), `
:8: [http]: password_hash: is not a bcrypt hash (not shown here); take what "htpasswd -nB USER" prints after the colon`},
		{"hash too expensive", cluster("[http]\nuser = 'u'\npassword_hash = '" + strings.Replace(hashOfSecret, "05", "15", 1) + "'"), `
:8: [http]: password_hash: each password would take too long to compare with a hash of cost 15; at most 14 is allowed`},
		{"hash for a cluster", cluster("password_hash = '" + hashOfSecret + "'"), `
:6: cluster "a": password_hash belongs to [http], not to [[cluster]]`},

		// Types.
		{"cluster with single brackets", strings.Replace(fine, "[[cluster]]", "[cluster]", 1), `
:3: [cluster] must be written with double brackets, [[cluster]]`},
		{"cluster is a string", "cluster = 'x'\narchive_dir = '/archive'", `
:1: cluster must be written as [[cluster]] sections, not as a string`},
		{"cluster is a list of names", "archive_dir = '/archive'\ncluster = ['x']", `
:2: [[cluster]] number 1: must be a table, not a string`},
		{"empty list of clusters", "archive_dir = '/archive'\ncluster = []", `
: no [[cluster]] in the file; an empty fleet is taken for a mistake, to stop archiving stop walfleet`},
		{"two defaults", cluster("[[defaults]]\n[[defaults]]"), `
:6: defaults must be a section [defaults] that stands once, not an array of tables`},
		{"log is a string", `log = "debug"` + fine, `
:1: log must be a section [log] that stands once, not a string`},
		{"wrong types", cluster("slot = 1\ncreate_slot = 'yes'\nsynchronous = 1\nsource = ['any']\nstatus_interval = 10\nreceive_timeout = 1979-05-27\nflush_interval = 1.5\napplication_name = {}"), `
:6: cluster "a": slot: must be a string in quotes, not an integer
:7: cluster "a": create_slot: must be true or false, without quotes, not a string
:8: cluster "a": synchronous: must be true or false, without quotes, not an integer
:9: cluster "a": source: must be a string in quotes, not an array
:10: cluster "a": status_interval: must be a number and a unit in quotes, such as "10s", not an integer
:11: cluster "a": receive_timeout: must be a number and a unit in quotes, such as "10s", not a date or time
:12: cluster "a": flush_interval: must be a number and a unit in quotes, such as "10s", not a float
:13: cluster "a": application_name: must be a string in quotes, not a table`},

		// Values.
		{"archive_dir relative", strings.Replace(fine, "/archive", "archive", 1), `
:2: archive_dir: "archive" is not an absolute path; did you mean "WORKDIR/archive"?`},
		{"archive_dir with a tilde", strings.Replace(fine, "/archive", "~/archive", 1), `
:2: archive_dir: "~/archive" is not an absolute path; ~ and variables are not expanded`},
		{"archive_dir empty", strings.Replace(fine, "/archive", "", 1), `
:2: archive_dir: is empty`},
		{"archive_dir with NUL", strings.Replace(fine, "/archive", `/a\u0000`, 1), `
:2: archive_dir: must not contain a NUL character`},
		{"durations", `shutdown_timeout = "0s"` + cluster("status_interval = '1ns'\nreceive_timeout = '0s'\nflush_interval = '-1s'"), `
:1: shutdown_timeout: "0s" is out of range; allowed is "1s" to "1h"
:6: cluster "a": status_interval: "1ns" is out of range; allowed is "100ms" to "24h", or "0s" for none
:7: cluster "a": receive_timeout: "0s" is out of range; allowed is "1s" to "24h"
:8: cluster "a": flush_interval: "-1s" is out of range; allowed is "10ms" to "24h"`},
		{"no such method", cluster("compress = 'bzip2'"), `
:6: cluster "a": compress: unknown method "bzip2": none, gzip[:1-9], lz4[:1-12] or zstd[:1-22]`},
		{"no such level", cluster("compress = 'gzip:10'"), `
:6: cluster "a": compress: gzip has levels from 1 to 9, "10" is none of them`},
		{"compression as a number", cluster("compress = 9"), `
:6: cluster "a": compress: must be "none", or a method in quotes, such as "zstd" or "gzip:6", not an integer`},
		{"no unit", `runtime_dir = "run"` + cluster("min_free = '10'"), `
:1: runtime_dir: "run" is not an absolute path
:6: cluster "a": min_free: "10" is not a size; write a number and a unit (kB, MB, GB, TB), such as "100MB"`},
		{"no size", cluster("min_free = '1.5GB'"), `
:6: cluster "a": min_free: "1.5GB" is not a size; write a number and a unit (kB, MB, GB, TB), such as "100MB"`},
		{"negative size", cluster("min_free = '-1MB'"), `
:6: cluster "a": min_free: "-1MB" is not a size; write a number and a unit (kB, MB, GB, TB), such as "100MB"`},
		{"absurd size", cluster("min_free = '9999999999TB'"), `
:6: cluster "a": min_free: "9999999999TB" is out of range`},
		{"size as a number", cluster("min_free = 5"), `
:6: cluster "a": min_free: must be a number and a unit in quotes, such as "100MB", not an integer`},
		{"absurd durations", `shutdown_timeout = "2h"` + cluster("status_interval = '1000h'\nreceive_timeout = '99999999999h'\nflush_interval = '10'"), `
:1: shutdown_timeout: "2h" is out of range; allowed is "1s" to "1h"
:6: cluster "a": status_interval: "1000h" is out of range; allowed is "100ms" to "24h", or "0s" for none
:7: cluster "a": receive_timeout: "99999999999h" is not a duration; write a number and a unit (ms, s, m, h), such as "10s"
:8: cluster "a": flush_interval: "10" is not a duration; write a number and a unit (ms, s, m, h), such as "10s"`},
		{"source", cluster(`source = "standby"`), `
:6: cluster "a": source: "standby" is not one of primary, any`},
		{"log", cluster("[log]\nlevel = 'INFO'\nformat = ''"), `
:7: [log]: level: "INFO" is not one of debug, info, warn, error
:8: [log]: format: "" is not one of text, json`},
		{"application_name", cluster(`application_name = "wal\tfleet"`), `
:6: cluster "a": application_name: "wal\tfleet" is not kept by PostgreSQL as it is; use at most 63 printable ASCII characters`},
		{"password_file relative, or the password", cluster(`password_file = "hunter2"`), `
:6: cluster "a": password_file: must be the absolute path of a file that holds the password`},
		{"slot", cluster(`slot = "Wal-Fleet"`), `
:6: cluster "a": slot: "Wal-Fleet" is not a slot name; PostgreSQL allows 1 to 63 lower-case letters, digits and '_'`},
		{"slot empty", cluster(`slot = ""`), `
:6: cluster "a": slot: "" is not a slot name; PostgreSQL allows 1 to 63 lower-case letters, digits and '_'`},
		{"slot too long, in defaults", cluster("[defaults]\nslot = '" + strings.Repeat("x", 64) + "'"), `
:7: [defaults]: slot: "` + strings.Repeat("x", 64) + `" is not a slot name; PostgreSQL allows 1 to 63 lower-case letters, digits and '_'`},

		// Names.
		{"name and conninfo missing", second("slot = 'x'"), `
:6: [[cluster]] number 2: name is missing
:6: [[cluster]] number 2: conninfo is missing`},
		{"name empty", named("''"), `
:4: [[cluster]] number 1: name: is empty; each cluster needs a name of its own, which names its directory`},
		{"conninfo blank", second("name = 'b'\nconninfo = ' '"), `
:8: cluster "b": conninfo: is empty`},
		{"name is a number", named("7"), `
:4: [[cluster]] number 1: name: must be a string in quotes, not an integer`},
		{"name climbs", named(`"../x"`), badName(`"../x"`)},
		{"name is /", named(`"/"`), badName(`"/"`)},
		{"name is a path", named(`"a/b"`), badName(`"a/b"`)},
		{"name is .", named(`"."`), badName(`"."`)},
		{"name is ..", named(`".."`), badName(`".."`)},
		{"name is an option", named(`"-rf"`), badName(`"-rf"`)},
		{"name with NUL", named(`"a\u0000b"`), badName(`"a\x00b"`)},
		{"name with newline", named(`"a\nb"`), badName(`"a\nb"`)},
		{"name with space", named(`" a"`), badName(`" a"`)},
		{"name not ASCII", named(`"bücher"`), badName(`"bücher"`)},
		{"name of 300 bytes", named("'" + strings.Repeat("n", 300) + "'"), `
:4: [[cluster]] number 1: name: "` + strings.Repeat("n", 80) + `"… has 300 bytes; at most 63 are allowed, it names the cluster's directory`},
		{"name of 64 bytes", named("'" + strings.Repeat("n", 64) + "'"), `
:4: [[cluster]] number 1: name: "` + strings.Repeat("n", 64) + `" has 64 bytes; at most 63 are allowed, it names the cluster's directory`},
		{"same name", second("conninfo = 'host=db2'\nname = 'a'"), `
:8: cluster "a": the name is taken by cluster "a" (line 4); names must differ in more than upper and lower case`},
		{"same name in other case", second("conninfo = 'host=db2'\nname = 'A'"), `
:8: cluster "A": the name is taken by cluster "a" (line 4); names must differ in more than upper and lower case`},

		// One slot, one archive.
		{"same slot on the same host", second("name = 'b'\nconninfo = 'postgresql://DB1:5432/'"), `
:8: cluster "b": slot "walfleet" on "db1:5432" is already used by cluster "a" (line 5); a slot serves one archive, give one of them another slot`},
		{"same slot on one common host of several", second("name = 'b'\nconninfo = 'host=db0,db1 port=1,5432'"), `
:8: cluster "b": slot "walfleet" on "db1:5432" is already used by cluster "a" (line 5); a slot serves one archive, give one of them another slot`},
		{"same slot on two common hosts, told once", `
archive_dir = "/archive"
cluster = [{name = "a", conninfo = "host=x,y"}, {name = "b", conninfo = "host=y,x", slot = "walfleet"}]
`, `
:3: cluster "b": slot "walfleet" on "y:5432" is already used by cluster "a" (line 3); a slot serves one archive, give one of them another slot`},
		{"a bad slot is not another's", second("name = 'b'\nconninfo = 'host=db1'\nslot = 'B'"), `
:9: cluster "b": slot: "B" is not a slot name; PostgreSQL allows 1 to 63 lower-case letters, digits and '_'`},

		{"everything at once, in the file's order", `archive = "x"
[defaults]
slot = "S"
[[cluster]]
name = "."
[[cluster]]
name = "b"
conninfo = "host="
source = "none"
[log]
level = 1
`, `
: archive_dir is missing; name the directory below which each cluster gets its own, such as archive_dir = "/var/lib/walfleet"
:1: unknown key archive; did you mean archive_dir?
:3: [defaults]: slot: "S" is not a slot name; PostgreSQL allows 1 to 63 lower-case letters, digits and '_'
:4: [[cluster]] number 1: conninfo is missing
:5: [[cluster]] number 1: name: "." cannot name the cluster's directory; use letters, digits, '_', '-' and '.', beginning with a letter, a digit or '_'
:9: cluster "b": source: "none" is not one of primary, any
:11: [log]: level: must be a string in quotes, not an integer`},
	} {
		t.Run(tt.name, func(t *testing.T) {
			cfg, err := Parse("w.toml", []byte(tt.file))
			if err == nil || cfg != nil {
				t.Fatalf("no error, but %+v", cfg)
			}
			workdir, _ := os.Getwd()
			want := strings.ReplaceAll(strings.ReplaceAll(tt.want, "\n", "\nw.toml"), "WORKDIR", workdir)
			if want = strings.TrimPrefix(want, "\n"); err.Error() != want {
				t.Errorf("got:\n%v\nwant:\n%s", err, want)
			}
		})
	}
}

func badName(quoted string) string {
	return "\n:4: [[cluster]] number 1: name: " + quoted +
		" cannot name the cluster's directory; use letters, digits, '_', '-' and '.', beginning with a letter, a digit or '_'"
}

func TestParseAcceptsOneSlotNameOnManyHosts(t *testing.T) {
	withoutLibpqEnv(t)
	parse(t, fine+`
[[cluster]] # another host
name = "b"
conninfo = "host=db2"
[[cluster]] # another port
name = "c"
conninfo = "host=db1 port=5433"
[[cluster]] # another slot
name = "d"
conninfo = "host=db1,db2"
slot = "d"
[[cluster]] # names the same host twice
name = "e"
conninfo = "host=db1,db1"
slot = "e"
[[cluster]] # socket directories do differ by case
name = "f"
conninfo = "host=/run/pg"
[[cluster]]
name = "g"
conninfo = "host=/run/PG"
`)
}

// DESIGN section 7: passwords never get into an error, however the conninfo is
// broken, and wherever it was put by mistake.
func TestErrorsHoldNoPassword(t *testing.T) {
	withoutLibpqEnv(t)
	const password = "hunter2"
	var files []string
	for _, value := range []string{
		`'host=db1 password=hunter2 port=x'`,
		`'host=db1 password=hunter2 sslmode=wrong'`,
		`'host=db1 password=hunter2 bogus=1'`,
		`'host=db1 password=hunter2 ='`,
		`'host=db1 password hunter2'`,
		`"host=db1 password='hunter2"`,
		`"host=db1 password = 'hunter2' '"`,
		`'host=db1 passfile=/nowhere password=hunter2 sslrootcert=/nowhere sslmode=verify-full'`,
		`'postgresql://u:hunter2@db1:x/'`,
		`'postgresql://u:hunter2@db1:99999999/'`,
		`'postgres://u:%zzhunter2@db1/'`,
		`'postgres://u:a/hunter2@db1/'`,
		`'postgres://u:a@hunter2@db1:y/'`,
		`'postgres://u:hunter2@[::1/'`,
		`'postgres://u@db1/?password=hunter2&sslmode=wrong'`,
		`'postgres://u@db1/?password=hunter2&bogus=%zz'`,
		`'postgre://u:hunter2@db1/'`,
		`'postgre://u:hunter2@db1/?sslmode=wrong'`,
		`' postgres://u:hunter2@db1/'`,
		`'u:hunter2@db1'`,
	} {
		files = append(files,
			"archive_dir = '/a'\n[[cluster]]\nname = 'a'\nconninfo = "+value,
			"archive_dir = '/a'\n[[cluster]]\nname = "+value+"\nconninfo = 'host=db1'\nslot = "+value+
				"\napplication_name = \"\\t\"\nsource = "+value+"\npassword_file = "+value+"\nstatus_interval = "+value,
			"archive_dir = "+value,
			"[http]\nlisten = "+value+"\nuser = "+value+"\npassword_hash = "+value+"\ntls_certificate = "+value,
			value+" = 1")
	}
	files = append(files, // not TOML
		`conninfo = "host=db1 password=hunter2`,
		`conninfo = "host=db1 password='hunter2"'`,
		`conninfo = 'host=db1 password='hunter2''`,
		`conninfo = host=db1 password=hunter2`,
		`conninfo = "host=db1 password=\hunter2"`,
		"conninfo = \"\"\"\nhost=db1\npassword=\\hunter2\n\"\"\"",
		`password = hunter2`,
		`postgres://u:hunter2@db1/`,
		`"postgres://u:hunter2@db1/" = 1`+"\n"+`"postgres://u:hunter2@db1/" = 1`,
		`password_file = 'hunter2'x`,
		"[http]\npassword_hash = hunter2",
		"[http]\npassword_hash = 'hunter2",
	)
	for _, file := range files {
		_, err := Parse("w.toml", []byte(file))
		switch {
		case err == nil:
			t.Errorf("no error for\n%s", file)
		case strings.Contains(err.Error(), password):
			t.Errorf("the error shows the password: %v\nfor\n%s", err, file)
		}
	}
	// Digits that are no number are quoted by TOML's parser.
	_, err := Parse("w.toml", []byte("passwd = 0123456"))
	if err == nil || strings.Contains(err.Error(), "0123456") {
		t.Errorf("the error shows the password: %v", err)
	}
}

func TestParseAsksNoNetwork(t *testing.T) {
	withoutLibpqEnv(t)
	saved := net.DefaultResolver
	t.Cleanup(func() { net.DefaultResolver = saved })
	net.DefaultResolver = &net.Resolver{PreferGo: true, Dial: func(context.Context, string, string) (net.Conn, error) {
		t.Error("a name was looked up")
		return nil, errors.New("no network in this test")
	}}
	parse(t, "archive_dir = '/a'\n[[cluster]]\nname = 'a'\nconninfo = 'host=db1.example.com,192.0.2.1 sslmode=require'")
}

func TestLoad(t *testing.T) {
	withoutLibpqEnv(t)
	dir := t.TempDir()

	path := filepath.Join(dir, "missing.toml")
	_, err := Load(path)
	if !errors.Is(err, fs.ErrNotExist) || !strings.Contains(err.Error(), path) || !strings.Contains(err.Error(), "-c FILE") {
		t.Errorf("missing file: %v", err)
	}
	if _, err = Load(dir); err == nil || !strings.Contains(err.Error(), dir) {
		t.Errorf("a directory: %v", err)
	}

	path = filepath.Join(dir, "walfleet.toml")
	for file, want := range map[string]string{
		fine: "",
		strings.Replace(fine, "/archive", "wal", 1): path + `:2: archive_dir: "wal" is not an absolute path; did you mean "` + dir + `/wal"?`,
	} {
		if err := os.WriteFile(path, []byte(file), 0o600); err != nil {
			t.Fatal(err)
		}
		_, err := Load(path)
		if got := fmt.Sprint(err); want == "" && err != nil || want != "" && got != want {
			t.Errorf("got %v, want %s", err, want)
		}
	}
}

func TestExampleLoads(t *testing.T) {
	withoutLibpqEnv(t)
	cfg, err := Load(examplePath)
	if err != nil {
		t.Fatal(err)
	}
	if len(cfg.Clusters) != 2 {
		t.Errorf("%d clusters, want 2", len(cfg.Clusters))
	}
}

// commentedOut is a setting of the example that is commented out; explanations
// have a space after the '#'.
var commentedOut = regexp.MustCompile(`(?m)^#([a-z])`)

// config.example.toml shows every key, in the section where it belongs, and
// the defaults that it tells are the real ones.
func TestExampleIsComplete(t *testing.T) {
	withoutLibpqEnv(t)
	data, err := os.ReadFile(examplePath)
	if err != nil {
		t.Fatal(err)
	}
	uncommented := commentedOut.ReplaceAllString(string(data), "$1")
	if uncommented == string(data) {
		t.Fatal("no setting is commented out")
	}

	var tree map[string]any
	if _, err := toml.Decode(uncommented, &tree); err != nil {
		t.Fatal(err)
	}
	has := func(table any, s section) {
		for _, key := range s.keys {
			if _, ok := table.(map[string]any)[key]; !ok {
				t.Errorf("%s is not in %s", key, s.title)
			}
		}
	}
	has(tree, topSection)
	has(tree["log"], logSection)
	has(tree["http"], httpSection)
	has(tree["defaults"], defaultsSection)
	has(tree["retention"], retentionSection)
	first := tree["cluster"].([]map[string]any)[0]
	for _, s := range clusterSettings {
		_, own := first[s.key]
		_, common := tree["defaults"].(map[string]any)[s.key]
		if !own && !common {
			t.Errorf("%s is not in [[cluster]]", s.key)
		}
	}

	// Without its values for archive_dir and the clusters, the file gives the
	// defaults; so does it with everything uncommented.
	want := defaultConfig()
	want.ArchiveDir, want.RuntimeDir = "/var/lib/walfleet", "/var/lib/walfleet"
	for _, file := range []string{string(data), uncommented} {
		settings, _, ok := strings.Cut(file, "\n[[cluster]]\n")
		if !ok || !strings.Contains(settings, "[defaults]") {
			t.Fatal("[defaults] does not stand before the clusters")
		}
		got := *parse(t, settings+"\n[[cluster]]\nname = 'a'\nconninfo = 'host=db1'\n")
		cluster := defaultCluster()
		cluster.Name, cluster.Dir, cluster.Conninfo = "a", "/var/lib/walfleet/a", "host=db1"
		if !slices.Equal(got.Clusters, []receiver.Config{cluster}) {
			t.Errorf("the example's defaults are %+v, want %+v", got.Clusters, cluster)
		}
		if got.Clusters = nil; !reflect.DeepEqual(got, want) {
			t.Errorf("the example's settings are %+v, want %+v", got, want)
		}
	}
}

// A cluster's retention counts more than [retention], key by key, and a change of it needs no restart.
func TestRetention(t *testing.T) {
	withoutLibpqEnv(t)
	file := func(common, own string) string {
		return "archive_dir = '/a'\n[retention]\n" + common + "\n[[cluster]]\nname = 'a'\nconninfo = 'host=a'\n" + own + "\n[[cluster]]\nname = 'b'\nconninfo = 'host=b'\n"
	}
	common := "keep_age = '14d'\nbackups = '/b/{cluster}'"
	plain := parse(t, file(common, ""))
	cfg := parse(t, file(common, "retention = { keep_age = '36h', keep_size = '2TB' }"))
	sub := parse(t, file(common, "[cluster.retention]\nkeep_age = '36h'\nkeep_size = '2TB'"))
	if !reflect.DeepEqual(cfg, sub) {
		t.Errorf("as a table of its own it is %+v, not %+v", sub, cfg)
	}
	for i, want := range []receiver.Retention{{KeepAge: 36 * time.Hour, KeepSize: 2 << 40, Backups: "/b/{cluster}"}, {KeepAge: 14 * 24 * time.Hour, Backups: "/b/{cluster}"}} {
		if got := cfg.Clusters[i].Retention; got != want {
			t.Errorf("%s: %+v, want %+v", cfg.Clusters[i].Name, got, want)
		}
	}
	plan := Diff(plain.Clusters, cfg.Clusters)
	if got := fmt.Sprint(plan.Adjust, plan.Keep, plan.Changed); got != "[a] [b] map[a:[keep_age keep_size]]" {
		t.Errorf("the difference is %s", got)
	}
	for _, c := range []struct{ common, own, says string }{
		{"keep_age = '14 days'", "", `:3: [retention]: keep_age: "14 days" is not an age; write a number and a unit (d, h, m), such as "14d"`},
		{"keep_age = '0d'", "", "out of range"},
		{"keep_age = '36526d'", "", "out of range"},
		{"keep_age = '1s'", "", "out of range"},
		{"keep_age = 14", "", `must be a number and a unit in quotes, such as "14d", not an integer`},
		{"backups = 'b'", "", "is not an absolute path"},
		{"keepage = '1d'", "", ":3: [retention]: unknown key keepage; did you mean keep_age?"},
		{"", "retention = '14d'", `:7: cluster "a": retention must be a table, such as { keep_age = "30d" }, not a string`},
		{"", "slot = 'x'\n[cluster.retention]\n\nkeep_age = 'x'", `:10: cluster "a", retention: keep_age: "x" is not an age`},
		{"", "keep_age = '1d'", "keep_age belongs to [retention], not to [[cluster]]"},
		{"slot = 'x'", "", "slot belongs to [defaults] or [[cluster]], not to [retention]"},
	} {
		if _, err := Parse("f", []byte(file(c.common, c.own))); err == nil || !strings.Contains(err.Error(), c.says) {
			t.Errorf("%q, %q: %v, want %q", c.common, c.own, err, c.says)
		}
	}
	for _, s := range []string{"0", "1d", "14d", "36h", "1h30m", "36525d"} {
		if d, err := ParseAge(s); err != nil || showAge(d) != s {
			t.Errorf("%s is %s, %v", s, showAge(d), err)
		}
	}
}

// Every field of the configuration is set by exactly one key, and each key sets
// exactly one field: there are no dead options and no forgotten ones.
func TestEveryFieldHasItsKey(t *testing.T) {
	checkFields(t, topSettings, "Log", "HTTP", "Clusters")
	checkFields(t, logSettings)
	checkFields(t, httpSettings)
	checkFields(t, slices.Concat(clusterSettings, retentionSettings), "Dir", "SlotAsIs", "NoSync", "EndPos") // those of receivewal have none
}

// visibleFields are a struct's fields, with those of an embedded one and not itself.
func visibleFields[T any]() []reflect.StructField {
	return slices.DeleteFunc(reflect.VisibleFields(reflect.TypeFor[T]()), func(f reflect.StructField) bool { return f.Anonymous })
}

func checkFields[T any](t *testing.T, settings []setting[T], others ...string) {
	values := []any{true, "any", "record", "json", "debug", "lz4", "/x", "30m", "1MB", ":1", hashOfSecret}
	set := make(map[string]string) // field to key
	for _, s := range settings {
		var dst T
		for _, v := range values {
			if s.set(&dst, v) == nil {
				break
			}
		}
		fields := 0
		for _, field := range visibleFields[T]() {
			if !reflect.ValueOf(dst).FieldByIndex(field.Index).IsZero() {
				fields++
				name := field.Name
				if set[name] != "" {
					t.Errorf("%s is set by %s and %s", name, set[name], s.key)
				}
				set[name] = s.key
			}
		}
		if fields != 1 {
			t.Errorf("%s sets %d fields of %T, want 1", s.key, fields, dst)
		}
	}
	for _, field := range visibleFields[T]() {
		name := field.Name
		if (set[name] == "") != slices.Contains(others, name) {
			t.Errorf("%v.%s is set by %q", reflect.TypeFor[T](), name, set[name])
		}
	}
}

func TestFindLines(t *testing.T) {
	const file = "\ufeff# archive_dir = 1\r\n" + `
archive_dir = '/a' # line 3, cluster = 1
"log" . 'level' = "x" # line 4
x = [ # line 5
  "]", ']', # ]
  { y = "}" }, [ 1 ],
]
a = """
name = "no" \"""
[[cluster]]"""""
b = '''
\'''
[ "cluster".'sub' ] # line 14, before any [[cluster]]
k = 1
[[ cluster ]] # line 16
"na\u006de" = 1 # line 17
conninfo = """""" # line 18
[[cluster]] # line 19
name = "[[cluster]]\"" # line 20
[cluster.tls] # line 21
name = 2 # not the cluster's
[defaults] # line 23
slot = ""`
	got := findLines(file)
	for at, want := range map[place]int{
		{table: "archive_dir"}:                       3,
		{table: "log", key: "level"}:                 4,
		{table: "log"}:                               4,
		{table: "x"}:                                 5,
		{table: "a"}:                                 9,
		{table: "b"}:                                 12,
		{table: "cluster", key: "sub"}:               14,
		{table: "cluster", nth: 0, key: "name"}:      17,
		{table: "cluster", nth: 0, key: "conninfo"}:  18,
		{table: "cluster", nth: 1}:                   19,
		{table: "cluster", nth: 1, key: "name"}:      20,
		{table: "cluster", nth: 1, key: "tls"}:       21,
		{table: "defaults"}:                          23,
		{table: "defaults", key: "slot"}:             24,
		{table: "cluster", nth: 2, key: "name"}:      0,
		{table: "defaults", key: "application_name"}: 0,
	} {
		if got[at] != want {
			t.Errorf("%+v is in line %d, want %d", at, got[at], want)
		}
	}
}

// A file is built from pieces whose lines are counted while it is built.
func TestFindLinesProperty(t *testing.T) {
	values := []string{
		`1`, `true`, `""`, `"a # b"`, `'\'`, `"\""`, `"[[cluster]]"`, `[1, 2]`, `[]`, `{a = 1, b = "}"}`,
		"[ # ]\n 1,\n\n ']',\n]", `""""""`, "\"\"\"\na = 1\n\\\"\"\"\n[[cluster]]\n\"\"\"", "'''\n\\'''", `"""x"""""`,
		"\"\"\"a \\\n   b\"\"\"", `1979-05-27 07:32:00`, "[{x = 1},\n{x = '#'}]",
	}
	blanks := []string{"", "", "\n", "\n\n", "# name = 1\n", "  # '''\n", "\t\r\n"}
	rapid.Check(t, func(t *rapid.T) {
		var file strings.Builder
		line := func() int { return 1 + strings.Count(file.String(), "\n") }
		pick := func(label string, from ...string) string { return rapid.SampledFrom(from).Draw(t, label) }
		want := make(map[place]int)
		body := func(at place) {
			for _, key := range rapid.SliceOfDistinct(rapid.SampledFrom([]string{"a", "b-c", "d_e", "name", "slot"}), rapid.ID[string]).Draw(t, "keys") {
				file.WriteString(pick("blank", blanks...) + pick("indent", "", " ", "\t"))
				at.key = key
				if at.table == "" {
					want[place{table: key}] = line()
				} else {
					want[at] = line()
				}
				quote := pick("quote", "", `"`, "'")
				file.WriteString(quote + key + quote + pick("equals", "=", " = ", "\t= "))
				file.WriteString(pick("value", values...) + pick("end", "\n", " # x = 1 \"\n", "\r\n"))
			}
		}
		body(place{})
		for i := range rapid.IntRange(0, 4).Draw(t, "clusters") {
			file.WriteString(pick("blank", blanks...))
			want[place{table: "cluster", nth: i}] = line()
			file.WriteString(pick("header", "[[cluster]]\n", "[[ 'cluster' ]] # [log]\n", " [[\"cluster\"]]\r\n"))
			body(place{table: "cluster", nth: i})
			if i == 0 {
				file.WriteString("[log]\n")
				want[place{table: "log"}] = line() - 1
				body(place{table: "log"})
			}
		}
		var tree map[string]any
		if _, err := toml.Decode(file.String(), &tree); err != nil {
			t.Fatalf("the test's file is no TOML: %v\n%s", err, file.String())
		}
		got := findLines(file.String())
		for at, line := range want {
			if got[at] != line {
				t.Fatalf("%+v is in line %d, want %d of\n%s", at, got[at], line, file.String())
			}
		}
	})
}

// Whatever the file is, there is a configuration or an error, never both or a
// panic; each line of the error names the file and a line that exists, and
// shows no password.
func FuzzParse(f *testing.F) {
	withoutLibpqEnv(f)
	const password = "s3cr3t!pw"
	example, err := os.ReadFile(examplePath)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(example)
	f.Add([]byte(fine))
	for _, conninfo := range []string{
		"'host=db1 password=" + password + " port=x'",
		"'postgres://u:" + password + "@db1:x/?sslmode=wrong'",
		"\"\"\"\nhost=db1 password='" + password + "\n\"\"\"",
		"host=db1 password=" + password,
	} {
		f.Add([]byte("archive_dir = '/a'\n[[cluster]]\nname = 'a'\nconninfo = " + conninfo + "\n"))
	}
	where := regexp.MustCompile(`^w\.toml(?::(\d+))?(?::\d+)?: .`)
	f.Fuzz(func(t *testing.T, data []byte) {
		cfg, err := Parse("w.toml", data)
		if (cfg == nil) == (err == nil) {
			t.Fatalf("configuration %v, error %v", cfg, err)
		}
		if err == nil {
			if len(cfg.Clusters) == 0 || !filepath.IsAbs(cfg.ArchiveDir) {
				t.Fatalf("accepted %+v", cfg)
			}
			for _, c := range cfg.Clusters {
				if filepath.Dir(c.Dir) != cfg.ArchiveDir || filepath.Base(c.Dir) != c.Name {
					t.Fatalf("directory %q of cluster %q is not one below %q", c.Dir, c.Name, cfg.ArchiveDir)
				}
			}
			return
		}
		for problem := range strings.Lines(err.Error()) {
			m := where.FindStringSubmatch(problem)
			var line int
			if m == nil {
				t.Fatalf("no place in %q", problem)
			} else if fmt.Sscan(m[1], &line); line > 1+strings.Count(string(data), "\n") {
				t.Fatalf("no line %d in the file: %q", line, problem)
			}
		}
		if strings.Contains(err.Error(), password) && inConninfoOnly(data, password) {
			t.Fatalf("the error shows the password: %v", err)
		}
	})
}

// inConninfoOnly reports whether the file holds the password as a password in
// conninfos and nowhere else: a mutated file may have it as a name.
func inConninfoOnly(data []byte, password string) bool {
	text := string(data)
	for _, form := range []string{"password=" + password, "password='" + password, "://u:" + password + "@"} {
		text = strings.ReplaceAll(text, form, "")
	}
	return !strings.Contains(text, password)
}
