package integration

import (
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
)

// tracedCalls are those by which files and directories are made and written, and messages sent.
const tracedCalls = "openat,mkdir,mkdirat,rename,renameat,renameat2,link,linkat,unlink,unlinkat,fsync,fdatasync," +
	"write,writev,pwrite64,pwritev,pwritev2,sendto,sendmsg,sendmmsg,copy_file_range"

// TestAcknowledgesWhatWasSynced traces the daemon's system calls under load, through a reconnect and a restart, and
// judges every flush position that it sent.
func TestAcknowledgesWhatWasSynced(t *testing.T) {
	t.Parallel()
	if out, err := exec.Command("strace", "-D", "-o", os.DevNull, "true").CombinedOutput(); err != nil {
		t.Skipf("NOT TESTED: no system calls can be traced here (Debian's package strace): %v %s", err, out)
	}
	s := startServer(t, serverOptions{segment: megabyte})
	dir := filepath.Join(t.TempDir(), "archives")
	config, orders := configText(dir, cluster("orders", s.conninfo())), filepath.Join(dir, "orders")
	a := newAudit(orders, s.size)
	for range rounds(2, 10) {
		trace := filepath.Join(t.TempDir(), "trace")
		p := startProgram(t, config, "strace", "-D", "-qq", "-f", "-yy", "-xx", "-s", "64", "-o", trace, "-e", "trace="+tracedCalls)
		p.stderr.await(t, "streaming started")
		load := startLoad(t, s)
		p.stderr.await(t, "segment sealed")
		load.await(t, 50)
		before := s.sender(t, "walfleet")
		s.query(t, "SELECT pg_terminate_backend("+before.pid+")")
		await(t, patience, "a new connection", func() (bool, string) {
			now := s.sender(t, "walfleet")
			return now.pid != "" && now.pid != before.pid && now.flush > before.flush, now.pid
		})
		load.await(t, 50)
		load.stop()
		awaitSlotFlushed(t, s, "walfleet", s.end(t))
		p.signal(t, syscall.SIGTERM)
		if status := p.exit(t); status != 0 {
			t.Errorf("exit status %d", status)
		}
		followFile(t, a, trace)
		if slot := acknowledged(t, s, "walfleet"); a.last != slot {
			t.Errorf("the highest flush position in the trace is %s, the slot is at %s", a.last, slot)
		}
	}
	compareStopped(t, orders, s, "walfleet")
	for _, text := range a.errors[:min(10, len(a.errors))] {
		t.Error(text)
	}
	t.Logf("%d standby status updates, %d with a flush position", a.updates, a.judged)
	if least := rounds(50, 500); a.judged < least {
		t.Errorf("%d flush positions were judged, want %d", a.judged, least)
	}
}

func followFile(t testing.TB, a *audit, name string) {
	t.Helper()
	f, err := os.Open(name)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := a.follow(f); err != nil {
		t.Fatal(err)
	}
}
