// Package internal_test holds the layers of the project together.
package internal_test

import (
	"fmt"
	"go/parser"
	"go/token"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
)

// arrows has every package of the module, and the packages on the floor below that it may import. What
// those may import, it may import too: an arrow may skip a floor, but never goes up or to a sibling.
var arrows = map[string][]string{
	"cmd/walfleet": {"internal/control", "internal/console", "internal/check", "internal/demo", "internal/restore", "internal/verify", "internal/receivewal", "internal/systemd"},

	"internal/control": {"fleet"},
	"internal/console": {"fleet"},
	"internal/check":   {"fleet"},
	"internal/demo":    {"fleet", "internal/postgres"},
	"internal/systemd": {"fleet"},

	"internal/receivewal": {"receiver"},

	"fleet":    {"receiver"},
	"receiver": {"internal/pgrepl", "internal/archive"},

	"internal/restore": {"internal/archive", "internal/postgres"},
	"internal/verify":  {"internal/archive", "internal/pgrepl"},

	"internal/pgrepl":  {"internal/wal"},
	"internal/archive": {"internal/wal"},
	"internal/wal":     {},

	"internal/postgres": {},

	// Tests, benchmarks, and what is there for them.
	"bench":           {"internal/postgres", "internal/pgtest"},
	"deploy":          {"fleet"},
	"internal":        {},
	"internal/pgtest": {"internal/wal"},
	"integration":     {"cmd/walfleet", "internal/pgtest"},
}

// forTests are packages that test files of every package may import, and nothing else may but what has them in its arrows.
var forTests = []string{"internal/pgtest"}

// outside has the imports from other modules, by their first letters, that not everyone may have.
var outside = []struct {
	prefix string
	in     []string // packages that may import it
	tests  bool     // so may test files everywhere
}{
	{"github.com/jackc/", []string{"internal/pgrepl", "internal/pgtest"}, true},
	{"github.com/prometheus/", []string{"internal/console"}, false},
	{"github.com/testcontainers/", []string{"integration"}, false},
}

// file is a Go file: its package's directory in the module, whether it is a test, and its imports, those
// from the module as ./directory.
type file struct {
	dir     string
	test    bool
	imports []string
}

// below is everything that the package in dir may import.
func below(dir string) map[string]bool {
	all := map[string]bool{}
	next := slices.Clone(arrows[dir])
	for len(next) > 0 {
		d := next[0]
		next = next[1:]
		if !all[d] {
			all[d] = true
			next = append(next, arrows[d]...)
		}
	}
	return all
}

// violations says what is wrong with a file's imports.
func violations(f file) (found []string) {
	if _, ok := arrows[f.dir]; !ok {
		return []string{fmt.Sprintf("package %s is not in the table of arrows", f.dir)}
	}
	bad := func(imported string) {
		found = append(found, fmt.Sprintf("%s imports %s", f.dir, imported))
	}
	allowed := below(f.dir)
	allowed[f.dir] = f.test // an external test imports its own package
	for _, d := range forTests {
		allowed[d] = f.test || slices.Contains(arrows[f.dir], d)
	}
	for _, imported := range f.imports {
		if dir, ours := strings.CutPrefix(imported, "./"); ours && !allowed[dir] {
			bad(dir)
		}
		for _, o := range outside {
			if strings.HasPrefix(imported, o.prefix) && !slices.Contains(o.in, f.dir) && !(f.test && o.tests) {
				bad(imported)
			}
		}
	}
	return found
}

// readFiles reads the imports of every Go file of the module at root, whatever its build constraints. What the
// go command ignores is left out.
func readFiles(root string) (files []file, err error) {
	mod, err := os.ReadFile(filepath.Join(root, "go.mod"))
	if err != nil {
		return nil, err
	}
	line, _, _ := strings.Cut(string(mod), "\n")
	module := strings.TrimSpace(strings.TrimPrefix(line, "module"))
	err = filepath.WalkDir(root, func(name string, d fs.DirEntry, err error) error {
		if err != nil {
			return err
		}
		base := d.Name()
		if name != root && (base == "testdata" || base == "vendor" || base[0] == '.' || base[0] == '_') {
			if d.IsDir() {
				return fs.SkipDir
			}
			return nil
		}
		if d.IsDir() {
			if _, err := os.Stat(filepath.Join(name, "go.mod")); err == nil && name != root {
				return fs.SkipDir
			}
			return nil
		}
		if filepath.Ext(base) != ".go" {
			return nil
		}
		syntax, err := parser.ParseFile(token.NewFileSet(), name, nil, parser.ImportsOnly)
		if err != nil {
			return err
		}
		rel, err := filepath.Rel(root, filepath.Dir(name))
		if err != nil {
			return err
		}
		f := file{dir: filepath.ToSlash(rel), test: strings.HasSuffix(base, "_test.go")}
		for _, spec := range syntax.Imports {
			imported, err := strconv.Unquote(spec.Path.Value)
			if err != nil {
				return err
			}
			if rest, ours := strings.CutPrefix(imported, module+"/"); ours {
				imported = "./" + rest
			}
			f.imports = append(f.imports, imported)
		}
		files = append(files, f)
		return nil
	})
	return files, err
}

// TestArrows holds section 2 of the design: imports point down.
func TestArrows(t *testing.T) {
	files, err := readFiles("..")
	if err != nil {
		t.Fatal(err)
	}
	if len(files) < 10 {
		t.Errorf("only %d Go files found", len(files))
	}
	for _, f := range files {
		for _, v := range violations(f) {
			t.Error(v)
		}
	}
}

// TestArrowsBreak shows that a broken arrow is found, and an allowed one is not.
func TestArrowsBreak(t *testing.T) {
	const pgx, prom, containers = "github.com/jackc/pgx/v5/pgconn", "github.com/prometheus/client_golang/prometheus", "github.com/testcontainers/testcontainers-go"
	tests := []struct {
		dir      string
		test     bool
		imported string
		ok       bool
	}{
		{"receiver", false, "./internal/archive", true},
		{"receiver", false, "./internal/wal", true}, // skips a floor
		{"receiver", false, "./fleet", false},       // up
		{"receiver", true, "./fleet", false},
		{"internal/archive", false, "./internal/pgrepl", false}, // a sibling
		{"internal/console", false, "./internal/control", false},
		{"internal/check", false, "./internal/pgrepl", true},
		{"internal/demo", false, "./fleet", true},
		{"fleet", false, "./internal/demo", false},
		{"internal/verify", false, "./internal/archive", true},
		{"internal/verify", false, "./internal/pgrepl", true},
		{"internal/restore", false, "./internal/pgrepl", false},
		{"receiver", false, "./internal/verify", false},
		{"internal/wal", false, "./internal/pgtest", false},
		{"internal/wal", true, "./internal/pgtest", true},
		{"internal/wal", true, "./internal/wal", true},
		{"internal/wal", false, "./internal/archive", false},
		{"internal/wal", false, "errors", true},
		{"cmd/walfleet", false, "./internal/wal", true},
		{"cmd/walfleet", false, "./internal/pgtest", false},
		{"integration", false, "./internal/pgtest", true},
		{"integration", true, "./fleet", true},
		{"internal/util", false, "errors", false}, // no such package
		{"internal/pgrepl", false, pgx, true},
		{"internal/pgtest", false, pgx, true},
		{"receiver", false, pgx, false},
		{"receiver", true, pgx, true},
		{"internal/console", false, prom, true},
		{"fleet", true, prom, false},
		{"integration", true, containers, true},
		{"internal/demo", false, containers, false},
		{"receiver", true, containers, false},
	}
	for _, tt := range tests {
		if v := violations(file{tt.dir, tt.test, []string{tt.imported}}); (len(v) == 0) != tt.ok {
			t.Errorf("%s (test: %t) imports %s: %q, want ok %t", tt.dir, tt.test, tt.imported, v, tt.ok)
		}
	}
}

// TestReadFiles goes the whole way with a module that has one good and three bad files.
func TestReadFiles(t *testing.T) {
	root := t.TempDir()
	for name, content := range map[string]string{
		"go.mod":                     "module example.com/m\n\ngo 1.26\n",
		"fleet/fleet.go":             "package fleet\n\nimport _ \"example.com/m/receiver\"\n",
		"receiver/receiver.go":       "package receiver\n\nimport (\n\t\"fmt\"\n\n\tf \"example.com/m/fleet\"\n)\n\nvar _ = fmt.Sprint(f.X)\n",
		"receiver/other_windows.go":  "package receiver\n\nimport _ \"github.com/jackc/pgx/v5\"\n",
		"internal/util/util.go":      "package util\n",
		"receiver/testdata/bad.go":   "no Go",
		"scripts/tool/go.mod":        "module example.com/tool\n",
		"scripts/tool/main.go":       "package main\n",
		"receiver/.#receiver.go":     "no Go",
		"receiver/receiver_test.txt": "no Go",
	} {
		name = filepath.Join(root, filepath.FromSlash(name))
		if err := os.MkdirAll(filepath.Dir(name), 0o700); err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	files, err := readFiles(root)
	if err != nil {
		t.Fatal(err)
	}
	var got []string
	for _, f := range files {
		got = append(got, violations(f)...)
	}
	slices.Sort(got)
	want := []string{
		"package internal/util is not in the table of arrows",
		"receiver imports fleet",
		"receiver imports github.com/jackc/pgx/v5",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
}

// TestArrowsAreDown keeps the table itself free of cycles and of packages that it does not have.
func TestArrowsAreDown(t *testing.T) {
	for dir := range arrows {
		reached := below(dir)
		if reached[dir] {
			t.Errorf("a cycle leads back to %s", dir)
		}
		for d := range reached {
			if _, ok := arrows[d]; !ok {
				t.Errorf("%s may import %s, which is not in the table", dir, d)
			}
		}
	}
}
