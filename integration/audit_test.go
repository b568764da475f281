package integration

import (
	"bufio"
	"encoding/binary"
	"fmt"
	"io"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"

	"github.com/walfleet/walfleet/internal/wal"
)

// audit follows a daemon's system calls, as "strace -f -yy -xx" writes them down, and judges each flush position
// that goes out to a server: all WAL below it must have been written to files, and an fdatasync or fsync that
// began later must have succeeded before the update is sent; the same holds for the names of the files and their
// directories. It believes nothing but completed calls.
type audit struct {
	dir  string // of the cluster
	size wal.SegmentSize

	known   map[string]*auditedFile // files and directories that were made, by path
	pending map[string]func(result int)
	errors  []string
	updates int     // standby status updates
	judged  int     // those with a flush position
	last    wal.LSN // the highest flush position
}

// auditedFile is what a crash may leave of a file.
type auditedFile struct {
	written int64 // from the start without a hole
	dirty   []*auditedWrite
	changes int // of its name: two for each operation, since either side of it may be what a crash leaves
	named   int // the changes that a sync of its directory has covered
}

// auditedWrite is a write that no sync has covered.
type auditedWrite struct {
	from int64
	done bool
}

func newAudit(dir string, size wal.SegmentSize) *audit {
	return &audit{dir: dir, size: size, known: map[string]*auditedFile{}, pending: map[string]func(int){}}
}

var (
	callBegins  = regexp.MustCompile(`^(\d+) +([\w?]+)\((.*)$`)
	callResumes = regexp.MustCompile(`^(\d+) +<\.\.\. \w+ resumed>(.*)$`)
	callResult  = regexp.MustCompile(`\) += (-?\d+|\?)`)
	callFile    = regexp.MustCompile(`^\d+<([^>]*)>`)
	callString  = regexp.MustCompile(`"((?:\\x[0-9a-f]{2})*)"`)
	callNumber  = regexp.MustCompile(`, (\d+)`)
)

// follow reads a trace, from the start of a process to its end.
func (a *audit) follow(trace io.Reader) error {
	lines := bufio.NewScanner(trace)
	for n := 1; lines.Scan(); n++ {
		before := len(a.errors)
		a.line(lines.Text())
		for i := range a.errors[before:] {
			a.errors[before+i] = fmt.Sprintf("line %d: %s", n, a.errors[before+i])
		}
	}
	clear(a.pending)
	return lines.Err()
}

func (a *audit) fail(format string, args ...any) {
	a.errors = append(a.errors, fmt.Sprintf(format, args...))
}

// line takes a call's beginning, its end, or both.
func (a *audit) line(line string) {
	if match := callBegins.FindStringSubmatch(line); match != nil {
		thread, name, rest := match[1], match[2], match[3]
		arguments, unfinished := strings.CutSuffix(rest, " <unfinished ...>")
		if !unfinished { // strace goes when the process does
			arguments, unfinished = strings.CutSuffix(rest, " <detached ...>")
		}
		a.pending[thread] = a.begin(name, arguments)
		if !unfinished {
			a.end(thread, rest)
		}
		return
	}
	if match := callResumes.FindStringSubmatch(line); match != nil {
		a.end(match[1], match[2])
		return
	}
	if !strings.Contains(line, " +++ ") && !strings.Contains(line, " --- ") { // an exit or a signal
		a.fail("not understood: %s", line)
	}
}

func (a *audit) end(thread, text string) {
	result := callResult.FindStringSubmatch(text)
	finish, begun := a.pending[thread]
	delete(a.pending, thread)
	if result == nil || !begun {
		a.fail("not understood: %s %s", thread, text)
		return
	}
	if n, err := strconv.Atoi(result[1]); err == nil && finish != nil { // else the call was interrupted
		finish(n)
	}
}

// begin takes a call that begins, and returns what is to be done with its result.
func (a *audit) begin(name, arguments string) func(result int) {
	var file string
	if match := callFile.FindStringSubmatch(arguments); match != nil {
		file = unescape(match[1])
	}
	var texts []string
	for _, match := range callString.FindAllStringSubmatch(arguments, -1) {
		texts = append(texts, unescape(match[1]))
	}
	switch name {
	case "openat":
		if strings.Contains(arguments, "O_CREAT") {
			return a.create(texts[0], strings.Contains(arguments, "O_TRUNC"))
		}
	case "mkdirat":
		return a.create(texts[0], false)
	case "renameat", "renameat2":
		return a.rename(texts[0], texts[1])
	case "unlinkat":
		return func(result int) {
			if result == 0 {
				delete(a.known, texts[0])
			}
		}
	case "fsync", "fdatasync":
		return a.sync(file)
	case "pwrite64":
		numbers := callNumber.FindAllStringSubmatch(arguments, -1)
		offset, err := strconv.ParseInt(numbers[len(numbers)-1][1], 10, 64)
		if f := a.known[file]; f != nil && err == nil {
			return f.write(offset)
		}
		a.fail("a write to %s, which is not known", file)
	case "write", "sendto":
		if strings.HasPrefix(file, "TCP") {
			a.sent(texts[0])
			break
		}
		fallthrough
	default: // other ways to write
		if a.inArchive(file) || slices.ContainsFunc(texts, a.inArchive) {
			a.fail("%s of a file in the archive is not understood", name)
		}
	}
	return nil
}

func (a *audit) inArchive(path string) bool { return strings.HasPrefix(path, a.dir+"/") }

// unescape reads what strace -xx prints: every byte in hexadecimal, or none (in the names of sockets).
func unescape(text string) string {
	if !strings.HasPrefix(text, `\x`) {
		return text
	}
	var b strings.Builder
	for _, digits := range strings.Split(text, `\x`)[1:] {
		n, _ := strconv.ParseUint(digits, 16, 8)
		b.WriteByte(byte(n))
	}
	return b.String()
}

func (a *audit) create(path string, truncate bool) func(int) {
	return func(result int) {
		if result >= 0 && (truncate || a.known[path] == nil) {
			a.known[path] = &auditedFile{changes: 1}
		}
	}
}

func (a *audit) rename(from, to string) func(int) {
	f := a.known[from]
	if f == nil {
		a.fail("a rename of %s, which is not known", from)
		return nil
	}
	f.changes++
	return func(result int) {
		f.changes++
		if result == 0 {
			delete(a.known, from)
			a.known[to] = f
		}
	}
}

func (f *auditedFile) write(offset int64) func(int) {
	w := &auditedWrite{from: offset}
	f.dirty = append(f.dirty, w)
	return func(result int) {
		w.done = true
		if result > 0 && offset <= f.written {
			f.written = max(f.written, offset+int64(result))
		}
	}
}

// sync covers the content of a file, and of a directory the names in it, as they are when it begins.
func (a *audit) sync(path string) func(int) {
	covered := map[*auditedWrite]bool{}
	f := a.known[path]
	if f != nil {
		for _, w := range f.dirty {
			covered[w] = w.done
		}
	}
	changes := map[*auditedFile]int{}
	for name, entry := range a.known {
		if filepath.Dir(name) == path {
			changes[entry] = entry.changes
		}
	}
	return func(result int) {
		if result != 0 {
			return
		}
		if f != nil {
			f.dirty = slices.DeleteFunc(f.dirty, func(w *auditedWrite) bool { return covered[w] })
		}
		for entry, n := range changes {
			entry.named = max(entry.named, n)
		}
	}
}

// sent judges what goes out on a socket: CopyData with a standby status update (protocol-replication.html).
func (a *audit) sent(message string) {
	const length = 39
	if !strings.HasPrefix(message, "d\x00\x00\x00\x26r") {
		return
	}
	if len(message) != length {
		a.fail("a status update of %d bytes", len(message))
		return
	}
	field := func(i int) wal.LSN { return wal.LSN(binary.BigEndian.Uint64([]byte(message[6+8*i:]))) }
	flush, apply := field(1), field(2)
	a.updates++
	if apply != 0 {
		a.fail("an apply position of %s", apply)
	}
	if flush == 0 {
		return
	}
	a.judged++
	a.last = max(a.last, flush)
	if err := a.durable(flush); err != nil {
		a.fail("flush position %s: %v", flush, err)
	}
}

// durable says why an archive may lack WAL before flush after a crash.
func (a *audit) durable(flush wal.LSN) error {
	first, found := wal.Segment{}, false
	for path := range a.known {
		name, _ := strings.CutSuffix(filepath.Base(path), ".partial")
		if s, err := wal.ParseSegment(name, a.size); err == nil && (!found || s.Start < first.Start) {
			first, found = s, true
		}
	}
	if !found || first.Start >= flush {
		return fmt.Errorf("no WAL is in the archive")
	}
	for s := first; s.Start < flush; s = s.Next() {
		path := filepath.Join(a.dir, s.Name())
		if a.known[path] == nil {
			path += ".partial"
		}
		if err := a.onDisk(path, int64(min(flush, s.End())-s.Start)); err != nil {
			return err
		}
	}
	return a.onDisk(filepath.Join(a.dir, "archive.json"), 1)
}

// onDisk says why a file's first bytes may be lost in a crash.
func (a *audit) onDisk(path string, length int64) error {
	f := a.known[path]
	if f == nil {
		return fmt.Errorf("%s is not there", path)
	}
	if f.written < length {
		return fmt.Errorf("%s is written up to %d, not %d", path, f.written, length)
	}
	for _, w := range f.dirty {
		if w.from < length {
			return fmt.Errorf("%s has an unsynced write at %d", path, w.from)
		}
	}
	for entry := path; a.known[entry] != nil; entry = filepath.Dir(entry) {
		if a.known[entry].named < a.known[entry].changes {
			return fmt.Errorf("the name %s is not synced", entry)
		}
	}
	return nil
}

// TestAuditIsNotBlind gives the audit traces that break the promise, and one that does not.
func TestAuditIsNotBlind(t *testing.T) {
	const (
		partial = "/a/orders/000000010000000000000001.partial"
		sealed  = "/a/orders/000000010000000000000001"
	)
	x := func(text string) string {
		var b strings.Builder
		for i := range len(text) {
			fmt.Fprintf(&b, `\x%02x`, text[i])
		}
		return b.String()
	}
	create := func(path string) string {
		return fmt.Sprintf(`1 openat(AT_FDCWD<%s>, "%s", O_RDWR|O_CREAT|O_TRUNC|O_CLOEXEC, 0600) = 7<%[2]s>`, x("/"), x(path))
	}
	write := func(path string, n, offset int) string {
		return fmt.Sprintf(`2 pwrite64(7<%s>, "%s"..., %d, %d) = %[3]d`, x(path), x("wal"), n, offset)
	}
	sync := func(path string) string { return fmt.Sprintf("1 fdatasync(7<%s>) = 0", x(path)) }
	rename := func(from, to string) string {
		return fmt.Sprintf(`1 renameat2(AT_FDCWD<%s>, "%s", AT_FDCWD<%[1]s>, "%[3]s", RENAME_NOREPLACE) = 0`, x("/"), x(from), x(to))
	}
	split := func(line string) (begin, end string) {
		i := strings.LastIndex(line, ") = ")
		name := line[2:strings.Index(line, "(")]
		return line[:i] + " <unfinished ...>", line[:1] + " <... " + name + " resumed>" + line[i:]
	}
	update := func(flush wal.LSN, apply uint64) string {
		b := append([]byte("d\x00\x00\x00\x26r"), make([]byte, 33)...)
		binary.BigEndian.PutUint64(b[6:], uint64(flush))
		binary.BigEndian.PutUint64(b[14:], uint64(flush))
		binary.BigEndian.PutUint64(b[22:], apply)
		return fmt.Sprintf(`3 write(9<TCP:[127.0.0.1:1->127.0.0.1:2]>, "%s", 39) = 39`, x(string(b)))
	}
	began := []string{
		fmt.Sprintf(`1 mkdirat(AT_FDCWD<%s>, "%s", 0700) = 0`, x("/"), x("/a/orders")), sync("/a"),
		create("/a/orders/archive.json.tmp"), write("/a/orders/archive.json.tmp", 9, 0), sync("/a/orders/archive.json.tmp"),
		rename("/a/orders/archive.json.tmp", "/a/orders/archive.json"), sync("/a/orders"),
		create(partial + ".tmp"), sync(partial + ".tmp"), rename(partial+".tmp", partial), sync("/a/orders"),
		`1 --- SIGURG {si_signo=SIGURG} ---`,
	}
	syncBegins, syncEnds := split(sync(partial))
	writeBegins, writeEnds := split(write(partial, 100, 0))
	const size, start = wal.SegmentSize(megabyte), wal.LSN(megabyte)
	full := write(partial, megabyte, 0)
	good := update(start+100, 0)
	for _, tt := range []struct {
		name  string
		trace []string
		want  string // in the only error; "": there is none
	}{
		{"good", []string{write(partial, 60, 0), write(partial, 40, 60), sync(partial), good}, ""},
		{"good, with calls that overlap", []string{writeBegins, writeEnds, syncBegins, syncEnds, good}, ""},
		{"good, with a later write", []string{write(partial, 100, 0), sync(partial), write(partial, 9, 100), good}, ""},
		{"good, sealed", []string{full, sync(partial), rename(partial, sealed), sync("/a/orders"), update(start+megabyte, 0)}, ""},
		{"no position", []string{update(0, 0)}, ""},
		{"nothing written", []string{good}, "is written up to 0, not 100"},
		{"too little written", []string{write(partial, 99, 0), sync(partial), good}, "is written up to 99, not 100"},
		{"a hole", []string{write(partial, 40, 0), write(partial, 40, 60), sync(partial), good}, "is written up to 40"},
		{"before fdatasync", []string{write(partial, 100, 0), good, sync(partial)}, "unsynced write at 0"},
		{"before fdatasync returned", []string{write(partial, 100, 0), syncBegins, good, syncEnds}, "unsynced write at 0"},
		{"fdatasync failed", []string{write(partial, 100, 0), strings.Replace(sync(partial), "= 0", "= -1 EIO (Input/output error)", 1), good}, "unsynced write at 0"},
		{"fdatasync of another file", []string{write(partial, 100, 0), sync("/a/orders/archive.json"), good}, "unsynced write at 0"},
		{"write after fdatasync", []string{write(partial, 60, 0), sync(partial), write(partial, 40, 60), good}, "unsynced write at 60"},
		{"write while fdatasync runs", []string{syncBegins, write(partial, 100, 0), syncEnds, good}, "unsynced write at 0"},
		{"fdatasync while write runs", []string{writeBegins, sync(partial), writeEnds, good}, "unsynced write at 0"},
		{"written again", []string{write(partial, 100, 0), sync(partial), write(partial, 9, 50), good}, "unsynced write at 50"},
		{"name not synced", []string{full, sync(partial), rename(partial, sealed), update(start+megabyte, 0)}, "name " + sealed + " is not synced"},
		{"directory synced before", []string{full, sync(partial), sync("/a/orders"), rename(partial, sealed), update(start+megabyte, 0)}, "name " + sealed + " is not synced"},
		{"beyond the segment", []string{full, sync(partial), update(start+megabyte+1, 0)}, "2.partial is not there"},
		{"apply", []string{update(0, 5)}, "apply position of 0/5"},
		{"another way to write", []string{`1 pwritev2(7<` + x(partial) + `>, [], 1, 0, 0) = 100`}, "not understood"},
		{"another line", []string{"nonsense"}, "not understood"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			a := newAudit("/a/orders", size)
			if err := a.follow(strings.NewReader(strings.Join(append(slices.Clone(began), tt.trace...), "\n"))); err != nil {
				t.Fatal(err)
			}
			switch {
			case tt.want == "" && len(a.errors) > 0:
				t.Errorf("errors: %q", a.errors)
			case tt.want != "" && (len(a.errors) != 1 || !strings.Contains(a.errors[0], tt.want)):
				t.Errorf("errors %q, want %q", a.errors, tt.want)
			}
		})
	}
	for missing, want := range map[int]string{1: "name /a/orders is not", 4: "archive.json has an unsynced", 6: "", 10: partial + " is not synced"} {
		a := newAudit("/a/orders", size)
		trace := append(slices.Delete(slices.Clone(began), missing, missing+1), write(partial, 100, 0), sync(partial), good)
		if err := a.follow(strings.NewReader(strings.Join(trace, "\n"))); err != nil {
			t.Fatal(err)
		}
		if text := strings.Join(a.errors, "\n"); !strings.Contains(text, want) || (text == "") != (want == "") {
			t.Errorf("without %q: errors %q, want %q", began[missing], a.errors, want)
		}
	}
}
