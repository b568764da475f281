package receiver

import (
	"runtime"

	"golang.org/x/sys/unix"
)

// lowerPriority makes the calling goroutine's thread yield to others that want
// the processor: on Linux a priority is a thread's own. The thread ends with the
// goroutine. Failing to is no trouble.
func lowerPriority() {
	runtime.LockOSThread()
	_ = unix.Setpriority(unix.PRIO_PROCESS, unix.Gettid(), 10)
}
