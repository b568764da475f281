package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/walfleet/walfleet/receiver"
)

// TestDirectoriesThatRefuse has archives that are damaged, or not to be used. Nothing in them is changed, and
// once they are put right they go on.
func TestDirectoriesThatRefuse(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{segment: megabyte})
	const identifier = `"system_identifier": "`
	tests := []struct {
		name           string
		damage, repair func(t *testing.T, dir string)
		reason         []string
	}{
		{"partial_size", truncatePartial(megabyte + 4711), truncatePartial(megabyte), []string{".partial", "has 1053287 bytes, should have 1048576"}},
		{"partial_size_and_moved_away", truncatePartial(megabyte + 4711), movePartial, []string{".partial", "move it away"}},
		{"damaged_meta", replaceMeta(`"format"`, `"format`), replaceMeta(`"format`, `"format"`), []string{"archive.json", "damaged"}},
		{"other_cluster", replaceMeta(identifier, identifier+"1"), replaceMeta(identifier+"1", identifier), []string{"belongs to the cluster with system identifier"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			config, orders := makeArchive(t, s, tt.name)
			tt.damage(t, orders)
			before := listing(t, orders)
			d := startDaemon(t, config)
			d.awaitState(t, "orders", receiver.Halted, tt.reason...)
			d.log.await(t, "not archiving", tt.reason[0])
			d.stop(t)
			if after := listing(t, orders); after != before {
				t.Errorf("the directory has changed from\n%sto\n%s", before, after)
			}
			tt.repair(t, orders)
			s.write(t, 1)
			d = startDaemon(t, config)
			st := d.archived(t, "orders", s)
			compareArchive(t, orders, st, origins{1: s})
		})
	}

	t.Run("locked by another walfleet", func(t *testing.T) {
		config, orders := makeArchive(t, s, "locked")
		first := startDaemon(t, config)
		first.awaitState(t, "orders", receiver.Streaming)
		second := startDaemon(t, config)
		second.awaitState(t, "orders", receiver.Blocked, orders, "locked by another walfleet")
		second.log.await(t, "not archiving", "stop the other walfleet")
		first.stop(t)
		second.awaitState(t, "orders", receiver.Streaming)
		s.write(t, 1)
		st := second.archived(t, "orders", s)
		compareArchive(t, orders, st, origins{1: s})
	})

	t.Run("cannot be made", func(t *testing.T) {
		file := filepath.Join(t.TempDir(), "file")
		if err := os.WriteFile(file, nil, 0o600); err != nil {
			t.Fatal(err)
		}
		d := startDaemon(t, configText(filepath.Join(file, "archive"), cluster("orders", s.conninfo())))
		d.await(t, "orders", "the path is the reason", func(st receiver.Status) bool {
			return (st.State == receiver.Blocked || st.State == receiver.Backoff || st.State == receiver.Halted) &&
				containsAll(st.Reason, []string{"archive directory", file, "not a directory"})
		})
	})
}

// makeArchive makes an archive with sealed segments and a .partial, through a slot of its own. It returns the
// configuration, and the directory of its cluster, orders.
func makeArchive(t *testing.T, s *server, slot string) (config, orders string) {
	t.Helper()
	dir := t.TempDir()
	config = configText(dir, cluster("orders", s.conninfo(), fmt.Sprintf("slot = %q", slot)))
	d := startDaemon(t, config)
	d.awaitState(t, "orders", receiver.Streaming)
	s.write(t, 2)
	d.archived(t, "orders", s)
	return config, filepath.Join(dir, "orders")
}

func partialOf(t *testing.T, dir string) string {
	t.Helper()
	names, err := filepath.Glob(filepath.Join(dir, "*.partial"))
	if err != nil || len(names) != 1 {
		t.Fatalf("partial files %q, error %v; want one", names, err)
	}
	return names[0]
}

// truncatePartial gives the .partial file a size, with zeros at its end when it was shorter.
func truncatePartial(size int64) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		if err := os.Truncate(partialOf(t, dir), size); err != nil {
			t.Fatal(err)
		}
	}
}

func movePartial(t *testing.T, dir string) {
	if err := os.Rename(partialOf(t, dir), filepath.Join(t.TempDir(), "moved")); err != nil {
		t.Fatal(err)
	}
}

// replaceMeta changes the first occurrence of a text in archive.json.
func replaceMeta(from, to string) func(*testing.T, string) {
	return func(t *testing.T, dir string) {
		name := filepath.Join(dir, "archive.json")
		text := strings.Replace(string(readFile(t, name)), from, to, 1)
		if err := os.WriteFile(name, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
}
