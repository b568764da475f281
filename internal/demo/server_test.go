//go:build unix

package demo

import (
	"bytes"
	"context"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// scriptServer answers with a shell script instead of psql.
type scriptServer struct {
	server
	script string
}

func (s scriptServer) psql(ctx context.Context) *exec.Cmd {
	return exec.CommandContext(ctx, "sh", "-c", s.script)
}

// echoing is a psql that answers each statement with the word "answer" and
// stands still at one that contains "hang".
const echoing = `
while read -r line; do
	case $line in
	*hang*) exec sleep 1000 ;;
	*fail*) echo "ERROR: it failed" >&2; exit 3 ;;
	"\\echo "*) echo "${line#?echo }" ;;
	*) echo answer ;;
	esac
done`

func TestSession(t *testing.T) {
	db, err := connect(t.Context(), scriptServer{script: echoing})
	if err != nil {
		t.Fatal(err)
	}
	for range 3 {
		rows, err := db.query(t.Context(), "SELECT 'answer'")
		if err != nil || !slices.Equal(rows, []string{"answer"}) {
			t.Fatalf("got %q, %v", rows, err)
		}
	}
	if err := db.close(); err != nil {
		t.Errorf("close: %v", err)
	}
}

// TestSessionDeadline: a commit that nobody confirms does not hang the demo.
func TestSessionDeadline(t *testing.T) {
	db, err := connect(t.Context(), scriptServer{script: echoing})
	if err != nil {
		t.Fatal(err)
	}
	late := errors.New("too late")
	ctx, cancel := context.WithTimeoutCause(t.Context(), 50*time.Millisecond, late)
	defer cancel()
	begin := time.Now()
	if _, err := db.query(ctx, "hang"); !errors.Is(err, late) {
		t.Errorf("error %v, want %v", err, late)
	}
	if took := time.Since(begin); took > 30*time.Second {
		t.Errorf("took %s", took)
	}
}

func TestSessionError(t *testing.T) {
	err := once(t.Context(), scriptServer{script: echoing}, func(db *session) error {
		_, err := db.query(t.Context(), "fail")
		return err
	})
	if err == nil || !strings.Contains(err.Error(), "it failed") {
		t.Errorf("error %v, want what psql said", err)
	}
	if _, err := connect(t.Context(), scriptServer{script: "echo refused >&2; exit 2"}); err == nil || !strings.Contains(err.Error(), "refused") {
		t.Errorf("error %v, want what psql said", err)
	}
}

// TestKillTree: SIGKILL reaches each process of a server, also those that lead
// a process group of their own, as PostgreSQL's do.
func TestKillTree(t *testing.T) {
	cmd := exec.Command("sh", "-c", "set -m; sleep 1000 & sleep 1000 & wait")
	ownGroup(cmd)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	for len(children(cmd.Process.Pid)) < 2 {
		time.Sleep(time.Millisecond)
	}
	killed := killTree(cmd.Process.Pid)
	if err := cmd.Wait(); err == nil {
		t.Error("the parent ended well")
	}
	if len(killed) != 2 {
		t.Errorf("%d children, want 2", len(killed))
	}
	deadline := time.Now().Add(30 * time.Second)
	for slices.ContainsFunc(killed, alive) {
		if time.Now().After(deadline) {
			t.Fatalf("of %d some are alive", killed)
		}
		time.Sleep(time.Millisecond)
	}
}

func TestMakeHole(t *testing.T) {
	for name, data := range map[string][]byte{
		"zeros at the end":   append([]byte("data"), make([]byte, 3<<20)...),
		"all zeros":          make([]byte, 2<<20),
		"no zeros":           bytes.Repeat([]byte{1}, 2<<20),
		"last byte not zero": append(make([]byte, 2<<20), 1),
		"empty":              nil,
	} {
		file := filepath.Join(t.TempDir(), "segment")
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
		if err := makeHole(file); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(file); err != nil || !bytes.Equal(got, data) {
			t.Errorf("%s: the content changed (%v)", name, err)
		}
	}
}

// TestEnvironment: variables of libpq do not lead the demo to another server.
func TestEnvironment(t *testing.T) {
	t.Setenv("PGHOST", "production")
	t.Setenv("PGSERVICE", "production")
	env := primary{password: "secret"}.environment()
	if slices.ContainsFunc(env, func(v string) bool { return strings.Contains(v, "production") }) {
		t.Errorf("%q", env)
	}
	if !slices.Contains(env, "PGPASSWORD=secret") {
		t.Error("no password")
	}
}

// TestSettings: a server refuses to start with a min_wal_size of less than two
// segments (check_min_wal_size in xlog.c).
func TestSettings(t *testing.T) {
	for _, test := range []struct {
		p    primary
		want []string
	}{
		{primary{size: 16 << 20}, []string{"min_wal_size=32MB", "max_wal_size=1024MB"}},
		{primary{size: 1 << 30}, []string{"min_wal_size=2048MB", "max_wal_size=8192MB"}},
	} {
		for _, want := range test.want {
			if got := test.p.settings(); !slices.Contains(got, want) {
				t.Errorf("%s is not in %q", want, got)
			}
		}
	}
}

func TestPassable(t *testing.T) {
	open := t.TempDir()
	closed := filepath.Join(open, "closed")
	inside := filepath.Join(closed, "inside")
	if err := os.MkdirAll(inside, 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.Chmod(closed, 0o700); err != nil {
		t.Fatal(err)
	}
	if passable(inside) {
		t.Errorf("%s is below a directory that others may not enter", inside)
	}
	if !passable("/") {
		t.Error("not even / is passable")
	}
}
