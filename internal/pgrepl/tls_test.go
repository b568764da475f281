package pgrepl

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"
)

// greeter is a server that greets a client, over TLS when it has a configuration for that.
type greeter struct {
	tls         *tls.Config
	askPassword bool
	startup     chan map[string]string // startup parameters of who got in
	password    chan string
	version     chan uint16 // of TLS
}

func newGreeter(config *tls.Config) *greeter {
	return &greeter{tls: config, startup: make(chan map[string]string, 1), password: make(chan string, 1), version: make(chan uint16, 1)}
}

func (g *greeter) dial(context.Context, string, string) (net.Conn, error) {
	client, server := net.Pipe()
	go func() {
		defer server.Close()
		_ = g.greet(server)
	}()
	return client, nil
}

func (g *greeter) greet(c net.Conn) error {
	be := pgproto3.NewBackend(c, c)
	msg, err := be.ReceiveStartupMessage()
	if err != nil {
		return err
	}
	if _, ok := msg.(*pgproto3.SSLRequest); ok {
		if g.tls == nil {
			_, err = c.Write([]byte("N"))
		} else {
			if _, err = c.Write([]byte("S")); err != nil {
				return err
			}
			s := tls.Server(c, g.tls)
			if err = s.Handshake(); err != nil {
				return err
			}
			g.version <- s.ConnectionState().Version
			c, be = s, pgproto3.NewBackend(s, s)
		}
		if err != nil {
			return err
		}
		if msg, err = be.ReceiveStartupMessage(); err != nil {
			return err
		}
	}
	if g.askPassword {
		be.Send(&pgproto3.AuthenticationCleartextPassword{})
		if err := be.Flush(); err != nil {
			return err
		}
		p, err := be.Receive()
		if err != nil {
			return err
		}
		g.password <- p.(*pgproto3.PasswordMessage).Password
	}
	g.startup <- msg.(*pgproto3.StartupMessage).Parameters
	be.Send(&pgproto3.AuthenticationOk{})
	be.Send(&pgproto3.ReadyForQuery{TxStatus: 'I'})
	if err := be.Flush(); err != nil {
		return err
	}
	_, err = be.Receive() // Terminate
	return err
}

// authority is a certificate authority that lives in a directory.
type authority struct {
	t    *testing.T
	dir  string
	key  *ecdsa.PrivateKey
	cert *x509.Certificate
}

func newAuthority(t *testing.T, dir string) *authority {
	a := &authority{t: t, dir: dir}
	pair := a.issue(1, &x509.Certificate{
		Subject: pkix.Name{CommonName: "authority"}, IsCA: true, BasicConstraintsValid: true,
		KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, "ca")
	a.cert, a.key = pair.Leaf, pair.PrivateKey.(*ecdsa.PrivateKey)
	return a
}

// issue makes a certificate, and files NAME.crt and NAME.key.
func (a *authority) issue(serial int64, template *x509.Certificate, name string) tls.Certificate {
	a.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		a.t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(serial)
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		a.t.Fatal(err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		a.t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		a.t.Fatal(err)
	}
	a.file(name+".crt", "CERTIFICATE", der)
	a.file(name+".key", "PRIVATE KEY", keyDER)
	return tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key, Leaf: leaf}
}

// revoke writes a revocation list.
func (a *authority) revoke(name string, serials ...int64) {
	a.t.Helper()
	list := &x509.RevocationList{Number: big.NewInt(1), ThisUpdate: time.Now(), NextUpdate: time.Now().Add(time.Hour)}
	for _, s := range serials {
		list.RevokedCertificateEntries = append(list.RevokedCertificateEntries, x509.RevocationListEntry{SerialNumber: big.NewInt(s), RevocationTime: time.Now()})
	}
	der, err := x509.CreateRevocationList(rand.Reader, list, a.cert, a.key)
	if err != nil {
		a.t.Fatal(err)
	}
	a.file(name, "X509 CRL", der)
}

func (a *authority) file(name, kind string, der []byte) {
	a.t.Helper()
	data := pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der})
	if err := os.WriteFile(filepath.Join(a.dir, name), data, 0o600); err != nil {
		a.t.Fatal(err)
	}
}

func TestTLS(t *testing.T) {
	dir := isolate(t)
	ca, stranger := newAuthority(t, dir), t.TempDir()
	newAuthority(t, stranger)
	server := ca.issue(2, &x509.Certificate{Subject: pkix.Name{CommonName: "db"}, DNSNames: []string{"db"}}, "server")
	ca.issue(3, &x509.Certificate{Subject: pkix.Name{CommonName: "archiver"}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth}}, "client")
	ca.revoke("server.crl", 7, 2)
	ca.revoke("other.crl", 7, 3)
	roots := x509.NewCertPool()
	roots.AddCert(ca.cert)

	verifyFull := "sslmode=verify-full sslrootcert=" + dir + "/ca.crt"
	plain := &tls.Config{Certificates: []tls.Certificate{server}}
	for name, tt := range map[string]struct {
		conninfo string
		server   *tls.Config
		version  uint16 // agreed on; 0: refused
		want     string // in the error
	}{
		"verify-full":                 {"host=db " + verifyFull, plain, tls.VersionTLS13, ""},
		"wrong name":                  {"host=other " + verifyFull, plain, 0, "other"},
		"unknown authority":           {"host=db sslmode=verify-full sslrootcert=" + stranger + "/ca.crt", plain, 0, "authority"},
		"verify-ca, wrong name":       {"host=other sslmode=verify-ca sslrootcert=" + dir + "/ca.crt", plain, tls.VersionTLS13, ""},
		"no TLS on the server":        {"host=db " + verifyFull, nil, 0, "refused TLS"},
		"require":                     {"host=db sslmode=require", plain, tls.VersionTLS13, ""},
		"revoked":                     {"host=db " + verifyFull + " sslcrl=" + dir + "/server.crl", plain, 0, "serial number 2, which sslcrl"},
		"revoked, require":            {"host=db sslmode=require sslcrl=" + dir + "/server.crl", plain, 0, "serial number 2"},
		"another one revoked":         {"host=db " + verifyFull + " sslcrl=" + dir + "/other.crl", plain, tls.VersionTLS13, ""},
		"server too old":              {"host=db ssl_min_protocol_version=TLSv1.3 " + verifyFull, &tls.Config{Certificates: plain.Certificates, MaxVersion: tls.VersionTLS12}, 0, "protocol version"},
		"server older than default":   {"host=db " + verifyFull, &tls.Config{Certificates: plain.Certificates, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11}, 0, "protocol version"},
		"at most 1.2":                 {"host=db ssl_max_protocol_version=TLSv1.2 " + verifyFull, plain, tls.VersionTLS12, ""},
		"client certificate":          {"host=db sslcert=" + dir + "/client.crt sslkey=" + dir + "/client.key " + verifyFull, &tls.Config{Certificates: plain.Certificates, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots}, tls.VersionTLS13, ""},
		"client certificate, missing": {"host=db " + verifyFull, &tls.Config{Certificates: plain.Certificates, ClientAuth: tls.RequireAndVerifyClientCert, ClientCAs: roots, MaxVersion: tls.VersionTLS12}, 0, "handshake failure"},
	} {
		t.Run(name, func(t *testing.T) {
			c, err := ParseConninfo("user=archiver " + tt.conninfo)
			if err != nil {
				t.Fatal(err)
			}
			g := newGreeter(tt.server)
			conn, err := c.Connect(t.Context(), 0, Options{Dial: g.dial, Timeout: patience})
			if err == nil {
				conn.Close()
			}
			if tt.version == 0 {
				if err == nil || !strings.Contains(err.Error(), tt.want) {
					t.Errorf("error %v, want %q", err, tt.want)
				}
				if revoked := errors.As(err, new(*RevokedError)); revoked != strings.HasPrefix(name, "revoked") {
					t.Errorf("%v is a RevokedError: %t", err, revoked)
				}
				if refused := errors.Is(err, ErrNoTLS); refused != (tt.server == nil) {
					t.Errorf("%v is ErrNoTLS: %t", err, refused)
				}
				if len(g.startup) > 0 {
					t.Error("the server was told who we are")
				}
				return
			}
			if err != nil {
				t.Fatal(err)
			}
			if v := <-g.version; v != tt.version {
				t.Errorf("%s, want %s", tls.VersionName(v), tls.VersionName(tt.version))
			}
		})
	}
}
