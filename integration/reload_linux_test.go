package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"github.com/walfleet/walfleet/fleet"
)

// reload runs "walfleet reload --json" for a program, and returns the outcome.
func (p *program) reload(t testing.TB) fleet.Outcome {
	t.Helper()
	cmd := command(t, "reload", "--json", "-c", p.config)
	text, err := cmd.Output()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatal(err)
	}
	var out fleet.Outcome
	if err := json.Unmarshal(text, &out); err != nil {
		t.Fatalf("%v: %q", err, text)
	}
	if (out.Error != "") != (exit != nil) {
		t.Errorf("exit status %v for %+v", exit, out)
	}
	return out
}

// show runs a command for people, and logs what it prints.
func (p *program) show(t testing.TB, args ...string) string {
	t.Helper()
	text, err := command(t, append(args, "-c", p.config)...).CombinedOutput()
	t.Logf("walfleet %s: %v\n%s", strings.Join(args, " "), err, text)
	return string(text)
}

// held is what a process has of what a reload could leave behind.
type held struct{ descriptors, sockets, locks, walsenders, threads int }

func (p *program) held(t testing.TB, s *server) (h held) {
	t.Helper()
	dir := fmt.Sprintf("/proc/%d", p.cmd.Process.Pid)
	entries, err := os.ReadDir(dir + "/fd")
	if err != nil {
		t.Fatal(err)
	}
	h.descriptors = len(entries)
	for _, e := range entries {
		if target, err := os.Readlink(filepath.Join(dir, "fd", e.Name())); err == nil && strings.HasPrefix(target, "socket:") {
			h.sockets++
		} else if err == nil && strings.HasSuffix(target, "/.lock") {
			h.locks++
		}
	}
	if entries, err = os.ReadDir(dir + "/task"); err != nil {
		t.Fatal(err)
	}
	h.threads = len(entries)
	fmt.Sscan(s.value(t, "SELECT count(*) FROM pg_stat_replication"), &h.walsenders)
	return h
}

// TestReloadsLeakNothing is an operator's life at high speed: 200 reloads that start, stop, restart and adjust clusters
// while all of them are written to. The kept and the adjusted cluster keep their walsender, no connection, descriptor or
// lock is left behind, and no byte is missing.
func TestReloadsLeakNothing(t *testing.T) {
	t.Parallel()
	const reloads = 200
	// A connection that is given up before the server has answered stays there for a while.
	s := startServer(t, serverOptions{segment: megabyte, settings: []string{"max_wal_senders = 60"}})
	dir := t.TempDir()
	config := func(i int) string {
		one := func(name string, settings ...string) string {
			return cluster(name, s.conninfo(), append(settings, fmt.Sprintf("slot = %q", name))...)
		}
		clusters := []string{
			one("kept"),
			one("adjusted", fmt.Sprintf(`status_interval = "%ds"`, 1+i%2), fmt.Sprintf(`min_free = "%dMB"`, 1+i%2)),
			one("changed", fmt.Sprintf(`application_name = "n%d"`, i%2)),
		}
		if i%2 == 1 {
			clusters = append(clusters, one("flapping"))
		}
		return configText(dir, clusters...)
	}
	p := startProgram(t, config(1))
	load := startLoad(t, s)
	load.await(t, 50)
	all := []string{"kept", "adjusted", "changed", "flapping"}
	pid := func(slot string) string { return awaitSlotFlushed(t, s, slot, s.end(t)).pid }
	for _, name := range all {
		pid(name)
	}
	kept, adjusted := pid("kept"), pid("adjusted")

	reload := func(i int) {
		p.configure(t, config(i))
		out := p.reload(t)
		want := "started flapping; restarted changed; adjusted adjusted; kept 1"
		if i%2 == 0 {
			want = "restarted changed; adjusted adjusted; stopped flapping; kept 1"
		}
		if got := out.Plan.String(); got != want || out.Error != "" {
			t.Fatalf("reload %d: %s, %s, want %s", i, got, out.Error, want)
		}
		if i%4 == 1 { // or the next reload stops what has not begun to stream
			pid("changed")
			pid("flapping")
		}
	}
	rest := func() (h held) { // with three clusters
		for _, name := range all[:3] {
			pid(name)
		}
		await(t, patience, "three walsenders", func() (bool, string) {
			h = p.held(t, s)
			return h.walsenders == 3, fmt.Sprintf("%+v", h)
		})
		return h
	}
	for i := range 11 { // what is made once is there then
		reload(i)
	}
	before := rest()
	for i := range reloads {
		reload(11 + i)
	}
	after := rest()
	t.Logf("%d reloads: before %+v, after %+v", reloads, before, after)
	if after.descriptors > before.descriptors || after.sockets > before.sockets || after.locks != 3 {
		t.Errorf("left behind: before %+v, after %+v", before, after)
	}
	if now := pid("kept"); now != kept {
		t.Errorf("the kept cluster's walsender was %s and is %s", kept, now)
	}
	if now := pid("adjusted"); now != adjusted {
		t.Errorf("the adjusted cluster's walsender was %s and is %s", adjusted, now)
	}

	// What a person sees of it.
	p.configure(t, configText(dir, "\nbroken = \n"))
	if text := p.show(t, "reload"); !strings.Contains(text, "nothing changed") || !strings.Contains(text, p.config+":3:") {
		t.Errorf("a broken file: %s", text)
	}
	p.signal(t, syscall.SIGHUP)
	p.stderr.await(t, "reload refused, nothing changed")
	if text := p.show(t, "status"); !strings.Contains(text, "LAST RELOAD FAILED") || !strings.Contains(text, "3 clusters: 3 streaming") {
		t.Errorf("after it: %s", text)
	}
	p.configure(t, config(11))
	p.show(t, "reload")
	p.show(t, "status", "kept")
	for _, name := range all {
		pid(name)
	}
	load.stop()
	for _, name := range all {
		pid(name)
	}
	p.signal(t, syscall.SIGTERM)
	if status := p.exit(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	p.show(t, "status")
	for _, name := range all {
		if countSealed(compareStopped(t, filepath.Join(dir, name), s, name)) == 0 {
			t.Errorf("%s: no sealed segment", name)
		}
	}
	if log := p.stderr.String(); strings.Contains(log, "locked by another") || strings.Contains(log, "panic") || strings.Contains(log, password) {
		t.Error("a receiver was started on top of another, one panicked, or the log shows the password")
	}
}
