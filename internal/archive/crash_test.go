package archive

import (
	"fmt"
	"math/rand/v2"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync/atomic"
	"testing"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

// fromEnvironment is a number that an environment variable can change.
func fromEnvironment(t *testing.T, name string, otherwise int64) int64 {
	t.Helper()
	text := os.Getenv(name)
	if text == "" {
		return otherwise
	}
	n, err := strconv.ParseInt(text, 10, 64)
	if err != nil {
		t.Fatalf("%s: %v", name, err)
	}
	return n
}

// crashed is what a disk panics with when a process is to end in the middle of an operation.
type crashed struct{}

// newRun is a run of a plan on an empty disk.
func newRun(p *plan) (*run, error) {
	v := &run{plan: p, r: rand.New(rand.NewPCG(p.seed, 'r')), disk: newMemDisk()}
	v.disk.links = p.links
	if p.existing {
		return v, v.place()
	}
	return v, nil
}

// forked is a process that starts on the given disk, with the server where it is now.
func (v *run) forked(r *rand.Rand, disk *memDisk) *run {
	return &run{plan: v.plan, r: r, disk: disk, made: v.made.clone(), epoch: min(v.epoch, len(v.epochs)-1), calm: true}
}

// afterwards ends the process, by a power loss or by kill -9, checks what is left, and goes on to the plan's end; in
// some cases through more of the same. It returns the number of crashes.
func (v *run) afterwards(r *rand.Rand, kill bool) (int64, error) {
	disk := v.disk.clone()
	if !kill {
		disk = v.disk.crash(r)
	}
	next := v.forked(r, disk)
	if err := next.checkDisk(); err != nil {
		return 1, err
	}
	again := 0
	if n := r.IntN(4); n == 0 || n == 1 && kill {
		again = 1 + r.IntN(60)
	}
	if ended, err := next.finishOrCrash(again); ended || err != nil {
		return 1, err
	}
	n, err := next.afterwards(r, r.IntN(3) == 0)
	if err != nil {
		err = fmt.Errorf("and again at the operation %d after that: %w", again, err)
	}
	return n + 1, err
}

// finishOrCrash is finish, unless the disk stops at its operation number at.
func (v *run) finishOrCrash(at int) (ended bool, err error) {
	v.disk.before = func(string, string) {
		if v.disk.ops == at {
			panic(crashed{})
		}
	}
	defer func() {
		p := recover()
		if _, ok := p.(crashed); ok {
			ended = false
		} else if p != nil {
			panic(p)
		}
	}()
	return true, v.finish()
}

// A process can end at any operation, and the machine with it. What was acknowledged before is never lost, nothing has
// a name that it does not deserve, and the archive goes on from there to the same end.
//
// WALFLEET_CRASH_POINTS is the number of crashes, WALFLEET_CRASH_SEED the first seed; WALFLEET_CRASH_REPLAY has a
// failure's name, such as 17/203/1, which is all that is run then.
func TestNothingIsLostInACrashAtAnyOperation(t *testing.T) {
	only := replayed(t)
	want := fromEnvironment(t, "WALFLEET_CRASH_POINTS", 10000)
	var crashes, operations atomic.Int64
	plans := forPlans(t, only, func(t *testing.T, p *plan) bool {
		crashEverywhere(t, p, &operations, &crashes, func(op, variant int) bool {
			return crashes.Load() < want && (only == nil || only[1] == int64(op) && only[2] == int64(variant))
		})
		return crashes.Load() < want
	})
	t.Logf("%d crashes at %d operations of %d histories", crashes.Load(), operations.Load(), plans)
}

// replayed is the failure that is to be run again; nil: none.
func replayed(t *testing.T) []int64 {
	t.Helper()
	text := os.Getenv("WALFLEET_CRASH_REPLAY")
	if text == "" {
		return nil
	}
	only := make([]int64, 3)
	if _, err := fmt.Sscanf(text, "%d/%d/%d", &only[0], &only[1], &only[2]); err != nil {
		t.Fatalf("WALFLEET_CRASH_REPLAY: %v", err)
	}
	return only
}

// forPlans calls do with one plan after the other, on all processors, until it returns false or fails. It returns the
// number of plans.
func forPlans(t *testing.T, only []int64, do func(t *testing.T, p *plan) bool) int64 {
	t.Helper()
	workers := runtime.GOMAXPROCS(0)
	first := fromEnvironment(t, "WALFLEET_CRASH_SEED", 1)
	if only != nil {
		workers, first = 1, only[0]
	}
	var plans atomic.Int64
	t.Run("worker", func(t *testing.T) {
		for worker := range workers {
			t.Run(strconv.Itoa(worker), func(t *testing.T) {
				t.Parallel()
				for {
					n := plans.Add(1)
					if !do(t, newPlan(uint64(first+n-1))) || only != nil {
						return
					}
				}
			})
		}
	})
	return plans.Load()
}

// crashEverywhere runs a plan, and ahead of each operation lets a copy crash in several ways.
func crashEverywhere(t *testing.T, p *plan, operations, crashes *atomic.Int64, chosen func(op, variant int) bool) {
	t.Helper()
	v, err := newRun(p)
	if err != nil {
		t.Fatal(err)
	}
	crash := func() {
		if p.existing && !v.made.bound {
			return // what another program left is not ours to keep
		}
		for variant := range 3 {
			if !chosen(v.disk.ops, variant) {
				continue
			}
			if variant == 0 {
				operations.Add(1)
			}
			r := rand.New(rand.NewPCG(p.seed, uint64(v.disk.ops)<<8|uint64(variant)))
			n, err := v.afterwards(r, variant == 1 && v.disk.ops%2 == 0)
			crashes.Add(n)
			if err != nil {
				t.Fatalf("WALFLEET_CRASH_REPLAY=%d/%d/%d: after a crash in epoch %d: %v", p.seed, v.disk.ops, variant, v.epoch, err)
			}
		}
	}
	v.disk.before = func(string, string) { crash() }
	if err := v.finish(); err != nil {
		t.Fatalf("seed %d, without a crash, operation %d: %v", p.seed, v.disk.ops, err)
	}
	crash()
}

// Any operation can fail: the disk is full, broken, or read-only for a while. What is acknowledged after that is on the
// disk (every acknowledgement is checked against it), although the page cache lies about a file whose sync failed, and
// once the disk works again the archive goes on to the same end. A tenth of WALFLEET_CRASH_POINTS is the number of runs.
func TestNothingIsAcknowledgedThatAFailingDiskDoesNotHave(t *testing.T) {
	only := replayed(t)
	want := fromEnvironment(t, "WALFLEET_CRASH_POINTS", 10000) / 10
	var runs, failed atomic.Int64
	plans := forPlans(t, only, func(t *testing.T, p *plan) bool {
		if p.existing {
			return true // a sync of another program's files that fails: nothing can tell what they should have
		}
		v, err := newRun(p)
		if err == nil {
			err = v.finish()
		}
		if err != nil {
			t.Fatalf("seed %d, without a fault: %v", p.seed, err)
		}
		for op, n := 1, v.disk.ops; op <= n && runs.Load() < want; op++ {
			if only != nil && only[1] != int64(op) {
				continue
			}
			v, err := newRun(p)
			if err != nil {
				t.Fatal(err)
			}
			r := rand.New(rand.NewPCG(p.seed, uint64(op)))
			f := &memFaults{r: r, first: op, last: op + []int{0, 0, 0, 1, 3, 9}[r.IntN(6)], errno: faultErrnos[r.IntN(4)]}
			v.disk.faults = f
			err = v.finish()
			runs.Add(1)
			failed.Add(int64(f.hit))
			if err != nil {
				t.Fatalf("WALFLEET_CRASH_REPLAY=%d/%d/0: with %v in the operations from %d to %d: %v", p.seed, op, f.errno, f.first, f.last, err)
			}
			if f.hit == 0 {
				t.Fatalf("seed %d, operation %d: nothing failed", p.seed, op)
			}
			if _, err := v.afterwards(r, false); err != nil {
				t.Fatalf("WALFLEET_CRASH_REPLAY=%d/%d/0: with %v in the operations from %d to %d, and a power loss in the end: %v", p.seed, op, f.errno, f.first, f.last, err)
			}
		}
		return runs.Load() < want
	})
	t.Logf("%d runs of %d histories, %d operations failed", runs.Load(), plans, failed.Load())
}

// A complete segment is synced as a whole before it has that name, and its name before anyone hears of it: a test of
// the order, for where the model above is kinder than a real disk.
func TestSealingIsSyncRenameSync(t *testing.T) {
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: crashIdentity.SystemID, Size: crashSegment, Start: crashBegin})
	g.FillTo(crashBegin + wal.LSN(crashSegment))
	disk := newMemDisk()
	d := &Dir{path: "archive", disk: disk}
	w, err := d.OpenWriter(t.Context(), crashIdentity, 1, crashBegin)
	if err != nil {
		t.Fatal(err)
	}
	if err := w.Write(w.Pos(), g.Bytes(w.Pos(), g.End())); err != nil {
		t.Fatal(err)
	}
	var got []string
	disk.before = func(kind, name string) {
		got = append(got, kind+" "+strings.TrimSuffix(name, tempSuffix)) // the file's name when it was opened
	}
	sealed, err := w.Flush()
	if err != nil || len(sealed) != 1 {
		t.Fatalf("sealed %v, %v", sealed, err)
	}
	partial := sealed[0].Name() + partialSuffix
	want := []string{"datasync " + partial, "sync " + partial, "rename " + partial, "sync ."}
	if !slices.Equal(got, want) {
		t.Errorf("operations %q, want %q", got, want)
	}
	if err := w.Close(); err != nil {
		t.Fatal(err)
	}
}
