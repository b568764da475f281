package console

import (
	"bytes"
	"fmt"
	"log/slog"
	"math"
	"net/http"
	"net/http/httptest"
	"os/exec"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/wal"
)

// failing is a log whose lines fail a test: the pages log what they could not make.
func failing(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(writerFunc(func(b []byte) (int, error) {
		t.Errorf("logged: %s", b)
		return len(b), nil
	}), nil))
}

type writerFunc func([]byte) (int, error)

func (f writerFunc) Write(b []byte) (int, error) { return f(b) }

func handlerOf(p *pages) http.Handler {
	mux := http.NewServeMux()
	p.register(mux)
	return mux
}

// ask is what h answers; header is "Name: value", or "".
func ask(t testing.TB, h http.Handler, url, header string) *httptest.ResponseRecorder {
	t.Helper()
	r := httptest.NewRequest(http.MethodGet, url, nil)
	if name, value, ok := strings.Cut(header, ": "); ok {
		r.Header.Set(name, value)
	}
	w := httptest.NewRecorder()
	h.ServeHTTP(w, r)
	return w
}

// read makes the pages know what is in an archive.
func (p *pages) readNow(t testing.TB, cluster string) {
	t.Helper()
	p.archives.of(cluster)
	p.archives.read(t.Context(), <-p.archives.queue)
}

// samplePages are all kinds of pages, in both languages, by a name for each.
func samplePages(t *testing.T, change func(*fleet.Report)) map[string]string {
	t.Helper()
	src := &sample{report: sampleFleet(sampleTime)}
	src.report.Daemon.LastReload = &fleet.Outcome{Time: sampleTime, Error: "walfleet.toml:12: unknown key \"compres\""}
	if change != nil {
		change(&src.report)
	}
	p := newPages(src, failing(t))
	h := handlerOf(p)
	all := map[string]string{}
	for _, l := range []string{"en", "zh"} {
		all["fleet "+l] = ask(t, h, "/?lang="+l, "").Body.String()
		all["missing "+l] = ask(t, h, "/clusters/nobody?lang="+l, "").Body.String()
		for _, c := range src.report.Clusters {
			url := "/clusters/" + link(c.Name) + "?lang=" + l
			all["unread "+c.Name+" "+l] = ask(t, h, url, "").Body.String()
			p.readNowIfAsked(t)
			all[c.Name+" "+l] = ask(t, h, url, "").Body.String()
		}
		empty := newPages(&sample{report: fleet.Report{Time: sampleTime}}, failing(t))
		all["empty "+l] = ask(t, handlerOf(empty), "/?lang="+l, "").Body.String()
	}
	return all
}

func (p *pages) readNowIfAsked(t testing.TB) {
	t.Helper()
	select {
	case cluster := <-p.archives.queue:
		p.archives.read(t.Context(), cluster)
	default:
	}
}

func TestEveryTextIsThereInEveryLanguage(t *testing.T) {
	verb := regexp.MustCompile(`%(\[\d\])?[ds]`)
	for key, text := range texts {
		for l, s := range text {
			if s == "" {
				t.Errorf("%q has no text in %s", key, languageNames[l].Name)
			}
			if strings.Contains(strings.Join(verb.Split(s, -1), ""), "%") {
				t.Errorf("%q: %q has a verb other than %%d and %%s", key, s)
			}
		}
	}
	used := regexp.MustCompile(`\bt "([^"]+)"`)
	for _, file := range entries("templates") {
		for _, m := range used.FindAllStringSubmatch(string(read("templates/"+file)), -1) {
			if _, ok := texts[m[1]]; !ok {
				t.Errorf("%s uses the text %q, which is not there", file, m[1])
			}
		}
	}
	for _, state := range inOrder {
		if _, ok := texts["state."+state]; !ok {
			t.Errorf("the state %s has no words", state)
		}
	}
	for name, page := range samplePages(t, nil) {
		for _, wrong := range []string{"⟦", "%!", "(MISSING)", "ZgotmplZ"} {
			if i := strings.Index(page, wrong); i >= 0 {
				t.Errorf("%s: %q", name, page[max(0, i-60):min(len(page), i+80)])
			}
		}
	}
}

// A page in Chinese has no English word of ours: what is English in it is marked so, or a name.
func TestChinesePagesAreChinese(t *testing.T) {
	for name, page := range samplePages(t, nil) {
		if !strings.HasSuffix(name, " zh") {
			continue
		}
		if !strings.Contains(page, `<html lang="zh-CN">`) {
			t.Errorf("%s is not marked as Chinese", name)
		}
		for key, text := range texts {
			for form := range strings.SplitSeq(text[english], "|") {
				if text[english] != text[chinese] && !strings.Contains(form, "%") && strings.Contains(page, ">"+form+"<") {
					t.Errorf("%s says %q (%s)", name, form, key)
				}
			}
		}
	}
}

func TestLanguageNegotiation(t *testing.T) {
	for _, c := range []struct {
		url, accept, cookie string
		want                language
		remembered          bool
	}{
		{url: "/", want: english},
		{url: "/", accept: "zh-CN,zh;q=0.9,en;q=0.8", want: chinese},
		{url: "/", accept: "de-DE,de;q=0.9,zh;q=0.5,en;q=0.3", want: chinese},
		{url: "/", accept: "en-GB,zh;q=0.9", want: english},
		{url: "/", accept: "en;q=0.1, ZH-Hant-TW;q=0.2", want: chinese},
		{url: "/", accept: "zh;q=0, de", want: english},
		{url: "/", accept: "zh;q=nonsense", want: english},
		{url: "/", accept: "zh;q=NaN", want: english},
		{url: "/", accept: strings.Repeat("de,", 100) + "zh", want: english},
		{url: "/", accept: "en", cookie: "zh", want: chinese},
		{url: "/", accept: "zh", cookie: "<script>", want: chinese},
		{url: "/?lang=en", accept: "zh", cookie: "zh", want: english, remembered: true},
		{url: "/?lang=zh", want: chinese, remembered: true},
		{url: "/?lang=zh%0d%0aSet-Cookie:x=y", want: english},
		{url: "/?lang=ZH", accept: "en", want: english},
	} {
		r := httptest.NewRequest(http.MethodGet, c.url, nil)
		r.Header.Set("Accept-Language", c.accept)
		if c.cookie != "" {
			r.AddCookie(&http.Cookie{Name: languageCookie, Value: c.cookie})
		}
		w := httptest.NewRecorder()
		handlerOf(newPages(&sample{report: sampleFleet(sampleTime)}, failing(t))).ServeHTTP(w, r)
		if want := `<html lang="` + languageNames[c.want].Tag + `">`; !strings.Contains(w.Body.String(), want) {
			t.Errorf("%+v: want %s", c, want)
		}
		if set := w.Header().Get("Set-Cookie"); (set != "") != c.remembered || c.remembered && !strings.HasPrefix(set, "lang="+languageNames[c.want].Short+"; ") {
			t.Errorf("%+v: cookie %q", c, set)
		}
	}
}

func TestHostileTextIsShownAndDoesNothing(t *testing.T) {
	const evil = "</td><script>alert(1)</script>\"'`><img src=x onerror=alert(2)>\u202eltr\u2066\x00\x1b[31m{{.}}"
	pages := samplePages(t, func(r *fleet.Report) {
		r.Daemon.Version, r.Daemon.Config = evil, evil
		r.Daemon.LastReload.Error = evil
		c := &r.Clusters[6]
		c.Name, c.State, c.Reason, c.Hint, c.Host, c.ServerVersion, c.LastError, c.Directory, c.Slot, c.User = evil, evil, evil, evil, evil, evil, evil+"2", evil, evil, evil
		c.FlushedLSN, c.ServerLSN, c.SystemIdentifier, c.PolarDBVersion = evil, evil, evil, evil
		c.Hosts = []string{evil}
		c.Settings = map[string]any{evil: evil}
		c.Warnings = []fleet.WarningReport{{Kind: evil, Host: evil, Text: evil, Hint: evil}}
		c.Slots = []fleet.SlotReport{{Host: evil, Time: sampleTime, Note: evil, Exists: true, Status: evil, Invalid: evil, SyncState: evil, RestartLSN: evil}}
		c.Events = []fleet.EventReport{{Time: sampleTime, Level: evil, Text: evil}}
		c.Archive.Error, c.Archive.OriginLSN, c.Archive.OriginSource = evil, evil, evil
		c.Archive.LastVerify.Error, c.Archive.LastDrill.Error, c.Archive.LastDrill.RecoveredLSN = evil, evil, evil
	})
	p := newPages(&sample{}, failing(t))
	contents := sampleContents()
	contents.Error, contents.Holes[0].Kind, contents.Holes[0].From, contents.Holes[1].Reason, contents.Timelines[0].ForkLSN, contents.Timelines[1].ForkLSN = evil, evil, evil, evil, evil, evil
	contents.Recoverable[0].Problem, contents.Recoverable[0].FromLSN, contents.Timelines[0].Ranges[0].StartLSN, contents.Timelines[0].Partial[0].Segment = evil, evil, evil, evil
	contents.SegmentSize = -5
	pages["map"] = p.execute(english, "map", mapOf(reading{contents: contents, ended: sampleTime}))
	shown := 0
	for name, page := range pages {
		for _, bad := range []string{"<script>alert", "<img", "\u202e", "\u2066", "\x00", "\x1b", "</td><script"} {
			if strings.Contains(page, bad) {
				t.Errorf("%s has %q", name, bad)
			}
		}
		shown += strings.Count(page, `\u202eltr\u2066\x00\x1b[31m`)
		harmless(t, name, page)
	}
	if shown < 60 {
		t.Errorf("hostile text is shown %d times with what it hides written out", shown)
	}
}

// harmless fails for what the Content-Security-Policy forbids, and for URLs of other places.
func harmless(t *testing.T, name, page string) {
	t.Helper()
	tag := regexp.MustCompile(`<[a-zA-Z][^>"]*("[^"]*"[^>"]*)*>`)
	forbidden := regexp.MustCompile(`(?i)^<style|\sstyle=|\son[a-z]+=|(src|href|action|data|content)="?\s*(javascript|data|vbscript|[a-z]+://|//)|^<(iframe|object|embed|base|form|link [^>]*stylesheet[^>]*http)`)
	for _, m := range tag.FindAllString(page, -1) {
		bare := regexp.MustCompile(`"[^"]*"`).ReplaceAllStringFunc(m, func(v string) string { // what attributes say is no attribute
			if regexp.MustCompile(`^"(\s*(javascript|data|vbscript):|[a-z]+://|//)`).MatchString(v) {
				return v
			}
			return `"…"`
		})
		if forbidden.MatchString(bare) {
			t.Errorf("%s has %s", name, m)
		}
		if strings.HasPrefix(m, "<script") && !regexp.MustCompile(`^<script src="\.{1,2}/assets/console\.[0-9a-f]{12}\.js">$`).MatchString(m) {
			t.Errorf("%s has %s", name, m)
		}
	}
}

func TestPagesKeepTheContentSecurityPolicy(t *testing.T) {
	for name, page := range samplePages(t, nil) {
		harmless(t, name, page)
		if n := strings.Count(page, "<script"); n != 1 {
			t.Errorf("%s has %d scripts", name, n)
		}
		ids := map[string]bool{}
		for _, m := range regexp.MustCompile(` id="([^"]*)"`).FindAllStringSubmatch(page, -1) {
			if ids[m[1]] {
				t.Errorf("%s has the id %q twice", name, m[1])
			}
			ids[m[1]] = true
		}
		for _, m := range regexp.MustCompile(`aria-labelledby="([^"]*)"`).FindAllStringSubmatch(page, -1) {
			if !ids[m[1]] {
				t.Errorf("%s refers to %q, which is not there", name, m[1])
			}
		}
		if opened, closed := len(regexp.MustCompile(`<(section|div|table|tbody|tr|td|th|dl|ol|p|span|svg|a)[ >]`).FindAllString(page, -1)),
			len(regexp.MustCompile(`</(section|div|table|tbody|tr|td|th|dl|ol|p|span|svg|a)>`).FindAllString(page, -1)); opened != closed {
			t.Errorf("%s opens %d elements and closes %d", name, opened, closed)
		}
		if strings.Count(page, "<h1") != 1 {
			t.Errorf("%s has not one h1", name)
		}
	}
}

func TestPageIsMadeOfWhatTheStreamSends(t *testing.T) {
	src := &sample{report: sampleFleet(sampleTime)}
	p := newPages(src, failing(t))
	p.readNow(t, "ledger")
	for url, page := range map[string]string{"/": "", "/clusters/ledger": "ledger"} {
		for l := range languages {
			body := ask(t, handlerOf(p), url+"?lang="+languageNames[l].Short, "").Body.String()
			now := p.advance(1, map[string]*scene{page: nil})[page]
			u := p.since(now, 0, l)
			if len(u.Fragments) < 9 {
				t.Errorf("%s: %d fragments", url, len(u.Fragments))
			}
			for id, html := range u.Fragments {
				if !strings.Contains(body, html) || !strings.Contains(html, ` id="`+id+`"`) {
					t.Errorf("%s: the page differs from the fragment %s:\n%s", url, id, html)
				}
			}
			for _, a := range now.parts {
				if !strings.Contains(body, p.render(a, l)) {
					t.Errorf("%s: the page differs from the part %s", url, a.id)
				}
			}
		}
	}
}

func TestFleetHeadline(t *testing.T) {
	in := func(health fleet.Health, state string, n int) (list []fleet.ClusterReport) {
		for i := range n {
			list = append(list, fleet.ClusterReport{Name: fmt.Sprintf("%s%d", health, i), Health: health, State: state})
		}
		return list
	}
	gap := in(fleet.Healthy, "streaming", 1)
	gap[0].Gaps = 2
	for _, c := range []struct {
		clusters []fleet.ClusterReport
		english  string
		chinese  string
	}{
		{nil, "No cluster is configured", "没有配置任何集群"},
		{in(fleet.Healthy, "streaming", 1), "The database is archived", "数据库正在归档"},
		{in(fleet.Healthy, "streaming", 12), "All 12 databases are archived", "全部 12 个数据库都在归档"},
		{slices.Concat(in(fleet.Critical, "halted", 1), in(fleet.Healthy, "streaming", 2)), "1 of 3 databases is not being archived: critical0", "3 个数据库中有 1 个没有在归档：critical0"},
		{slices.Concat(in(fleet.Critical, "backoff", 2), in(fleet.Warning, "streaming", 1)), "2 of 3 databases are not being archived: critical0, critical1 1 more needs attention: warning0",
			"3 个数据库中有 2 个没有在归档：critical0、critical1 另有 1 个需要关注：warning0"},
		{slices.Concat(in(fleet.Critical, "streaming", 1), in(fleet.Healthy, "streaming", 1)), "1 of 2 archives is damaged or in danger: critical0", "2 个归档中有 1 个已损坏或有风险：critical0"},
		{in(fleet.Warning, "connecting", 10), "10 of 10 databases need attention: warning0, warning1, warning2, warning3, warning4, warning5, warning6, warning7 and 2 more",
			"10 个数据库中有 10 个需要关注：warning0、warning1、warning2、warning3、warning4、warning5、warning6、warning7 等另外 2 个"},
		{gap, "The database is archived 1 archive has WAL missing for good: ok0. A recovery needs a base backup from after the gap.", "数据库正在归档 1 个归档中有永久缺失的 WAL：ok0。 恢复需要使用缺口之后的基础备份。"},
	} {
		p := newPages(&sample{report: fleet.Report{Time: sampleTime, Clusters: c.clusters}}, failing(t))
		for l, want := range []string{c.english, c.chinese} {
			s := fleetScene(p.source.Report())
			html := regexp.MustCompile(`<[^>]*>`).ReplaceAllString(p.render(s.byID["headline"], language(l)), "")
			if got := strings.Join(strings.Fields(html), " "); got != want {
				t.Errorf("got  %s\nwant %s", got, want)
			}
		}
	}
}

func TestWorstClustersComeFirst(t *testing.T) {
	s := fleetScene(sampleFleet(sampleTime))
	if want := []string{"c:ledger", "c:warehouse", "c:telemetry", "c:eu-orders", "c:mail", "c:accounts"}; !slices.Equal(s.rows[:6], want) {
		t.Errorf("got %v, want %v", s.rows[:6], want)
	}
}

func TestAssetsAreServedForEver(t *testing.T) {
	p := newPages(&sample{report: sampleFleet(sampleTime)}, failing(t))
	h := handlerOf(p)
	page := ask(t, h, "/", "").Body.String()
	kinds := map[string]string{}
	for _, m := range regexp.MustCompile(`"\./(assets/[^"]*)"`).FindAllStringSubmatch(page, -1) {
		w := ask(t, h, "/"+m[1], "")
		if w.Code != http.StatusOK || w.Header().Get("Cache-Control") != "public, max-age=31536000, immutable" || w.Body.Len() == 0 {
			t.Errorf("%s: %d %v", m[1], w.Code, w.Header())
		}
		kinds[m[1][strings.LastIndex(m[1], "."):]] = w.Header().Get("Content-Type")
	}
	for ext, want := range map[string]string{".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8", ".svg": "image/svg+xml"} {
		if kinds[ext] != want {
			t.Errorf("%s has the type %q", ext, kinds[ext])
		}
	}
	for _, url := range []string{"/assets/console.js", "/assets/../pages.go", "/assets/%2e%2e%2fpages.go", "/assets/..%2ftemplates%2fpage.html", "/assets/", "/assets/%00", "/templates/page.html"} {
		if w := ask(t, h, url, ""); w.Code == http.StatusOK {
			t.Errorf("%s is served", url)
		}
	}
}

func TestUnknownClusterHasNoPage(t *testing.T) {
	h := handlerOf(newPages(&sample{report: sampleFleet(sampleTime)}, failing(t)))
	for _, name := range []string{"nobody", "%3Cscript%3E", "led%00ger", strings.Repeat("x", 5000)} {
		w := ask(t, h, "/clusters/"+name, "")
		if w.Code != http.StatusNotFound || strings.Contains(w.Body.String(), "nobody") || strings.Contains(w.Body.String(), "xxx") {
			t.Errorf("%.20s: %d", name, w.Code)
		}
	}
}

// The page names a cluster's time as the command line names it, and the script as the page.
func TestSpan(t *testing.T) {
	for seconds, want := range map[int64][languages]string{0: {"0s", "0秒"}, 59: {"59s", "59秒"}, 61: {"1m 1s", "1分 1秒"}, 7325: {"2h 2m", "2小时 2分"}, 90000: {"1d 1h", "1天 1小时"}, -5: {"0s", "0秒"}} {
		for l, text := range want {
			if got := language(l).span(seconds); got != text {
				t.Errorf("%d: %q, want %q", seconds, got, text)
			}
		}
	}
}

func TestSparkline(t *testing.T) {
	if v := (sparkView{}).Draw(); v.Points != "" || v.Width < 1 {
		t.Errorf("without a history: %+v", v)
	}
	rapid.Check(t, func(t *rapid.T) {
		h := &fleet.HistoryReport{IntervalSeconds: rapid.Float64Range(0.001, 2000).Draw(t, "interval"),
			BytesPerSecond: rapid.SliceOfN(rapid.Int64(), 1, 400).Draw(t, "rates")}
		v := sparkView{"x", h}.Draw()
		last, n := -1, 0
		for point := range strings.FieldsSeq(v.Points) {
			var x int
			var y float64
			if _, err := fmt.Sscanf(point, "%d,%f", &x, &y); err != nil || x < last || x < 0 || x > v.Width || y < 1 || y > sparkBottom {
				t.Fatalf("point %q after %d in a width of %d: %v", point, last, v.Width, err)
			}
			last = x
			n++
		}
		if last != v.Width || n > sparkLimit+2 {
			t.Fatalf("%d points end at %d of %d", n, last, v.Width)
		}
	})
	// The newest is at the right, what the daemon has not seen is empty, and the peak reaches the top.
	v := sparkView{"x", &fleet.HistoryReport{IntervalSeconds: 10, BytesPerSecond: []int64{0, 1 << 20}}}.Draw()
	if v.Points != "88,23 88,23.0 89,1.0 89,23" || v.Peak != "1.0 MB/s" {
		t.Errorf("%+v", v)
	}
}

// aContents is an archive of any shape.
func aContents(t *rapid.T) fleet.Contents {
	c := fleet.Contents{Time: sampleTime, SegmentSize: 16 << 20}
	at := wal.LSN(rapid.Uint64Range(0, 1<<40).Draw(t, "begin"))
	step := func(what string) wal.LSN {
		at += wal.LSN(rapid.SampledFrom([]uint64{1, 8, 16 << 20, 1 << 30, 1 << 43}).Draw(t, what))
		return at
	}
	for tli := range uint32(rapid.IntRange(1, 6).Draw(t, "timelines")) {
		tl := fleet.TimelineContents{Timeline: tli + 1, Parent: tli}
		if tli > 0 {
			tl.ForkLSN = step("fork").String()
		}
		for i := range rapid.IntRange(0, 8).Draw(t, "ranges") {
			from := at
			tl.Ranges = append(tl.Ranges, fleet.RangeReport{StartLSN: from.String(), EndLSN: step("range").String()})
			if i > 0 || tli > 0 {
				from := at
				c.Holes = append(c.Holes, fleet.HoleReport{Kind: rapid.SampledFrom([]string{"gap", "hole", "divergence"}).Draw(t, "kind"), Timeline: tli + 1, From: from.String(), To: step("hole").String()})
			}
		}
		c.Timelines = append(c.Timelines, tl)
	}
	return c
}

func placeOf(t interface{ Fatalf(string, ...any) }, percent string) float64 {
	f, err := strconv.ParseFloat(strings.TrimSuffix(percent, "%"), 64)
	if err != nil || f < -0.001 || f > 100.001 {
		t.Fatalf("%q is no place in the drawing", percent)
	}
	return f
}

// Whatever an archive has, each gap is wide enough to be seen, and what comes later is further right.
func TestMapShowsEveryHole(t *testing.T) {
	rapid.Check(t, func(t *rapid.T) {
		c := aContents(t)
		v := drawMap(c)
		if len(v.Marks) != len(c.Holes) || len(v.Holes) != len(c.Holes) {
			t.Fatalf("%d marks and %d texts for %d holes", len(v.Marks), len(v.Holes), len(c.Holes))
		}
		end := -1.0
		for i, m := range v.Marks {
			x, w := placeOf(t, m.X), placeOf(t, m.W)
			if px := w * float64(v.Width) / 100; px < leastStretch-0.1 {
				t.Fatalf("hole %d of %s is %.1f pixels wide", i, v.Holes[i].Size, px)
			}
			if x < end-0.01 || m.Number != i+1 {
				t.Fatalf("hole %d begins at %f, before %f", i, x, end)
			}
			end = x + w
		}
		for _, l := range v.Lanes {
			end := -1.0
			for _, b := range l.Bars {
				x, w := placeOf(t, b.X), placeOf(t, b.W)
				if x < end-0.01 || w*float64(v.Width)/100 < leastStretch-0.1 {
					t.Fatalf("bar %+v after %f", b, end)
				}
				end = x + w
			}
		}
		free := math.Inf(-1)
		for _, tick := range slices.SortedFunc(slices.Values(v.Ticks), func(a, b tick) int { return int(1000 * (placeOf(t, a.X) - placeOf(t, b.X))) }) {
			if tick.Label == "" {
				continue
			}
			x, room := placeOf(t, tick.X), 100*float64(tickRoom)/float64(v.Width)
			begin := map[string]float64{"start": x, "middle": x - room/2, "end": x - room}[tick.Anchor]
			if begin < free-0.01 {
				t.Fatalf("the label %s is over the one before", tick.Label)
			}
			free = begin + room
		}
	})
}

func TestMapOfAnArchiveThatCannotBeRead(t *testing.T) {
	for _, c := range []struct {
		known reading
		state string
		says  string
	}{
		{reading{}, "reading", "being read"},
		{reading{ended: sampleTime, err: fmt.Errorf("input/output error")}, "failed", "input/output error"},
		{reading{ended: sampleTime, contents: sampleContents(), err: fmt.Errorf("input/output error")}, "ready", "input/output error"},
		{reading{ended: sampleTime, contents: fleet.Contents{Time: sampleTime}}, "ready", "no complete segment"},
	} {
		html := newPages(&sample{}, failing(t)).execute(english, "map", mapOf(c.known))
		if !strings.Contains(html, `data-map="`+c.state+`"`) || !strings.Contains(html, c.says) {
			t.Errorf("%s, %q:\n%s", c.state, c.says, html)
		}
	}
}

// readConf is what PostgreSQL makes of a string in its configuration file (GUC_scanstr), and restore_command of its
// "%%".
func readConf(s string) string {
	var b strings.Builder
	for i := 0; i < len(s); i++ {
		switch {
		case s[i] == '\\' && s[i+1] == 'n':
			b.WriteByte('\n')
			i++
		case s[i] == '\\', s[i] == '\'', s[i] == '%' && s[i+1] == '%':
			i++
			b.WriteByte(s[i])
		default:
			b.WriteByte(s[i])
		}
	}
	return b.String()
}

func TestRestoreCommandReachesWalfleetAsItIs(t *testing.T) {
	if got, want := restoreCommand("/etc/walfleet/walfleet.toml", "orders"), `restore_command = 'walfleet -c /etc/walfleet/walfleet.toml restore-wal orders "%f" "%p"'`; got != want {
		t.Errorf("got  %s\nwant %s", got, want)
	}
	for _, config := range []string{"/etc/my walfleet.toml", `/it's/a "path"/$HOME/` + "`x`.toml", `/back\slash\n.toml`, "/100%f.toml", "/new\nline", "/数据库/*?.toml"} {
		line := restoreCommand(config, "orders")
		value := strings.TrimSuffix(strings.TrimPrefix(line, "restore_command = '"), "'")
		if strings.Contains(line, "\n") {
			t.Errorf("%q: more than a line", line)
		}
		command := strings.Replace(readConf(value), `"%f" "%p"`, `"0001" "pg_wal/x"`, 1)
		out, err := exec.Command("sh", "-c", `walfleet() { printf '%s\0' "$@"; }; `+command).Output()
		if want := strings.Join([]string{"-c", config, "restore-wal", "orders", "0001", "pg_wal/x", ""}, "\x00"); err != nil || string(out) != want {
			t.Errorf("%s: %v\ngot  %q\nwant %q", line, err, out, want)
		}
	}
}

// The colours of the style sheet can be told apart by everyone (WCAG 2, AA).
func TestContrast(t *testing.T) {
	colour := map[string][2]float64{}
	luminance := func(hex string) float64 {
		sum := 0.0
		for i, weight := range []float64{0.2126, 0.7152, 0.0722} {
			n, err := strconv.ParseUint(hex[2*i:2*i+2], 16, 8)
			if err != nil {
				t.Fatal(err)
			}
			c := float64(n) / 255
			if c <= 0.03928 {
				c /= 12.92
			} else {
				c = math.Pow((c+0.055)/1.055, 2.4)
			}
			sum += weight * c
		}
		return sum
	}
	for _, m := range regexp.MustCompile(`--([a-z-]+): light-dark\(#([0-9a-f]{6}), #([0-9a-f]{6})\)`).FindAllSubmatch(read("assets/console.css"), -1) {
		colour[string(m[1])] = [2]float64{luminance(string(m[2])), luminance(string(m[3]))}
	}
	grounds := []string{"ground", "paper", "raised", "ok-ground", "warning-ground", "critical-ground"}
	for _, c := range []struct {
		fore  string
		least float64
		on    []string
	}{
		{"text", 4.5, grounds}, {"quiet", 4.5, grounds}, {"link", 4.5, grounds},
		{"ok", 4.5, []string{"ground", "paper", "raised"}}, {"warning", 4.5, grounds}, {"critical", 4.5, grounds},
		{"edge", 3, []string{"ground", "paper"}}, {"range", 3, []string{"paper"}}, {"hatch", 3, []string{"paper", "hatch-ground"}}, {"spark", 3, []string{"paper"}},
	} {
		for _, on := range c.on {
			for theme, name := range []string{"light", "dark"} {
				a, okA := colour[c.fore]
				b, okB := colour[on]
				if !okA || !okB {
					t.Fatalf("no colour %s or %s", c.fore, on)
				}
				if ratio := (max(a[theme], b[theme]) + 0.05) / (min(a[theme], b[theme]) + 0.05); ratio < c.least {
					t.Errorf("%s on %s, %s: %.2f, want %.1f", c.fore, on, name, ratio, c.least)
				}
			}
		}
	}
}

// The page of 500 clusters is no more than a browser takes at once.
func TestLargePage(t *testing.T) {
	w := ask(t, handlerOf(newPages(&sample{report: largeFleet(500, sampleTime)}, failing(t))), "/", "")
	if n := w.Body.Len(); n > 1_500_000 || bytes.Count(w.Body.Bytes(), []byte("<tr role=\"row\" id=")) != 500 {
		t.Errorf("%d bytes", n)
	}
}

func BenchmarkFleetPage(b *testing.B) {
	h := handlerOf(newPages(&sample{report: largeFleet(500, time.Now())}, slog.Default()))
	for b.Loop() {
		ask(b, h, "/", "")
	}
}

// A server that is down is tried again all the time: its state changes with each attempt, and a screen reader is left
// in peace.
func TestAttemptsAreNotSpoken(t *testing.T) {
	spoken := func(state string, health fleet.Health) string {
		r := sampleFleet(sampleTime)
		r.Clusters[10].State, r.Clusters[10].Health = state, health
		p := newPages(&sample{}, failing(t))
		one, _ := r.Cluster(r.Clusters[10].Name)
		return p.render(fleetScene(r).byID["spoken"], english) + p.render(clusterScene(one, reading{}).byID["spoken"], english)
	}
	if a, b := spoken("backoff", fleet.Critical), spoken("connecting", fleet.Critical); a != b {
		t.Errorf("an attempt is spoken: %s, %s", a, b)
	}
	if a, b := spoken("backoff", fleet.Critical), spoken("streaming", fleet.Healthy); a == b {
		t.Errorf("the end of an outage is not spoken: %s", a)
	}
}

// A directory that was taken away from under a receiver is said on both pages.
func TestUnreadableArchiveIsSaid(t *testing.T) {
	now := time.Now()
	c := fleet.ClusterReport{Name: "a", State: "streaming", Health: fleet.Warning, Since: now.Add(-time.Hour),
		Archive: &fleet.ArchiveReport{Time: now, Error: "there is no directory yet"}}
	const want = "the archive's directory cannot be looked into: there is no directory yet"
	if row := rowOf(c); len(row.Warnings) != 1 || row.Warnings[0] != want {
		t.Errorf("the fleet's page says %q", row.Warnings)
	}
	if head := clusterHeadlineOf(c); len(head.Warnings) != 1 || head.Warnings[0].Text != want {
		t.Errorf("the cluster's page says %+v", head.Warnings)
	}
	c.Since = now // a state that has just begun, and a look from before
	if row := rowOf(c); len(row.Warnings) != 0 {
		t.Errorf("the fleet's page says %q", row.Warnings)
	}
}
