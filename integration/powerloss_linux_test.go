package integration

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/walfleet/walfleet/internal/wal"
)

// loopFS is an ext4 file system in a file, mounted with the usual options.
type loopFS struct {
	t           testing.TB
	image, path string
}

// mountLoop makes one of that many bytes in a file of the directory dir, mounted until the end of the test.
func mountLoop(t testing.TB, dir string, size int64) loopFS {
	t.Helper()
	if os.Geteuid() != 0 {
		t.Skip("NOT TESTED: mounting a file system needs root")
	}
	fs := loopFS{t, filepath.Join(dir, "ext4.img"), t.TempDir()}
	f, err := os.Create(fs.image)
	if err == nil {
		err = f.Truncate(size)
	}
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	if out, err := exec.Command("mkfs.ext4", "-q", "-F", fs.image).CombinedOutput(); err != nil {
		t.Skipf("NOT TESTED: mkfs.ext4 (of e2fsprogs): %v: %s", err, out)
	}
	if err := fs.mount(); err != nil {
		t.Skipf("NOT TESTED: no file system can be mounted from a file here: %v", err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(fs.path, 0); err != nil && err != unix.EINVAL { // EINVAL: not mounted
			t.Errorf("unmount %s: %v", fs.path, err)
		}
		fs.awaitGone()
	})
	return fs
}

// mount also replays the journal.
func (fs loopFS) mount() error {
	out, err := exec.Command("mount", "-o", "loop", fs.image, fs.path).CombinedOutput()
	if err != nil {
		fs.t.Logf("mount: %s", out)
	}
	return err
}

// remount unmounts it, which forgets what is in the page cache, and mounts it again.
func (fs loopFS) remount() {
	fs.t.Helper()
	if err := unix.Unmount(fs.path, 0); err != nil {
		fs.t.Fatalf("unmount %s: %v", fs.path, err)
	}
	fs.awaitGone()
	if err := fs.mount(); err != nil {
		fs.t.Fatal(err)
	}
}

// awaitGone waits until no mount of it is left: a container that is being started can have a copy for a moment.
func (fs loopFS) awaitGone() {
	fs.t.Helper()
	await(fs.t, patience, "no loop device has "+fs.image, func() (bool, string) {
		device := fs.device()
		return device == "", device
	})
}

// device is the loop device's directory in /sys/block; "" when there is none.
func (fs loopFS) device() string {
	files, _ := filepath.Glob("/sys/block/loop*/loop/backing_file")
	for _, file := range files {
		if text, err := os.ReadFile(file); err == nil && strings.TrimSpace(string(text)) == fs.image {
			return filepath.Dir(filepath.Dir(file))
		}
	}
	return ""
}

// Control requests of ext4 (FS_IOC_SHUTDOWN) and of every file system (linux/fs.h).
const (
	iocShutdown = 0x8004587d // _IOR('X', 125, __u32)
	iocFreeze   = 0xc0045877 // FIFREEZE
	iocThaw     = 0xc0045878 // FITHAW

	shutdownWithoutLog = 2 // the journal is not flushed either
)

func (fs loopFS) control(request uint, argument int) {
	fs.t.Helper()
	f, err := os.Open(fs.path)
	if err == nil {
		err = unix.IoctlSetPointerInt(int(f.Fd()), request, argument)
		f.Close()
	}
	if err != nil {
		fs.t.Fatalf("ioctl %#x of %s: %v", request, fs.path, err)
	}
}

// losePower drops everything that was not written back. What is open fails from then on.
func (fs loopFS) losePower() { fs.control(iocShutdown, shutdownWithoutLog) }

// freeze makes all writes wait until thaw is called, at the end of the test at the latest.
func (fs loopFS) freeze() (thaw func()) {
	fs.control(iocFreeze, 0)
	thaw = sync.OnceFunc(func() { fs.control(iocThaw, 0) })
	fs.t.Cleanup(thaw)
	return thaw
}

// stop stops the program as a power loss does: at any instruction, and also while a call is in the kernel. One that
// goes on can hear of success from an fdatasync that the loss of power overtook (seen with Linux 6.18), and acknowledge
// what no machine without power could have.
func (p *program) stop(t testing.TB) {
	t.Helper()
	p.signal(t, syscall.SIGSTOP)
	await(t, patience, "every thread is stopped, or in a call that it will stop after", func() (bool, string) {
		files, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*/stat", p.cmd.Process.Pid))
		if err != nil || len(files) == 0 {
			t.Fatalf("no threads: %v", err)
		}
		states := ""
		for _, file := range files {
			text, err := os.ReadFile(file)
			if _, after, found := strings.Cut(string(text), ") "); err == nil && found {
				states += after[:1]
			}
		}
		return strings.Trim(states, "TD") == "", states
	})
}

// TestPowerLoss has an archive whose disk loses, at random moments under load, what was not synced. What the server
// was told is flushed is in the archive after the journal was replayed.
func TestPowerLoss(t *testing.T) {
	t.Parallel()
	fs := mountLoop(t, t.TempDir(), 2048*megabyte)
	random := newRandom(t)
	s := startServer(t, serverOptions{segment: megabyte})
	config, orders := configText(fs.path, cluster("orders", s.conninfo())), filepath.Join(fs.path, "orders")

	losses, idle := rounds(3, 25), 0 // idle are those before which nothing was acknowledged
	var checked wal.LSN
	for n := 0; n < losses+idle; n++ {
		p := startProgram(t, config)
		p.stderr.await(t, "streaming started")
		if checked == 0 {
			checked = streamingFrom(t, p)
		}
		load := startLoad(t, s)
		moment(random, 1500*time.Millisecond)
		sampled := s.sender(t, "walfleet").flush
		p.stop(t)
		fs.losePower()
		p.signal(t, syscall.SIGKILL)
		p.exit(t)
		load.stop()
		fs.remount()
		promised, _ := checkAcknowledged(t, orders, s, "walfleet", checked)
		if promised < sampled {
			t.Errorf("the slot is at %s, flush_lsn was %s before", promised, sampled)
		}
		t.Logf("acknowledged were %d bytes more", promised-checked)
		if promised == checked {
			if idle++; idle > 10*losses {
				t.Fatalf("%d power losses took nothing that was acknowledged just before", idle)
			}
		}
		checked = promised
	}

	p := startProgram(t, config)
	awaitSlotFlushed(t, s, "walfleet", s.end(t))
	p.signal(t, syscall.SIGTERM)
	if status := p.exit(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	compareStopped(t, orders, s, "walfleet")
}
