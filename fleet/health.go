package fleet

import (
	"cmp"
	"fmt"
	"slices"
	"time"

	"github.com/walfleet/walfleet/receiver"
)

// Health is whether a cluster wants a person.
type Health string

const (
	Healthy  Health = "ok"       // what its server wrote is archived
	Warning  Health = "warning"  // not all of it is, or that is in danger; it may pass
	Critical Health = "critical" // WAL is not archived, and that does not pass by itself or has not for a while
)

const (
	// LateAfter is how old the WAL that an archive lacks may be before that wants a person.
	LateAfter = 30 * time.Second
	// outageAfter is how long WAL may not be archived, as in a restart of the server,
	// before that is an outage.
	outageAfter = time.Minute
)

// healthOf judges a report of a running daemon. troubleSince is when archiving stopped;
// zero: it has not.
func healthOf(r ClusterReport, troubleSince, now time.Time) Health {
	lost := func(w WarningReport) bool { return w.Kind == receiver.WarnSlotLost && w.Host == r.Host } // of the host that is archived
	trouble := !troubleSince.IsZero()
	comes := r.State == string(receiver.Streaming) || r.State == string(receiver.CatchingUp)
	a := cmp.Or(r.Archive, &ArchiveReport{})
	switch {
	case r.State == string(receiver.Halted), r.State == string(receiver.Blocked), r.State == stateUnknown,
		slices.ContainsFunc(r.Warnings, lost),
		a.LastVerify != nil && a.LastVerify.Faults > 0,
		trouble && now.Sub(troubleSince) >= outageAfter,
		r.State == string(receiver.Connecting) && now.Sub(r.Since) >= outageAfter: // an attempt that has not even failed
		return Critical
	case trouble, r.State == string(receiver.Stopped), !r.Stopping.IsZero(), len(r.Warnings) > 0,
		a.LastDrill != nil && !a.LastDrill.OK,
		comes && r.Unreadable() != "", // a directory that was taken away, say
		r.BehindSeconds != nil && *r.BehindSeconds >= LateAfter.Seconds(),
		r.BehindSeconds == nil && now.Sub(r.Since) >= LateAfter:
		return Warning
	}
	return Healthy
}

// Why says in words why a cluster is in its state, and what else a person must know; most
// pressing first. It is empty while all is well.
func (c ClusterReport) Why(now time.Time) (why []string) {
	if !c.Stopping.IsZero() {
		why = append(why, fmt.Sprintf("told to stop %s ago by a reload, and has not stopped", roughly(now.Sub(c.Stopping))))
	}
	if c.Reason != "" {
		why = append(why, c.Reason)
	}
	for _, w := range c.Warnings {
		why = append(why, w.Text)
	}
	if a := c.Archive; a != nil {
		if text := c.Unreadable(); text != "" {
			why = append(why, text)
		}
		if v := a.LastVerify; v != nil && v.Faults > 0 {
			why = append(why, fmt.Sprintf("the last verify, %s ago, found %s", roughly(now.Sub(v.Time)), count(v.Faults, "fault")))
		}
		if d := a.LastDrill; d != nil && !d.OK {
			why = append(why, fmt.Sprintf("the last drill, %s ago, failed: %s", roughly(now.Sub(d.Time)), d.Error))
		}
	}
	if c.Gaps > 0 {
		why = append(why, fmt.Sprintf("gaps on record: %d", c.Gaps))
	}
	return why
}

// Unreadable says that the archive's directory cannot be looked into, and why, where that is
// not because the state has just begun; "": it can, or nobody has looked.
func (c ClusterReport) Unreadable() string {
	if a := c.Archive; a != nil && a.Error != "" && a.Time.Sub(c.Since) >= outageAfter {
		return "the archive's directory cannot be looked into: " + a.Error
	}
	return ""
}

func count(n int, noun string) string {
	if n == 1 {
		return "1 " + noun
	}
	return fmt.Sprintf("%d %ss", n, noun)
}

// Urgent orders clusters for a person: those that want one most come first.
func Urgent(a, b ClusterReport) int {
	rank := func(c ClusterReport) int { return slices.Index([]Health{Critical, Warning, Healthy}, c.Health) }
	return cmp.Or(cmp.Compare(rank(a), rank(b)), cmp.Compare(slices.Index(urgency, a.State), slices.Index(urgency, b.State)))
}
