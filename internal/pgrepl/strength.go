package pgrepl

import (
	"bytes"
	"cmp"
	"crypto/tls"
	"io"
	"strings"

	"github.com/jackc/pgx/v5/pgconn"
	"github.com/jackc/pgx/v5/pgproto3"
)

// What AuthMethod returns: the names of require_auth, in libpq.
const (
	AuthNone     = "none" // nothing was asked for: trust, peer, or a certificate
	AuthPassword = "password"
	AuthMD5      = "md5"
	AuthGSS      = "gss"
	AuthSCRAM    = "scram-sha-256"
)

// authMethod learns from a connection's first messages what the server wanted as a
// proof of who we are. It sees them as pgproto3 traces them, and keeps nothing else.
type authMethod struct{ name string }

func (m *authMethod) frontend(r io.Reader, w io.Writer) *pgproto3.Frontend {
	m.name = AuthNone
	f := pgproto3.NewFrontend(r, w)
	f.Trace(m, pgproto3.TracerOptions{SuppressTimestamps: true})
	return f
}

// Write gets a line for each message: its sender, a tab, its name, a tab, the rest.
func (m *authMethod) Write(line []byte) (int, error) {
	fields := bytes.SplitN(line, []byte{'\t'}, 3)
	if len(fields) < 2 {
		return len(line), nil
	}
	switch string(fields[1]) {
	case "AuthenticationCleartextPassword":
		m.name = AuthPassword
	case "AuthenticationMD5Password":
		m.name = AuthMD5
	case "AuthenticationGSS":
		m.name = AuthGSS
	case "AuthenticationSASL":
		m.name = AuthSCRAM
	}
	return len(line), nil
}

// AuthMethod is how the server authenticated us, one of the constants; empty where
// Options.NoteAuth did not ask for it.
func (c *Conn) AuthMethod() string { return c.method }

// PID is the server's process for this connection.
func (c *Conn) PID() uint32 { return c.pg.PID() }

// TLS is the version and the cipher suite that encrypt the connection; empty: it is
// not encrypted.
func (c *Conn) TLS() string {
	t, ok := c.pg.Conn().(*tls.Conn)
	if !ok {
		return ""
	}
	state := t.ConnectionState()
	return tls.VersionName(state.Version) + ", " + tls.CipherSuiteName(state.CipherSuite)
}

// SSLMode is the sslmode that counts for the host at index i of Hosts. It is
// verify-ca for a require with a root certificate, as in libpq.
func (c *Conninfo) SSLMode(i int) string {
	config := c.hosts[i].config
	others := func(plain bool) bool {
		for _, f := range config.Fallbacks {
			if (f.TLSConfig == nil) == plain {
				return true
			}
		}
		return false
	}
	t := config.TLSConfig
	switch {
	case t == nil && others(false):
		return "allow"
	case t == nil:
		return "disable"
	case others(true):
		return "prefer"
	case !t.InsecureSkipVerify:
		return "verify-full"
	case t.VerifyPeerCertificate != nil:
		return "verify-ca"
	}
	return "require"
}

// RequiresAuth tells whether the conninfo says which methods of authentication it
// accepts (require_auth).
func (c *Conninfo) RequiresAuth(i int) bool { return c.hosts[i].config.RequireAuth != "" }

// IsSocket tells whether the host at index i is a unix socket.
func (c *Conninfo) IsSocket(i int) bool { return strings.HasPrefix(c.hosts[i].name, "/") }

// Database is the one that ConnectSQL connects to on the host at index i.
func (c *Conninfo) Database(i int) string { return cmp.Or(c.hosts[i].config.Database, "postgres") }

// ApplicationName is what the host at index i sees as our application_name; given is
// that of Options.
func (c *Conninfo) ApplicationName(i int, given string) string {
	return applicationName(c.hosts[i].config, given)
}

// applicationName is the one that counts of those that are given.
func applicationName(config *pgconn.Config, given string) string {
	for _, name := range []string{given, config.RuntimeParams["application_name"]} {
		if name != "" {
			return name
		}
	}
	return "walfleet"
}

// HasCertificate tells whether the conninfo has a certificate to show to the host at
// index i (sslcert).
func (c *Conninfo) HasCertificate(i int) bool {
	for _, t := range tlsConfigs(c.hosts[i].config) {
		if len(t.Certificates) > 0 {
			return true
		}
	}
	return false
}
