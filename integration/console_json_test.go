package integration

import (
	"encoding/json"
	"testing"

	"github.com/walfleet/walfleet/fleet"
)

// TestConsoleTellsWhatStatusTells compares the console's JSON with that of "walfleet status", where both are about what
// does not move.
func TestConsoleTellsWhatStatusTells(t *testing.T) {
	t.Parallel()
	f := startTroubledFleet(t, t.TempDir())
	out, err := command(t, "status", "--json", "-c", f.config).Output()
	if err != nil {
		t.Fatal(err)
	}
	var status fleet.Report
	if err := json.Unmarshal(out, &status); err != nil {
		t.Fatal(err)
	}
	console := f.report(t)
	for i, c := range status.Clusters {
		t.Logf("%s %s %s: %v", c.Name, c.State, c.Health, c.Why(status.Time))
		o := console.Clusters[i]
		if c.Name != o.Name || c.State != o.State || c.Reason != o.Reason || c.Timeline != o.Timeline || c.SystemIdentifier != o.SystemIdentifier || c.Gaps != o.Gaps {
			t.Errorf("walfleet status has\n%+v, the console\n%+v", c, o)
		}
	}
}
