package receivewal

import (
	"errors"
	"fmt"
	"regexp"
	"strconv"
	"strings"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

// Options are what a command line says. Zero values are what it says by silence,
// but for StatusInterval.
type Options struct {
	Directory      string
	EndPos         wal.LSN // 0: none
	StatusInterval time.Duration
	Slot           string
	Compress       archive.Compression
	Verbose        int // how often it was given

	NoLoop, NoSync, Synchronous, Progress bool
	CreateSlot, DropSlot, IfNotExists     bool

	Conninfo, Host, Port, User string
	Password                   Prompt

	hasDirectory, hasSlot bool
	compress              string // as it was given
	help, version         bool
}

// Prompt says when to ask for a password.
type Prompt int

const (
	PromptIfWanted Prompt = iota // when the server wants one and none is there
	PromptNever                  // --no-password
	PromptFirst                  // --password
)

// commandLineError is a command line that makes no sense, or a value in it.
type commandLineError struct {
	text   string
	getopt bool // getopt_long's own words, which come without "error:"
	hint   bool // with a hint to --help
}

func (e *commandLineError) Error() string { return e.text }

func complaint(format string, args ...any) error {
	return &commandLineError{fmt.Sprintf(format, args...), true, true}
}

func misuse(format string, args ...any) error {
	return &commandLineError{fmt.Sprintf(format, args...), false, true}
}

func badValue(format string, args ...any) error {
	return &commandLineError{fmt.Sprintf(format, args...), false, false}
}

// errEnough ends the reading of a command line that asks for help or the version.
var errEnough = errors.New("nothing more to read")

// table has pg_receivewal's options in its order, which ambiguous abbreviations are
// listed in, and then ours.
var table = []option{
	{"help", '?', false, func(o *Options, _ string) error { o.help = true; return errEnough }},
	{"version", 'V', false, func(o *Options, _ string) error { o.version = true; return errEnough }},
	{"directory", 'D', true, func(o *Options, s string) error { o.Directory, o.hasDirectory = s, true; return nil }},
	{"dbname", 'd', true, func(o *Options, s string) error { o.Conninfo = s; return nil }},
	{"endpos", 'E', true, func(o *Options, s string) (err error) { o.EndPos, err = parseEndPos(s); return err }},
	{"host", 'h', true, func(o *Options, s string) error { o.Host = s; return nil }},
	{"port", 'p', true, func(o *Options, s string) error { o.Port = s; return nil }},
	{"username", 'U', true, func(o *Options, s string) error { o.User = s; return nil }},
	{"no-loop", 'n', false, func(o *Options, _ string) error { o.NoLoop = true; return nil }},
	{"no-password", 'w', false, func(o *Options, _ string) error { o.Password = PromptNever; return nil }},
	{"password", 'W', false, func(o *Options, _ string) error { o.Password = PromptFirst; return nil }},
	{"status-interval", 's', true, func(o *Options, s string) (err error) { o.StatusInterval, err = parseSeconds(s); return err }},
	{"slot", 'S', true, func(o *Options, s string) error { o.Slot, o.hasSlot = s, true; return nil }},
	{"verbose", 'v', false, func(o *Options, _ string) error { o.Verbose++; return nil }},
	{"compress", 'Z', true, func(o *Options, s string) error { o.compress = s; return nil }},
	{"create-slot", 0, false, func(o *Options, _ string) error { o.CreateSlot = true; return nil }},
	{"drop-slot", 0, false, func(o *Options, _ string) error { o.DropSlot = true; return nil }},
	{"if-not-exists", 0, false, func(o *Options, _ string) error { o.IfNotExists = true; return nil }},
	{"synchronous", 0, false, func(o *Options, _ string) error { o.Synchronous = true; return nil }},
	{"no-sync", 0, false, func(o *Options, _ string) error { o.NoSync = true; return nil }},
	{"progress", 0, false, func(o *Options, _ string) error { o.Progress = true; return nil }},
}

// parse reads a command line without the program's name. Its checks are those of
// pg_receivewal, in that order. The error is a commandLineError.
func parse(args []string) (Options, error) {
	o := Options{StatusInterval: 10 * time.Second, compress: "none"}
	rest, err := getopt(table, args, &o)
	switch {
	case errors.Is(err, errEnough):
		return o, nil
	case err != nil:
		return o, err
	case len(rest) > 0:
		return o, misuse("too many command-line arguments (first is \"%s\")", rest[0])
	case o.DropSlot && o.CreateSlot:
		return o, misuse("cannot use --create-slot together with --drop-slot")
	case o.DropSlot && !o.hasSlot:
		return o, misuse("--drop-slot needs a slot to be specified using --slot")
	case o.CreateSlot && !o.hasSlot:
		return o, misuse("--create-slot needs a slot to be specified using --slot")
	case o.Synchronous && o.NoSync:
		return o, misuse("cannot use --synchronous together with --no-sync")
	case !o.hasDirectory && !o.slotAction():
		return o, misuse("no target directory specified")
	case o.hasSlot && o.Slot == "":
		return o, badValue("replication slot \"\" does not exist")
	}
	o.Compress, err = parseCompress(o.compress)
	return o, err
}

// slotAction tells whether only the slot is to be made or dropped.
func (o Options) slotAction() bool { return o.CreateSlot || o.DropSlot }

// parseEndPos takes a position as psql prints it, with spaces around it.
func parseEndPos(s string) (wal.LSN, error) {
	lsn, err := wal.ParseLSN(strings.TrimSpace(s))
	if err != nil {
		return 0, badValue("could not parse end position \"%s\"", s)
	}
	return lsn, nil
}

// parseSeconds is option_parse_int (option_utils.c), which takes nothing for 0.
func parseSeconds(s string) (time.Duration, error) {
	const name, most = "-s/--status-interval", 2147483
	digits := strings.TrimSpace(s)
	if digits == "" {
		return 0, nil
	}
	if !isInteger(digits) {
		return 0, badValue("invalid value \"%s\" for option %s", s, name)
	}
	n, err := strconv.Atoi(digits)
	if err != nil || n < 0 || n > most {
		return 0, badValue("%s must be in range 0..%d", name, most)
	}
	return time.Duration(n) * time.Second, nil
}

var isInteger = regexp.MustCompile(`^[ \t]*[+-]?[0-9]+$`).MatchString

// toInteger is the value of what isInteger accepts; what is too large for any
// meaning becomes the largest number.
func toInteger(s string) int {
	n, _ := strconv.Atoi(strings.TrimLeft(s, " \t"))
	return n
}

// parseCompress takes METHOD[:DETAIL], or a level of gzip, as PostgreSQL does
// (compression.c). DETAIL is a level or level=LEVEL.
func parseCompress(s string) (archive.Compression, error) {
	method, detail, hasDetail := strings.Cut(s, ":")
	if s == "" || isInteger(s) {
		method, detail, hasDetail = "gzip", s, true
		if toInteger(s) == 0 {
			return archive.Compression{}, nil
		}
	}
	r, ok := levels[method]
	if !ok {
		return archive.Compression{}, badValue("unrecognized compression algorithm: \"%s\"", method)
	}
	level, err := r.usual, error(nil)
	if hasDetail {
		level, err = parseDetail(method, detail, r.usual)
	}
	switch {
	case err != nil:
	case method == "none" && level != 0:
		err = fmt.Errorf("compression algorithm \"none\" does not accept a compression level")
	case level != r.usual && (level < 1 || level > r.highest):
		err = fmt.Errorf("compression algorithm \"%s\" expects a compression level between 1 and %d (default at %d)", method, r.highest, r.usual)
	}
	switch {
	case err != nil:
		return archive.Compression{}, badValue("invalid compression specification: %v", err)
	case method == "none":
		return archive.Compression{}, nil
	}
	return archive.Compression{Method: method, Level: max(level, 0)}, nil
}

// levels are what compression methods take; 0 and below, where it is the usual one,
// leaves the level to the method. zstd is ours alone.
var levels = map[string]struct{ highest, usual int }{
	"none": {0, 0},
	"gzip": {9, -1},
	"lz4":  {12, 0},
	"zstd": {22, 3},
}

// parseDetail reads a level, or a list of options of which level=LEVEL is the only
// one that a method here takes. The last level counts.
func parseDetail(method, detail string, level int) (int, error) {
	if isInteger(detail) {
		return toInteger(detail), nil
	}
	var other error
	for _, item := range strings.Split(detail, ",") {
		keyword, value, given := strings.Cut(item, "=")
		switch keyword {
		case "":
			return 0, errors.New("found empty string where a compression option was expected")
		case "level", "workers":
			if !given {
				return 0, fmt.Errorf("compression option \"%s\" requires a value", keyword)
			}
			if !isInteger(value) {
				return 0, fmt.Errorf("value for compression option \"%s\" must be an integer", keyword)
			}
			if keyword == "level" {
				level = toInteger(value)
				continue
			}
			other = fmt.Errorf("compression algorithm \"%s\" does not accept a worker count", method)
		case "long":
			switch strings.ToLower(value) {
			case "yes", "on", "1", "no", "off", "0":
			default:
				if given {
					return 0, errors.New("value for compression option \"long\" must be a Boolean value")
				}
			}
			other = fmt.Errorf("compression algorithm \"%s\" does not support long-distance mode", method)
		default:
			return 0, fmt.Errorf("unrecognized compression option: \"%s\"", keyword)
		}
	}
	return level, other
}
