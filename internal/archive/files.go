package archive

import (
	"errors"
	"fmt"
	"io"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"slices"
	"syscall"

	"golang.org/x/sys/unix"
)

// disk is the directory that an archive lives in. All of an archive's files are
// in one directory, so names are enough.
type disk interface {
	Names() ([]string, error)
	Open(name string) (file, error)                     // for reading; fs.ErrNotExist
	OpenWrite(name string) (file, error)                // for reading and writing; fs.ErrNotExist
	Create(name string, mode fs.FileMode) (file, error) // empty, whatever was there
	Rename(from, to string) error                       // never replaces: fs.ErrExist. A crash may leave both names
	Replace(from, to string) error                      // replaces
	Remove(name string) error
	Same(a, b string) bool // whether two names are of one file
	Sync() error           // makes names durable
	SyncAll() error        // makes everything durable that is there
	Free() (int64, error)  // bytes that may still be used
}

// file is an open file of a disk.
type file interface {
	io.ReaderAt
	io.WriterAt
	io.Closer
	Size() (int64, error)
	Allocate(size int64) error // sets the size; what was not written reads as zero
	Sync() error               // makes content and size durable
	SyncData() error           // makes content durable; the size was settled before
	DropCache() error          // makes later reads show what the disk has
	// WriteBack begins to write to the disk, which promises nothing. After an error a
	// sync may return nil though bytes are lost.
	WriteBack(offset, n int64) error
	Forget(offset, n int64) // what was synced there is not needed in memory any more
}

// The durable sequences of this package stand here, each in one place.

// tempSuffix marks a file that is not finished. Those that a crash left behind
// are removed when the directory is opened.
const tempSuffix = ".tmp"

// createFile makes a file with size bytes, all of them reading as zero, and
// returns it open. When it returns the file and its name are durable. It never
// replaces a file: one that is there is fs.ErrExist.
//
// The file is made under another name first, so that after a crash it either is
// not there or has its full size.
func createFile(d disk, name string, size int64, mode fs.FileMode) (file, error) {
	f, err := writeTemp(d, name, mode, func(f file) error { return f.Allocate(size) })
	if err != nil {
		return nil, err
	}
	if err := publish(d, name, d.Rename); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// storeFile makes a file with the given content, durably. publishing is the
// disk's Rename or Replace.
func storeFile(d disk, name string, data []byte, mode fs.FileMode, publishing func(from, to string) error) error {
	f, err := writeTemp(d, name, mode, func(f file) error {
		_, err := f.WriteAt(data, 0)
		return err
	})
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), publish(d, name, publishing))
}

// writeTemp makes the temporary file of a name and syncs it.
func writeTemp(d disk, name string, mode fs.FileMode, fill func(file) error) (_ file, err error) {
	f, err := d.Create(name+tempSuffix, mode)
	if err != nil {
		return nil, err
	}
	if err := fill(f); err != nil {
		return nil, errors.Join(err, f.Close(), d.Remove(name+tempSuffix))
	}
	if err := f.Sync(); err != nil {
		return nil, errors.Join(err, f.Close(), d.Remove(name+tempSuffix))
	}
	return f, nil
}

// publish gives a synced temporary file its name, durably.
func publish(d disk, name string, publishing func(from, to string) error) error {
	if err := publishing(name+tempSuffix, name); err != nil {
		return errors.Join(err, d.Remove(name+tempSuffix))
	}
	return d.Sync()
}

// readFile reads all of a file.
func readFile(d disk, name string) ([]byte, error) {
	f, err := d.Open(name)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	size, err := f.Size()
	if err != nil {
		return nil, err
	}
	if size > maxSmallFile {
		return nil, fmt.Errorf("%s has %d bytes, too many for what it is", name, size)
	}
	data := make([]byte, size)
	if _, err := f.ReadAt(data, 0); err != nil && err != io.EOF {
		return nil, err
	}
	return data, nil
}

// from reads a file from offset on.
func from(f file, offset int64) io.Reader {
	return io.NewSectionReader(f, offset, math.MaxInt64-offset)
}

// isDiskError tells an error of the operating system from one about what a file
// has, or does not have.
func isDiskError(err error) bool { return errors.As(err, new(syscall.Errno)) }

// onlyDiskErrors is nil for an error that is not the operating system's.
func onlyDiskErrors(err error) error {
	if isDiskError(err) {
		return err
	}
	return nil
}

// maxSmallFile bounds the size of a file that is read as a whole, in bytes.
const maxSmallFile = 16 << 20

// syncFile makes a file's content durable.
func syncFile(d disk, name string) error {
	f, err := d.Open(name)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
}

// osDisk is a directory of the operating system.
type osDisk string

func (d osDisk) path(name string) string { return filepath.Join(string(d), name) }

func (d osDisk) Names() ([]string, error) {
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return nil, err
	}
	names := make([]string, len(entries))
	for i, e := range entries {
		names[i] = e.Name()
	}
	return names, nil
}

func (d osDisk) Open(name string) (file, error) { return d.open(name, os.O_RDONLY, 0) }

func (d osDisk) OpenWrite(name string) (file, error) { return d.open(name, os.O_RDWR, 0) }

func (d osDisk) open(name string, flag int, mode fs.FileMode) (file, error) {
	f, err := os.OpenFile(d.path(name), flag, mode)
	if err != nil {
		return nil, err
	}
	return osFile{f}, nil
}

func (d osDisk) Create(name string, mode fs.FileMode) (file, error) {
	f, err := d.open(name, os.O_RDWR|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return nil, err
	}
	if err := os.Chmod(d.path(name), mode); err != nil { // the umask may have taken the group's bit
		return nil, errors.Join(err, f.Close())
	}
	return f, nil
}

func (d osDisk) Rename(from, to string) error {
	err := renameExclusive(d.path(from), d.path(to))
	if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	// A second name and then the removal of the first: link(2) never replaces.
	if err := os.Link(d.path(from), d.path(to)); err != nil {
		return err
	}
	return os.Remove(d.path(from))
}

func (d osDisk) Replace(from, to string) error { return os.Rename(d.path(from), d.path(to)) }

func (d osDisk) Remove(name string) error { return os.Remove(d.path(name)) }

func (d osDisk) Same(a, b string) bool {
	x, err1 := os.Stat(d.path(a))
	y, err2 := os.Stat(d.path(b))
	return err1 == nil && err2 == nil && os.SameFile(x, y)
}

func (d osDisk) Sync() error { return syncDir(string(d)) }

func (d osDisk) SyncAll() error { return syncAll(d) }

func (d osDisk) Free() (int64, error) {
	var st unix.Statfs_t
	if err := unix.Statfs(string(d), &st); err != nil {
		return 0, &os.PathError{Op: "statfs", Path: string(d), Err: err}
	}
	return int64(st.Bavail) * int64(st.Bsize), nil
}

// osFile is a file of the operating system; Allocate, SyncData and DropCache
// depend on which one.
type osFile struct{ *os.File }

func (f osFile) Size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// unsynced is a disk that leaves all syncing to the operating system.
type unsynced struct{ disk }

func (d unsynced) Open(name string) (file, error)      { return unsyncedOpen(d.disk.Open(name)) }
func (d unsynced) OpenWrite(name string) (file, error) { return unsyncedOpen(d.disk.OpenWrite(name)) }
func (d unsynced) Create(name string, mode fs.FileMode) (file, error) {
	return unsyncedOpen(d.disk.Create(name, mode))
}
func (unsynced) Sync() error    { return nil }
func (unsynced) SyncAll() error { return nil }

// unsyncedFile is a file of an unsynced disk. What was not synced stays cached.
type unsyncedFile struct{ file }

func unsyncedOpen(f file, err error) (file, error) {
	if err != nil {
		return nil, err
	}
	return unsyncedFile{f}, nil
}

func (unsyncedFile) Sync() error                  { return nil }
func (unsyncedFile) SyncData() error              { return nil }
func (unsyncedFile) DropCache() error             { return nil }
func (unsyncedFile) WriteBack(int64, int64) error { return nil }
func (unsyncedFile) Forget(int64, int64)          {}

// SyncFailed tells whether err is of a sync that failed: what the disk has is not
// known any more.
func SyncFailed(err error) bool {
	var pe *os.PathError
	return errors.As(err, &pe) && slices.Contains([]string{"sync", "fdatasync", "syncfs", "sync_file_range"}, pe.Op)
}

// syncDir makes the names in a directory durable.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	if err := errors.Join(d.Sync(), d.Close()); err != nil {
		return fmt.Errorf("sync directory %s: %w", path, err)
	}
	return nil
}

// MakeDir makes a directory and its missing parents, each durably.
func MakeDir(path string, mode fs.FileMode) error {
	err := os.Mkdir(path, mode)
	if errors.Is(err, fs.ErrNotExist) {
		if err := MakeDir(filepath.Dir(path), mode); err != nil {
			return err
		}
		err = os.Mkdir(path, mode)
	}
	if errors.Is(err, fs.ErrExist) {
		info, err := os.Stat(path)
		if err == nil && !info.IsDir() {
			err = fmt.Errorf("%s is not a directory", path)
		}
		return err
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}
