// Package postgres finds the PostgreSQL that is installed on this machine, and what it takes to run throwaway
// servers of it: a user that is not root, a port, and room on a disk.
package postgres

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
)

// OldestMajor is the oldest PostgreSQL that walfleet archives.
const OldestMajor = 13

// Installation is one installation of PostgreSQL.
type Installation struct {
	Dir     string // of its programs
	Version string // as "postgres --version" prints it: "15.18", "18beta1"
	Major   int
}

// Path is where a program of the installation is.
func (i Installation) Path(program string) string { return filepath.Join(i.Dir, program) }

// Find returns the first installation of version major or later that has the
// server and all of programs in one directory, and false where there is none.
// It looks in the PATH, where packages put PostgreSQL (newest first), and where
// pg_config says.
func Find(ctx context.Context, major int, programs ...string) (Installation, bool) {
	return find(ctx, dirs(ctx), func(m int) bool { return m >= major }, programs)
}

// FindMajor is Find for that very version: no other one can read its data
// directory.
func FindMajor(ctx context.Context, major int, programs ...string) (Installation, bool) {
	return find(ctx, dirs(ctx), func(m int) bool { return m == major }, programs)
}

func dirs(ctx context.Context) []string {
	return append(binaryDirs("/", os.Getenv("PATH")), pgConfigDir(ctx))
}

func find(ctx context.Context, dirs []string, fits func(major int) bool, programs []string) (Installation, bool) {
	for _, dir := range dirs {
		i := Installation{Dir: dir}
		if slices.ContainsFunc(append([]string{"postgres"}, programs...), func(p string) bool { return !executable(i.Path(p)) }) {
			continue
		}
		out, err := exec.CommandContext(ctx, i.Path("postgres"), "--version").Output()
		if err != nil {
			continue
		}
		if i.Version, i.Major = ParseVersion(string(out)); fits(i.Major) {
			return i, true
		}
	}
	return Installation{}, false
}

// binaryDirs lists the directories where PostgreSQL may be, in the order in
// which they are tried, without repetition: the directories of pathList (as in
// $PATH), then where packages put it below root, newest version first.
// root is "/" but in tests.
func binaryDirs(root, pathList string) []string {
	var dirs []string
	add := func(dir string) {
		if dir != "" && !slices.Contains(dirs, dir) {
			dirs = append(dirs, dir)
		}
	}
	for _, dir := range filepath.SplitList(pathList) {
		if filepath.IsAbs(dir) {
			add(filepath.Clean(dir))
		}
	}
	for _, pattern := range []string{
		"usr/lib/postgresql/*/bin",         // Debian, Ubuntu
		"usr/pgsql-*/bin",                  // PGDG's packages for Red Hat and SUSE
		"opt/homebrew/opt/postgresql*/bin", // Homebrew on arm64
		"usr/local/opt/postgresql*/bin",    // Homebrew on Intel
		"Applications/Postgres.app/Contents/Versions/[0-9]*/bin",
		"usr/local/pgsql*/bin", // built from source
	} {
		// The pattern is a constant and well formed: no error.
		found, _ := filepath.Glob(filepath.Join(root, pattern))
		slices.SortStableFunc(found, func(a, b string) int {
			return slices.Compare(numbers(b), numbers(a))
		})
		for _, dir := range found {
			add(dir)
		}
	}
	return dirs
}

// pgConfigDir asks pg_config, which may be in the PATH where the server is not.
func pgConfigDir(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "pg_config", "--bindir").Output()
	if err != nil {
		return ""
	}
	return strings.TrimSpace(string(out))
}

func executable(path string) bool {
	info, err := os.Stat(path)
	return err == nil && info.Mode().IsRegular() && info.Mode()&0o111 != 0
}

var digits = regexp.MustCompile(`[0-9]+`)

// numbers are the numbers in a path, which order versions: 9.6 before 10.
func numbers(path string) []int {
	var n []int
	for _, s := range digits.FindAllString(path, -1) {
		i, err := strconv.Atoi(s)
		if err != nil {
			i = 0
		}
		n = append(n, i)
	}
	return n
}

var versionText = regexp.MustCompile(`\(PostgreSQL\) (([0-9]+)\S*)`)

// ParseVersion reads what "postgres --version" prints. major is 0 when that is
// not understood.
func ParseVersion(out string) (version string, major int) {
	m := versionText.FindStringSubmatch(out)
	if m == nil {
		return "", 0
	}
	major, err := strconv.Atoi(m[2])
	if err != nil {
		return "", 0
	}
	return m[1], major
}
