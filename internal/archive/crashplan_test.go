package archive

import (
	"fmt"
	"math/rand/v2"
	"sync"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

const (
	crashSegment = wal.SegmentSize(1 << 20)
	crashBegin   = wal.LSN(64 << 20) // of all WAL
)

var crashIdentity = Identity{SystemID: 4242, SegmentSize: crashSegment}

// plan is the life of a cluster, made from a seed: what its server has, epoch by epoch. An archive that follows it to
// its end must have all of it, but for what the server lost.
type plan struct {
	seed     uint64
	origin   wal.LSN // where the slot is when the archive begins; an archive begins with that segment
	existing bool    // a pg_receivewal was here before: its files up to the end of the first epoch are there
	links    bool    // the disk has no rename that does not replace
	compress Compression
	prunes   bool // what is old is removed now and then
	epochs   []epoch

	lines map[wal.Timeline]*line
}

// epoch is a time in which the server goes on without trouble.
type epoch struct {
	what   string
	tli    wal.Timeline
	wal    []byte // what the server has in the end, from crashBegin on
	end    wal.LSN
	oldest wal.LSN // it has nothing before this; 0: everything
}

// bytes is WAL as the server has it in this epoch.
func (e *epoch) bytes(from, to wal.LSN) []byte { return e.wal[from-crashBegin : to-crashBegin] }

// line is what is true of a timeline in the end.
type line struct {
	wal       []byte
	fork      wal.LSN // where it left the timeline before
	history   string
	complete  wal.LSN // the end of its last record
	abandoned []span  // records that the server gave up
}

type span struct{ start, end wal.LSN } // start is the end of the record before

// filler is where payloads come from. It has no zeros in a row, so that lost pages show.
var filler = sync.OnceValue(func() []byte {
	r := rand.New(rand.NewPCG(1, 2))
	p := make([]byte, 1<<20)
	for i := range p {
		p[i] = byte(1 + r.IntN(255))
	}
	return p
})

// planner makes a plan.
type planner struct {
	*plan
	r   *rand.Rand
	g   *pgtest.WAL
	tli wal.Timeline
	low wal.LSN // nothing forks before
}

func newPlan(seed uint64) *plan {
	r := rand.New(rand.NewPCG(seed, 'p'))
	g := pgtest.NewWAL(pgtest.WALConfig{SystemID: crashIdentity.SystemID, Size: crashSegment, Start: crashBegin})
	p := &planner{plan: &plan{seed: seed, lines: map[wal.Timeline]*line{}}, r: r, g: g, tli: 1}
	p.links, p.existing = r.IntN(4) == 0, r.IntN(6) == 0
	if n := int(seed % 8); n < len(methods) { // not from r: it would change what the seeds stand for
		p.compress = Compression{Method: methods[n].name}
	}
	p.prunes = seed%5 == 3
	p.lines[1] = &line{}
	p.origin = crashBegin
	if r.IntN(3) > 0 { // the first segment begins inside a record
		for p.g.End() < crashBegin+1<<20-80<<10 {
			p.record(40<<10 + p.r.IntN(40<<10))
		}
		p.fill(crashBegin + 1<<20 - 30<<10)
		p.record(40<<10 + r.IntN(200<<10))
		p.origin = crashBegin + wal.LSN(crashSegment) + wal.LSN(r.IntN(100<<10))
	}
	p.low = p.origin
	p.fill(max(p.g.End(), p.origin) + p.some())
	p.add("more", 0)
	for range 2 + r.IntN(3) {
		switch r.IntN(6) {
		case 0, 1:
			p.fill(p.g.End() + p.some())
			p.add("more", 0)
		case 2:
			p.tear()
		case 3, 4:
			p.promote()
		case 5:
			p.lose()
		}
	}
	p.fill(p.g.End() + 20<<10)
	p.add("the end", 0)
	p.endLine()
	return p.plan
}

func (p *planner) some() wal.LSN { return wal.LSN(p.r.IntN(200 << 10)) }

func (p *planner) record(n int) {
	at := p.r.IntN(len(filler()) - n)
	p.g.Append(filler()[at : at+n])
}

// fill adds records up to about end.
func (p *planner) fill(end wal.LSN) {
	for p.g.End() < end {
		switch p.r.IntN(100) {
		case 0:
			p.g.Switch()
		case 1:
			pages := 1 + p.r.IntN(4)
			n := (pages+1)*wal.PageSize + p.r.IntN(50<<10)
			before := p.g.End()
			_, page := p.g.Abort(filler()[:n], pages)
			p.lines[p.tli].abandoned = append(p.lines[p.tli].abandoned, span{before, page})
		case 2:
			p.record(p.r.IntN(250 << 10))
		case 3, 4, 5, 6:
			p.record(p.r.IntN(30 << 10))
		default:
			p.record(p.r.IntN(6000))
		}
	}
}

// add ends an epoch in which the server has all of g.
func (p *planner) add(what string, oldest wal.LSN) {
	p.epochs = append(p.epochs, epoch{what: what, tli: p.tli, end: p.g.End(), oldest: max(oldest, p.oldest())})
}

func (p *planner) oldest() wal.LSN {
	if n := len(p.epochs); n > 0 {
		return p.epochs[n-1].oldest
	}
	return 0
}

// endLine is called when nothing more comes on the timeline.
func (p *planner) endLine() {
	l, ends := p.lines[p.tli], p.g.Boundaries()
	l.wal, l.complete = p.g.Bytes(crashBegin, p.g.End()), ends[len(ends)-1]
	for i := range p.epochs {
		if e := &p.epochs[i]; e.tli == p.tli && e.wal == nil {
			e.wal = l.wal[:e.end-crashBegin]
		}
	}
}

// tear lets the server send a part of a record that it is going to have otherwise, as a PolarDB node does that is
// promoted on the same timeline.
func (p *planner) tear() {
	n := 2 * wal.PageSize
	if p.r.IntN(2) == 0 { // it crosses the end of a segment
		for end := crashSegment.Start(p.g.End()) + wal.LSN(crashSegment); p.g.End() < end-60<<10; {
			p.record(40 << 10)
		}
		n = 100 << 10
	}
	other := *p.g // shares memory with g, so it is of use until g goes on
	start, end := other.Append(filler()[1000 : 1000+n+p.r.IntN(300<<10)])
	cut := start + 1 + wal.LSN(p.r.Uint64N(uint64(end-8-start)))
	p.epochs = append(p.epochs, epoch{"a torn record", p.tli, other.Bytes(crashBegin, cut), cut, p.oldest()})
	p.record(100 + p.r.IntN(9000))
	p.fill(p.g.End() + p.some()/2)
	p.add("instead of the torn record", 0)
}

// promote begins a timeline at a record's end, maybe before what the archive has.
func (p *planner) promote() {
	p.endLine()
	ends := p.g.Boundaries()
	i := len(ends) - 1
	if p.r.IntN(2) == 0 {
		i -= p.r.IntN(min(len(ends), 100))
	}
	fork := max(ends[i], p.low)
	for ; ends[i] < fork; i++ {
	}
	fork, p.low = ends[i], ends[i]
	old := p.lines[p.tli]
	next := &line{fork: fork, history: old.history + fmt.Sprintf("%d\t%s\tno recovery target specified\n", p.tli, fork)}
	for _, a := range old.abandoned {
		if a.end <= fork {
			next.abandoned = append(next.abandoned, a)
		}
	}
	p.tli++
	p.lines[p.tli] = next
	p.g = p.g.Fork(fork, p.tli)
	p.record(p.r.IntN(20 << 10))
	if p.r.IntN(3) > 0 { // else it may be promoted again in the same segment
		p.fill(p.g.End() + p.some())
	}
	p.add("a promotion", 0)
}

// lose lets the server go on so far that it has removed WAL which the archive does not have.
func (p *planner) lose() {
	oldest := crashSegment.Start(p.g.End()) + wal.LSN(1+p.r.IntN(2))*wal.LSN(crashSegment)
	for p.g.End() < oldest-20<<10 {
		p.record(60<<10 + p.r.IntN(60<<10))
	}
	p.fill(oldest + 50<<10 + p.some()/2)
	p.low = oldest
	p.add("a gap", oldest)
}

// historyOf is the history of a timeline.
func (p *plan) historyOf(tli wal.Timeline) wal.History {
	h, err := wal.ParseHistory(tli, []byte(p.lines[tli].history))
	if err != nil {
		panic(err)
	}
	return h
}

// owner is the timeline under whose name an archive has the segment at start, when it ends on timeline tli.
func (p *plan) owner(tli wal.Timeline, start wal.LSN) wal.Timeline {
	for tli > 1 && crashSegment.Start(p.lines[tli].fork) > start {
		tli--
	}
	return tli
}
