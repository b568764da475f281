package archive

import (
	"encoding/binary"
	"errors"
	"io"
	"io/fs"
	"maps"
	"math/rand/v2"
	"slices"
	"syscall"
	"testing"
)

// memDisk is a disk in memory that knows what of it is durable, and what a power loss could leave of the rest. It
// promises as little as POSIX and file systems with a journal do:
//
//   - what was written may be lost until the file is synced, page by page and in any order, torn between sectors;
//   - SyncData does not keep a size, Sync no name, and the directory's Sync no content;
//   - names change in the order of the operations, as with a journal, or in any order (one rename stays one step).
//
// A clone of it is cheap: pages are never changed once they are stored.
type memDisk struct {
	names   map[string]*inode // as they are seen
	durable map[string]*inode // as the last Sync left them
	pending []nameOp          // what leads from durable to names
	links   bool              // Rename has to be a link and a removal
	open    int               // files that are open

	ops    int                     // operations that change something, so far
	before func(kind, name string) // called ahead of each of them
	faults *memFaults              // nil: all goes well
}

const (
	memPage   = 4096
	memSector = 512
)

type page [memPage]byte

// inode is a file's content. A page that is nil, or beyond the slice, reads as zeros.
type inode struct {
	disk       []*page         // what a power loss leaves
	cache      []*page         // what reads show
	dirty      map[int][]*page // what was in the cache since the last sync, by page, oldest first
	size       int64
	syncedSize int64
	sizes      []int64 // since the last Sync
	synced     bool    // ever
}

// nameOp is one step of names: a creation or a link (from is empty), a removal (to is empty), or a rename.
type nameOp struct {
	ino      *inode
	from, to string
	second   bool // of two steps that a journal keeps in order: not without the first
}

func (o nameOp) apply(names map[string]*inode) {
	if o.from != "" && names[o.from] == o.ino {
		delete(names, o.from)
	}
	if o.to != "" {
		names[o.to] = o.ino
	}
}

func newMemDisk() *memDisk {
	return &memDisk{names: map[string]*inode{}, durable: map[string]*inode{}}
}

// clone is a copy, without the hooks and the open files: what a process finds that is started after this one was
// killed.
func (d *memDisk) clone() *memDisk {
	copies := map[*inode]*inode{}
	of := func(i *inode) *inode {
		if copies[i] == nil {
			copies[i] = i.clone()
		}
		return copies[i]
	}
	c := newMemDisk()
	c.links = d.links
	for name, i := range d.names {
		c.names[name] = of(i)
	}
	for name, i := range d.durable {
		c.durable[name] = of(i)
	}
	for _, o := range d.pending {
		o.ino = of(o.ino)
		c.pending = append(c.pending, o)
	}
	return c
}

func (i *inode) clone() *inode {
	c := *i
	c.disk, c.cache, c.sizes = slices.Clone(i.disk), slices.Clone(i.cache), slices.Clone(i.sizes)
	c.dirty = make(map[int][]*page, len(i.dirty))
	for k, versions := range i.dirty {
		c.dirty[k] = slices.Clip(versions)
	}
	return &c
}

// loss says how much of what was not synced a power loss takes: all of it, nothing, or something between.
type loss float64

func chooseLoss(r *rand.Rand) loss { return []loss{1, 1, 0, 0.05, 0.5, 0.95}[r.IntN(6)] }

func (l loss) takes(r *rand.Rand) bool { return r.Float64() < float64(l) }

// crash is the disk after a power loss.
func (d *memDisk) crash(r *rand.Rand) *memDisk {
	c := newMemDisk()
	c.links = d.links
	left := maps.Clone(d.durable)
	for _, o := range d.survivors(r) {
		o.apply(left)
	}
	copies := map[*inode]*inode{}
	l := chooseLoss(r)
	for _, name := range slices.Sorted(maps.Keys(left)) {
		i := left[name]
		if copies[i] == nil {
			copies[i] = i.crash(r, l)
		}
		c.names[name] = copies[i]
	}
	c.durable = maps.Clone(c.names)
	return c
}

// survivors chooses which of the pending steps a power loss leaves: the first ones, or (rarely) any.
func (d *memDisk) survivors(r *rand.Rand) []nameOp {
	switch n := len(d.pending); r.IntN(4) {
	case 0:
		return nil
	case 1:
		return d.pending
	case 2:
		return d.pending[:r.IntN(n+1)]
	}
	var some []nameOp
	kept := false
	for _, o := range d.pending {
		kept = r.IntN(2) == 0 && (kept || !o.second)
		if kept {
			some = append(some, o)
		}
	}
	return some
}

// crash is what a power loss leaves of a file. Only in a file that was never synced can there be what was on the
// disk before.
func (i *inode) crash(r *rand.Rand, l loss) *inode {
	c := &inode{size: i.syncedSize, synced: true, dirty: map[int][]*page{}}
	if n := len(i.sizes); n > 0 && !l.takes(r) {
		switch r.IntN(3) {
		case 0:
			c.size = i.sizes[r.IntN(n)]
		case 1:
			c.size = max(min(i.syncedSize, slices.Min(i.sizes)), r.Int64N(i.size/memPage+1)*memPage)
		default:
			c.size = i.size
		}
	}
	c.syncedSize = c.size
	c.cache = make([]*page, (c.size+memPage-1)/memPage)
	copy(c.cache, i.disk)
	garbage := !i.synced && r.IntN(8) == 0
	for _, k := range slices.Sorted(maps.Keys(i.dirty)) {
		switch {
		case k >= len(c.cache):
		case garbage:
			c.cache[k] = new(page)
			for b := range c.cache[k] {
				c.cache[k][b] = byte(r.Uint32())
			}
		case !l.takes(r):
			c.cache[k] = torn(r, c.cache[k], i.dirty[k])
		}
	}
	c.disk = slices.Clone(c.cache)
	return c
}

// torn is what can be on the disk of a page that was written several times: one of its contents, or sectors of
// several.
func torn(r *rand.Rand, old *page, versions []*page) *page {
	any := func() *page {
		if n := r.IntN(len(versions) + 1); n < len(versions) {
			return versions[n]
		}
		return old
	}
	switch r.IntN(4) {
	case 0:
		return any()
	case 1:
		mixed := new(page)
		for s := 0; s < memPage; s += memSector {
			if p := any(); p != nil {
				copy(mixed[s:s+memSector], p[s:])
			}
		}
		return mixed
	}
	return versions[len(versions)-1]
}

// memFaults lets operations fail: those numbered from first to last. Names, and reading, do not fail.
type memFaults struct {
	r           *rand.Rand
	first, last int
	errno       syscall.Errno
	hit         int // operations that failed
}

var faultErrnos = []syscall.Errno{syscall.ENOSPC, syscall.EDQUOT, syscall.EIO, syscall.EROFS}

// op stands ahead of every operation that changes something.
func (d *memDisk) op(kind, name string) error {
	d.ops++
	if d.before != nil {
		d.before(kind, name)
	}
	if f := d.faults; f != nil && f.first <= d.ops && d.ops <= f.last {
		f.hit++
		return &fs.PathError{Op: kind, Path: name, Err: f.errno}
	}
	return nil
}

func (d *memDisk) step(o nameOp) {
	o.apply(d.names)
	d.pending = append(d.pending, o)
}

func (d *memDisk) Names() ([]string, error) { return slices.Sorted(maps.Keys(d.names)), nil }

// SyncAll syncs every file, then the names.
func (d *memDisk) SyncAll() error {
	for _, name := range slices.Sorted(maps.Keys(d.names)) {
		if i := d.names[name]; len(i.dirty) > 0 || i.syncedSize != i.size || !i.synced {
			if err := (&memFile{inode: i, d: d, name: name}).Sync(); err != nil {
				return err
			}
		}
	}
	if len(d.pending) > 0 {
		return d.Sync()
	}
	return nil
}

func (d *memDisk) Free() (int64, error) { return 1 << 40, nil }

func (d *memDisk) Open(name string) (file, error) {
	i := d.names[name]
	if i == nil {
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	d.open++
	return &memFile{inode: i, d: d, name: name}, nil
}

func (d *memDisk) OpenWrite(name string) (file, error) { return d.Open(name) }

func (d *memDisk) Create(name string, _ fs.FileMode) (file, error) {
	if err := d.op("create", name); err != nil {
		return nil, err
	}
	if i := d.names[name]; i != nil {
		i.truncate()
	} else {
		d.step(nameOp{ino: &inode{dirty: map[int][]*page{}}, to: name})
	}
	return d.Open(name)
}

func (d *memDisk) Rename(from, to string) error {
	if err := d.op("rename", from); err != nil {
		return err
	}
	i := d.names[from]
	if i == nil {
		return &fs.PathError{Op: "rename", Path: from, Err: fs.ErrNotExist}
	}
	if d.names[to] != nil {
		return &fs.PathError{Op: "rename", Path: to, Err: fs.ErrExist}
	}
	if !d.links {
		d.step(nameOp{ino: i, from: from, to: to})
		return nil
	}
	d.step(nameOp{ino: i, to: to})
	if err := d.op("remove", from); err != nil {
		return err
	}
	d.step(nameOp{ino: i, from: from, second: true})
	return nil
}

func (d *memDisk) Replace(from, to string) error {
	if err := d.op("replace", from); err != nil {
		return err
	}
	if d.names[from] == nil {
		return &fs.PathError{Op: "replace", Path: from, Err: fs.ErrNotExist}
	}
	d.step(nameOp{ino: d.names[from], from: from, to: to})
	return nil
}

func (d *memDisk) Remove(name string) error {
	if err := d.op("remove", name); err != nil {
		return err
	}
	if d.names[name] == nil {
		return &fs.PathError{Op: "remove", Path: name, Err: fs.ErrNotExist}
	}
	d.step(nameOp{ino: d.names[name], from: name})
	return nil
}

func (d *memDisk) Same(a, b string) bool { return d.names[a] != nil && d.names[a] == d.names[b] }

func (d *memDisk) Sync() error {
	n := len(d.pending)
	err := d.op("sync", ".")
	if err != nil {
		n = d.faults.r.IntN(n + 1)
	}
	for _, o := range d.pending[:n] {
		o.apply(d.durable)
	}
	d.pending = slices.Clone(d.pending[n:])
	return err
}

// memFile is a file that is open.
type memFile struct {
	*inode
	d      *memDisk
	name   string
	closed bool
}

func (f *memFile) Close() error {
	if f.closed {
		return &fs.PathError{Op: "close", Path: f.name, Err: fs.ErrClosed}
	}
	f.closed = true
	f.d.open--
	return nil
}

func (f *memFile) Size() (int64, error) { return f.size, nil }

func (f *memFile) ReadAt(p []byte, off int64) (int, error) {
	if off >= f.size {
		return 0, io.EOF
	}
	n := int(min(int64(len(p)), f.size-off))
	for at := 0; at < n; {
		k, in := (off+int64(at))/memPage, (off+int64(at))%memPage
		m := min(n-at, memPage-int(in))
		if f.cache[k] != nil {
			move(p[at:at+m], f.cache[k][in:])
		} else {
			clear(p[at : at+m])
		}
		at += m
	}
	if n < len(p) {
		return n, io.EOF
	}
	return n, nil
}

func (f *memFile) WriteAt(p []byte, off int64) (int, error) {
	err := f.d.op("write", f.name)
	if err != nil {
		p = p[:f.d.faults.r.IntN(len(p)+1)]
	}
	if end := off + int64(len(p)); end > f.size {
		f.resize(end)
	}
	n := len(p)
	for len(p) > 0 {
		k, in := int(off/memPage), off%memPage
		c := new(page)
		if old := f.cache[k]; old != nil && (in > 0 || len(p) < memPage) {
			move(c[:], old[:])
		}
		m := move(c[in:], p)
		f.cache[k] = c
		f.dirty[k] = append(f.dirty[k], c)
		p, off = p[m:], off+int64(m)
	}
	return n, err
}

// resize changes the size. What is new reads as zeros.
func (i *inode) resize(size int64) {
	i.size = size
	i.sizes = append(i.sizes, size)
	for int64(len(i.cache))*memPage < size {
		i.cache = append(i.cache, nil)
	}
}

func (i *inode) truncate() {
	for k, p := range i.cache {
		if p != nil {
			i.dirty[k] = append(i.dirty[k], nil)
		}
	}
	clear(i.cache)
	i.cache = i.cache[:0]
	i.resize(0)
}

func (f *memFile) Allocate(size int64) error {
	err := f.d.op("allocate", f.name)
	if err != nil {
		size = f.d.faults.r.Int64N(size + 1)
	}
	f.resize(max(f.size, size))
	return err
}

func (f *memFile) Sync() error {
	if err := f.sync("sync"); err != nil {
		return err
	}
	f.syncedSize, f.sizes, f.synced = f.size, nil, true
	return nil
}

func (f *memFile) SyncData() error { return f.sync("datasync") }

// sync, when it fails, may have lost any of the pages and still count them as clean: they can be read as long as
// they are in the cache, and the next sync has nothing to do. Other file systems keep them dirty.
func (f *memFile) sync(kind string) error {
	err := f.d.op(kind, f.name)
	for int64(len(f.disk)) < int64(len(f.cache)) {
		f.disk = append(f.disk, nil)
	}
	var l loss
	gate := true
	if err != nil {
		l, gate = chooseLoss(f.d.faults.r), f.d.faults.r.IntN(4) > 0
	}
	for _, k := range slices.Sorted(maps.Keys(f.dirty)) {
		if l > 0 && l.takes(f.d.faults.r) {
			if gate {
				delete(f.dirty, k)
			}
			continue
		}
		if k < len(f.cache) {
			f.disk[k] = f.cache[k]
		} else if k < len(f.disk) {
			f.disk[k] = nil
		}
		delete(f.dirty, k)
	}
	return err
}

func (f *memFile) DropCache() error {
	for k := range f.cache {
		if len(f.dirty[k]) == 0 {
			f.cache[k] = nil
			if k < len(f.disk) {
				f.cache[k] = f.disk[k]
			}
		}
	}
	return nil
}

// WriteBack, when it fails, has lost pages that the next sync knows nothing of, like a sync that fails.
func (f *memFile) WriteBack(int64, int64) error {
	if f.d.faults == nil { // a crash may find it on the disk without that
		return nil
	}
	return f.sync("writeback")
}

// Forget is for what is synced: posix_fadvise begins to write what is not, and nobody hears of an error of that.
func (f *memFile) Forget(int64, int64) {
	if len(f.dirty) > 0 {
		panic("pages of " + f.name + " are to be forgotten that were not synced")
	}
	_ = f.DropCache()
}

// The two that follow take most of the time where the race detector watches them, and need no watching: pages are
// never changed.

// move is copy, which the race detector would watch even here.
//
//go:norace
func move(to, from []byte) int {
	n := min(len(to), len(from))
	for to, from = to[:n], from[:n]; len(to) >= 8 && len(from) >= 8; to, from = to[8:], from[8:] {
		binary.NativeEndian.PutUint64(to, binary.NativeEndian.Uint64(from))
	}
	//lint:ignore S1001 copy is what the race detector would watch
	for i := range from {
		to[i] = from[i]
	}
	return n
}

// same is bytes.Equal.
//
//go:norace
func same(a, b []byte) bool {
	for ; len(a) >= 8 && len(b) >= 8; a, b = a[8:], b[8:] {
		if binary.NativeEndian.Uint64(a) != binary.NativeEndian.Uint64(b) {
			return false
		}
	}
	return string(a) == string(b)
}

var zeros page

// has tells whether some of a file's content is want. view is the inode's disk or cache.
func has(view []*page, off int64, want []byte) bool {
	for len(want) > 0 {
		k, in := int(off/memPage), off%memPage
		p := &zeros
		if k < len(view) && view[k] != nil {
			p = view[k]
		}
		m := min(len(want), memPage-int(in))
		if !same(p[in:int(in)+m], want[:m]) {
			return false
		}
		want, off = want[m:], off+int64(m)
	}
	return true
}

// contentOf is a file's content as a whole.
func contentOf(view []*page, size int64) []byte {
	all := make([]byte, 0, size+memPage)
	for k := 0; int64(len(all)) < size; k++ {
		p := &zeros
		if k < len(view) && view[k] != nil {
			p = view[k]
		}
		all = append(all, p[:]...)
	}
	return all[:size]
}

// The model is no stronger than real disks, and no weaker than what makes an archive possible.
func TestMemDiskLosesWhatWasNotSynced(t *testing.T) {
	// outcomes are the contents that a file x can have after power losses; "-" where there is none.
	outcomes := func(do func(d *memDisk)) map[string]bool {
		all := map[string]bool{}
		for seed := range uint64(200) {
			d := newMemDisk()
			d.faults = &memFaults{r: rand.New(rand.NewPCG(seed, 1)), errno: syscall.EIO}
			do(d)
			c := d.crash(rand.New(rand.NewPCG(seed, 0)))
			data, err := readFile(c, "x")
			if errors.Is(err, fs.ErrNotExist) {
				data = []byte("-")
			}
			if len(data) > 100 {
				data = []byte("long")
			}
			all[string(data)] = true
		}
		return all
	}
	put := func(f file, s string) {
		if _, err := f.WriteAt([]byte(s), 0); err != nil {
			t.Fatal(err)
		}
	}
	durable := func(d *memDisk) file { // x is durable, and "old"
		f, err := d.Create("x", 0)
		if err != nil {
			t.Fatal(err)
		}
		put(f, "old")
		if err := errors.Join(f.Sync(), d.Sync()); err != nil {
			t.Fatal(err)
		}
		return f
	}
	for name, tt := range map[string]struct {
		do   func(d *memDisk)
		want []string // exactly these
	}{
		"all is synced":  {func(d *memDisk) { durable(d) }, []string{"old"}},
		"a write":        {func(d *memDisk) { put(durable(d), "new") }, []string{"old", "new"}},
		"and a sync":     {func(d *memDisk) { f := durable(d); put(f, "new"); f.SyncData() }, []string{"new"}},
		"a removal":      {func(d *memDisk) { durable(d); d.Remove("x") }, []string{"old", "-"}},
		"and its sync":   {func(d *memDisk) { durable(d); d.Remove("x"); d.Sync() }, []string{"-"}},
		"a rename":       {func(d *memDisk) { durable(d); d.Rename("x", "y") }, []string{"old", "-"}},
		"a rename to it": {func(d *memDisk) { durable(d); d.Rename("x", "y"); d.Sync(); d.Rename("y", "x") }, []string{"old", "-"}},
		"no directory":   {func(d *memDisk) { f, _ := d.Create("x", 0); put(f, "new"); f.Sync() }, []string{"new", "-"}},
		"a size":         {func(d *memDisk) { f := durable(d); f.Allocate(9999); f.SyncData() }, []string{"old", "long"}},
		"a size's sync":  {func(d *memDisk) { f := durable(d); f.Allocate(9999); f.Sync() }, []string{"long"}},
		"a failed sync":  {func(d *memDisk) { f := durable(d); put(f, "new"); failSync(d, f); f.Sync() }, []string{"old", "new"}},
		"half of a link": {func(d *memDisk) { d.links = true; durable(d); d.Rename("x", "y"); d.Sync() }, []string{"-"}},
		"a link to it":   {func(d *memDisk) { durable(d); d.Rename("x", "y"); d.Sync(); d.links = true; d.Rename("y", "x") }, []string{"old", "-"}},
		"a replacement":  {func(d *memDisk) { durable(d); f, _ := d.Create("y", 0); put(f, "new"); f.Sync(); d.Replace("y", "x") }, []string{"old", "new"}},
		"and a name sync": {func(d *memDisk) {
			durable(d)
			f, _ := d.Create("y", 0)
			put(f, "new")
			f.Sync()
			d.Replace("y", "x")
			d.Sync()
		}, []string{"new"}},
	} {
		t.Run(name, func(t *testing.T) {
			got := slices.Sorted(maps.Keys(outcomes(tt.do)))
			if slices.Sort(tt.want); !slices.Equal(got, tt.want) {
				t.Errorf("after a power loss: %q, want %q", got, tt.want)
			}
		})
	}
}

// failSync lets one sync of f fail.
func failSync(d *memDisk, f file) error {
	d.faults.first, d.faults.last = d.ops+1, d.ops+1
	return f.Sync()
}

// After a failed sync the page cache lies: the second sync is fine, and the bytes can be read until the cache is
// dropped.
func TestMemDiskHasALyingPageCache(t *testing.T) {
	lies := 0
	for seed := range uint64(100) {
		d := newMemDisk()
		d.faults = &memFaults{r: rand.New(rand.NewPCG(seed, 0)), errno: syscall.EIO}
		f, err := d.Create("x", 0)
		if err != nil {
			t.Fatal(err)
		}
		if err := errors.Join(f.Allocate(3), f.Sync(), d.Sync()); err != nil {
			t.Fatal(err)
		}
		if _, err := f.WriteAt([]byte("new"), 0); err != nil {
			t.Fatal(err)
		}
		if err := failSync(d, f); !errors.Is(err, syscall.EIO) {
			t.Fatalf("seed %d: the sync: %v", seed, err)
		}
		p := make([]byte, 3)
		if _, err := f.ReadAt(p, 0); err != nil || string(p) != "new" {
			t.Errorf("seed %d: read %q, %v", seed, p, err)
		}
		if err := f.Sync(); err != nil {
			t.Errorf("seed %d: the second sync: %v", seed, err)
		}
		if err := f.DropCache(); err != nil {
			t.Fatal(err)
		}
		if _, err := f.ReadAt(p, 0); err != nil {
			t.Fatal(err)
		}
		if string(p) != "new" {
			lies++
		}
	}
	if lies < 20 || lies > 80 {
		t.Errorf("the cache lied %d times in 100", lies)
	}
}
