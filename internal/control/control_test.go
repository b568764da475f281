package control

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/walfleet/walfleet/receiver"
)

// oneCluster is a fleet whose one cluster is halted by a gap.
type oneCluster struct{ asked []string }

func (f *oneCluster) Decide(_ context.Context, cluster string, what receiver.Decision) (string, error) {
	f.asked = append(f.asked, cluster+" "+string(what))
	if cluster != "orders.eu" || what != receiver.AcceptGap {
		return "", errors.New("it is something else")
	}
	return "gap recorded", nil
}

// serve answers commands in a directory of its own until the test ends. Paths of sockets are short.
func serve(t *testing.T, fleet decider) (dir string, stop func()) {
	t.Helper()
	dir, err := os.MkdirTemp("", "walfleet-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	l, err := Listen(dir)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- Serve(ctx, l, fleet) }()
	stopped := false
	stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-ended; err != nil {
			t.Errorf("Serve: %v", err)
		}
	}
	t.Cleanup(stop)
	return dir, stop
}

func TestDecisionReachesTheFleetAndIsAnswered(t *testing.T) {
	var fleet oneCluster
	dir, _ := serve(t, &fleet)
	if done, err := Decide(t.Context(), dir, "orders.eu", receiver.AcceptGap); done != "gap recorded" || err != nil {
		t.Errorf("%q, %v", done, err)
	}
	for _, cluster := range []string{"orders.eu", "../orders", "a b?c#d"} {
		if done, err := Decide(t.Context(), dir, cluster, receiver.AcceptDivergence); done != "" || err == nil || err.Error() != "it is something else" {
			t.Errorf("%s: %q, %v", cluster, done, err)
		}
	}
	want := "orders.eu accept-gap|orders.eu accept-divergence|../orders accept-divergence|a b?c#d accept-divergence"
	if got := strings.Join(fleet.asked, "|"); got != want {
		t.Errorf("the fleet was asked %q, want %q", got, want)
	}
	if _, err := Decide(t.Context(), dir, "orders", "no-such-decision"); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("an unknown decision: %v", err)
	}
}

func TestSocketIsForItsUserAlone(t *testing.T) {
	dir, stop := serve(t, &oneCluster{})
	info, err := os.Stat(filepath.Join(dir, socketName))
	if err != nil || info.Mode() != fs.ModeSocket|0o600 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	stop()
	if _, err := os.Stat(filepath.Join(dir, socketName)); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the socket is still there: %v", err)
	}
}

func TestSocketOfADeadDaemonIsReplacedAndNoOther(t *testing.T) {
	dir, _ := serve(t, &oneCluster{})
	if _, err := Listen(dir); err == nil || !strings.Contains(err.Error(), "another walfleet answers") {
		t.Errorf("a second daemon: %v", err)
	}

	dead := t.TempDir()
	l, err := net.Listen("unix", filepath.Join(dead, socketName))
	if err != nil {
		t.Skipf("NOT TESTED: the temporary directory's path is too long for a socket: %v", err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	l.Close()
	if l, err = Listen(dead); err != nil {
		t.Fatalf("after a daemon that died: %v", err)
	}
	l.Close()

	file := filepath.Join(dead, socketName)
	if err := os.WriteFile(file, []byte("mine"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := Listen(dead); err == nil {
		t.Error("a file that is no socket was replaced")
	}
}

func TestErrorsSayWhatToDo(t *testing.T) {
	_, err := Decide(t.Context(), t.TempDir(), "orders", receiver.AcceptGap)
	if err == nil || !strings.Contains(err.Error(), "no walfleet answers at") || !strings.Contains(err.Error(), "is it running") {
		t.Errorf("no daemon: %v", err)
	}
	long := filepath.Join(t.TempDir(), strings.Repeat("long/", 30))
	if _, err := Listen(long); err == nil || !strings.Contains(err.Error(), "set runtime_dir to a shorter one") {
		t.Errorf("a long path: %v", err)
	}
}
