// Package pgrepl is everything that talks to a PostgreSQL server: conninfo
// strings, connections in replication mode, the replication commands, and the
// stream of WAL messages. It is the one package that knows pgx and pglogrepl.
package pgrepl

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/rand/v2"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"reflect"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/jackc/pgx/v5/pgconn"
)

// defaultConnectTimeout bounds one attempt to reach one host when the conninfo
// has no connect_timeout. libpq would wait for ever.
const defaultConnectTimeout = 10 * time.Second

// maxMessageLen bounds one message from a server, in bytes. A walsender sends
// at most MAX_SEND_SIZE (128 KiB, walsender.c) of WAL at once; the rest is room
// for long timeline histories and error texts.
const maxMessageLen = 1 << 20

// Conninfo is a parsed connection string: how to reach the hosts of one
// cluster. It holds secrets and is never printed.
type Conninfo struct {
	hosts     []hostConfig
	randomise bool   // load_balance_hosts=random
	warning   string // about a passfile that is not used
}

type hostConfig struct {
	name   string // "host:port"
	config *pgconn.Config
	dialer net.Dialer
}

// libpqEnv names the environment variables of keywords that pgconn does not
// read itself (libpq's "Environment Variables").
var libpqEnv = map[string]string{
	"hostaddr":                 "PGHOSTADDR",
	"gssencmode":               "PGGSSENCMODE",
	"load_balance_hosts":       "PGLOADBALANCEHOSTS",
	"requirepeer":              "PGREQUIREPEER",
	"sslcrl":                   "PGSSLCRL",
	"sslcrldir":                "PGSSLCRLDIR",
	"ssl_min_protocol_version": "PGSSLMINPROTOCOLVERSION",
	"ssl_max_protocol_version": "PGSSLMAXPROTOCOLVERSION",
}

// ignoredKeywords are libpq's, and have no effect on a connection of ours.
var ignoredKeywords = []string{"client_encoding", "replication", "sslcompression", "gsslib", "timezone"}

// ParseConninfo parses libpq keywords or a URI, with the passfile, service file
// and environment variables that libpq would use. Keywords that pgconn would
// pass on to the server are taken out and honoured here; those that cannot be
// honoured are refused. No error names a secret.
// See https://www.postgresql.org/docs/current/libpq-connect.html.
func ParseConninfo(s string) (*Conninfo, error) {
	warning := checkPassfile(passfile(s))
	if warning != "" {
		s = Override(s, [][2]string{{"passfile", ""}})
	}
	config, err := parse(s)
	if err != nil {
		return nil, err
	}
	if config.Password != "" {
		warning = "" // no passfile is needed
	}
	extra, err := takeExtra(config)
	if err != nil {
		return nil, err
	}
	random := false
	switch v := extra["load_balance_hosts"]; v {
	case "", "disable":
	case "random":
		random = true
	default:
		return nil, fmt.Errorf("conninfo: load_balance_hosts: %q is neither disable nor random", v)
	}
	addrs := map[string]string{}
	if v := extra["hostaddr"]; v != "" {
		hosts, list := hostNames(config), strings.Split(v, ",")
		if strings.HasPrefix(config.Host, "/") {
			return nil, errors.New("conninfo: hostaddr needs host as well (or give the address as host)")
		}
		if len(list) != len(hosts) {
			return nil, fmt.Errorf("conninfo: could not match %d hosts to %d hostaddr values", len(hosts), len(list))
		}
		for i, h := range hosts {
			if net.ParseIP(list[i]) == nil {
				return nil, fmt.Errorf("conninfo: hostaddr: %q is not an IP address", list[i])
			}
			addrs[h] = list[i]
		}
	}
	c := &Conninfo{randomise: random, warning: warning}
	for _, h := range hostNames(config) {
		hc, err := parseHost(s, h, addrs[h])
		if err != nil {
			return nil, err
		}
		c.hosts = append(c.hosts, hc)
	}
	return c, nil
}

// Warning says why a passfile is not used; "": there is none, or nothing against it.
func (c *Conninfo) Warning() string { return c.warning }

// passfile is the path of the passfile that a conninfo stands for.
func passfile(s string) string {
	if u, err := url.Parse(s); err == nil && u.Query().Get("passfile") != "" {
		return u.Query().Get("passfile")
	}
	if found := passfileKeyword.FindAllStringSubmatch(s, -1); found != nil {
		last := found[len(found)-1]
		return last[1] + unescapeValue.Replace(last[2])
	}
	if path := os.Getenv("PGPASSFILE"); path != "" {
		return path
	}
	home, _ := os.UserHomeDir()
	return filepath.Join(home, ".pgpass")
}

var (
	passfileKeyword = regexp.MustCompile(`(?:^|\s)passfile\s*=\s*(?:([^'\s]\S*)|'((?:[^'\\]|\\.)*)')`)
	unescapeValue   = strings.NewReplacer(`\\`, `\`, `\'`, `'`)
)

// checkPassfile says why a passfile must not be used, as libpq does (passwordFromFile
// in fe-connect.c).
func checkPassfile(path string) string {
	info, err := os.Stat(path)
	switch {
	case err != nil:
	case !info.Mode().IsRegular():
		return fmt.Sprintf("password file %q is not a plain file", path)
	case info.Mode().Perm()&0o077 != 0:
		return fmt.Sprintf("password file %q has group or world access; permissions should be u=rw (0600) or less", path)
	}
	return ""
}

// Hosts lists the cluster's servers as "host:port", in the conninfo's order.
func (c *Conninfo) Hosts() []string {
	names := make([]string, len(c.hosts))
	for i, h := range c.hosts {
		names[i] = h.name
	}
	return names
}

// User is the role that connects.
func (c *Conninfo) User() string {
	if len(c.hosts) == 0 {
		return ""
	}
	return c.hosts[0].config.User
}

// Order gives the hosts' indices in the order in which to try them.
func (c *Conninfo) Order() []int {
	if c.randomise {
		return rand.Perm(len(c.hosts))
	}
	order := make([]int, len(c.hosts))
	for i := range order {
		order[i] = i
	}
	return order
}

// parseHost parses s again for one host alone, so that the passfile entry and
// the TLS server name are that host's.
func parseHost(s, name, addr string) (hostConfig, error) {
	host, port, err := splitHostPort(name)
	if err != nil {
		return hostConfig{}, err
	}
	config, err := parse(Override(s, [][2]string{{"host", host}, {"port", port}, {"target_session_attrs", "any"}}))
	if err != nil {
		return hostConfig{}, err
	}
	extra, err := takeExtra(config)
	if err != nil {
		return hostConfig{}, err
	}
	if err := honourTLS(config, extra); err != nil {
		return hostConfig{}, err
	}
	dialer, err := newDialer(extra)
	if err != nil {
		return hostConfig{}, err
	}
	if config.ConnectTimeout == 0 {
		config.ConnectTimeout = defaultConnectTimeout
	}
	config.RuntimeParams["replication"] = "true"
	config.MaxProtocolMessageBodyLen = maxMessageLen
	config.ValidateConnect = nil
	if addr != "" {
		config.LookupFunc = func(context.Context, string) ([]string, error) { return []string{addr}, nil }
	}
	return hostConfig{name: name, config: config, dialer: dialer}, nil
}

func parse(s string) (*pgconn.Config, error) {
	config, err := pgconn.ParseConfig(s)
	if err == nil {
		return config, checkTargetSession(config)
	}
	var pe *pgconn.ParseConfigError
	if !errors.As(err, &pe) {
		return nil, errors.New("conninfo does not parse")
	}
	// pgconn's text quotes the conninfo with its passwords masked as well as it
	// can, which is not well enough. What follows the quotation is safe unless
	// the string itself could not be taken apart.
	reason := pe.Error()
	if i := strings.LastIndex(reason, "`: "); i >= 0 {
		reason = reason[i+3:]
	}
	switch {
	case strings.HasPrefix(reason, "failed to parse as keyword/value"):
		reason = "not a list of keyword=value (quote a value with spaces in single quotes)"
	case strings.HasPrefix(reason, "failed to parse as URL"):
		reason = "not a valid URI (percent-encode special characters in user and password)"
	case strings.Contains(reason, "="):
		// A value is quoted that has the next keyword in it, for want of a space.
		reason = reason[:strings.IndexAny(reason, ":(=")] + ": is a space missing between two settings?"
	}
	return nil, fmt.Errorf("conninfo does not parse: %s", clean(reason))
}

// checkTargetSession refuses what contradicts archiving. Which server is taken
// is decided by the source setting, with the archive's history in view.
func checkTargetSession(config *pgconn.Config) error {
	if config.ValidateConnect == nil {
		return nil
	}
	p := reflect.ValueOf(config.ValidateConnect).Pointer()
	for _, f := range []pgconn.ValidateConnectFunc{
		pgconn.ValidateConnectTargetSessionAttrsReadWrite,
		pgconn.ValidateConnectTargetSessionAttrsPrimary,
	} {
		if p == reflect.ValueOf(f).Pointer() {
			return nil
		}
	}
	return errors.New(`conninfo: target_session_attrs asks for a standby; use source = "any" instead`)
}

// takeExtra removes from the start-up parameters what is not the server's, and
// returns it. A keyword that libpq does not know is an error, as in libpq.
func takeExtra(config *pgconn.Config) (map[string]string, error) {
	extra := map[string]string{}
	for keyword, env := range libpqEnv {
		if v := os.Getenv(env); v != "" {
			extra[keyword] = v
		}
	}
	for keyword, value := range config.RuntimeParams {
		switch keyword {
		case "application_name", "options":
			continue
		case "fallback_application_name":
			if config.RuntimeParams["application_name"] == "" {
				config.RuntimeParams["application_name"] = value
			}
		case "hostaddr", "gssencmode", "load_balance_hosts", "sslcrl", "ssl_min_protocol_version",
			"ssl_max_protocol_version", "keepalives", "keepalives_idle", "keepalives_interval",
			"keepalives_count", "tcp_user_timeout", "requirepeer", "sslcrldir":
			extra[keyword] = value
		default:
			if !slices.Contains(ignoredKeywords, keyword) {
				// It may be part of a password that was not quoted: not shown.
				return nil, errors.New("conninfo: one of its keywords is no connection option (a value with spaces must stand in single quotes)")
			}
		}
		delete(config.RuntimeParams, keyword)
	}
	for keyword, value := range extra {
		if strings.Contains(value, "=") { // not shown: it may be a password
			return nil, fmt.Errorf("conninfo: the value of %s has a = in it: is a space missing between two settings?", keyword)
		}
	}
	for _, keyword := range []string{"requirepeer", "sslcrldir"} {
		if extra[keyword] != "" {
			return nil, fmt.Errorf("conninfo: %s is not supported", keyword)
		}
	}
	switch v := extra["gssencmode"]; v {
	case "", "disable", "prefer":
	default:
		return nil, fmt.Errorf("conninfo: gssencmode=%s is not supported (use disable, and sslmode for encryption)", clean(v))
	}
	return extra, nil
}

// honourTLS applies the keywords of libpq's TLS that pgconn does not know.
func honourTLS(config *pgconn.Config, extra map[string]string) error {
	versions := map[string]uint16{"TLSv1": tls.VersionTLS10, "TLSv1.1": tls.VersionTLS11, "TLSv1.2": tls.VersionTLS12, "TLSv1.3": tls.VersionTLS13}
	minVersion, maxVersion := uint16(tls.VersionTLS12), uint16(0) // libpq's defaults
	for keyword, target := range map[string]*uint16{"ssl_min_protocol_version": &minVersion, "ssl_max_protocol_version": &maxVersion} {
		if v := extra[keyword]; v != "" {
			number, ok := versions[v]
			if !ok {
				return fmt.Errorf("conninfo: %s: %q is none of TLSv1, TLSv1.1, TLSv1.2, TLSv1.3", keyword, v)
			}
			*target = number
		}
	}
	if maxVersion != 0 && minVersion > maxVersion {
		return errors.New("conninfo: ssl_min_protocol_version is above ssl_max_protocol_version")
	}
	verifyCRL := func(tls.ConnectionState) error { return nil }
	if file := extra["sslcrl"]; file != "" {
		crl, err := readCRL(file)
		if err != nil {
			return err
		}
		verifyCRL = crl.verify
	}
	for _, t := range tlsConfigs(config) {
		t.MinVersion, t.MaxVersion = minVersion, maxVersion
		inner := t.VerifyConnection
		t.VerifyConnection = func(state tls.ConnectionState) error {
			if inner != nil {
				if err := inner(state); err != nil {
					return err
				}
			}
			return verifyCRL(state)
		}
	}
	return nil
}

func tlsConfigs(config *pgconn.Config) []*tls.Config {
	all := []*tls.Config{config.TLSConfig}
	for _, f := range config.Fallbacks {
		all = append(all, f.TLSConfig)
	}
	return slices.DeleteFunc(all, func(t *tls.Config) bool { return t == nil })
}

// revocations are the serial numbers that an issuer has revoked, from sslcrl.
type revocations struct {
	file string
	list []*x509.RevocationList
}

func readCRL(file string) (*revocations, error) {
	data, err := os.ReadFile(file)
	if err != nil {
		return nil, fmt.Errorf("conninfo: sslcrl: %w", err)
	}
	r := &revocations{file: file}
	for block, rest := pem.Decode(data); block != nil; block, rest = pem.Decode(rest) {
		list, err := x509.ParseRevocationList(block.Bytes)
		if err != nil {
			return nil, fmt.Errorf("conninfo: sslcrl %s: %w", file, err)
		}
		r.list = append(r.list, list)
	}
	if len(r.list) == 0 {
		return nil, fmt.Errorf("conninfo: sslcrl %s: no PEM block of a certificate revocation list", file)
	}
	return r, nil
}

func (r *revocations) verify(state tls.ConnectionState) error {
	for _, cert := range state.PeerCertificates {
		for _, list := range r.list {
			if string(list.RawIssuer) != string(cert.RawIssuer) {
				continue
			}
			for _, entry := range list.RevokedCertificateEntries {
				if entry.SerialNumber.Cmp(cert.SerialNumber) == 0 {
					return &RevokedError{fmt.Sprintf("the server's certificate chain contains serial number %s, which sslcrl %s revokes", cert.SerialNumber, r.file)}
				}
			}
		}
	}
	return nil
}

// newDialer honours libpq's TCP keywords. Unset ones keep the system's values,
// as in libpq: keepalives are on, the intervals are the kernel's.
func newDialer(extra map[string]string) (net.Dialer, error) {
	number := func(keyword string) (int, error) {
		v := extra[keyword]
		if v == "" {
			return 0, nil
		}
		n, err := strconv.Atoi(v)
		if err != nil {
			return 0, fmt.Errorf("conninfo: invalid integer value %q for connection option %q", clean(v), keyword)
		}
		return n, nil
	}
	idle, err1 := number("keepalives_idle")
	interval, err2 := number("keepalives_interval")
	count, err3 := number("keepalives_count")
	userTimeout, err4 := number("tcp_user_timeout")
	enable, err5 := number("keepalives")
	if err := errors.Join(err1, err2, err3, err4, err5); err != nil {
		return net.Dialer{}, err
	}
	keepSystem := func(n int) int { // net.KeepAliveConfig: negative leaves the system's value
		if n <= 0 {
			return -1
		}
		return n
	}
	d := net.Dialer{KeepAlive: -1}
	if extra["keepalives"] == "" || enable != 0 {
		d.KeepAliveConfig = net.KeepAliveConfig{
			Enable:   true,
			Idle:     seconds(keepSystem(idle)),
			Interval: seconds(keepSystem(interval)),
			Count:    keepSystem(count),
		}
	}
	if userTimeout > 0 {
		d.Control = tcpUserTimeout(userTimeout)
	}
	return d, nil
}

// seconds converts libpq's unit; net.KeepAliveConfig takes -1 itself as "leave".
func seconds(n int) time.Duration {
	if n < 0 {
		return -1
	}
	return time.Duration(n) * time.Second
}

// hostNames lists "host:port" of each distinct host, in order.
func hostNames(config *pgconn.Config) []string {
	names := []string{hostPort(config.Host, config.Port)}
	for _, f := range config.Fallbacks {
		if name := hostPort(f.Host, f.Port); !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

func hostPort(host string, port uint16) string {
	if strings.HasPrefix(host, "/") {
		return fmt.Sprintf("%s:%d", host, port)
	}
	return net.JoinHostPort(host, strconv.Itoa(int(port)))
}

func splitHostPort(name string) (host, port string, err error) {
	if strings.HasPrefix(name, "/") {
		i := strings.LastIndexByte(name, ':')
		return name[:i], name[i+1:], nil
	}
	return net.SplitHostPort(name)
}

// Override adds settings, pairs of keyword and value, to a conninfo. They count
// instead of those that it has.
func Override(s string, settings [][2]string) string {
	var b strings.Builder
	b.WriteString(s)
	_, rest, isURI := strings.Cut(s, "://")
	isURI = isURI && (strings.HasPrefix(s, "postgres://") || strings.HasPrefix(s, "postgresql://"))
	if i := strings.IndexAny(rest, "@/"); i >= 0 && rest[i] == '@' {
		rest = rest[i+1:] // a password may have a question mark
	}
	separator := "?"
	if strings.Contains(rest, "?") {
		separator = "&"
	}
	for _, kv := range settings {
		if isURI {
			b.WriteString(separator + kv[0] + "=" + strings.ReplaceAll(url.QueryEscape(kv[1]), "+", "%20"))
			separator = "&"
			continue
		}
		quoted := strings.NewReplacer(`\`, `\\`, `'`, `\'`).Replace(kv[1])
		b.WriteString(" " + kv[0] + "='" + quoted + "'")
	}
	return b.String()
}
