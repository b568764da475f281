package receiver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"net"
	"os"
	"slices"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgrepl"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

func serverError(code string) error {
	return &pgrepl.ServerError{Doing: "doing", Severity: "FATAL", Code: code, Message: "as it is"}
}

// fileError is what package os makes of a file system's errno, socketError what package net makes of the network's.
func fileError(e syscall.Errno) error {
	return fmt.Errorf("writing: %w", &fs.PathError{Op: "write", Path: "/archive/blue/x", Err: e})
}

func socketError(op string, e syscall.Errno) error {
	return &net.OpError{Op: op, Net: "tcp", Err: os.NewSyscallError(op, e)}
}

// Every row of the table has errors that only it takes, and a state that is told here once more.
func TestEveryRowOfTheTableOfTroubles(t *testing.T) {
	type want struct {
		state State
		hint  string // words of it; "": there is none
		errs  []error
	}
	refuse := func(e error) error { // as pgrepl gives it
		info, err := pgrepl.ParseConninfo("host=db user=archiver sslmode=disable")
		if err != nil {
			t.Fatal(err)
		}
		_, err = info.Connect(t.Context(), 0, pgrepl.Options{Timeout: time.Second,
			Dial: func(context.Context, string, string) (net.Conn, error) { return nil, e }})
		return err
	}
	codes := func(codes ...string) (errs []error) {
		for _, c := range codes {
			errs = append(errs, serverError(c))
		}
		return errs
	}
	dial := func(errnos ...syscall.Errno) (errs []error) {
		for _, e := range errnos {
			errs = append(errs, socketError("connect", e), refuse(socketError("connect", e)))
		}
		return errs
	}
	files := func(errnos ...syscall.Errno) (errs []error) {
		for _, e := range errnos {
			errs = append(errs, fileError(e), &os.LinkError{Op: "rename", Old: "a", New: "b", Err: e}, os.NewSyscallError("fdatasync", e))
		}
		return errs
	}
	passwordFile := func() error {
		info, err := pgrepl.ParseConninfo("host=db user=archiver sslmode=disable")
		if err != nil {
			t.Fatal(err)
		}
		_, err = info.Connect(t.Context(), 0, pgrepl.Options{Timeout: time.Second, PasswordFile: t.TempDir() + "/missing"})
		return err
	}
	verify := func(err error) error { return refuse(&tls.CertificateVerificationError{Err: err}) }
	rows := map[string]want{
		"aborted record": {Backoff, "", []error{&archive.AbortedRecordError{}}},
		"gap recorded":   {Backoff, "", []error{errGapRecorded}},
		"gap":            {Halted, "accept-gap {cluster}", []error{&gapError{err: serverError("58P01")}}},
		"stray host":     {Backoff, "", []error{&strayHostError{"db", &archive.DivergenceError{}}}},
		"divergence":     {Halted, "accept-divergence {cluster}", []error{&archive.DivergenceError{}}},
		"history":        {Halted, "right server", []error{&historyError{}}},
		"identity":       {Halted, "conninfo", []error{&archive.IdentityError{}}},
		"file":           {Halted, "move it", []error{&archive.FileError{}}},
		"slot":           {Halted, "", []error{&slotError{}}},
		"unusable":       {Halted, "", []error{&pgrepl.UnusableError{}}},
		"refused":        {Backoff, "", []error{&refusedError{}}},
		"superseded":     {Backoff, "", []error{fmt.Errorf("%w: db", errSuperseded)}},
		"locked":         {Blocked, "archive_dir", []error{fmt.Errorf("open: %w", archive.ErrLocked)}},
		"panic":          {Backoff, "stack", []error{&panicError{"index out of range"}}},

		"descriptors":   {Backoff, "LimitNOFILE", append(files(syscall.EMFILE, syscall.ENFILE), dial(syscall.EMFILE, syscall.ENFILE)...)},
		"password file": {Halted, "password_file", []error{passwordFile()}},

		"no password": {Halted, "password_file", []error{errors.Join(pgrepl.ErrNoPassword, serverError("28P01"))}},
		"08P01":       {Backoff, "pooler", codes("08P01")},
		"08":          {Backoff, "pooler", codes("08000", "08001", "08003", "08004", "08006")},
		"0A":          {Halted, "physical", codes("0A000")},
		"22":          {Halted, "options", codes("22023", "22000")},
		"28P01":       {Halted, "password", codes("28P01")},
		"28000":       {Halted, "host replication {role} ", codes("28000")},
		"28":          {Halted, "pg_hba.conf", codes("28001")},
		"3D":          {Halted, "pooler", codes("3D000")},
		"42501":       {Halted, "ALTER ROLE {role} REPLICATION", codes("42501")},
		"42704":       {Halted, "slot", codes("42704")},
		"42710":       {Backoff, "", codes("42710")},
		"42":          {Halted, "PostgreSQL", codes("42601", "42602", "42P01", "42703")},
		"53100":       {Backoff, "disk", codes("53100")},
		"53200":       {Backoff, "memory", codes("53200")},
		"53300":       {Backoff, "max_wal_senders", codes("53300")},
		"53400":       {Halted, "max_replication_slots", codes("53400")},
		"53":          {Backoff, "log", codes("53000")},
		"55006":       {Blocked, "slot {slot}", codes("55006")},
		"55000":       {Halted, "wal_level", codes("55000")},
		"55P02":       {Halted, "options", codes("55P02")},
		"55":          {Backoff, "", codes("55P03", "55P04")},
		"57014":       {Backoff, "statement_timeout", codes("57014")},
		"57P01":       {Backoff, "", codes("57P01")},
		"57P02":       {Backoff, "crash", codes("57P02")},
		"57P03":       {Backoff, "", codes("57P03")},
		"57P04":       {Backoff, "", codes("57P04")},
		"57P05":       {Backoff, "idle_session_timeout", codes("57P05")},
		"57":          {Backoff, "", codes("57000")},
		"58030":       {Backoff, "disk", codes("58030")},
		"58P01":       {Backoff, "promotion", codes("58P01")},
		"58":          {Backoff, "log", codes("58000", "58P02")},
		"F0":          {Backoff, "configuration", codes("F0000", "F0001")},
		"XX001":       {Backoff, "damaged", codes("XX001")},
		"XX":          {Backoff, "log", codes("XX000", "XX002")},
		"SQLSTATE":    {Backoff, "", codes("40001", "40P01", "25006", "54000", "P0001", "01000", "")},

		"no TLS":              {Halted, "ssl = on", []error{refuse(pgrepl.ErrNoTLS)}},
		"unknown authority":   {Halted, "sslrootcert", []error{verify(x509.UnknownAuthorityError{}), refuse(x509.UnknownAuthorityError{})}},
		"expired certificate": {Halted, "timedatectl", []error{verify(x509.CertificateInvalidError{Reason: x509.Expired}), refuse(x509.CertificateInvalidError{Reason: x509.Expired})}},
		"host name":           {Halted, "hostaddr", []error{verify(x509.HostnameError{Certificate: &x509.Certificate{}, Host: "db"})}},
		"revoked certificate": {Halted, "new certificate", []error{refuse(&pgrepl.RevokedError{})}},
		"certificate":         {Halted, "openssl", []error{verify(x509.CertificateInvalidError{Reason: x509.NotAuthorizedToSign}), verify(errors.New("another"))}},
		"no TLS answer":       {Backoff, "port", []error{refuse(tls.RecordHeaderError{Msg: "first record does not look like a TLS handshake"})}},
		"TLS alert":           {Halted, "sslcert", []error{refuse(&net.OpError{Op: "remote error", Err: tls.AlertError(42)})}},

		"no such host":       {Backoff, "getent hosts", []error{refuse(&net.DNSError{Err: "no such host", Name: "db", IsNotFound: true})}},
		"name server":        {Backoff, "resolv.conf", []error{refuse(&net.DNSError{Err: "server misbehaving", Name: "db", IsTemporary: true}), refuse(&net.DNSError{Err: "i/o timeout", IsTimeout: true})}},
		"connection refused": {Backoff, "running", dial(syscall.ECONNREFUSED)},
		"no socket":          {Backoff, "unix socket", dial(syscall.ENOENT)},
		"network permission": {Backoff, "firewall", dial(syscall.EACCES, syscall.EPERM)},
		"unreachable":        {Backoff, "ip route", dial(syscall.EHOSTUNREACH, syscall.ENETUNREACH, syscall.EHOSTDOWN, syscall.ENETDOWN)},
		"no local address":   {Backoff, "ip_local_port_range", dial(syscall.EADDRNOTAVAIL)},
		"silent":             {Backoff, "wal_sender_timeout", []error{fmt.Errorf("no message: %w", errSilent)}},
		"timeout":            {Backoff, "drops packets", append(dial(syscall.ETIMEDOUT), context.DeadlineExceeded, os.ErrDeadlineExceeded, refuse(context.Canceled), &net.OpError{Op: "read", Err: os.ErrDeadlineExceeded})},
		"connection lost": {Backoff, "ended the connection", append(dial(syscall.ECONNRESET, syscall.EPIPE, syscall.ECONNABORTED), io.EOF, io.ErrUnexpectedEOF, net.ErrClosed,
			socketError("read", syscall.ECONNRESET), socketError("write", syscall.EPIPE))},
		"shutdown":    {Backoff, "", []error{pgrepl.ErrShutdown}},
		"protocol":    {Backoff, "PostgreSQL", []error{&pgrepl.ProtocolError{}}},
		"corrupt WAL": {Backoff, "log", []error{&wal.CorruptError{}}},

		"disk full":   {Blocked, "make room", files(syscall.ENOSPC, syscall.EDQUOT)},
		"file size":   {Blocked, "LimitFSIZE", files(syscall.EFBIG)},
		"read-only":   {Blocked, "remount", files(syscall.EROFS)},
		"permission":  {Blocked, "accessible", files(syscall.EACCES, syscall.EPERM)},
		"disk error":  {Backoff, "dmesg", files(syscall.EIO, syscall.ENXIO, syscall.ENODEV)},
		"stale mount": {Blocked, "mount", files(syscall.ESTALE, syscall.ENOTCONN)},
		"no locks":    {Blocked, "lockd", files(syscall.ENOLCK)},
		"path":        {Halted, "archive_dir", files(syscall.ENAMETOOLONG, syscall.ENOTDIR, syscall.EISDIR, syscall.ELOOP)},
		"name taken":  {Backoff, "somebody else", files(syscall.EEXIST)},
		"missing":     {Backoff, "mounted", files(syscall.ENOENT)},
		"memory":      {Backoff, "MemoryMax", files(syscall.ENOMEM)},

		"other": {Backoff, "", []error{errors.New("whatever"), fileError(syscall.EINVAL)}},
	}
	for _, r := range rules {
		w, ok := rows[r.kind]
		if !ok {
			t.Errorf("no test for row %q", r.kind)
			continue
		}
		delete(rows, r.kind)
		if len(w.errs) == 0 {
			t.Errorf("no error for row %q", r.kind)
		}
		if w.hint == "" && r.hint != "" || !strings.Contains(r.hint, w.hint) {
			t.Errorf("row %q: hint %q, want %q", r.kind, r.hint, w.hint)
		}
		for _, e := range w.errs {
			err := fmt.Errorf("session: %w", e)
			if got := ruleFor(err); got.kind != r.kind {
				t.Errorf("%v is taken by row %q, want %q", err, got.kind, r.kind)
			}
			got := classify(err)
			pause := map[State]time.Duration{Blocked: blockedRetry, Halted: haltedRetry}[w.state]
			switch r.kind {
			case "aborted record", "gap recorded":
				pause = atOnce
			case "stray host":
				pause = time.Second
			}
			if !slices.Contains(FailureClasses, got.class) {
				t.Errorf("%v is of class %q, which there is not", err, got.class)
			}
			if got.state != w.state || got.pause != pause || got.hint != r.hint {
				t.Errorf("%v: %+v, want %s and a pause of %s", err, got, w.state, pause)
			}
			if c := pgrepl.Code(err); r.perCode && got.kind != c || !r.perCode && got.kind != r.kind {
				t.Errorf("%v is of kind %q", err, got.kind)
			}
		}
	}
	for kind := range rows {
		t.Errorf("there is no row %q", kind)
	}
}

// One of several hosts that may come back by itself is waited for, whatever is wrong with the others.
func TestMildestOfTheHostsCounts(t *testing.T) {
	for _, tt := range []struct {
		errs []error
		want State
	}{
		{[]error{serverError("28P01"), serverError("28P01")}, Halted},
		{[]error{&archive.IdentityError{}, &refusedError{}}, Backoff},
		{[]error{&archive.IdentityError{}, serverError("55006")}, Blocked},
		{[]error{serverError("55006"), io.EOF}, Backoff},
	} {
		if got := classify(fmt.Errorf("all: %w", HostsError(tt.errs))); got.state != tt.want {
			t.Errorf("%v: %+v, want %s", tt.errs, got, tt.want)
		}
	}
}

// What the network gives in truth is what the table has rows for.
func TestRealErrorsOfTheNetwork(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	refused := closed.Addr().(*net.TCPAddr).Port
	closed.Close()
	open, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	port := open.Addr().(*net.TCPAddr).Port
	var answer atomic.Pointer[[]byte]
	served := make(chan struct{})
	go func() {
		defer close(served)
		for {
			c, err := open.Accept()
			if err != nil {
				return
			}
			_, _ = c.Read(make([]byte, 100))
			_, _ = c.Write(*answer.Load())
			c.Close()
		}
	}()
	defer func() { open.Close(); <-served }()
	for _, tt := range []struct {
		conninfo string
		answer   []byte
		kind     string
	}{
		{fmt.Sprintf("host=127.0.0.1 port=%d", refused), nil, "connection refused"},
		{fmt.Sprintf("host=127.0.0.1 port=%d sslmode=disable", port), nil, "connection lost"},
		{fmt.Sprintf("host=127.0.0.1 port=%d sslmode=require", port), []byte("N"), "no TLS"},
		{fmt.Sprintf("host=127.0.0.1 port=%d sslmode=require", port), []byte("Sno TLS at all, by no means"), "no TLS answer"},
		{"host=" + t.TempDir(), nil, "no socket"},
	} {
		answer.Store(&tt.answer)
		info, err := pgrepl.ParseConninfo("user=archiver " + tt.conninfo)
		if err != nil {
			t.Fatal(err)
		}
		_, err = info.Connect(t.Context(), 0, pgrepl.Options{Timeout: time.Second})
		if got := classify(HostsError{err}); got.kind != tt.kind {
			t.Errorf("%s: %v is of kind %q, want %q", tt.conninfo, err, got.kind, tt.kind)
		}
	}
}

// Hints can be typed as they are.
func TestHintsNameWhatIsMeant(t *testing.T) {
	bubble(t, func(g *rig) {
		g.srv.Do(func(s *pgtest.State) { s.StartupError = pgtest.Fatal("42501", "must be a replication role") })
		g.start()
		g.want(Halted)
		if hint := g.r.Status().Hint; hint != `grant the right with: ALTER ROLE "archiver" REPLICATION` {
			t.Errorf("hint %q", hint)
		}
		for _, r := range rules {
			if hint := g.r.fillIn(r.hint); strings.ContainsAny(hint, "{}") {
				t.Errorf("%s: %s", r.kind, hint)
			}
		}
		g.srv.Do(func(s *pgtest.State) { s.StartupError = nil })
		g.sleep(haltedRetry)
		g.wantArchived()
		if s := g.r.Status(); s.Hint != "" || s.Reason != "" {
			t.Errorf("%+v", s)
		}
	})
}
