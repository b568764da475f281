package archive

import (
	"bytes"
	"errors"
	"math/rand/v2"
	"syscall"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// partialWAL is some WAL of a segment, and where it ends.
func partialWAL() (content []byte, end wal.LSN) {
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: crashIdentity.SystemID, Size: crashSegment, Start: crashBegin})
	for g.End() < crashBegin+300<<10 {
		g.Append(filler()[:5000])
	}
	return g.Bytes(crashBegin, g.End()), g.End()
}

// besideCompressed is a bound archive with a compressed partial file that is durable, and a plain one with the same of
// which nothing is synced but its size.
func besideCompressed(t *testing.T) (d *Dir, disk *memDisk, end wal.LSN) {
	t.Helper()
	content, end := partialWAL()
	disk = newMemDisk()
	d = &Dir{path: "archive", disk: disk}
	if err := d.Bind(crashIdentity, Origin{Timeline: 1, LSN: crashBegin, Source: "slot", Time: time.Unix(1e9, 0)}); err != nil {
		t.Fatal(err)
	}
	var packed bytes.Buffer
	z, err := compressTo(&packed, Compression{"gzip", 1})
	if err == nil {
		_, err = z.Write(content)
	}
	if err = errors.Join(err, z.Close()); err != nil {
		t.Fatal(err)
	}
	if err := storeFile(disk, packedSegment.Name()+".gz"+partialSuffix, packed.Bytes(), 0o600, disk.Rename); err != nil {
		t.Fatal(err)
	}
	f, err := createFile(disk, packedSegment.Name()+partialSuffix, int64(crashSegment), 0o600)
	if err == nil {
		_, err = f.WriteAt(content, 0)
	}
	if err = errors.Join(err, f.Close()); err != nil {
		t.Fatal(err)
	}
	return d, disk, end
}

// Whichever of the two is left after a power loss, or after a sync that failed, has all of it.
func TestCompressedPartialStaysUntilThePlainOneIsDurable(t *testing.T) {
	for seed := range uint64(100) {
		r := rand.New(rand.NewPCG(seed, 1))
		d, disk, end := besideCompressed(t)
		var after *memDisk
		disk.before = func(kind, name string) {
			if _, gone := disk.names[packedSegment.Name()+".gz"+partialSuffix]; !gone && after == nil {
				after = disk.crash(r)
			}
		}
		w, err := d.OpenWriter(t.Context(), crashIdentity, 1, crashBegin)
		if err != nil {
			t.Fatal(err)
		}
		w.Close()
		if after == nil {
			after = disk.crash(r)
		}
		next := &Dir{path: "archive", disk: after}
		if err := next.load(); err != nil {
			t.Fatal(err)
		}
		if w, err = next.OpenWriter(t.Context(), crashIdentity, 1, crashBegin); err != nil || w.Durable() != end {
			t.Fatalf("seed %d, after a power loss: %v, durable up to %s, want %s", seed, err, w.Durable(), end)
		}

		d, disk, end = besideCompressed(t)
		disk.faults = &memFaults{r: r, first: disk.ops + 1, last: disk.ops + 1, errno: syscall.EIO}
		for range 3 {
			if w, err = d.OpenWriter(t.Context(), crashIdentity, 1, crashBegin); err == nil {
				break
			}
		}
		if err != nil || w.Durable() != end {
			t.Fatalf("seed %d, after a failed sync: %v, want all up to %s", seed, err, end)
		}
	}
}

// What a run that synced nothing has sealed is durable before anything after it is acknowledged.
func TestWhatWasNotSyncedIsBeforeAnythingIsAcknowledged(t *testing.T) {
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: crashIdentity.SystemID, Size: crashSegment, Start: crashBegin})
	for g.End() < crashBegin+3*wal.LSN(crashSegment)-200<<10 {
		g.Append(filler()[:5000])
	}
	for seed := range uint64(50) {
		disk := newMemDisk()
		d := &Dir{path: "archive", disk: unsynced{disk}}
		if err := d.Bind(crashIdentity, Origin{Timeline: 1, LSN: crashBegin, Source: "slot", Time: time.Unix(1e9, 0)}); err != nil {
			t.Fatal(err)
		}
		archiveTo := func(d *Dir, end wal.LSN) wal.LSN {
			tail, ok, err := d.Tail(crashSegment)
			if err != nil {
				t.Fatal(err)
			}
			if !ok {
				tail = Tail{Timeline: 1, Start: crashBegin}
			}
			w, err := d.OpenWriter(t.Context(), crashIdentity, tail.Timeline, tail.Start)
			if err != nil {
				t.Fatal(err)
			}
			defer w.Close()
			for w.Pos() < end {
				if err := w.Write(w.Pos(), g.Bytes(w.Pos(), min(end, w.Pos()+100<<10))); err != nil {
					t.Fatal(err)
				}
			}
			if _, err := w.Flush(); err != nil {
				t.Fatal(err)
			}
			return w.Durable()
		}
		archiveTo(d, crashBegin+2*wal.LSN(crashSegment)+5000)
		d = &Dir{path: "archive", disk: disk}
		if err := d.load(); err != nil {
			t.Fatal(err)
		}
		durable := archiveTo(d, g.End())
		after := disk.crash(rand.New(rand.NewPCG(seed, 2)))
		for s := crashSegment.Segment(1, crashBegin); s.Start < durable; s = s.Next() {
			i := after.names[s.Name()]
			if i == nil {
				i = after.names[s.Name()+partialSuffix]
			}
			if i == nil || !has(i.cache, 0, g.Bytes(s.Start, min(s.End(), durable))) {
				t.Fatalf("seed %d: acknowledged up to %s, but %s was lost", seed, durable, s)
			}
		}
	}
}
