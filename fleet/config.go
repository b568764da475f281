package fleet

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
	"unicode"

	"github.com/BurntSushi/toml"
	"golang.org/x/crypto/bcrypt"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/receiver"
)

// Config is one configuration file, validated and with its defaults filled in.
type Config struct {
	ArchiveDir      string        // absolute; each cluster's directory is ArchiveDir/NAME
	RuntimeDir      string        // absolute; where the control socket is
	ShutdownTimeout time.Duration // longest time that all clusters together take to stop
	Log             LogConfig
	HTTP            HTTPConfig
	Clusters        []receiver.Config // at least one, in the file's order
}

// LogConfig says what is logged and how.
type LogConfig struct {
	Level  string // debug, info, warn or error
	Format string // text or json
}

// HTTPConfig says where metrics and the status page are served, and to whom.
type HTTPConfig struct {
	Listen       string // HOST:PORT; "": nowhere
	Certificate  string // PEM file, with those of authorities in between; "": no TLS
	Key          string // PEM file
	User         string // "": everyone who reaches it
	PasswordHash string // of User's password, by bcrypt; never shown
}

func defaultConfig() Config {
	return Config{
		ShutdownTimeout: 30 * time.Second,
		HTTP:            HTTPConfig{Listen: "127.0.0.1:9851"},
		Log:             LogConfig{Level: "info", Format: "text"},
	}
}

func defaultCluster() receiver.Config {
	return receiver.Config{
		Slot:        "walfleet",
		CreateSlot:  true,
		Synchronous: true,
		Source:      receiver.SourcePrimary,
		Monitor:     true,
		Adjustable: receiver.Adjustable{
			OnGap:          receiver.GapHalt,
			MinFree:        100 << 20,
			StatusInterval: 10 * time.Second,
			ReceiveTimeout: 60 * time.Second,
			FlushInterval:  10 * time.Second,

			MonitorInterval: 30 * time.Second,
		},
	}
}

// Load reads and validates the configuration file at path, as [Parse] does.
func Load(path string) (*Config, error) {
	data, err := os.ReadFile(path)
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, fmt.Errorf("configuration file: %w (name another one with -c FILE, or begin with config.example.toml)", err)
	case err != nil:
		return nil, fmt.Errorf("configuration file: %w", err)
	}
	return Parse(path, data)
}

// Locate is the runtime directory that a configuration file names, however wrong the
// rest of the file is: a daemon that runs with what the file was before can be reached
// all the same. "" when it cannot be told.
func Locate(path string) string {
	data, err := os.ReadFile(path)
	if err != nil {
		return ""
	}
	var dirs struct {
		Archive string `toml:"archive_dir"`
		Runtime string `toml:"runtime_dir"`
	}
	for line := range strings.Lines(strings.TrimPrefix(string(data), "\ufeff")) {
		if strings.HasPrefix(strings.TrimSpace(line), "[") {
			break
		}
		_, _ = toml.Decode(line, &dirs) // a line that is wrong says nothing
	}
	dir := cmp.Or(dirs.Runtime, dirs.Archive)
	if !filepath.IsAbs(dir) {
		return ""
	}
	return filepath.Clean(dir)
}

// Parse validates a whole configuration and fills in its defaults: a cluster's
// own setting wins over [defaults], and that over the built-in value. The name
// is the file's, for errors; a relative archive_dir is answered with a proposal
// below the file's directory.
//
// The error has one line for each problem of the file, in the file's order,
// each with "FILE:LINE:" where there is a line to name (syntax errors:
// "FILE:LINE:COLUMN:"). It never shows a conninfo or what else may hold a
// password. Nothing is asked of the network; whether hosts, password files and
// directories exist is found out when they are used.
func Parse(name string, data []byte) (*Config, error) {
	root, err := decode(name, data)
	if err != nil {
		return nil, err
	}
	p := &parser{file: name, lines: findLines(string(data))}
	cfg := p.config(root)
	if err := p.err(); err != nil {
		return nil, err
	}
	return cfg, nil
}

// decode turns TOML into maps. They are taken apart here and not by the
// library, which matches keys case-insensitively, does not tell an absent key
// from a zero value, and stops at the first wrong type.
func decode(name string, data []byte) (map[string]any, error) {
	text := strings.TrimPrefix(string(data), "\ufeff")
	var root map[string]any
	_, err := toml.Decode(text, &root)
	var syntax toml.ParseError
	switch {
	case err == nil:
		return root, nil
	case !errors.As(err, &syntax):
		return nil, fmt.Errorf("%s: %w", name, err)
	}

	lines := strings.SplitAfter(text, "\n")
	n := min(max(syntax.Position.Line, 1), len(lines))
	before := len(strings.Join(lines[:n-1], "")) // bytes before that line
	column := min(max(syntax.Position.Start-before+1, 1), len(lines[n-1])+1)

	// The library quotes the text that it stumbled over. A line without its
	// closing quote may be a conninfo.
	message := syntax.Message
	if secretive(lines[n-1]) || secretive(syntax.LastKey) || secretive(message) {
		message = "syntax error (no text shown, there may be a password in it): " +
			"check that each string ends with the quote that it begins with, " +
			`that \ is doubled between double quotes, and that no key is given twice`
	}
	return nil, fmt.Errorf("%s:%d:%d: %s", name, n, column, oneLine(message))
}

// A setting is one key of the file, and its value in a T.
type setting[T any] struct {
	key string
	value[T]
}

// A value gets into a T, and out again.
type value[T any] struct {
	set  func(dst *T, value any) error // the error says what is wrong and what is right
	show func(src *T) any              // as the file would have it
}

var topSettings = []setting[Config]{
	{"archive_dir", text(func(c *Config) *string { return &c.ArchiveDir }, checkNotEmpty)},
	{"runtime_dir", text(func(c *Config) *string { return &c.RuntimeDir }, checkAbsolute)},
	{"shutdown_timeout", duration(func(c *Config) *time.Duration { return &c.ShutdownTimeout }, time.Second, time.Hour, false)},
}

var logSettings = []setting[LogConfig]{
	{"level", oneOf(func(c *LogConfig) *string { return &c.Level }, "debug", "info", "warn", "error")},
	{"format", oneOf(func(c *LogConfig) *string { return &c.Format }, "text", "json")},
}

var httpSettings = []setting[HTTPConfig]{
	{"listen", text(func(c *HTTPConfig) *string { return &c.Listen }, checkListen)},
	{"tls_certificate", text(func(c *HTTPConfig) *string { return &c.Certificate }, checkAbsolute)},
	{"tls_key", text(func(c *HTTPConfig) *string { return &c.Key }, checkAbsolute)},
	{"user", text(func(c *HTTPConfig) *string { return &c.User }, checkUser)},
	{"password_hash", text(func(c *HTTPConfig) *string { return &c.PasswordHash }, checkPasswordHash)},
}

// defaultSettings are the keys of [defaults]; each [[cluster]] has them too.
var defaultSettings = []setting[receiver.Config]{
	{"slot", text(func(c *receiver.Config) *string { return &c.Slot }, checkSlot)},
	{"create_slot", boolean(func(c *receiver.Config) *bool { return &c.CreateSlot })},
	{"synchronous", boolean(func(c *receiver.Config) *bool { return &c.Synchronous })},
	{"status_interval", duration(func(c *receiver.Config) *time.Duration { return &c.StatusInterval }, 100*time.Millisecond, day, true)},
	{"receive_timeout", duration(func(c *receiver.Config) *time.Duration { return &c.ReceiveTimeout }, time.Second, day, false)},
	{"flush_interval", duration(func(c *receiver.Config) *time.Duration { return &c.FlushInterval }, 10*time.Millisecond, day, false)},
	{"source", oneOf(func(c *receiver.Config) *string { return &c.Source }, receiver.SourcePrimary, receiver.SourceAny)},
	{"on_gap", oneOf(func(c *receiver.Config) *string { return &c.OnGap }, receiver.GapHalt, receiver.GapRecord)},
	{"compress", value[receiver.Config]{compression, func(c *receiver.Config) any { return c.Compress.String() }}},
	{"min_free", size(func(c *receiver.Config) *int64 { return &c.MinFree }, 1<<50)},
	{"max_rate", size(func(c *receiver.Config) *int64 { return &c.MaxRate }, 1<<50)},
	{"monitor", boolean(func(c *receiver.Config) *bool { return &c.Monitor })},
	{"monitor_interval", duration(func(c *receiver.Config) *time.Duration { return &c.MonitorInterval }, time.Second, day, false)},
	{"max_slot_retained", size(func(c *receiver.Config) *int64 { return &c.MaxSlotRetained }, 1<<50)},
	{"application_name", text(func(c *receiver.Config) *string { return &c.ApplicationName }, checkApplicationName)},
	{"password_file", text(func(c *receiver.Config) *string { return &c.PasswordFile }, checkPasswordFile)},
}

// retentionSettings are the keys of [retention]; the table of that name of each
// [[cluster]] has them too.
var retentionSettings = []setting[receiver.Config]{
	{"keep_age", age(func(c *receiver.Config) *time.Duration { return &c.Retention.KeepAge })},
	{"keep_size", size(func(c *receiver.Config) *int64 { return &c.Retention.KeepSize }, 1<<60)},
	{"backups", text(func(c *receiver.Config) *string { return &c.Retention.Backups }, checkAbsolute)},
}

// clusterSettings are the keys of a [[cluster]].
var clusterSettings = append([]setting[receiver.Config]{
	{"name", text(func(c *receiver.Config) *string { return &c.Name }, checkName)},
	{"conninfo", text(func(c *receiver.Config) *string { return &c.Conninfo }, checkNotEmpty)},
}, defaultSettings...)

// A section is one kind of place for keys.
type section struct {
	title string // as an operator writes it
	keys  []string
}

var (
	topSection       = section{"the top of the file", append(keys(topSettings), "log", "http", "defaults", retentionKey, "cluster")}
	logSection       = section{"[log]", keys(logSettings)}
	httpSection      = section{"[http]", keys(httpSettings)}
	defaultsSection  = section{"[defaults]", keys(defaultSettings)}
	retentionSection = section{"[retention]", keys(retentionSettings)}
	clusterSection   = section{"[[cluster]]", append(keys(clusterSettings), retentionKey)}

	sections = []section{topSection, logSection, httpSection, defaultsSection, retentionSection, clusterSection}
)

func keys[T any](settings []setting[T]) []string {
	var names []string
	for _, s := range settings {
		names = append(names, s.key)
	}
	return names
}

const (
	day          = 24 * time.Hour
	retentionKey = "retention"
)

// text is a string without NUL bytes for which check returns nil.
func text[T any](field func(*T) *string, check func(string) error) value[T] {
	get := func(src *T) any { return *field(src) }
	return value[T]{show: get, set: func(dst *T, value any) error {
		s, ok := value.(string)
		if !ok {
			return wrongType("a string in quotes", value)
		}
		if err := check(s); err != nil {
			return err
		}
		if strings.ContainsRune(s, 0) {
			return errors.New("must not contain a NUL character")
		}
		*field(dst) = s
		return nil
	}}
}

func oneOf[T any](field func(*T) *string, allowed ...string) value[T] {
	return text(field, func(s string) error {
		if !slices.Contains(allowed, s) {
			return fmt.Errorf("%s is not one of %s", show(s), strings.Join(allowed, ", "))
		}
		return nil
	})
}

func boolean[T any](field func(*T) *bool) value[T] {
	get := func(src *T) any { return *field(src) }
	return value[T]{show: get, set: func(dst *T, value any) error {
		b, ok := value.(bool)
		if !ok {
			return wrongType("true or false, without quotes", value)
		}
		*field(dst) = b
		return nil
	}}
}

// duration is a string such as "10s", from least to most (both inclusive), or
// zero where that means "off".
func duration[T any](field func(*T) *time.Duration, least, most time.Duration, orOff bool) value[T] {
	allowed := fmt.Sprintf("%q to %q", shortDuration(least), shortDuration(most))
	if orOff {
		allowed += `, or "0s" for none`
	}
	get := func(src *T) any { return shortDuration(*field(src)) }
	return value[T]{show: get, set: func(dst *T, value any) error {
		s, ok := value.(string)
		if !ok {
			return wrongType(`a number and a unit in quotes, such as "10s"`, value)
		}
		d, err := time.ParseDuration(s)
		switch {
		case err != nil:
			return fmt.Errorf(`%s is not a duration; write a number and a unit (ms, s, m, h), such as "10s"`, show(s))
		case (d < least || d > most) && !(d == 0 && orOff):
			return fmt.Errorf("%s is out of range; allowed is %s", show(s), allowed)
		}
		*field(dst) = d
		return nil
	}}
}

// age is a string such as "14d", up to a hundred years; "0" is none.
func age[T any](field func(*T) *time.Duration) value[T] {
	get := func(src *T) any { return showAge(*field(src)) }
	return value[T]{show: get, set: func(dst *T, value any) error {
		s, ok := value.(string)
		if !ok {
			return wrongType(`a number and a unit in quotes, such as "14d"`, value)
		}
		d, err := ParseAge(s)
		if err == nil {
			*field(dst) = d
		}
		return err
	}}
}

// ParseAge reads a number of days ("14d"), hours or minutes ("36h", "1h30m"), up to a
// hundred years; "0" is none.
func ParseAge(s string) (time.Duration, error) {
	bad := func(why string) (time.Duration, error) {
		return 0, fmt.Errorf(`%s is %s; write a number and a unit (d, h, m), such as "14d"`, show(s), why)
	}
	if s == "0" {
		return 0, nil
	}
	const most = 36525 * day
	if digits, ok := strings.CutSuffix(s, "d"); ok {
		n, err := strconv.ParseUint(digits, 10, 31)
		if err != nil {
			return bad("not an age")
		}
		if n == 0 || time.Duration(n) > most/day {
			return bad("out of range")
		}
		return time.Duration(n) * day, nil
	}
	d, err := time.ParseDuration(s)
	if err != nil {
		return bad("not an age")
	}
	if d < time.Minute || d > most {
		return bad("out of range")
	}
	return d, nil
}

// showAge is an age as ParseAge reads it, in days where it has whole ones.
func showAge(d time.Duration) string {
	switch {
	case d == 0:
		return "0"
	case d%day == 0:
		return fmt.Sprintf("%dd", d/day)
	}
	return shortDuration(d)
}

// compression is a method for sealed segments, with a level or not.
func compression(c *receiver.Config, value any) error {
	s, ok := value.(string)
	if !ok {
		return wrongType(`"none", or a method in quotes, such as "zstd" or "gzip:6"`, value)
	}
	method, err := archive.ParseCompression(s)
	if err != nil {
		return err
	}
	c.Compress = method
	return nil
}

// size is a string such as "100MB", in PostgreSQL's units (of 1024), up to most
// bytes inclusive; "0" is none.
func size[T any](field func(*T) *int64, most int64) value[T] {
	get := func(src *T) any { return showSize(*field(src)) }
	return value[T]{show: get, set: func(dst *T, value any) error {
		s, ok := value.(string)
		if !ok {
			return wrongType(`a number and a unit in quotes, such as "100MB"`, value)
		}
		n, err := ParseSize(s, most)
		if err == nil {
			*field(dst) = n
		}
		return err
	}}
}

// ParseSize reads a number of bytes in PostgreSQL's units (of 1024), such as "100MB", up
// to most inclusive; "0" is none.
func ParseSize(s string, most int64) (int64, error) {
	digits := strings.TrimRight(s, "kMGTB")
	unit, ok := map[string]int64{"kB": 1 << 10, "MB": 1 << 20, "GB": 1 << 30, "TB": 1 << 40}[s[len(digits):]]
	n, err := strconv.ParseInt(digits, 10, 64)
	switch {
	case s == "0":
		unit = 1
	case !ok || err != nil || n < 0:
		return 0, fmt.Errorf(`%s is not a size; write a number and a unit (kB, MB, GB, TB), such as "100MB"`, show(s))
	case n > most/unit:
		return 0, fmt.Errorf("%s is out of range", show(s))
	}
	return n * unit, nil
}

// showSize is a size in the largest unit that it is a multiple of.
func showSize(n int64) string {
	units := []string{"kB", "MB", "GB", "TB"}
	for i := len(units) - 1; i >= 0 && n != 0; i-- {
		if unit := int64(1) << (10 * (i + 1)); n%unit == 0 {
			return strconv.FormatInt(n/unit, 10) + units[i]
		}
	}
	return strconv.FormatInt(n, 10)
}

// shortDuration is d without zero minutes and seconds: "24h", not "24h0m0s".
func shortDuration(d time.Duration) string {
	s := d.String()
	if strings.HasSuffix(s, "m0s") {
		s = strings.TrimSuffix(s, "0s")
	}
	if strings.HasSuffix(s, "h0m") {
		s = strings.TrimSuffix(s, "0m")
	}
	return s
}

func checkNotEmpty(s string) error {
	if strings.TrimSpace(s) == "" {
		return errors.New("is empty")
	}
	return nil
}

// nameLimit bounds a cluster's name, in bytes. The name is a directory, a
// label in logs and metrics, and an argument of commands.
const nameLimit = 63

// checkName allows what is one harmless directory name on every file system:
// 1 to 63 ASCII letters, digits, '_', '-' and '.', not beginning with '-' (an
// option) or '.' (hidden, and "..").
func checkName(s string) error {
	switch {
	case s == "":
		return errors.New("is empty; each cluster needs a name of its own, which names its directory")
	case len(s) > nameLimit:
		return fmt.Errorf("%s has %d bytes; at most %d are allowed, it names the cluster's directory", show(s), len(s), nameLimit)
	case s[0] == '-' || s[0] == '.' || !only(s, isNameByte):
		return fmt.Errorf("%s cannot name the cluster's directory; use letters, digits, '_', '-' and '.', beginning with a letter, a digit or '_'", show(s))
	}
	return nil
}

// checkSlot is ReplicationSlotValidateName of PostgreSQL's slot.c; NAMEDATALEN
// is 64, with the terminating zero.
func checkSlot(s string) error {
	if len(s) < 1 || len(s) > 63 || !only(s, isSlotByte) {
		return fmt.Errorf("%s is not a slot name; PostgreSQL allows 1 to 63 lower-case letters, digits and '_'", show(s))
	}
	return nil
}

// checkApplicationName refuses what the server would change without a word: it
// cuts names at NAMEDATALEN-1 bytes and replaces what is not printable ASCII
// (check_application_name in variable.c), and synchronous_standby_names would
// no longer match.
func checkApplicationName(s string) error {
	if len(s) > 63 || !only(s, func(c byte) bool { return ' ' <= c && c <= '~' }) {
		return fmt.Errorf("%s is not kept by PostgreSQL as it is; use at most 63 printable ASCII characters", show(s))
	}
	return nil
}

// checkAbsolute allows nothing (for a default) or an absolute path.
func checkAbsolute(s string) error {
	if s != "" && !filepath.IsAbs(s) {
		return fmt.Errorf("%s is not an absolute path", show(s))
	}
	return nil
}

// checkListen allows nothing (to listen nowhere) or HOST:PORT.
func checkListen(s string) error {
	if s == "" {
		return nil
	}
	_, port, err := net.SplitHostPort(s)
	if err == nil {
		_, err = strconv.ParseUint(port, 10, 16)
	}
	if err != nil {
		return fmt.Errorf(`%s is not HOST:PORT; write it as "127.0.0.1:9851", "[::1]:9851", ":9851" for all addresses, or "" to listen nowhere`, show(s))
	}
	return nil
}

// checkUser refuses what HTTP's basic authentication cannot carry (RFC 7617). It does not show
// the value: it may be a whole line of htpasswd's.
func checkUser(s string) error {
	if len(s) > nameLimit || strings.ContainsFunc(s, func(r rune) bool { return r == ':' || unicode.IsControl(r) }) {
		return fmt.Errorf("must be a name alone, of at most %d bytes and without colons and control characters", nameLimit)
	}
	return nil
}

// maxHashCost bounds what finding out whether a password is right may cost: about a second.
const maxHashCost = 14

// checkPasswordHash does not show the value.
func checkPasswordHash(s string) error {
	if s == "" {
		return nil
	}
	cost, err := bcrypt.Cost([]byte(s))
	if err != nil || !slices.Contains([]string{"$2a$", "$2b$", "$2y$"}, s[:4]) || len(s) != 60 || !only(s[7:], isHashByte) {
		return errors.New(`is not a bcrypt hash (not shown here); take what "htpasswd -nB USER" prints after the colon`)
	}
	if cost > maxHashCost {
		return fmt.Errorf("each password would take too long to compare with a hash of cost %d; at most %d is allowed", cost, maxHashCost)
	}
	return nil
}

// isHashByte tells the digits of bcrypt's base 64.
func isHashByte(c byte) bool {
	return 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z' || '0' <= c && c <= '9' || c == '.' || c == '/'
}

// checkPasswordFile does not show the value: it may be the password itself.
func checkPasswordFile(s string) error {
	if s != "" && !filepath.IsAbs(s) {
		return errors.New("must be the absolute path of a file that holds the password")
	}
	return nil
}

func isSlotByte(c byte) bool {
	return 'a' <= c && c <= 'z' || '0' <= c && c <= '9' || c == '_'
}

func isNameByte(c byte) bool {
	return isSlotByte(c) || 'A' <= c && c <= 'Z' || c == '-' || c == '.'
}

func only(s string, allowed func(byte) bool) bool {
	for i := range len(s) {
		if !allowed(s[i]) {
			return false
		}
	}
	return true
}

// parser validates one file and collects everything that is wrong with it.
type parser struct {
	file     string
	lines    lineIndex
	problems []problem
}

type problem struct {
	line int // 0: the file as a whole
	text string
}

// report adds a problem of the cluster or section called who ("" for none).
func (p *parser) report(line int, who, format string, args ...any) {
	s := fmt.Sprintf(format, args...)
	if who != "" {
		s = who + ": " + s
	}
	p.problems = append(p.problems, problem{line, oneLine(s)})
}

func (p *parser) err() error {
	slices.SortStableFunc(p.problems, func(a, b problem) int { return cmp.Compare(a.line, b.line) })
	var errs []error
	for _, pr := range p.problems {
		where := p.file
		if pr.line > 0 {
			where += ":" + strconv.Itoa(pr.line)
		}
		errs = append(errs, errors.New(where+": "+pr.text))
	}
	return errors.Join(errs...)
}

// config reads the whole file. Its result counts only if nothing was reported.
func (p *parser) config(root map[string]any) *Config {
	cfg := defaultConfig()
	top := maps.Clone(root)
	for _, key := range []string{"log", "http", "defaults", retentionKey, "cluster"} {
		delete(top, key)
	}
	apply(p, place{}, "", top, topSection, topSettings, &cfg)
	p.archiveDir(root, &cfg)

	if t, ok := p.table(root, "log"); ok {
		apply(p, place{table: "log"}, "[log]", t, logSection, logSettings, &cfg.Log)
	}
	if t, ok := p.table(root, "http"); ok {
		apply(p, place{table: "http"}, "[http]", t, httpSection, httpSettings, &cfg.HTTP)
		p.pair(t, "tls_certificate", "tls_key")
		p.pair(t, "user", "password_hash")
	}
	defaults := defaultCluster()
	if t, ok := p.table(root, "defaults"); ok {
		apply(p, place{table: "defaults"}, "[defaults]", t, defaultsSection, defaultSettings, &defaults)
	}
	if t, ok := p.table(root, retentionKey); ok {
		apply(p, place{table: retentionKey}, "[retention]", t, retentionSection, retentionSettings, &defaults)
	}
	p.clusters(root, defaults, &cfg)
	return &cfg
}

func (p *parser) archiveDir(root map[string]any, cfg *Config) {
	const key = "archive_dir"
	if _, ok := root[key]; !ok {
		p.report(0, "", `archive_dir is missing; name the directory below which each cluster gets its own, such as archive_dir = "/var/lib/walfleet"`)
		return
	}
	dir := cfg.ArchiveDir
	if dir == "" {
		return // reported
	}
	if !filepath.IsAbs(dir) {
		hint := "; ~ and variables are not expanded"
		if base, err := filepath.Abs(filepath.Dir(p.file)); err == nil && !strings.ContainsAny(dir, "~$") && !secretive(dir) {
			hint = "; did you mean " + show(filepath.Join(base, dir)) + "?"
		}
		p.report(p.lines.find(place{key: key}), "", "archive_dir: %s is not an absolute path%s", show(dir), hint)
		return
	}
	cfg.ArchiveDir = filepath.Clean(dir)
	cfg.RuntimeDir = filepath.Clean(cmp.Or(cfg.RuntimeDir, cfg.ArchiveDir))
}

// pair reports that of two keys of [http] that make sense together one alone is given.
func (p *parser) pair(http map[string]any, a, b string) {
	given := func(key string) bool { value, ok := http[key]; return ok && value != "" }
	switch {
	case given(a) && !given(b):
		p.report(p.lines.find(place{table: "http", key: a}), "[http]", "%s needs %s with it", a, b)
	case given(b) && !given(a):
		p.report(p.lines.find(place{table: "http", key: b}), "[http]", "%s needs %s with it", b, a)
	}
}

// table is the section that stands once in the file, if it is there.
func (p *parser) table(root map[string]any, key string) (map[string]any, bool) {
	value, ok := root[key]
	if !ok {
		return nil, false
	}
	t, ok := value.(map[string]any)
	if !ok {
		p.report(p.lines.find(place{table: key}), "", "%s must be a section [%s] that stands once, not %s", key, key, kind(value))
	}
	return t, ok
}

func (p *parser) clusters(root map[string]any, defaults receiver.Config, cfg *Config) {
	var tables []any
	switch value := root["cluster"].(type) {
	case nil:
	case []map[string]any: // [[cluster]]
		for _, t := range value {
			tables = append(tables, t)
		}
	case []any: // cluster = [{…}, {…}]
		tables = value
	case map[string]any:
		p.report(p.lines.find(place{table: "cluster"}), "", "[cluster] must be written with double brackets, [[cluster]]")
		return
	default:
		p.report(p.lines.find(place{table: "cluster"}), "", "cluster must be written as [[cluster]] sections, not as %s", kind(value))
		return
	}
	if len(tables) == 0 {
		p.report(0, "", "no [[cluster]] in the file; an empty fleet is taken for a mistake, to stop archiving stop walfleet")
		return
	}

	names := make(owners)
	slots := make(owners)
	for i, value := range tables {
		at := place{table: "cluster", nth: i}
		who := fmt.Sprintf("[[cluster]] number %d", i+1)
		t, ok := value.(map[string]any)
		if !ok {
			p.report(p.lines.find(at), who, "must be a table, not %s", kind(value))
			continue
		}
		if name, ok := t["name"].(string); ok && checkName(name) == nil {
			who = fmt.Sprintf("cluster %q", name)
		}
		c := defaults
		if value, given := t[retentionKey]; given {
			t = maps.Clone(t)
			delete(t, retentionKey)
			at := place{table: "cluster." + retentionKey, nth: i}
			if own, ok := value.(map[string]any); ok {
				apply(p, at, who+", retention", own, retentionSection, retentionSettings, &c)
			} else {
				p.report(p.lines.find(at), who, "retention must be a table, such as { keep_age = \"30d\" }, not %s", kind(value))
			}
		}
		apply(p, at, who, t, clusterSection, clusterSettings, &c)
		for _, key := range []string{"name", "conninfo"} {
			if _, ok := t[key]; !ok {
				p.report(p.lines.find(at), who, "%s is missing", key)
			}
		}
		if c.Name != "" {
			c.Dir = filepath.Join(cfg.ArchiveDir, c.Name)
			at.key = "name"
			p.claimName(names, owner{who, i, p.lines.find(at)}, c.Name)
		}
		if c.Conninfo != "" {
			slot, given := t["slot"]
			at.key = "conninfo"
			p.conninfo(slots, owner{who, i, p.lines.find(at)}, c, !given || slot == c.Slot)
		}
		cfg.Clusters = append(cfg.Clusters, c)
	}
}

// owners tells which cluster was first to name something that may be named by
// one cluster only.
type owners map[string]owner

type owner struct {
	who  string
	nth  int // among the clusters
	line int
}

// String names the other end of a conflict.
func (o owner) String() string { return fmt.Sprintf("%s (line %d)", o.who, o.line) }

// claimName folds case, as file systems may.
func (p *parser) claimName(names owners, o owner, name string) {
	folded := strings.ToLower(name)
	if first, taken := names[folded]; taken {
		p.report(o.line, o.who, "the name is taken by %v; names must differ in more than upper and lower case", first)
		return
	}
	names[folded] = o
}

// conninfo checks a cluster's conninfo, and, if its slot is a valid one, that
// no other cluster uses it on any of the hosts.
func (p *parser) conninfo(slots owners, o owner, c receiver.Config, slotValid bool) {
	conninfo, err := pgrepl.ParseConninfo(c.Conninfo)
	if err != nil {
		p.report(o.line, o.who, "%s", conninfoProblem(err))
		return
	}
	if !slotValid {
		return
	}
	var blamed []int // each other cluster once, however many hosts are shared
	for _, host := range conninfo.Hosts() {
		if !strings.HasPrefix(host, "/") {
			host = strings.ToLower(host)
		}
		key := c.Slot + "@" + host
		first, taken := slots[key]
		switch {
		case !taken:
			slots[key] = o
		case first.nth != o.nth && !slices.Contains(blamed, first.nth):
			blamed = append(blamed, first.nth)
			p.report(o.line, o.who, "slot %q on %s is already used by %v; a slot serves one archive, give one of them another slot", c.Slot, show(host), first)
		}
	}
}

// conninfoProblem is why a conninfo does not parse. With a mistake in its
// scheme a whole URI passes for one long keyword, and would be shown as such.
func conninfoProblem(err error) string {
	reason := err.Error()
	if strings.Contains(reason, "://") || strings.Contains(reason, "@") {
		return "conninfo does not parse: neither a list of keyword=value nor a URI that begins with postgresql://"
	}
	return reason
}

// apply sets in dst what a table of the file gives.
func apply[T any](p *parser, at place, who string, table map[string]any, s section, settings []setting[T], dst *T) {
	for _, key := range slices.Sorted(maps.Keys(table)) {
		at.key = key
		i := slices.IndexFunc(settings, func(s setting[T]) bool { return s.key == key })
		if i < 0 {
			p.report(p.lines.find(at), who, "%s", unknownKey(s, key))
			continue
		}
		if err := settings[i].set(dst, table[key]); err != nil {
			p.report(p.lines.find(at), who, "%s: %v", key, err)
		}
	}
}

// unknownKey says what may have been meant with a key that s does not have.
func unknownKey(s section, key string) string {
	var elsewhere []string
	for _, other := range sections {
		if slices.Contains(other.keys, key) {
			elsewhere = append(elsewhere, other.title)
		}
	}
	if elsewhere != nil {
		return fmt.Sprintf("%s belongs to %s, not to %s", key, strings.Join(elsewhere, " or "), s.title)
	}
	if best := nearest(key, s.keys); best != "" {
		return fmt.Sprintf("unknown key %s; did you mean %s?", showKey(key), best)
	}
	return fmt.Sprintf("unknown key %s; known in %s: %s", showKey(key), s.title, strings.Join(s.keys, ", "))
}

// nearest is the candidate that key was likely meant to be, or "".
func nearest(key string, candidates []string) string {
	key = strings.ReplaceAll(strings.ToLower(key), "-", "_")
	best, bestDistance := "", 3
	for _, c := range candidates {
		d := editDistance(key, c)
		if strings.HasPrefix(c, key+"_") || strings.HasPrefix(key, c+"_") {
			d = min(d, 2)
		}
		if d < bestDistance && d < len(c) && d < len(key) {
			best, bestDistance = c, d
		}
	}
	return best
}

// editDistance is Levenshtein's, in bytes; long strings are only "far".
func editDistance(a, b string) int {
	if len(a) > 64 {
		return len(a)
	}
	row := make([]int, len(b)+1)
	for j := range row {
		row[j] = j
	}
	for i := range len(a) {
		diagonal := row[0]
		row[0] = i + 1
		for j := range len(b) {
			cost := diagonal
			if a[i] != b[j] {
				cost++
			}
			diagonal = row[j+1]
			row[j+1] = min(cost, row[j]+1, row[j+1]+1)
		}
	}
	return row[len(b)]
}

func wrongType(want string, got any) error {
	return fmt.Errorf("must be %s, not %s", want, kind(got))
}

// kind is a value's type in TOML's words. The value itself is not shown.
func kind(value any) string {
	switch value.(type) {
	case string:
		return "a string"
	case int64:
		return "an integer"
	case float64:
		return "a float"
	case bool:
		return "a boolean"
	case time.Time:
		return "a date or time"
	case []any:
		return "an array"
	case map[string]any:
		return "a table"
	case []map[string]any:
		return "an array of tables"
	}
	return fmt.Sprintf("%T", value)
}

// show quotes text of the file for an error: cut at a length that is readable,
// and hidden if it looks like a conninfo that got into the wrong place.
func show(s string) string {
	const limit = 80
	switch {
	case secretive(s):
		return "(a value not shown, there may be a password in it)"
	case len(s) > limit:
		return strconv.QuoteToGraphic(strings.ToValidUTF8(s[:limit], "")) + "…"
	}
	return strconv.QuoteToGraphic(s)
}

// showKey is show for a key, which stands as it is if it is an ordinary one.
func showKey(key string) string {
	if key != "" && len(key) <= nameLimit && only(key, isNameByte) {
		return key
	}
	return show(key)
}

// secretive reports whether a password may stand in s.
func secretive(s string) bool {
	s = strings.ToLower(s)
	for _, sign := range []string{"pass", "pwd", "secret", "conninfo", "://", "@"} {
		if strings.Contains(s, sign) {
			return true
		}
	}
	return false
}

// oneLine keeps an error on its line of a log or terminal, whatever is in it.
func oneLine(s string) string {
	return strings.Map(func(r rune) rune {
		if unicode.IsControl(r) {
			return ' '
		}
		return r
	}, s)
}
