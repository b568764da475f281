package receivewal

import (
	"bytes"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
)

// options are those of a command line; everything that is not said is its default.
func options(set func(*Options)) Options {
	o := Options{StatusInterval: 10 * time.Second, compress: "none"}
	set(&o)
	return o
}

// Every spelling that getopt_long takes.
func TestSpellings(t *testing.T) {
	dir := func(path string) Options {
		return options(func(o *Options) { o.Directory, o.hasDirectory = path, true })
	}
	with := func(o Options, set func(*Options)) Options {
		set(&o)
		return o
	}
	d := dir("/d")
	for _, c := range []struct {
		line string // with spaces between arguments; '' is an empty one
		want Options
	}{
		{"-D/d", d},
		{"-D /d", d},
		{"--directory=/d", d},
		{"--directory /d", d},
		{"--dir=/d", d},
		{"--dir /d", d},
		{"--di=/d", d},
		{"-D/other -D/d", d},
		{"-D/d --", d},
		{"-D=/d", dir("=/d")},
		{"-D --slot", dir("--slot")},
		{"-D -", dir("-")},
		{"-D ''", dir("")},
		{"--directory=", dir("")},
		{"--directory=a=b", dir("a=b")},
		{"-n -D/d", with(d, func(o *Options) { o.NoLoop = true })},
		{"--no-loop -D/d", with(d, func(o *Options) { o.NoLoop = true })},
		{"--no-l -D/d", with(d, func(o *Options) { o.NoLoop = true })},
		{"-nvD/d", with(d, func(o *Options) { o.NoLoop, o.Verbose = true, 1 })},
		{"-nvD /d", with(d, func(o *Options) { o.NoLoop, o.Verbose = true, 1 })},
		{"-vv --verbose --verb -D/d", with(d, func(o *Options) { o.Verbose = 4 })},
		{"--no-s -D/d", with(d, func(o *Options) { o.NoSync = true })},
		{"--sy -D/d", with(d, func(o *Options) { o.Synchronous = true })},
		{"--progress -D/d", with(d, func(o *Options) { o.Progress = true })},
		{"-w -D/d", with(d, func(o *Options) { o.Password = PromptNever })},
		{"--no-p -D/d", with(d, func(o *Options) { o.Password = PromptNever })},
		{"-w -W -D/d", with(d, func(o *Options) { o.Password = PromptFirst })},
		{"--password -D/d", with(d, func(o *Options) { o.Password = PromptFirst })},
		{"-h host -p 1 -U me -d a=b -D/d", with(d, func(o *Options) { o.Host, o.Port, o.User, o.Conninfo = "host", "1", "me", "a=b" })},
		{"--host=host --port=1 --username=me --dbname=a=b -D/d", with(d, func(o *Options) { o.Host, o.Port, o.User, o.Conninfo = "host", "1", "me", "a=b" })},
		{"--ho host --po 1 --u me --db a=b -D/d", with(d, func(o *Options) { o.Host, o.Port, o.User, o.Conninfo = "host", "1", "me", "a=b" })},
		{"-S s -D/d", with(d, func(o *Options) { o.Slot, o.hasSlot = "s", true })},
		{"--slot=s -D/d", with(d, func(o *Options) { o.Slot, o.hasSlot = "s", true })},
		{"--create-slot -Ss", options(func(o *Options) { o.CreateSlot, o.Slot, o.hasSlot = true, "s", true })},
		{"--cr --sl s --if", options(func(o *Options) { o.CreateSlot, o.Slot, o.hasSlot, o.IfNotExists = true, "s", true, true })},
		{"--drop-slot -Ss", options(func(o *Options) { o.DropSlot, o.Slot, o.hasSlot = true, "s", true })},
		{"-E0/5 -D/d", with(d, func(o *Options) { o.EndPos = 5 })},
		{"-E 1A/5b -D/d", with(d, func(o *Options) { o.EndPos = 0x1A0000005B })},
		{"--endpos=0/0 -D/d", d},
		{"-s0 -D/d", with(d, func(o *Options) { o.StatusInterval = 0 })},
		{"-s +010 -D/d", d},
		{"--status-interval=2147483 -D/d", with(d, func(o *Options) { o.StatusInterval = 2147483 * time.Second })},
		{"-s '' -D/d", with(d, func(o *Options) { o.StatusInterval = 0 })},
	} {
		args := strings.Split(c.line, " ")
		for i, a := range args {
			args[i] = strings.ReplaceAll(a, "''", "")
		}
		if got, err := parse(args); err != nil || got != c.want {
			t.Errorf("%s\n got %+v, %v\nwant %+v", c.line, got, err, c.want)
		}
	}
	for _, position := range []string{" 0/5", "0/5 ", "0/5\n"} { // as psql prints it
		if o, err := parse([]string{"-D/d", "-E", position}); err != nil || o.EndPos != 5 {
			t.Errorf("%q: %s, %v", position, o.EndPos, err)
		}
	}
	for _, seconds := range []string{" 5", "5 "} {
		if o, err := parse([]string{"-D/d", "-s", seconds}); err != nil || o.StatusInterval != 5*time.Second {
			t.Errorf("%q: %s, %v", seconds, o.StatusInterval, err)
		}
	}
}

// What --progress is added to must not become ambiguous by it.
func TestAbbreviationsOfTheOriginalStayUnique(t *testing.T) {
	original := slices.DeleteFunc(slices.Clone(table), func(o option) bool { return o.long == "progress" })
	for _, o := range original {
		for n := range len(o.long) {
			name := o.long[:n+1]
			want, err := findLong(original, name, "--"+name)
			if err != nil {
				continue
			}
			if got, err := findLong(table, name, "--"+name); err != nil || got.long != want.long {
				t.Errorf("--%s: %s, %v, want %s", name, got.long, err, want.long)
			}
		}
	}
}

// The texts are pg_receivewal 17's.
func TestCommandLinesThatMakeNoSense(t *testing.T) {
	const hint = "pg_receivewal: hint: Try \"pg_receivewal --help\" for more information.\n"
	for line, want := range map[string]string{
		"--foo":             "pg_receivewal: unrecognized option '--foo'\n" + hint,
		"--foo=3":           "pg_receivewal: unrecognized option '--foo=3'\n" + hint,
		"---":               "pg_receivewal: unrecognized option '---'\n" + hint,
		"-x":                "pg_receivewal: invalid option -- 'x'\n" + hint,
		"-nvx":              "pg_receivewal: invalid option -- 'x'\n" + hint,
		"-D":                "pg_receivewal: option requires an argument -- 'D'\n" + hint,
		"-nvD":              "pg_receivewal: option requires an argument -- 'D'\n" + hint,
		"--directory":       "pg_receivewal: option '--directory' requires an argument\n" + hint,
		"--dir":             "pg_receivewal: option '--directory' requires an argument\n" + hint,
		"--no":              "pg_receivewal: option '--no' is ambiguous; possibilities: '--no-loop' '--no-password' '--no-sync'\n" + hint,
		"--d=x":             "pg_receivewal: option '--d=x' is ambiguous; possibilities: '--directory' '--dbname' '--drop-slot'\n" + hint,
		"--s 3":             "pg_receivewal: option '--s' is ambiguous; possibilities: '--status-interval' '--slot' '--synchronous'\n" + hint,
		"--ver=1":           "pg_receivewal: option '--ver=1' is ambiguous; possibilities: '--version' '--verbose'\n" + hint,
		"--synchronous=yes": "pg_receivewal: option '--synchronous' doesn't allow an argument\n" + hint,
		"--verb=1":          "pg_receivewal: option '--verbose' doesn't allow an argument\n" + hint,
		"--foo --help":      "pg_receivewal: unrecognized option '--foo'\n" + hint,

		"a b":                       "pg_receivewal: error: too many command-line arguments (first is \"a\")\n" + hint,
		"a -D/d":                    "pg_receivewal: error: too many command-line arguments (first is \"a\")\n" + hint,
		"-":                         "pg_receivewal: error: too many command-line arguments (first is \"-\")\n" + hint,
		"-- -D":                     "pg_receivewal: error: too many command-line arguments (first is \"-D\")\n" + hint,
		"a -x":                      "pg_receivewal: invalid option -- 'x'\n" + hint,
		"-n -v":                     "pg_receivewal: error: no target directory specified\n" + hint,
		"-S s":                      "pg_receivewal: error: no target directory specified\n" + hint,
		"-s abc":                    "pg_receivewal: error: invalid value \"abc\" for option -s/--status-interval\n",
		"-s 10x":                    "pg_receivewal: error: invalid value \"10x\" for option -s/--status-interval\n",
		"-s 1.5":                    "pg_receivewal: error: invalid value \"1.5\" for option -s/--status-interval\n",
		"-s 0x10":                   "pg_receivewal: error: invalid value \"0x10\" for option -s/--status-interval\n",
		"-s -1":                     "pg_receivewal: error: -s/--status-interval must be in range 0..2147483\n",
		"--status-interval=2147484": "pg_receivewal: error: -s/--status-interval must be in range 0..2147483\n",
		"-s 99999999999999999999":   "pg_receivewal: error: -s/--status-interval must be in range 0..2147483\n",
		"-E 12":                     "pg_receivewal: error: could not parse end position \"12\"\n",
		"-E x/y":                    "pg_receivewal: error: could not parse end position \"x/y\"\n",
		"-E /1":                     "pg_receivewal: error: could not parse end position \"/1\"\n",
		"-E 1/":                     "pg_receivewal: error: could not parse end position \"1/\"\n",
		"-s x -E y":                 "pg_receivewal: error: invalid value \"x\" for option -s/--status-interval\n",
		"-E y -s x --foo":           "pg_receivewal: error: could not parse end position \"y\"\n",

		"--create-slot --drop-slot":       "pg_receivewal: error: cannot use --create-slot together with --drop-slot\n" + hint,
		"--create-slot":                   "pg_receivewal: error: --create-slot needs a slot to be specified using --slot\n" + hint,
		"--drop-slot":                     "pg_receivewal: error: --drop-slot needs a slot to be specified using --slot\n" + hint,
		"--synchronous --no-sync":         "pg_receivewal: error: cannot use --synchronous together with --no-sync\n" + hint,
		"--synchronous --no-sync -Z bad":  "pg_receivewal: error: cannot use --synchronous together with --no-sync\n" + hint,
		"-Z bad":                          "pg_receivewal: error: no target directory specified\n" + hint,
		"-Z bad --create-slot -S s":       "pg_receivewal: error: unrecognized compression algorithm: \"bad\"\n",
		"-D /nowhere -Z bad":              "pg_receivewal: error: unrecognized compression algorithm: \"bad\"\n",
		"-D /nowhere/below":               "pg_receivewal: error: could not open directory \"/nowhere/below\": No such file or directory\n",
		"-D /dev/null":                    "pg_receivewal: error: could not open directory \"/dev/null\": Not a directory\n",
		"-D / -p abc":                     "pg_receivewal: error: invalid integer value \"abc\" for connection option \"port\"\n",
		"--create-slot -S s -p 1,65536":   "pg_receivewal: error: invalid port number: \"65536\"\n",
		"--create-slot -S s -d nonsense=": "pg_receivewal: error: conninfo: one of its keywords is no connection option (a value with spaces must stand in single quotes)\n",
	} {
		var out, err bytes.Buffer
		status := run(strings.Fields(line), "1", Streams{strings.NewReader(""), &out, &err}, "/nowhere")
		if status != 1 || out.Len() > 0 || err.String() != want {
			t.Errorf("%s: status %d, output %q\n got %s\nwant %s", line, status, out.String(), err.String(), want)
		}
	}
}

func TestHelpAndVersion(t *testing.T) {
	for _, c := range []struct{ line, begins, has string }{
		{"--help", "pg_receivewal receives PostgreSQL streaming write-ahead logs.\n\nUsage:\n  pg_receivewal [OPTION]...\n", "--progress"},
		{"-?", "pg_receivewal receives", "zstd"},
		{"-D /nowhere --he", "pg_receivewal receives", "archive.json"},
		{"-V", "pg_receivewal (PostgreSQL) 17.", "walfleet 1.2.3"},
		{"--version --foo", "pg_receivewal (PostgreSQL) 17.", "walfleet 1.2.3"},
	} {
		var out, err bytes.Buffer
		status := run(strings.Fields(c.line), "1.2.3", Streams{strings.NewReader(""), &out, &err}, "/nowhere")
		if status != 0 || err.Len() > 0 || !strings.HasPrefix(out.String(), c.begins) || !strings.Contains(out.String(), c.has) {
			t.Errorf("%s: status %d, %q, output\n%s", c.line, status, err.String(), out.String())
		}
	}
	for _, o := range table {
		if !strings.Contains(help, "--"+o.long) || o.short != 0 && !strings.Contains(help, "  -"+string(o.short)+", --"+o.long) {
			t.Errorf("--help does not tell of --%s", o.long)
		}
	}
}

func TestCompressOption(t *testing.T) {
	const invalid = "invalid compression specification: "
	for s, want := range map[string]any{
		"none": archive.Compression{}, "none:0": archive.Compression{}, "none:level=0": archive.Compression{}, "0": archive.Compression{}, "": archive.Compression{},
		"gzip": archive.Compression{Method: "gzip"}, "gzip:-1": archive.Compression{Method: "gzip"}, "-1": archive.Compression{Method: "gzip"},
		"gzip:5": archive.Compression{Method: "gzip", Level: 5}, "5": archive.Compression{Method: "gzip", Level: 5}, " 5": archive.Compression{Method: "gzip", Level: 5},
		"gzip: 5": archive.Compression{Method: "gzip", Level: 5}, "gzip:level=5": archive.Compression{Method: "gzip", Level: 5},
		"gzip:level=5,level=6": archive.Compression{Method: "gzip", Level: 6},
		"lz4":                  archive.Compression{Method: "lz4"}, "lz4:0": archive.Compression{Method: "lz4"}, "lz4:12": archive.Compression{Method: "lz4", Level: 12},
		"zstd": archive.Compression{Method: "zstd", Level: 3}, "zstd:22": archive.Compression{Method: "zstd", Level: 22},

		"bogus": `unrecognized compression algorithm: "bogus"`, "bogus:1": `unrecognized compression algorithm: "bogus"`,
		"GZIP": `unrecognized compression algorithm: "GZIP"`, "5x": `unrecognized compression algorithm: "5x"`, "5 ": `unrecognized compression algorithm: "5 "`,
		":5": `unrecognized compression algorithm: ""`, "1:1": `unrecognized compression algorithm: "1"`, "server-gzip": `unrecognized compression algorithm: "server-gzip"`,
		"gzip:0":                 invalid + `compression algorithm "gzip" expects a compression level between 1 and 9 (default at -1)`,
		"gzip:10":                invalid + `compression algorithm "gzip" expects a compression level between 1 and 9 (default at -1)`,
		"10":                     invalid + `compression algorithm "gzip" expects a compression level between 1 and 9 (default at -1)`,
		"-2":                     invalid + `compression algorithm "gzip" expects a compression level between 1 and 9 (default at -1)`,
		"lz4:13":                 invalid + `compression algorithm "lz4" expects a compression level between 1 and 12 (default at 0)`,
		"lz4:-1":                 invalid + `compression algorithm "lz4" expects a compression level between 1 and 12 (default at 0)`,
		"none:1":                 invalid + `compression algorithm "none" does not accept a compression level`,
		"gzip:level":             invalid + `compression option "level" requires a value`,
		"gzip:level=x":           invalid + `value for compression option "level" must be an integer`,
		"gzip:level=":            invalid + `value for compression option "level" must be an integer`,
		"gzip:foo":               invalid + `unrecognized compression option: "foo"`,
		"gzip:5,":                invalid + `unrecognized compression option: "5"`,
		"gzip:":                  invalid + `found empty string where a compression option was expected`,
		"gzip:level=5,":          invalid + `found empty string where a compression option was expected`,
		"gzip:workers=2":         invalid + `compression algorithm "gzip" does not accept a worker count`,
		"gzip:workers":           invalid + `compression option "workers" requires a value`,
		"lz4:level=3,workers=1":  invalid + `compression algorithm "lz4" does not accept a worker count`,
		"gzip:long":              invalid + `compression algorithm "gzip" does not support long-distance mode`,
		"lz4:long=off":           invalid + `compression algorithm "lz4" does not support long-distance mode`,
		"gzip:long=maybe":        invalid + `value for compression option "long" must be a Boolean value`,
		"zstd:99":                invalid + `compression algorithm "zstd" expects a compression level between 1 and 22 (default at 3)`,
		"gzip:99999999999999999": invalid + `compression algorithm "gzip" expects a compression level between 1 and 9 (default at -1)`,
	} {
		got, err := parseCompress(s)
		if compression, ok := want.(archive.Compression); ok {
			if err != nil || got != compression {
				t.Errorf("%q: %+v, %v, want %+v", s, got, err, compression)
			}
		} else if err == nil || err.Error() != want {
			t.Errorf("%q\n got %v\nwant %v", s, err, want)
		}
	}
}
