package archive

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
)

// A record is replaced as a whole, may be read by the archive's owner whoever wrote it, and
// is no stranger to whoever lists the directory.
func TestRecords(t *testing.T) {
	dir := t.TempDir()
	var got struct{ N int }
	if err := ReadRecord(dir, VerifyRecord, &got); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("there is none: %v", err)
	}
	for n := range 3 {
		if err := StoreRecord(dir, VerifyRecord, struct{ N int }{n}); err != nil {
			t.Fatal(err)
		}
		if err := ReadRecord(dir, VerifyRecord, &got); err != nil || got.N != n {
			t.Errorf("%+v, %v, want %d", got, err, n)
		}
	}
	path := filepath.Join(dir, VerifyRecord)
	if info, err := os.Stat(path); err != nil || info.Mode() != 0o644 {
		t.Errorf("mode %v, %v", info.Mode(), err)
	}
	if err := os.WriteFile(path+tempSuffix, []byte("half of"), 0o600); err != nil { // a crash left it
		t.Fatal(err)
	}
	if c, err := ReadCatalogue(t.Context(), dir); err != nil || len(c.Unknown) != 0 {
		t.Errorf("unknown files %q, %v", c.Unknown, err)
	}
	d, err := Open(dir)
	if err != nil {
		t.Fatal(err)
	}
	defer d.Close()
	if _, err := os.Stat(path + tempSuffix); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("the unfinished file is still there: %v", err)
	}
	if err := os.WriteFile(path, []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if err := ReadRecord(dir, VerifyRecord, &got); !errors.As(err, new(*FileError)) {
		t.Errorf("a record that makes no sense: %v", err)
	}
}
