package integration

import (
	"testing"

	"golang.org/x/sys/unix"

	"github.com/walfleet/walfleet/receiver"
)

// tmpfs is a small file system of its own.
type tmpfs struct{ path string }

// mountTmpfs mounts one until the end of the test. That needs root.
func mountTmpfs(t *testing.T, flags uintptr, options string) tmpfs {
	t.Helper()
	fs := tmpfs{t.TempDir()}
	if err := unix.Mount("walfleet-test", fs.path, "tmpfs", flags, options); err != nil {
		t.Skipf("NOT TESTED: no file system can be mounted here (%v); run the tests as root for that", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(fs.path, 0); err != nil {
			t.Errorf("unmount %s: %v", fs.path, err)
		}
	})
	return fs
}

func (fs tmpfs) remount(t *testing.T, options string) {
	t.Helper()
	if err := unix.Mount("", fs.path, "", unix.MS_REMOUNT, options); err != nil {
		t.Fatal(err)
	}
}

// TestFullDisk fills the disk of one cluster of two, and then makes room.
func TestFullDisk(t *testing.T) {
	t.Parallel()
	fs := mountTmpfs(t, 0, "size=5m,mode=700")
	s := startServer(t, serverOptions{segment: megabyte})
	d := startDaemon(t, configText(fs.path, cluster("full", s.conninfo(), `slot = "full"`, `min_free = "0"`)))
	roomy := startDaemon(t, configText(t.TempDir(), cluster("roomy", s.conninfo(), `slot = "roomy"`)))
	load := startLoad(t, s)
	d.awaitState(t, "full", receiver.Blocked, "no space left on device")
	d.log.await(t, "not archiving", "no space left on device", "make room")
	load.await(t, 200)
	load.stop()
	roomy.awaitFlushed(t, "roomy", s.end(t))
	// An attempt after the first one may have found a little more in the last segment.
	restart := s.lsn(t, "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = 'full'")
	if st := d.status(t, "full"); restart > st.Flushed {
		t.Errorf("the slot is at %s, on the full disk is WAL up to %s", restart, st.Flushed)
	}

	fs.remount(t, "size=200m")
	d.awaitState(t, "full", receiver.Streaming) // by itself
	s.write(t, 2)
	st := d.archived(t, "full", s)
	compareArchive(t, d.clusterDir("full"), st, origins{1: s})
}

// TestReadOnlyDirectory has a file system that takes no writes until it is mounted anew.
func TestReadOnlyDirectory(t *testing.T) {
	t.Parallel()
	fs := mountTmpfs(t, unix.MS_RDONLY, "mode=700")
	s := startServer(t, serverOptions{segment: megabyte})
	d := startDaemon(t, configText(fs.path, cluster("orders", s.conninfo())))
	d.awaitState(t, "orders", receiver.Blocked, "read-only file system")
	d.log.await(t, "not archiving", "archive_dir is read-only")
	fs.remount(t, "size=200m")
	d.awaitState(t, "orders", receiver.Streaming) // by itself
	s.write(t, 2)
	st := d.archived(t, "orders", s)
	compareArchive(t, d.clusterDir("orders"), st, origins{1: s})
}
