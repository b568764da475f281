package console

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net/http"
	"net/http/httptest"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"testing/synctest"
	"time"

	"github.com/walfleet/walfleet/fleet"
)

// client is a browser that takes a stream. It is inside of a synctest bubble.
type client struct {
	cancel context.CancelFunc
	ended  chan struct{}

	mu     sync.Mutex
	status int
	header http.Header
	got    bytes.Buffer
	taken  int           // of got
	block  chan struct{} // not nil: nothing is taken until it is closed
}

func (c *client) Header() http.Header { return c.header }

func (c *client) WriteHeader(status int) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.status = status
}

func (c *client) Write(b []byte) (int, error) {
	c.mu.Lock()
	block := c.block
	c.mu.Unlock()
	if block != nil {
		<-block
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.got.Write(b)
}

func (c *client) Flush() {}

// hold keeps the client from taking anything, until release is called.
func (c *client) hold() (release func()) {
	c.mu.Lock()
	defer c.mu.Unlock()
	block := make(chan struct{})
	c.block = block
	return func() {
		c.mu.Lock()
		defer c.mu.Unlock()
		c.block = nil
		close(block)
	}
}

// updates are what came since the last call; beats how many heartbeats.
func (c *client) updates(t *testing.T) (list []update, beats int) {
	t.Helper()
	c.mu.Lock()
	defer c.mu.Unlock()
	lines := bufio.NewScanner(bytes.NewReader(c.got.Bytes()[c.taken:]))
	lines.Buffer(nil, 64<<20)
	c.taken = c.got.Len()
	event := ""
	for lines.Scan() {
		switch line := lines.Text(); {
		case strings.HasPrefix(line, "event: "):
			event = line[7:]
		case strings.HasPrefix(line, "data: ") && event == "beat":
			beats++
			event = ""
		case strings.HasPrefix(line, "data: "):
			var u update
			if err := json.Unmarshal([]byte(line[6:]), &u); err != nil {
				t.Fatalf("%v: %.200s", err, line)
			}
			list = append(list, u)
		}
	}
	return list, beats
}

func connect(h http.Handler, url string) *client {
	ctx, cancel := context.WithCancel(context.Background())
	c := &client{cancel: cancel, ended: make(chan struct{}), header: http.Header{}, status: http.StatusOK}
	r := httptest.NewRequest(http.MethodGet, url, nil).WithContext(ctx)
	go func() {
		defer close(c.ended)
		h.ServeHTTP(c, r)
	}()
	return c
}

// watching runs a test with pages that are kept up to date, in a bubble with its own time. Whatever the test began
// has to end for the bubble to end.
func watching(t *testing.T, src *sample, test func(p *pages, h http.Handler, stop func())) {
	synctest.Test(t, func(t *testing.T) {
		p := newPages(src, failing(t))
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() {
			defer close(done)
			if err := p.run(ctx); err != nil {
				t.Error(err)
			}
		}()
		stop := func() {
			cancel()
			<-done
		}
		defer stop()
		test(p, handlerOf(p), stop)
	})
}

// pass lets time pass, until everything that follows from it has happened.
func pass(d time.Duration) {
	time.Sleep(d)
	synctest.Wait()
}

func keys(u update) []string { return slices.Sorted(maps.Keys(u.Fragments)) }

func TestStreamSendsAllAndThenOnlyWhatChanged(t *testing.T) {
	src := &sample{report: sampleFleet(sampleTime)}
	watching(t, src, func(p *pages, h http.Handler, _ func()) {
		c := connect(h, "/events")
		defer c.cancel()
		pass(1500 * time.Millisecond)
		got, _ := c.updates(t)
		if len(got) != 1 || len(got[0].Order) != 12 || len(got[0].Fragments) != 12+5 || got[0].Build != p.build {
			t.Fatalf("at first: %d events, %v", len(got), keys(got[0]))
		}
		pass(5 * time.Second)
		if got, _ := c.updates(t); len(got) != 0 {
			t.Fatalf("nothing changed, and %v was sent", keys(got[0]))
		}
		src.change(func(r *fleet.Report) { r.Clusters[0].LagBytes = pointer(int64(4711)) })
		pass(time.Second)
		if got, _ := c.updates(t); len(got) != 1 || !slices.Equal(keys(got[0]), []string{"c:accounts:lag"}) || got[0].Order != nil {
			t.Fatalf("after a change of a lag: %+v", got)
		}
		src.change(func(r *fleet.Report) { r.Clusters[0].Timeline = 99 })
		pass(time.Second)
		if got, _ := c.updates(t); len(got) != 1 || !slices.Equal(keys(got[0]), []string{"c:accounts"}) || !strings.Contains(got[0].Fragments["c:accounts"], "4711") {
			t.Fatalf("after a change of a row: %+v", got)
		}
		src.change(func(r *fleet.Report) {
			r.Clusters[0].State, r.Clusters[0].Health, r.Clusters[0].LagBytes = "halted", fleet.Critical, pointer(int64(12))
		})
		pass(time.Second)
		got, _ = c.updates(t)
		if len(got) != 1 || !slices.Equal(keys(got[0]), []string{"c:accounts", "headline", "spoken", "states"}) || got[0].Order[0] != "c:accounts" {
			t.Fatalf("after a change of a state: %+v", got)
		}
		src.change(func(r *fleet.Report) { r.Clusters = r.Clusters[1:] })
		pass(time.Second)
		if got, _ = c.updates(t); len(got) != 1 || len(got[0].Order) != 11 || got[0].Fragments["headline"] == "" {
			t.Fatalf("after a cluster was removed: %+v", got)
		}
	})
}

// What a client has after any number of events is what a new page would be.
func TestClientThatSkipsEventsHasTheSamePage(t *testing.T) {
	src := &sample{report: sampleFleet(sampleTime)}
	watching(t, src, func(p *pages, h http.Handler, _ func()) {
		all, slow := connect(h, "/events"), connect(h, "/events?lang=zh")
		defer all.cancel()
		defer slow.cancel()
		pass(1500 * time.Millisecond)
		release := slow.hold()
		for i := range 30 {
			src.change(func(r *fleet.Report) {
				c := &r.Clusters[i%5]
				c.LagBytes, c.BytesPerSecond, c.Timeline = pointer(int64(i)), float64(i*7), uint32(1+i/7)
				r.Clusters[11].LagBytes = pointer(int64(i))
			})
			pass(time.Second)
		}
		if got, _ := all.updates(t); len(got) != 31 {
			t.Errorf("beside a client that takes nothing another one got %d events in 30 s, want 31", len(got))
		}
		release()
		pass(time.Second)
		got, _ := slow.updates(t)
		if len(got) != 3 { // the first, the one it was blocked in, and the last state of all
			t.Errorf("the slow client got %d events, want 3", len(got))
		}
		has := map[string]string{} // as in the browser: a row brings what is in it, what is newer follows
		for _, u := range got {
			for _, id := range keys(u) {
				if strings.HasPrefix(u.Fragments[id], "<tr") {
					maps.DeleteFunc(has, func(other, _ string) bool { return strings.HasPrefix(other, id+":") })
				}
				has[id] = u.Fragments[id]
			}
		}
		for _, a := range fleetScene(src.Report()).parts {
			want, html := p.render(a, chinese), has[a.id]
			if html == "" && a.within != "" {
				html = has[a.within]
			}
			if a.template != "row" && !strings.Contains(html, want) {
				t.Errorf("%s is\n%s\nand should be\n%s", a.id, html, want)
			}
		}
		if !strings.Contains(has["c:warehouse:lag"], `data-value="29"`) {
			t.Errorf("the last lag is not there: %s", has["c:warehouse:lag"])
		}
	})
}

func TestNobodyLooksNothingIsMade(t *testing.T) {
	src := &sample{report: sampleFleet(sampleTime)}
	watching(t, src, func(p *pages, h http.Handler, _ func()) {
		pass(time.Hour)
		if n := src.taken(); n != 0 {
			t.Errorf("%d reports were taken though nobody looked", n)
		}
		c := connect(h, "/events")
		pass(10500 * time.Millisecond)
		if n := src.taken(); n < 10 || n > 12 {
			t.Errorf("%d reports in 10 s", n)
		}
		c.cancel()
		<-c.ended
		pass(time.Second)
		before := src.taken()
		pass(time.Hour)
		if n := src.taken(); n != before {
			t.Errorf("%d reports after the last page was closed", n-before)
		}
		if len(p.board.scenes) != 0 {
			t.Error("a page is kept that nobody looks at")
		}
		again := connect(h, "/events") // sees all there is, at once
		defer again.cancel()
		pass(100 * time.Millisecond)
		if got, _ := again.updates(t); len(got) != 1 || len(got[0].Fragments) != 12+5 {
			t.Errorf("after it came back a client got %d events", len(got))
		}
	})
}

func TestSilentStreamBeats(t *testing.T) {
	watching(t, &sample{report: sampleFleet(sampleTime)}, func(_ *pages, h http.Handler, _ func()) {
		c := connect(h, "/events")
		defer c.cancel()
		pass(61500 * time.Millisecond)
		if _, beats := c.updates(t); beats != 4 {
			t.Errorf("%d heartbeats in a minute, want 4", beats)
		}
		if c.header.Get("Content-Type") != "text/event-stream" {
			t.Error(c.header)
		}
	})
}

func TestStreamsAreLimited(t *testing.T) {
	watching(t, &sample{report: sampleFleet(sampleTime)}, func(_ *pages, h http.Handler, _ func()) {
		var all []*client
		for i := range maxStreams {
			all = append(all, connect(h, []string{"/events", "/clusters/mail/events"}[i%2]))
		}
		synctest.Wait()
		over := connect(h, "/events")
		synctest.Wait()
		if over.status != http.StatusServiceUnavailable || over.header.Get("Retry-After") == "" {
			t.Errorf("one too many: %d %v", over.status, over.header)
		}
		over.cancel()
		all[0].cancel()
		<-all[0].ended
		more := connect(h, "/events")
		pass(1100 * time.Millisecond)
		if got, _ := more.updates(t); len(got) != 1 {
			t.Errorf("after one had gone: %d events, status %d", len(got), more.status)
		}
		for _, c := range append(all, more) {
			c.cancel()
			<-c.ended
		}
	})
}

func TestStreamsEndWithTheServer(t *testing.T) {
	watching(t, &sample{report: sampleFleet(sampleTime)}, func(_ *pages, h http.Handler, stop func()) {
		c := connect(h, "/events")
		pass(2 * time.Second)
		stop()
		late := connect(h, "/events")
		pass(time.Second)
		for _, c := range []*client{c, late} {
			select {
			case <-c.ended:
			default:
				t.Error("a stream goes on")
				c.cancel()
			}
		}
	})
}

// broken is a client whose connection takes nothing any more.
type broken struct{ *client }

func (b broken) Write([]byte) (int, error) { return 0, errors.New("i/o timeout") }

func TestStreamEndsWhenTheClientTakesNothing(t *testing.T) {
	watching(t, &sample{report: sampleFleet(sampleTime)}, func(p *pages, h http.Handler, _ func()) {
		h.ServeHTTP(broken{&client{header: http.Header{}}}, httptest.NewRequest(http.MethodGet, "/events", nil))
		if p.board.streams != 0 {
			t.Errorf("%d streams are counted", p.board.streams)
		}
		w := httptest.NewRecorder()
		h.ServeHTTP(w, httptest.NewRequest(http.MethodHead, "/events", nil)) // is answered at once
	})
}

// Over a real connection the deadline of a write ends a stream that is not read, however long the server allows
// answers to take.
func TestWriteDeadlineEndsAStreamThatIsNotRead(t *testing.T) {
	src := &sample{report: largeFleet(500, sampleTime)}
	p := newPages(src, slog.New(slog.DiscardHandler))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); _ = p.run(ctx) }()
	defer func() { cancel(); <-done }()
	deadline := make(chan time.Duration, 100)
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		handlerOf(p).ServeHTTP(deadlines{w, deadline}, r)
	}))
	defer server.Close()
	resp, err := http.Get(server.URL + "/events")
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	for range 2 { // the header's, and the first event's
		if d := <-deadline; d <= 0 || d > streamDeadline {
			t.Errorf("a write has %s", d)
		}
	}
}

// deadlines tells the deadlines that are set for writing.
type deadlines struct {
	http.ResponseWriter
	set chan<- time.Duration
}

func (d deadlines) SetWriteDeadline(at time.Time) error {
	d.set <- time.Until(at)
	return http.NewResponseController(d.ResponseWriter).SetWriteDeadline(at)
}

func (d deadlines) Unwrap() http.ResponseWriter { return d.ResponseWriter }

func TestPageOfAClusterThatIsRemovedSaysSo(t *testing.T) {
	src := &sample{report: sampleFleet(sampleTime)}
	watching(t, src, func(_ *pages, h http.Handler, _ func()) {
		c := connect(h, "/clusters/mail/events")
		defer c.cancel()
		pass(1500 * time.Millisecond)
		if got, _ := c.updates(t); len(got) == 0 || !strings.Contains(got[0].Fragments["removed"], "hidden") || got[0].Order != nil {
			t.Fatalf("at first: %d events", len(got))
		}
		src.change(func(r *fleet.Report) { r.Clusters = r.Clusters[:3] })
		pass(time.Second)
		got, _ := c.updates(t)
		if len(got) != 1 || !slices.Equal(keys(got[0]), []string{"removed"}) || !strings.Contains(got[0].Fragments["removed"], "removed from the configuration") {
			t.Fatalf("after it was removed: %+v", got)
		}
		src.change(func(r *fleet.Report) { r.Clusters = sampleFleet(sampleTime).Clusters })
		pass(time.Second)
		if got, _ := c.updates(t); len(got) != 1 || !strings.Contains(got[0].Fragments["removed"], "hidden") {
			t.Fatalf("after it came back: %+v", got)
		}
		none := connect(h, "/clusters/nobody/events") // as after a restart of the daemon without it
		defer none.cancel()
		pass(time.Second)
		if got, _ := none.updates(t); len(got) != 1 || !slices.Equal(keys(got[0]), []string{"removed"}) {
			t.Fatalf("of no cluster: %+v", got)
		}
	})
}

// An archive that takes its time keeps no page waiting, is read once a minute while somebody looks, and is given up
// after a while.
func TestArchivesAreReadBesideThePages(t *testing.T) {
	src := &sample{report: sampleFleet(sampleTime)}
	var reads, slow atomic.Int64
	src.contents = func(ctx context.Context, cluster string) (fleet.Contents, error) {
		reads.Add(1)
		select {
		case <-time.After(time.Duration(slow.Load())):
			return sampleContents(), nil
		case <-ctx.Done():
			return fleet.Contents{}, fmt.Errorf("the archive of %s is still being read: %w", cluster, context.Cause(ctx))
		}
	}
	watching(t, src, func(p *pages, h http.Handler, _ func()) {
		slow.Store(int64(20 * time.Second))
		began := time.Now()
		page := ask(t, h, "/clusters/ledger", "").Body.String()
		if !strings.Contains(page, `data-map="reading"`) || time.Since(began) != 0 {
			t.Errorf("the page waited for %s", time.Since(began))
		}
		c := connect(h, "/clusters/ledger/events")
		defer c.cancel()
		pass(10 * time.Second)
		if got, _ := c.updates(t); len(got) != 1 || !strings.Contains(got[0].Fragments["map"], `data-map="reading"`) {
			t.Errorf("while it is read: %d events", len(got))
		}
		pass(11 * time.Second)
		if got, _ := c.updates(t); len(got) != 1 || !slices.Equal(keys(got[0]), []string{"map"}) || !strings.Contains(got[0].Fragments["map"], `data-hole="gap"`) {
			t.Errorf("when it was read: %d events", len(got))
		}
		slow.Store(0)
		pass(10 * time.Minute)
		if n := reads.Load(); n < 9 || n > 11 {
			t.Errorf("read %d times in 10 minutes", n)
		}
		c.updates(t)
		slow.Store(int64(time.Hour))
		pass(2 * time.Minute)
		if got, _ := c.updates(t); len(got) == 0 || !strings.Contains(got[0].Fragments["map"], "still being read") || !strings.Contains(got[0].Fragments["map"], `data-hole="gap"`) {
			t.Errorf("when its disk hangs: %d events", len(got))
		}
		if len(p.archives.known) != 1 {
			t.Error(p.archives.known)
		}
	})
}

// A fault of walfleet in a page's own goroutines costs that page something, and nobody else anything.
func TestPanicsDoNotEndTheDaemon(t *testing.T) {
	src := &sample{report: sampleFleet(sampleTime)}
	src.contents = func(context.Context, string) (fleet.Contents, error) { panic("an impossible archive") }
	synctest.Test(t, func(t *testing.T) {
		p := newPages(src, slog.New(slog.DiscardHandler))
		h := handlerOf(p)
		ctx, cancel := context.WithCancel(t.Context())
		run := func() (panicked any) {
			defer func() { panicked = recover() }()
			return p.run(ctx)
		}
		bad := connect(h, "/clusters/ledger/events")
		ended := make(chan any)
		go func() { ended <- run() }()
		pass(2 * time.Second)
		if got, _ := bad.updates(t); len(got) != 2 || !strings.Contains(got[1].Fragments["map"], "fault of walfleet") {
			t.Errorf("of an archive that cannot be read: %d events", len(got))
		}
		src.fail(true)
		if <-ended == nil {
			t.Fatal("a report that panics was not noticed")
		}
		src.fail(false)
		go func() { ended <- run() }() // as the server does
		src.change(func(r *fleet.Report) { r.Clusters[6].Timeline = 12 })
		pass(2 * time.Second)
		if got, _ := bad.updates(t); len(got) != 1 {
			t.Errorf("afterwards: %d events", len(got))
		}
		cancel()
		if reason := <-ended; reason != nil {
			t.Error(reason)
		}
		<-bad.ended
	})
}

// BenchmarkTick is what a second costs while somebody looks at 500 clusters.
func BenchmarkTick(b *testing.B) {
	for name, changed := range map[string]int{"none changed": 0, "one changed": 1, "all changed": 500} {
		b.Run(name, func(b *testing.B) {
			src := &sample{report: largeFleet(500, sampleTime)}
			p := newPages(src, slog.Default())
			now := p.advance(1, map[string]*scene{"": nil})
			p.since(now[""], 0, english)
			size := 0
			for i := int64(2); b.Loop(); i++ {
				src.change(func(r *fleet.Report) {
					for j := range changed {
						r.Clusters[j].LagBytes = pointer(i)
						r.Clusters[j].BytesPerSecond = float64(i << 10)
					}
				})
				now = p.advance(i, now)
				data, err := json.Marshal(p.since(now[""], i-1, english))
				if err != nil {
					b.Fatal(err)
				}
				size = len(data)
			}
			b.ReportMetric(float64(size), "bytes/event")
		})
	}
}
