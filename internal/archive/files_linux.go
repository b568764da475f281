package archive

import (
	"errors"
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Allocate gives f size bytes without writing them. Where the file system has no
// fallocate the file is sparse, and a full disk shows when WAL is written.
func (f osFile) Allocate(size int64) error {
	var err error
	for {
		if err = unix.Fallocate(int(f.Fd()), 0, 0, size); err != unix.EINTR {
			break
		}
	}
	switch err {
	case nil:
		return nil
	case unix.EOPNOTSUPP, unix.ENOSYS, unix.EINVAL, unix.ENODEV:
		return f.Truncate(size)
	}
	return &os.PathError{Op: "fallocate", Path: f.Name(), Err: err}
}

// DropCache forgets the clean pages of f (posix_fadvise(2),
// POSIX_FADV_DONTNEED).
func (f osFile) DropCache() error {
	if err := unix.Fadvise(int(f.Fd()), 0, 0, unix.FADV_DONTNEED); err != nil {
		return &os.PathError{Op: "fadvise", Path: f.Name(), Err: err}
	}
	return nil
}

// WriteBack is sync_file_range(2) without its flags to wait. An error of a write
// that is under way stays for the fdatasync that follows. One of beginning it, such
// as ext4's when it finds no block for a page, is returned here and nowhere else.
func (f osFile) WriteBack(offset, n int64) error {
	for {
		switch err := unix.SyncFileRange(int(f.Fd()), offset, n, unix.SYNC_FILE_RANGE_WRITE); err {
		case unix.EINTR:
		case nil, unix.ENOSYS, unix.EPERM, unix.EINVAL, unix.ESPIPE: // there is no such call here
			return nil
		default:
			return &os.PathError{Op: "sync_file_range", Path: f.Name(), Err: err}
		}
	}
}

// Forget lets go of whole pages that are clean; POSIX_FADV_DONTNEED again.
func (f osFile) Forget(offset, n int64) {
	_ = unix.Fadvise(int(f.Fd()), offset, n, unix.FADV_DONTNEED)
}

// SyncData is fdatasync(2).
func (f osFile) SyncData() error {
	for {
		err := unix.Fdatasync(int(f.Fd()))
		if err == unix.EINTR {
			continue
		}
		if err != nil {
			return &os.PathError{Op: "fdatasync", Path: f.Name(), Err: err}
		}
		return nil
	}
}

// renameExclusive is renameat2(2) with RENAME_NOREPLACE; errors.ErrUnsupported
// where the kernel or the file system does not have it.
func renameExclusive(from, to string) error {
	err := unix.Renameat2(unix.AT_FDCWD, from, unix.AT_FDCWD, to, unix.RENAME_NOREPLACE)
	switch err {
	case nil:
		return nil
	case unix.EINVAL, unix.ENOSYS, unix.EOPNOTSUPP:
		return fmt.Errorf("renameat2: %w", errors.ErrUnsupported)
	}
	return &os.LinkError{Op: "rename", Old: from, New: to, Err: err}
}

// syncAll is syncfs(2), which costs little where little is not synced; each file's
// own fsync in a large archive would take minutes.
func syncAll(d osDisk) error {
	dir, err := os.Open(string(d))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := unix.Syncfs(int(dir.Fd())); err != nil {
		return &os.PathError{Op: "syncfs", Path: string(d), Err: err}
	}
	return nil
}
