//go:build unix

package demo

import (
	"context"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"
)

// untilHangup returns a context that also ends with the terminal. Until stop is
// called, the loss of whoever reads the output (SIGPIPE) is an error of the
// write and not this process's end, which would leave servers behind.
func untilHangup(ctx context.Context) (_ context.Context, stop func()) {
	pipe := make(chan os.Signal, 1) // a caught signal, unlike an ignored one, is not inherited
	signal.Notify(pipe, syscall.SIGPIPE)
	stopHangup := func() {}
	if !signal.Ignored(syscall.SIGHUP) { // as by nohup
		ctx, stopHangup = signal.NotifyContext(ctx, syscall.SIGHUP)
	}
	return ctx, func() {
		stopHangup()
		signal.Stop(pipe)
	}
}

// terminalWidth is the number of columns of the terminal f, or 0 if it is none.
func terminalWidth(f *os.File) int {
	ws, err := unix.IoctlGetWinsize(int(f.Fd()), unix.TIOCGWINSZ)
	if err != nil {
		return 0
	}
	if ws.Col == 0 { // a terminal that does not know
		return 80
	}
	return int(ws.Col)
}

// passable tells whether any user may go through dir and all directories above
// it, as a server that runs as another user must.
func passable(dir string) bool {
	for {
		info, err := os.Stat(dir)
		if err != nil || info.Mode()&0o001 == 0 {
			return false
		}
		if dir == filepath.Dir(dir) {
			return true
		}
		dir = filepath.Dir(dir)
	}
}
