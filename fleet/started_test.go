package fleet

import (
	"context"
	"log/slog"
	"testing"
	"time"
)

func TestAFleetThatHasStartedTakesReloads(t *testing.T) {
	c := newCluster(t, "a")
	f := New(config(time.Minute, c.cfg), slog.New(slog.DiscardHandler))
	select {
	case <-f.Started():
		t.Error("started before Run")
	default:
	}
	ctx, cancel := context.WithCancel(t.Context())
	ended := make(chan error, 1)
	go func() { ended <- f.Run(ctx) }()
	select {
	case <-f.Started():
	case <-time.After(patience):
		t.Fatal("not started")
	}
	if _, err := f.Reload(ctx, config(time.Minute, c.cfg)); err != nil {
		t.Error(err)
	}
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
