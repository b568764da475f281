package console

import (
	"bytes"
	"cmp"
	"context"
	"crypto/sha256"
	"embed"
	"encoding/hex"
	"html/template"
	"log/slog"
	"mime"
	"net/http"
	"path"
	"reflect"
	"strings"
	"sync"

	"github.com/walfleet/walfleet/fleet"
)

//go:embed assets templates
var files embed.FS

// pages are the fleet's page and one for each cluster, with what changes on them (stream.go). A page is put together
// from parts, and the stream sends the same parts: there is one rendering of everything.
type pages struct {
	source   source
	log      *slog.Logger
	assets   map[string]asset // by the name in their URL
	template [languages]*template.Template
	build    string // of assets and templates: a page that another build made loads itself again
	archives *archives
	board    *board
	tick     int64 // the last one; run's alone
}

// asset is a file of a page. Its URL has a hash of what is in it, so it never changes.
type asset struct {
	kind string // for Content-Type
	data []byte
}

func newPages(src source, log *slog.Logger) *pages {
	p := &pages{source: src, log: log, assets: map[string]asset{}, archives: newArchives(src, log), board: newBoard()}
	urls, all := map[string]string{}, sha256.New()
	for _, e := range entries("assets") {
		data := read("assets/" + e)
		sum := sha256.Sum256(data)
		ext := path.Ext(e)
		name := strings.TrimSuffix(e, ext) + "." + hex.EncodeToString(sum[:6]) + ext
		p.assets[name] = asset{cmp.Or(map[string]string{".svg": "image/svg+xml", ".js": "text/javascript; charset=utf-8", ".css": "text/css; charset=utf-8"}[ext], mime.TypeByExtension(ext)), data}
		urls[e] = "assets/" + name
		all.Write(sum[:])
	}
	for _, e := range entries("templates") {
		all.Write(read("templates/" + e))
	}
	p.build = hex.EncodeToString(all.Sum(nil)[:6])
	for l := range languages {
		p.template[l] = template.Must(template.New("").Funcs(template.FuncMap{
			"t": l.text, "span": l.span, "clock": clock,
			"lang":  func() string { return languageNames[l].Tag },
			"asset": func(name string) string { return urls[name] },
		}).ParseFS(files, "templates/*.html"))
	}
	return p
}

func entries(dir string) (names []string) {
	list, err := files.ReadDir(dir)
	if err != nil {
		panic("internal error: " + err.Error())
	}
	for _, e := range list {
		names = append(names, e.Name())
	}
	return names
}

func read(file string) []byte {
	data, err := files.ReadFile(file)
	if err != nil {
		panic("internal error: " + err.Error())
	}
	return data
}

func (p *pages) register(mux *http.ServeMux) {
	mux.HandleFunc("GET /{$}", p.fleetPage)
	mux.HandleFunc("GET /clusters/{name}", p.clusterPage)
	mux.HandleFunc("GET /events", func(w http.ResponseWriter, r *http.Request) { p.stream(w, r, "") })
	mux.HandleFunc("GET /clusters/{name}/events", func(w http.ResponseWriter, r *http.Request) { p.stream(w, r, r.PathValue("name")) })
	mux.HandleFunc("GET /assets/{file}", p.asset)
}

// run makes what the open pages are sent, and reads archives for them, until ctx is done. Then the streams end. After
// a panic it may be called again, and the streams go on.
func (p *pages) run(ctx context.Context) error {
	reading, stop := context.WithCancel(ctx)
	var wait sync.WaitGroup
	wait.Go(func() { p.archives.run(reading) })
	defer wait.Wait()
	defer stop()
	p.produce(ctx)
	close(p.board.ended)
	return nil
}

func (p *pages) asset(w http.ResponseWriter, r *http.Request) {
	a, ok := p.assets[r.PathValue("file")]
	if !ok {
		say(w, http.StatusNotFound, "there is nothing here")
		return
	}
	h := w.Header()
	h.Set("Content-Type", a.kind)
	h.Set("Cache-Control", "public, max-age=31536000, immutable")
	_, _ = w.Write(a.data) // the client has gone
}

// part is a piece of a page, an element with an id, that is sent alone when it changes.
type part struct {
	id       string
	template string
	view     any    // what the template is given
	compare  any    // what of the view makes it another one; nil when added: all of it
	within   string // the part that has this one inside
	since    int64  // the tick from which on it is so

	once [languages]sync.Once
	html [languages]string
}

// same tells whether both look the same.
func (a *part) same(b *part) bool {
	return a.template == b.template && reflect.DeepEqual(a.compare, b.compare)
}

// render is the part's HTML, made once for each language, when somebody wants it.
func (p *pages) render(a *part, l language) string {
	a.once[l].Do(func() { a.html[l] = p.execute(l, a.template, a.view) })
	return a.html[l]
}

func (p *pages) execute(l language, name string, view any) string {
	var b bytes.Buffer
	if err := p.template[l].ExecuteTemplate(&b, name, view); err != nil {
		p.log.Error("a page could not be made", "template", name, "error", err)
	}
	return b.String()
}

// scene is a page at a time: its parts, and the order of the fleet's rows.
type scene struct {
	tick      int64
	time      moment
	parts     []*part // one that is within another comes after it
	byID      map[string]*part
	rows      []string // the rows' ids
	rowsSince int64
}

func newScene(r fleet.Report) *scene { return &scene{time: momentOf(r.Time), byID: map[string]*part{}} }

func (s *scene) add(a *part) {
	if a.compare == nil {
		a.compare = a.view
	}
	s.parts = append(s.parts, a)
	s.byID[a.id] = a
}

// pageView is what the frame of a page is given.
type pageView struct {
	Page    string // "fleet", "cluster" or "missing"
	Root    string // where "/" is, relative to the page: so it works below any path of a proxy
	Name    string // the cluster's
	Title   string
	Health  fleet.Health
	Version string
	Events  string // URL of the page's stream
	Build   string
	Now     moment

	language language
	pages    *pages
	scene    *scene
}

// Part is a part of the page as the stream would send it.
func (v pageView) Part(id string) template.HTML {
	return template.HTML(v.pages.render(v.scene.byID[id], v.language)) // made by a template, which has escaped it
}

// Rows are the fleet's rows.
func (v pageView) Rows() template.HTML {
	var b strings.Builder
	for _, id := range v.scene.rows {
		b.WriteString(v.pages.render(v.scene.byID[id], v.language))
		b.WriteByte('\n')
	}
	return template.HTML(b.String()) // as in Part
}

// Languages are the page's own, to choose from.
func (v pageView) Languages() (list []languageView) {
	for l, names := range languageNames {
		list = append(list, languageView{names.Short, names.Tag, names.Name, language(l) == v.language})
	}
	return list
}

type languageView struct {
	Short, Tag, Name string
	Current          bool
}

// show writes a page. A page that names its language is that way from then on.
func (p *pages) show(w http.ResponseWriter, r *http.Request, status int, v pageView) {
	l, chosen := languageOf(r)
	h := w.Header()
	if chosen {
		http.SetCookie(w, &http.Cookie{Name: languageCookie, Value: languageNames[l].Short, Path: "/", MaxAge: 365 * 24 * 3600, HttpOnly: true, Secure: r.TLS != nil, SameSite: http.SameSiteLaxMode})
	}
	v.language, v.pages, v.Build = l, p, p.build
	if v.Events != "" {
		v.Events += "?lang=" + languageNames[l].Short
	}
	if v.Title == "" {
		v.Title = l.text("title")
	}
	h.Set("Content-Type", "text/html; charset=utf-8")
	h.Set("Content-Language", languageNames[l].Tag)
	h.Set("Cache-Control", "no-store")
	h.Add("Vary", "Accept-Language, Cookie")
	w.WriteHeader(status)
	_, _ = w.Write([]byte(p.execute(l, "page", v))) // the client has gone
}

func (p *pages) fleetPage(w http.ResponseWriter, r *http.Request) {
	report := p.source.Report()
	s := fleetScene(report)
	head := s.byID["headline"].view.(fleetHeadline)
	l, _ := languageOf(r)
	p.show(w, r, http.StatusOK, pageView{Page: "fleet", Root: "./", Title: l.text(head.Title, head.Count, head.Total), Health: head.Health,
		Version: version(report), Events: "events", Now: s.time, scene: s})
}

func (p *pages) clusterPage(w http.ResponseWriter, r *http.Request) {
	name := r.PathValue("name")
	report, ok := p.source.ReportOf(name)
	if !ok {
		p.show(w, r, http.StatusNotFound, pageView{Page: "missing", Root: "../", Health: fleet.Warning})
		return
	}
	s := clusterScene(report, p.archives.of(name))
	head := s.byID["headline"].view.(clusterHeadline)
	l, _ := languageOf(r)
	p.show(w, r, http.StatusOK, pageView{Page: "cluster", Root: "../", Name: head.Name, Title: head.Name + " – " + l.text("state."+head.State), Health: head.Health,
		Version: version(report), Events: link(name) + "/events", Now: s.time, scene: s})
}

func version(r fleet.Report) string {
	if r.Daemon == nil {
		return ""
	}
	return visible(r.Daemon.Version)
}
