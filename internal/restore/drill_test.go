package restore

import (
	"archive/tar"
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"reflect"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

func TestParseTarget(t *testing.T) {
	at := time.Date(2026, 1, 31, 9, 0, 0, 123456000, time.UTC)
	local := time.Date(2026, 1, 31, 10, 0, 0, 0, time.Local)
	for _, tt := range []struct {
		text string
		want Target
		ok   bool
	}{
		{"", Target{}, true},
		{"0/3000060", Target{LSN: 0x3000060}, true},
		{"0/0", Target{}, false},
		{"2026-01-31T10:00:00.123456+01:00", Target{Time: at}, true},
		{"2026-01-31 10:00:00.123456+01", Target{Time: at}, true}, // as PostgreSQL prints it
		{"2026-01-31 09:00:00.123456Z", Target{Time: at}, true},
		{"2026-01-31 10:00:00", Target{Time: local}, true},
		{"2026-01-31 10:00", Target{Time: local}, true},
		{"yesterday", Target{}, false},
		{"2026-01-31 10:00:00+01' || x", Target{}, false},
	} {
		got, err := ParseTarget(tt.text)
		if (err == nil) != tt.ok || got.LSN != tt.want.LSN || !got.Time.Equal(tt.want.Time) {
			t.Errorf("ParseTarget(%q) = %v, %v", tt.text, got, err)
		}
	}
}

// The command must survive the server's own replacements and the shell, whatever the paths are.
func TestRestoreCommandIsQuoted(t *testing.T) {
	for _, name := range []string{"plain", "with space", "it's", `b\a"c$k`, "50%f", "%p%%", "a;b&c|d", "new\nline"} {
		dir := filepath.Join(t.TempDir(), name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		d := &drill{DrillOptions: DrillOptions{Archive: dir, Program: filepath.Join(dir, "walfleet")}}
		script := "#!/bin/sh\nprintf '%s|' \"$@\"\n"
		if err := os.WriteFile(d.Program, []byte(script), 0o700); err != nil {
			t.Fatal(err)
		}
		asTheServer := strings.NewReplacer("%f", "00000002.history", "%p", "pg_wal/RECOVERYHISTORY", "%%", "%")
		out, err := exec.Command("sh", "-c", asTheServer.Replace(d.restoreCommand())).CombinedOutput()
		if want := "restore-wal|--partial|--archive|" + dir + "|00000002.history|pg_wal/RECOVERYHISTORY|"; err != nil || string(out) != want {
			t.Errorf("%q: %v\n%s\nwant\n%s", name, err, out, want)
		}
	}
}

func TestParseControl(t *testing.T) {
	const out = `pg_control version number:            1300
Database system identifier:           7713549806059779989
Database cluster state:               in production
max_connections setting:              150
max_worker_processes setting:         8
max_wal_senders setting:              10
max_prepared_xacts setting:           3
max_locks_per_xact setting:           64
Bytes per WAL segment:                1073741824
`
	want := control{7713549806059779989, 1 << 30, map[string]int{"max_connections": 150, "max_worker_processes": 8,
		"max_wal_senders": 10, "max_prepared_transactions": 3, "max_locks_per_transaction": 64}}
	if got, err := parseControl(out); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v, %v", got, err)
	}
	for line := range strings.Lines(out) {
		_, err := parseControl(strings.Replace(out, line, "", 1))
		if needed := strings.Contains(line, "setting") || strings.Contains(line, "identifier") || strings.Contains(line, "segment"); (err == nil) == needed {
			t.Errorf("without %q: %v", line, err)
		}
	}
}

// dataDirectory is a backup's, as far as a drill looks at it. What begins with SECRET must not be copied.
var dataDirectory = map[string]string{
	"PG_VERSION":                       "15\n",
	"backup_label":                     "START WAL LOCATION: 0/2000028 (file 000000010000000000000002)\nCHECKPOINT LOCATION: 0/2000060\n",
	"global/pg_control":                "control",
	"base/1/1259":                      "table",
	"base/1/postgresql.conf":           "not a configuration",
	"pg_wal/archive_status/":           "",
	"pg_wal/000000010000000000000002":  "SECRET WAL",
	"pg_replslot/orders/state":         "SECRET slot",
	"pg_tblspc/":                       "",
	"postgresql.conf":                  "SECRET",
	"postgresql.auto.conf":             "SECRET",
	"pg_hba.conf":                      "SECRET",
	"pg_ident.conf":                    "SECRET",
	"standby.signal":                   "SECRET",
	"tablespace_map":                   "16385 /SECRET/place\n",
	"postmaster.pid":                   "SECRET",
	"pg_wal/archive_status/x.ready":    "SECRET",
	"pg_stat/pgstat.stat":              "statistics",
	"pg_multixact/members/0000":        "members",
	"pg_logical/replorigin_checkpoint": "origin",
}

// checkCopy makes sure that a copy has the data and the tablespace, and nothing else.
func checkCopy(t *testing.T, d *drill) {
	t.Helper()
	for name, content := range dataDirectory {
		got, err := os.ReadFile(filepath.Join(d.data(), name))
		switch {
		case strings.HasSuffix(name, "/"):
		case strings.Contains(content, "SECRET"):
			if err == nil {
				t.Errorf("%s was copied", name)
			}
		case err != nil || string(got) != content:
			t.Errorf("%s: %q, %v", name, got, err)
		}
	}
	if got, err := os.ReadFile(filepath.Join(d.data(), "pg_tblspc/16385/PG_15_202209061/5/16390")); err != nil || string(got) != "far" {
		t.Errorf("the tablespace: %q, %v", got, err)
	}
	if place, err := filepath.EvalSymlinks(filepath.Join(d.data(), "pg_tblspc/16385")); err != nil || !strings.HasPrefix(place, d.dir) {
		t.Errorf("the tablespace is in %s: %v", place, err)
	}
	for _, dir := range []string{"pg_wal", "pg_replslot"} {
		if info, err := os.Stat(filepath.Join(d.data(), dir)); err != nil || !info.IsDir() {
			t.Errorf("%s is missing: %v", dir, err)
		}
	}
	if start, err := readLabel(d.data()); err != nil || start != 0x2000028 {
		t.Errorf("recovery begins at %s, %v", start, err)
	}
}

func newDrill(t *testing.T) *drill {
	t.Helper()
	dir, err := filepath.EvalSymlinks(t.TempDir())
	if err != nil {
		t.Fatal(err)
	}
	d := &drill{report: &DrillReport{}, dir: filepath.Join(dir, "work")}
	for _, dir := range []string{d.data(), d.tablespace("")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			t.Fatal(err)
		}
	}
	return d
}

func TestCopiesAPlainBackup(t *testing.T) {
	from := t.TempDir()
	put := func(name, content string) {
		t.Helper()
		name = filepath.Join(from, name)
		err := os.MkdirAll(filepath.Dir(name), 0o700)
		if err == nil && !strings.HasSuffix(name, "/") {
			err = os.WriteFile(name, []byte(content), 0o600)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	for name, content := range dataDirectory {
		if dir, ok := strings.CutSuffix(name, "/"); ok {
			put(filepath.Join(dir, "x"), "")
			continue
		}
		put(name, content)
	}
	put("../far-"+filepath.Base(from)+"/PG_15_202209061/5/16390", "far")
	far := filepath.Join(filepath.Dir(from), "far-"+filepath.Base(from))
	os.Remove(filepath.Join(from, "pg_tblspc/x"))
	if err := errors.Join(os.Symlink(far, filepath.Join(from, "pg_tblspc/16385")), os.Symlink("/etc/passwd", filepath.Join(from, "base/link"))); err != nil {
		t.Fatal(err)
	}
	d := newDrill(t)
	if err := d.copyTree(t.Context(), from, d.data(), true); err != nil {
		t.Fatal(err)
	}
	checkCopy(t, d)
	if _, err := os.Lstat(filepath.Join(d.data(), "base/link")); err == nil {
		t.Error("a link that is no tablespace's was copied")
	}
	size, err := backup{dir: from}.size(t.Context())
	if want := d.report.CopiedBytes + 50; err != nil || size < d.report.CopiedBytes || size > want+200 {
		t.Errorf("the backup's size is %d, %v; copied were %d bytes", size, err, d.report.CopiedBytes)
	}
	cancelled, cancel := context.WithCancel(t.Context())
	cancel()
	if err := newDrill(t).copyTree(cancelled, from, d.data(), true); !errors.Is(err, context.Canceled) {
		t.Errorf("a drill that was told to end goes on copying: %v", err)
	}
}

// packed is a tar file.
func packed(t *testing.T, files map[string]string, more ...tar.Header) []byte {
	t.Helper()
	var b bytes.Buffer
	w := tar.NewWriter(&b)
	for name, content := range files {
		more = append(more, tar.Header{Name: name, Typeflag: tar.TypeReg, Size: int64(len(content)), Mode: 0o600})
		if strings.HasSuffix(name, "/") {
			more[len(more)-1].Typeflag = tar.TypeDir
		}
	}
	for _, h := range more {
		if err := w.WriteHeader(&h); err != nil {
			t.Fatal(err)
		}
		if _, err := io.WriteString(w, files[h.Name]); err != nil {
			t.Fatal(err)
		}
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
	return b.Bytes()
}

func TestUnpacksTarFiles(t *testing.T) {
	base := packed(t, dataDirectory, tar.Header{Name: "base/link", Typeflag: tar.TypeSymlink, Linkname: "/etc"})
	far := packed(t, map[string]string{"PG_15_202209061/5/16390": "far"})
	for suffix, compress := range map[string]func(io.Writer) io.WriteCloser{
		".tar":     nil,
		".tar.gz":  func(w io.Writer) io.WriteCloser { return gzip.NewWriter(w) },
		".tar.lz4": func(w io.Writer) io.WriteCloser { return lz4.NewWriter(w) },
		".tar.zst": func(w io.Writer) io.WriteCloser { z, _ := zstd.NewWriter(w); return z },
	} {
		dir := t.TempDir()
		for name, data := range map[string][]byte{"base": base, "16385": far} {
			var b bytes.Buffer
			if compress != nil {
				w := compress(&b)
				if _, err := w.Write(data); err != nil {
					t.Fatal(err)
				}
				if err := w.Close(); err != nil {
					t.Fatal(err)
				}
				data = b.Bytes()
			}
			if err := os.WriteFile(filepath.Join(dir, name+suffix), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
		b, err := findBackup(dir)
		if err != nil {
			t.Errorf("%s: %v", suffix, err)
			continue
		}
		d := newDrill(t)
		if err := d.copyBackup(t.Context(), b); err != nil {
			t.Errorf("%s: %v", suffix, err)
			continue
		}
		checkCopy(t, d)
	}
}

// Nothing that a tar file says leads out of the drill's directory.
func TestTarFilesAreNotTrusted(t *testing.T) {
	for _, h := range []tar.Header{
		{Name: "../out", Typeflag: tar.TypeReg},
		{Name: "/tmp/out", Typeflag: tar.TypeReg},
		{Name: "base/../../out", Typeflag: tar.TypeDir},
	} {
		file := filepath.Join(t.TempDir(), "base.tar")
		if err := os.WriteFile(file, packed(t, nil, h), 0o600); err != nil {
			t.Fatal(err)
		}
		d := newDrill(t)
		if _, err := d.unpack(t.Context(), file, d.data(), true); err == nil || !strings.Contains(err.Error(), "leads out") {
			t.Errorf("%s: %v", h.Name, err)
		}
	}
	// A link comes first, then a file behind it.
	outside := t.TempDir()
	file := filepath.Join(t.TempDir(), "base.tar")
	data := packed(t, nil, tar.Header{Name: "base", Typeflag: tar.TypeSymlink, Linkname: outside}, tar.Header{Name: "base/out", Typeflag: tar.TypeReg},
		tar.Header{Name: "pg_tblspc/../x", Typeflag: tar.TypeSymlink, Linkname: outside})
	if err := os.WriteFile(file, data, 0o600); err != nil {
		t.Fatal(err)
	}
	d := newDrill(t)
	if oids, err := d.unpack(t.Context(), file, d.data(), true); err != nil || len(oids) > 0 {
		t.Error(oids, err)
	}
	if names, _ := os.ReadDir(outside); len(names) > 0 {
		t.Errorf("%s was written to", outside)
	}
}

// A recovery that ended before the archive did is no success, although the server opened.
func TestAtEnd(t *testing.T) {
	const size = wal.SegmentSize(1 << 20)
	files := func(tli wal.Timeline, partial bool, starts ...wal.LSN) (list []archive.StoredFile) {
		for _, start := range starts {
			list = append(list, archive.StoredFile{Segment: size.Segment(tli, start), Partial: partial})
		}
		return list
	}
	one := append(files(1, false, 0x100000, 0x200000), files(1, true, 0x300000)...)
	two := append(slices.Clone(one), files(2, true, 0x300000)...)
	dir := t.TempDir()
	if err := os.WriteFile(filepath.Join(dir, "00000002.history"), []byte("1\t0/300080\tno recovery target specified\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, tt := range []struct {
		name     string
		files    []archive.StoredFile
		followed wal.Timeline
		lsn      string
		says     string
	}{
		{"in the partial segment", one, 1, "0/300100", ""},
		{"where the last complete one ends", one, 1, "0/300000", ""},
		{"inside the last complete one", one, 1, "0/2FFFF8", size.Segment(1, 0x200000).Name()},
		{"in the middle", one, 1, "0/150000", size.Segment(1, 0x100000).Name()},
		{"on the last timeline", two, 2, "0/300100", ""},
		{"on a timeline of the server's own WAL", one, 2, "0/300100", ""},
		{"on an ancestor of one that is not complete anywhere", two, 2, "0/150000", "timeline 2 begins at 0/300080"},
		{"on an older timeline", two, 1, "0/300100", "00000002.history"},
	} {
		d := &drill{report: &DrillReport{RecoveredLSN: tt.lsn}, followed: tt.followed}
		err := d.atEnd(archive.Catalogue{Path: dir, Files: tt.files})
		if (err == nil) != (tt.says == "") || err != nil && !strings.Contains(err.Error(), tt.says) {
			t.Errorf("%s: %v", tt.name, err)
		}
	}
}

func TestDecisiveLinesOfALog(t *testing.T) {
	d := newDrill(t)
	log := `LOG:  starting PostgreSQL 17.12
LOG:  restored log file "000000010000000000000006" from archive
LOG:  redo starts at 0/600028
LOG:  restored log file "000000010000000000000007" from archive
walfleet: restore-wal /a "000000010000000000000008": it is missing ` + "\x1b[31m" + `
FATAL:  could not restore file "000000010000000000000008" from archive: child process exited with exit code 200
LOG:  startup process (PID 10) exited with exit code 1
LOG:  database system is shut down
`
	if err := os.WriteFile(filepath.Join(d.dir, logFile), []byte(log), 0o600); err != nil {
		t.Fatal(err)
	}
	want := []string{
		"LOG:  redo starts at 0/600028",
		`walfleet: restore-wal /a "000000010000000000000008": it is missing \x1b[31m`,
		`FATAL:  could not restore file "000000010000000000000008" from archive: child process exited with exit code 200`,
	}
	got := d.decisive()
	if !slices.Equal(got, want) {
		t.Errorf("got %q", got)
	}
	if why := reason(got); !strings.HasPrefix(why, "restore-wal /a") {
		t.Errorf("the reason is %q", why)
	}
	if why := reason([]string{"LOG:  x", "FATAL:  the end", "HINT:  y"}); why != "the end" {
		t.Errorf("the reason is %q", why)
	}
	if last := lastRestored(d.logTail()); last != "000000010000000000000007" {
		t.Errorf("restored last: %q", last)
	}
}

func TestRoomForADrill(t *testing.T) {
	d := &drill{report: &DrillReport{}, DrillOptions: DrillOptions{Work: filepath.Join(t.TempDir(), strings.Repeat("long", 20))}}
	if err := os.Mkdir(d.Work, 0o700); err != nil {
		t.Fatal(err)
	}
	if err := d.makeDirIn(d.Work, 1); err == nil || !strings.Contains(err.Error(), "--work must name a shorter one") {
		t.Errorf("a socket whose path is too long: %v", err)
	}
	if err := d.makeDirIn(t.TempDir(), 1<<60); err == nil || !strings.Contains(err.Error(), "free") {
		t.Errorf("a disk without room: %v", err)
	}
}

// docs/json.md has every name of the report.
func TestDrillJSONIsDocumented(t *testing.T) {
	text, err := os.ReadFile("../../docs/json.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "## `walfleet drill")
	section, _, _ = strings.Cut(section, "\n## ")
	for _, typ := range []reflect.Type{reflect.TypeFor[DrillReport](), reflect.TypeFor[DrillDatabase]()} {
		for i := range typ.NumField() {
			name, _, _ := strings.Cut(typ.Field(i).Tag.Get("json"), ",")
			if name == "" || !strings.Contains(section, "`"+name+"`") {
				t.Errorf("%v.%s: %q is not documented", typ, typ.Field(i).Name, name)
			}
		}
	}
}
