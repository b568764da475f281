//go:build !linux

package archive

import (
	"errors"
	"os"
)

// Other systems are for development: the portable calls are enough there.

func allocate(f *os.File, size int64) error { return f.Truncate(size) }

func dropCache(*os.File) error { return nil }

func syncData(f *os.File) error { return f.Sync() }

func renameExclusive(string, string) error { return errors.ErrUnsupported }
