package archive

import (
	"encoding/json"
	"fmt"
	"path/filepath"
)

// Names of records: files in an archive's directory that say, as JSON, what was last found
// out about it. Nothing depends on them, and whoever reads the archive may write them.
const (
	VerifyRecord = ".verify.json"
	DrillRecord  = ".drill.json"
)

// records are their names.
var records = []string{VerifyRecord, DrillRecord}

// StoreRecord writes a record durably, in the place of the last one. Everyone who may use
// the directory may read it, for whoever writes it may be another user than the archiver.
func StoreRecord(dir, name string, record any) error {
	data, err := json.Marshal(record)
	if err != nil {
		return err
	}
	d := osDisk(dir)
	if err := storeFile(d, name, append(data, '\n'), 0o644, d.Replace); err != nil {
		return fmt.Errorf("archive directory: %w", err)
	}
	return nil
}

// ReadRecord reads a record. The error is fs.ErrNotExist where there is none, a *FileError
// where it makes no sense, or what the file system said.
func ReadRecord(dir, name string, record any) error {
	data, err := readFile(osDisk(dir), name)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(data, record); err != nil {
		return &FileError{Path: filepath.Join(dir, name), Reason: err.Error()}
	}
	return nil
}
