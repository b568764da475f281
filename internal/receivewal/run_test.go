package receivewal

import (
	"bytes"
	"compress/gzip"
	"context"
	"encoding/json"
	"io"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

const (
	mb     = 1 << 20
	origin = wal.LSN(64 * mb)
)

// bench is a scripted server behind a port of its own, and a directory.
type bench struct {
	*testing.T
	srv  *pgtest.Server
	wal  *pgtest.WAL
	port string
	dir  string
}

func newBench(t *testing.T) *bench {
	for _, name := range os.Environ() { // the tester's own servers are no business of ours
		if name, _, _ := strings.Cut(name, "="); strings.HasPrefix(name, "PG") {
			t.Setenv(name, "")
			os.Unsetenv(name)
		}
	}
	t.Setenv("HOME", t.TempDir())
	b := &bench{T: t, dir: t.TempDir(),
		srv: pgtest.NewServer(t, pgtest.State{Slots: map[string]*pgtest.Slot{"walfleet": {RestartLSN: origin}}}),
		wal: pgtest.NewWAL(pgtest.WALConfig{SystemID: 7, Size: mb, Start: origin}),
	}
	b.fill(origin + mb + 5000)
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	_, b.port, _ = net.SplitHostPort(l.Addr().String())
	var group sync.WaitGroup
	t.Cleanup(group.Wait)
	t.Cleanup(b.srv.Close)
	t.Cleanup(func() { l.Close() })
	group.Go(func() {
		for {
			outside, err := l.Accept()
			if err != nil {
				return
			}
			inside, err := b.srv.Dial(context.Background(), "tcp", "")
			if err != nil {
				outside.Close()
				continue
			}
			for _, pair := range [][2]net.Conn{{outside, inside}, {inside, outside}} {
				group.Go(func() {
					_, _ = io.Copy(pair[0], pair[1])
					pair[0].Close()
					pair[1].Close()
				})
			}
		}
	})
	return b
}

// fill gives the server WAL up to end.
func (b *bench) fill(end wal.LSN) {
	b.wal.FillTo(end)
	b.srv.Publish(b.wal)
}

// run runs a command line against the server.
func (b *bench) run(in, line string) (status int, stderr string) {
	b.Helper()
	var out, err bytes.Buffer
	args := append(strings.Fields("-h 127.0.0.1 -U archiver -d sslmode=disable -p "+b.port), strings.Fields(line)...)
	status = run(args, "1", Streams{strings.NewReader(in), &out, &err}, "/nowhere/tty")
	if out.Len() > 0 {
		b.Errorf("%s: on standard output: %s", line, out.String())
	}
	return status, strings.ReplaceAll(err.String(), b.port, "PORT")
}

// want runs a command line and expects its status and messages.
func (b *bench) want(status int, messages string, in, line string) {
	b.Helper()
	if got, stderr := b.run(in, line); got != status || stderr != messages {
		b.Errorf("%s: status %d, want %d\n got %s\nwant %s", line, got, status, stderr, messages)
	}
}

func (b *bench) wantFiles(names ...string) {
	b.Helper()
	entries, err := os.ReadDir(b.dir)
	if err != nil {
		b.Fatal(err)
	}
	var have []string
	for _, e := range entries {
		if info, err := e.Info(); err != nil || info.Mode().Perm() != 0o600 {
			b.Errorf("%s: %v, %v", e.Name(), info.Mode(), err)
		}
		if !strings.HasPrefix(e.Name(), ".") {
			have = append(have, e.Name())
		}
	}
	if !slices.Equal(have, names) {
		b.Errorf("files %q, want %q", have, names)
	}
}

func TestArchivesUpToTheEndPosition(t *testing.T) {
	b := newBench(t)
	b.want(0, `pg_receivewal: starting log streaming at 0/4000000 (timeline 1)
pg_receivewal: finished segment at 0/4100000 (timeline 1)
pg_receivewal: stopped log streaming at 0/4101388 (timeline 1)
pg_receivewal: not renaming "000000010000000000000041.partial", segment is not complete
pg_receivewal: stopped log streaming at 0/4101388 (timeline 1)
`, "", "-S walfleet -n -v -E 0/4101000 -D "+b.dir)
	b.wantFiles("000000010000000000000040", "000000010000000000000041.partial", "archive.json")
	for i, name := range []string{"000000010000000000000040", "000000010000000000000041.partial"} {
		start := origin + wal.LSN(i)*mb
		end := min(start+mb, b.wal.End())
		if data, err := os.ReadFile(filepath.Join(b.dir, name)); err != nil || !bytes.Equal(data[:end-start], b.wal.Bytes(start, end)) {
			t.Errorf("%s is not the server's: %v", name, err)
		}
	}
	st := b.srv.Streams()[0]
	if r := st.Request(); r.Slot != "walfleet" || st.Startup()["application_name"] != "pg_receivewal" {
		t.Errorf("%+v, %v", r, st.Startup())
	}
	var restart wal.LSN
	b.srv.Do(func(s *pgtest.State) { restart = s.Slots["walfleet"].RestartLSN })
	if restart != b.wal.End() {
		t.Errorf("the slot is at %s, want %s", restart, b.wal.End())
	}
	b.want(0, `pg_receivewal: starting log streaming at 0/4100000 (timeline 1)
pg_receivewal: stopped log streaming at 0/4100000 (timeline 1)
`, "", "-n -v -E 0/1 -D "+b.dir)
}

// When it ends, all complete segments are compressed, those of before too.
func TestCompressesCompleteSegmentsBeforeItEnds(t *testing.T) {
	b := newBench(t)
	b.fill(origin + 3*mb + 5000)
	b.run("", "-S walfleet -n -E 0/4101000 -D "+b.dir)
	b.wantFiles("000000010000000000000040", "000000010000000000000041.partial", "archive.json")
	b.want(0, "pg_receivewal: not renaming \"000000010000000000000043.partial\", segment is not complete\n", "", "-S walfleet -n -Z gzip:1 -E 0/4301000 -D "+b.dir)
	b.wantFiles("000000010000000000000040.gz", "000000010000000000000041.gz", "000000010000000000000042.gz", "000000010000000000000043.partial", "archive.json")
	for i, name := range []string{"000000010000000000000040.gz", "000000010000000000000041.gz", "000000010000000000000042.gz"} {
		f, err := os.Open(filepath.Join(b.dir, name))
		if err != nil {
			t.Fatal(err)
		}
		z, err := gzip.NewReader(f)
		if err != nil {
			t.Fatal(err)
		}
		data, err := io.ReadAll(z)
		f.Close()
		if start := origin + wal.LSN(i)*mb; err != nil || !bytes.Equal(data, b.wal.Bytes(start, start+mb)) {
			t.Errorf("%s is not the server's: %v", name, err)
		}
	}
}

func TestSlotActions(t *testing.T) {
	b := newBench(t)
	slot := func() (found bool, restart wal.LSN) {
		b.srv.Do(func(s *pgtest.State) {
			if s.Slots["new"] != nil {
				found, restart = true, s.Slots["new"].RestartLSN
			}
		})
		return found, restart
	}
	b.want(0, "pg_receivewal: creating replication slot \"new\"\n", "", "--create-slot -v -S new")
	if found, restart := slot(); !found || restart != 0 {
		t.Errorf("slot: %t, WAL is reserved from %s", found, restart)
	}
	b.want(1, "pg_receivewal: error: could not send replication command \"CREATE_REPLICATION_SLOT \"new\" PHYSICAL\": ERROR:  replication slot \"new\" already exists\n",
		"", "--create-slot -S new -D /nowhere")
	b.want(0, "", "", "--create-slot -S new --if-not-exists")
	b.want(0, "pg_receivewal: dropping replication slot \"new\"\n", "", "--drop-slot -v -S new")
	if found, _ := slot(); found {
		t.Error("the slot was not dropped")
	}
	b.want(1, "pg_receivewal: error: could not send replication command \"DROP_REPLICATION_SLOT \"new\"\": ERROR:  replication slot \"new\" does not exist\n",
		"", "--drop-slot -S new --if-not-exists")
	b.want(1, "pg_receivewal: error: replication slot \"new\" does not exist\npg_receivewal: error: disconnected\n", "", "-n -S new -D "+b.dir)
}

func TestFirstConnectionThatFailsEndsItEvenWhenLooping(t *testing.T) {
	b := newBench(t)
	b.srv.Do(func(s *pgtest.State) { s.StartupError = pgtest.Fatal("28000", "role \"archiver\" does not exist") })
	const want = "pg_receivewal: error: connection to server at \"127.0.0.1\", port PORT failed: FATAL:  role \"archiver\" does not exist\n"
	b.want(1, want, "", "-D "+b.dir)
	b.want(1, want, "", "--create-slot -S new")
}

func TestWithoutLoopingALostConnectionIsTheEnd(t *testing.T) {
	b := newBench(t)
	b.srv.OnStream = func(st *pgtest.Stream) {} // which closes the connection
	b.want(1, `pg_receivewal: error: could not receive data from WAL stream: server closed the connection unexpectedly
	This probably means the server terminated abnormally
	before or while processing the request.
pg_receivewal: error: disconnected
`, "", "-n -D "+b.dir)
}

// The signal comes once while WAL is streamed, and once while another connection is waited for.
func TestSignalEndsItWell(t *testing.T) {
	signal := func() {
		if err := syscall.Kill(os.Getpid(), syscall.SIGTERM); err != nil {
			t.Error(err)
		}
	}
	t.Run("streaming", func(t *testing.T) {
		b := newBench(t)
		var signals sync.WaitGroup
		b.srv.OnStream = func(st *pgtest.Stream) {
			signals.Go(func() {
				_, _ = st.WaitStatus(t.Context(), func(u pgtest.StatusUpdate) bool { return u.Write == b.wal.End() })
				signal()
				signal() // as timeout(1) does
			})
			st.Serve()
		}
		b.want(0, `pg_receivewal: starting log streaming at 0/4000000 (timeline 1)
pg_receivewal: finished segment at 0/4100000 (timeline 1)
pg_receivewal: received interrupt signal, exiting
pg_receivewal: not renaming "000000010000000000000041.partial", segment is not complete
pg_receivewal: received interrupt signal, exiting
`, "", "-v --synchronous -S walfleet -D "+b.dir)
		signals.Wait() // a late one is not for the next run
		if e := b.srv.Streams()[0].Ended(); !e.CopyDone {
			t.Errorf("no good-bye: %+v", e)
		}
	})
	t.Run("waiting", func(t *testing.T) {
		b := newBench(t)
		b.srv.OnStream = func(st *pgtest.Stream) {}
		var begun time.Time
		waiting := writer(func(p []byte) {
			if bytes.Contains(p, []byte("waiting 5 seconds")) {
				begun = time.Now()
				signal()
			}
		})
		args := strings.Fields("-h 127.0.0.1 -U archiver -d sslmode=disable -v -D " + b.dir + " -p " + b.port)
		var seen bytes.Buffer
		if status := run(args, "1", Streams{strings.NewReader(""), io.Discard, io.MultiWriter(&seen, waiting)}, "/nowhere"); status != 0 {
			t.Errorf("status %d", status)
		}
		if !strings.HasSuffix(seen.String(), "pg_receivewal: disconnected; waiting 5 seconds to try again\npg_receivewal: received interrupt signal, exiting\n") {
			t.Errorf("messages:\n%s", seen.String())
		}
		if took := time.Since(begun); took >= reconnectPause {
			t.Errorf("took %s", took)
		}
	})
}

type writer func(p []byte)

func (w writer) Write(p []byte) (int, error) { w(p); return len(p), nil }

func TestPasswords(t *testing.T) {
	const prompt = "Password: \n"
	b := newBench(t)
	b.srv.Do(func(s *pgtest.State) { s.Password = "open sesame" })
	end := "-n -E 0/1 -D " + b.dir
	const failed = "pg_receivewal: error: connection to server at \"127.0.0.1\", port PORT failed: "
	b.want(0, prompt, "open sesame\n", end)
	b.want(0, prompt, "open sesame", "-W "+end)
	b.want(0, prompt, "open sesame\r\n", "--create-slot -S new")
	b.want(1, prompt+failed+"FATAL:  password authentication failed for user \"archiver\"\n", "wrong\n", "-W "+end)
	b.want(1, prompt+failed+"FATAL:  password authentication failed for user \"archiver\"\n", "wrong\n", end)
	b.want(1, prompt+failed+"fe_sendauth: no password supplied\n", "", end)
	b.want(1, failed+"fe_sendauth: no password supplied\n", "open sesame\n", "-w "+end)
	t.Setenv("PGPASSWORD", "open sesame")
	b.want(0, "", "", end)
	b.want(1, prompt+failed+"FATAL:  password authentication failed for user \"archiver\"\n", "wrong\n", "-W "+end)
	t.Setenv("PGPASSWORD", "wrong")
	b.want(1, failed+"FATAL:  password authentication failed for user \"archiver\"\n", "open sesame\n", end)
	os.Unsetenv("PGPASSWORD")
	passfile := filepath.Join(t.TempDir(), "pass") // whose database is "replication"
	if err := os.WriteFile(passfile, []byte("*:*:replication:archiver:open sesame\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	t.Setenv("PGPASSFILE", passfile)
	b.want(0, "", "", end)
	if err := os.Chmod(passfile, 0o640); err != nil {
		t.Fatal(err)
	}
	b.want(1, "WARNING: password file \""+passfile+"\" has group or world access; permissions should be u=rw (0600) or less\n"+
		failed+"fe_sendauth: no password supplied\n", "", "-w "+end)
}

// What --dbname says counts less than the other options; its database not at all.
func TestConninfo(t *testing.T) {
	b := newBench(t)
	for _, c := range []struct {
		conninfo, env, want string
	}{
		{"host=127.0.0.9 port=1 user=nobody dbname=x sslmode=disable", "", "archiver pg_receivewal"},
		{"user=nobody application_name=mine sslmode=disable", "other", "archiver mine"},
		{"postgresql://nobody@127.0.0.9:1/x?sslmode=disable", "other", "archiver other"},
		{"postgresql://nobody@127.0.0.9:1/x?sslmode=disable&application_name=mine", "", "archiver mine"},
	} {
		t.Setenv("PGAPPNAME", c.env)
		var err bytes.Buffer
		args := []string{"-d", c.conninfo, "-h", "127.0.0.1", "-p", b.port, "-U", "archiver", "-n", "-E0/4101000", "-D", b.dir}
		if status := run(args, "1", Streams{strings.NewReader(""), io.Discard, &err}, "/nowhere"); status != 0 {
			t.Errorf("%s: status %d\n%s", c.conninfo, status, err.String())
			continue
		}
		streams := b.srv.Streams()
		startup := streams[len(streams)-1].Startup()
		if got := startup["user"] + " " + startup["application_name"]; got != c.want || startup["replication"] != "true" {
			t.Errorf("%s: %v", c.conninfo, startup)
		}
	}
}

// The archive is the daemon's: bound to its cluster, and by whom.
func TestAnotherClusterIsRefused(t *testing.T) {
	b := newBench(t)
	b.run("", "-n -E 0/4000001 -D "+b.dir)
	var meta struct {
		SystemID string `json:"system_identifier"`
	}
	data, err := os.ReadFile(filepath.Join(b.dir, "archive.json"))
	if err != nil || json.Unmarshal(data, &meta) != nil || meta.SystemID != "7" {
		t.Fatalf("archive.json: %v\n%s", err, data)
	}
	b.srv.Do(func(s *pgtest.State) { s.SystemID = 8 })
	status, stderr := b.run("", "-D "+b.dir)
	if status != 1 || !strings.Contains(stderr, "system identifier 7, the server has 8") {
		t.Errorf("status %d\n%s", status, stderr)
	}
}
