package restore

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"
)

// temporary begins the names of all that is not meant to stay in a server's
// pg_wal. pg_basebackup and pg_rewind leave out what begins like that
// (PG_TEMP_FILE_PREFIX in common/file_utils.h), and servers ignore it there.
const temporary = "pgsql_tmp.walfleet"

// output is a file on its way to its place. It is locked (flock) until it is
// there, so that what a killed process left is told from what another one is
// writing, and used again.
type output struct {
	*os.File
	place string
}

// createOutput makes an empty file beside its place.
func createOutput(place string) (*output, error) {
	mode := fileMode(filepath.Dir(place))
	var out *output
	for n := range maxOutputs {
		name := filepath.Join(filepath.Dir(place), fmt.Sprintf("%s.%s.%d", temporary, filepath.Base(place), n))
		if out != nil { // others' names, which a killed process may have left
			if f, _ := lockFile(name, os.O_RDWR, 0); f != nil {
				err := errors.Join(os.Remove(name), f.Close())
				_ = err // it is there next time
			}
			continue
		}
		f, err := lockFile(name, os.O_RDWR|os.O_CREATE, mode)
		if err != nil {
			return nil, err
		}
		if f == nil {
			continue
		}
		out = &output{f, place}
		if err := errors.Join(f.Truncate(0), f.Chmod(mode)); err != nil {
			return nil, errors.Join(err, out.discard())
		}
	}
	if out == nil {
		return nil, fmt.Errorf("%d other processes restore %s", maxOutputs, place)
	}
	return out, nil
}

// maxOutputs bounds how many processes can restore to the same place at a time.
const maxOutputs = 8

// fileMode is that of a server's own files in dir.
func fileMode(dir string) fs.FileMode {
	if info, err := os.Stat(dir); err == nil && info.Mode()&0o050 == 0o050 && info.Mode()&0o005 == 0 {
		return 0o640
	}
	return 0o600
}

// lockFile opens and locks a file; nil: another process has it.
func lockFile(name string, flag int, mode fs.FileMode) (*os.File, error) {
	for range retries {
		f, err := os.OpenFile(name, flag, mode)
		if err != nil {
			return nil, err
		}
		err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == unix.EWOULDBLOCK {
			return nil, f.Close()
		}
		if err != nil {
			return nil, errors.Join(&fs.PathError{Op: "flock", Path: name, Err: err}, f.Close())
		}
		// It may have got to its place before the lock was free, and have another name now.
		info, err1 := f.Stat()
		named, err2 := os.Stat(name)
		if err1 == nil && err2 == nil && os.SameFile(info, named) {
			return f, nil
		}
		f.Close()
	}
	return nil, nil
}

// publish makes the file durable and gives it its place, in which it takes the
// place of another one.
func (o *output) publish() error {
	if err := o.Sync(); err != nil {
		return errors.Join(err, o.discard())
	}
	if err := os.Rename(o.Name(), o.place); err != nil {
		return errors.Join(err, o.discard())
	}
	return errors.Join(o.Close(), syncDir(filepath.Dir(o.place)))
}

// discard removes the file.
func (o *output) discard() error { return errors.Join(os.Remove(o.Name()), o.Close()) }

// syncDir makes the names in a directory durable.
func syncDir(path string) error {
	d, err := os.Open(path)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}
