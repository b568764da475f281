//go:build linux

package main

import (
	"errors"
	"fmt"
	"math"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// fileSystem is where a directory is.
type fileSystem struct {
	memory bool   // a tmpfs
	free   int64  // bytes, for this user
	device string // "254:0", major and minor number
}

func fileSystemOf(dir string) (fileSystem, error) {
	var fs unix.Statfs_t
	if err := unix.Statfs(dir, &fs); err != nil {
		return fileSystem{}, &os.PathError{Op: "statfs", Path: dir, Err: err}
	}
	var stat unix.Stat_t
	if err := unix.Stat(dir, &stat); err != nil {
		return fileSystem{}, &os.PathError{Op: "stat", Path: dir, Err: err}
	}
	return fileSystem{
		memory: fs.Type == unix.TMPFS_MAGIC || fs.Type == unix.RAMFS_MAGIC,
		free:   int64(fs.Bavail) * fs.Bsize,
		device: fmt.Sprintf("%d:%d", unix.Major(stat.Dev), unix.Minor(stat.Dev)),
	}, nil
}

// settle writes all to the disk that waits for it in the file system of dir.
func settle(dir string) error {
	f, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(unix.Syncfs(int(f.Fd())), f.Close())
}

// deviceBytes is what was written to the device of dir since the machine's start, after all that waits was. It is NaN where
// the file system has no device of its own (overlay, btrfs, NFS). Others who write there are counted too.
func deviceBytes(dir string) (float64, error) {
	if err := settle(dir); err != nil {
		return 0, err
	}
	fs, err := fileSystemOf(dir)
	if err != nil {
		return 0, err
	}
	stat, err := os.ReadFile("/sys/dev/block/" + fs.device + "/stat")
	if errors.Is(err, os.ErrNotExist) {
		return math.NaN(), nil
	}
	if err != nil {
		return 0, err
	}
	// The seventh field is sectors written, of 512 bytes (Documentation/block/stat.rst).
	fields := strings.Fields(string(stat))
	if len(fields) < 7 {
		return 0, fmt.Errorf("/sys/dev/block/%s/stat: %q", fs.device, stat)
	}
	sectors, err := strconv.ParseInt(fields[6], 10, 64)
	return float64(sectors) * 512, err
}
