package integration

import (
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/archive"
)

// prune runs "walfleet prune" with --json.
func (p *program) prune(t testing.TB, args ...string) (out fleet.Pruning) {
	t.Helper()
	cmd := command(t, append([]string{"prune", "orders", "-c", p.config, "--json"}, args...)...)
	var stderr strings.Builder
	cmd.Stderr = &stderr
	data, err := cmd.Output()
	if err == nil {
		err = json.Unmarshal(data, &out)
	}
	if err != nil {
		t.Fatalf("prune %q: %v\n%s", args, err, stderr.String())
	}
	return out
}

// TestPrunesWhileItArchives prunes by each option while the daemon archives a load and compresses, and at last without
// a daemon. What a base backup needs stays, up to what is in progress, and is what the server had.
func TestPrunesWhileItArchives(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{segment: megabyte})
	dir, backups := t.TempDir(), t.TempDir()
	orders := filepath.Join(dir, "orders")
	config := func(retention string) string {
		return configText(dir, cluster("orders", s.conninfo(), `compress = "gzip:1"`)) + "\n" + retention
	}
	p := startProgram(t, config(""))
	p.stderr.await(t, "caught up, streaming")
	load := startLoad(t, s)
	sealed := func(n int) {
		t.Helper()
		await(t, patience, fmt.Sprintf("%d complete segments", n), func() (bool, string) {
			have := len(catalogue(t, orders).Sealed())
			return have >= n, fmt.Sprint(have)
		})
	}
	sealed(8)

	// A base backup, by its label alone: its checkpoint is behind what is pruned next.
	label := s.shell(t, `rm -rf /tmp/b && pg_basebackup -U postgres -D /tmp/b -X none --no-verify-checksums -c fast >&2 && cat /tmp/b/backup_label`)
	if err := os.MkdirAll(filepath.Join(backups, "first"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(backups, "first", "backup_label"), []byte(label), 0o600); err != nil {
		t.Fatal(err)
	}
	_, start, err := archive.ParseBackupLabel([]byte(label))
	if err != nil {
		t.Fatal(err)
	}
	first := catalogue(t, orders).Sealed()[0]
	check := func(what string, out fleet.Pruning) {
		t.Helper()
		c := catalogue(t, orders)
		have := c.Sealed()
		l := c.Lineage(c.ReadHistories())
		switch {
		case !out.Removed || len(out.Files) == 0 || out.Error != "":
			t.Errorf("%s: %+v", what, out)
		case have[0].Start.String() != out.ToLSN || c.Pruned.LSN != have[0].Start:
			t.Errorf("%s: the archive begins at %s, by archive.json at %s, want %s", what, have[0].Start, c.Pruned.LSN, out.ToLSN)
		case len(l.Holes) > 0 || len(l.Windows) != 1 || l.Windows[0].From != have[0].Start:
			t.Errorf("%s: %+v", what, l)
		case have[0].Start > s.size.Start(start):
			t.Errorf("%s: the backup needs WAL from %s on, the archive begins at %s", what, start, have[0].Start)
		}
	}
	keep := []string{"--backups", backups}

	third := first.Next().Next()
	plan := p.prune(t, append(keep, "--before", third.Name(), "--dry-run")...)
	if plan.Removed || plan.Segments != 2 || plan.ToLSN != third.Start.String() || catalogue(t, orders).Sealed()[0] != first {
		t.Errorf("a dry run: %+v", plan)
	}
	check("before a segment", p.prune(t, append(keep, "--before", third.Name())...))
	total := int64(0)
	for _, f := range catalogue(t, orders).Files {
		total += f.Bytes
	}
	check("a size", p.prune(t, append(keep, "--keep-size", fmt.Sprintf("%dkB", total>>10-1))...))
	sealed(12)
	old := time.Now().Add(-48 * time.Hour)
	for _, f := range catalogue(t, orders).Files[:1] {
		if err := os.Chtimes(filepath.Join(orders, f.File), old, old); err != nil {
			t.Fatal(err)
		}
	}
	// Its file looks old, and its commits are not.
	if out := p.prune(t, append(keep, "--older-than", "24h")...); len(out.Files) > 0 {
		t.Errorf("WAL of today went as older than a day: %q", out.Files)
	}
	held := p.prune(t, append(keep, "--keep-size", "1kB")...)
	check("as much as the backup lets", held)
	if len(held.Held) != 1 || !strings.Contains(held.Held[0], "first") || held.ToLSN != s.size.Start(start).String() {
		t.Errorf("held by %q, pruned before %s, want %s", held.Held, held.ToLSN, s.size.Start(start))
	}

	// The daemon's own retention, by a reload: up to the next backup.
	sealed(len(catalogue(t, orders).Sealed()) + 6)
	label = s.shell(t, `rm -rf /tmp/b && pg_basebackup -U postgres -D /tmp/b -X none --no-verify-checksums -c fast >&2 && cat /tmp/b/backup_label`)
	if err := os.WriteFile(filepath.Join(backups, "first", "backup_label"), []byte(label), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, start, err = archive.ParseBackupLabel([]byte(label)); err != nil {
		t.Fatal(err)
	}
	sealed(len(catalogue(t, orders).Sealed()) + 2)
	p.configure(t, config(fmt.Sprintf("[retention]\nkeep_size = \"1kB\"\nbackups = %q\n", backups)))
	if out, err := command(t, "reload", "-c", p.config).CombinedOutput(); err != nil || !strings.Contains(string(out), "adjusted") {
		t.Errorf("reload: %v, %s", err, out)
	}
	await(t, patience, "the retention to prune", func() (bool, string) {
		c := catalogue(t, orders)
		return c.Sealed()[0].Start == s.size.Start(start), c.Pruned.LSN.String()
	})

	load.stop()
	p.signal(t, os.Interrupt)
	if status := p.exit(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	// Without a daemon.
	last := catalogue(t, orders).Sealed()
	if err := os.RemoveAll(filepath.Join(backups, "first")); err != nil {
		t.Fatal(err)
	}
	if out, err := command(t, "prune", "orders", "-c", p.config, "--keep-size", "1kB").CombinedOutput(); err == nil || !strings.Contains(string(out), "there is none in") {
		t.Errorf("pruned, or not, without any backup: %v, %s", err, out)
	}
	p.configure(t, config(""))
	out := p.prune(t, "--before", last[1].Name())
	if len(out.Files) == 0 || !out.Removed || catalogue(t, orders).Sealed()[0] != last[1] {
		t.Errorf("without a daemon: %+v", out)
	}
	// And the archive goes on from there.
	p = startProgram(t, config(""))
	p.stderr.await(t, "caught up, streaming")
	awaitSlotFlushed(t, s, "walfleet", s.end(t))
	p.signal(t, os.Interrupt)
	p.exit(t)
	segments := compareStopped(t, orders, s, "walfleet")
	if i := slices.IndexFunc(segments, func(g stored) bool { return g.Segment == last[0] }); i >= 0 {
		t.Errorf("%s came back", last[0])
	}
}

func catalogue(t testing.TB, dir string) archive.Catalogue {
	t.Helper()
	c, err := archive.ReadCatalogue(t.Context(), dir)
	if err != nil {
		t.Fatal(err)
	}
	return c
}
