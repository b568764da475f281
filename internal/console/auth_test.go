package console

import (
	"context"
	"errors"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/walfleet/walfleet/fleet"
)

// Hashes of "secret" and "other", of the least cost.
const (
	hashOfSecret = "$2y$04$Chbn6Wqt1fQsjVMJB2U7QutfY1pouWCjY.ug8XJTkDKtO65eqg06."
	hashOfOther  = "$2a$04$IADjPmYu4bCRh2tof1mzhea3V.A2jQ7bfk/08CJHnS77pYDnAKE.C"
)

func TestAuthentication(t *testing.T) {
	t.Parallel()
	f := someFleet()
	f.ready = errors.New("the last reload failed: cluster \"orders\"")
	s := serve(t, f, fleet.HTTPConfig{User: "ann", PasswordHash: hashOfSecret}, usual)
	status := func(path, user, password string) int {
		t.Helper()
		response, body := s.get(t, path, func(r *http.Request) {
			if user != "" {
				r.SetBasicAuth(user, password)
			}
		})
		checkHeaders(t, path, response.Header)
		if ask := response.Header.Get("WWW-Authenticate"); (ask != "") != (response.StatusCode == 401) {
			t.Errorf("%s: %s, WWW-Authenticate: %q", path, response.Status, ask)
		}
		if response.StatusCode != 200 && (strings.Contains(body, "orders") || strings.Contains(body, hashOfSecret)) {
			t.Errorf("%s without a password says %q", path, body)
		}
		return response.StatusCode
	}
	for _, path := range []string{"/metrics", "/api/v1/status", "/api/v1/status/orders", "/api/v1/contents/orders", "/", "/assets/x", "/nothing", "/healthz/", "/readyz/../metrics"} {
		if got := status(path, "", ""); got != 401 && got != 404 {
			t.Errorf("%s: %d without a user", path, got)
		}
	}
	for _, c := range []struct {
		user, password string
		status         int
	}{
		{"ann", "wrong", 401}, {"ann", "", 401}, {"bob", "secret", 401}, {"Ann", "secret", 401}, {"ann", hashOfSecret, 401}, {"annsecret", "", 401},
		{"ann", "secret", 200}, {"ann", "secret", 200}, {"ann", "wrong", 401}, {"anns", "ecret", 401}, {"ann", "secret", 200},
	} {
		if got := status("/api/v1/status", c.user, c.password); got != c.status {
			t.Errorf("%s %s: %d, want %d", c.user, c.password, got, c.status)
		}
	}
	for _, header := range []string{"Basic", "Basic !", "Bearer secret", "Basic YW5u", "Digest username=ann"} {
		if response, _ := s.get(t, "/metrics", func(r *http.Request) { r.Header.Set("Authorization", header) }); response.StatusCode != 401 {
			t.Errorf("%s: %s", header, response.Status)
		}
	}
	if response, body := s.get(t, "/healthz", nil); response.StatusCode != 200 || body != "ok\n" {
		t.Errorf("healthz: %s, %q", response.Status, body)
	}
	if got := status("/readyz", "", ""); got != 503 {
		t.Errorf("readyz: %d", got)
	}

	// A reload with other credentials counts at once, with the same ones nothing is forgotten.
	follow := func(c fleet.HTTPConfig) {
		t.Helper()
		c.Listen = "127.0.0.1:0"
		if err := s.Follow(c); err != nil {
			t.Fatal(err)
		}
	}
	known := s.settings.Load().door.known.Load()
	follow(fleet.HTTPConfig{User: "ann", PasswordHash: hashOfSecret})
	if known == nil || s.settings.Load().door.known.Load() != known {
		t.Error("who was let in is forgotten")
	}
	follow(fleet.HTTPConfig{User: "ann", PasswordHash: hashOfOther})
	if a, b := status("/metrics", "ann", "secret"), status("/metrics", "ann", "other"); a != 401 || b != 200 {
		t.Errorf("with another hash: %d, %d", a, b)
	}
	follow(fleet.HTTPConfig{User: "bob", PasswordHash: hashOfOther})
	if a, b := status("/metrics", "ann", "other"), status("/metrics", "bob", "other"); a != 401 || b != 200 {
		t.Errorf("with another user: %d, %d", a, b)
	}
	follow(fleet.HTTPConfig{})
	if got := status("/metrics", "", ""); got != 200 {
		t.Errorf("without a user: %d", got)
	}
	for _, secret := range []string{"secret", "other", hashOfSecret, hashOfOther, "$2"} {
		if strings.Contains(s.log.String(), secret) {
			t.Errorf("%q is in the log", secret)
		}
	}
}

// Comparing passwords is expensive: of those who guess, few wait, for a while, and most of
// the time nobody's is compared. Who is known does not wait.
func TestGuessing(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		const cost = time.Second
		var comparing, compared atomic.Int32
		d := newDoor("ann", hashOfSecret)
		d.compare = func(_, password []byte) error {
			if comparing.Add(1) != 1 {
				t.Error("two at a time")
			}
			time.Sleep(cost)
			comparing.Add(-1)
			compared.Add(1)
			if string(password) != "secret" {
				return errors.New("no")
			}
			return nil
		}
		ask := func(ctx context.Context, password string) int {
			r, _ := http.NewRequestWithContext(ctx, http.MethodGet, "/", nil)
			r.SetBasicAuth("ann", password)
			if no := d.refuse(r); no != nil {
				return no.status
			}
			return 200
		}
		if got := ask(t.Context(), "secret"); got != 200 {
			t.Fatalf("the right one: %d", got)
		}
		answers := make(chan int, 2*doorQueue)
		began := time.Now()
		for range 2 * doorQueue {
			go func() { answers <- ask(t.Context(), "wrong") }()
		}
		synctest.Wait()
		if len(answers) != doorQueue {
			t.Errorf("%d were sent away at once, want %d", len(answers), doorQueue)
		}
		if got := ask(t.Context(), "secret"); got != 200 || time.Since(began) != 0 {
			t.Errorf("who is known: %d after %s", got, time.Since(began))
		}
		count := map[int]int{}
		for range 2 * doorQueue {
			count[<-answers]++
		}
		// Each takes a second and the rest of three: the third begins at 8 s, and nobody waits longer than 10.
		if took := time.Since(began); count[401] != 3 || count[429] != 2*doorQueue-3 || compared.Load() != 4 || took != doorWait {
			t.Errorf("answers %v after %s, %d were compared", count, took, compared.Load())
		}
		ctx, cancel := context.WithTimeout(t.Context(), time.Millisecond)
		defer cancel()
		if got := ask(ctx, "wrong"); got != 429 { // during the rest
			t.Errorf("whose deadline is short: %d", got)
		}
		time.Sleep(time.Hour) // until every timer has ended
	})
}

// Another name takes as long as a wrong password.
func TestUnknownUsersAreComparedToo(t *testing.T) {
	d := newDoor("ann", hashOfSecret)
	compared := 0
	d.compare = func(_, _ []byte) error { compared++; return nil }
	for _, user := range []string{"bob", "", "ann"} {
		r, _ := http.NewRequestWithContext(t.Context(), http.MethodGet, "/", nil)
		r.SetBasicAuth(user, "x")
		if no := d.refuse(r); (no == nil) != (user == "ann") {
			t.Errorf("%q: %v", user, no)
		}
	}
	if compared != 3 {
		t.Errorf("%d of 3 were compared", compared)
	}
}
