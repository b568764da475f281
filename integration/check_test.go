package integration

import (
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"github.com/testcontainers/testcontainers-go"
	tcnetwork "github.com/testcontainers/testcontainers-go/network"

	"github.com/walfleet/walfleet/receiver"
)

// finding is one result of "walfleet check --json".
type finding struct{ Test, Host, Level, Text, Hint string }

// checked is what "walfleet check --json" says of one cluster.
type checked struct {
	Cluster, Level string
	Tests          []finding
}

// runCheck runs "walfleet check" for a configuration, and returns its clusters and its exit status.
func runCheck(t *testing.T, config string, args ...string) ([]checked, int) {
	t.Helper()
	file := filepath.Join(t.TempDir(), "walfleet.toml")
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := command(t, append([]string{"check", "-c", file, "--json"}, args...)...).Output()
	status := 0
	if exit := (*exec.ExitError)(nil); errors.As(err, &exit) {
		status = exit.ExitCode()
	} else if err != nil {
		t.Fatal(err)
	}
	var report struct{ Clusters []checked }
	if err := json.Unmarshal(out, &report); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	if strings.Contains(string(out), password) {
		t.Errorf("the password is shown: %s", out)
	}
	return report.Clusters, status
}

// want expects a test's result to have a level, and texts in what it says.
func (c checked) want(t *testing.T, test, level string, texts ...string) {
	t.Helper()
	for _, f := range c.Tests {
		if f.Test == test && f.Level == level && containsAll(f.Text+" "+f.Hint, texts) {
			return
		}
	}
	t.Errorf("%s: %s is not %s with %q: %+v", c.Cluster, test, level, texts, c.Tests)
}

// TestCheck has one server of each version, and clusters that each have one thing wrong with them.
func TestCheck(t *testing.T) {
	for _, image := range images() {
		t.Run(image, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, serverOptions{image: image, segment: megabyte,
				settings: []string{"min_wal_size = 2MB", "max_wal_size = 2MB", "wal_keep_size = 0", "max_slot_wal_keep_size = 4MB"},
				hba:      []string{"host replication banned all reject"},
				shell:    `sed -i '1i host postgres secluded all reject' "$PGDATA/pg_hba.conf"`, // before what the image admits
				sql: `GRANT pg_monitor TO walfleet;
					CREATE ROLE unprivileged LOGIN PASSWORD '` + password + `';
					CREATE ROLE plain LOGIN REPLICATION PASSWORD '` + password + `';
					CREATE ROLE secluded LOGIN REPLICATION PASSWORD '` + password + `';
					CREATE ROLE banned LOGIN REPLICATION PASSWORD '` + password + `';`})
			s.query(t, "SELECT pg_create_physical_replication_slot('lost', true)")
			await(t, patience, "the slot is invalidated", func() (bool, string) {
				s.write(t, 2)
				s.query(t, "CHECKPOINT")
				v := s.value(t, "SELECT wal_status FROM pg_replication_slots WHERE slot_name = 'lost'")
				return v == "lost", v
			})
			dir := t.TempDir()
			d := startDaemon(t, configText(dir, cluster("healthy", s.conninfo())))
			s.write(t, 1)
			d.awaitFlushed(t, "healthy", s.end(t))
			before := s.query(t, "SELECT slot_name, active_pid, restart_lsn IS NULL FROM pg_replication_slots ORDER BY 1")
			down := freePort(t)

			clusters := []string{cluster("healthy", s.conninfo()),
				cluster("wrong_password", s.conninfo("password=wrong"), `slot = "a"`),
				cluster("no_right", s.conninfo("user=unprivileged"), `slot = "b"`),
				cluster("no_hba", s.conninfo("user=banned"), `slot = "c"`),
				cluster("no_monitor", s.conninfo("user=plain"), `slot = "d"`),
				cluster("no_sql", s.conninfo("user=secluded"), `slot = "e"`),
				cluster("lost", s.conninfo(), `slot = "lost"`),
				cluster("no_slot", s.conninfo(), `slot = "f"`, `create_slot = false`),
				cluster("down", s.conninfo("port="+strconv.Itoa(down)), `slot = "g"`)}
			got, status := runCheck(t, configText(dir, clusters...))
			if status != 1 || len(got) != len(clusters) {
				t.Fatalf("exit status %d: %+v", status, got)
			}
			by := map[string]checked{}
			for i, c := range got {
				if !strings.Contains(clusters[i], `"`+c.Cluster+`"`) {
					t.Errorf("cluster %d is %s", i, c.Cluster)
				}
				by[c.Cluster] = c
			}
			healthy := by["healthy"]
			if healthy.Level == "FAILED" {
				t.Errorf("%+v", healthy)
			}
			for _, test := range []string{"connection", "tls", "pg_hba", "replication right", "server version", "role", "wal_level", "max_wal_senders",
				"max_replication_slots", "slot", "max_slot_wal_keep_size", "synchronous standby", "clock", "monitor", "archive", "directory", "free space"} {
				healthy.want(t, test, "OK")
			}
			healthy.want(t, "slot", "OK", "in use", "reserved")
			healthy.want(t, "server version", "OK", "segments of 1 MB")
			by["wrong_password"].want(t, "authentication", "FAILED", "28P01", "password_file")
			by["no_right"].want(t, "replication right", "FAILED", "42501", "ALTER ROLE unprivileged REPLICATION")
			by["no_hba"].want(t, "pg_hba", "FAILED", "28000", "host replication banned")
			by["no_monitor"].want(t, "monitor", "WARNING", "GRANT pg_monitor TO plain")
			by["no_monitor"].want(t, "slot", "OK", "does not exist yet")
			by["no_sql"].want(t, "monitor", "WARNING", "28000", "host postgres secluded")
			by["lost"].want(t, "slot", "FAILED", "invalidated", "pg_drop_replication_slot('lost')")
			by["no_slot"].want(t, "slot", "FAILED", "pg_create_physical_replication_slot('f', true)")
			by["down"].want(t, "connection", "FAILED", "connection refused")

			// Nothing was changed: not a slot, and not a directory.
			if after := s.query(t, "SELECT slot_name, active_pid, restart_lsn IS NULL FROM pg_replication_slots ORDER BY 1"); fmt.Sprint(after) != fmt.Sprint(before) {
				t.Errorf("slots were %v, are %v", before, after)
			}
			entries, err := os.ReadDir(dir)
			if err != nil {
				t.Fatal(err)
			}
			for _, e := range entries {
				if e.IsDir() && e.Name() != "healthy" {
					t.Errorf("check made %s", e.Name())
				}
			}

			config := configText(dir, cluster("healthy", s.conninfo()))
			sync := func(names, commit string) checked {
				t.Helper()
				s.set(t, "synchronous_commit", commit)
				s.set(t, "synchronous_standby_names", names)
				got, status := runCheck(t, config, "healthy")
				if len(got) != 1 || (status == 1) != (got[0].Level == "FAILED") {
					t.Fatalf("exit status %d: %+v", status, got)
				}
				return got[0]
			}
			sync("other", "on").want(t, "synchronous standby", "WARNING", "do not wait", "synchronous_standby_names")
			sync("walfleet", "on").want(t, "synchronous standby", "OK", "commits wait")
			sync("walfleet", "remote_apply").want(t, "synchronous standby", "FAILED", "for ever", "synchronous_commit = 'on'")
			s.set(t, "synchronous_standby_names", "")

			file := filepath.Join(t.TempDir(), "walfleet.toml")
			if err := os.WriteFile(file, []byte(configText(dir, clusters[len(clusters)-1])), 0o600); err != nil {
				t.Fatal(err)
			}
			out, err := command(t, "check", "-c", file, "--nagios").CombinedOutput()
			if exit, ok := err.(*exec.ExitError); !ok || exit.ExitCode() != 2 || !strings.HasPrefix(string(out), "WALFLEET CRITICAL - 1 clusters: 0 OK, 0 WARNING, 1 FAILED; down: connection | ") || strings.Count(string(out), "\n") != 1 {
				t.Errorf("--nagios: %v: %s", err, out)
			}
		})
	}
}

// TestSlotIsWatchedOnAllHosts has a slot that a failback left behind on a host that is a standby now, and that retains
// more and more there.
func TestSlotIsWatchedOnAllHosts(t *testing.T) {
	for _, image := range images() {
		t.Run(image, func(t *testing.T) {
			t.Parallel()
			network, err := tcnetwork.New(t.Context())
			testcontainers.CleanupNetwork(t, network)
			if err != nil {
				t.Fatal(err)
			}
			primary := startServer(t, serverOptions{image: image, segment: megabyte, network: network, alias: "primary", sql: "GRANT pg_monitor TO walfleet;"})
			standby := startServer(t, serverOptions{image: image, segment: megabyte, network: network, alias: "standby", standbyOf: "primary"})
			standby.query(t, "SELECT pg_create_physical_replication_slot('walfleet', true)")
			d := startDaemon(t, configText(t.TempDir(), cluster("orders", conninfoOf(primary, standby), `monitor_interval = "1s"`, `max_slot_retained = "8MB"`)))
			on := func(s *server) string { return net.JoinHostPort(host, strconv.Itoa(s.port)) }
			view := func(st receiver.Status, s *server) receiver.SlotView {
				for _, v := range st.Slots {
					if v.Host == on(s) {
						return v
					}
				}
				return receiver.SlotView{}
			}
			d.await(t, "orders", "the slot is seen on both hosts, in use on one", func(st receiver.Status) bool {
				p, s := view(st, primary), view(st, standby)
				return p.Exists && p.ActivePID != 0 && p.State == "streaming" && p.SyncState == "async" && p.Note == "" && !p.InRecovery &&
					s.Exists && s.ActivePID == 0 && s.InRecovery && s.Status == "reserved" && len(st.Warnings) == 0
			})
			for range 6 {
				primary.write(t, 2)
			}
			d.awaitFlushed(t, "orders", primary.end(t))
			standby.awaitReplica(t, primary.end(t))
			st := d.await(t, "orders", "a warning of the standby alone", func(st receiver.Status) bool {
				return len(st.Warnings) == 1 && st.Warnings[0].Host == on(standby)
			})
			restart := standby.lsn(t, "SELECT restart_lsn FROM pg_replication_slots")
			end := standby.lsn(t, "SELECT pg_last_wal_replay_lsn()")
			if v := view(st, standby); v.Retained <= 8*megabyte || v.Retained > int64(end-restart)+megabyte || v.RestartLSN != restart {
				t.Errorf("%+v, while the slot is at %s and the standby at %s", v, restart, end)
			}
			d.log.await(t, "level=WARN", "more than max_slot_retained", "pg_drop_replication_slot('walfleet')")
			standby.query(t, "SELECT pg_drop_replication_slot('walfleet')")
			d.await(t, "orders", "no warning any more", func(st receiver.Status) bool {
				return len(st.Warnings) == 0 && !view(st, standby).Exists
			})
			if n := strings.Count(d.log.String(), "more than max_slot_retained"); n != 1 {
				t.Errorf("warned %d times", n)
			}
		})
	}
}

// TestPreviewOfAReload asks a running program what a reload of another file would do.
func TestPreviewOfAReload(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{segment: megabyte})
	dir := t.TempDir()
	p := startProgram(t, configText(dir, cluster("a", s.conninfo(), `slot = "a"`), cluster("b", s.conninfo(), `slot = "b"`), cluster("c", s.conninfo(), `slot = "c"`)))
	awaitSlotFlushed(t, s, "a", 1)
	file := filepath.Join(t.TempDir(), "new.toml")
	write := func(config string) {
		if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(configText(dir, cluster("a", s.conninfo(), `slot = "a"`, `min_free = "1MB"`), cluster("b", s.conninfo(), `slot = "b2"`), cluster("d", s.conninfo(), `slot = "d"`)))
	pid := s.sender(t, "a").pid
	out, err := command(t, "check", "-c", file, "--diff").CombinedOutput()
	if err != nil || !containsAll(string(out), []string{"would\n", "start    d\n", "stop     c  its files stay", "restart  b  slot\n", "adjust   a  min_free\n", "keep     0\n"}) {
		t.Errorf("%v: %s", err, out)
	}
	if now := s.sender(t, "a"); now.pid != pid || strings.Contains(p.stderr.String(), "reload") {
		t.Error("the daemon did something")
	}
	write("archive_dir = 1\n")
	if out, err := command(t, "check", "-c", file, "--diff").CombinedOutput(); err == nil || !strings.Contains(string(out), file+":1:") {
		t.Errorf("%v: %s", err, out)
	}
}
