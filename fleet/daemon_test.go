package fleet

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"runtime"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/receiver"
)

// fileOf is a configuration file of clusters, each with the lines given for it.
func fileOf(dir string, lines []string, clusters ...*cluster) string {
	var b strings.Builder
	fmt.Fprintf(&b, "archive_dir = %q\nshutdown_timeout = \"60s\"\n", dir)
	for i, c := range clusters {
		fmt.Fprintf(&b, "[[cluster]]\nname = %q\nconninfo = %q\n", c.cfg.Name, c.cfg.Conninfo)
		if i < len(lines) {
			fmt.Fprintln(&b, lines[i])
		}
	}
	return b.String()
}

// daemon runs a daemon with a file of that content, until the test ends. Clusters' directories are then those of the file.
func daemon(t *testing.T, content string) (d *Daemon, file string, l *log, stop func()) {
	t.Helper()
	file = filepath.Join(t.TempDir(), "walfleet.toml")
	write(t, file, content)
	cfg, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	l = &log{}
	var level slog.LevelVar
	d, err = NewDaemon(file, cfg, slog.New(slog.NewTextHandler(l, &slog.HandlerOptions{Level: &level})), &level, "test")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- d.Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return d, file, l, stop
}

func write(t *testing.T, file, content string) {
	t.Helper()
	if err := os.WriteFile(file, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
}

// awaitStates waits for the states of a daemon's clusters.
func awaitStates(t *testing.T, d *Daemon, want ...string) {
	t.Helper()
	(&running{Fleet: d.Fleet, t: t}).wait(want...)
}

func TestReloadFollowsTheFileAndRemembersWhatBecameOfIt(t *testing.T) {
	dir := t.TempDir()
	a, b := newCluster(t, "a"), newCluster(t, "b")
	d, file, l, _ := daemon(t, fileOf(dir, nil, a))
	var calls []string
	d.Reloading = func() (done func()) {
		calls = append(calls, "begins")
		return func() { calls = append(calls, "ends") }
	}
	awaitStates(t, d, "a streaming")
	if d.Report().Daemon.LastReload != nil {
		t.Error("a reload is remembered before there was one")
	}

	// The control socket cannot move.
	write(t, file, "runtime_dir = \"/elsewhere\"\n"+fileOf(dir, []string{`min_free = "1MB"`}, a, b))
	if out := d.Reload(t.Context(), ""); out.Applied || !strings.Contains(out.Error, fmt.Sprintf("set runtime_dir = %q", d.start.RuntimeDir)) {
		t.Errorf("%+v", out)
	}

	write(t, file, fileOf(dir, []string{`min_free = "1MB"`}, a, b)+"[log]\nlevel = \"debug\"\nformat = \"json\"\n")
	out := d.Reload(t.Context(), "")
	if out.Error != "" || !out.Applied || out.Plan.String() != "started b; adjusted a; kept 0" || fmt.Sprint(out.Plan.Changed) != "map[a:[min_free]]" {
		t.Errorf("%+v", out)
	}
	if len(out.Notes) != 1 || !strings.Contains(out.Notes[0], "format") {
		t.Errorf("notes %q", out.Notes)
	}
	if d.level.Level() != slog.LevelDebug || !l.has("level=INFO msg=reloaded") {
		t.Error("the log's level did not follow, or nothing was logged")
	}
	awaitStates(t, d, "a streaming", "b streaming")
	if last := d.Report().Daemon.LastReload; last == nil || !last.Applied || last.Seconds < 0 || last.Time.IsZero() {
		t.Errorf("remembered: %+v", last)
	}

	// A broken file changes nothing, wherever it is broken.
	write(t, file, fileOf(dir, []string{"", "no_such_key = 1"}, a, b))
	out = d.Reload(t.Context(), "")
	if out.Applied || !strings.Contains(out.Error, file+":10: ") || len(out.Plan.Keep) != 0 {
		t.Errorf("%+v", out)
	}
	if last := d.Report().Daemon.LastReload; last == nil || last.Applied || d.level.Level() != slog.LevelDebug {
		t.Errorf("remembered: %+v", last)
	}
	awaitStates(t, d, "a streaming", "b streaming")
	if len(a.Streams()) != 1 || len(b.Streams()) != 1 {
		t.Errorf("%d and %d streams", len(a.Streams()), len(b.Streams()))
	}

	// Nor does a file that is not the daemon's.
	other := filepath.Join(t.TempDir(), "other.toml")
	write(t, other, fileOf(dir, nil, b))
	if out := d.Reload(t.Context(), other); out.Applied || !strings.Contains(out.Error, "runs with "+file) {
		t.Errorf("%+v", out)
	}
	link := filepath.Join(t.TempDir(), "link.toml")
	if err := os.Symlink(file, link); err != nil {
		t.Fatal(err)
	}
	write(t, file, fileOf(dir, nil, a, b))
	if out := d.Reload(t.Context(), link); out.Error != "" {
		t.Errorf("the same file under another name: %+v", out)
	}
	if got := strings.Join(calls, " "); got != "begins ends begins ends begins ends begins ends begins ends" {
		t.Errorf("five reloads: %s", got)
	}
}

// A preview says what a reload would do, and does nothing.
// A reload that comes before the fleet runs is refused, and nothing of the file is followed.
func TestReloadBeforeTheStartFollowsNothing(t *testing.T) {
	file := filepath.Join(t.TempDir(), "walfleet.toml")
	write(t, file, fileOf(t.TempDir(), nil, newCluster(t, "a")))
	cfg, err := Load(file)
	if err != nil {
		t.Fatal(err)
	}
	d, err := NewDaemon(file, cfg, slog.New(slog.DiscardHandler), new(slog.LevelVar), "test")
	if err != nil {
		t.Fatal(err)
	}
	d.Follow = func(HTTPConfig) error { t.Error("followed"); return nil }
	if out := d.Reload(t.Context(), ""); out.Applied || out.Error == "" {
		t.Errorf("%+v", out)
	}
}

func TestPreviewChangesNothing(t *testing.T) {
	dir := t.TempDir()
	a, b := newCluster(t, "a"), newCluster(t, "b")
	d, file, l, _ := daemon(t, fileOf(dir, nil, a))
	awaitStates(t, d, "a streaming")
	out := d.Preview("new.toml", []byte(fileOf(dir, []string{`min_free = "1MB"`}, a, b)+"[log]\nformat = \"json\"\n"))
	if out.Error != "" || out.Applied || out.Plan.String() != "started b; adjusted a; kept 0" || len(out.Notes) != 1 || out.File != "new.toml" {
		t.Errorf("%+v", out)
	}
	var text strings.Builder
	if err := out.WritePreview(&text); err != nil {
		t.Fatal(err)
	}
	for _, want := range []string{"a reload of new.toml would\n", "\n  start   b\n", "\n  adjust  a  min_free\n", "\n  keep    0\n", "\n  note       [log] format"} {
		if !strings.Contains(text.String(), want) {
			t.Errorf("no %q in\n%s", want, &text)
		}
	}
	if out := d.Preview("new.toml", []byte("runtime_dir = \"/elsewhere\"\n"+fileOf(dir, nil, a))); !strings.Contains(out.Error, "restart it") {
		t.Errorf("%+v", out)
	}
	out = d.Preview("new.toml", []byte(fileOf(dir, []string{"no_such_key = 1"}, a)))
	if out.Applied || !strings.Contains(out.Error, "new.toml:") {
		t.Errorf("%+v", out)
	}
	awaitStates(t, d, "a streaming")
	if d.Report().Daemon.LastReload != nil || l.has("reload") || len(d.Report().Clusters) != 1 {
		t.Error("the preview left something behind")
	}
	if now := d.Reload(t.Context(), ""); now.Plan.String() != "kept 1" {
		t.Errorf("the next reload of %s: %+v", file, now)
	}
}

// Whoever reloads at the same time gets the outcome of a reload that began after he asked, one after the other.
func TestReloadsAreOneAfterTheOther(t *testing.T) {
	dir := t.TempDir()
	a := newCluster(t, "a")
	d, file, _, _ := daemon(t, fileOf(dir, nil, a))
	awaitStates(t, d, "a streaming")
	write(t, file, fileOf(dir, []string{`application_name = "x"`}, a))
	var wait sync.WaitGroup
	var mu sync.Mutex
	var did []string
	for range 5 {
		wait.Go(func() {
			out := d.Reload(t.Context(), "")
			mu.Lock()
			defer mu.Unlock()
			did = append(did, out.Plan.String()+out.Error)
		})
	}
	wait.Wait()
	slices.Sort(did)
	if want := "kept 1|kept 1|kept 1|kept 1|restarted a; kept 0"; strings.Join(did, "|") != want {
		t.Errorf("%q", did)
	}
}

// 200 reloads that start, stop, restart and adjust clusters, while all of them are written to, leave nothing behind, lose
// nothing, and do not touch the cluster that stays the same.
func TestReloadsLeakNothing(t *testing.T) {
	const reloads = 200
	dir := t.TempDir()
	kept, adjusted, changed, flapping := newCluster(t, "kept"), newCluster(t, "adjusted"), newCluster(t, "changed"), newCluster(t, "flapping")
	all := []*cluster{kept, adjusted, changed, flapping}
	file := func(i int) string {
		settings := []string{"", fmt.Sprintf(`status_interval = "%ds"`, 1+i%2), fmt.Sprintf("application_name = \"n%d\"", i%2)}
		return fileOf(dir, settings, all[:3+i%2]...)
	}
	d, path, l, stop := daemon(t, file(1))
	awaitStates(t, d, "kept streaming", "adjusted streaming", "changed streaming", "flapping streaming")
	pids := [2]uint32{kept.Streams()[0].PID(), adjusted.Streams()[0].PID()}

	// The load goes on without a pause.
	ctx, cancel := context.WithCancel(t.Context())
	var load sync.WaitGroup
	for _, c := range all {
		load.Go(func() {
			for ctx.Err() == nil {
				c.wal.Append(make([]byte, 20000))
				c.Publish(c.wal)
				time.Sleep(100 * time.Millisecond) // a load, not a wait
			}
		})
	}
	reload := func(i int) {
		write(t, path, file(i))
		out := d.Reload(t.Context(), "")
		if out.Error != "" {
			t.Fatalf("reload %d: %s", i, out.Error)
		}
		want := "started flapping; restarted changed; adjusted adjusted; kept 1"
		if i%2 == 0 {
			want = "restarted changed; adjusted adjusted; stopped flapping; kept 1"
		}
		if got := out.Plan.String(); got != want {
			t.Fatalf("reload %d: %s, want %s", i, got, want)
		}
		if i%4 == 1 { // or the next reload stops what has not begun to stream
			awaitStates(t, d, "kept streaming", "adjusted streaming", "changed streaming", "flapping streaming")
		}
	}
	// rest waits until all stream again, for what comes and goes with a session to be there or gone.
	rest := func() (goroutines, descriptors int) {
		awaitStates(t, d, "kept streaming", "adjusted streaming", "changed streaming")
		least := [2]int{1 << 30, 1 << 30}
		for begun := time.Now(); time.Since(begun) < time.Second; time.Sleep(10 * time.Millisecond) {
			least[0] = min(least[0], runtime.NumGoroutine())
			least[1] = min(least[1], descriptorCount(t))
		}
		return least[0], least[1]
	}
	for i := range 11 { // what is made once is there then
		reload(i)
	}
	goroutines, descriptors := rest()
	for i := range reloads {
		reload(11 + i)
	}
	goroutinesAfter, descriptorsAfter := rest()
	t.Logf("%d reloads: goroutines %d before, %d after; descriptors %d before, %d after; %d streams of the restarted cluster, %d of the one that came and went",
		reloads, goroutines, goroutinesAfter, descriptors, descriptorsAfter, len(changed.Streams()), len(flapping.Streams()))
	if goroutinesAfter > goroutines || descriptorsAfter > descriptors {
		t.Errorf("left behind: %d goroutines, %d descriptors", goroutinesAfter-goroutines, descriptorsAfter-descriptors)
	}
	for i, c := range []*cluster{kept, adjusted} {
		if s := c.Streams(); len(s) != 1 || s[0].PID() != pids[i] || s[0].Ended().Gone {
			t.Errorf("%s had %d streams", c.cfg.Name, len(s))
		}
	}
	open := 0
	for _, s := range append(changed.Streams(), flapping.Streams()...) {
		if e := s.Ended(); !e.Gone && !e.CopyDone {
			open++
		}
	}
	if open != 1 {
		t.Errorf("%d streams of restarted and removed clusters are open, want 1", open)
	}
	cancel()
	load.Wait()

	reload(11)
	awaitStates(t, d, "kept streaming", "adjusted streaming", "changed streaming", "flapping streaming")
	for _, c := range all {
		c.awaitAcknowledged(t, d)
	}
	stop()
	for _, c := range all {
		a, err := archive.Open(filepath.Join(dir, c.cfg.Name)) // nobody holds its lock
		if err != nil {
			t.Error(err)
			continue
		}
		a.Close()
		c.compare(t, filepath.Join(dir, c.cfg.Name))
	}
	if l.has("is active for PID") || l.has("locked by another") || l.has("panic") {
		t.Error("a receiver was started before the one before had stopped, or one panicked")
	}
}

func descriptorCount(t *testing.T) int {
	t.Helper()
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return 0 // no /proc here
	}
	return len(entries)
}

// awaitAcknowledged waits until the archive has all that the server has, and has said so.
func (c *cluster) awaitAcknowledged(t *testing.T, d *Daemon) {
	t.Helper()
	var last receiver.Status
	for begun := time.Now(); time.Since(begun) < patience; time.Sleep(5 * time.Millisecond) {
		for _, s := range d.Fleet.Status() {
			if s.Name == c.cfg.Name {
				last = s.Status
			}
		}
		if last.Flushed == c.wal.End() {
			return
		}
	}
	t.Fatalf("%s is flushed up to %s, the server has %s", c.cfg.Name, last.Flushed, c.wal.End())
}

// compare compares every byte of an archive with the server's.
func (c *cluster) compare(t *testing.T, dir string) {
	t.Helper()
	h, err := archive.Peek(t.Context(), dir)
	if err != nil {
		t.Error(err)
		return
	}
	at, segments := h.First.Start, 0
	if h.Segments == 0 && len(h.Partial) > 0 {
		at = h.Partial[0].Start
	}
	begin := at
	for ; at < c.wal.End(); segments++ {
		segment := h.Identity.SegmentSize.Segment(1, at)
		name := segment.Name()
		if segment.End() > c.wal.End() {
			name += ".partial"
		}
		data, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Error(err)
			return
		}
		end := min(segment.End(), c.wal.End())
		if string(data[:end-at]) != string(c.wal.Bytes(at, end)) {
			t.Errorf("%s: %s differs from the server's", c.cfg.Name, name)
		}
		at = end
	}
	t.Logf("%s: %d bytes from %s in %d segments are the server's", c.cfg.Name, at-begin, begin, segments)
}
