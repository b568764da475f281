package control

import (
	"context"
	"errors"
	"io/fs"
	"net"
	"os"
	"path/filepath"
	"reflect"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// oneCluster is a daemon whose one cluster is halted by a gap.
type oneCluster struct {
	asked  []string
	reload func(ctx context.Context) fleet.Outcome
}

func (f *oneCluster) Reload(ctx context.Context, file string) fleet.Outcome {
	f.asked = append(f.asked, "reload "+file)
	return f.reload(ctx)
}

func (f *oneCluster) Preview(file string, content []byte) fleet.Outcome {
	f.asked = append(f.asked, "preview "+file+" "+string(content))
	return fleet.Outcome{File: file, Plan: fleet.Plan{Adjust: []string{"a"}}}
}

func (f *oneCluster) Report() fleet.Report {
	lag := int64(5)
	return fleet.Report{
		Daemon:   &fleet.DaemonReport{PID: 7, Version: "v1"},
		Clusters: []fleet.ClusterReport{{Name: "orders.eu", State: "halted", LagBytes: &lag, Settings: map[string]any{"min_free": "1GB"}}},
	}
}

func (f *oneCluster) ReportOf(cluster string) (fleet.Report, bool) {
	r, ok := f.Report().Cluster(cluster)
	if ok {
		r.Clusters[0].Events = []fleet.EventReport{{Level: "info", Text: "connected"}}
	}
	return r, ok
}

func (f *oneCluster) Decide(_ context.Context, cluster string, what receiver.Decision) (string, error) {
	f.asked = append(f.asked, cluster+" "+string(what))
	if cluster != "orders.eu" || what != receiver.AcceptGap {
		return "", errors.New("it is something else")
	}
	return "gap recorded", nil
}

func (f *oneCluster) Prune(_ context.Context, cluster string, before wal.LSN) ([]string, error) {
	f.asked = append(f.asked, cluster+" prune "+before.String())
	if cluster != "orders.eu" {
		return []string{"000000010000000000000001"}, errors.New("the disk is read-only")
	}
	return []string{"000000010000000000000001", "000000010000000000000002.gz"}, nil
}

func TestPruneReachesTheFleetAndIsAnswered(t *testing.T) {
	var d oneCluster
	dir, _ := serve(t, &d)
	if removed, err := Prune(t.Context(), dir, "orders.eu", 0x1300000000); len(removed) != 2 || err != nil {
		t.Errorf("%q, %v", removed, err)
	}
	if removed, err := Prune(t.Context(), dir, "../orders", 0x10); len(removed) != 1 || err == nil || err.Error() != "the disk is read-only" {
		t.Errorf("%q, %v", removed, err)
	}
	if want := "orders.eu prune 13/0|../orders prune 0/10"; strings.Join(d.asked, "|") != want {
		t.Errorf("the fleet was asked %q, want %q", d.asked, want)
	}
}

// serve answers commands in a directory of its own until the test ends. Paths of sockets are short.
func serve(t *testing.T, d daemon) (dir string, stop func()) {
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
	go func() { ended <- Serve(ctx, l, d) }()
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
	var d oneCluster
	dir, _ := serve(t, &d)
	if done, err := Decide(t.Context(), dir, "orders.eu", receiver.AcceptGap); done != "gap recorded" || err != nil {
		t.Errorf("%q, %v", done, err)
	}
	for _, cluster := range []string{"orders.eu", "../orders", "a b?c#d"} {
		if done, err := Decide(t.Context(), dir, cluster, receiver.AcceptDivergence); done != "" || err == nil || err.Error() != "it is something else" {
			t.Errorf("%s: %q, %v", cluster, done, err)
		}
	}
	want := "orders.eu accept-gap|orders.eu accept-divergence|../orders accept-divergence|a b?c#d accept-divergence"
	if got := strings.Join(d.asked, "|"); got != want {
		t.Errorf("the fleet was asked %q, want %q", got, want)
	}
	if _, err := Decide(t.Context(), dir, "orders", "no-such-decision"); err == nil || !strings.Contains(err.Error(), "404") {
		t.Errorf("an unknown decision: %v", err)
	}
}

func TestStatusIsTheDaemonsReport(t *testing.T) {
	var d oneCluster
	dir, _ := serve(t, &d)
	got, err := Status(t.Context(), dir, "")
	if want := d.Report(); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	got, err = Status(t.Context(), dir, "orders.eu")
	if want, _ := d.ReportOf("orders.eu"); err != nil || !reflect.DeepEqual(got, want) || len(got.Clusters[0].Events) != 1 {
		t.Errorf("one cluster: %+v, %v, want %+v", got, err, want)
	}
	if got, err = Status(t.Context(), dir, "../orders"); err != nil || len(got.Clusters) != 0 || got.Daemon == nil {
		t.Errorf("a cluster that there is not: %+v, %v", got, err)
	}
}

func TestReloadReturnsTheOutcomeHoweverLongItTakes(t *testing.T) {
	begun, goOn := make(chan struct{}), make(chan struct{})
	d := oneCluster{reload: func(ctx context.Context) fleet.Outcome {
		close(begun)
		<-goOn
		if ctx.Err() != nil {
			return fleet.Outcome{Error: "given up"}
		}
		return fleet.Outcome{Applied: true, Error: "c does not stop", Stuck: []string{"c"}, Plan: fleet.Plan{Start: []string{"a"}, Changed: map[string][]string{"x": {"slot"}}}}
	}}
	dir, _ := serve(t, &d)
	go func() {
		<-begun
		close(goOn)
	}()
	got, err := Reload(t.Context(), dir, "/etc/wal fleet.toml", time.Minute)
	want := fleet.Outcome{Applied: true, Error: "c does not stop", Stuck: []string{"c"}, Plan: fleet.Plan{Start: []string{"a"}, Changed: map[string][]string{"x": {"slot"}}}}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	if len(d.asked) != 1 || d.asked[0] != "reload /etc/wal fleet.toml" {
		t.Errorf("asked %q", d.asked)
	}
}

func TestPreviewSendsTheContent(t *testing.T) {
	var d oneCluster
	dir, _ := serve(t, &d)
	got, err := Preview(t.Context(), dir, "/etc/new file.toml", []byte("a = 1\n"))
	if want := (fleet.Outcome{File: "/etc/new file.toml", Plan: fleet.Plan{Adjust: []string{"a"}}}); err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v, want %+v", got, err, want)
	}
	if len(d.asked) != 1 || d.asked[0] != "preview /etc/new file.toml a = 1\n" {
		t.Errorf("asked %q", d.asked)
	}
	got, err = Preview(t.Context(), dir, "new.toml", make([]byte, maxConfig+1))
	if err == nil && !strings.Contains(got.Error, "too large") || len(d.asked) != 1 {
		t.Errorf("a file that is too large: %+v, %v", got, err)
	}
}

// A reload that has begun is not given up because somebody pressed Control-C.
func TestReloadGoesOnWhenWhoeverAskedIsGone(t *testing.T) {
	begun, ended := make(chan struct{}), make(chan error, 1)
	ctx, cancel := context.WithCancel(t.Context())
	goOn := make(chan struct{})
	d := oneCluster{reload: func(ctx context.Context) fleet.Outcome {
		close(begun)
		<-goOn
		ended <- ctx.Err()
		return fleet.Outcome{}
	}}
	dir, stop := serve(t, &d)
	go func() {
		<-begun
		cancel()
	}()
	if _, err := Reload(ctx, dir, "", time.Minute); !errors.Is(err, context.Canceled) {
		t.Errorf("%v", err)
	}
	close(goOn)
	if err := <-ended; err != nil {
		t.Errorf("the reload was given up: %v", err)
	}
	stop()
}

// Whoever waits for an answer gets it when the daemon is told to stop meanwhile.
func TestStoppingAnswersWhatIsUnderWay(t *testing.T) {
	begun := make(chan struct{})
	d := oneCluster{reload: func(ctx context.Context) fleet.Outcome {
		close(begun)
		<-ctx.Done()
		return fleet.Outcome{Error: "stopped"}
	}}
	dir, stop := serve(t, &d)
	var stopping sync.WaitGroup
	stopping.Go(func() {
		<-begun
		stop()
	})
	defer stopping.Wait()
	if out, err := Reload(t.Context(), dir, "", time.Minute); err != nil || out.Error != "stopped" {
		t.Errorf("%+v, %v", out, err)
	}
}

func TestOnlyReadingIsSafe(t *testing.T) {
	dir, _ := serve(t, &oneCluster{})
	for _, c := range []struct{ method, resource string }{
		{"GET", "reload"}, {"GET", "clusters/orders.eu/accept-gap"}, {"POST", "status"},
	} {
		if err := ask(t.Context(), dir, c.method, c.resource, time.Minute, nil, &answer{}); err == nil || !strings.Contains(err.Error(), "405") {
			t.Errorf("%s %s: %v", c.method, c.resource, err)
		}
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
	if !errors.Is(err, ErrNoDaemon) || !strings.Contains(err.Error(), "no walfleet answers at") || !strings.Contains(err.Error(), "is it running") {
		t.Errorf("no daemon: %v", err)
	}
	long := filepath.Join(t.TempDir(), strings.Repeat("long/", 30))
	if _, err := Listen(long); err == nil || !strings.Contains(err.Error(), "set runtime_dir to a shorter one") {
		t.Errorf("a long path: %v", err)
	}
}
