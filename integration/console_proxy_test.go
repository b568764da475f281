package integration

import (
	"strings"
	"testing"
	"time"

	"github.com/Shopify/toxiproxy/v2"
)

// proxied is a page of the fleet that is reached over a network that can be spoilt.
type proxied struct {
	*page
	proxy *toxiproxy.Proxy
}

func (f *troubledFleet) openProxied(t *testing.T, b *browser, name string) proxied {
	t.Helper()
	proxy := startProxy(t, name, f.console())
	p := proxied{b.open(t, "http://"+proxy.Listen+"/", reader{}), proxy}
	p.await("the page is live", `document.documentElement.dataset.live === "live"`)
	return p
}

func (p proxied) spoil(t *testing.T, toxic string) {
	t.Helper()
	p.away(true)
	if _, err := p.proxy.Toxics.AddToxicJson(strings.NewReader(toxic)); err != nil {
		t.Fatal(err)
	}
}

// recovers repairs the network, and waits until the page has news again.
func (p proxied) recovers(t *testing.T) {
	t.Helper()
	p.proxy.Toxics.ResetToxics(t.Context())
	p.await("the page goes on", `document.documentElement.dataset.live === "live" && document.querySelector("#lost").hidden`)
}

const lost = `document.documentElement.dataset.live === "lost" && !document.querySelector("#lost").hidden`

// silent is a page whose stream says nothing any more, though its connection is there.
type silent struct {
	proxied
	began time.Time
}

func (f *troubledFleet) openSilent(t *testing.T, b *browser) silent {
	t.Helper()
	p := f.openProxied(t, b, "silent")
	evaluate[any](p.page, `new MutationObserver(() => { if (document.documentElement.dataset.live === "lost") window.lostAt ??= Date.now() }).observe(document.documentElement, {attributes: true})`)
	p.spoil(t, `{"type": "timeout", "attributes": {"timeout": 0}}`)
	return silent{p, time.Now()}
}

func (s silent) check(t *testing.T) {
	s.await("the silence is noticed", lost)
	at := time.UnixMilli(evaluate[int64](s.page, "window.lostAt"))
	t.Logf("the silence was noticed %s after it began", at.Sub(s.began).Round(time.Millisecond))
	s.recovers(t)
}

// checkBrokenConnection resets the page's connection.
func checkBrokenConnection(t *testing.T, b *browser, f *troubledFleet) {
	p := f.openProxied(t, b, "broken")
	begin := time.Now()
	p.spoil(t, `{"type": "reset_peer", "attributes": {"timeout": 0}}`)
	p.await("the banner", lost)
	t.Logf("the banner came %s after the network broke", time.Since(begin).Round(time.Millisecond))
	p.recovers(t)
}
