package receiver

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sync/semaphore"
)

// placeTime is how long an attempt to connect may hold its place.
const placeTime = time.Second

// Shared bounds what the receivers of a process do at the same time. Make it with
// NewShared; any goroutine may use it.
type Shared struct {
	compressors *semaphore.Weighted
	places      *semaphore.Weighted // of attempts to connect
}

// NewShared makes what bounds the work of all receivers that share it.
//
// At most compressors segments are compressed at the same time. Each takes one
// processor, and the memory that its method takes: 40 MB at most.
//
// At most attempts of them try to connect at the same time, so that hundreds of
// clusters that start together, or lost their network together, are no stampede
// on name servers, firewalls, and the processors here. An attempt is one cluster's,
// with all of its hosts, from looking up their names until they have said who they
// are. It ends by itself, for each of its steps has a deadline; but it gives its
// place back after a second in any case, and goes on without one: what takes longer
// waits for a host, and is no burden. Places are given in the order in which they
// were asked for, so no host, however many there are that hang, keeps a cluster from
// its turn: it comes after a second for each full set of places before it.
func NewShared(compressors, attempts int64) *Shared {
	return &Shared{semaphore.NewWeighted(compressors), semaphore.NewWeighted(attempts)}
}

// turn waits until the receiver may try to connect, or ctx is done. What it returns
// ends the attempt.
func (s *Shared) turn(ctx context.Context) (end func(), err error) {
	if err := s.places.Acquire(ctx, 1); err != nil {
		return nil, err
	}
	release := sync.OnceFunc(func() { s.places.Release(1) })
	timer := time.AfterFunc(placeTime, release)
	return func() {
		timer.Stop()
		release()
	}, nil
}
