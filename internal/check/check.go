// Package check asks the clusters of a configuration, and the directories that their
// archives are in or will be in, everything that archiving depends on, and says what
// is wrong in named results with a hint for each. It changes nothing: it takes no
// lock, creates nothing and leaves slots alone, so it may run for a file that is not
// live yet and beside the daemon.
package check

import (
	"cmp"
	"context"
	"fmt"
	"net"
	"slices"
	"sync"
	"time"

	"golang.org/x/sync/errgroup"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/receiver"
)

const (
	// clusterTimeout bounds what all hosts of a cluster, and its directory, may take.
	clusterTimeout = 20 * time.Second
	// parallel is how many clusters are asked at a time.
	parallel = 16
)

// Level says how good a result is.
type Level int

const (
	OK      Level = iota
	Warning       // archiving works, or will, but for something
	Failed        // it does not
)

func (l Level) String() string {
	return [...]string{"OK", "WARNING", "FAILED"}[l]
}

// MarshalText is String, for JSON.
func (l Level) MarshalText() ([]byte, error) { return []byte(l.String()), nil }

// Result is what one test found.
type Result struct {
	Test  string `json:"test"`           // its name, which stays the same
	Host  string `json:"host,omitempty"` // "host:port" where it is about one of several hosts
	Level Level  `json:"level"`
	Text  string `json:"text"`
	Hint  string `json:"hint,omitempty"` // what a person can do; never with OK
}

// Cluster is what all tests of one cluster found.
type Cluster struct {
	Name     string   `json:"cluster"`
	Level    Level    `json:"level"` // the worst of its results
	Results  []Result `json:"tests"`
	Retained int64    `json:"slot_retained_bytes"` // WAL that its slot retains, on the host with most of it
	Free     int64    `json:"free_bytes"`          // of the archive's file system; -1: not known
}

// Report is what all tests found.
type Report struct {
	Level    Level     `json:"level"` // the worst of its clusters
	Clusters []Cluster `json:"clusters"`
}

// Options are for tests of this package, but for the names.
type Options struct {
	// Clusters names those to check, in any order; empty: all.
	Clusters []string
	// Dial replaces the network, for tests.
	Dial func(ctx context.Context, network, address string) (net.Conn, error)
}

// Run checks clusters, many at a time, and reports on them in the file's order.
// Hosts that do not answer take 20 seconds at most. The error is a name that the
// configuration does not have.
func Run(ctx context.Context, cfg *fleet.Config, o Options) (Report, error) {
	for _, name := range o.Clusters {
		if !slices.ContainsFunc(cfg.Clusters, func(c receiver.Config) bool { return c.Name == name }) {
			return Report{}, fmt.Errorf("there is no cluster %q in the configuration", name)
		}
	}
	all := make([]facts, len(cfg.Clusters))
	var group errgroup.Group
	group.SetLimit(parallel)
	for i, c := range cfg.Clusters {
		group.Go(func() error {
			ctx, cancel := context.WithTimeout(ctx, clusterTimeout)
			defer cancel()
			all[i] = facts{cfg: c}
			var wait sync.WaitGroup
			defer wait.Wait()
			// Those that are not asked about fill the same disks.
			wait.Go(func() { all[i].dir = lookAt(ctx, c.Dir) })
			if len(o.Clusters) == 0 || slices.Contains(o.Clusters, c.Name) {
				all[i].asked = true
				all[i].ask(ctx, o.Dial)
			}
			return nil
		})
	}
	_ = group.Wait() // of goroutines that return nil
	if ctx.Err() != nil {
		return Report{}, ctx.Err()
	}
	return report(all), nil
}

// report judges what was found out.
func report(all []facts) Report {
	var r Report
	disks := disksOf(all)
	for i := range all {
		f := &all[i]
		if !f.asked {
			continue
		}
		c := Cluster{Name: f.cfg.Name, Results: f.judge(disks[f.dir.device]), Free: -1}
		for _, result := range c.Results {
			c.Level = max(c.Level, result.Level)
		}
		for _, h := range f.hosts {
			c.Retained = max(c.Retained, h.watch.Retained)
		}
		if f.dir.err == nil {
			c.Free = f.dir.free
		}
		r.Level = max(r.Level, c.Level)
		r.Clusters = append(r.Clusters, c)
	}
	return r
}

// diskUse is what the whole fleet does with one file system.
type diskUse struct {
	clusters int
	next     int64   // bytes that the next segment of each cluster takes
	rate     float64 // bytes a second that archives grow by; 0: not known
}

// disksOf adds up what the clusters need of each file system, by its device.
func disksOf(all []facts) map[uint64]diskUse {
	disks := map[uint64]diskUse{}
	for i := range all {
		f := &all[i]
		if f.dir.err != nil {
			continue
		}
		d := disks[f.dir.device]
		d.clusters++
		d.next += f.segmentSize()
		d.rate += f.dir.rate()
		disks[f.dir.device] = d
	}
	return disks
}

// usualSegment is PostgreSQL's segment size where nothing else is known, in bytes.
const usualSegment = 16 << 20

// segmentSize is the cluster's, as far as it is known.
func (f *facts) segmentSize() int64 {
	server := int64(0)
	if h := f.chosen(); h != nil {
		server = int64(h.id.SegmentSize)
	}
	return cmp.Or(server, int64(f.dir.holdings.Identity.SegmentSize), usualSegment)
}
