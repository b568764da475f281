package main

import (
	"bytes"
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// execute runs a command line as main does, without the process around it.
func execute(t *testing.T, args ...string) (output string, err error) {
	t.Helper()
	root := newRoot()
	var out bytes.Buffer
	root.SetOut(&out)
	root.SetErr(&out)
	root.SetArgs(args)
	err = root.ExecuteContext(context.Background())
	return out.String(), err
}

func TestUsageErrorsAreToldFromFailures(t *testing.T) {
	file := filepath.Join(t.TempDir(), "walfleet.toml")
	if err := os.WriteFile(file, []byte("archive_dir = \"/tmp/x\"\n[[cluster]]\nname = \"a\"\nbogus = 1\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	good := filepath.Join(t.TempDir(), "good.toml")
	if err := os.WriteFile(good, []byte("archive_dir = \"/nowhere\"\n[[cluster]]\nname = \"a\"\nconninfo = \"host=a\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	noSocket := filepath.Join(t.TempDir(), "no-socket.toml")
	if err := os.WriteFile(noSocket, []byte("archive_dir = \"/nowhere\"\nruntime_dir = \""+good+"\"\n[[cluster]]\nname = \"a\"\nconninfo = \"host=a\"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args  []string
		usage bool
		says  string
	}{
		{[]string{"rnu"}, true, `unknown command "rnu"; did you mean "run"?`},
		{[]string{"status", "--watch", "--json"}, true, "--watch and --json exclude each other"},
		{[]string{"check", "--json", "--nagios"}, true, "exclude each other"},
		{[]string{"check", "--diff", "a"}, true, "takes no cluster"},
		{[]string{"check", "-c", good, "b"}, false, `there is no cluster "b"`},
		{[]string{"check", "-c", good, "--diff"}, false, "no walfleet answers at"},
		{[]string{"run", "--bogus"}, true, "unknown flag: --bogus"},
		{[]string{"run", "now"}, true, `run takes no argument, got "now"`},
		{[]string{"version", "1"}, true, "version takes no argument"},
		{[]string{"accept-gap"}, true, "accept-gap takes one argument, the cluster's name"},
		{[]string{"accept-divergence", "a", "b"}, true, "accept-divergence takes one argument, the cluster's name"},
		{[]string{"accept-gap", "a", "-c", file}, false, file + ":4:"},
		{[]string{"accept-gap", "a", "-c", good}, false, "no walfleet answers at"},
		{[]string{"reload", "now"}, true, `reload takes no argument, got "now"`},
		{[]string{"reload", "-c", file}, false, "nothing changed:\n" + file + ":2:"},
		{[]string{"reload", "-c", good}, false, "no walfleet answers at"},
		{[]string{"list"}, true, "list takes a cluster's name, or --archive DIR"},
		{[]string{"list", "a", "--archive", "/x"}, true, "list takes a cluster's name, or --archive DIR"},
		{[]string{"list", "b", "-c", good}, false, `there is no cluster "b"`},
		{[]string{"list", "--archive", "/nowhere"}, false, "archive directory: open /nowhere: no such file"},
		{[]string{"prune", "--keep-size", "1GB"}, true, "prune takes one argument, the cluster's name"},
		{[]string{"prune", "a"}, true, "what may go?"},
		{[]string{"prune", "a", "--before", "x", "--keep-size", "1GB"}, true, "takes no --older-than or --keep-size"},
		{[]string{"prune", "a", "--keep-size", "much", "-c", good}, true, `"much" is not a size`},
		{[]string{"prune", "a", "--older-than", "x", "-c", good}, true, `"x" is not an age`},
		{[]string{"prune", "a", "--keep-size", "1GB", "--backups", "/nowhere", "-c", good}, false, "base backups: lstat /nowhere: no such file"},
		{[]string{"prune", "b", "--keep-size", "1GB", "-c", good}, false, `there is no cluster "b"`},
		{[]string{"prune", "a", "--keep-size", "1GB", "-c", good}, false, "archive directory: open /nowhere/a: no such file"},
		{[]string{"status", "a", "b"}, true, "status takes one argument at most"},
		{[]string{"status", "-c", file}, false, file + ":4:"},
		{[]string{"status", "b", "-c", good}, false, `there is no cluster "b"`},
		{[]string{"verify", "--archive", "x", "a"}, true, "so no cluster can be named"},
		{[]string{"verify", "--jobs", "0"}, true, "--jobs is 0"},
		{[]string{"verify", "--resume", "x"}, true, "--resume takes one archive"},
		{[]string{"verify", "a", "b", "--against", "host=x"}, true, "--against takes one archive"},
		{[]string{"verify", "--max-rate", "fast"}, true, "is not a size"},
		{[]string{"verify", "--since", "yesterday"}, true, "neither a duration"},
		{[]string{"verify", "b", "-c", good}, false, `there is no cluster "b"`},
		{[]string{"verify", "-c", file}, false, file + ":4:"},
		{[]string{"drill", "--backup", "/b"}, true, "drill takes a cluster's name, or --archive"},
		{[]string{"drill", "a", "--archive", "/a", "--backup", "/b"}, true, "drill takes a cluster's name, or --archive"},
		{[]string{"drill", "a"}, true, "drill needs --backup"},
		{[]string{"drill", "a", "--backup", "/b", "--to", "noon"}, true, "--to: \"noon\" is neither a position"},
		{[]string{"drill", "b", "--backup", "/b", "-c", good}, false, `there is no cluster "b"`},
		{[]string{"run", "-c", file}, false, file + ":4:"},
		{[]string{"run", "-c", noSocket}, false, "control socket: " + good + " is not a directory"},
		{[]string{"run", "-c", file + ".missing"}, false, "no such file"},
	} {
		_, err := execute(t, c.args...)
		var usage *usageError
		if err == nil || errors.As(err, &usage) != c.usage || !strings.Contains(err.Error(), c.says) {
			t.Errorf("walfleet %q: error %v, want one that says %q, usage error: %v", c.args, err, c.says, c.usage)
		}
	}
}

func TestTheConfigurationFileCanComeFromTheEnvironment(t *testing.T) {
	t.Setenv("WALFLEET_CONFIG", "/nowhere/of-the-environment.toml")
	if _, err := execute(t, "run"); err == nil || !strings.Contains(err.Error(), "of-the-environment.toml") {
		t.Errorf("run: %v, want an error about the file that WALFLEET_CONFIG names", err)
	}
	if _, err := execute(t, "run", "-c", "/nowhere/given.toml"); err == nil || !strings.Contains(err.Error(), "given.toml") {
		t.Errorf("run -c: %v, want an error about the file that was given", err)
	}
}

// receivewal's flags are pg_receivewal's, whatever -c and -h mean elsewhere, and so is its exit status.
func TestReceivewalHasItsOwnCommandLine(t *testing.T) {
	out, err := execute(t, "receivewal", "-c", "/nowhere", "-h", "host")
	var status exitStatus
	if !errors.As(err, &status) || status != 1 || !strings.HasPrefix(out, "pg_receivewal: invalid option -- 'c'\n") {
		t.Errorf("error %v, output\n%s", err, out)
	}
}

func TestHelpVersionAndCompletionPrint(t *testing.T) {
	for _, c := range []struct {
		args []string
		says string
	}{
		{nil, "First steps:"},
		{[]string{"--help"}, "walfleet reload"},
		{[]string{"check", "--help"}, "--nagios"},
		{[]string{"run", "--help"}, "SIGHUP"},
		{[]string{"verify", "--help"}, "--against"},
		{[]string{"demo", "--help"}, "byte for byte"},
		{[]string{"drill", "--help"}, "throwaway server"},
		{[]string{"version"}, "walfleet "},
		{[]string{"completion", "bash"}, "bash completion"},
		{[]string{"receivewal", "--help"}, "pg_receivewal receives PostgreSQL streaming write-ahead logs."},
		{[]string{"receivewal", "-V"}, "pg_receivewal (PostgreSQL) 17"},
	} {
		out, err := execute(t, c.args...)
		if err != nil || !strings.Contains(out, c.says) {
			t.Errorf("walfleet %q: error %v, output without %q:\n%s", c.args, err, c.says, out)
		}
	}
}

// With the daemon down, status says so, and shows what there is all the same.
func TestStatusWithoutADaemon(t *testing.T) {
	dir := t.TempDir()
	file := filepath.Join(dir, "walfleet.toml")
	config := "archive_dir = \"" + dir + "\"\n[[cluster]]\nname = \"a\"\nconninfo = \"host=db password=never-shown\"\n"
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args []string
		says []string
	}{
		{[]string{"status"}, []string{"NO DAEMON: no walfleet answers at " + dir, "CLUSTER", "\na ", "there is no directory yet"}},
		{[]string{"status", "a"}, []string{"NO DAEMON", "hosts              db:5432", "min_free           100MB"}},
		{[]string{"status", "--json"}, []string{`"daemon": null`, `"state": "unknown"`, `"min_free": "100MB"`}},
	} {
		out, err := execute(t, append(c.args, "-c", file)...)
		var status exitStatus
		if !errors.As(err, &status) || status != 1 || strings.Contains(out, "never-shown") {
			t.Errorf("walfleet %q: %v\n%s", c.args, err, out)
		}
		for _, words := range c.says {
			if !strings.Contains(out, words) {
				t.Errorf("walfleet %q lacks %q:\n%s", c.args, words, out)
			}
		}
	}
}
