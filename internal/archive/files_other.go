//go:build !linux

package archive

import "errors"

// Other systems are for development: the portable calls are enough there.

func (f osFile) Allocate(size int64) error { return f.Truncate(size) }

func (osFile) DropCache() error { return nil }

func (f osFile) SyncData() error { return f.Sync() }

func renameExclusive(string, string) error { return errors.ErrUnsupported }
