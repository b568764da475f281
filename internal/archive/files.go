package archive

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
)

// The durable sequences of this package stand here, each in one place.

// createFile makes path with size bytes, all of them reading as zero, and
// returns it open for reading and writing. When it returns the file and its name
// are durable. It never replaces a file: one that is there is fs.ErrExist.
//
// The file is made under another name first, so that after a crash path either
// is not there or has its full size.
func createFile(path string, size int64, mode fs.FileMode) (*os.File, error) {
	f, err := writeTemp(path, mode, func(f *os.File) error { return allocate(f, size) })
	if err != nil {
		return nil, err
	}
	if err := publish(path); err != nil {
		f.Close()
		return nil, err
	}
	return f, nil
}

// storeFile makes path with the given content, durably, without replacing a file
// that is there.
func storeFile(path string, data []byte, mode fs.FileMode) error {
	f, err := writeTemp(path, mode, func(f *os.File) error {
		_, err := f.Write(data)
		return err
	})
	if err != nil {
		return err
	}
	return errors.Join(f.Close(), publish(path))
}

// tempSuffix marks a file that is not finished. Those that a crash left behind
// are removed when the directory is opened.
const tempSuffix = ".tmp"

// writeTemp makes path's temporary file and syncs it.
func writeTemp(path string, mode fs.FileMode, fill func(*os.File) error) (_ *os.File, err error) {
	f, err := os.OpenFile(path+tempSuffix, os.O_RDWR|os.O_CREATE|os.O_TRUNC, mode)
	if err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), os.Remove(path+tempSuffix))
		}
	}()
	if err := f.Chmod(mode); err != nil { // the umask may have taken the group's bit
		return nil, err
	}
	if err := fill(f); err != nil {
		return nil, err
	}
	return f, f.Sync()
}

// publish gives path's synced temporary file its name, durably and without
// replacing another file.
func publish(path string) error {
	if err := renameNoReplace(path+tempSuffix, path); err != nil {
		return errors.Join(err, os.Remove(path+tempSuffix))
	}
	return syncDir(filepath.Dir(path))
}

// renameNoReplace renames a file; it fails with fs.ErrExist when to exists.
func renameNoReplace(from, to string) error {
	err := renameExclusive(from, to)
	if !errors.Is(err, errors.ErrUnsupported) {
		return err
	}
	// A second name and then the removal of the first: link(2) never replaces.
	// A crash between the two leaves both, which opening the directory mends.
	if err := os.Link(from, to); err != nil {
		return err
	}
	return os.Remove(from)
}

// syncFile makes a file's content durable.
func syncFile(path string) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	return errors.Join(f.Sync(), f.Close())
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

// makeDir makes a directory and its missing parents, each durably.
func makeDir(path string, mode fs.FileMode) error {
	err := os.Mkdir(path, mode)
	if errors.Is(err, fs.ErrNotExist) {
		if err := makeDir(filepath.Dir(path), mode); err != nil {
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
