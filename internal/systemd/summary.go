package systemd

import (
	"cmp"
	"fmt"
	"slices"
	"strings"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/receiver"
)

// order is that of states in a summary: what needs a person comes last, where it
// is read.
var order = []receiver.State{receiver.Streaming, receiver.CatchingUp, receiver.Connecting, receiver.Stopped,
	receiver.Backoff, receiver.Blocked, receiver.Halted}

// named is how many clusters of one state a summary names.
const named = 5

// summary is a fleet in one line: "97 streaming, 2 backoff, 1 halted: orders".
// Clusters that are blocked or halted are named. A fleet of none is "no clusters".
func summary(all []fleet.ClusterStatus) string {
	names := map[receiver.State][]string{}
	for _, c := range all {
		names[c.State] = append(names[c.State], c.Name)
	}
	states := make([]receiver.State, 0, len(names))
	for state := range names {
		states = append(states, state)
	}
	slices.SortFunc(states, func(a, b receiver.State) int {
		return cmp.Or(cmp.Compare(slices.Index(order, a), slices.Index(order, b)), strings.Compare(string(a), string(b)))
	})
	text, separator := "", ""
	for _, state := range states {
		text += fmt.Sprintf("%s%d %s", separator, len(names[state]), strings.ReplaceAll(string(state), "_", " "))
		separator = ", "
		if state == receiver.Blocked || state == receiver.Halted {
			text += ": " + list(names[state])
			separator = "; "
		}
	}
	return cmp.Or(text, "no clusters")
}

func list(names []string) string {
	if len(names) <= named {
		return strings.Join(names, ", ")
	}
	return fmt.Sprintf("%s and %d more", strings.Join(names[:named], ", "), len(names)-named)
}
