//go:build !linux

package archive

import (
	"errors"
	"os"
)

// Other systems are for development: the portable calls are enough there.

func (f osFile) Allocate(size int64) error { return f.Truncate(size) }

func (osFile) DropCache() error { return nil }

func (osFile) WriteBack(int64, int64) error { return nil }

func (osFile) Forget(int64, int64) {}

func (f osFile) SyncData() error { return f.Sync() }

func renameExclusive(string, string) error { return errors.ErrUnsupported }

func syncAll(d osDisk) error {
	entries, err := os.ReadDir(string(d))
	if err != nil {
		return err
	}
	for _, e := range entries {
		if e.Type().IsRegular() {
			if err := syncFile(d, e.Name()); err != nil {
				return err
			}
		}
	}
	return d.Sync()
}
