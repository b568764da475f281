package receiver

import (
	"context"
	"time"
)

const (
	// paceCredit is how much of the rate's unused time may be made up for.
	paceCredit = 100 * time.Millisecond
	// paceSlack is how far ahead of the rate reading goes before it waits, so that one
	// wait does for many small messages.
	paceSlack = 10 * time.Millisecond
	// heldInterval is the longest time between two status updates while max_rate holds
	// reading back: what the server asks waits behind its WAL then.
	heldInterval = time.Second
)

// pacer keeps reading to a rate. It is a debt that time pays off: a message is read
// first and counted then, so one may be larger than what the rate allows in a second.
// Its zero value is ready.
type pacer struct {
	ahead float64   // bytes read beyond the rate at time at; below 0: credit
	at    time.Time // when it was looked at last
}

// took counts n bytes that were read.
func (p *pacer) took(n int) { p.ahead += float64(n) }

// wait is how long nothing is to be read from now on; 0: reading may go on. rate is in bytes a
// second, 0: without limit. It may be another one each time.
func (p *pacer) wait(now time.Time, rate int64) time.Duration {
	if rate <= 0 {
		*p = pacer{}
		return 0
	}
	second := float64(rate)
	p.ahead = max(p.ahead-second*now.Sub(p.at).Seconds(), -second*paceCredit.Seconds())
	p.at = now
	if p.ahead <= second*paceSlack.Seconds() {
		return 0
	}
	return time.Duration(p.ahead / second * float64(time.Second))
}

// maxRate is the limit on reading, in bytes a second; 0: none. It may change while
// the receiver runs.
func (r *Receiver) maxRate() int64 { return r.settings().MaxRate }

// holdBack reads nothing for a while where max_rate demands it, and reports whether
// it did. It ends early when something else is due, or ctx is done: the loop then
// comes back here.
func (s *stream) holdBack(ctx context.Context) bool {
	now := time.Now()
	wait := s.pace.wait(now, s.maxRate())
	if wait == 0 {
		return false
	}
	s.held(now)
	wait = min(wait, s.deadline().Sub(now))
	if s.timer == nil {
		s.timer = time.NewTimer(wait)
	} else {
		s.timer.Reset(wait)
	}
	select {
	case <-ctx.Done():
	case <-s.timer.C:
	}
	s.held(time.Now())
	return true
}

// held notes that nothing is read, which is not the server's silence.
func (s *stream) held(now time.Time) {
	s.heldAt, s.now.heldBack = now, now.UnixNano()
	s.lastHeard, s.asked = now, false
	s.silenceAt = now.Add(s.in.ReceiveTimeout / 2)
}

// statusEvery is the longest time between two status updates; 0: there is none.
func (s *stream) statusEvery() time.Duration {
	every := s.in.StatusInterval
	if !s.heldAt.IsZero() && time.Since(s.heldAt) < heldInterval && (every == 0 || every > heldInterval) {
		return heldInterval
	}
	return every
}
