package archive

import (
	"bufio"
	"cmp"
	"errors"
	"fmt"
	"io"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"
)

// Compression is how sealed segments are stored. The zero value is none. It is a
// plain value: two equal ones make equal files.
type Compression struct {
	Method string // "gzip", "lz4" or "zstd"; "": none
	Level  int    // 1 to the method's highest; 0: its usual one
}

// String is the form that ParseCompression takes.
func (c Compression) String() string {
	switch {
	case c.Method == "":
		return noCompression
	case c.Level == 0:
		return c.Method
	}
	return c.Method + ":" + strconv.Itoa(c.Level)
}

// noCompression is how a person writes the zero value of Compression.
const noCompression = "none"

// ParseCompression reads "none" or METHOD[:LEVEL]: gzip with levels from 1 to 9,
// lz4 from 1 to 12, zstd from 1 to 22. A level that is not given becomes the
// method's usual one, so that equal settings are equal values. The error says
// what is allowed.
func ParseCompression(text string) (Compression, error) {
	if text == noCompression {
		return Compression{}, nil
	}
	name, level, given := strings.Cut(text, ":")
	m := methodOf(name)
	if m == nil {
		return Compression{}, fmt.Errorf("unknown method %q: none, gzip[:1-9], lz4[:1-12] or zstd[:1-22]", name)
	}
	if !given {
		return Compression{m.name, m.usual}, nil
	}
	n, err := strconv.Atoi(level)
	if err != nil || n < 1 || n > m.highest {
		return Compression{}, fmt.Errorf("%s has levels from 1 to %d, %q is none of them", m.name, m.highest, level)
	}
	return Compression{m.name, n}, nil
}

// method is a way to compress. One value of each kind lives while one file is
// compressed or read; the memory that it takes stands beside it.
type method struct {
	name, suffix   string
	usual, highest int // levels
	compress       func(w io.Writer, level int) (io.WriteCloser, error)
	decompress     func(r io.Reader) (io.ReadCloser, error)
}

// methods are what sealed segments can be compressed with. pg_receivewal knows
// the first two, and reads a segment's size from the last bytes of a gzip file,
// which therefore has one member.
var methods = []method{
	{"gzip", ".gz", 6, 9, gzipWriter, gzipReader},
	{"lz4", ".lz4", 1, 12, lz4Writer, lz4Reader},
	{"zstd", ".zst", 3, 22, zstdWriter, zstdReader},
}

// sealedSuffixes are those of complete segments, as pg_receivewal and we write
// them.
var sealedSuffixes = append([]string{""}, compressedSuffixes()...)

func compressedSuffixes() []string {
	suffixes := make([]string, len(methods))
	for i, m := range methods {
		suffixes[i] = m.suffix
	}
	return suffixes
}

// methodOf is the method of that name; nil: there is none.
func methodOf(name string) *method {
	for i := range methods {
		if methods[i].name == name {
			return &methods[i]
		}
	}
	return nil
}

// suffix is what compressed files' names end in; "" without compression.
func (c Compression) suffix() string {
	if m := methodOf(c.Method); m != nil {
		return m.suffix
	}
	return ""
}

// compressTo makes a writer that compresses to w. Only when it is closed, which
// does not close w, has w got everything. The one goroutine that writes does all
// the work.
func compressTo(w io.Writer, c Compression) (io.WriteCloser, error) {
	m := methodOf(c.Method)
	if m == nil {
		return nil, fmt.Errorf("internal error: no compression method %q", c.Method)
	}
	return m.compress(w, cmp.Or(c.Level, m.usual))
}

// decompress makes a reader of what was compressed into a file with the suffix;
// with "" that is the file as it is. It checks the checksums that the file has,
// and takes no more memory than stands with the methods, whatever the file says;
// how much it yields is not bounded. Closing it does not close r.
func decompress(r io.Reader, suffix string) (io.ReadCloser, error) {
	if suffix == "" {
		return io.NopCloser(r), nil
	}
	for _, m := range methods {
		if m.suffix == suffix {
			return m.decompress(r)
		}
	}
	return nil, fmt.Errorf("internal error: no compression has the suffix %q", suffix)
}

// methodWith is the name of the method with that suffix; "" for "".
func methodWith(suffix string) string {
	for _, m := range methods {
		if m.suffix == suffix {
			return m.name
		}
	}
	return ""
}

// gzip takes about 1 MB to write, and less to read.
func gzipWriter(w io.Writer, level int) (io.WriteCloser, error) {
	z, err := gzip.NewWriterLevel(w, level)
	if err != nil {
		return nil, err
	}
	z.ModTime = time.Unix(0, 0) // which is how the format writes none
	return z, nil
}

// gzipReader takes one member: bytes behind it are an error, as pg_receivewal would
// take the last four for the segment's size.
func gzipReader(r io.Reader) (io.ReadCloser, error) {
	in := bufio.NewReaderSize(r, 64<<10)
	z, err := gzip.NewReader(in)
	if err != nil {
		return nil, err
	}
	z.Multistream(false)
	return &oneMember{z, in}, nil
}

type oneMember struct {
	*gzip.Reader
	in *bufio.Reader
}

func (m *oneMember) Read(p []byte) (int, error) {
	n, err := m.Reader.Read(p)
	if err == io.EOF {
		if _, more := m.in.ReadByte(); more == nil {
			err = errors.New("gzip: there is more behind the member")
		} else if more != io.EOF {
			err = more
		}
	}
	return n, err
}

// lz4 takes less than 1 MB to write, as pg_receivewal does with its blocks of 64
// KB, and up to 16 MB to read what others have made.
func lz4Writer(w io.Writer, level int) (io.WriteCloser, error) {
	z := lz4.NewWriter(w)
	return z, z.Apply(lz4.BlockSizeOption(lz4.Block64Kb), lz4.ChecksumOption(true), lz4.ConcurrencyOption(1),
		lz4.CompressionLevelOption(lz4Levels[level-1]))
}

// lz4Levels are the library's levels for those of the lz4 program, of which the
// first two are not the high compression.
var lz4Levels = [12]lz4.CompressionLevel{lz4.Fast, lz4.Fast, lz4.Level1, lz4.Level2, lz4.Level3, lz4.Level4,
	lz4.Level5, lz4.Level6, lz4.Level7, lz4.Level8, lz4.Level9, lz4.Level9}

func lz4Reader(r io.Reader) (io.ReadCloser, error) {
	z := lz4.NewReader(r)
	return io.NopCloser(z), z.Apply(lz4.ConcurrencyOption(1))
}

// zstd takes up to 10 MB to write, 40 MB from level 10 on.
func zstdWriter(w io.Writer, level int) (io.WriteCloser, error) {
	return zstd.NewWriter(w, zstd.WithEncoderLevel(zstd.EncoderLevelFromZstd(level)), zstd.WithWindowSize(zstdWindow),
		zstd.WithEncoderConcurrency(1), zstd.WithLowerEncoderMem(true), zstd.WithEncoderCRC(true))
}

const (
	// zstdWindow is the window in bytes with which segments are compressed. A
	// larger one leaves no fewer bytes of WAL, and takes more memory.
	zstdWindow = 1 << 20
	// maxZstdWindow is the largest one that is read, in bytes: what the zstd
	// program reads without being asked for more.
	maxZstdWindow = 128 << 20
)

// zstdReader takes about 2 MB for what zstdWriter writes, and up to 130 MB for
// what others have made.
func zstdReader(r io.Reader) (io.ReadCloser, error) {
	z, err := zstd.NewReader(r, zstd.WithDecoderConcurrency(1), zstd.WithDecoderLowmem(true), zstd.WithDecoderMaxWindow(maxZstdWindow))
	if err != nil {
		return nil, err
	}
	return z.IOReadCloser(), nil
}
