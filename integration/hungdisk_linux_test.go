package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/receiver"
)

// TestDiskThatHangs has a fleet with one archive on a disk on which nothing comes back, and one elsewhere. The
// sibling does not notice, and the daemon stops in time and says who did not.
func TestDiskThatHangs(t *testing.T) {
	t.Parallel()
	fs := mountLoop(t, t.TempDir(), 256*megabyte)
	s := startServer(t, serverOptions{segment: megabyte})
	const limit = 10 * time.Second
	dir := t.TempDir()
	if err := os.Mkdir(filepath.Join(fs.path, "hung"), 0o700); err != nil {
		t.Fatal(err)
	}
	if err := os.Symlink(filepath.Join(fs.path, "hung"), filepath.Join(dir, "hung")); err != nil {
		t.Fatal(err)
	}
	names := []string{"hung", "well"}
	config := fmt.Sprintf("shutdown_timeout = %q\n", limit) +
		configText(dir, cluster("hung", s.conninfo(), `slot = "hung"`), cluster("well", s.conninfo(), `slot = "well"`))
	d := startDaemon(t, config)
	for _, name := range names {
		d.awaitState(t, name, receiver.Streaming)
	}
	load := startLoad(t, s)
	load.await(t, 50)

	thaw := fs.freeze()
	frozen := s.end(t) // the disk takes nothing that is written from here on
	load.await(t, 100)
	load.stop()
	s.write(t, 2)
	end := s.end(t)
	awaitSlotFlushed(t, s, "well", end)
	if st, told := d.status(t, "hung"), s.sender(t, "hung"); st.Flushed > frozen || told.flush > frozen {
		t.Errorf("the disk is frozen since %s, the status says flushed up to %s, the server was told %s", frozen, st.Flushed, told.flush)
	}

	begin := time.Now()
	d.cancel()
	select {
	case <-d.ended:
	case <-time.After(patience):
		t.Fatal("the fleet does not stop while the disk is frozen")
	}
	if took := time.Since(begin); took > limit+30*time.Second {
		t.Errorf("the fleet stopped after %s", took)
	}
	if d.err == nil || !strings.Contains(d.err.Error(), "hung") || strings.Contains(d.err.Error(), "well") {
		t.Errorf("the fleet ended with: %v; want the hung cluster's name", d.err)
	}
	d.err = nil // stop has seen it
	thaw()
	d.log.await(t, "msg=stopped", "cluster=hung")

	d = startDaemon(t, config)
	for _, name := range names {
		d.awaitFlushed(t, name, end)
	}
	d.stop(t)
	for _, name := range names {
		compareArchive(t, filepath.Join(dir, name), d.status(t, name), origins{1: s})
	}
}
