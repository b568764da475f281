package integration

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/testcontainers/testcontainers-go"

	"github.com/walfleet/walfleet/receiver"
)

// authority is a certificate authority that lives as long as its test.
type authority struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
	pem  []byte // of the certificate
}

func newAuthority(t testing.TB, name string) *authority {
	t.Helper()
	template := &x509.Certificate{Subject: pkix.Name{CommonName: name}, IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	a := &authority{}
	a.pem, _, a.key = a.sign(t, template)
	block, _ := pem.Decode(a.pem)
	var err error
	if a.cert, err = x509.ParseCertificate(block.Bytes); err != nil {
		t.Fatal(err)
	}
	return a
}

// issue makes a certificate for a server at an address, or for a role. Both results are PEM.
func (a *authority) issue(t testing.TB, commonName string, addresses ...string) (cert, key []byte) {
	t.Helper()
	template := &x509.Certificate{Subject: pkix.Name{CommonName: commonName},
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}}
	for _, address := range addresses {
		template.IPAddresses = append(template.IPAddresses, net.ParseIP(address))
	}
	cert, key, _ = a.sign(t, template)
	return cert, key
}

// sign makes a key and a certificate for it; the authority's own is signed by itself.
func (a *authority) sign(t testing.TB, template *x509.Certificate) (certPEM, keyPEM []byte, key *ecdsa.PrivateKey) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template.SerialNumber = big.NewInt(time.Now().UnixNano())
	template.NotBefore, template.NotAfter = time.Now().Add(-time.Hour), time.Now().Add(time.Hour)
	parent, signer := a.cert, a.key
	if parent == nil {
		parent, signer = template, key
	}
	der, err := x509.CreateCertificate(rand.Reader, template, parent, &key.PublicKey, signer)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER}), key
}

// TestTLS has servers that admit walfleet by its certificate alone, and a walfleet that trusts one authority.
func TestTLS(t *testing.T) {
	t.Parallel()
	ca, otherCA := newAuthority(t, "test authority"), newAuthority(t, "other authority")
	serverCert, serverKey := ca.issue(t, "server", host)
	inContainer := func(name string, content []byte) testcontainers.ContainerFile {
		return testcontainers.ContainerFile{Reader: bytes.NewReader(content), ContainerFilePath: "/tmp/" + name, FileMode: 0o644}
	}
	s := startServer(t, serverOptions{segment: megabyte,
		settings: []string{"ssl = on", "ssl_ca_file = 'root.crt'"},
		hba:      []string{"hostssl replication walfleet all cert", "host replication walfleet all reject"},
		files:    []testcontainers.ContainerFile{inContainer("server.crt", serverCert), inContainer("server.key", serverKey), inContainer("root.crt", ca.pem)},
		shell:    `install -m 600 /tmp/server.crt /tmp/server.key /tmp/root.crt "$PGDATA"`,
	})

	dir := t.TempDir()
	file := func(name string, content []byte) string {
		path := filepath.Join(dir, name)
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		return path
	}
	certificate := func(a *authority, role string) string {
		cert, key := a.issue(t, role)
		name := role + " of " + a.cert.Subject.CommonName
		return fmt.Sprintf(" sslcert='%s' sslkey='%s'", file(name+".crt", cert), file(name+".key", key))
	}
	base := fmt.Sprintf("port=%d user=walfleet connect_timeout=5 ", s.port)
	trusted := base + fmt.Sprintf("host=%s sslrootcert='%s'", host, file("root.crt", ca.pem))
	full := trusted + " sslmode=verify-full"
	tests := []struct {
		name, conninfo string
		state          receiver.State
		reason         string
	}{
		{"good", full + certificate(ca, "walfleet"), receiver.Streaming, ""},
		{"other_authority", full + certificate(ca, "walfleet") + fmt.Sprintf(" sslrootcert='%s'", file("other.crt", otherCA.pem)), receiver.Halted, "certificate signed by unknown authority"},
		{"other_host", full + certificate(ca, "walfleet") + " host=localhost", receiver.Halted, "certificate is not valid for any names"},
		{"no_certificate", full, receiver.Halted, "certificate"},
		{"other_role", full + certificate(ca, "someone"), receiver.Halted, "certificate authentication failed"},
		{"no_tls", trusted + " sslmode=disable", receiver.Halted, "no encryption"},
	}
	var clusters []string
	for _, tt := range tests {
		clusters = append(clusters, cluster(tt.name, tt.conninfo, fmt.Sprintf("slot = %q", tt.name)))
	}
	d := startDaemon(t, configText(t.TempDir(), clusters...))
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) { d.awaitState(t, tt.name, tt.state, tt.reason) })
	}

	got := s.value(t, "SELECT ssl || ' ' || client_dn FROM pg_stat_ssl WHERE pid = "+s.sender(t, "good").pid)
	if got != "true /CN=walfleet" {
		t.Errorf("pg_stat_ssl (ssl, client_dn): %s", got)
	}
	if slots := fmt.Sprint(s.query(t, "SELECT slot_name FROM pg_replication_slots")); slots != "[[good]]" {
		t.Errorf("slots %s, want that of the good cluster alone", slots)
	}
	load := startLoad(t, s)
	d.await(t, "good", "sealed segments", func(st receiver.Status) bool { return st.SegmentsSealed >= 2 })
	load.stop()
	st := d.archived(t, "good", s)
	compareArchive(t, d.clusterDir("good"), st, origins{1: s})
}
