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
	Start   []string // only in the new configuration
	Stop    []string // only in the old one; its slot and its files stay
	Restart []string // in both, with different values
	Keep    []string // in both, equal: the running receiver is not touched
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
		switch {
		case !ok:
			p.Start = append(p.Start, c.Name)
		case was == c:
			p.Keep = append(p.Keep, c.Name)
		default:
			p.Restart = append(p.Restart, c.Name)
		}
	}
	for name := range running {
		p.Stop = append(p.Stop, name)
	}
	for _, names := range [][]string{p.Start, p.Stop, p.Restart, p.Keep} {
		slices.Sort(names)
	}
	return p
}

// String is the plan in one line for the log, with the kept clusters only
// counted: "started a, b; restarted c; stopped d; kept 97".
func (p Plan) String() string {
	var parts []string
	for _, list := range []struct {
		verb  string
		names []string
	}{{"started", p.Start}, {"restarted", p.Restart}, {"stopped", p.Stop}} {
		if len(list.names) > 0 {
			parts = append(parts, list.verb+" "+strings.Join(list.names, ", "))
		}
	}
	parts = append(parts, fmt.Sprintf("kept %d", len(p.Keep)))
	return strings.Join(parts, "; ")
}
