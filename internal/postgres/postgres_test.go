package postgres

import (
	"os"
	"path/filepath"
	"slices"
	"testing"
)

func TestBinaryDirs(t *testing.T) {
	root := t.TempDir()
	for _, dir := range []string{
		"usr/lib/postgresql/9.6/bin", "usr/lib/postgresql/15/bin", "usr/lib/postgresql/18/bin",
		"usr/pgsql-17/bin", "opt/homebrew/opt/postgresql@16/bin", "opt/homebrew/opt/postgresql@17/bin",
		"Applications/Postgres.app/Contents/Versions/16/bin", "Applications/Postgres.app/Contents/Versions/latest/bin",
	} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o700); err != nil {
			t.Fatal(err)
		}
	}
	got := binaryDirs(root, "/usr/local/bin:relative::/usr/bin:/usr/local/bin/")
	want := []string{"/usr/local/bin", "/usr/bin"}
	for _, dir := range []string{
		"usr/lib/postgresql/18/bin", "usr/lib/postgresql/15/bin", "usr/lib/postgresql/9.6/bin",
		"usr/pgsql-17/bin", "opt/homebrew/opt/postgresql@17/bin", "opt/homebrew/opt/postgresql@16/bin",
		"Applications/Postgres.app/Contents/Versions/16/bin",
	} {
		want = append(want, filepath.Join(root, dir))
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%q, want\n%q", got, want)
	}
}

func TestFind(t *testing.T) {
	root := t.TempDir()
	install := func(name, version string, programs ...string) string {
		dir := filepath.Join(root, name)
		if err := os.Mkdir(dir, 0o700); err != nil {
			t.Fatal(err)
		}
		for _, p := range programs {
			script := "#!/bin/sh\necho 'postgres (PostgreSQL) " + version + "'\n"
			if err := os.WriteFile(filepath.Join(dir, p), []byte(script), 0o700); err != nil {
				t.Fatal(err)
			}
		}
		return dir
	}
	programs := []string{"initdb", "psql"}
	missing := filepath.Join(root, "missing")
	client := install("client", "18.1", "psql")
	bare := install("bare", "18.1", "postgres", "psql")
	old := install("old", "12.22", "postgres", "initdb", "psql")
	odd := install("odd", "unknown", "postgres", "initdb", "psql")
	good := install("good", "17.6 (Debian 17.6-1)", "postgres", "initdb", "psql")
	later := install("later", "18.1", "postgres", "initdb", "psql")

	since13 := func(major int) bool { return major >= 13 }
	got, ok := find(t.Context(), []string{missing, client, bare, old, odd, good, later}, since13, programs)
	if want := (Installation{Dir: good, Version: "17.6", Major: 17}); !ok || got != want {
		t.Errorf("got %+v, %t, want %+v", got, ok, want)
	}
	if got, ok := find(t.Context(), []string{missing, client, bare, old, odd}, since13, programs); ok {
		t.Errorf("found %+v, want nothing", got)
	}
}

func TestParseVersion(t *testing.T) {
	for _, test := range []struct {
		out, version string
		major        int
	}{
		{"postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)\n", "15.18", 15},
		{"postgres (PostgreSQL) 19beta1\n", "19beta1", 19},
		{"postgres (PostgreSQL) 9.6.24\n", "9.6.24", 9},
		{"", "", 0},
		{"sh: postgres: not found", "", 0},
		{"postgres (PostgreSQL) 99999999999999999999", "", 0},
	} {
		if version, major := ParseVersion(test.out); version != test.version || major != test.major {
			t.Errorf("ParseVersion(%q) = %q, %d", test.out, version, major)
		}
	}
}

func TestFreePort(t *testing.T) {
	var ports []int
	for range 20 {
		port, err := FreePort(ports...)
		if err != nil {
			t.Fatal(err)
		}
		if slices.Contains(ports, port) || port < 1024 || port >= 32768 {
			t.Errorf("port %d", port)
		}
		ports = append(ports, port)
	}
}
