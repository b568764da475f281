package integration

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/walfleet/walfleet/receiver"
)

// TestServersThatRefuse has one fleet of clusters that cannot be archived, each for a reason that its status and
// the log name, and of one that is not disturbed by the others.
func TestServersThatRefuse(t *testing.T) {
	t.Parallel()
	s := startServer(t, serverOptions{segment: megabyte,
		sql: "CREATE ROLE plain LOGIN PASSWORD '" + password + "'; CREATE ROLE rejected LOGIN REPLICATION PASSWORD '" + password + "'",
		hba: []string{"host replication rejected all reject"}})
	passwordFile := func(content string) string {
		name := filepath.Join(t.TempDir(), "password")
		if err := os.WriteFile(name, []byte(content), 0o600); err != nil {
			t.Fatal(err)
		}
		return fmt.Sprintf("password_file = %q", name)
	}
	const wrong = "wrong-and-secret"
	tests := []struct {
		name, conninfo, setting string
		state                   receiver.State
		reason                  string
		hint                    string // in the log
	}{
		{"wrong_password", s.conninfo("password=" + wrong), "", receiver.Halted, "password authentication failed", "check the password"},
		{"wrong_password_file", s.conninfo(), passwordFile(wrong + "\n"), receiver.Halted, "password authentication failed", "check the password"},
		{"wrong_password_uri", fmt.Sprintf("postgresql://walfleet:%s@%s:%d/?sslmode=disable", wrong, host, s.port), "", receiver.Halted, "password authentication failed", "check the password"},
		{"missing_password_file", s.conninfo(), `password_file = "/nonexistent/password"`, receiver.Halted, "password_file: open /nonexistent/password", "password_file must exist"},
		{"unknown_role", s.conninfo("user=nobody"), "", receiver.Halted, "password authentication failed", ""},
		{"no_replication_right", s.conninfo("user=plain"), "", receiver.Halted, "permission denied to start WAL sender", "ALTER ROLE"},
		{"rejected", s.conninfo("user=rejected"), "", receiver.Halted, "pg_hba.conf rejects", "pg_hba.conf"},
		{"refused", fmt.Sprintf("host=%s port=%d user=walfleet password=%s sslmode=disable", host, freePort(t), wrong), "", receiver.Backoff, "connection refused", ""},
	}
	clusters := []string{cluster("good", s.conninfo("password=''"), passwordFile(password+"\n"), `slot = "good"`)}
	for _, tt := range tests {
		clusters = append(clusters, cluster(tt.name, tt.conninfo, fmt.Sprintf("slot = %q", tt.name), tt.setting))
	}
	d := startDaemon(t, configText(t.TempDir(), clusters...))
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			st := d.awaitState(t, tt.name, tt.state, tt.reason)
			line := d.log.await(t, "not archiving", "cluster="+tt.name, tt.reason, tt.hint)
			for _, secret := range []string{password, wrong} {
				if strings.Contains(st.Reason+line, secret) {
					t.Errorf("a password is shown: %q, %q", st.Reason, line)
				}
			}
			if !strings.Contains(st.Reason, host) && tt.setting == "" {
				t.Errorf("the reason does not name the host: %s", st.Reason)
			}
		})
	}
	s.write(t, 2)
	d.awaitFlushed(t, "good", s.end(t))
	d.stop(t)
	compareArchive(t, d.clusterDir("good"), d.status(t, "good"), origins{1: s})
	if text := d.log.String(); strings.Contains(text, password) || strings.Contains(text, wrong) {
		t.Error("the log shows a password")
	}
}

// TestServerThatIsNotReadyYet starts walfleet before its server; that then has wal_level = minimal, which is put
// right at last. walfleet waits through all of it.
func TestServerThatIsNotReadyYet(t *testing.T) {
	t.Parallel()
	port := freePort(t)
	later := &server{port: port}
	d := startDaemon(t, configText(t.TempDir(), cluster("orders", later.conninfo())))
	d.awaitState(t, "orders", receiver.Backoff, "connection refused")

	s := startServer(t, serverOptions{segment: megabyte, port: port, settings: []string{"wal_level = minimal", "max_wal_senders = 0"}})
	d.await(t, "orders", "max_wal_senders is the reason", func(st receiver.Status) bool {
		return st.State != receiver.Streaming && strings.Contains(st.Reason, "max_wal_senders")
	})
	d.log.await(t, "not archiving", "max_wal_senders", "wal_level = minimal")

	s.query(t, "ALTER SYSTEM SET wal_level = 'replica'")
	s.query(t, "ALTER SYSTEM SET max_wal_senders = 10")
	s.stop(t)
	s.start(t)
	d.awaitState(t, "orders", receiver.Streaming)
	s.write(t, 2)
	st := d.archived(t, "orders", s)
	compareArchive(t, d.clusterDir("orders"), st, origins{1: s})
}
