package receiver

import (
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/wal"
)

// Below min_free, or where the next segment does not fit beside it, nothing is read or written. The connection is
// kept by status updates with the flush position that was reached, and archiving goes on by itself.
func TestBlockedWhileThereIsTooLittleRoom(t *testing.T) {
	for name, tt := range map[string]struct {
		room int64
		end  wal.LSN // of the WAL before the room is gone
		says string
	}{
		"below min_free":       {9 * mb, origin + 100<<10, "less than min_free = 10 MB"},
		"no room for segments": {10*mb + mb/2, origin + mb, "the next segment needs 1 MB above min_free = 10 MB: no space left on device"},
	} {
		t.Run(name, func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.cfg.MinFree = 10 * mb
				g.appendTo(tt.end)
				g.start()
				g.sleep(2 * time.Second)
				g.wantArchived()
				before := g.files()

				g.room.Store(tt.room)
				g.sleep(15 * time.Second)
				g.want(Blocked, g.cfg.Dir, tt.says)
				g.updates()
				end := g.wal.End()
				g.append(300, 5000)
				g.sleep(10 * time.Minute)
				g.want(Blocked)
				if after := g.files(); len(after) != len(before) {
					t.Errorf("files %d, were %d", len(after), len(before))
				}
				sent := g.updates()
				if len(sent) < 500 {
					t.Errorf("%d status updates in 10 minutes", len(sent))
				}
				for _, u := range sent {
					if u.flush != end {
						t.Fatalf("%+v, flushed was %s", u, end)
					}
				}
				if n := g.logs.count("not archiving"); n != 1 {
					t.Errorf("told %d times:\n%s", n, g.logs.last(10))
				}

				g.room.Store(0)
				g.sleep(2 * time.Second)
				g.wantArchived()
				if s := g.r.Status(); s.Reconnects != 0 {
					t.Errorf("%d reconnects", s.Reconnects)
				}
			})
		})
	}
}

// Whoever stops walfleet does not wait for room.
func TestBlockedReceiverStops(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.MinFree = mb
		g.start()
		g.room.Store(1)
		g.append(3, 1000)
		g.sleep(time.Minute)
		g.want(Blocked)
		g.stop()
	})
}

// min_free holds when a message crosses into the next segment, as most do.
func TestNoSegmentIsBegunBelowMinFreeByAMessageThatCrosses(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.MinFree = 10 * mb
		g.appendTo(origin + mb - 5000)
		g.start()
		g.sleep(2 * time.Second)
		g.wantArchived()
		g.room.Store(10*mb + mb/2)
		g.append(1, 20000)
		g.sleep(5 * time.Second)
		if names, _ := filepath.Glob(filepath.Join(g.cfg.Dir, strings.Repeat("[0-9A-F]", 24)+"*")); len(names) != 1 {
			t.Errorf("%d segments, state %s: the second one does not fit above min_free", len(names), g.r.Status().State)
		}
	})
}
