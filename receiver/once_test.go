package receiver

import (
	"bytes"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/jackc/pgx/v5/pgproto3"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// once calls RunOnce in a receiver that is made once, in the background.
func (g *rig) once() {
	g.Helper()
	if g.r == nil {
		g.make()
	}
	g.run(g.r.RunOnce)
}

// wantEnded expects RunOnce to have returned, with words in its error or without one.
func (g *rig) wantEnded(words string) {
	g.Helper()
	synctest.Wait()
	select {
	case err := <-g.ended:
		if words == "" && err != nil || words != "" && (err == nil || !strings.Contains(err.Error(), words)) {
			g.Errorf("RunOnce: %v, want %q", err, words)
		}
	default:
		g.Fatalf("RunOnce goes on, state %s\n%s", g.r.Status().State, g.logs.last(12))
	}
	g.cancel = nil
}

// closeOnce ends a receiver of once.
func (g *rig) closeOnce() {
	g.Helper()
	if err := g.r.Close(); err != nil {
		g.Error(err)
	}
	if s := g.r.Status().State; s != Stopped {
		g.Errorf("state %s after Close", s)
	}
}

func TestRunOnceEndsWithItsConnectionAndTheNextGoesOnWithoutReadingTheArchive(t *testing.T) {
	bubble(t, func(g *rig) {
		g.once()
		g.wantArchived()
		writer, end := g.r.writer, g.wal.End()
		g.srv.Disconnect()
		g.wantEnded("receiving: ")
		g.append(3, 500)
		g.once()
		g.wantArchived()
		if g.r.writer != writer {
			t.Error("the archive was opened again")
		}
		if from := g.stream().Request().LSN; from >= end {
			t.Errorf("asked for WAL from %s, nothing is compared with what the archive has up to %s", from, end)
		}
		g.cancel()
		g.wantEnded("")
		if e := g.stream().Ended(); !e.CopyDone {
			t.Errorf("no good-bye to the server: %+v", e)
		}
		if n := g.logs.count("level=DEBUG msg=\"segment is not complete\" cluster=blue segment=" + g.name(1, 0)); n != 1 {
			t.Errorf("%d messages about the incomplete segment:\n%s", n, g.logs.last(12))
		}
		g.closeOnce()
	})
}

func TestRunOnceGoesOnByItselfAfterAnAbortedRecord(t *testing.T) {
	bubble(t, func(g *rig) {
		complete := g.wal.End()
		_, end := g.wal.Append(bytes.Repeat([]byte{7}, 5000))
		g.publishTo(1, end-2000)
		g.once()
		g.want(Streaming)
		g.srv.Disconnect()
		g.wantEnded("receiving: ")
		g.wal = newWAL(g.size) // the same up to complete, then another record
		g.append(3, 500)
		if g.wal.End() != complete {
			t.Fatalf("%s, want %s", g.wal.End(), complete)
		}
		g.append(3, 3000)
		g.once()
		g.sleep(time.Second)
		g.wantArchived()
		g.cancel()
		g.wantEnded("")
		g.closeOnce()
	})
}

// As with pg_receivewal, the end is where a message passes the position; nothing is cut.
func TestEndPositionEndsRunOnce(t *testing.T) {
	bubble(t, func(g *rig) {
		g.appendTo(origin + mb + 3000)
		g.cfg.EndPos = g.wal.End()
		g.once()
		g.wantArchived() // up to the position, and not beyond it
		g.append(1, 100)
		g.wantEnded("")
		if s := g.r.Status(); s.Written != g.wal.End() || s.Flushed != g.wal.End() {
			t.Errorf("written %s, flushed %s, want %s", s.Written, s.Flushed, g.wal.End())
		}
		if e := g.stream().Ended(); !e.CopyDone {
			t.Errorf("no good-bye to the server: %+v", e)
		}
		g.wantFiles(g.name(1, 0), g.name(1, 1)+".partial")

		streams := len(g.srv.Streams())
		g.once() // once more: the last segment has it already, and is compared
		g.wantEnded("")
		if now := len(g.srv.Streams()); now != streams+1 {
			t.Errorf("%d streams, want another one", now-streams)
		}
		g.closeOnce()

		g.cfg.EndPos = origin + 5000 // in an earlier segment: no stream is needed
		g.r = nil
		g.once()
		g.wantEnded("")
		if now := len(g.srv.Streams()); now != streams+1 {
			t.Errorf("%d streams, want no other one", now-streams)
		}
		g.closeOnce()
	})
}

// Without a slot a flush position would only make a synchronous standby, which was not asked for.
func TestWithoutASlotNothingIsAcknowledged(t *testing.T) {
	for _, synchronous := range []bool{false, true} {
		bubble(t, func(g *rig) {
			g.cfg.Slot, g.cfg.SlotAsIs, g.cfg.Synchronous, g.cfg.StatusInterval = "", true, synchronous, time.Second
			g.once()
			g.append(3, 500)
			g.appendTo(origin + mb + 3000)
			g.sleep(2 * time.Second)
			if err := g.stream().Keepalive(g.wal.End(), true); err != nil {
				t.Fatal(err)
			}
			synctest.Wait()
			if u := g.last(); u.write != g.wal.End() || (u.flush != 0) != synchronous {
				t.Errorf("synchronous %t: %+v", synchronous, u)
			}
			if r := g.stream().Request(); r.Slot != "" {
				t.Errorf("%+v", r)
			}
			for _, u := range g.updates() {
				if !synchronous && u.flush != 0 {
					t.Errorf("%+v", u)
				}
			}
			if slot := g.srvSlot("walfleet"); slot == nil || slot.RestartLSN != origin || slot.ActivePID != 0 {
				t.Errorf("another's slot was touched: %+v", slot)
			}
			g.wantFiles(g.name(1, 0), g.name(1, 1)+".partial")
			g.cancel()
			g.wantEnded("")
			g.closeOnce()
		})
	}
}

func (g *rig) srvSlot(name string) (slot *pgtest.Slot) {
	g.srv.Do(func(s *pgtest.State) { slot = s.Slots[name] })
	return slot
}

// A slot that is used as it is: begun at where that can be read, never made, nor asked about on an ordinary
// connection.
func TestSlotIsLeftAsItIs(t *testing.T) {
	for version, want := range map[string]int{"17.2": 1, "15.8": 1, "13.4": 2} {
		t.Run(version, func(t *testing.T) {
			bubble(t, func(g *rig) {
				g.cfg.SlotAsIs = true
				g.srv.OnQuery = func(q pgtest.Query) []pgproto3.BackendMessage {
					if q.Startup["replication"] == "" {
						t.Errorf("an ordinary connection: %+v", q)
					}
					return nil
				}
				g.appendTo(origin + 2*mb + 5000)
				g.srv.Do(func(s *pgtest.State) {
					s.Version = version
					delete(s.Slots, "walfleet")
				})
				g.once()
				g.wantEnded(`replication slot "walfleet" does not exist`)
				g.wantFiles()
				if g.slot() != nil {
					t.Error("a slot was created")
				}
				g.srv.Do(func(s *pgtest.State) { s.Slots["walfleet"] = &pgtest.Slot{RestartLSN: origin + mb + 100} })
				g.once()
				g.wantArchived()
				if from := g.stream().Request().LSN; from != origin+wal.LSN(want)*mb {
					t.Errorf("begins at %s", from)
				}
				g.cancel()
				g.wantEnded("")
				g.closeOnce()
			})
		})
	}
}

// Unless something asks for it, WAL is synced when its segment ends, as with pg_receivewal.
func TestWithoutAFlushIntervalSegmentsAreFlushedWhenTheyEnd(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Synchronous, g.cfg.FlushInterval, g.cfg.StatusInterval = false, 0, time.Second
		g.once()
		g.sleep(time.Hour)
		if u := g.last(); u.write != g.wal.End() || u.flush != 0 {
			t.Errorf("%+v", u)
		}
		g.appendTo(origin + mb + 3000)
		synctest.Wait()
		if u := g.last(); u.flush < origin+mb {
			t.Errorf("%+v, and a segment ended", u)
		}
		g.cancel()
		g.wantEnded("")
		g.closeOnce()
	})
}

func TestWithoutMinFreeTheFileSystemIsNotLookedAt(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.MinFree = -1
		g.room.Store(1)
		g.once()
		g.wantArchived()
		g.cancel()
		g.wantEnded("")
		g.closeOnce()
	})
}

func TestRunOnceReleasesTheDirectoryThatAPersonHasToSee(t *testing.T) {
	bubble(t, func(g *rig) {
		g.once()
		g.wantArchived()
		g.srv.Disconnect()
		g.wantEnded("receiving: ")
		g.srv.Do(func(s *pgtest.State) { s.SystemID = 1 })
		g.once()
		g.wantEnded("belongs to the cluster with system identifier")
		if g.r.dir != nil {
			t.Error("the directory is still locked")
		}
		g.closeOnce()
	})
}

// What a stop inside a record that crosses a segment's end leaves is one segment to go on with, whoever does.
func TestRunOnceGoesOnAfterAStopInsideACrossingRecord(t *testing.T) {
	bubble(t, func(g *rig) {
		g.appendTo(origin + mb - 3000)
		_, end := g.wal.Append(bytes.Repeat([]byte{7}, 50_000))
		g.publishTo(1, end-8)
		g.once()
		g.sleep(time.Second)
		g.wantFiles(g.name(1, 0)+".partial", g.name(1, 1)+".partial")
		g.cancel()
		g.wantEnded("")
		g.wantFiles(g.name(1, 0) + ".partial")
		g.publish(1)
		g.once()
		g.sleep(time.Second)
		g.wantArchived()
		g.wantFiles(g.name(1, 0), g.name(1, 1)+".partial")
		g.cancel()
		g.wantEnded("")
		g.closeOnce()
	})
}
