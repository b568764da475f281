package integration

import (
	"fmt"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/chromedp/cdproto/accessibility"
	"github.com/chromedp/chromedp"
	"github.com/chromedp/chromedp/kb"

	"github.com/walfleet/walfleet/receiver"
)

// visibleTexts is JavaScript: each piece of text that is to be seen, with the colours that it is painted with as
// numbers (through a canvas, which knows every notation), and the contrast between them as in WCAG 2.
const visibleTexts = `(() => {
	const context = Object.assign(document.createElement("canvas"), {width: 1, height: 1}).getContext("2d", {willReadFrequently: true});
	const rgba = colour => {
		context.clearRect(0, 0, 1, 1);
		context.fillStyle = colour;
		context.fillRect(0, 0, 1, 1);
		const [r, g, b, a] = context.getImageData(0, 0, 1, 1).data;
		return [r, g, b, a / 255];
	};
	const over = (top, below) => [0, 1, 2].map(i => top[i] * top[3] + below[i] * (1 - top[3])).concat(1);
	const background = e => {
		const layers = [];
		for (; e; e = e.parentElement) layers.push(rgba(getComputedStyle(e).backgroundColor));
		return layers.reverse().reduce((below, top) => over(top, below), [255, 255, 255, 1]);
	};
	// Of a drawing, what is below a text is another shape, or two of them where it is hatched.
	const drawing = e => {
		e.scrollIntoView({block: "center", inline: "center"});
		const box = e.getBoundingClientRect();
		const stack = document.elementsFromPoint(box.x + box.width / 2, box.y + box.height / 2).filter(s => s !== e && !e.contains(s) && !s.contains(e));
		const shape = stack.find(s => s instanceof SVGGeometryElement && getComputedStyle(s).fill !== "none");
		if (!shape) return [background(e)];
		const fill = getComputedStyle(shape).fill;
		const below = background(shape);
		return (fill.startsWith("url") ? [...document.querySelectorAll("#hatch rect")].map(r => getComputedStyle(r).fill) : [fill]).map(f => over(rgba(f), below));
	};
	const opacity = e => e ? Number(getComputedStyle(e).opacity) * opacity(e.parentElement) : 1;
	const luminance = c => [0.2126, 0.7152, 0.0722].reduce((sum, weight, i) => {
		const v = c[i] / 255;
		return sum + weight * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
	}, 0);
	const found = [];
	const add = (e, text, colour, size, weight) => {
		const ink = rgba(colour);
		ink[3] *= opacity(e);
		const contrast = paper => {
			const [dark, light] = [luminance(over(ink, paper)), luminance(paper)].sort((a, b) => a - b);
			return (light + 0.05) / (dark + 0.05);
		};
		const papers = e instanceof SVGElement ? drawing(e) : [background(e)];
		const large = size >= 24 || size >= 18.66 && weight >= 700;
		found.push({Text: text.trim().slice(0, 60), In: e.tagName + (e.className ? "." + (e.className.baseVal ?? e.className) : ""),
			Contrast: Math.min(...papers.map(contrast)), Needed: large ? 3 : 4.5});
	};
	const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
	while (walker.nextNode()) {
		const e = walker.currentNode.parentElement;
		if (!walker.currentNode.data.trim() || !e.checkVisibility({visibilityProperty: true}) || ["SCRIPT", "STYLE", "TITLE", "DESC"].includes(e.tagName.toUpperCase())) continue;
		const range = document.createRange();
		range.selectNodeContents(walker.currentNode);
		const box = range.getBoundingClientRect();
		if (box.width <= 1 || box.height <= 1) continue; // for screen readers alone
		const style = getComputedStyle(e);
		add(e, walker.currentNode.data, e instanceof SVGElement ? style.fill : style.color, parseFloat(style.fontSize), Number(style.fontWeight));
	}
	for (const input of document.querySelectorAll("input[placeholder]")) {
		const style = getComputedStyle(input, "::placeholder");
		add(input, input.placeholder, style.color, parseFloat(style.fontSize), Number(style.fontWeight));
	}
	return found;
})()`

type visibleText struct {
	Text, In         string
	Contrast, Needed float64
}

// pages are those that are looked at for what holds for every page.
func (f *troubledFleet) pages() []string {
	return []string{f.url + "/", f.url + "/clusters/" + halted, f.url + "/clusters/" + healthy, f.url + "/clusters/there-is-none"}
}

// ready waits until a page has everything that comes after it was loaded.
func (p *page) ready() {
	p.t.Helper()
	p.await("the page is complete", `document.readyState === "complete" && (document.body.dataset.page === "missing" || document.documentElement.dataset.live === "live") &&
		!document.querySelector("#map[data-map=reading]")`)
}

func checkThemes(t *testing.T, b *browser, f *troubledFleet) {
	const paper = `getComputedStyle(document.body).backgroundColor + getComputedStyle(document.documentElement).backgroundColor`
	p := b.open(t, f.url, reader{})
	light := evaluate[string](p, paper)
	p.as(reader{dark: true})
	dark := evaluate[string](p, paper)
	if light == dark {
		t.Errorf("the page is %s whatever the reader prefers", light)
	}
	p.as(reader{})
	// The switch goes through all that there is, and what was chosen stays.
	was := map[string]bool{}
	for range 3 {
		now := evaluate[string](p, paper)
		was[now] = true
		p.do(chromedp.Reload())
		p.ready()
		if again := evaluate[string](p, paper); again != now {
			t.Errorf("the page was %s and is %s after a reload", now, again)
		}
		p.click("#theme")
	}
	if !was[light] || !was[dark] {
		t.Errorf("the switch leads to %v, not to %s and %s", was, light, dark)
	}
	for _, address := range f.pages() {
		p := b.open(t, address, reader{})
		p.ready()
		for _, r := range []reader{{}, {dark: true}, {narrow: true, dark: true}, {narrow: true}} {
			p.as(r)
			texts := evaluate[[]visibleText](p, visibleTexts)
			if len(texts) < 5 {
				t.Errorf("%s has only the texts %+v", address, texts)
			}
			for _, text := range texts {
				if text.Contrast < text.Needed {
					t.Errorf("%s, %+v: contrast %.2f of %q in %s", address, r, text.Contrast, text.Text, text.In)
				}
			}
		}
	}
}

func checkLanguages(t *testing.T, b *browser, f *troubledFleet) {
	chinese := regexp.MustCompile(`\p{Han}`)
	const (
		language = "document.documentElement.lang"
		texts    = `[document.title, ...[...document.querySelectorAll("h1, h2, th, button, label, [data-cell=state], #totals, dt")].map(e => e.innerText.trim()).filter(s => s)]`
		states   = `Object.fromEntries([...document.querySelectorAll("#rows tr")].map(r => [r.dataset.state, r.querySelector("[data-cell=state]").innerText.trim()]))`
	)
	for _, address := range f.pages() {
		p := b.open(t, address, reader{language: "zh-CN,zh;q=0.9,en;q=0.8"})
		p.ready()
		if got := evaluate[string](p, language); got != "zh-CN" {
			t.Errorf("%s: language %q for who reads Chinese", address, got)
		}
		if title := evaluate[string](p, "document.querySelector('h1').innerText"); !chinese.MatchString(title) {
			t.Errorf("%s: the headline is %q", address, title)
		}
		p.click("#languages a[hreflang^=en]")
		p.await("the page in English", language+` === "en"`)
		p.do(chromedp.Navigate(address)) // which says nothing of a language
		p.ready()
		if got := evaluate[string](p, language); got != "en" {
			t.Errorf("%s: language %q after English was chosen", address, got)
		}
		for _, text := range evaluate[[]string](p, texts) {
			if chinese.MatchString(text) && !strings.Contains(text, "中文") {
				t.Errorf("%s: %q in English", address, text)
			}
		}
	}
	p := b.open(t, f.url, reader{language: "zh"})
	p.ready()
	want := evaluate[map[string]string](p, states)
	english := b.open(t, f.url, reader{language: "fr"})
	english.ready()
	compared := 0
	for state, word := range evaluate[map[string]string](english, states) {
		if want[state] == "" {
			continue // no cluster was in that state when the other page was looked at
		}
		compared++
		if !chinese.MatchString(want[state]) || chinese.MatchString(word) || word == "" {
			t.Errorf("state %s is %q in English, and %q in Chinese", state, word, want[state])
		}
	}
	if compared < 3 { // halted, blocked and streaming stay
		t.Errorf("%d states were seen on both pages", compared)
	}
	// What comes over the stream is in the language of the page.
	evaluate[any](p, `(() => { window.updates = 0; new MutationObserver(() => updates++).observe(document.querySelector("#rows"), {subtree: true, childList: true, attributes: true, characterData: true}) })()`)
	p.await("updates", "updates > 3")
	for state, word := range evaluate[map[string]string](p, states) {
		if !chinese.MatchString(word) {
			t.Errorf("state %s is %q in Chinese after an update", state, word)
		}
	}
}

// interactive are the roles of what a person can use.
var interactive = []string{"button", "link", "textbox", "searchbox", "checkbox", "radio", "combobox", "listbox", "menuitem", "switch", "tab", "slider"}

func checkAccessibility(t *testing.T, b *browser, f *troubledFleet) {
	for _, address := range f.pages() {
		p := b.open(t, address, reader{})
		p.ready()
		tree := call(p, accessibility.GetFullAXTree, accessibility.GetFullAXTreeParams{})
		roles := map[string]int{}
		var firstHeading []string
		var level, last float64
		for _, node := range tree.Nodes {
			if node.Ignored || node.Role == nil {
				continue
			}
			role, name := axText(node.Role), strings.TrimSpace(axText(node.Name))
			roles[role]++
			switch {
			case slices.Contains(interactive, role) && name == "",
				slices.Contains([]string{"table", "img", "image", "graphics-document", "RootWebArea", "alert", "dialog"}, role) && name == "" && role != "alert":
				t.Errorf("%s: a %s without a name (node %d)", address, role, node.BackendDOMNodeID)
			case role == "heading":
				level = axNumber(node, "level")
				if level == 1 {
					firstHeading = append(firstHeading, name)
				}
				if level > last+1 {
					t.Errorf("%s: the heading %q of level %v comes after one of level %v", address, name, level, last)
				}
				last = level
			}
		}
		if len(firstHeading) != 1 {
			t.Errorf("%s: headings of level 1: %q, want one", address, firstHeading)
		}
		for _, landmark := range []string{"main", "banner"} {
			if roles[landmark] != 1 {
				t.Errorf("%s: %d landmarks %s, want one", address, roles[landmark], landmark)
			}
		}
		if tables := roles["table"]; tables > 0 && (roles["columnheader"] == 0 && roles["rowheader"] == 0) {
			t.Errorf("%s: %d tables without a header: %v", address, tables, roles)
		}
		for what, expression := range map[string]string{
			"a language":                         `document.documentElement.lang !== ""`,
			"a title":                            `document.title !== ""`,
			"a caption in each table":            `[...document.querySelectorAll("table")].every(t => t.caption?.innerText.trim())`,
			"a scope for each header":            `[...document.querySelectorAll("th")].every(h => h.scope)`,
			"identifiers that are there once":    `(ids => ids.length === new Set(ids).size)([...document.querySelectorAll("[id]")].map(e => e.id))`,
			"no tabindex that changes the order": `[...document.querySelectorAll("[tabindex]")].every(e => e.tabIndex <= 0)`,
			"a screen that may be zoomed":        `!/user-scalable=no|maximum-scale/.test(document.querySelector("meta[name=viewport]").content)`,
		} {
			if !evaluate[bool](p, expression) {
				t.Errorf("%s lacks %s", address, what)
			}
		}
		const small = `[...document.querySelectorAll("button, input")].filter(e => e.offsetParent && (e.offsetWidth < 24 || e.offsetHeight < 24)).map(e => e.outerHTML.slice(0, 60) + " " + e.offsetWidth + "x" + e.offsetHeight)`
		for _, button := range evaluate[[]string](p, small) {
			t.Errorf("%s: too small for a fingertip: %s", address, button)
		}
	}
}

// axText is a value of the accessibility tree as text.
func axText(v *accessibility.Value) string {
	if v == nil {
		return ""
	}
	return strings.Trim(string(v.Value), `"`)
}

// axNumber is a property of a node of the accessibility tree; 0: it has none.
func axNumber(node *accessibility.Node, name string) (n float64) {
	for _, property := range node.Properties {
		if string(property.Name) == name {
			fmt.Sscan(axText(property.Value), &n)
		}
	}
	return n
}

// focus is what has the focus in a page.
type focus struct {
	Is      string // the element in short
	Place   int    // among all of the page's
	Visible bool   // it looks different with the focus
}

func (p *page) focus() focus {
	p.t.Helper()
	return evaluate[focus](p, `(() => {
		const e = document.activeElement;
		const shown = getComputedStyle(e).outlineStyle !== "none" && parseFloat(getComputedStyle(e).outlineWidth) >= 2 || getComputedStyle(e).boxShadow !== "none";
		const box = e.getBoundingClientRect();
		return {
			Place: [...document.querySelectorAll("*")].indexOf(e),
			Is: e === document.body ? "" : e.id ? "#" + e.id : e.closest("#rows tr") && e.tagName === "A" ? "row " + e.closest("#rows tr").dataset.cluster :
				e.dataset.filter !== undefined ? "state " + e.dataset.filter : e.hreflang ? "language " + e.hreflang : e.tagName + " " + e.innerText.trim(),
			Visible: shown && box.bottom > 0 && box.top < innerHeight && box.width > 0,
		};
	})()`)
}

func checkKeyboard(t *testing.T, b *browser, f *troubledFleet) {
	p := b.open(t, f.url, reader{})
	p.ready()
	var order []string
	var places []int
	for range 60 {
		p.press(kb.Tab)
		at := p.focus()
		if at.Is == "" || slices.Contains(places, at.Place) { // behind the last, or the first again
			break
		}
		places = append(places, at.Place)
		order = append(order, at.Is)
		if !at.Visible {
			t.Errorf("the focus on %s is not to be seen", at.Is)
		}
	}
	t.Logf("the order of the focus: %q", order)
	for _, want := range []string{"#theme", "#filter", "row " + halted, "row " + healthy, "state halted"} {
		if !slices.Contains(order, want) {
			t.Errorf("%s is not reached with the tabulator", want)
		}
	}
	if !slices.ContainsFunc(order, func(is string) bool { return strings.HasPrefix(is, "language ") }) {
		t.Error("the language is not reached with the tabulator")
	}

	// A row's link keeps the focus while its row is written anew, and moves.
	evaluate[any](p, `document.querySelector("#rows tr[data-cluster=`+healthy+`] a").focus()`)
	evaluate[any](p, `(() => { window.updates = 0; new MutationObserver(() => updates++).observe(document.querySelector("#rows tr[data-cluster=`+healthy+`]").parentElement, {subtree: true, childList: true, attributes: true, characterData: true}) })()`)
	f.shared.write(t, 1)
	p.await("updates", "updates > 3")
	if at := p.focus(); at.Is != "row "+healthy {
		t.Errorf("after updates the focus is on %q", at.Is)
	}
	p.press("/")
	if at := p.focus(); at.Is != "#filter" {
		t.Errorf(`"/" puts the focus on %q`, at.Is)
	}
	p.press("a/b")
	if got := evaluate[string](p, `document.querySelector("#filter").value`); got != "a/b" {
		t.Errorf("the filter has %q, typed was %q", got, "a/b")
	}
	evaluate[any](p, `document.querySelector("#filter").select()`)
	p.press(healthy)
	p.await("the filter has its effect", `[...document.querySelectorAll("#rows tr")].filter(r => r.offsetParent).length === 1`)
	evaluate[any](p, `document.querySelector("#rows tr[data-cluster=`+healthy+`] a").focus()`)
	p.press(kb.Enter)
	p.await("the cluster's page", `document.body?.dataset.page === "cluster"`)
}

func checkFilter(t *testing.T, b *browser, f *troubledFleet) {
	p := b.open(t, f.url, reader{})
	p.ready()
	visible := func() (names []string) {
		for _, row := range p.rows() {
			if !row.Hidden {
				names = append(names, row.Name)
			}
		}
		return names
	}
	expect := func(what string, want ...string) {
		t.Helper()
		await(t, patience, fmt.Sprintf("%s shows %v", what, want), func() (bool, string) {
			got := visible()
			return slices.Equal(got, want), fmt.Sprint(got)
		})
	}
	expect("no filter", ranking...)
	p.click("#filter")
	p.press("RE") // in no matter which case
	expect("RE", blocked)
	p.press("x")
	expect("REx")
	p.await("a word for nothing", `document.querySelector("#none").offsetParent !== null && document.querySelector("#none").innerText !== ""`)
	p.press(kb.Backspace + kb.Backspace + kb.Backspace)
	expect("nothing typed", ranking...)
	p.click("#states [data-filter=halted]")
	expect("halted", halted)
	f.shared.write(t, 1)
	evaluate[any](p, `(() => { window.updates = 0; new MutationObserver(() => updates++).observe(document.querySelector("#totals"), {subtree: true, childList: true, attributes: true, characterData: true}) })()`)
	p.await("updates", "updates > 2")
	expect("halted, after updates", halted)
	p.click(`#states [data-filter="attention"]`)
	attention := visible()
	if slices.Contains(attention, healthy) || !slices.Contains(attention, halted) || !slices.Contains(attention, blocked) {
		t.Errorf("those that want a person: %v", attention)
	}
	p.click(`#states [data-filter=""]`)
	expect("all", ranking...)
	counts := evaluate[map[string]string](p, `Object.fromEntries([...document.querySelectorAll("#states [data-filter]")].map(e => [e.dataset.filter, e.dataset.value]))`)
	for filter, want := range map[string]string{"": "5", string(receiver.Halted): "1", string(receiver.Blocked): "1", string(receiver.Streaming): "2"} {
		if counts[filter] != want {
			t.Errorf("%s clusters %q, want %s", counts[filter], filter, want)
		}
	}
}

// checkNarrow has screens that are narrow: nothing is wider than they are, and nothing that matters is left out.
func checkNarrow(t *testing.T, b *browser, f *troubledFleet) {
	for _, address := range f.pages() {
		var p *page
		for _, r := range []reader{{narrow: true}, {zoom: 2}, {zoom: 4}, {}, {narrow: true, language: "zh"}} {
			if r.language != "" || p == nil {
				p = b.open(t, address, r)
				p.ready()
			}
			p.as(r)
			width := evaluate[[]int](p, `[document.documentElement.scrollWidth, innerWidth]`)
			if width[0] > width[1] {
				t.Errorf("%s, %+v: %d pixels wide on a screen of %d; the widest: %s", address, r, width[0], width[1],
					evaluate[string](p, `[...document.querySelectorAll("body *")].filter(e => e.getBoundingClientRect().right > innerWidth + 1).map(e => e.tagName + "#" + e.id + "." + (e.className.baseVal ?? e.className)).slice(0, 6).join(", ")`))
			}
			if address != f.pages()[0] {
				continue
			}
			evaluate[any](p, `document.querySelectorAll("#rows tr").forEach(r => r.style.contentVisibility = "visible")`) // what is far below, too
			for _, row := range p.rows() {
				for _, cell := range []string{"cluster", "state", "reason"} {
					if row.Hidden || row.Text[cell] == "" && (cell != "reason" || row.Health == "critical") {
						t.Errorf("%+v: nothing is to be seen of %s's %s", r, row.Name, cell)
					}
				}
			}
		}
	}
}
