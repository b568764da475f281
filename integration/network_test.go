package integration

import (
	"fmt"
	"strings"
	"testing"

	"github.com/Shopify/toxiproxy/v2"
	"github.com/rs/zerolog"

	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// startProxy starts a proxy before a server, which spoils what it is told to.
func startProxy(t *testing.T, name string, s *server) *toxiproxy.Proxy {
	t.Helper()
	api := toxiproxy.NewServer(toxiproxy.NewMetricsContainer(nil), zerolog.Nop())
	p := toxiproxy.NewProxy(api, name, host+":0", fmt.Sprintf("%s:%d", host, s.port))
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Stop)
	return p
}

// TestGoesOnAfterNetworkFaults has one cluster behind a network of its own for each fault, all of the same server
// under load. When the faults are over, every archive catches up by itself, and is what the server has.
func TestGoesOnAfterNetworkFaults(t *testing.T) {
	t.Parallel()
	const largest = 61 << 10 // the load's largest record
	faults := []struct {
		name, toxic string
		breaks      bool // the connection
	}{
		{"none", "", false},
		{"reset", `{"type": "reset_peer", "attributes": {"timeout": 300}}`, true},
		{"silence", `{"type": "timeout", "attributes": {"timeout": 0}}`, true},
		{"silence_of_ours", `{"type": "timeout", "stream": "upstream", "attributes": {"timeout": 0}}`, true},
		{"limit", `{"type": "limit_data", "attributes": {"bytes": 200000}}`, true},
		{"bytes", `{"type": "slicer", "attributes": {"average_size": 1, "size_variation": 0, "delay": 0}}`, false},
		{"latency", `{"type": "latency", "attributes": {"latency": 300, "jitter": 200}}`, false},
		{"bandwidth", `{"type": "bandwidth", "attributes": {"rate": 100}}`, false},
	}
	s := startServer(t, serverOptions{segment: megabyte, settings: []string{
		"max_wal_senders = 40", "max_replication_slots = 20", "wal_sender_timeout = 10s"}})
	proxies := map[string]*toxiproxy.Proxy{}
	var clusters []string
	for _, f := range faults {
		p := startProxy(t, f.name, s)
		_, port, _ := strings.Cut(p.Listen, ":")
		proxies[f.name] = p
		settings := []string{fmt.Sprintf("slot = %q", f.name), `status_interval = "1s"`}
		if f.breaks { // else a large message may take its time, byte by byte
			settings = append(settings, `receive_timeout = "2s"`)
		}
		clusters = append(clusters, cluster(f.name, s.conninfo("port="+port), settings...))
	}
	d := startDaemon(t, configText(t.TempDir(), clusters...))
	origin := map[string]wal.LSN{}
	for _, f := range faults {
		d.awaitState(t, f.name, receiver.Streaming)
		origin[f.name] = s.size.Start(s.lsn(t, "SELECT restart_lsn FROM pg_replication_slots WHERE slot_name = '"+f.name+"'"))
	}
	load := startLoad(t, s)
	load.await(t, 30)

	before := map[string]receiver.Status{}
	for _, f := range faults {
		before[f.name] = d.status(t, f.name)
		if f.toxic == "" {
			continue
		}
		if _, err := proxies[f.name].Toxics.AddToxicJson(strings.NewReader(f.toxic)); err != nil {
			t.Fatal(err)
		}
	}
	for _, f := range faults {
		was := before[f.name]
		if f.breaks {
			d.await(t, f.name, "a connection that broke", func(st receiver.Status) bool { return st.State == receiver.Backoff })
			continue
		}
		d.await(t, f.name, "progress", func(st receiver.Status) bool { return st.Flushed > was.Flushed+50<<10 })
	}
	load.await(t, 30)
	for _, f := range faults {
		proxies[f.name].Toxics.ResetToxics(t.Context())
	}
	load.await(t, 30)
	load.stop()
	for _, f := range faults {
		d.awaitFlushed(t, f.name, s.end(t))
	}
	d.stop(t)
	for _, f := range faults {
		st := d.status(t, f.name)
		compareArchive(t, d.clusterDir(f.name), st, origins{1: s})
		if f.breaks && st.Reconnects == 0 {
			t.Errorf("%s: no reconnect", f.name)
		}
		again := st.ReceivedBytes - int64(st.Written-origin[f.name])
		if again < 0 || again > st.Reconnects*(16<<10+largest) {
			t.Errorf("%s: %d bytes were received again in %d reconnects", f.name, again, st.Reconnects)
		}
		t.Logf("%s: %d reconnects, %d bytes received again of %d", f.name, st.Reconnects, again, st.ReceivedBytes)
	}
}
