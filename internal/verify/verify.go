package verify

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"golang.org/x/time/rate"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

// Options say how to verify. The zero value checks everything, one segment at a time.
type Options struct {
	Jobs    int           // segments that are read at a time; 0: 1
	MaxRate int64         // bytes of WAL a second that are read at most; 0: no limit
	Since   time.Time     // leave out segments whose files were modified last before that; zero: none
	From    wal.LSN       // leave out segments that end at or before that
	Resume  string        // file that keeps what was checked, to go on there; "": none
	Against string        // conninfo of a server to compare with; "": none
	Timeout time.Duration // longest silence of that server

	Progress func(done, total int64) // is told of bytes of WAL, by several goroutines; nil: nobody wants to know
}

// Run verifies the archive in a directory. It ends early, with what it has and with what it has not checked, when ctx
// is done. The error is that nothing could be checked: fs.ErrNotExist, say, when there is no such directory.
func Run(ctx context.Context, dir string, o Options) (Report, error) {
	begin := time.Now()
	report := Report{Directory: dir, Faults: []Fault{}, Unproven: []Unproven{}, Partial: []PartialFile{}, Notes: []string{}, NotChecked: []string{}}
	layout, err := readLayout(ctx, dir)
	if err != nil {
		return report, err
	}
	r := &run{layout: layout, o: o, report: &report, seen: map[faultKey]bool{}, walked: map[*piece]walked{}, exact: map[wal.Timeline]*wal.Exact{},
		partialEnds: map[*piece]wal.LSN{}}
	if err := r.prepare(ctx); err != nil {
		return report, err
	}
	r.work(ctx)
	r.unprovenTails()
	r.sayWhatIsThere()
	if err := r.lastLook(context.WithoutCancel(ctx)); err != nil {
		return report, err
	}
	if o.Against != "" && ctx.Err() == nil {
		if err := r.compare(ctx); err != nil {
			report.Error = fmt.Sprintf("comparing with the server: %v", err)
		}
	}
	if err := r.done.close(ctx.Err() == nil); err != nil {
		report.Error = err.Error()
	}
	report.finish(begin)
	return report, nil
}

// readLayout reads a directory. That archive.json makes no sense is a fault of it, and no error.
func readLayout(ctx context.Context, dir string) (*layout, error) {
	c, err := archive.ReadCatalogue(ctx, dir)
	var damaged *archive.FileError
	if err != nil && !errors.As(err, &damaged) {
		return nil, err
	}
	if !c.Bound && len(c.Files) == 0 && err == nil {
		return nil, fmt.Errorf("%s holds neither an archive.json nor a segment: it is no archive, or not mounted", dir)
	}
	return newLayout(c, damaged), nil
}

// run is one archive being verified.
type run struct {
	*layout
	o     Options
	magic uint16 // of all pages; 0: not known
	limit *rate.Limiter
	done  *progressFile
	total int64 // bytes of WAL to check
	bytes atomic.Int64

	mu      sync.Mutex // guards what follows
	report  *Report
	seen    map[faultKey]bool
	walked  map[*piece]walked
	exact   map[wal.Timeline]*wal.Exact
	waiting []wal.Segment // that were not checked
	gone    []*piece      // that could not be opened, for there was no such file

	partialEnds map[*piece]wal.LSN // exclusive ends of their complete records
}

type faultKey struct {
	file string
	at   wal.LSN
	kind Kind
}

// walked is what following a complete piece from its start has told.
type walked struct {
	proven wal.LSN // where the first record begins, or the piece's end
	begins bool    // a record begins in it
	file   string
}

// task is a piece of work, on a segment.
type task struct {
	piece *piece
	do    func(ctx context.Context, w *worker)
}

// worker has what a goroutine needs for its tasks.
type worker struct {
	*run
	buf   []byte
	clean bool // the task under way has found nothing
}

// bufSize is how much is read at a time: whole pages.
const bufSize = 1 << 20

func (r *run) prepare(ctx context.Context) error {
	if r.o.MaxRate > 0 {
		r.limit = rate.NewLimiter(rate.Limit(r.o.MaxRate), bufSize)
	}
	r.magic = r.usualMagic(ctx)
	var err error
	r.done, err = openProgress(r.o.Resume, r.c)
	return err
}

// usualMagic is the page magic that most of a few segments have.
func (r *run) usualMagic(ctx context.Context) uint16 {
	const samples = 5
	counts := map[uint16]int{}
	var best uint16
	for i := range samples {
		if len(r.pieces) == 0 || ctx.Err() != nil {
			break
		}
		p := r.pieces[i*(len(r.pieces)-1)/(samples-1)]
		f, err := r.c.OpenFile(p.files[0].File)
		if err != nil {
			continue
		}
		head := make([]byte, 2)
		_, err = io.ReadFull(f, head)
		f.Close()
		if magic, ok := wal.PageMagic(head); ok && err == nil {
			if counts[magic]++; counts[magic] > counts[best] {
				best = magic
			}
		}
	}
	return best
}

// work does all tasks, Jobs at a time.
func (r *run) work(ctx context.Context) {
	tasks := r.tasks()
	next := make(chan task)
	var workers sync.WaitGroup
	for range max(1, r.o.Jobs) {
		workers.Go(func() {
			w := &worker{run: r, buf: make([]byte, bufSize)}
			for t := range next {
				w.clean = true
				if ctx.Err() == nil {
					t.do(ctx, w)
				}
				if ctx.Err() != nil {
					r.mu.Lock()
					r.waiting = append(r.waiting, t.piece.Segment)
					r.mu.Unlock()
				}
			}
		})
	}
	for _, t := range tasks {
		next <- t
	}
	close(next)
	workers.Wait()
	r.report.NotChecked = append(r.report.NotChecked, spans(r.waiting)...)
	r.report.Bytes = r.bytes.Load()
}

func (r *run) tasks() (tasks []task) {
	for _, p := range r.pieces {
		if h, ok := r.histories[p.Timeline]; ok && len(h.Forks) > 0 && p.Start <= begin(h) && begin(h) < p.End() {
			tasks = append(tasks, task{p, func(ctx context.Context, w *worker) { w.fork(ctx, p, h) }})
		}
		switch {
		case p.partial:
			for _, f := range p.files {
				tasks = append(tasks, task{p, func(ctx context.Context, w *worker) { w.partialFile(ctx, p, f) }})
			}
		case p.End() <= r.o.From || newest(p).Before(r.o.Since) || r.done.has(p):
			r.report.Skipped++
		default:
			r.total += int64(p.Size)
			tasks = append(tasks, task{p, func(ctx context.Context, w *worker) { w.complete(ctx, p) }})
		}
	}
	return tasks
}

func newest(p *piece) (t time.Time) {
	for _, f := range p.files {
		if f.Modified.After(t) {
			t = f.Modified
		}
	}
	return t
}

// fault notes a fault, once.
func (w *worker) fault(f Fault) {
	w.clean = false
	key := faultKey{f.File, f.at, f.Kind}
	w.mu.Lock()
	defer w.mu.Unlock()
	if !w.seen[key] {
		w.seen[key] = true
		w.report.Faults = append(w.report.Faults, f)
	}
}

func (w *worker) unproven(file string, from, to wal.LSN, text string) {
	w.clean = false
	w.run.unproven(file, from, to, text)
}

func (r *run) unproven(file string, from, to wal.LSN, text string) {
	r.mu.Lock()
	defer r.mu.Unlock()
	u := Unproven{File: file, LSN: from.String(), End: to.String(), Text: text, at: from}
	if !slices.Contains(r.report.Unproven, u) {
		r.report.Unproven = append(r.report.Unproven, u)
	}
}

// walker follows WAL of a timeline from start on.
func (r *run) walker(tli wal.Timeline, start wal.LSN) *wal.Walker {
	return wal.NewWalker(wal.WalkerConfig{Start: start, Timeline: tli, Size: r.c.Identity.SegmentSize,
		SystemID: r.c.Identity.SystemID, CheckCRC: true, Exact: r.exactly(tli)})
}

// exactly is what pages of a timeline must be.
func (r *run) exactly(tli wal.Timeline) *wal.Exact {
	r.mu.Lock()
	defer r.mu.Unlock()
	if r.exact[tli] == nil {
		r.exact[tli] = &wal.Exact{Magic: r.magic, History: r.histories[tli], GivenUp: func(start, page wal.LSN) {
			r.unproven(r.fileOf(tli, start), start, page, "the server gave up the record that begins here: no checksum vouches for what is left of it")
		}}
	}
	return r.exact[tli]
}

// fileOf is the name of the file that has a position of a timeline, or would have it.
func (r *run) fileOf(tli wal.Timeline, lsn wal.LSN) string {
	s := r.c.Identity.SegmentSize.Segment(tli, lsn)
	if p := r.by[s]; p != nil {
		return p.files[0].File
	}
	h := r.ancestry(tli)
	for _, f := range slices.Backward(h.Forks) {
		s.Timeline = f.Timeline
		if p := r.by[s]; p != nil {
			return p.files[0].File
		}
	}
	s.Timeline = tli
	return s.Name()
}

// read fills p, as far as there is something, and keeps to the rate. A short read is no error.
func (w *worker) read(ctx context.Context, f io.Reader, p []byte) (int, error) {
	if w.limit != nil {
		if err := w.limit.WaitN(ctx, len(p)); err != nil {
			return 0, ctx.Err()
		}
	}
	if err := ctx.Err(); err != nil {
		return 0, err
	}
	for n := 0; ; {
		m, err := f.Read(p[n:])
		n += m
		switch {
		case err == io.EOF || n == len(p): // decompressing tells of what was cut off by another error
			return n, nil
		case err != nil:
			return n, err
		}
	}
}

// unprovenTails finds the beginnings of segments that belong to a record whose beginning is not there.
func (r *run) unprovenTails() {
	for p, got := range r.walked {
		if got.proven == p.Start {
			continue
		}
		b := r.before[p]
		for b != nil && !r.beginsIn(b) {
			b = r.before[b]
		}
		if b == nil {
			r.unproven(got.file, p.Start, got.proven, "the archive begins inside a record: no checksum vouches for the rest of it")
		}
	}
}

// beginsIn tells whether a record begins in a piece; where that was not found out, it may.
func (r *run) beginsIn(p *piece) bool {
	got, ok := r.walked[p]
	return !ok || got.begins
}

// sayWhatIsThere notes what is no fault, and a person may want to know.
func (r *run) sayWhatIsThere() {
	note := func(format string, args ...any) {
		r.report.Notes = append(r.report.Notes, fmt.Sprintf(format, args...))
	}
	if beginning := max(r.c.Origin.LSN, r.c.Pruned.LSN); len(r.pieces) > 0 && r.c.Bound && r.pieces[0].Start > beginning {
		note("the archive begins at %s, and its first segment is %s: what was between was removed by other means than prune, or is lost", beginning, r.pieces[0].Segment)
	}
	for _, g := range r.c.Gaps {
		note("a gap is recorded: from %s to %s, before timeline %d goes on, WAL is missing for good", g.From, g.To, g.Timeline)
	}
	for _, tli := range r.c.Histories {
		h, ok := r.histories[tli]
		if !ok || len(h.Forks) == 0 {
			continue
		}
		parent := h.Forks[len(h.Forks)-1]
		var behind []wal.Segment
		for _, p := range r.pieces {
			if p.Timeline == parent.Timeline && p.Start >= parent.End {
				behind = append(behind, p.Segment)
			}
		}
		for _, text := range spans(behind) {
			note("timeline %d was left at %s for timeline %d, and goes on behind that: %s", parent.Timeline, parent.End, tli, text)
		}
	}
}

// lastLook reads the directory again, twice: the faults of names and histories that both times show are there to
// stay, and not a change under way.
func (r *run) lastLook(ctx context.Context) error {
	last, err := readLayout(ctx, r.c.Path)
	if err != nil {
		return err
	}
	again, err := readLayout(ctx, r.c.Path)
	if err != nil {
		return err
	}
	r.report.Faults = append(r.report.Faults, stay(last.faults, again.faults)...)
	for _, p := range r.gone {
		// A link to nowhere has a name, and no bytes.
		if still := again.by[p.Segment]; still != nil && !still.partial && !p.partial {
			f := Fault{File: still.files[0].File, Kind: Unreadable, at: p.Start, end: p.End(), Text: "is there, and could not be opened"}
			if !slices.Contains(r.report.Faults, f) {
				r.report.Faults = append(r.report.Faults, f)
			}
		}
	}
	if came := len(again.c.Sealed()) - len(r.c.Sealed()); came > 0 {
		r.report.Notes = append(r.report.Notes, fmt.Sprintf("%d segments were completed meanwhile, and not checked", came))
	}
	return nil
}

// open opens the first of a piece's files, or the one that has taken its place; nil: the segment is not there any
// more, which is no fault of its own.
func (w *worker) open(p *piece) *archive.Reader {
	f, err := w.c.OpenFile(p.files[0].File)
	if errors.Is(err, fs.ErrNotExist) {
		f, err = w.c.Open(p.Segment)
	}
	switch damaged := new(archive.FileError); {
	case err == nil:
		return f
	case errors.As(err, &damaged): // its very beginning
		w.fault(Fault{File: p.files[0].File, Kind: Compressed, at: p.Start, end: p.End(), Text: fmt.Sprintf("%q", damaged.Reason)})
	case !errors.Is(err, fs.ErrNotExist):
		w.fault(Fault{File: p.files[0].File, Kind: Unreadable, at: p.Start, end: p.End(), Text: fmt.Sprintf("%q", err)})
	default:
		w.mu.Lock()
		w.gone = append(w.gone, p)
		w.mu.Unlock()
	}
	return nil
}
