package verify

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
)

// progressFile keeps which segments were found to be whole, so that a run that was interrupted can go on. A segment
// counts as long as its files have the same names, sizes and times. A nil one keeps nothing.
type progressFile struct {
	path string

	mu      sync.Mutex
	kept    progress
	before  map[string]storedState // of an earlier run
	changed time.Time              // when it was last written
}

// progress is the file's content: JSON.
type progress struct {
	Archive  string                 `json:"archive"` // its absolute path
	SystemID string                 `json:"system_identifier"`
	Whole    map[string]storedState `json:"whole"` // by the file's name
}

type storedState struct {
	Bytes    int64     `json:"bytes"`
	Modified time.Time `json:"modified"`
}

// saveInterval is how much work can be lost.
const saveInterval = 5 * time.Second

// openProgress reads the file of an earlier run, if there is one. That of another archive is an error.
func openProgress(path string, c archive.Catalogue) (*progressFile, error) {
	if path == "" {
		return nil, nil
	}
	dir, err := filepath.Abs(c.Path)
	if err != nil {
		return nil, err
	}
	f := &progressFile{path: path, changed: time.Now(),
		kept: progress{dir, strconv.FormatUint(c.Identity.SystemID, 10), map[string]storedState{}}}
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return f, f.save()
	}
	if err != nil {
		return nil, err
	}
	var before progress
	if err := json.Unmarshal(data, &before); err != nil {
		return nil, fmt.Errorf("%s is no file of an interrupted verify: %w", path, err)
	}
	if before.Archive != f.kept.Archive || before.SystemID != f.kept.SystemID {
		return nil, fmt.Errorf("%s is of another archive, %q", path, before.Archive)
	}
	f.before = before.Whole
	return f, nil
}

// has tells whether a piece was whole in the earlier run.
func (f *progressFile) has(p *piece) bool {
	if f == nil {
		return false
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range p.files {
		if was, ok := f.before[s.File]; !ok || was.Bytes != s.Bytes || !was.Modified.Equal(s.Modified) {
			return false
		}
	}
	for _, s := range p.files {
		f.kept.Whole[s.File] = f.before[s.File]
	}
	return true
}

// add notes that a piece is whole.
func (f *progressFile) add(p *piece) {
	if f == nil {
		return
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	for _, s := range p.files {
		f.kept.Whole[s.File] = storedState{s.Bytes, s.Modified}
	}
	if time.Since(f.changed) > saveInterval {
		_ = f.save() // the last time tells
	}
}

// close writes the file, or removes it when everything was checked: the next run begins anew.
func (f *progressFile) close(complete bool) error {
	if f == nil {
		return nil
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	if complete {
		return os.Remove(f.path)
	}
	return f.save()
}

func (f *progressFile) save() error {
	f.changed = time.Now()
	data, err := json.Marshal(f.kept)
	if err != nil {
		return err
	}
	temp := f.path + ".tmp"
	if err := os.WriteFile(temp, data, 0o600); err != nil {
		return fmt.Errorf("what was checked cannot be kept: %w", err)
	}
	return os.Rename(temp, f.path)
}
