package archive

import (
	"errors"
	"fmt"
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
	if err := storeFile(disk, packedSegment.Name()+".gz"+partialSuffix, pack(Compression{"gzip", 1}, content), 0o600, disk.Rename); err != nil {
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

// crashAnywhere opens the Writer on what archive makes, and loses power at each operation of that, in several ways. What
// is left is opened again, and judged.
func crashAnywhere(t *testing.T, archive func() *memDisk, start wal.LSN, judge func(d *Dir, w *Writer) error) {
	t.Helper()
	crashes := 0
	for op, more := 1, true; more; op++ {
		for seed := range uint64(20) {
			disk := archive()
			r := rand.New(rand.NewPCG(seed, uint64(op)))
			first := disk.ops
			var after *memDisk
			disk.before = func(string, string) {
				if disk.ops == first+op {
					after = disk.crash(r)
				}
			}
			d := &Dir{path: "archive", disk: disk}
			if err := d.load(); err != nil {
				t.Fatal(err)
			}
			w, err := d.OpenWriter(t.Context(), crashIdentity, 1, start)
			if err != nil {
				t.Fatal(err)
			}
			if err := judge(d, w); err != nil {
				t.Fatalf("without a crash: %v", err)
			}
			w.Close()
			if more = after != nil; !more {
				break
			}
			crashes++
			d = &Dir{path: "archive", disk: after}
			if err := d.load(); err != nil {
				t.Fatal(err)
			}
			if w, err = d.OpenWriter(t.Context(), crashIdentity, 1, start); err == nil {
				err = judge(d, w)
			}
			if err != nil {
				t.Fatalf("seed %d, a crash at operation %d: %v", seed, op, err)
			}
			w.Close()
		}
	}
	if crashes == 0 {
		t.Error("there were no operations to crash at")
	}
}

// A take-over of what pg_receivewal has compressed can end at any operation.
func TestTakingOverIsSafeInACrashAnywhere(t *testing.T) {
	content, end := partialWAL()
	for _, plain := range []int{0, 100 << 10, len(content)} {
		crashAnywhere(t, func() *memDisk {
			disk := newMemDisk()
			d := &Dir{path: "archive", disk: disk}
			err := d.Bind(crashIdentity, Origin{Timeline: 1, LSN: crashBegin, Source: "slot", Time: time.Unix(1e9, 0)})
			if plain > 0 {
				f, ferr := createFile(disk, packedSegment.Name()+partialSuffix, int64(crashSegment), 0o600)
				if ferr != nil {
					t.Fatal(ferr)
				}
				_, ferr = f.WriteAt(content[:plain], 0)
				err = errors.Join(err, ferr, f.Sync(), f.Close())
			}
			err = errors.Join(err, storeFile(disk, packedSegment.Name()+".lz4"+partialSuffix, pack(Compression{"lz4", 1}, content), 0o600, disk.Rename))
			if err != nil {
				t.Fatal(err)
			}
			return disk
		}, crashBegin, func(d *Dir, w *Writer) error {
			if w.Durable() != end {
				return fmt.Errorf("durable up to %s, want %s", w.Durable(), end)
			}
			if have := names(d.disk); have != packedSegment.Name()+partialSuffix+" "+metaName {
				return fmt.Errorf("there are %s", have)
			}
			return nil
		})
	}
}

// What is sealed because of what came after it can end in a crash at any operation, too.
func TestSealingWhatWasLeftIsSafeInACrashAnywhere(t *testing.T) {
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: crashIdentity.SystemID, Size: crashSegment, Start: crashBegin})
	g.FillTo(crashBegin + wal.LSN(crashSegment) - 20<<10)
	g.Append(filler()[:crashSegment]) // into the third segment
	g.FillTo(crashBegin + 3*wal.LSN(crashSegment))
	segments := []wal.Segment{packedSegment, packedSegment.Next(), packedSegment.Next().Next()}
	content := func(s wal.Segment) []byte { return g.Bytes(s.Start, s.End()) }
	crashAnywhere(t, func() *memDisk {
		disk := newMemDisk()
		d := &Dir{path: "archive", disk: disk}
		err := d.Bind(crashIdentity, Origin{Timeline: 1, LSN: crashBegin, Source: "slot", Time: time.Unix(1e9, 0)})
		for i, s := range segments {
			name := s.Name()
			if i < 2 {
				name += partialSuffix
			}
			err = errors.Join(err, storeFile(disk, name, content(s), 0o600, disk.Rename))
		}
		if err != nil {
			t.Fatal(err)
		}
		return disk
	}, g.End(), func(d *Dir, w *Writer) error {
		disk := d.disk.(*memDisk)
		for _, s := range segments {
			if i := disk.durable[s.Name()]; i == nil || !has(i.disk, 0, content(s)) {
				return fmt.Errorf("%s is not sealed, or not what the server has: there are %s", s, names(disk))
			}
		}
		return nil
	})
}

// A sync that failed may have lost what the page cache still shows, and the next one succeeds. Nothing is sealed on the
// page cache's word.
func TestWhatWasLeftIsNotSealedFromALyingPageCache(t *testing.T) {
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: crashIdentity.SystemID, Size: crashSegment, Start: crashBegin})
	g.FillTo(crashBegin + wal.LSN(crashSegment) - 20<<10)
	g.Append(filler()[:100<<10])
	g.FillTo(crashBegin + 2*wal.LSN(crashSegment))
	next := packedSegment.Next()
	lies := 0
	for seed := range uint64(30) {
		disk := newMemDisk()
		d := &Dir{path: "archive", disk: disk}
		if err := d.Bind(crashIdentity, Origin{Timeline: 1, LSN: crashBegin, Source: "slot", Time: time.Unix(1e9, 0)}); err != nil {
			t.Fatal(err)
		}
		if err := storeFile(disk, next.Name(), g.Bytes(next.Start, next.End()), 0o600, disk.Rename); err != nil {
			t.Fatal(err)
		}
		f, err := createFile(disk, packedSegment.Name()+partialSuffix, int64(crashSegment), 0o600)
		if err == nil {
			_, err = f.WriteAt(g.Bytes(packedSegment.Start, packedSegment.End()), 0)
		}
		if err = errors.Join(err, f.Close()); err != nil {
			t.Fatal(err)
		}
		disk.faults = &memFaults{r: rand.New(rand.NewPCG(seed, 3)), first: disk.ops + 1, last: disk.ops + 1, errno: syscall.EIO}
		if err := d.load(); err == nil || disk.faults.hit != 1 {
			t.Fatalf("%v, %d operations failed", err, disk.faults.hit)
		}
		if err := d.load(); err != nil {
			t.Fatal(err)
		}
		w, err := d.OpenWriter(t.Context(), crashIdentity, 1, g.End())
		if err == nil {
			w.Close()
		} else {
			lies++
		}
		if i := disk.durable[packedSegment.Name()]; (i != nil) != (err == nil) || i != nil && !has(i.disk, 0, g.Bytes(packedSegment.Start, packedSegment.End())) {
			t.Fatalf("seed %d: %v; sealed: %v, and it is not what the server has", seed, err, i != nil)
		}
	}
	if lies == 0 {
		t.Error("the page cache never lied")
	}
}
