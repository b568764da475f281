// Package deploy_test holds together what the files of this directory say.
package deploy_test

import (
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/fleet"
)

func read(t *testing.T, name string) string {
	t.Helper()
	data, err := os.ReadFile(filepath.FromSlash(name))
	if err != nil {
		t.Fatal(err)
	}
	return string(data)
}

// unit is walfleet.service: the last value of each key.
func unit(t *testing.T) map[string]string {
	t.Helper()
	all := map[string]string{}
	for line := range strings.Lines(read(t, "systemd/walfleet.service")) {
		key, value, ok := strings.Cut(strings.TrimSpace(line), "=")
		if ok && !strings.HasPrefix(line, "#") {
			all[key] = value
		}
	}
	return all
}

func parse(t *testing.T, name, text string) *fleet.Config {
	t.Helper()
	cfg, err := fleet.Parse(name, []byte(text))
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// packaged is the packages' configuration with its cluster, which is a comment there.
func packaged(t *testing.T) *fleet.Config {
	t.Helper()
	const name = "package/walfleet.toml"
	text := read(t, name)
	if _, err := fleet.Parse(name, []byte(text)); err == nil || !strings.Contains(err.Error(), "no [[cluster]]") {
		t.Errorf("%s: %v; want an error that sends a person to the clusters", name, err)
	}
	return parse(t, name, regexp.MustCompile(`(?m)^#(\S)`).ReplaceAllString(text, "$1"))
}

// What the packages' configuration names is what the unit prepares.
func TestThePackagesConfigurationFitsTheUnit(t *testing.T) {
	u, cfg := unit(t), packaged(t)
	if want := "/var/lib/" + u["StateDirectory"]; cfg.ArchiveDir != want || u["RequiresMountsFor"] != want {
		t.Errorf("archive_dir is %s, StateDirectory stands for %s, RequiresMountsFor is %s", cfg.ArchiveDir, want, u["RequiresMountsFor"])
	}
	if want := "/run/" + u["RuntimeDirectory"]; cfg.RuntimeDir != want {
		t.Errorf("runtime_dir is %s, RuntimeDirectory stands for %s", cfg.RuntimeDir, want)
	}
	id, from, _ := strings.Cut(u["LoadCredential"], ":")
	if want := "/run/credentials/walfleet.service/" + id + "_orders"; cfg.Clusters[0].PasswordFile != want {
		t.Errorf("password_file is %s, the credential is %s", cfg.Clusters[0].PasswordFile, want)
	}
	packages := read(t, "package/nfpm.yaml")
	_, file, _ := strings.Cut(u["ExecStart"], " -c ")
	for _, path := range []string{file, from, cfg.ArchiveDir, strings.Fields(u["ExecStart"])[0]} {
		if !strings.Contains(packages, "dst: "+path+"\n") {
			t.Errorf("the packages do not have %q, which the unit names", path)
		}
	}
	if !strings.HasSuffix(u["ExecReload"], " -c "+file) {
		t.Errorf("ExecReload is for another file than ExecStart: %s", u["ExecReload"])
	}
}

// Whoever stops walfleet waits longer than it takes.
func TestThereIsTimeToStop(t *testing.T) {
	least := packaged(t).ShutdownTimeout + 10*time.Second
	compose := regexp.MustCompile(`stop_grace_period: (\S+)`).FindStringSubmatch(read(t, "compose.yaml"))
	if compose == nil {
		t.Fatal("compose.yaml has no stop_grace_period")
	}
	for where, text := range map[string]string{"walfleet.service": unit(t)["TimeoutStopSec"] + "s", "compose.yaml": compose[1]} {
		if got, err := time.ParseDuration(text); err != nil || got < least {
			t.Errorf("%s gives %s (%v), less than shutdown_timeout and 10 s more: %s", where, text, err, least)
		}
	}
}

func TestTheComposeFilesConfigurationIsValid(t *testing.T) {
	cfg := parse(t, "compose/walfleet.toml", read(t, "compose/walfleet.toml"))
	compose := read(t, "compose.yaml")
	for _, c := range cfg.Clusters {
		if !strings.Contains(compose, "\n  "+c.Name+":\n") || !strings.Contains(c.Conninfo, "host="+c.Name+" ") {
			t.Errorf("cluster %s is no service of compose.yaml", c.Name)
		}
		if secret := filepath.Base(c.PasswordFile); !strings.Contains(compose, "secrets: ["+secret+"]") {
			t.Errorf("cluster %s: compose.yaml has no secret %s", c.Name, secret)
		}
	}
}
