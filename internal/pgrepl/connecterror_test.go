package pgrepl

import (
	"context"
	"errors"
	"net"
	"slices"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
)

// Each address is told once, although sslmode=prefer tries all of them twice.
func TestAConnectErrorHasEachAddressOnce(t *testing.T) {
	isolate(t)
	c, err := ParseConninfo("host=db user=u sslmode=prefer")
	if err != nil {
		t.Fatal(err)
	}
	dials := 0
	refuse := func(context.Context, string, string) (net.Conn, error) {
		dials++
		return nil, &net.OpError{Op: "dial", Err: syscall.ECONNREFUSED}
	}
	_, err = c.Connect(t.Context(), 0, Options{Dial: refuse, Timeout: patience})
	var failed *ConnectError
	if !errors.As(err, &failed) || dials != 2 {
		t.Fatalf("%v after %d dials", err, dials)
	}
	if len(failed.Attempts) != 1 || failed.Attempts[0].Host != "db" || failed.Attempts[0].Address != "db:5432" || !errors.Is(failed.Attempts[0].Err, syscall.ECONNREFUSED) {
		t.Errorf("%+v", failed.Attempts)
	}

	// What the server said is kept. It refuses TLS first, which counts for nothing.
	server := pgtest.NewServer(t, pgtest.State{StartupError: pgtest.Fatal("28000", "no such role")})
	_, err = c.Connect(t.Context(), 0, Options{Dial: server.Dial, Timeout: patience})
	if !errors.As(err, &failed) || len(failed.Attempts) != 1 || Code(failed.Attempts[0].Err) != CodeInvalidAuth || Code(err) != CodeInvalidAuth {
		t.Errorf("%v", err)
	}
}

// Names come from a resolver that fails in part, or has several addresses for one.
func TestConnectErrorOfSeveralAddresses(t *testing.T) {
	lookup := &net.DNSError{Err: "no such host", Name: "db", IsNotFound: true}
	refused := errors.New("refused")
	e := (&Conninfo{}).connectError("db:5432", []string{"1.1.1.1:5432", "[::1]:5432", "1.1.1.1:5432", "[::1]:5432"}, "",
		errors.Join(lookup, refused, refused, refused, errors.New("the last one\x1b")))
	var got []string
	for _, a := range e.Attempts {
		got = append(got, a.Address+" "+a.Err.Error())
	}
	want := []string{" " + lookup.Error(), "1.1.1.1:5432 refused", `[::1]:5432 the last one\x1b`}
	if !slices.Equal(got, want) {
		t.Errorf("got %q, want %q", got, want)
	}
	if !errors.Is(e, lookup) {
		t.Error("the causes are lost")
	}
}

// Looking up a name takes no longer than connecting may.
func TestLookupHasATimeout(t *testing.T) {
	isolate(t)
	synctest.Test(t, func(t *testing.T) {
		c, err := ParseConninfo("host=db user=u sslmode=disable connect_timeout=3")
		if err != nil {
			t.Fatal(err)
		}
		c.hosts[0].config.LookupFunc = func(ctx context.Context, _ string) ([]string, error) {
			<-ctx.Done()
			return nil, ctx.Err()
		}
		begun := time.Now()
		_, err = c.Connect(t.Context(), 0, Options{Timeout: patience})
		if took := time.Since(begun); took != 3*time.Second || !errors.Is(err, context.DeadlineExceeded) {
			t.Errorf("%v after %s", err, took)
		}
	})
}

func TestCommandsAreToldWithTheServersAnswers(t *testing.T) {
	isolate(t)
	server := pgtest.NewServer(t, pgtest.State{Slots: map[string]*pgtest.Slot{"a": {}}})
	c, err := ParseConninfo("host=db user=u sslmode=disable")
	if err != nil {
		t.Fatal(err)
	}
	conn, err := c.Connect(t.Context(), 0, Options{Dial: server.Dial, Timeout: patience})
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	for _, tt := range []struct {
		doing string
		do    func() error
	}{
		{`CREATE_REPLICATION_SLOT "a" PHYSICAL`, func() error { return conn.CreateSlot(t.Context(), "a", false) }},
		{`DROP_REPLICATION_SLOT "b"`, func() error { return conn.DropSlot(t.Context(), "b") }},
		{`START_REPLICATION SLOT "b" PHYSICAL 0/1000000 TIMELINE 1`, func() error { _, _, err := conn.StartStream(t.Context(), "b", 1, 1<<24); return err }},
		{`START_REPLICATION PHYSICAL 0/1000000 TIMELINE 9`, func() error { _, _, err := conn.StartStream(t.Context(), "", 9, 1<<24); return err }},
	} {
		var se *ServerError
		if err := tt.do(); !errors.As(err, &se) || se.Doing != tt.doing {
			t.Errorf("%v is not an answer to %s", err, tt.doing)
		}
	}
	if err := conn.CreateSlot(t.Context(), "free", false); err != nil {
		t.Fatal(err)
	}
	if err := conn.CreateSlot(t.Context(), "reserved", true); err != nil {
		t.Fatal(err)
	}
	server.Do(func(s *pgtest.State) {
		if s.Slots["free"].RestartLSN != 0 {
			t.Error("WAL was reserved for a slot that it was not asked for")
		}
	})
}
