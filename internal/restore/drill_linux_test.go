package restore

import (
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"testing"

	"golang.org/x/sys/unix"
)

// What the drill's server starts can change files in its directory, and no other.
func TestConfine(t *testing.T) {
	inside, outside := t.TempDir(), t.TempDir()
	victim := filepath.Join(outside, "victim")
	if err := os.WriteFile(victim, []byte("whole"), 0o666); err != nil {
		t.Fatal(err)
	}
	type result struct {
		confined bool
		text     string
		err      error
	}
	results := make(chan result)
	go func() {
		runtime.LockOSThread() // and never unlocked: the thread ends
		confined := confine(inside)
		cmd := exec.Command("sh", "-c", `
			mkdir "$1/a" "$1/b" && echo x >"$1/a/x" && mv "$1/a/x" "$1/b/y" && : >"$1/b/y" && echo x >/dev/null && echo inside works
			(echo x >>"$2/victim") 2>/dev/null && echo appended
			(: >"$2/victim") 2>/dev/null && echo truncated
			rm -f "$2/victim" 2>/dev/null && echo removed
			mkdir "$2/new" 2>/dev/null && echo made
			cat "$2/victim"`, "sh", inside, outside)
		out, err := cmd.CombinedOutput()
		results <- result{confined, string(out), err}
	}()
	r := <-results
	if !r.confined {
		_, _, errno := unix.Syscall(unix.SYS_LANDLOCK_CREATE_RULESET, 0, 0, unix.LANDLOCK_CREATE_RULESET_VERSION)
		if errno == 0 {
			t.Error("the kernel has Landlock, and a drill is not confined")
		}
		t.Skipf("this kernel has no Landlock: %v", errno)
	}
	if want := "inside works\nwhole"; r.err != nil || r.text != want {
		t.Errorf("%v: %q, want %q", r.err, r.text, want)
	}
	// This process is not confined.
	if err := os.WriteFile(victim, nil, 0o600); err != nil {
		t.Error(err)
	}
}
