package demo

import (
	"fmt"
	"strconv"
	"time"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/receiver"
)

// statusTable is the fleet's status, a line for the header and one for each
// cluster.
func statusTable(clusters []fleet.ClusterStatus) []string {
	lines := []string{fmt.Sprintf(row, "CLUSTER", "STATE", "TIMELINE", "SEGMENT-SIZE", "FLUSHED", "LAG", "RECEIVED", "SEALED", "RECONNECTS")}
	for _, c := range clusters {
		lines = append(lines, fmt.Sprintf(row,
			c.Name,
			c.State,
			known(c.Timeline != 0, strconv.Itoa(int(c.Timeline))),
			known(c.SegmentSize != 0, size(int64(c.SegmentSize))),
			known(c.Flushed != 0, c.Flushed.String()),
			lag(c.Status),
			size(c.ReceivedBytes),
			strconv.FormatInt(c.SegmentsSealed, 10),
			strconv.FormatInt(c.Reconnects, 10)))
	}
	return lines
}

// row has columns of a fixed width, so that nothing jumps when it is redrawn.
const row = "%-8s %-11s %8s %12s %11s %7s %8s %6s %10s"

func known(ok bool, s string) string {
	if !ok {
		return "-"
	}
	return s
}

// lag is the WAL that the server has told of and that is not yet safe on disk
// here. Nothing is known of it while there is no connection.
func lag(s receiver.Status) string {
	return known(s.ServerEnd != 0 && s.Flushed != 0 && (s.State == receiver.CatchingUp || s.State == receiver.Streaming), size(s.Lag()))
}

// size writes a number of bytes as PostgreSQL does, in units of 1024, with a
// decimal below 10.
func size(n int64) string {
	units := []string{"B", "kB", "MB", "GB", "TB"}
	v := float64(n)
	for v >= 1000 && len(units) > 1 { // three digits at most
		v, units = v/1024, units[1:]
	}
	format := "%.0f %s"
	if v < 9.95 && v != float64(int64(v)) {
		format = "%.1f %s"
	}
	return fmt.Sprintf(format, v, units[0])
}

// latencyLine tells how long commits took.
func latencyLine(cluster string, l latencies) string {
	return fmt.Sprintf("%s waits for walfleet at each commit: %d commits, median %s, worst %s",
		cluster, l.commits, l.median.Round(100*time.Microsecond), l.worst.Round(100*time.Microsecond))
}
