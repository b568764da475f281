package integration

import (
	"context"
	"fmt"
	"net/url"
	"os/exec"
	"slices"
	"strings"
	"sync"
	"testing"

	"github.com/chromedp/cdproto/cdp"
	"github.com/chromedp/cdproto/emulation"
	"github.com/chromedp/cdproto/input"
	"github.com/chromedp/cdproto/log"
	"github.com/chromedp/cdproto/network"
	"github.com/chromedp/cdproto/runtime"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"
)

// browser is a Chromium without a window.
type browser struct{ ctx context.Context }

// startBrowser starts one that lives until the end of the test. It knows no name and no address but those of this
// machine, whatever it would like to ask its maker.
func startBrowser(t testing.TB) *browser {
	t.Helper()
	var path string
	for _, name := range []string{"chromium", "chromium-browser", "google-chrome", "/Applications/Google Chrome.app/Contents/MacOS/Google Chrome"} {
		if found, err := exec.LookPath(name); err == nil {
			path = found
			break
		}
	}
	if path == "" {
		t.Skip("NOT TESTED: no Chromium is installed here, and the console is not looked at; \"make test\" as root installs it on Debian")
	}
	options := append(slices.Clone(chromedp.DefaultExecAllocatorOptions[:]),
		chromedp.ExecPath(path), chromedp.UserDataDir(t.TempDir()), chromedp.NoSandbox, chromedp.DisableGPU,
		chromedp.Flag("disable-quic", true), chromedp.Flag("disable-component-update", true),
		chromedp.Flag("host-resolver-rules", "MAP * ~NOTFOUND, EXCLUDE "+host))
	ctx, stop := chromedp.NewExecAllocator(context.Background(), options...)
	t.Cleanup(stop)
	ctx, closeBrowser := chromedp.NewContext(ctx)
	t.Cleanup(closeBrowser)
	if err := chromedp.Do(ctx); err != nil { // begins it; what limits this limits the browser's life
		t.Fatal(err)
	}
	return &browser{ctx}
}

// reader is who looks at a page, and with what. The zero value has a wide bright screen and reads English.
type reader struct {
	language string // as in Accept-Language
	narrow   bool   // a telephone's screen
	dark     bool   // prefers dark
	zoom     float64
}

func (r reader) size() (width, height int64) {
	width, height = 1280, 800
	if r.narrow {
		width, height = 390, 844
	}
	if r.zoom != 0 {
		width, height = int64(float64(width)/r.zoom), int64(float64(height)/r.zoom)
	}
	return width, height
}

// page is a tab of a browser, with cookies and a storage of its own.
type page struct {
	t   testing.TB
	ctx context.Context
	url *url.URL

	mu       sync.Mutex
	offline  bool     // the daemon is away on purpose, and the browser says so
	problems []string // what the browser complained of
	requests []string // the addresses that it asked for
}

// open shows an address to a reader. When the test ends, the page must have done nothing that a browser complains of, and
// must have asked nobody but walfleet.
func (b *browser) open(t testing.TB, address string, r reader) *page {
	t.Helper()
	u, err := url.Parse(address)
	if err != nil {
		t.Fatal(err)
	}
	p := &page{t: t, url: u}
	ctx, closeTab := chromedp.NewContext(b.ctx, chromedp.WithNewBrowserContext(), chromedp.WithListener(p.listen))
	p.ctx = ctx
	t.Cleanup(func() {
		closeTab()
		p.check(t)
	})
	if r.language == "" {
		r.language = "en-GB"
	}
	if err := chromedp.Do(ctx, chromedp.Func(func(ctx context.Context, tab *chromedp.Target) error {
		_, err := cdp.Call(ctx, tab, network.Enable, network.EnableParams{})
		return err
	})); err != nil {
		t.Fatal(err)
	}
	agent := evaluate[string](p, "navigator.userAgent")
	call(p, emulation.SetUserAgentOverride, emulation.SetUserAgentOverrideParams{UserAgent: agent, AcceptLanguage: r.language})
	p.as(r)
	p.do(chromedp.Navigate(address))
	return p
}

// listen is told of everything that happens in the tab.
func (p *page) listen(event any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	switch e := event.(type) {
	case *network.EventRequestWillBeSent:
		p.requests = append(p.requests, e.Request.URL)
	case *runtime.EventExceptionThrown:
		p.problems = append(p.problems, fmt.Sprintf("exception: %s %+v", e.ExceptionDetails.Text, e.ExceptionDetails.Exception))
	case *runtime.EventConsoleAPICalled:
		p.problems = append(p.problems, fmt.Sprintf("console.%s: %+v", e.Type, e.Args))
	case *log.EventEntryAdded:
		itself := strings.HasPrefix(e.Entry.URL, p.url.String()) && strings.Contains(e.Entry.Text, "404") // asked for a page that is not there
		if e.Entry.Source == log.EntrySourceNetwork && (p.offline || itself) {
			return
		}
		p.problems = append(p.problems, fmt.Sprintf("%s, %s: %s (%s)", e.Entry.Source, e.Entry.Level, e.Entry.Text, e.Entry.URL))
	}
}

// check reports what the browser complained of, and requests that did not go to walfleet.
func (p *page) check(t testing.TB) {
	t.Helper()
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, problem := range p.problems {
		t.Errorf("the browser complains at %s: %s", p.url, problem)
	}
	for _, address := range p.requests {
		if u, err := url.Parse(address); err != nil || u.Scheme != "data" && u.Host != p.url.Host {
			t.Errorf("%s asks %s", p.url, address)
		}
	}
}

// away tells whether the daemon cannot be reached, on purpose.
func (p *page) away(is bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.offline = is
}

// do acts on the page.
func (p *page) do(steps ...chromedp.Action[chromedp.Void]) {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	if err := chromedp.Do(ctx, steps...); err != nil {
		p.t.Fatalf("%s: %v", p.url, err)
	}
}

// press presses keys. A character comes of its key's own event, so that a page can have it otherwise.
func (p *page) press(keys string) {
	p.t.Helper()
	for _, key := range keys {
		events := kb.Encode(key)
		if len(events) == 3 {
			events[0].Text = events[1].Text
			events = []*input.DispatchKeyEventParams{events[0], events[2]}
		}
		for _, e := range events {
			call(p, input.DispatchKeyEvent, *e)
		}
	}
}

// click clicks on what a selector finds.
func (p *page) click(selector string) {
	p.t.Helper()
	p.do(chromedp.Click(chromedp.CSS(selector)))
}

// as gives the page a reader's screen, and what the reader's system prefers; not the language, which is asked for with a
// page.
func (p *page) as(r reader) {
	p.t.Helper()
	scheme := "light"
	if r.dark {
		scheme = "dark"
	}
	call(p, emulation.SetEmulatedMedia, emulation.SetEmulatedMediaParams{
		Features: []*emulation.MediaFeature{{Name: "prefers-color-scheme", Value: scheme}}})
	width, height := r.size()
	p.do(chromedp.EmulateViewport(width, height))
}

// call runs a command of the DevTools protocol in the page's tab.
func call[P, R any](p *page, command cdp.Command[P, R], params P) R {
	p.t.Helper()
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	result, err := chromedp.Call(ctx, command, params)
	if err != nil {
		p.t.Fatalf("%s: %v", p.url, err)
	}
	return result
}

// evaluate is the value of a JavaScript expression in the page.
func evaluate[T any](p *page, expression string) T {
	p.t.Helper()
	value, err := tryEvaluate[T](p, expression)
	if err != nil {
		p.t.Fatalf("%s: %v in\n%s", p.url, err, expression)
	}
	return value
}

func tryEvaluate[T any](p *page, expression string) (T, error) {
	ctx, cancel := context.WithTimeout(p.ctx, patience)
	defer cancel()
	return chromedp.Run(ctx, chromedp.Evaluate[T](expression, chromedp.EvalAwaitPromise))
}

// await waits until an expression is true in the page, which may be one that has begun to load.
func (p *page) await(what, expression string) {
	p.t.Helper()
	await(p.t, patience, fmt.Sprintf("%s: %s", p.url, what), func() (bool, string) {
		ok, err := tryEvaluate[bool](p, "Boolean("+expression+")")
		if ok || err != nil {
			return ok, fmt.Sprint(err)
		}
		saw, err := tryEvaluate[string](p, "document.documentElement.dataset.live + ', ' + document.body.innerText")
		return false, fmt.Sprint(saw, err)
	})
}
