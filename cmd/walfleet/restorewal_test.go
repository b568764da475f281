package main

import (
	"bytes"
	"errors"
	"fmt"
	"io/fs"
	"math/rand/v2"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// asProgram makes the test's own binary the program, in a process of its own.
const asProgram = "WALFLEET_TEST_AS_PROGRAM"

func TestMain(m *testing.M) {
	switch os.Getenv(asProgram) {
	case "":
		os.Exit(m.Run())
	case "panic":
		dieLoudly()
		go panic("in whatever goroutine")
		select {}
	}
	main()
}

func program(t *testing.T, args ...string) *exec.Cmd {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), self, args...)
	// With the race detector a program sleeps for a second before it ends.
	cmd.Env = append(os.Environ(), asProgram+"=walfleet", "GORACE=atexit_sleep_ms=0")
	return cmd
}

// cluster is a configuration file with an archive of some segments, and the data directory of a server, which is the
// working directory of what it runs.
type cluster struct {
	config, archive, data string
	wal                   *pgtest.WAL
}

func (c cluster) name(n int) string {
	return wal.SegmentSize(1<<20).Segment(1, wal.LSN(n+1)<<20).Name()
}
func (c cluster) bytes(n int) []byte {
	return c.wal.Bytes(wal.LSN(n+1)<<20, wal.LSN(n+2)<<20)
}
func (c cluster) path() string { return filepath.Join(c.data, "pg_wal", "RECOVERYXLOG") }

func newCluster(t *testing.T, segments int) cluster {
	t.Helper()
	dir := t.TempDir()
	c := cluster{filepath.Join(dir, "walfleet.toml"), filepath.Join(dir, "orders"), filepath.Join(dir, "data"), pgtest.NewWAL(pgtest.WALConfig{SystemID: 1})}
	err := errors.Join(os.MkdirAll(filepath.Join(c.data, "pg_wal"), 0o700),
		os.WriteFile(c.config, fmt.Appendf(nil, "archive_dir = %q\n[[cluster]]\nname = \"orders\"\nconninfo = \"host=a\"\n", dir), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	d, err := archive.Open(c.archive)
	if err != nil {
		t.Fatal(err)
	}
	err = d.Bind(archive.Identity{SystemID: 1, SegmentSize: 1 << 20}, archive.Origin{Timeline: 1, LSN: 1 << 20, Source: "slot", Time: time.Now()})
	if err := errors.Join(err, d.Close()); err != nil {
		t.Fatal(err)
	}
	for c.wal.End() < wal.LSN(segments+1)<<20 {
		c.wal.Append(make([]byte, 5000))
	}
	for n := range segments {
		if err := os.WriteFile(filepath.Join(c.archive, c.name(n)), c.bytes(n), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return c
}

// pipe makes a segment's file of the archive one that nothing comes out of before it is written into.
func (c cluster) pipe(t *testing.T, n int) string {
	t.Helper()
	pipe := filepath.Join(c.archive, c.name(n))
	if err := errors.Join(os.Remove(pipe), unix.Mkfifo(pipe, 0o600)); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // whoever waits for a writer finds one, and then the end
		f, err := os.OpenFile(pipe, os.O_RDWR, 0)
		if err := errors.Join(err, os.Remove(pipe), f.Close()); err != nil {
			t.Error(err)
		}
	})
	return pipe
}

// into waits until somebody reads a pipe, and opens it for writing.
func into(t *testing.T, pipe string) *os.File {
	t.Helper()
	for begun := time.Now(); time.Since(begun) < time.Minute; time.Sleep(time.Millisecond) {
		f, err := os.OpenFile(pipe, os.O_WRONLY|unix.O_NONBLOCK, 0)
		if err == nil {
			return f
		}
		if !errors.Is(err, unix.ENXIO) {
			t.Fatal(err)
		}
	}
	t.Fatal("nobody reads it")
	return nil
}

// A server must never take trouble for the end of all WAL.
func TestRestoreWALExitStatus(t *testing.T) {
	c := newCluster(t, 4)
	bad := filepath.Join(t.TempDir(), "bad.toml")
	err := errors.Join(os.Remove(filepath.Join(c.archive, c.name(1))),
		os.Truncate(filepath.Join(c.archive, c.name(3)), 1000),
		os.WriteFile(filepath.Join(c.archive, c.name(4)+".partial"), make([]byte, 1<<20), 0o600),
		os.WriteFile(bad, []byte("archive_dir = 1\n[[cluster]]\nname = 2\n"), 0o600))
	if err != nil {
		t.Fatal(err)
	}
	const path = "pg_wal/RECOVERYXLOG"
	for _, tt := range []struct {
		args   []string
		status int
		says   string // "": nothing at all
	}{
		{[]string{"restore-wal", "orders", c.name(0), path}, 0, ""},
		{[]string{"restore-wal", "--prefetch=2", "--partial", "orders", c.name(0), path}, 0, ""},
		{[]string{"restore-wal", "orders", "00000002.history", "pg_wal/RECOVERYHISTORY"}, 1, ""},
		{[]string{"restore-wal", "orders", c.name(5), path}, 1, ""},
		{[]string{"restore-wal", "orders", c.name(4), path}, 1, "restore-wal orders " + c.name(4) + `: the archive has ` + c.name(4) + `.partial, which is not complete; "restore-wal --partial"`},
		{[]string{"restore-wal", "orders", c.name(1), path}, 200, "which has " + c.name(2)},
		{[]string{"restore-wal", "orders", c.name(3), path}, 200, c.name(3) + " in the archive is damaged"},
		{[]string{"restore-wal", "orders", c.name(0), "nowhere/RECOVERYXLOG"}, 200, "nowhere: no such file or directory"},
		{[]string{"restore-wal", "orders", path, c.name(0)}, 200, "is no name of"},
		{[]string{"restore-wal", "orders", c.name(0)}, 200, "takes a cluster's name, %f and %p; got"},
		{[]string{"restore-wal"}, 200, "takes a cluster's name"},
		{[]string{"restore-wal", "sales", c.name(0), path}, 200, `there is no cluster "sales"`},
		{[]string{"restore-wal", "--archive", c.archive, "orders", c.name(0), path}, 200, "takes %f and %p"},
		{[]string{"restore-wal", "--archive", c.archive + ".gone", c.name(0), path}, 200, "is it mounted?"},
		{[]string{"restore-wal", "--archive", c.data, c.name(0), path}, 200, "not mounted"},
		{[]string{"restore-wal", "--bogus", "orders", c.name(0), path}, 200, "unknown flag"},
		{[]string{"restore-wal", "--prefetch=many", "orders", c.name(0), path}, 200, "invalid argument"},
		{[]string{"restore-wal", "--prefetch=-1", "orders", c.name(0), path}, 200, "--prefetch"},
		{[]string{"restore-wal", "-c", bad, "orders", c.name(0), path}, 200, "bad.toml:1:"},
		{[]string{"restore-wal", "-c", bad + ".gone", "orders", c.name(0), path}, 200, "no such file"},
		{[]string{"--bogus", "restore-wal", "orders", c.name(0), path}, 200, "unknown flag"},
		{[]string{"restore-wall", "orders", c.name(0), path}, 200, `did you mean "restore-wal"?`},
		{[]string{"check", "--bogus"}, 2, "unknown flag"},
	} {
		cmd := program(t, tt.args...)
		cmd.Dir = c.data
		cmd.Env = append(cmd.Env, "WALFLEET_CONFIG="+c.config)
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil {
			t.Fatal(err)
		}
		lines := strings.Count(string(out), "\n")
		if got := cmd.ProcessState.ExitCode(); got != tt.status || !strings.Contains(string(out), tt.says) ||
			tt.says == "" && lines > 0 || tt.says != "" && lines != 1 && tt.status != 2 {
			t.Errorf("walfleet %q: exit status %d, want %d, and one line that says %q:\n%s", tt.args, got, tt.status, tt.says, out)
		}
		if data, err := os.ReadFile(c.path()); (err == nil) != (tt.status == 0) || err == nil && !bytes.Equal(data, c.bytes(0)) {
			t.Errorf("walfleet %q: %d bytes, %v", tt.args, len(data), err)
		}
		os.Remove(c.path())
	}
}

func TestRestoreWALDiesLoudly(t *testing.T) {
	cmd := program(t)
	cmd.Env = append(cmd.Env, asProgram+"=panic")
	out, _ := cmd.CombinedOutput()
	if ws := cmd.ProcessState.Sys().(syscall.WaitStatus); !ws.Signaled() || !strings.Contains(string(out), "in whatever goroutine") {
		t.Errorf("a panic ends it with %s:\n%s", cmd.ProcessState, out)
	}
}

// The signals by which a server, and whoever else, ends it in the middle of a segment, are never taken for the end of all
// WAL, and SIGTERM is what the server expects of it.
func TestRestoreWALIsKilled(t *testing.T) {
	c := newCluster(t, 2)
	pipe := c.pipe(t, 1)
	run := func() *exec.Cmd {
		cmd := program(t, "restore-wal", "--prefetch=0", "--archive", c.archive, c.name(1), c.path())
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		return cmd
	}
	hangups := make(chan os.Signal, 1)
	signal.Notify(hangups, syscall.SIGHUP) // so that the program does not ignore it, as one does that nohup began
	defer signal.Stop(hangups)
	for _, sig := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGABRT, syscall.SIGKILL} {
		for _, n := range []int{0, 1 << 19, 1<<20 - 1} {
			cmd := run()
			f := into(t, pipe)
			if _, err := f.Write(c.bytes(1)[:n]); err != nil { // waits until all but what the pipe holds is read
				t.Fatal(err)
			}
			if err := cmd.Process.Signal(sig); err != nil {
				t.Fatal(err)
			}
			cmd.Wait() // its result stays in ProcessState
			f.Close()
			ws := cmd.ProcessState.Sys().(syscall.WaitStatus)
			by := ws.Signaled() && ws.Signal() == sig
			if !by && (sig == syscall.SIGTERM || ws.ExitStatus() <= 125 || ws.ExitStatus() == 128+int(syscall.SIGTERM)) {
				t.Errorf("%s after %d bytes: %s", sig, n, cmd.ProcessState)
			}
			if _, err := os.Stat(c.path()); !errors.Is(err, fs.ErrNotExist) {
				t.Errorf("%s after %d bytes leaves a file: %v", sig, n, err)
			}
		}
	}
	cmd := run()
	f := into(t, pipe)
	_, err := f.Write(c.bytes(1))
	if err := errors.Join(err, f.Close(), cmd.Wait()); err != nil {
		t.Fatal(err)
	}
	if data, err := os.ReadFile(c.path()); err != nil || !bytes.Equal(data, c.bytes(1)) {
		t.Errorf("after all that: %d bytes, %v", len(data), err)
	}
	if left, _ := filepath.Glob(filepath.Join(c.data, "pg_wal", "pgsql_tmp*")); len(left) > 0 {
		t.Errorf("left: %s", left)
	}
}

// Killed at any moment, to the last step.
func TestRestoreWALIsKilledAtAnyMoment(t *testing.T) {
	c := newCluster(t, 8)
	n := 60
	if os.Getenv("WALFLEET_TORTURE") != "" {
		n = 2000
	}
	begun := time.Now()
	if err := program(t, "restore-wal", "--archive", c.archive, c.name(0), c.path()).Run(); err != nil {
		t.Fatal(err)
	}
	whole := time.Since(begun)
	killed := 0
	for i := range n {
		os.Remove(c.path())
		cmd := program(t, "restore-wal", "--prefetch=3", "--archive", c.archive, c.name(i%8), c.path())
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		time.Sleep(time.Duration(rand.Int64N(int64(whole) * 2))) // the moment
		cmd.Process.Kill()
		err := cmd.Wait()
		data, readErr := os.ReadFile(c.path())
		switch {
		case readErr == nil && !bytes.Equal(data, c.bytes(i%8)):
			t.Errorf("%d bytes that are not the segment's", len(data))
		case err == nil && readErr != nil:
			t.Error(readErr)
		case err != nil:
			killed++
		}
	}
	if killed == 0 || killed == n {
		t.Errorf("%d of %d were killed", killed, n)
	}
}

// The process that makes the next segments ready neither keeps the server waiting nor has anything of its open.
func TestRestoreWALDoesNotWaitForPrefetch(t *testing.T) {
	c := newCluster(t, 3)
	pipe := c.pipe(t, 1)
	cmd := program(t, "restore-wal", "--prefetch=2", "--archive", c.archive, c.name(0), c.path())
	if out, err := cmd.CombinedOutput(); err != nil { // which reads to the end of what the process and its children write
		t.Fatalf("%v\n%s", err, out)
	}
	f := into(t, pipe) // it does that at this moment
	_, err := f.Write(make([]byte, 1<<20))
	if err := errors.Join(f.Close(), os.RemoveAll(filepath.Join(c.data, "pg_wal"))); err != nil {
		t.Fatal(err)
	}
	if err != nil && !errors.Is(err, unix.EPIPE) {
		t.Fatal(err)
	}
}
