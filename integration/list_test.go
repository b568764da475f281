package integration

import (
	"encoding/json"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/fleet"
)

// TestListsTheServersCommitTimes compares the first and the last commit that "walfleet list" finds with the times that
// the server itself has for them, of each version: in complete segments, compressed ones, and what is in progress.
func TestListsTheServersCommitTimes(t *testing.T) {
	for _, image := range images() {
		t.Run(image, func(t *testing.T) {
			t.Parallel()
			s := startServer(t, serverOptions{image: image, segment: megabyte, settings: []string{"track_commit_timestamp = on", "autovacuum = off"}})
			d := startDaemon(t, configText(t.TempDir(), cluster("orders", s.conninfo(), `compress = "lz4"`)))
			d.awaitState(t, "orders", "streaming")
			commit := func(sql string) time.Time {
				t.Helper()
				xid := s.value(t, sql)
				text := s.value(t, "SELECT to_char(pg_xact_commit_timestamp('"+xid+"'::xid) AT TIME ZONE 'UTC', 'YYYY-MM-DD\"T\"HH24:MI:SS.US\"Z\"')")
				when, err := time.Parse(time.RFC3339Nano, text)
				if err != nil {
					t.Fatal(err)
				}
				return when
			}
			s.query(t, "CREATE TABLE c (i int, t text)")
			s.query(t, "CHECKPOINT")
			s.switchWAL(t)
			from := s.size.Start(s.end(t)) // a range of its own, as if what is before had been pruned
			first := commit("INSERT INTO c VALUES (1) RETURNING xmin")
			s.write(t, 3)
			last := commit("INSERT INTO c VALUES (2) RETURNING xmin")
			s.switchWAL(t)
			to := s.size.Start(s.end(t))
			progress := commit("INSERT INTO c VALUES (3) RETURNING xmin")
			d.awaitFlushed(t, "orders", s.end(t))
			d.stop(t)
			cmd := command(t, "list", "--archive", d.clusterDir("orders"), "--json")
			data, err := cmd.Output()
			var out fleet.Contents
			if err == nil {
				err = json.Unmarshal(data, &out)
			}
			if err != nil || len(out.Recoverable) != 1 || len(out.Holes) != 0 {
				t.Fatalf("%v, %s", err, data)
			}
			w := out.Recoverable[0]
			if !w.LastCommit.Equal(last) || !w.PartialTime.Equal(progress) || w.ToLSN != to.String() || w.PartialLSN == "" {
				t.Errorf("the last commits are %v before %s, and %v before %s; the server says %v before %s, and %v", w.LastCommit, w.ToLSN, w.PartialTime, w.PartialLSN, last, to, progress)
			}
			// The first one, of the same archive without what is before.
			c := catalogue(t, d.clusterDir("orders"))
			for _, r := range c.Ranges() {
				r.Start = from
				got, err := c.FirstCommit(t.Context(), r.All(s.size))
				if err != nil || !got.Time.Equal(first) {
					t.Errorf("the first commit behind %s is %v, %v; the server says %v", from, got, err, first)
				}
			}
			text, err := command(t, "list", "--archive", d.clusterDir("orders")).Output()
			if err != nil || !strings.Contains(string(text), last.Format("2006-01-02 15:04:05.000Z")) {
				t.Errorf("%v\n%s", err, text)
			}
		})
	}
}
