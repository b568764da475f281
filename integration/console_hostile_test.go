package integration

import (
	"fmt"
	"net"
	"strings"
	"testing"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/walfleet/walfleet/internal/pgtest"
)

// hostileText is what a server says that would like to be more than text: to a browser, and to a terminal.
const hostileText = `</script><script>document.title="hostile"</script><img src=x onerror='document.title="hostile"'>` + "\x1b[31m\x1b]0;hostile\a\u202e&lt;b&gt;\r\nline two"

// startHostileServer is one whose every text is hostile, if it streams at all. It returns a conninfo.
func startHostileServer(t *testing.T, s pgtest.State) string {
	t.Helper()
	server := pgtest.NewServer(t, s)
	server.Publish(pgtest.NewWAL(pgtest.WALConfig{}))
	server.OnQuery = func(q pgtest.Query) []pgproto3.BackendMessage {
		if q.Startup["replication"] == "" { // monitoring
			return []pgproto3.BackendMessage{pgtest.Error("42501", "%s", hostileText)}
		}
		return nil
	}
	l, err := net.Listen("tcp", host+":0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go func() {
		for {
			conn, err := l.Accept()
			if err != nil {
				return
			}
			server.Accept(conn)
		}
	}()
	return fmt.Sprintf("host=%s port=%d user='%s' sslmode=disable", host, l.Addr().(*net.TCPAddr).Port, `<i onmouseover="alert(1)">walfleet</i>`)
}

// TestConsoleShowsHostileText has servers that say what would run in a browser. It is text there, and nothing else.
func TestConsoleShowsHostileText(t *testing.T) {
	t.Parallel()
	b := startBrowser(t)
	port := freePort(t)
	url := fmt.Sprintf("http://%s:%d", host, port)
	const setting = `application_name = "<script>alert(1)</script>"`
	p := startProgram(t, listening(port, configText(t.TempDir(),
		cluster("refuses", startHostileServer(t, pgtest.State{StartupError: pgtest.Fatal("57P03", "%s", hostileText)}), setting),
		cluster("streams", startHostileServer(t, pgtest.State{Version: "17.2 (" + hostileText + ")"}), setting, `monitor_interval = "1s"`))))
	p.stderr.await(t, "caught up, streaming", "cluster=streams")
	p.stderr.await(t, "not archiving", "cluster=refuses")

	for _, path := range []string{"/", "/clusters/refuses", "/clusters/streams", "/clusters/%3Cscript%3Ealert(1)%3C%2Fscript%3E"} {
		tab := b.open(t, url+path, reader{})
		tab.ready()
		if path != "/clusters/streams" && !strings.Contains(path, "%") {
			tab.await("the text itself", `document.body.textContent.includes("<script>document.title=")`)
		}
		if got := evaluate[string](tab, `document.title`); got == "hostile" {
			t.Errorf("%s: what a server said has run", path)
		}
		for what, selector := range map[string]string{"a script of its own": "script:not([src])", "an image": "img", "italics": "i[onmouseover]"} {
			if n := evaluate[int](tab, `document.querySelectorAll("`+selector+`").length`); n != 0 {
				t.Errorf("%s: what a server said has become %s", path, what)
			}
		}
		if !evaluate[bool](tab, `!/[\u0000-\u0008\u000b-\u001f\u007f\u202a-\u202e\u2066-\u2069]/.test(document.body.textContent)`) {
			t.Errorf("%s: control characters of a server are on the page", path)
		}
	}
	for _, path := range []string{"/", "/clusters/refuses", "/clusters/streams", "/api/v1/status", "/api/v1/status/refuses", "/metrics"} {
		if body := string(get(t, url+path)); strings.Contains(body, "\x1b") || strings.HasPrefix(path, "/api") && strings.Contains(body, "<script>") {
			t.Errorf("%s has control characters, or HTML in JSON", path)
		}
	}
}
