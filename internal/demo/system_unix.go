//go:build unix

package demo

import (
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

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

// freeSpace is how many bytes the file system of dir has for this user.
func freeSpace(dir string) (int64, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	return int64(fs.Bavail) * int64(fs.Bsize), nil
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
