package receiver

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
)

// Decision is a person's answer to what halts a cluster.
type Decision string

const (
	// AcceptGap writes down that WAL is missing, and goes on behind it.
	AcceptGap Decision = "accept-gap"
	// AcceptDivergence keeps what the archive has from the segment of the
	// divergence on aside, and goes on there with the server's WAL.
	AcceptDivergence Decision = "accept-divergence"
)

// decision is a Decision on its way to Run, which answers once.
type decision struct {
	what   Decision
	halt   int64          // the one that it is about
	answer chan<- outcome // with room for one
}

type outcome struct {
	done string
	err  error
}

// Decide hands a decision to the receiver and waits for what became of it, in
// words. The error says why nothing was decided: above all, that the cluster is
// not halted by what the decision is about. Any goroutine may call it.
func (r *Receiver) Decide(ctx context.Context, what Decision) (string, error) {
	s := r.state.Load()
	switch {
	case s.State != Halted:
		return "", fmt.Errorf("cluster %s is not halted (it is %s): there is nothing to decide", r.cfg.Name, s.State)
	case s.looking:
		return "", fmt.Errorf("cluster %s is being looked at again in this moment: decide in a few seconds, if it is halted then", r.cfg.Name)
	}
	answer := make(chan outcome, 1)
	select {
	case r.decisions <- decision{what, s.halt, answer}:
	case <-r.done:
		return "", fmt.Errorf("cluster %s was stopped meanwhile", r.cfg.Name)
	case <-ctx.Done():
		return "", fmt.Errorf("cluster %s did not take the decision: %w", r.cfg.Name, ctx.Err())
	}
	select {
	case o := <-answer:
		return o.done, o.err
	case <-ctx.Done():
		return "", fmt.Errorf("cluster %s took the decision, and has not carried it out yet: %w", r.cfg.Name, ctx.Err())
	}
}

// halt waits until the cluster is to be looked at again: after a while, or for a
// decision about err. It reports false when ctx was done first.
func (r *Receiver) halt(ctx context.Context, pause time.Duration, err error) bool {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	for {
		select {
		case <-ctx.Done():
			return false
		case <-timer.C:
			return true
		case <-r.again:
			return true
		case d := <-r.decisions:
			r.pending = d.answer
			if d.halt != r.state.Load().halt {
				r.answer("", fmt.Errorf("cluster %s was looked at again meanwhile, decide again if you mean this: %w", r.cfg.Name, err))
				continue
			}
			if r.decide(d.what, err) {
				return true
			}
		}
	}
}

// decide carries out a decision about err, or leaves that to the next session. It
// reports whether there is to be one now.
func (r *Receiver) decide(what Decision, err error) bool {
	var gap *gapError
	var diverged *archive.DivergenceError
	switch {
	case what == AcceptGap && errors.As(err, &gap):
		r.accepted = gap
		return true
	case what == AcceptDivergence && errors.As(err, &diverged):
		v, err := r.acceptDivergence(diverged)
		if err != nil {
			r.answer("", err)
			return false
		}
		r.stray = r.others
		text := fmt.Sprintf("divergence accepted at timeline %d, %s: the archive goes on from %s with the server's WAL, %d files are kept aside as *.diverged; take a base backup now",
			v.Timeline, v.LSN, v.Restart, len(v.Kept))
		r.log.Error(text)
		r.answer(text, nil)
		return true
	}
	r.answer("", fmt.Errorf("cluster %s is halted by something else, %s does not apply: %w", r.cfg.Name, what, err))
	return false
}

// acceptDivergence opens the directory, which a halted receiver has let go of.
func (r *Receiver) acceptDivergence(e *archive.DivergenceError) (v archive.Divergence, err error) {
	defer r.custody.take()()
	d, err := archive.Open(r.cfg.Dir)
	if err != nil {
		return v, err
	}
	v, err = d.AcceptDivergence(e.Timeline, e.LSN, e.Error())
	return v, errors.Join(err, d.Close())
}

// answer says what became of the decision under way, if there is one.
func (r *Receiver) answer(done string, err error) {
	if r.pending != nil {
		r.pending <- outcome{done, err}
		r.pending = nil
	}
}
