package console

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"net/http"
	"runtime/debug"
	"slices"
	"sync"
	"time"

	"github.com/walfleet/walfleet/fleet"
)

const (
	tickInterval   = time.Second      // how often open pages are brought up to date
	beatInterval   = 15 * time.Second // how long a stream is silent at most; the script takes twice that for a lost connection
	streamDeadline = 5 * time.Second  // for each write to a client
	maxStreams     = 100
)

// board has the pages that somebody looks at, as they are now. One goroutine puts them there, once a second; each
// stream takes what it has not sent yet, when it can. So nobody waits for a slow client but itself.
type board struct {
	open  chan struct{} // told when the first stream came
	ended chan struct{} // closed: there will be nothing new

	mu      sync.Mutex
	streams int
	viewers map[string]int // of each page: a cluster's by its name, the fleet's by ""
	scenes  map[string]*scene
	next    chan struct{} // closed with the next tick
}

func newBoard() *board {
	return &board{open: make(chan struct{}, 1), ended: make(chan struct{}), viewers: map[string]int{}, scenes: map[string]*scene{}, next: make(chan struct{})}
}

// join is called for a stream that begins; false: there are too many.
func (b *board) join(page string) bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.streams == maxStreams {
		return false
	}
	b.streams++
	b.viewers[page]++
	select {
	case b.open <- struct{}{}:
	default:
	}
	return true
}

func (b *board) leave(page string) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.streams--
	if b.viewers[page]--; b.viewers[page] == 0 {
		delete(b.viewers, page)
		delete(b.scenes, page)
	}
}

// wanted are the pages that somebody looks at, as they were; empty when nobody does.
func (b *board) wanted() map[string]*scene {
	b.mu.Lock()
	defer b.mu.Unlock()
	pages := map[string]*scene{}
	for page := range b.viewers {
		pages[page] = b.scenes[page]
	}
	return pages
}

// post puts pages on the board.
func (b *board) post(pages map[string]*scene) {
	b.mu.Lock()
	defer b.mu.Unlock()
	for page, s := range pages {
		if b.viewers[page] > 0 {
			b.scenes[page] = s
		}
	}
	close(b.next)
	b.next = make(chan struct{})
}

// look is the page now, which may be nil, and a channel that is closed when there is another.
func (b *board) look(page string) (*scene, <-chan struct{}) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.scenes[page], b.next
}

// produce brings the board up to date each second while somebody looks at it.
func (p *pages) produce(ctx context.Context) {
	ticker := time.NewTicker(tickInterval)
	defer ticker.Stop()
	for {
		before := p.board.wanted()
		if len(before) == 0 {
			select {
			case <-ctx.Done():
				return
			case <-p.board.open:
			}
			before = p.board.wanted()
		}
		p.tick++
		p.board.post(p.advance(p.tick, before))
		select {
		case <-ctx.Done():
			return
		case <-ticker.C:
		}
	}
}

// advance makes the pages anew, and keeps the parts that have not changed.
func (p *pages) advance(tick int64, before map[string]*scene) map[string]*scene {
	now := make(map[string]*scene, len(before))
	for page, was := range before {
		s := p.sceneOf(page, was)
		if was == nil {
			was = &scene{}
		}
		s.follow(was, tick)
		now[page] = s
	}
	return now
}

func (p *pages) sceneOf(page string, was *scene) *scene {
	if page == "" {
		return fleetScene(p.source.Report())
	}
	r, ok := p.source.ReportOf(page)
	if ok {
		return clusterScene(r, p.archives.of(page))
	}
	return goneScene(r, was)
}

// follow marks what differs from the scene before as of this tick, and takes the rest from there, with the HTML that
// was made of it.
func (s *scene) follow(was *scene, tick int64) {
	s.tick, s.rowsSince = tick, tick
	for i, a := range s.parts {
		if b := was.byID[a.id]; b != nil && b.since != 0 && a.same(b) {
			s.parts[i], s.byID[a.id] = b, b
			continue
		}
		a.since = tick
	}
	if was.tick != 0 && slices.Equal(s.rows, was.rows) {
		s.rowsSince = was.rowsSince
	}
}

// update is one event of a stream.
type update struct {
	Build     string            `json:"build"`
	Tick      int64             `json:"tick"`
	Time      moment            `json:"time"`            // when this was so
	Order     []string          `json:"order,omitempty"` // of the fleet's rows; there are no others
	Fragments map[string]string `json:"fragments"`       // HTML of elements by their id
}

// since is what a client must be told that was told everything up to the tick seen.
func (p *pages) since(s *scene, seen int64, l language) update {
	u := update{Build: p.build, Tick: s.tick, Time: s.time, Fragments: map[string]string{}}
	if s.rowsSince > seen {
		u.Order = s.rows
	}
	for _, a := range s.parts {
		if a.since <= seen {
			continue
		}
		if outer := s.byID[a.within]; outer != nil && outer.since > seen && outer.since >= a.since {
			continue // is in it
		}
		u.Fragments[a.id] = p.render(a, l)
	}
	return u
}

// stream sends what changes on a page, all of it at first. It ends with the server, with the client, and when the
// client takes nothing for streamDeadline.
func (p *pages) stream(w http.ResponseWriter, r *http.Request, page string) {
	h := w.Header()
	h.Set("Cache-Control", "no-store")
	if !p.board.join(page) {
		h.Set("Retry-After", "10")
		say(w, http.StatusServiceUnavailable, fmt.Sprintf("there are %d open pages, and no more can be kept up to date", maxStreams))
		return
	}
	defer p.board.leave(page)
	l, _ := languageOf(r)
	h.Set("Content-Type", "text/event-stream")
	h.Set("X-Accel-Buffering", "no") // nginx passes events on as they come, then
	if r.Method == http.MethodHead {
		return
	}
	out := sender{w, http.NewResponseController(w)}
	if out.begin() != nil {
		return
	}
	beat := time.NewTimer(beatInterval)
	defer beat.Stop()
	sent := int64(0)
	for {
		s, next := p.board.look(page)
		if s != nil && s.tick > sent {
			if u := p.since(s, sent, l); sent == 0 || u.Order != nil || len(u.Fragments) > 0 {
				if out.update(u) != nil {
					return
				}
				beat.Reset(beatInterval)
			}
			sent = s.tick
		}
		select {
		case <-next:
		case <-beat.C:
			if out.beat() != nil {
				return
			}
			beat.Reset(beatInterval)
		case <-p.board.ended:
			return
		case <-r.Context().Done():
			return
		}
	}
}

// sender writes events, each within streamDeadline.
type sender struct {
	w  http.ResponseWriter
	rc *http.ResponseController
}

// begin sends the header, so that the client knows that it is connected.
func (s sender) begin() error { return s.send([]byte(": walfleet\n\n")) }

func (s sender) update(u update) error {
	var b bytes.Buffer
	fmt.Fprintf(&b, "id: %d\ndata: ", u.Tick)
	e := json.NewEncoder(&b)
	e.SetEscapeHTML(false)
	if err := e.Encode(u); err != nil {
		return err
	}
	b.WriteByte('\n')
	return s.send(b.Bytes())
}

// beat is an event, since a script does not see comments. What was sent before is so still.
func (s sender) beat() error {
	return s.send(fmt.Appendf(nil, "event: beat\ndata: {\"time\":%q}\n\n", momentOf(time.Now())))
}

func (s sender) send(text []byte) error {
	if err := s.rc.SetWriteDeadline(time.Now().Add(streamDeadline)); err != nil && !errors.Is(err, http.ErrNotSupported) {
		return err
	}
	if _, err := s.w.Write(text); err != nil {
		return err
	}
	return s.rc.Flush()
}

const (
	contentsAge      = time.Minute      // an archive is read again after
	contentsDeadline = 30 * time.Second // for reading one
	contentsKept     = 10 * time.Minute // after nobody asked for it
)

// archives reads archives for the clusters' pages, one after the other, and has what was read last. Reading takes
// seconds where a disk is slow, and no page waits for it.
type archives struct {
	source source
	log    *slog.Logger
	queue  chan string

	mu    sync.Mutex
	known map[string]*reading
}

// reading is what is known of an archive.
type reading struct {
	contents fleet.Contents
	err      error     // of the last attempt
	ended    time.Time // the last attempt; zero: there was none
	asked    time.Time
	busy     bool // waits to be read, or is being read
}

func newArchives(src source, log *slog.Logger) *archives {
	return &archives{source: src, log: log, queue: make(chan string, 1000), known: map[string]*reading{}}
}

// of is what is known of a cluster's archive. Where that is old, it is read again, and found here later.
func (a *archives) of(cluster string) reading {
	a.mu.Lock()
	defer a.mu.Unlock()
	now := time.Now()
	for name, k := range a.known {
		if !k.busy && now.Sub(k.asked) > contentsKept {
			delete(a.known, name)
		}
	}
	k := a.known[cluster]
	if k == nil {
		k = &reading{}
		a.known[cluster] = k
	}
	k.asked = now
	if !k.busy && (k.ended.IsZero() || now.Sub(k.ended) >= contentsAge) {
		select {
		case a.queue <- cluster:
			k.busy = true
		default: // asked again with the next tick
		}
	}
	return *k
}

func (a *archives) run(ctx context.Context) {
	for {
		select {
		case <-ctx.Done():
			return
		case cluster := <-a.queue:
			a.read(ctx, cluster)
		}
	}
}

// contents are the source's. A panic there is an error of this archive alone: the daemon has to go on.
func (a *archives) contents(ctx context.Context, cluster string) (c fleet.Contents, err error) {
	defer func() {
		if reason := recover(); reason != nil {
			a.log.Error("reading an archive for its page panicked", "cluster", cluster, "panic", fmt.Sprint(reason), "stack", string(debug.Stack()))
			err = errors.New("this is a fault of walfleet; its log says more")
		}
	}()
	return a.source.Contents(ctx, cluster)
}

// read reads one archive. When its disk does not answer in time that is what is known, with what was read before, and
// the next archive's turn comes.
func (a *archives) read(ctx context.Context, cluster string) {
	ctx, cancel := context.WithTimeout(ctx, contentsDeadline)
	defer cancel()
	contents, err := a.contents(ctx, cluster)
	a.mu.Lock()
	defer a.mu.Unlock()
	k := a.known[cluster] // is there: nobody removes one that is busy
	if err == nil {
		k.contents = contents
	}
	k.err, k.ended, k.busy = err, time.Now(), false
}
