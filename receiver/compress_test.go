package receiver

import (
	"bytes"
	"context"
	"errors"
	"net"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"testing/synctest"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

// plain and packed are how many sealed segments of the archive are that.
func (g *rig) plainAndPacked() (plain, packed int) {
	for name := range g.files() {
		switch {
		case len(name) == 24:
			plain++
		case strings.HasSuffix(name, ".gz"), strings.HasSuffix(name, ".lz4"):
			packed++
		}
	}
	return plain, packed
}

func (g *rig) wantPacked(plain, packed int) {
	g.Helper()
	if a, b := g.plainAndPacked(); a != plain || b != packed {
		g.Errorf("%d segments are plain and %d compressed, want %d and %d", a, b, plain, packed)
	}
}

// The rig compares what compressed files have with the server's WAL, too.
func TestSealedSegmentsAreCompressed(t *testing.T) {
	for _, c := range []archive.Compression{{Method: "gzip", Level: 1}, {Method: "lz4", Level: 1}} {
		bubble(t, func(g *rig) {
			g.cfg.Compress = c
			g.start()
			g.appendTo(origin + 3*mb + 5000)
			g.sleep(time.Second)
			g.wantPacked(0, 3)
			g.wantArchived()
			if n := g.r.Status().SegmentsCompressed; n != 3 {
				t.Errorf("%d segments were compressed, by the status", n)
			}
			g.restart() // the last sealed one is needed for what comes after it, and is compressed
			g.appendTo(origin + 5*mb + 5000)
			g.sleep(time.Second)
			g.wantPacked(0, 5)
			g.wantArchived()
		})
	}
}

// Segments that an earlier process left plain are compressed, whether the server can be reached or not.
func TestCompressingCatchesUp(t *testing.T) {
	for _, away := range []bool{false, true} {
		bubble(t, func(g *rig) {
			g.start()
			g.appendTo(origin + 4*mb + 5000)
			g.sleep(time.Second)
			g.wantPacked(4, 0)
			g.stop()
			g.cfg.Compress = archive.Compression{Method: "lz4", Level: 1}
			if away {
				g.dial = func(context.Context, string, string) (net.Conn, error) { return nil, syscall.ECONNREFUSED }
			}
			g.start()
			g.sleep(time.Second)
			g.wantPacked(0, 4)
		})
	}
}

// What was compressed in another way, or was not, is archived on with.
func TestChangedCompressionLeavesOldFiles(t *testing.T) {
	bubble(t, func(g *rig) {
		end := origin
		for _, c := range []archive.Compression{{Method: "gzip", Level: 9}, {Method: "lz4", Level: 3}, {}} {
			g.cfg.Compress = c
			g.start()
			end += 2 * mb
			g.appendTo(end + 5000)
			g.sleep(time.Second)
			g.wantArchived()
			g.stop()
		}
		g.wantFiles(g.name(1, 0)+".gz", g.name(1, 1)+".gz", g.name(1, 2)+".lz4", g.name(1, 3)+".lz4", g.name(1, 4), g.name(1, 5), g.name(1, 6)+".partial")
	})
}

// A segment that cannot be compressed is told about once. It holds up neither the archiving nor the others.
func TestSegmentThatCannotBeCompressedHoldsUpNothing(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.appendTo(origin + 2*mb + 5000)
		g.sleep(time.Second)
		g.stop()
		foreign := []byte("not what it says")
		file := filepath.Join(g.cfg.Dir, g.name(1, 0)+".lz4")
		if err := os.WriteFile(file, foreign, 0o600); err != nil {
			t.Fatal(err)
		}
		g.cfg.Compress = archive.Compression{Method: "gzip", Level: 1}
		g.start()
		g.sleep(time.Second)
		g.appendTo(origin + 4*mb + 5000)
		g.sleep(10 * time.Minute)
		g.wantArchived()
		g.wantPacked(1, 4)
		if n := strings.Count(g.logs.String(), "not compressed"); n != 1 || !strings.Contains(g.logs.String(), "move the wrong one away") {
			t.Errorf("told %d times:\n%s", n, g.logs.last(10))
		}
		if have, err := os.ReadFile(file); !bytes.Equal(have, foreign) {
			t.Errorf("the foreign file is %q, %v", have, err)
		}
		if err := os.Remove(file); err != nil { // and the rig finds all of the others right
			t.Fatal(err)
		}
	})
}

// The room that min_free leaves is not for compressing either. It goes on by itself when there is more.
func TestCompressingWaitsForRoom(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.appendTo(origin + 2*mb + 5000)
		g.sleep(time.Second)
		g.stop()
		g.cfg.Compress = archive.Compression{Method: "gzip", Level: 1}
		g.cfg.MinFree = 10 * mb
		g.room.Store(12*mb - 1)
		g.start()
		g.sleep(time.Hour)
		g.wantPacked(2, 0)
		g.want(Streaming)
		g.room.Store(12 * mb)
		g.sleep(compressRetry)
		g.wantPacked(0, 2)
	})
}

// All receivers together compress no more than the process allows, and one that waits for its turn archives.
func TestCompressingIsBoundedOverAllReceivers(t *testing.T) {
	bubble(t, func(g *rig) {
		if !g.shared.compressors.TryAcquire(1) { // another receiver's
			t.Fatal("no turn")
		}
		g.cfg.Compress = archive.Compression{Method: "lz4", Level: 1}
		g.start()
		g.appendTo(origin + 2*mb + 5000)
		g.sleep(time.Hour)
		g.wantArchived()
		g.wantPacked(2, 0)
		g.shared.compressors.Release(1)
		g.sleep(time.Second)
		g.wantPacked(0, 2)
	})
}

// A receiver that stops does not wait for its turn, and nothing is compressed in a directory that it has let go of.
func TestStopEndsCompressing(t *testing.T) {
	bubble(t, func(g *rig) {
		g.shared.compressors.TryAcquire(1)
		g.cfg.Compress = archive.Compression{Method: "lz4", Level: 1}
		g.start()
		g.appendTo(origin + 2*mb + 5000)
		g.sleep(time.Second)
		g.stop()
		g.shared.compressors.Release(1)
		synctest.Wait()
		g.wantPacked(2, 0)
	})
}

// A segment is compressed by whoever ran one connection at a time, in the end.
func TestCompressSealedCompressesAllThatIsSealed(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Compress = archive.Compression{Method: "lz4", Level: 1}
		g.appendTo(origin + 3*mb + 5000)
		g.make()
		ctx, cancel := context.WithCancel(g.Context())
		ended := make(chan error, 1)
		go func() { ended <- g.r.RunOnce(ctx) }()
		g.sleep(time.Millisecond)
		cancel()
		if err := <-ended; err != nil {
			t.Fatal(err)
		}
		if err := g.r.CompressSealed(g.Context()); err != nil {
			t.Fatal(err)
		}
		g.wantPacked(0, 3)
		if err := g.r.Close(); err != nil {
			t.Fatal(err)
		}
	})
}

// Compressing ends before an archive is let go of, which a person then may change.
func TestHaltedReceiverDoesNotCompress(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Compress = archive.Compression{Method: "lz4", Level: 1}
		g.start()
		g.appendTo(origin + 2*mb + 5000)
		g.sleep(time.Second)
		g.wantPacked(0, 2)
		foreign := filepath.Join(g.cfg.Dir, g.name(1, 3))
		if err := os.WriteFile(foreign, []byte("not ours"), 0o600); err != nil {
			t.Fatal(err)
		}
		g.appendTo(origin + 3*mb + 5000)
		g.sleep(time.Second)
		g.want(Halted)
		if g.r.compressing != nil {
			t.Error("it still compresses")
		}
		if err := os.Remove(foreign); err != nil {
			t.Fatal(err)
		}
	})
}

// plainArchive has n plain segments, and a server that refuses connections, so that a receiver only compresses.
func (g *rig) plainArchive(n int) {
	g.Helper()
	g.start()
	g.appendTo(origin + wal.LSN(n)*mb + 5000)
	g.sleep(time.Second)
	g.wantPacked(n, 0)
	g.stop()
	g.dial = func(context.Context, string, string) (net.Conn, error) { return nil, syscall.ECONNREFUSED }
	g.cfg.Compress = archive.Compression{Method: "lz4", Level: 1}
}

// Nobody else may have the directory while a segment is still being compressed in it.
func TestStopWaitsForCompressing(t *testing.T) {
	bubble(t, func(g *rig) {
		g.plainArchive(1)
		g.make()
		held := make(chan struct{})
		g.r.free = func() (int64, error) { <-held; return 1 << 40, nil }
		g.run(g.r.Run)
		g.sleep(time.Second)
		g.cancel()
		synctest.Wait()
		select {
		case <-g.ended:
			t.Fatal("Run has returned, and its compressing goes on")
		default:
		}
		if _, err := archive.Open(g.cfg.Dir); !errors.Is(err, archive.ErrLocked) {
			t.Errorf("the directory can be opened: %v", err)
		}
		close(held)
		g.stop()
		g.wantPacked(1, 0)
	})
}

// To find out again and again that two files differ is work for nothing.
func TestSegmentThatNeedsAPersonIsNotTriedAgain(t *testing.T) {
	bubble(t, func(g *rig) {
		g.plainArchive(2)
		file := filepath.Join(g.cfg.Dir, g.name(1, 0)+".lz4")
		if err := os.WriteFile(file, []byte("not what it says"), 0o600); err != nil {
			t.Fatal(err)
		}
		g.make()
		tries := 0
		g.r.free = func() (int64, error) { tries++; return 1 << 40, nil }
		g.run(g.r.Run)
		g.sleep(time.Hour)
		if tries != 2 {
			t.Errorf("2 segments were tried %d times", tries)
		}
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	})
}

// What is not received yet is only on the server, so that comes first.
func TestCompressingWaitsWhileTheReceiverCatchesUp(t *testing.T) {
	bubble(t, func(g *rig) {
		g.cfg.Compress = archive.Compression{Method: "lz4", Level: 1}
		g.appendTo(origin + 3*mb + 5000)
		g.serve(trickle(g.wal, 100<<10, time.Second))
		g.start()
		g.sleep(15 * time.Second)
		g.want(CatchingUp)
		g.wantPacked(1, 0)
		g.sleep(time.Minute)
		g.want(Streaming)
		g.wantPacked(0, 3)
	})
}

// Where there is no room to archive, compressing makes some.
func TestCompressingMakesRoomForABlockedReceiver(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.appendTo(origin + 2*mb + 5000)
		g.sleep(time.Second)
		g.stop()
		g.cfg.Compress = archive.Compression{Method: "gzip", Level: 1}
		g.cfg.MinFree = 10 * mb
		g.room.Store(5 * mb)
		g.start()
		g.sleep(2 * compressRetry)
		g.want(Blocked)
		g.wantPacked(0, 2)
	})
}

// A segment that fails is tried again after a while, and not whenever another one is sealed: that could be a gigabyte
// to read each time.
func TestFailedCompressionIsTriedAgainAfterAWhile(t *testing.T) {
	bubble(t, func(g *rig) {
		g.start()
		g.appendTo(origin + mb + 5000)
		g.sleep(time.Second)
		g.stop()
		inTheWay := filepath.Join(g.cfg.Dir, g.name(1, 0)+".gz") // no error about what a file has
		if err := os.Mkdir(inTheWay, 0o700); err != nil {
			t.Fatal(err)
		}
		g.cfg.Compress = archive.Compression{Method: "gzip", Level: 1}
		g.start()
		g.sleep(10 * time.Second)
		g.appendTo(origin + 2*mb + 5000)
		g.sleep(time.Second)
		g.wantPacked(1, 1)
		g.sleep(3 * compressRetry)
		g.wantPacked(1, 1)
		if n := strings.Count(g.logs.String(), "not compressed"); n != 1 {
			t.Errorf("told %d times:\n%s", n, g.logs.last(10))
		}
		if err := os.Remove(inTheWay); err != nil {
			t.Fatal(err)
		}
		g.appendTo(origin + 3*mb + 5000)
		g.sleep(time.Second)
		g.wantPacked(1, 2)
		g.sleep(compressRetry)
		g.wantPacked(0, 3)
	})
}
