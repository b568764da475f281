package receiver

import (
	"slices"
	"sync/atomic"
	"time"
)

// failureCounts counts failures. Any goroutine may read it.
type failureCounts [9]atomic.Int64 // in the order of FailureClasses

func (c *failureCounts) add(class string) { c[slices.Index(FailureClasses, class)].Add(1) }

// counts has every class, also those that there were none of.
func (c *failureCounts) counts() map[string]int64 {
	counts := make(map[string]int64, len(c))
	for i, class := range FailureClasses {
		counts[class] = c[i].Load()
	}
	return counts
}

// SyncTimes is how long the calls took that made WAL durable.
type SyncTimes struct {
	Within [len(syncLimits)]int64 // how many took at most as long as the SyncLimits of the same index
	Count  int64                  // of all, also of those that took longer than the last limit
	Sum    time.Duration
}

var syncLimits = [...]time.Duration{
	250 * time.Microsecond, 500 * time.Microsecond, time.Millisecond, 2500 * time.Microsecond, 5 * time.Millisecond, 10 * time.Millisecond,
	25 * time.Millisecond, 50 * time.Millisecond, 100 * time.Millisecond, 250 * time.Millisecond, time.Second, 2500 * time.Millisecond, 10 * time.Second,
}

// SyncLimits are the inclusive limits of SyncTimes, ascending: from a disk with a
// protected cache to one that hangs.
func SyncLimits() []time.Duration { return syncLimits[:] }

// syncTimer collects SyncTimes. One goroutine adds; any may read.
type syncTimer struct {
	took [len(syncLimits) + 1]atomic.Int64 // how many took longer than the limit before, and at most this one
	sum  atomic.Int64                      // ns
}

func (t *syncTimer) add(took time.Duration) {
	i, _ := slices.BinarySearch(syncLimits[:], took)
	t.took[i].Add(1)
	t.sum.Add(int64(took))
}

// times adds up; what is added meanwhile may be in its Count and not yet in its Sum.
func (t *syncTimer) times() (s SyncTimes) {
	s.Sum = time.Duration(t.sum.Load())
	for i := range t.took {
		s.Count += t.took[i].Load()
		if i < len(s.Within) {
			s.Within[i] = s.Count
		}
	}
	return s
}
