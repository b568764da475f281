package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// What restore-wal gives a name was synced before: a power loss leaves no file that is taken for a segment, at the server's
// place or among those that are ready, and has not its bytes.
func TestRestoreWALSyncsBeforeItNames(t *testing.T) {
	if out, err := exec.Command("strace", "-qq", "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("NOT TESTED: no system calls can be traced here (Debian's package strace): %v %s", err, out)
	}
	c := newCluster(t, 3)
	trace := filepath.Join(t.TempDir(), "trace")
	run := program(t, "restore-wal", "--prefetch=1", "--archive", c.archive, c.name(0), c.path())
	cmd := exec.CommandContext(t.Context(), "strace", append([]string{"-f", "-y", "-qq", "-s", "500", "-o", trace,
		"-e", "trace=fsync,fdatasync,rename,renameat,renameat2"}, run.Args...)...)
	cmd.Env = run.Env
	if out, err := cmd.CombinedOutput(); err != nil { // until the process that makes segments ready has ended, too
		t.Fatalf("%v\n%s", err, out)
	}
	calls, err := os.ReadFile(trace)
	if err != nil {
		t.Fatal(err)
	}
	lines := strings.Split(string(calls), "\n")
	find := func(from int, pattern string) int {
		t.Helper()
		re := regexp.MustCompile(pattern)
		for i := from; i < len(lines); i++ {
			if re.MatchString(lines[i]) {
				return i
			}
		}
		t.Errorf("no %s after line %d of\n%s", pattern, from, strings.Join(lines, "\n"))
		return len(lines)
	}
	synced := find(0, `sync\(\d+<[^>]*/pg_wal/pgsql_tmp\.walfleet\.RECOVERYXLOG\.0>\) += 0`)
	named := find(synced, `rename.*pgsql_tmp\.walfleet\.RECOVERYXLOG\.0".*/pg_wal/RECOVERYXLOG"`)
	find(named, `sync\(\d+<[^>]*/pg_wal>\) += 0`)

	ready := c.name(1) + `\.[0-9a-f]+`
	synced = find(0, `sync\(\d+<[^>]*/`+ready+`\.tmp>\) += 0`)
	find(synced, `rename.*`+ready+`\.tmp".*`+ready+`"`)
}
