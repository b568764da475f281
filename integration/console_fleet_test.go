package integration

import (
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/receiver"
)

// troubledFleet is a walfleet with a cluster for each kind of trouble, that of the names below, and of one without.
type troubledFleet struct {
	*program
	text string // of the configuration file
	port int    // of the console
	url  string

	shared *server // of healthy, lagging and blocked
	mortal *server // of down, which is up until it is killed
}

// In the order of the file. Those of ranking are in the order of the page, which has the worst on top.
const (
	healthy = "orders"    // has caught up
	lagging = "billing"   // receives less than its server writes
	down    = "sessions"  // its server is killed
	blocked = "reports"   // another receiver uses its slot
	halted  = "inventory" // its server has no longer what comes next, once more after a gap that is on record
)

var ranking = []string{halted, blocked, down, lagging, healthy}

// startTroubledFleet starts it with its archives in dir, and waits for the states of all clusters; the one that is to be
// down streams. There may be more clusters.
func startTroubledFleet(t testing.TB, dir string, more ...string) *troubledFleet {
	t.Helper()
	f := &troubledFleet{port: freePort(t)}
	f.url = fmt.Sprintf("http://%s:%d", host, f.port)

	// Nobody reads what the other receiver is sent.
	f.shared = startServer(t, serverOptions{segment: megabyte, settings: []string{"wal_sender_timeout = 0"}})
	f.mortal = startServer(t, serverOptions{segment: megabyte})
	gone := startServer(t, serverOptions{segment: megabyte,
		settings: []string{"min_wal_size = 2MB", "max_wal_size = 2MB", "wal_keep_size = 0", "max_slot_wal_keep_size = 2MB"}})
	for range 2 {
		d := startDaemon(t, configText(dir, cluster(halted, gone.conninfo(), `on_gap = "record"`, fmt.Sprintf("slot = %q", halted))))
		d.awaitState(t, halted, receiver.Streaming)
		gone.write(t, 3)
		d.archived(t, halted, gone)
		await(t, patience, "the slot is invalidated", func() (bool, string) {
			gone.write(t, 2)
			gone.query(t, "CHECKPOINT")
			v := gone.value(t, "SELECT wal_status FROM pg_replication_slots")
			return v == "lost", v
		})
	}
	f.shared.query(t, "SELECT pg_create_physical_replication_slot('"+blocked+"', true)")
	f.shared.occupy(t, blocked)

	clusters := []string{watched(healthy, f.shared), watched(lagging, f.shared, `max_rate = "50kB"`), watched(down, f.mortal), watched(blocked, f.shared), watched(halted, gone)}
	f.text = listening(f.port, configText(dir, append(clusters, more...)...))
	f.program = startProgram(t, f.text)
	f.stderr.await(t, "caught up, streaming", "cluster="+lagging)
	f.shared.write(t, 40) // more than the one that lags receives in all of a test
	f.awaitStates(t, map[string]receiver.State{healthy: receiver.Streaming, lagging: receiver.Streaming, down: receiver.Streaming,
		blocked: receiver.Blocked, halted: receiver.Halted})
	await(t, patience, lagging+" lags", func() (bool, string) {
		c := f.cluster(t, lagging)
		return c.LagBytes != nil && *c.LagBytes > 1<<20, fmt.Sprintf("%+v", c)
	})
	return f
}

// watched is a cluster with a slot of its own, which is looked at often.
func watched(name string, s *server, settings ...string) string {
	return cluster(name, s.conninfo("connect_timeout=30"), append(settings, fmt.Sprintf("slot = %q", strings.ReplaceAll(name, "-", "_")), `monitor_interval = "1s"`)...)
}

// listening is a configuration with the console at a port.
func listening(port int, config string) string {
	return strings.Replace(config, `listen = ""`, fmt.Sprintf(`listen = "%s:%d"`, host, port), 1)
}

// console is the console as a server that a proxy can stand before.
func (f *troubledFleet) console() *server { return &server{port: f.port} }

// awaitStates waits until the console tells of these states.
func (f *troubledFleet) awaitStates(t testing.TB, want map[string]receiver.State) {
	t.Helper()
	await(t, patience, fmt.Sprintf("states %v", want), func() (bool, string) {
		got := map[string]receiver.State{}
		for _, c := range f.report(t).Clusters {
			if _, asked := want[c.Name]; asked {
				got[c.Name] = receiver.State(c.State)
			}
		}
		return fmt.Sprint(got) == fmt.Sprint(want), fmt.Sprint(got)
	})
}

// report is what the console says of the whole fleet.
func (f *troubledFleet) report(t testing.TB) (r fleet.Report) {
	t.Helper()
	getJSON(t, f.url+"/api/v1/status", &r)
	return r
}

// cluster is what the console says of one cluster, with all that it only says when it is asked for that one.
func (f *troubledFleet) cluster(t testing.TB, name string) fleet.ClusterReport {
	t.Helper()
	var r fleet.Report
	getJSON(t, f.url+"/api/v1/status/"+name, &r)
	if len(r.Clusters) != 1 || r.Clusters[0].Name != name {
		t.Fatalf("%s: %+v", name, r)
	}
	return r.Clusters[0]
}

// get is the body of an answer of 200.
func get(t testing.TB, address string) []byte {
	t.Helper()
	client := &http.Client{Timeout: time.Minute, Transport: &http.Transport{DisableKeepAlives: true}}
	answer, err := client.Get(address)
	if err != nil {
		t.Fatal(err)
	}
	defer answer.Body.Close()
	body, err := io.ReadAll(answer.Body)
	if err != nil || answer.StatusCode != http.StatusOK {
		t.Fatalf("GET %s: %s, error %v: %s", address, answer.Status, err, body)
	}
	return body
}

func getJSON(t testing.TB, address string, into any) {
	t.Helper()
	body := get(t, address)
	if err := json.Unmarshal(body, into); err != nil {
		t.Fatalf("GET %s: %v in %s", address, err, body)
	}
}
