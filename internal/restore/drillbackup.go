package restore

import (
	"archive/tar"
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/klauspost/compress/gzip"
	"github.com/klauspost/compress/zstd"
	"github.com/pierrec/lz4/v4"

	"github.com/walfleet/walfleet/internal/wal"
)

// backup is a base backup as it lies there. Its tablespaces are beside it.
type backup struct {
	dir string // the plain form: a data directory; "": it is a tar file
	tar string // the tar form: base.tar, maybe compressed
}

// tarSuffixes are those that pg_basebackup gives.
var tarSuffixes = []string{".tar", ".tar.gz", ".tar.lz4", ".tar.zst"}

// findBackup tells which form a backup has.
func findBackup(name string) (backup, error) {
	info, err := os.Stat(name)
	if err != nil {
		return backup{}, fmt.Errorf("backup: %w", err)
	}
	if !info.IsDir() {
		return backup{tar: name}, nil
	}
	if _, err := os.Stat(filepath.Join(name, "PG_VERSION")); err == nil {
		return backup{dir: name}, nil
	}
	if file, err := tarFile(name, "base"); err == nil {
		return backup{tar: file}, nil
	}
	return backup{}, fmt.Errorf("%s is no base backup: it has neither PG_VERSION nor base.tar, base.tar.gz, base.tar.lz4 or base.tar.zst", name)
}

// tarFile finds name.tar in a directory, compressed or not.
func tarFile(dir, name string) (string, error) {
	for _, suffix := range tarSuffixes {
		file := filepath.Join(dir, name+suffix)
		if _, err := os.Stat(file); err == nil {
			return file, nil
		}
	}
	return "", &fs.PathError{Op: "open", Path: filepath.Join(dir, name+".tar"), Err: fs.ErrNotExist}
}

// tablespaceTar is what pg_basebackup calls a tablespace's tar file.
var tablespaceTar = regexp.MustCompile(`^[0-9]+\.tar(\.[a-z0-9]+)?$`)

// size is how many bytes a copy takes; for a tar file, at least.
func (b backup) size(ctx context.Context) (size int64, err error) {
	if b.dir == "" {
		dir := filepath.Dir(b.tar)
		files, err := os.ReadDir(dir)
		if err != nil {
			return 0, err
		}
		for _, file := range files {
			name := filepath.Join(dir, file.Name())
			if name != filepath.Clean(b.tar) && !tablespaceTar.MatchString(file.Name()) {
				continue
			}
			info, err := os.Stat(name)
			if err != nil {
				return 0, err
			}
			size += info.Size()
		}
		return size, nil
	}
	roots := []string{b.dir}
	links, _ := os.ReadDir(filepath.Join(b.dir, tablespaceDir)) // copying says what is wrong with it
	for _, link := range links {
		if target, err := filepath.EvalSymlinks(filepath.Join(b.dir, tablespaceDir, link.Name())); err == nil && !link.IsDir() {
			roots = append(roots, target)
		}
	}
	for _, root := range roots {
		err = errors.Join(err, filepath.WalkDir(root, func(file string, entry fs.DirEntry, err error) error {
			if err := errors.Join(err, context.Cause(ctx)); err != nil || !entry.Type().IsRegular() {
				return err
			}
			info, err := entry.Info()
			if err == nil {
				size += info.Size()
			}
			return err
		}))
	}
	return size, err
}

// Where tablespaces are linked from, in a data directory.
const tablespaceDir = "pg_tblspc"

// dropped are files of a data directory that have no place in a drill: the
// configuration, which may say anything; what says how another recovery was meant;
// and the places of tablespaces, which are mapped.
var dropped = []string{
	"postgresql.conf", "postgresql.auto.conf", "pg_hba.conf", "pg_ident.conf",
	"recovery.signal", "standby.signal", "recovery.conf", "tablespace_map",
	"postmaster.pid", "postmaster.opts", "current_logfiles", "backup_manifest",
}

// emptied are directories whose files stay behind: WAL, for it is the archive's that is
// to be proven, and slots, which would keep WAL.
var emptied = []string{"pg_wal", "pg_replslot"}

// taken tells whether the drill takes a path of a data directory, with slashes.
func taken(name string) bool {
	top, _, below := strings.Cut(name, "/")
	return !slices.Contains(dropped, name) && (!below || !slices.Contains(emptied, top))
}

func (d *drill) data() string { return filepath.Join(d.dir, "data") }

// tablespace is where the drill has a tablespace.
func (d *drill) tablespace(oid string) string { return filepath.Join(d.dir, "tablespaces", oid) }

// copyBackup makes the data directory.
func (d *drill) copyBackup(ctx context.Context, b backup) error {
	begin := time.Now()
	defer func() { d.report.CopySeconds = time.Since(begin).Seconds() }()
	d.say("copying the backup to %s", d.dir)
	for _, dir := range []string{d.data(), d.tablespace("")} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	if b.dir == "" {
		if err := d.unpackAll(ctx, b.tar); err != nil {
			return err
		}
	} else {
		// What is wrong with these two needs no copy to be found.
		major, err := readMajor(b.dir)
		if err != nil {
			return err
		}
		if _, err := findServer(ctx, major); err != nil {
			return err
		}
		if err := d.copyTree(ctx, b.dir, d.data(), true); err != nil {
			return err
		}
	}
	names, err := os.ReadDir(d.data())
	if err != nil {
		return err
	}
	if slices.ContainsFunc(names, func(e fs.DirEntry) bool { return strings.HasPrefix(e.Name(), "polar_") }) {
		return errors.New("it is of PolarDB, whose server programs a drill cannot run: rehearse on a host of PolarDB, with restore_command = 'walfleet restore-wal …'")
	}
	for _, dir := range emptied {
		if err := os.MkdirAll(filepath.Join(d.data(), dir), 0o700); err != nil {
			return err
		}
	}
	return nil
}

// copyTree copies a directory's files and directories into one that exists. In the data
// directory (top) what is not taken stays behind, and tablespaces are followed. Other
// links stay behind, as they do with pg_basebackup.
func (d *drill) copyTree(ctx context.Context, from, to string, top bool) error {
	return filepath.WalkDir(from, func(file string, entry fs.DirEntry, err error) error {
		if err := errors.Join(err, context.Cause(ctx)); err != nil {
			return err
		}
		name, err := filepath.Rel(from, file)
		if err != nil || name == "." || top && !taken(filepath.ToSlash(name)) {
			return err
		}
		target := filepath.Join(to, name)
		switch {
		case entry.IsDir():
			return os.Mkdir(target, 0o700)
		case entry.Type().IsRegular():
			source, err := os.Open(file)
			if err != nil {
				return err
			}
			defer func() { _ = source.Close() }() // it was only read
			return d.copyFile(ctx, target, source)
		case top && filepath.Dir(name) == tablespaceDir && entry.Type()&fs.ModeSymlink != 0:
			oid := entry.Name()
			location, err := filepath.EvalSymlinks(file)
			if err != nil {
				return fmt.Errorf("tablespace %s is not there: %w", oid, err)
			}
			if err := d.addTablespace(oid); err != nil {
				return err
			}
			return d.copyTree(ctx, location, d.tablespace(oid), false)
		}
		return nil
	})
}

// addTablespace makes an empty tablespace.
func (d *drill) addTablespace(oid string) error {
	if err := os.Mkdir(d.tablespace(oid), 0o700); err != nil {
		return err
	}
	return os.Symlink(d.tablespace(oid), filepath.Join(d.data(), tablespaceDir, oid))
}

// copyFile writes a new file, by sharing its blocks where the file system can do that
// (copy_file_range, which os.File uses).
func (d *drill) copyFile(ctx context.Context, name string, from io.Reader) (err error) {
	file, err := os.OpenFile(name, os.O_WRONLY|os.O_CREATE|os.O_EXCL, 0o600)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, file.Close()) }()
	for {
		n, err := io.CopyN(file, from, copyStep)
		d.report.CopiedBytes += n
		if errors.Is(err, io.EOF) {
			return nil
		}
		if err := errors.Join(err, context.Cause(ctx), d.room()); err != nil {
			return err
		}
	}
}

// copyStep is after how many bytes the room that is left is looked at.
const copyStep = 64 << 20

// unpackAll unpacks base.tar, and the tablespaces beside it.
func (d *drill) unpackAll(ctx context.Context, base string) error {
	oids, err := d.unpack(ctx, base, d.data(), true)
	if err != nil {
		return err
	}
	for _, oid := range oids {
		file, err := tarFile(filepath.Dir(base), oid)
		if err != nil {
			return fmt.Errorf("tablespace %s: %w", oid, err)
		}
		if err := d.addTablespace(oid); err != nil {
			return err
		}
		if _, err := d.unpack(ctx, file, d.tablespace(oid), false); err != nil {
			return err
		}
	}
	return nil
}

// unpack unpacks a tar file into a directory that exists, by the rules of copyTree. It
// returns the tablespaces that a data directory has.
func (d *drill) unpack(ctx context.Context, name, to string, top bool) (tablespaces []string, err error) {
	file, err := os.Open(name)
	if err != nil {
		return nil, err
	}
	defer func() {
		_ = file.Close() // it was only read
		if err != nil {
			err = fmt.Errorf("%s: %w", name, err)
		}
	}()
	plain, err := uncompressed(file)
	if err != nil {
		return nil, err
	}
	defer plain.Close()
	add := func(oid string) {
		if _, err := strconv.ParseUint(oid, 10, 32); err == nil && !slices.Contains(tablespaces, oid) {
			tablespaces = append(tablespaces, oid)
		}
	}
	for r := tar.NewReader(plain); ; {
		h, err := r.Next()
		if errors.Is(err, io.EOF) {
			return tablespaces, nil
		}
		if err := errors.Join(err, context.Cause(ctx)); err != nil {
			return nil, err
		}
		entry := path.Clean(h.Name)
		if !filepath.IsLocal(entry) {
			return nil, fmt.Errorf("the name %q leads out of it", h.Name)
		}
		if top && entry == "tablespace_map" {
			text, err := io.ReadAll(io.LimitReader(r, 1<<20))
			if err != nil {
				return nil, err
			}
			for line := range strings.Lines(string(text)) { // "OID PATH"
				oid, _, _ := strings.Cut(line, " ")
				add(oid)
			}
		}
		if top && h.Typeflag == tar.TypeSymlink && path.Dir(entry) == tablespaceDir {
			add(path.Base(entry))
		}
		if entry == "." || top && !taken(entry) {
			continue
		}
		// Nothing that is unpacked is a link, so no name leads anywhere else.
		target := filepath.Join(to, filepath.FromSlash(entry))
		switch h.Typeflag {
		case tar.TypeDir:
			err = os.MkdirAll(target, 0o700)
		case tar.TypeReg:
			if err = os.MkdirAll(filepath.Dir(target), 0o700); err == nil {
				err = d.copyFile(ctx, target, r)
			}
		}
		if err != nil {
			return nil, err
		}
	}
}

// uncompressed decompresses what begins like one of the formats that pg_basebackup
// writes, and reads everything else as it is.
func uncompressed(r io.Reader) (io.ReadCloser, error) {
	b := bufio.NewReaderSize(r, 1<<20)
	magic, err := b.Peek(4)
	if err != nil && !errors.Is(err, io.EOF) {
		return nil, err
	}
	switch {
	case bytes.HasPrefix(magic, []byte{0x1f, 0x8b}):
		return gzip.NewReader(b)
	case bytes.Equal(magic, []byte{0x28, 0xb5, 0x2f, 0xfd}):
		z, err := zstd.NewReader(b)
		if err != nil {
			return nil, err
		}
		return z.IOReadCloser(), nil
	case bytes.Equal(magic, []byte{0x04, 0x22, 0x4d, 0x18}):
		return io.NopCloser(lz4.NewReader(b)), nil
	}
	return io.NopCloser(b), nil
}

// readMajor reads the major version off a data directory.
func readMajor(data string) (int, error) {
	text, err := os.ReadFile(filepath.Join(data, "PG_VERSION"))
	if err != nil {
		return 0, fmt.Errorf("the backup's version: %w", err)
	}
	major, err := strconv.Atoi(strings.TrimSpace(string(text)))
	if err != nil {
		return 0, fmt.Errorf("the backup's version: PG_VERSION is %.20q", text)
	}
	return major, nil
}

var startLocation = regexp.MustCompile(`(?m)^START WAL LOCATION: ([0-9A-F]+/[0-9A-F]+) `)

// readLabel reads off a data directory where its recovery begins. The error is
// fs.ErrNotExist when it has no label.
func readLabel(data string) (wal.LSN, error) {
	text, err := os.ReadFile(filepath.Join(data, "backup_label"))
	if err != nil {
		return 0, err
	}
	m := startLocation.FindSubmatch(text)
	if m == nil {
		return 0, errors.New("the backup's backup_label does not say where recovery begins")
	}
	return wal.ParseLSN(string(m[1]))
}
