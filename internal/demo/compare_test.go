package demo

import (
	"bytes"
	"context"
	"io"
	"math/rand/v2"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/walfleet/walfleet/internal/wal"
)

// dirSource is a server's pg_wal without the server.
type dirSource string

func (d dirSource) openWAL(_ context.Context, name string) (io.ReadCloser, error) {
	return os.Open(filepath.Join(string(d), name))
}

// TestCompare: the demo's verdict is "OK" only if each archived byte that
// walfleet acknowledged is the server's.
func TestCompare(t *testing.T) {
	const size = wal.SegmentSize(1 << 20)
	// Segments 1, 2 and 3; the third is acknowledged up to 1000 bytes.
	const (
		one, two, three = "000000010000000000000001", "000000010000000000000002", "000000010000000000000003"
		acknowledged    = 1000
	)
	flip := func(t *testing.T, file string, at int64) {
		t.Helper()
		f, err := os.OpenFile(file, os.O_RDWR, 0)
		if err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 1)
		if _, err := f.ReadAt(b, at); err != nil {
			t.Fatal(err)
		}
		b[0] ^= 1
		if _, err := f.WriteAt(b, at); err != nil {
			t.Fatal(err)
		}
		if err := f.Close(); err != nil {
			t.Fatal(err)
		}
	}
	for _, test := range []struct {
		name string
		harm func(t *testing.T, archive, server string) error
		want string // in the error; empty: none
	}{
		{name: "identical"},
		{"first byte", func(t *testing.T, archive, _ string) error {
			flip(t, filepath.Join(archive, one), 0)
			return nil
		}, one + ": byte 0 (WAL position 0/100000)"},
		{"last byte", func(t *testing.T, archive, _ string) error {
			flip(t, filepath.Join(archive, two), int64(size)-1)
			return nil
		}, two + ": byte 1048575 (WAL position 0/2FFFFF)"},
		{"last acknowledged byte", func(t *testing.T, archive, _ string) error {
			flip(t, filepath.Join(archive, three+".partial"), acknowledged-1)
			return nil
		}, three + ": byte 999 (WAL position 0/3003E7)"},
		{"first byte not acknowledged", func(t *testing.T, archive, _ string) error {
			flip(t, filepath.Join(archive, three+".partial"), acknowledged)
			return nil
		}, ""},
		{"first segment missing", func(_ *testing.T, archive, _ string) error {
			return os.Remove(filepath.Join(archive, one))
		}, one + ": missing in the archive"},
		{"segment missing between others", func(_ *testing.T, archive, _ string) error {
			return os.Remove(filepath.Join(archive, two))
		}, two + ": missing in the archive"},
		{"partial missing", func(_ *testing.T, archive, _ string) error {
			return os.Remove(filepath.Join(archive, three+".partial"))
		}, three + ": missing in the archive"},
		{"short segment", func(_ *testing.T, archive, _ string) error {
			return os.Truncate(filepath.Join(archive, two), int64(size)-1)
		}, two + " has 1048575 bytes instead of 1048576"},
		{"short partial", func(_ *testing.T, archive, _ string) error {
			return os.Truncate(filepath.Join(archive, three+".partial"), 5000)
		}, three + ".partial has 5000 bytes"},
		{"not sealed", func(_ *testing.T, archive, _ string) error {
			return os.Rename(filepath.Join(archive, two), filepath.Join(archive, two+".partial"))
		}, two + ": not sealed"},
		{"sealed too early", func(_ *testing.T, archive, _ string) error {
			return os.Rename(filepath.Join(archive, three+".partial"), filepath.Join(archive, three))
		}, three + ": sealed, but"},
		{"two files of one segment", func(_ *testing.T, archive, _ string) error {
			return os.WriteFile(filepath.Join(archive, two+".partial"), make([]byte, size), 0o600)
		}, two + ": stored more than once"},
		{"another timeline", func(_ *testing.T, archive, _ string) error {
			return os.WriteFile(filepath.Join(archive, "000000020000000000000003.partial"), make([]byte, size), 0o600)
		}, "000000020000000000000003: the server's own: "},
		{"opened ahead", func(_ *testing.T, archive, _ string) error {
			return os.WriteFile(filepath.Join(archive, "000000010000000000000004.partial"), make([]byte, size), 0o600)
		}, ""},
		{"before what is expected", func(t *testing.T, archive, server string) error {
			writeBoth(t, archive, server, "000000010000000000000000", "000000010000000000000000", int(size))
			flip(t, filepath.Join(archive, "000000010000000000000000"), 7)
			return nil
		}, "000000010000000000000000: byte 7 "},
		{"other files", func(_ *testing.T, archive, _ string) error {
			return os.WriteFile(filepath.Join(archive, "archive.json"), []byte("{}"), 0o600)
		}, ""},
		{"server lost a segment", func(_ *testing.T, _, server string) error {
			return os.Remove(filepath.Join(server, one))
		}, one + ": the server's own: "},
		{"server's segment is short", func(_ *testing.T, _, server string) error {
			return os.Truncate(filepath.Join(server, one), 10)
		}, one + ": reading the server's own: "},
		{"no archive", func(_ *testing.T, archive, _ string) error { return os.RemoveAll(archive) }, "no such file"},
	} {
		t.Run(test.name, func(t *testing.T) {
			archive, server := filepath.Join(t.TempDir(), "archive"), t.TempDir()
			if err := os.Mkdir(archive, 0o700); err != nil {
				t.Fatal(err)
			}
			writeBoth(t, archive, server, one, one, int(size))
			writeBoth(t, archive, server, two, two, int(size))
			writeBoth(t, archive, server, three+".partial", three, int(size))
			if test.harm != nil {
				if err := test.harm(t, archive, server); err != nil {
					t.Fatal(err)
				}
			}
			got, err := compare(t.Context(), expected{
				dir: archive, size: size,
				first: 1<<20 + 4711, sealed: 3 << 20, flushed: 3<<20 + acknowledged,
			}, dirSource(server))
			if test.want != "" {
				if err == nil || !strings.Contains(err.Error(), test.want) {
					t.Fatalf("error %v, want one with %q", err, test.want)
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if want := (compared{segments: 3, sealed: 2, bytes: 2<<20 + acknowledged}); got != want {
				t.Errorf("got %+v, want %+v", got, want)
			}
		})
	}
}

// writeBoth writes a segment of random bytes into the archive and the server.
func writeBoth(t *testing.T, archive, server, ours, theirs string, size int) {
	t.Helper()
	data := make([]byte, size)
	r := rand.NewChaCha8([32]byte([]byte(strings.Repeat("seed", 8))))
	_, _ = r.Read(data) // never fails
	for _, file := range []string{filepath.Join(archive, ours), filepath.Join(server, theirs)} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
}

// TestCompareBytesChunks: differences are found on both sides of the bounds of
// the chunks that are read at once.
func TestCompareBytesChunks(t *testing.T) {
	const chunk = 1 << 20
	for _, n := range []int{1, chunk - 1, chunk, chunk + 1, 2*chunk + 3} {
		a := make([]byte, n)
		if err := compareBytes(t.Context(), 0, int64(n), bytes.NewReader(a), bytes.NewReader(a)); err != nil {
			t.Errorf("%d equal bytes: %v", n, err)
		}
		for _, at := range []int{0, chunk - 1, chunk, n - 1} {
			if at >= n {
				continue
			}
			b := bytes.Clone(a)
			b[at] = 1
			if err := compareBytes(t.Context(), 0, int64(n), bytes.NewReader(a), bytes.NewReader(b)); err == nil {
				t.Errorf("%d bytes: a difference at %d is not found", n, at)
			}
		}
	}
}
