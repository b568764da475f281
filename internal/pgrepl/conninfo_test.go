package pgrepl

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// patience bounds what the tests wait for, on a machine that has other things to do.
const patience = time.Minute

// isolate keeps libpq's environment and files of the machine out of a test.
func isolate(t testing.TB, env ...string) (dir string) {
	t.Helper()
	for _, kv := range os.Environ() {
		if name, _, _ := strings.Cut(kv, "="); strings.HasPrefix(name, "PG") {
			t.Setenv(name, "")
		}
	}
	dir = t.TempDir()
	t.Setenv("HOME", dir)
	t.Setenv("PGPASSFILE", filepath.Join(dir, "none"))
	for i := 0; i < len(env); i += 2 {
		t.Setenv(env[i], env[i+1])
	}
	return dir
}

func writeFile(t *testing.T, path, content string) string {
	t.Helper()
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		t.Fatal(err)
	}
	return path
}

// describe is what a Conninfo makes of each host, in one line.
func describe(c *Conninfo) string {
	var lines []string
	for _, h := range c.hosts {
		s := fmt.Sprintf("%s user=%s db=%s pw=%s", h.name, h.config.User, h.config.Database, h.config.Password)
		if h.config.TLSConfig != nil {
			s += " tls=" + h.config.TLSConfig.ServerName
		}
		lines = append(lines, s)
	}
	return strings.Join(lines, "; ")
}

func TestParseConninfo(t *testing.T) {
	for _, tt := range []struct{ conninfo, want string }{
		{"host=db user=u", "db:5432 user=u db= pw="},
		{"host=db port=5433 user=u dbname=d password='p w'", "db:5433 user=u db=d pw=p w"},
		{`host=db user=u password='it\'s \\'`, `db:5432 user=u db= pw=it's \`},
		{"host=/run/pg port=5433 user=u", "/run/pg:5433 user=u db= pw="},
		{"host=a,b port=1,2 user=u", "a:1 user=u db= pw=; b:2 user=u db= pw="},
		{"host=a,b,/c port=9 user=u", "a:9 user=u db= pw=; b:9 user=u db= pw=; /c:9 user=u db= pw="},
		{"host=a,a user=u", "a:5432 user=u db= pw="},
		{"host=2001:db8::1 user=u", "[2001:db8::1]:5432 user=u db= pw="},
		{"postgres://u:p%40w@db/d", "db:5432 user=u db=d pw=p@w"},
		{"postgresql://u@a:1,b:2/d?application_name=x", "a:1 user=u db=d pw=; b:2 user=u db=d pw="},
		{"postgres://u:p?w@a,b/d", "a:5432 user=u db=d pw=p?w; b:5432 user=u db=d pw=p?w"},
		{"postgres://u:p#w@a,b/d?connect_timeout=10", "a:5432 user=u db=d pw=p#w; b:5432 user=u db=d pw=p#w"},
		{"postgres://u@[2001:db8::1]:5433/", "[2001:db8::1]:5433 user=u db= pw="},
		{"postgres://%2Frun%2Fpg/d?user=u", "/run/pg:5432 user=u db=d pw="},
		{"postgres:///?host=a,b&port=1,2&user=u", "a:1 user=u db= pw=; b:2 user=u db= pw="},
		{"host=db user=u sslmode=verify-full", "db:5432 user=u db= pw= tls=db"},
		{"host=a,b user=u sslmode=verify-full", "a:5432 user=u db= pw= tls=a; b:5432 user=u db= pw= tls=b"},
		{"host=a,b hostaddr=10.0.0.1,10.0.0.2 user=u sslmode=verify-full", "a:5432 user=u db= pw= tls=a; b:5432 user=u db= pw= tls=b"},
		{"host=db user=u gssencmode=disable sslcompression=0 client_encoding=UTF8 load_balance_hosts=disable", "db:5432 user=u db= pw="},
	} {
		t.Run(tt.conninfo, func(t *testing.T) {
			isolate(t)
			if !strings.Contains(tt.conninfo, "sslmode") {
				t.Setenv("PGSSLMODE", "disable")
			}
			c, err := ParseConninfo(tt.conninfo)
			if err != nil {
				t.Fatal(err)
			}
			if got := describe(c); got != tt.want {
				t.Errorf(" got %s\nwant %s", got, tt.want)
			}
			for _, h := range c.hosts {
				p := h.config.RuntimeParams
				delete(p, "application_name")
				if len(p) != 1 || p["replication"] != "true" {
					t.Errorf("sent to the server: %v", p)
				}
				if h.config.ConnectTimeout != defaultConnectTimeout || h.config.MaxProtocolMessageBodyLen != maxMessageLen {
					t.Errorf("connect timeout %s, message bound %d", h.config.ConnectTimeout, h.config.MaxProtocolMessageBodyLen)
				}
			}
			if got := len(c.Hosts()); got != len(c.hosts) || len(c.Order()) != got {
				t.Errorf("%d hosts", got)
			}
		})
	}
}

func TestConninfoThatCannotBeHonouredIsRefused(t *testing.T) {
	dir := isolate(t, "PGSSLMODE", "disable")
	empty := writeFile(t, filepath.Join(dir, "empty"), "")
	for _, tt := range []struct{ conninfo, want string }{
		{"host", "not a list of keyword=value"},
		{"host=db password='x", "not a list of keyword=value"},
		{"postgres://u:p@db:x/d", "port"},
		{"host=db port=70000", "port"},
		{"host=a,b port=1,2,3", "could not match 3 port numbers to 2 hosts"},
		{"host=db passwort=secret", "no connection option"},
		{"host=db work_mem=1GB", "no connection option"},
		{"host=db requirepeer=postgres", "requirepeer is not supported"},
		{"host=db sslcrldir=/x", "sslcrldir is not supported"},
		{"host=db gssencmode=require", "gssencmode=require is not supported"},
		{"host=db load_balance_hosts=often", "neither disable nor random"},
		{"host=db target_session_attrs=standby", `source = "any"`},
		{"host=db target_session_attrs=read-only", `source = "any"`},
		{"host=db target_session_attrs=prefer-standby", `source = "any"`},
		{"host=db target_session_attrs=what", "target_session_attrs"},
		{"host=db keepalives=on", "keepalives"},
		{"host=db keepalives_idle=1s", "keepalives_idle"},
		{"host=db keepalives_interval=1s", "keepalives_interval"},
		{"host=db keepalives_count=x", "keepalives_count"},
		{"host=db tcp_user_timeout=x", "tcp_user_timeout"},
		{"host=db connect_timeout=x", "connect_timeout"},
		{"host=db hostaddr=db.example", "not an IP address"},
		{"host=a,b hostaddr=10.0.0.1", "could not match 2 hosts to 1 hostaddr values"},
		{"hostaddr=10.0.0.1", "hostaddr needs host"},
		{"host=db ssl_min_protocol_version=SSLv3", "ssl_min_protocol_version"},
		{"host=db ssl_max_protocol_version=1.2", "ssl_max_protocol_version"},
		{"host=db ssl_min_protocol_version=TLSv1.3 ssl_max_protocol_version=TLSv1.2", "above ssl_max_protocol_version"},
		{"host=db sslcrl=" + dir + "/missing", "sslcrl"},
		{"host=db sslcrl=" + empty, "no PEM block"},
		{"host=db sslmode=verify-everything", "ssl"},
		{"service=nowhere", "service"},
	} {
		if _, err := ParseConninfo(tt.conninfo); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%s: %v, want %q", tt.conninfo, err, tt.want)
		}
	}
}

func TestTargetSessionAttrsOfAPrimaryAreLeftToTheSourceSetting(t *testing.T) {
	isolate(t)
	for _, v := range []string{"any", "read-write", "primary"} {
		c, err := ParseConninfo("host=db target_session_attrs=" + v)
		if err != nil || c.hosts[0].config.ValidateConnect != nil {
			t.Errorf("%s: %v", v, err)
		}
	}
}

func TestEnvironmentIsHonoured(t *testing.T) {
	isolate(t, "PGHOST", "a,b", "PGPORT", "1,2", "PGUSER", "u", "PGPASSWORD", "secret", "PGSSLMODE", "disable", "PGHOSTADDR", "10.0.0.1,10.0.0.2",
		"PGLOADBALANCEHOSTS", "random", "PGCONNECT_TIMEOUT", "3", "PGTARGETSESSIONATTRS", "primary", "PGOPTIONS", "-c geqo=off")
	c, err := ParseConninfo("")
	if err != nil {
		t.Fatal(err)
	}
	if got, want := describe(c), "a:1 user=u db= pw=secret; b:2 user=u db= pw=secret"; got != want {
		t.Errorf(" got %s\nwant %s", got, want)
	}
	if addr, err := c.hosts[1].config.LookupFunc(t.Context(), "b"); err != nil || !slices.Equal(addr, []string{"10.0.0.2"}) {
		t.Errorf("b is at %v, %v", addr, err)
	}
	if h := c.hosts[0].config; h.ConnectTimeout != 3*time.Second || h.RuntimeParams["options"] != "-c geqo=off" {
		t.Errorf("%s, %v", h.ConnectTimeout, h.RuntimeParams)
	}
	t.Setenv("PGSSLCRL", "/nowhere")
	if _, err := ParseConninfo(""); err == nil || !strings.Contains(err.Error(), "/nowhere") {
		t.Errorf("PGSSLCRL: %v", err)
	}
}

func TestPassfileIsReadForEachHost(t *testing.T) {
	dir := isolate(t, "PGSSLMODE", "disable")
	file := writeFile(t, filepath.Join(dir, "pass"), "a:1:*:u:for a\nb:2:*:u:for b\nlocalhost:*:*:u:for sockets\n*:*:*:u:for others\n")
	c, err := ParseConninfo("host=a,b,c,/run port=1,2,3,4 user=u passfile=" + file)
	if err != nil {
		t.Fatal(err)
	}
	want := "a:1 user=u db= pw=for a; b:2 user=u db= pw=for b; c:3 user=u db= pw=for others; /run:4 user=u db= pw=for sockets"
	if got := describe(c); got != want {
		t.Errorf(" got %s\nwant %s", got, want)
	}
}

func TestServiceFileIsRead(t *testing.T) {
	dir := isolate(t, "PGSSLMODE", "disable")
	t.Setenv("PGSERVICEFILE", writeFile(t, filepath.Join(dir, "services"),
		"[blue]\nhost=a,b\nport=1,2\nuser=u\npassword=secret\nkeepalives_idle=7\napplication_name=from_service\n"))
	for _, conninfo := range []string{"service=blue", "postgres://?service=blue"} {
		c, err := ParseConninfo(conninfo)
		if err != nil {
			t.Fatal(err)
		}
		if got, want := describe(c), "a:1 user=u db= pw=secret; b:2 user=u db= pw=secret"; got != want {
			t.Errorf("%s:\n got %s\nwant %s", conninfo, got, want)
		}
		if h := c.hosts[1]; h.dialer.KeepAliveConfig.Idle != 7*time.Second || h.config.RuntimeParams["application_name"] != "from_service" {
			t.Errorf("%+v, %v", h.dialer.KeepAliveConfig, h.config.RuntimeParams)
		}
	}
}

func TestLoadBalanceHosts(t *testing.T) {
	isolate(t)
	firsts := map[int]bool{}
	for range 200 {
		c, err := ParseConninfo("host=a,b,c load_balance_hosts=random")
		if err != nil {
			t.Fatal(err)
		}
		order := c.Order()
		firsts[order[0]] = true
		if slices.Sort(order); !slices.Equal(order, []int{0, 1, 2}) {
			t.Fatalf("order %v", order)
		}
		if !slices.Equal(c.Hosts(), []string{"a:5432", "b:5432", "c:5432"}) {
			t.Fatalf("hosts %v", c.Hosts())
		}
	}
	if len(firsts) != 3 {
		t.Errorf("only %v came first in 200 times", firsts)
	}
}

func TestKeepalives(t *testing.T) {
	isolate(t)
	system := net.KeepAliveConfig{Enable: true, Idle: -1, Interval: -1, Count: -1}
	for conninfo, want := range map[string]net.KeepAliveConfig{
		"host=a":                                system,
		"host=a keepalives=1":                   system,
		"host=a keepalives=0":                   {},
		"host=a keepalives=0 keepalives_idle=5": {},
		"host=a keepalives_idle=5":              {Enable: true, Idle: 5 * time.Second, Interval: -1, Count: -1},
		"postgres://a?keepalives_idle=5&keepalives_interval=2&keepalives_count=3": {Enable: true, Idle: 5 * time.Second, Interval: 2 * time.Second, Count: 3},
		"host=a keepalives_idle=0 keepalives_interval=0 keepalives_count=0":       system,
	} {
		c, err := ParseConninfo(conninfo)
		if err != nil {
			t.Fatal(err)
		}
		if d := c.hosts[0].dialer; d.KeepAliveConfig != want || d.KeepAlive != -1 {
			t.Errorf("%s: %+v, want %+v", conninfo, d.KeepAliveConfig, want)
		}
	}
}

func TestApplicationNamePrecedence(t *testing.T) {
	for _, tt := range []struct{ option, conninfo, env, want string }{
		{"", "", "", "walfleet"},
		{"", "", "env", "env"},
		{"", " fallback_application_name=fallback", "", "fallback"},
		{"", " fallback_application_name=fallback", "env", "env"},
		{"", " application_name=conninfo fallback_application_name=fallback", "env", "conninfo"},
		{"option", " application_name=conninfo", "env", "option"},
	} {
		isolate(t, "PGAPPNAME", tt.env)
		c, err := ParseConninfo("host=db user=u sslmode=disable" + tt.conninfo)
		if err != nil {
			t.Fatal(err)
		}
		s := newGreeter(nil)
		conn, err := c.Connect(t.Context(), 0, Options{ApplicationName: tt.option, Dial: s.dial, Timeout: patience})
		if err != nil {
			t.Fatal(err)
		}
		conn.Close()
		if got := (<-s.startup)["application_name"]; got != tt.want {
			t.Errorf("%+v: %q", tt, got)
		}
	}
}

func TestPasswordFile(t *testing.T) {
	dir := isolate(t)
	c, err := ParseConninfo("host=db user=u sslmode=disable password=overruled")
	if err != nil {
		t.Fatal(err)
	}
	for content, want := range map[string]string{"secret": "secret", "secret\nmore\n": "secret", "se cret \r\n": "se cret ", "": ""} {
		s := newGreeter(nil)
		s.askPassword = true
		o := Options{PasswordFile: writeFile(t, filepath.Join(dir, "password"), content), Dial: s.dial, Timeout: patience}
		conn, err := c.Connect(t.Context(), 0, o)
		if err != nil {
			t.Errorf("%q: %v", content, err)
			continue
		}
		conn.Close()
		if got := <-s.password; got != want {
			t.Errorf("%q gives password %q", content, got)
		}
	}
	if _, err := c.Connect(t.Context(), 0, Options{PasswordFile: dir + "/missing"}); err == nil || !strings.Contains(err.Error(), "missing") {
		t.Errorf("missing password_file: %v", err)
	}
}

// A space that was forgotten puts the password into another keyword's value.
func TestForgottenSpaceDoesNotShowThePassword(t *testing.T) {
	isolate(t)
	for _, keyword := range []string{
		"port", "connect_timeout", "sslmode", "sslcertmode", "sslnegotiation", "sslrootcert", "sslcert", "sslcrl", "sslcrldir", "requirepeer", "service",
		"target_session_attrs", "load_balance_hosts", "hostaddr", "gssencmode", "keepalives", "keepalives_idle", "keepalives_interval",
		"keepalives_count", "tcp_user_timeout", "ssl_min_protocol_version", "ssl_max_protocol_version", "min_protocol_version",
		"max_protocol_version", "channel_binding", "require_auth", "replication", "options", "host",
	} {
		for _, conninfo := range []string{
			"host=db " + keyword + "=1password=hunter2",
			"host=db " + keyword + "='1 password=hunter2 user=u'",
			"postgres://db/?" + keyword + "=1%26password=hunter2",
		} {
			if _, err := ParseConninfo(conninfo); err != nil && strings.Contains(err.Error(), "hunter2") {
				t.Errorf("%s\n%v", conninfo, err)
			}
		}
	}
}

// Whatever surrounds a password that stands where it should, an error does not show it.
func FuzzErrorsNeverShowThePassword(f *testing.F) {
	for _, s := range []string{"", "host=db", "port=x", "sslmode=no", "service=none", "x", "='", `\`, "hostaddr=1", "postgres://", "?port=x", "`: ", "passfile=/"} {
		f.Add(s, s)
	}
	const secret = "hunter2hunter2"
	f.Fuzz(func(t *testing.T, before, after string) {
		if strings.Contains(before+after, secret) {
			return
		}
		for _, conninfo := range []string{
			before + " password=" + secret + " " + after,
			"postgres://u:" + secret + "@" + before + "/" + after,
			"postgres://" + before + "?password=" + secret + "&" + after,
		} {
			c, err := ParseConninfo(conninfo)
			if err == nil && strings.Contains(c.hosts[0].config.Password, secret) && !strings.Contains(c.hosts[0].config.User, secret) {
				_, err = c.Connect(t.Context(), 0, Options{Dial: func(context.Context, string, string) (net.Conn, error) {
					return nil, os.ErrDeadlineExceeded
				}})
			}
			if err != nil && strings.Contains(err.Error(), secret) {
				t.Errorf("%q\n%v", conninfo, err)
			}
		}
	})
}
