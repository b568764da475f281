package archive

import (
	"bytes"
	"io"
	"testing"
)

// What was cut off anywhere, or has something behind it, is no compressed file.
func TestDecompressToTheEnd(t *testing.T) {
	wal := bytes.Repeat([]byte("a segment of WAL, 64 KB and more "), 4000)
	for _, m := range methods {
		t.Run(m.name, func(t *testing.T) {
			var file bytes.Buffer
			w, err := compressTo(&file, Compression{Method: m.name})
			if err != nil {
				t.Fatal(err)
			}
			if _, err := w.Write(wal); err != nil {
				t.Fatal(err)
			}
			if err := w.Close(); err != nil {
				t.Fatal(err)
			}
			whole := file.Bytes()
			read := func(p []byte) error {
				z, err := decompress(bytes.NewReader(p), m.suffix)
				if err != nil {
					return err
				}
				defer z.Close()
				got, err := io.ReadAll(z)
				if err == nil && !bytes.Equal(got, wal) {
					t.Errorf("%d bytes came out, want %d", len(got), len(wal))
				}
				return err
			}
			if err := read(whole); err != nil {
				t.Fatal(err)
			}
			for n := 1; n < len(whole); n++ {
				if read(whole[:n]) == nil {
					t.Errorf("the first %d of %d bytes pass for the file", n, len(whole))
				}
			}
			behind := [][]byte{{0}, {1, 2}, make([]byte, 100), []byte("text")}
			if m.name == "gzip" { // another frame of the others' yields more WAL, and that is noticed
				behind = append(behind, whole)
			}
			for _, more := range behind {
				if read(append(bytes.Clone(whole), more...)) == nil {
					t.Errorf("%q behind the end passes", more[:min(10, len(more))])
				}
			}
		})
	}
}
