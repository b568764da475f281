package archive

import (
	"archive/tar"
	"cmp"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"

	"github.com/walfleet/walfleet/internal/wal"
)

// Backup is a base backup, and where the WAL begins that it needs.
type Backup struct {
	Path     string // of its directory
	Timeline wal.Timeline
	Start    wal.LSN // inclusive
}

const (
	labelName    = "backup_label"
	manifestName = "backup_manifest"

	// maxManifest bounds a backup_manifest, in bytes: it has a line for each file.
	maxManifest = 1 << 30
	// maxBackupDepth is how far below a directory base backups are looked for.
	maxBackupDepth = 8
	// maxTarEntries is how many entries of a base.tar are looked at: backup_label is the first.
	maxTarEntries = 16
)

// FindBackups finds the base backups in a directory and below it, as pg_basebackup makes
// them: directories with a backup_manifest (of PostgreSQL 13 and later) or a backup_label,
// also in a base.tar, compressed or not. They are ordered by where their WAL begins.
//
// It is an error when one of them cannot be read, and when there is none: what is mounted
// there may be away.
func FindBackups(ctx context.Context, dir string) ([]Backup, error) {
	real, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return nil, fmt.Errorf("base backups: %w", err)
	}
	f := backupFinder{ctx: ctx, seen: map[string]bool{}}
	if err := f.look(real, 0); err != nil {
		return nil, fmt.Errorf("base backups: %w", err)
	}
	if len(f.found) == 0 {
		return nil, fmt.Errorf("base backups: there is none in %s", dir)
	}
	slices.SortFunc(f.found, func(a, b Backup) int { return cmp.Or(cmp.Compare(a.Start, b.Start), cmp.Compare(a.Path, b.Path)) })
	return f.found, nil
}

type backupFinder struct {
	ctx   context.Context
	seen  map[string]bool // real paths of directories
	found []Backup
}

// look looks into a directory, and below it where it is no backup itself.
func (f *backupFinder) look(dir string, depth int) error {
	if err := f.ctx.Err(); err != nil || f.seen[dir] {
		return err
	}
	f.seen[dir] = true
	switch b, ok, err := ReadBackup(dir); {
	case err != nil:
		return err
	case ok:
		f.found = append(f.found, b)
		return nil
	}
	if depth == maxBackupDepth {
		return nil
	}
	entries, err := os.ReadDir(dir)
	if err != nil {
		return err
	}
	for _, e := range entries {
		path := filepath.Join(dir, e.Name())
		if e.Type()&fs.ModeSymlink != 0 {
			if path, err = filepath.EvalSymlinks(path); err != nil {
				return err
			}
		}
		info, err := os.Stat(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue // an old backup that is being removed
		}
		if err != nil {
			return err
		}
		if info.IsDir() {
			if err := f.look(path, depth+1); err != nil {
				return err
			}
		}
	}
	return nil
}

// ReadBackup reads where a base backup begins; ok is false when dir is none.
func ReadBackup(dir string) (b Backup, ok bool, err error) {
	b.Path = dir
	if data, err := readLimited(filepath.Join(dir, manifestName), maxManifest); err == nil {
		b.Timeline, b.Start, err = parseManifest(data)
		return b, true, at(filepath.Join(dir, manifestName), err)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return b, false, err
	}
	if data, err := readLimited(filepath.Join(dir, labelName), maxSmallFile); err == nil {
		b.Timeline, b.Start, err = ParseBackupLabel(data)
		return b, true, at(filepath.Join(dir, labelName), err)
	} else if !errors.Is(err, fs.ErrNotExist) {
		return b, false, err
	}
	for _, suffix := range sealedSuffixes {
		path := filepath.Join(dir, "base.tar"+suffix)
		file, err := os.Open(path)
		if errors.Is(err, fs.ErrNotExist) {
			continue
		}
		if err != nil {
			return b, false, err
		}
		data, err := labelInTar(file, suffix)
		if err == nil {
			b.Timeline, b.Start, err = ParseBackupLabel(data)
		}
		return b, true, errors.Join(at(path, err), file.Close())
	}
	return b, false, nil
}

func at(path string, err error) error {
	if err != nil {
		err = &FileError{path, err.Error()}
	}
	return err
}

func readLimited(path string, limit int64) ([]byte, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	data, err := io.ReadAll(io.LimitReader(f, limit+1))
	if err == nil && int64(len(data)) > limit {
		err = &FileError{path, "is too large for what it is"}
	}
	return data, err
}

func labelInTar(r io.Reader, suffix string) ([]byte, error) {
	z, err := decompress(r, suffix)
	if err != nil {
		return nil, err
	}
	defer z.Close()
	t := tar.NewReader(z)
	for range maxTarEntries {
		h, err := t.Next()
		if err != nil {
			return nil, fmt.Errorf("looking for its backup_label: %w", err)
		}
		if strings.TrimPrefix(h.Name, "./") == labelName {
			return io.ReadAll(io.LimitReader(t, maxSmallFile))
		}
	}
	return nil, errors.New("has no backup_label among its first files")
}

var (
	labelStart    = regexp.MustCompile(`(?m)^START WAL LOCATION: ([0-9A-Fa-f]+/[0-9A-Fa-f]+) \(file ([0-9A-F]{24})\)\r?$`)
	labelTimeline = regexp.MustCompile(`(?m)^START TIMELINE: ([0-9]+)\r?$`)
)

// ParseBackupLabel reads where a backup begins from its backup_label, or from the .backup
// file that has the same lines (build_backup_content in xlogbackup.c).
func ParseBackupLabel(data []byte) (tli wal.Timeline, start wal.LSN, err error) {
	m := labelStart.FindSubmatch(data)
	if m == nil {
		return 0, 0, errors.New("has no START WAL LOCATION")
	}
	if start, err = wal.ParseLSN(string(m[1])); err != nil {
		return 0, 0, err
	}
	number, base := string(m[2][:8]), 16 // of the segment's name
	if m := labelTimeline.FindSubmatch(data); m != nil {
		number, base = string(m[1]), 10
	}
	n, err := strconv.ParseUint(number, base, 32)
	if err != nil || n == 0 || start == 0 {
		return 0, 0, errors.New("begins on no timeline, or at no position")
	}
	return wal.Timeline(n), start, nil
}

func parseManifest(data []byte) (tli wal.Timeline, start wal.LSN, err error) {
	var m struct {
		Ranges []struct {
			Timeline uint32 `json:"Timeline"`
			Start    string `json:"Start-LSN"`
		} `json:"WAL-Ranges"`
	}
	if err := json.Unmarshal(data, &m); err != nil {
		return 0, 0, fmt.Errorf("is damaged: %w", err)
	}
	for _, r := range m.Ranges {
		lsn, err := wal.ParseLSN(r.Start)
		if err != nil {
			return 0, 0, err
		}
		if start == 0 || lsn < start {
			tli, start = wal.Timeline(r.Timeline), lsn
		}
	}
	if start == 0 || tli == 0 {
		return 0, 0, errors.New("names no WAL that the backup needs")
	}
	return tli, start, nil
}

var (
	segmentFile = regexp.MustCompile(`^[0-9A-F]{24}(\.partial)?$`)
	labelFile   = regexp.MustCompile(`^([0-9A-F]{24})\.([0-9A-F]{8})\.backup$`)
)

// ParseBefore reads what WAL is to be kept from: a segment's name, or that of a .backup
// file, as pg_archivecleanup takes them, or the path of a base backup's directory, its
// backup_label, backup_manifest, or a .backup file.
func ParseBefore(text string, size wal.SegmentSize) (wal.LSN, error) {
	name := text
	if m := labelFile.FindStringSubmatch(filepath.Base(text)); m != nil {
		name = m[1] // WAL from its segment on
	} else if !segmentFile.MatchString(text) {
		return beforeBackup(text)
	}
	s, err := wal.ParseSegment(name[:24], size)
	return s.Start, err
}

func beforeBackup(path string) (wal.LSN, error) {
	info, err := os.Stat(path)
	if err != nil {
		return 0, fmt.Errorf("neither the name of a segment or a .backup file, nor the path of a base backup: %w", err)
	}
	if info.IsDir() {
		b, ok, err := ReadBackup(path)
		if err == nil && !ok {
			err = &FileError{path, "is no base backup: it has neither a backup_manifest nor a backup_label"}
		}
		return b.Start, err
	}
	data, err := readLimited(path, maxManifest)
	if err != nil {
		return 0, err
	}
	parse := ParseBackupLabel
	if filepath.Base(path) == manifestName {
		parse = parseManifest
	}
	_, start, err := parse(data)
	return start, at(path, err)
}
