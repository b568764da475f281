package archive

import (
	"bytes"
	"encoding/binary"
	"errors"
	"io"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"testing"

	"github.com/klauspost/compress/zstd"
)

func TestParseCompression(t *testing.T) {
	for text, want := range map[string]Compression{
		"none":    {},
		"gzip":    {"gzip", 6},
		"gzip:1":  {"gzip", 1},
		"gzip:9":  {"gzip", 9},
		"lz4":     {"lz4", 1},
		"lz4:12":  {"lz4", 12},
		"zstd":    {"zstd", 3},
		"zstd:22": {"zstd", 22},
	} {
		c, err := ParseCompression(text)
		if err != nil || c != want {
			t.Errorf("%q is %+v, %v", text, c, err)
		}
		if again, err := ParseCompression(c.String()); again != c || err != nil {
			t.Errorf("%q is written %q, which is %+v, %v", text, c, again, err)
		}
	}
	for text, want := range map[string]string{
		"":        `unknown method "": none, gzip[:1-9], lz4[:1-12] or zstd[:1-22]`,
		"bzip2:9": `unknown method "bzip2": none, gzip[:1-9], lz4[:1-12] or zstd[:1-22]`,
		"GZIP":    `unknown method "GZIP": none, gzip[:1-9], lz4[:1-12] or zstd[:1-22]`,
		"none:1":  `unknown method "none": none, gzip[:1-9], lz4[:1-12] or zstd[:1-22]`,
		"5":       `unknown method "5": none, gzip[:1-9], lz4[:1-12] or zstd[:1-22]`,
		"gzip:":   `gzip has levels from 1 to 9, "" is none of them`,
		"gzip:0":  `gzip has levels from 1 to 9, "0" is none of them`,
		"gzip:10": `gzip has levels from 1 to 9, "10" is none of them`,
		"lz4:13":  `lz4 has levels from 1 to 12, "13" is none of them`,
		"zstd:23": `zstd has levels from 1 to 22, "23" is none of them`,
		"zstd:-1": `zstd has levels from 1 to 22, "-1" is none of them`,
		"zstd: 3": `zstd has levels from 1 to 22, " 3" is none of them`,
	} {
		if c, err := ParseCompression(text); err == nil || err.Error() != want {
			t.Errorf("%q is %+v, %v", text, c, err)
		}
	}
}

// compressed is data after a compression.
func compressed(t testing.TB, c Compression, data []byte) []byte {
	t.Helper()
	var b bytes.Buffer
	w, err := compressTo(&b, c)
	if err == nil {
		_, err = io.Copy(w, struct{ io.Reader }{bytes.NewReader(data)})
	}
	if err := errors.Join(err, w.Close()); err != nil {
		t.Fatalf("%s: %v", c, err)
	}
	return b.Bytes()
}

// decompressed reads all that a file with the suffix holds.
func decompressed(data []byte, suffix string) ([]byte, error) {
	r, err := decompress(bytes.NewReader(data), suffix)
	if err != nil {
		return nil, err
	}
	all, err := io.ReadAll(r)
	return all, errors.Join(err, r.Close())
}

// someWAL is n bytes that compress about as WAL does.
func someWAL(n int) []byte {
	r := rand.New(rand.NewPCG(7, 7))
	var b bytes.Buffer
	for b.Len() < n {
		at := r.IntN(1 << 19)
		b.Write(filler()[at : at+r.IntN(300)])
		b.Write(make([]byte, r.IntN(600)))
		if k := b.Len(); k > 4000 {
			b.Write(b.Bytes()[k-4000:][:r.IntN(2000)])
		}
	}
	return b.Bytes()[:n]
}

// What is compressed comes back, at every level; and the programs of that name read it.
func TestCodecs(t *testing.T) {
	wal := someWAL(1 << 20)
	for _, m := range methods {
		for level := 0; level <= m.highest; level++ {
			c := Compression{m.name, level}
			for _, data := range [][]byte{nil, wal[:1], wal[:64<<10], wal} {
				z := compressed(t, c, data)
				got, err := decompressed(z, c.suffix())
				if err != nil || !bytes.Equal(got, data) {
					t.Errorf("%s: %d bytes come back as %d, %v", c, len(data), len(got), err)
				}
				if len(data) == len(wal) && len(z) > len(wal)*9/10 {
					t.Errorf("%s: %d bytes of %d are left", c, len(z), len(wal))
				}
			}
		}
		t.Run(m.name, func(t *testing.T) {
			program, err := exec.LookPath(m.name)
			if err != nil {
				t.Skipf("%s is not installed", m.name)
			}
			name := filepath.Join(t.TempDir(), "x"+m.suffix)
			if err := os.WriteFile(name, compressed(t, Compression{m.name, 0}, wal), 0o600); err != nil {
				t.Fatal(err)
			}
			got, err := exec.Command(program, "-dc", name).Output()
			if err != nil || !bytes.Equal(got, wal) {
				t.Errorf("%s -dc: %d bytes, %v", m.name, len(got), err)
			}
		})
	}
}

// pg_receivewal finds a gzip file's size in its last four bytes, and writes LZ4 frames with blocks of 64 KB.
func TestCodecsAreThoseOfPgReceivewal(t *testing.T) {
	data := someWAL(3 << 20)
	z := compressed(t, Compression{"gzip", 0}, data)
	if size := binary.LittleEndian.Uint32(z[len(z)-4:]); size != uint32(len(data)) {
		t.Errorf("gzip: the last bytes say %d", size)
	}
	if n := bytes.Count(z, []byte{0x1f, 0x8b, 8, 0, 0, 0, 0, 0}); n != 1 {
		t.Errorf("gzip: %d members", n)
	}
	z = compressed(t, Compression{"lz4", 0}, data)
	if magic, flags, block := binary.LittleEndian.Uint32(z), z[4], z[5]; magic != 0x184D2204 || flags&0x04 == 0 || block>>4 != 4 {
		t.Errorf("lz4: magic %x, flags %x, block %x", magic, flags, block)
	}
}

// A file that was cut short or changed is not taken for what it was.
func TestCodecsNoticeDamage(t *testing.T) {
	data := someWAL(300 << 10)
	r := rand.New(rand.NewPCG(1, 1))
	for _, m := range methods {
		good := compressed(t, Compression{m.name, 0}, data)
		for range 200 {
			bad := bytes.Clone(good)
			what := "changed"
			if r.IntN(2) == 0 {
				what, bad = "cut short", bad[:r.IntN(len(bad))]
			} else {
				bad[r.IntN(len(bad))] ^= 1 << r.IntN(8)
			}
			if got, err := decompressed(bad, m.suffix); err == nil && !bytes.Equal(got, data) {
				t.Errorf("%s %s: read as %d bytes without an error", m.name, what, len(got))
			}
		}
	}
}

// A header that claims a huge window allocates nothing.
func TestHostileZstd(t *testing.T) {
	header, err := zstd.NewWriter(nil, zstd.WithWindowSize(512<<20))
	if err != nil {
		t.Fatal(err)
	}
	var b bytes.Buffer
	header.Reset(&b)
	header.Write([]byte("x"))
	header.Flush() // without a size, so that the window stands in the header
	header.Close()
	var before, after runtime.MemStats
	runtime.ReadMemStats(&before)
	_, err = decompressed(b.Bytes(), ".zst")
	runtime.ReadMemStats(&after)
	if err == nil || !strings.Contains(err.Error(), "window") {
		t.Errorf("a window of 512 MB: %v", err)
	}
	if n := after.TotalAlloc - before.TotalAlloc; n > maxZstdWindow {
		t.Errorf("%d bytes were allocated", n)
	}
}

// WALFLEET_BENCH_SEGMENT names a segment of a real server; without it, WAL is made up.
func BenchmarkCompress(b *testing.B) {
	data := benchSegment(b)
	for _, c := range []Compression{{"gzip", 1}, {"gzip", 0}, {"gzip", 9}, {"lz4", 0}, {"lz4", 9}, {"zstd", 1}, {"zstd", 0}, {"zstd", 7}, {"zstd", 12}} {
		b.Run(c.String(), func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			n := 0
			for b.Loop() {
				n = len(compressed(b, c, data))
			}
			b.ReportMetric(100*float64(n)/float64(len(data)), "%left")
		})
	}
}

func BenchmarkDecompress(b *testing.B) {
	data := benchSegment(b)
	for _, m := range methods {
		z := compressed(b, Compression{m.name, 0}, data)
		b.Run(m.name, func(b *testing.B) {
			b.SetBytes(int64(len(data)))
			b.ReportAllocs()
			for b.Loop() {
				r, err := decompress(bytes.NewReader(z), m.suffix)
				if err != nil {
					b.Fatal(err)
				}
				if _, err := io.Copy(struct{ io.Writer }{io.Discard}, struct{ io.Reader }{r}); err != nil {
					b.Fatal(err)
				}
				r.Close()
			}
		})
	}
}

func benchSegment(b *testing.B) []byte {
	name := os.Getenv("WALFLEET_BENCH_SEGMENT")
	if name == "" {
		return someWAL(16 << 20)
	}
	data, err := os.ReadFile(name)
	if err != nil {
		b.Fatal(err)
	}
	return data
}
