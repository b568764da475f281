package pgrepl

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/walfleet/walfleet/internal/pgtest"
)

// A passfile that others can read is as good as a password that they know: it is not used, and that is told.
func TestPassfileThatOthersCanReadIsNotUsed(t *testing.T) {
	dir := isolate(t)
	safe := writeFile(t, filepath.Join(dir, "safe"), "*:*:*:*:secret\n")
	open := writeFile(t, filepath.Join(dir, "it's open"), "*:*:*:*:secret\n")
	if err := os.Chmod(open, 0o640); err != nil {
		t.Fatal(err)
	}
	server := pgtest.NewServer(t, pgtest.State{Password: "secret"})
	const group, plain = "it's open\" has group or world access; permissions should be u=rw (0600) or less", "\" is not a plain file"
	quoted := strings.ReplaceAll(open, "'", `\'`)
	for _, c := range []struct {
		conninfo, env     string
		password, warning string
	}{
		{"", safe, "secret", ""},
		{"", open, "", group},
		{"", dir, "", plain},
		{"", dir + "/missing", "", ""},
		{" passfile='" + quoted + "'", safe, "", group},
		{" passfile='" + quoted + "' passfile=" + safe, open, "secret", ""},
		{" passfile = " + safe, open, "secret", ""},
		{" password=mine passfile='" + quoted + "'", safe, "mine", ""},
		{" application_name='passfile=/x'", safe, "secret", ""},
		{"?passfile=" + strings.ReplaceAll(open, " ", "%20"), safe, "", group},
		{"?passfile=" + safe, open, "secret", ""},
	} {
		t.Setenv("PGPASSFILE", c.env)
		s := "host=db user=u sslmode=disable" + c.conninfo
		if strings.HasPrefix(c.conninfo, "?") {
			s = "postgres://u@db/" + c.conninfo + "&sslmode=disable"
		}
		got, err := ParseConninfo(s)
		if err != nil {
			t.Errorf("%s: %v", s, err)
			continue
		}
		if w := got.Warning(); !strings.HasSuffix(w, c.warning) || c.warning == "" && w != "" {
			t.Errorf("%s: warning %q, want %q", s, w, c.warning)
		}
		if p := got.hosts[0].config.Password; p != c.password {
			t.Errorf("%s: password %q, want %q", s, p, c.password)
		}
		if c.password == "" && c.warning != "" {
			_, err := got.Connect(t.Context(), 0, Options{Dial: server.Dial, Timeout: patience})
			if !errors.Is(err, ErrNoPassword) || !strings.Contains(err.Error(), c.warning) {
				t.Errorf("%s: %v, want it to tell of the passfile", s, err)
			}
		}
	}
}
