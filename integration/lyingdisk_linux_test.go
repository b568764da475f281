package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/walfleet/walfleet/internal/wal"
)

// TestPageCacheThatLies has an archive on an ext4 whose own disk is full: a sync fails, what it should have written
// still reads back, and the next sync succeeds. Only when the page cache has forgotten the bytes it shows that they
// are lost.
func TestPageCacheThatLies(t *testing.T) {
	t.Parallel()
	disk := mountTmpfs(t, 0, "size=2g,mode=700")
	fs := mountLoop(t, disk.path, 2048*megabyte)
	// ext4's own blocks are there whatever happens: the inode tables at the start, the journal in the middle.
	fs.allocate(0, 64*megabyte)
	fs.allocate(1024*megabyte, 80*megabyte)
	fs.requestsOfOnePage()
	s := startServer(t, serverOptions{segment: megabyte})
	config := configText(fs.path, cluster("orders", s.conninfo())) + "\n[log]\nlevel = \"debug\"\n"
	orders := filepath.Join(fs.path, "orders")

	readOnly := 0
	var checked wal.LSN
	tries := rounds(3, 10)
	for i := range tries {
		p := startProgram(t, config)
		p.stderr.await(t, "streaming started")
		if checked == 0 {
			checked = streamingFrom(t, p)
		}
		disk.leave(t, 4*megabyte)
		load := startLoad(t, s)
		p.awaitFailures(t, 2)
		load.stop()
		disk.remount(t, "size=2g")
		if fs.readOnly() { // ext4 does not go on after an error in its journal
			readOnly++
		} else if i%2 == 1 {
			awaitSlotFlushed(t, s, "walfleet", s.end(t)) // by itself
		}
		p.signal(t, syscall.SIGKILL)
		p.exit(t)
		fs.remount()
		fs.requestsOfOnePage()
		checked, _ = checkAcknowledged(t, orders, s, "walfleet", checked)
	}
	t.Logf("ext4 failed %d times, %d times for good", tries, readOnly)

	p := startProgram(t, config)
	awaitSlotFlushed(t, s, "walfleet", s.end(t))
	p.signal(t, syscall.SIGTERM)
	if status := p.exit(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	fs.remount()
	compareStopped(t, orders, s, "walfleet")
}

// leave makes the file system so small that this many bytes are free.
func (fs tmpfs) leave(t *testing.T, free uint64) {
	t.Helper()
	var st unix.Statfs_t
	if err := unix.Statfs(fs.path, &st); err != nil {
		t.Fatal(err)
	}
	used := (st.Blocks - st.Bfree) * uint64(st.Bsize)
	fs.remount(t, fmt.Sprintf("size=%d", used+free))
}

// awaitFailures waits until the program has failed n more times because of its disk.
func (p *program) awaitFailures(t *testing.T, n int) {
	t.Helper()
	before := p.stderr.String()
	await(t, patience, "attempts that the disk thwarts", func() (bool, string) {
		after := p.stderr.String()[len(before):]
		failures := 0
		for _, text := range []string{"no space left on device", "input/output error", "read-only file system"} {
			failures += strings.Count(after, text)
		}
		return failures >= n, fmt.Sprint(failures)
	})
}

// allocate gives a part of the image its blocks, and changes no byte.
func (fs loopFS) allocate(from, length int64) {
	fs.t.Helper()
	f, err := os.OpenFile(fs.image, os.O_RDWR, 0)
	if err == nil {
		err = unix.Fallocate(int(f.Fd()), 0, from, length)
		f.Close()
	}
	if err != nil {
		fs.t.Fatal(err)
	}
}

// requestsOfOnePage makes the loop device cut its requests into pages, until the end of the test: the limit outlives
// the mount. A larger request that its file has room for only in part is a success to the device (seen with Linux
// 6.18), and no program could know what is missing.
func (fs loopFS) requestsOfOnePage() {
	fs.t.Helper()
	limit := fs.device() + "/queue/max_sectors_kb"
	before, err := os.ReadFile(limit)
	if err == nil {
		err = os.WriteFile(limit, []byte("4"), 0)
	}
	if err != nil {
		fs.t.Fatal(err)
	}
	fs.t.Cleanup(func() {
		if err := os.WriteFile(limit, before, 0); err != nil {
			fs.t.Error(err)
		}
	})
}

func (fs loopFS) readOnly() bool {
	var st unix.Statfs_t
	return unix.Statfs(fs.path, &st) == nil && st.Flags&unix.ST_RDONLY != 0
}
