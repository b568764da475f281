package fleet

import (
	"fmt"
	"slices"
	"strings"

	"github.com/walfleet/walfleet/receiver"
)

// A Plan says what a reload does with each cluster. Every name of the old and
// of the new configuration stands in exactly one of the lists, which are
// sorted.
type Plan struct {
	Start   []string `json:"start"`   // only in the new configuration
	Stop    []string `json:"stop"`    // only in the old one; its slot and its files stay
	Restart []string `json:"restart"` // in both, with different values
	Adjust  []string `json:"adjust"`  // in both, different in what a running receiver can take: its connection stays
	Keep    []string `json:"keep"`    // in both, equal: the running receiver is not touched

	// Changed has the keys of the file whose values differ, for each cluster that is
	// restarted or adjusted.
	Changed map[string][]string `json:"changed"`
}

// Diff compares two configurations by cluster name. Each of them must name a
// cluster once, as [Parse] makes sure; their order does not matter.
func Diff(old, new []receiver.Config) Plan {
	running := make(map[string]receiver.Config, len(old))
	for _, c := range old {
		running[c.Name] = c
	}
	var p Plan
	for _, c := range new {
		was, ok := running[c.Name]
		delete(running, c.Name)
		adjusted := was
		adjusted.Adjustable = c.Adjustable
		switch {
		case !ok:
			p.Start = append(p.Start, c.Name)
			continue
		case was == c:
			p.Keep = append(p.Keep, c.Name)
			continue
		case adjusted == c:
			p.Adjust = append(p.Adjust, c.Name)
		default:
			p.Restart = append(p.Restart, c.Name)
		}
		if p.Changed == nil {
			p.Changed = map[string][]string{}
		}
		p.Changed[c.Name] = changedKeys(was, c)
	}
	for name := range running {
		p.Stop = append(p.Stop, name)
	}
	for _, names := range p.lists() {
		slices.Sort(*names)
	}
	return p
}

// changedKeys are the keys of the file that make the difference of two clusters,
// sorted.
func changedKeys(old, new receiver.Config) []string {
	var keys []string
	for _, s := range slices.Concat(clusterSettings, retentionSettings) {
		if s.show(&old) != s.show(&new) {
			keys = append(keys, s.key)
		}
	}
	if old.Dir != new.Dir {
		keys = append(keys, "archive_dir")
	}
	slices.Sort(keys)
	return keys
}

func (p *Plan) lists() []*[]string {
	return []*[]string{&p.Start, &p.Stop, &p.Restart, &p.Adjust, &p.Keep}
}

// restart makes the plan restart a cluster that it would keep or adjust.
func (p *Plan) restart(name string) {
	for _, names := range []*[]string{&p.Keep, &p.Adjust} {
		if i, ok := slices.BinarySearch(*names, name); ok {
			*names = slices.Delete(*names, i, i+1)
			p.Restart = append(p.Restart, name)
			slices.Sort(p.Restart)
		}
	}
}

// String is the plan in one line for the log, with the kept clusters only
// counted: "started a, b; restarted c; adjusted e; stopped d; kept 97".
func (p Plan) String() string {
	var parts []string
	for _, list := range []struct {
		verb  string
		names []string
	}{{"started", p.Start}, {"restarted", p.Restart}, {"adjusted", p.Adjust}, {"stopped", p.Stop}} {
		if len(list.names) > 0 {
			parts = append(parts, list.verb+" "+strings.Join(list.names, ", "))
		}
	}
	parts = append(parts, fmt.Sprintf("kept %d", len(p.Keep)))
	return strings.Join(parts, "; ")
}
