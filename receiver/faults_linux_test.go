package receiver

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// breakFiles puts another file in the place of the receiver's open .partial: what is written or synced fails as it
// does on that. What the file had so far stays on disk.
func (g *rig) breakFiles(path string) {
	g.Helper()
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		g.Fatal(err)
	}
	defer f.Close()
	fds, _ := filepath.Glob("/proc/self/fd/*")
	n := 0
	for _, fd := range fds {
		if target, _ := os.Readlink(fd); filepath.Dir(target) == g.cfg.Dir && strings.HasSuffix(target, ".partial") {
			var number int
			fmt.Sscan(filepath.Base(fd), &number)
			if err := unix.Dup3(int(f.Fd()), number, unix.O_CLOEXEC); err != nil {
				g.Fatal(err)
			}
			n++
		}
	}
	if n == 0 {
		g.Fatal("no .partial is open")
	}
}

// A full disk blocks the cluster until there is room; a file that cannot be synced is read again from the disk.
// In neither case is anything acknowledged that is not there.
func TestDiskThatFails(t *testing.T) {
	for name, tt := range map[string]struct {
		file  string // that fails
		state State
		want  string
	}{
		"ENOSPC on write": {"/dev/full", Blocked, "no space left on device"},
		"failed fsync":    {"/dev/null", Backoff, "fdatasync"}, // EINVAL
	} {
		for _, synchronous := range []bool{true, false} {
			t.Run(name, func(t *testing.T) {
				bubble(t, func(g *rig) {
					g.cfg.Synchronous = synchronous
					g.start()
					g.sleep(11 * time.Second)
					g.wantArchived()
					g.breakFiles(tt.file)
					g.append(3, 1000)
					for range 3 {
						g.sleep(2 * time.Second)
						if s := g.r.Status(); s.State == tt.state && !strings.Contains(s.Reason, tt.want) {
							t.Errorf("reason %q", s.Reason)
						}
					}
					if n := g.logs.count("state=" + string(tt.state)); n == 0 {
						t.Errorf("was never %s:\n%s", tt.state, g.logs.last(12))
					}
					g.sleep(31 * time.Second)
					g.append(3, 1000)
					g.sleep(11 * time.Second)
					g.wantArchived()
				})
			})
		}
	}
}

// EUCLEAN is Linux's alone: a file system that needs fsck.
func TestDamagedFileSystem(t *testing.T) {
	if got := classify(fileError(syscall.EUCLEAN)); got.kind != "disk error" {
		t.Errorf("%+v", got)
	}
}

// A flush that fails at the end of a timeline is an error like any other.
func TestDiskThatFailsAtTheEndOfATimeline(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Synchronous, g.cfg.FlushInterval = false, time.Hour
		g.start()
		g.breakFiles("/dev/null")
		g.append(3, 1000)
		g.promote(2, g.wal.End(), 1)
		g.want(Backoff, "fdatasync")
		if g.logs.count("panic") != 0 {
			t.Errorf("a panic:\n%s", g.logs.last(12))
		}
		g.cfg.FlushInterval = time.Second
		g.sleep(time.Minute)
		g.restart()
		g.sleep(time.Minute)
		g.wantArchived()
	})
}
