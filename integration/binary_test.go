package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// walfleet is the program, built once when a test first needs it.
var walfleet struct {
	path  string
	build sync.Once
	err   error
}

// program is a "walfleet run" as an operator has it.
type program struct {
	cmd    *exec.Cmd
	config string // the configuration file
	stderr logBuffer
	ended  chan struct{}
}

// command prepares to run walfleet.
func command(t testing.TB, args ...string) *exec.Cmd {
	t.Helper()
	walfleet.build.Do(func() {
		out, err := exec.Command("go", "build", "-o", walfleet.path, "../cmd/walfleet").CombinedOutput()
		if err != nil {
			walfleet.err = fmt.Errorf("go build: %w\n%s", err, out)
		}
	})
	if walfleet.err != nil {
		t.Fatal(walfleet.err)
	}
	return exec.Command(walfleet.path, args...)
}

// startProgram runs walfleet with a configuration file of this content, under another program where that is given.
func startProgram(t testing.TB, config string, under ...string) *program {
	t.Helper()
	p := &program{config: filepath.Join(t.TempDir(), "walfleet.toml"), ended: make(chan struct{})}
	p.configure(t, config)
	p.cmd = command(t, "run", "-c", p.config)
	if len(under) > 0 {
		p.cmd = exec.Command(under[0], append(under[1:], p.cmd.Args...)...)
	}
	p.cmd.Stderr = &p.stderr
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.ended)
		p.cmd.Wait() // its result stays in ProcessState
	}()
	t.Cleanup(func() {
		p.cmd.Process.Kill()
		<-p.ended
		if t.Failed() {
			t.Logf("walfleet's standard error:\n%s", &p.stderr)
		}
	})
	return p
}

// configure replaces the configuration file.
func (p *program) configure(t testing.TB, config string) {
	t.Helper()
	if err := os.WriteFile(p.config, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
}

func (p *program) signal(t testing.TB, sig os.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(sig); err != nil {
		t.Fatal(err)
	}
}

// exit waits for the program's end, and returns its exit status; -1 is the status of one that a signal has ended.
func (p *program) exit(t testing.TB) int {
	t.Helper()
	select {
	case <-p.ended:
	case <-time.After(patience):
		t.Fatalf("walfleet does not end")
	}
	return p.cmd.ProcessState.ExitCode()
}

// awaitSlotFlushed waits until the walsender of a slot says that everything before lsn is flushed.
func awaitSlotFlushed(t testing.TB, s *server, slot string, lsn wal.LSN) (last sender) {
	t.Helper()
	await(t, patience, fmt.Sprintf("flush_lsn of slot %s at %s", slot, lsn), func() (bool, string) {
		last = s.sender(t, slot)
		return last.flush >= lsn, fmt.Sprintf("%+v", last)
	})
	return last
}

// compareStopped is compareArchive after a program has ended well: its slot is where it acknowledged WAL last. One
// that had no time for a good-bye may have sealed segments after that.
func compareStopped(t testing.TB, dir string, s *server, slot string) []stored {
	t.Helper()
	st := receiver.Status{Timeline: 1, SegmentSize: s.size,
		Flushed: s.lsn(t, "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = '"+slot+"'")}
	segments, _ := listArchive(t, dir, s.size)
	for _, segment := range segments {
		if segment.sealed {
			st.Flushed = max(st.Flushed, segment.End())
		}
	}
	return compareArchive(t, dir, st, origins{1: s})
}

// TestReloadUnderLoad adds, removes and changes clusters with SIGHUP while all of them are written to.
func TestReloadUnderLoad(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{segment: megabyte})
	dir := t.TempDir()
	one := func(name string, settings ...string) string {
		return cluster(name, s.conninfo(), append(settings, fmt.Sprintf("slot = %q", name))...)
	}
	p := startProgram(t, configText(dir, one("kept"), one("changed"), one("removed")))
	load := startLoad(t, s)
	load.await(t, 200)
	pids := func(slots ...string) map[string]string {
		found := map[string]string{}
		for _, slot := range slots {
			found[slot] = awaitSlotFlushed(t, s, slot, s.end(t)).pid
		}
		return found
	}
	before := pids("kept", "changed", "removed")

	p.configure(t, configText(dir, one("added"), one("changed", "synchronous = false", `flush_interval = "100ms"`), one("kept")))
	p.signal(t, syscall.SIGHUP)
	p.stderr.await(t, "msg=reloaded", `done="started added; restarted changed; stopped removed; kept 1"`)
	p.stderr.await(t, "cluster=removed", "slot", "retains WAL")
	load.await(t, 100)
	after := pids("kept", "changed", "added")
	if after["kept"] != before["kept"] {
		t.Errorf("the untouched cluster's walsender was %s and is %s", before["kept"], after["kept"])
	}
	if after["changed"] == before["changed"] {
		t.Errorf("the changed cluster still has the walsender %s", before["changed"])
	}
	if got := s.value(t, "SELECT active FROM pg_replication_slots WHERE slot_name = 'removed'"); got != "f" {
		t.Errorf("is the removed cluster's slot active? %s", got)
	}

	// Nothing changes when a file is broken anywhere.
	for _, broken := range []struct{ text, config string }{
		{"walfleet.toml:8:", configText(dir, one("kept"), "\nname =")},
		{"no_such_key", configText(dir, one("other", "no_such_key = 1"))},
		{`slot \"kept\"`, configText(dir, one("kept"), cluster("again", s.conninfo(), `slot = "kept"`))},
	} {
		p.configure(t, broken.config)
		p.signal(t, syscall.SIGHUP)
		p.stderr.await(t, "level=ERROR", "reload refused, nothing changed", broken.text)
	}
	load.await(t, 50)
	if still := pids("kept", "changed", "added"); fmt.Sprint(still) != fmt.Sprint(after) {
		t.Errorf("walsenders were %v, and are %v after files that were refused", after, still)
	}

	load.stop()
	pids("kept", "changed", "added")
	p.signal(t, syscall.SIGTERM)
	if status := p.exit(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	for _, name := range []string{"kept", "changed", "added", "removed"} {
		segments := compareStopped(t, filepath.Join(dir, name), s, name)
		if countSealed(segments) == 0 {
			t.Errorf("%s: no sealed segment", name)
		}
	}
}

// TestRunsAsProgram is the program's life from start to SIGTERM, seen from outside.
func TestRunsAsProgram(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{segment: megabyte})
	dir := t.TempDir()
	config := configText(dir, cluster("orders", s.conninfo()),
		cluster("nowhere", fmt.Sprintf("host=%s port=%d user=walfleet sslmode=disable", host, freePort(t))))
	orders := filepath.Join(dir, "orders")
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		p := startProgram(t, config)
		load := startLoad(t, s)
		p.stderr.await(t, "caught up, streaming", "cluster=orders", "timeline=1", "lsn=")
		p.stderr.await(t, "segment sealed", "cluster=orders")
		p.stderr.await(t, "not archiving", "cluster=nowhere", "connection refused")
		p.signal(t, sig)
		status := p.exit(t) // 1 when the shutdown took too long
		load.stop()
		if status != 0 {
			t.Errorf("%s: exit status %d", sig, status)
		}
		p.stderr.await(t, "walfleet stopped")
		if strings.Contains(p.stderr.String(), password) {
			t.Error("the log shows the password")
		}
		compareStopped(t, orders, s, "walfleet")
	}

	t.Run("and loses nothing when it is killed", func(t *testing.T) {
		checked := acknowledged(t, s, "walfleet")
		for range 3 {
			p := startProgram(t, config)
			load := startLoad(t, s)
			p.stderr.await(t, "segment sealed", "cluster=orders")
			p.signal(t, syscall.SIGKILL)
			p.exit(t)
			load.stop()
			checked, _ = checkAcknowledged(t, orders, s, "walfleet", checked)
		}
		p := startProgram(t, config)
		awaitSlotFlushed(t, s, "walfleet", s.end(t))
		p.signal(t, syscall.SIGTERM)
		if status := p.exit(t); status != 0 {
			t.Errorf("exit status %d", status)
		}
		compareStopped(t, orders, s, "walfleet")
	})
}

// TestRefusesToStart has configurations that do not begin to run: exit status 1, and the place of the error.
func TestRefusesToStart(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	good := cluster("orders", "host=127.0.0.1 password="+password)
	tests := []struct {
		name, config string
		stderr       string // a regular expression
	}{
		{"no cluster", configText(dir), `walfleet\.toml: no \[\[cluster\]\]`},
		{"syntax", configText(dir, good, "slot = 'open\n"), `walfleet\.toml:7:\d+: `},
		{"unknown key", configText(dir, good, "slott = 'a'\n"), `walfleet\.toml:7: .*slott`},
		{"duplicate name", configText(dir, good, good), `walfleet\.toml:9: .*orders.*line 4`},
		{"unsafe name", configText(dir, cluster("../x", "host=a")), `walfleet\.toml:4: .*\.\./x`},
		{"conninfo", configText(dir, cluster("orders", "host=a password=never-shown-anywhere nonsense")), `walfleet\.toml:5: `},
		{"directory", configText("relative", good), `walfleet\.toml:1: archive_dir`},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := startProgram(t, tt.config)
			status := p.exit(t)
			text := p.stderr.String()
			if matched, err := regexp.MatchString(tt.stderr, text); err != nil || !matched || status != 1 {
				t.Errorf("exit status %d, %q; want 1, and %s", status, text, tt.stderr)
			}
			if strings.Contains(text, password) {
				t.Errorf("the password is shown: %s", text)
			}
		})
	}
	t.Run("no file", func(t *testing.T) {
		out, err := command(t, "run", "-c", filepath.Join(dir, "missing.toml")).CombinedOutput()
		if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 1 || !strings.Contains(string(out), "missing.toml") {
			t.Errorf("%v: %s", err, out)
		}
	})
	t.Run("usage", func(t *testing.T) {
		out, err := command(t, "run", "--no-such-flag").CombinedOutput()
		if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 2 {
			t.Errorf("%v: %s", err, out)
		}
	})
}
