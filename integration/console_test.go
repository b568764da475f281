package integration

import (
	"encoding/json"
	"fmt"
	"math"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/wal"
	"github.com/walfleet/walfleet/receiver"
)

// TestConsole looks at a fleet with every kind of trouble, in a real browser.
func TestConsole(t *testing.T) {
	t.Parallel()
	b := startBrowser(t)
	f := startTroubledFleet(t, t.TempDir())
	silent := f.openSilent(t, b) // it takes half a minute until that is noticed

	t.Run("live", func(t *testing.T) { checkLive(t, b, f) }) // down is down from now on
	t.Run("fleet", func(t *testing.T) { checkFleetPage(t, b, f) })
	for _, name := range ranking {
		t.Run(name, func(t *testing.T) { checkClusterPage(t, b, f, name) })
	}
	t.Run("map", func(t *testing.T) { checkMap(t, b, f) })
	t.Run("restore_command", func(t *testing.T) { checkRestoreCommand(t, b, f) })
	t.Run("secrets", func(t *testing.T) { checkSecrets(t, f) })
	t.Run("languages", func(t *testing.T) { checkLanguages(t, b, f) })
	t.Run("themes", func(t *testing.T) { checkThemes(t, b, f) })
	t.Run("accessibility", func(t *testing.T) { checkAccessibility(t, b, f) })
	t.Run("keyboard", func(t *testing.T) { checkKeyboard(t, b, f) })
	t.Run("filter", func(t *testing.T) { checkFilter(t, b, f) })
	t.Run("narrow", func(t *testing.T) { checkNarrow(t, b, f) })
	t.Run("silence", func(t *testing.T) { silent.check(t) })
	t.Run("broken connection", func(t *testing.T) { checkBrokenConnection(t, b, f) })
	t.Run("restart", func(t *testing.T) { checkRestart(t, b, f) })
}

// fleetRow is a cluster as the fleet's page shows it: texts, and the exact numbers that stand beside them.
type fleetRow struct {
	Name, State, Health string
	Hidden              bool
	Text                map[string]string // by data-cell
	Value               map[string]string // of data-value, and "behind" of data-seconds; "": not known
}

// rows are those of the fleet's page, from the top.
func (p *page) rows() []fleetRow {
	p.t.Helper()
	return evaluate[[]fleetRow](p, `[...document.querySelectorAll("#rows tr[data-cluster]")].map(r => {
		const cell = name => r.querySelector("[data-cell=" + name + "]");
		const value = e => e?.dataset.value ?? e?.querySelector("[data-value]")?.dataset.value ?? "";
		const names = ["cluster", "state", "lag", "rate", "timeline", "slot", "disk", "reason"];
		return {
			Name: r.dataset.cluster, State: r.dataset.state, Health: r.dataset.health, Hidden: r.offsetParent === null,
			Text: Object.fromEntries(names.map(n => [n, cell(n)?.innerText.trim() ?? "MISSING"])),
			Value: {behind: cell("lag").dataset.seconds ?? "", ...Object.fromEntries(["lag", "rate", "timeline", "slot", "disk"].map(n => [n, value(cell(n))]))},
		};
	})`)
}

// seen is what the JSON said of a number from the first time that it was asked to the last.
type seen struct {
	min, max float64
	unknown  bool // at least once
}

func (s seen) with(value *float64) seen {
	if value == nil {
		s.unknown = true
		return s
	}
	return seen{min(s.min, *value), max(s.max, *value), s.unknown}
}

var unseen = seen{min: math.Inf(1), max: math.Inf(-1)}

// has tells whether a data-value of a page is one that the JSON has said, or between two of them.
func (s seen) has(value string) bool {
	if value == "" {
		return s.unknown
	}
	v, err := strconv.ParseFloat(value, 64)
	return err == nil && s.min-0.001 <= v && v <= s.max+0.001 // of seconds, a page has but thousandths
}

// checkFleetPage compares the fleet's page with the JSON, which is asked again and again: while the page is read, a
// number may be any that the JSON has said lately.
func checkFleetPage(t *testing.T, b *browser, f *troubledFleet) {
	p := b.open(t, f.url, reader{})
	numbers := map[string]seen{}
	pointer := func(value float64) *float64 { return &value }
	await(t, patience, "the fleet's page says what the JSON says", func() (bool, string) {
		r := f.report(t)
		for _, c := range r.Clusters {
			observe := func(name string, value *float64) {
				key := c.Name + " " + name
				if _, ok := numbers[key]; !ok {
					numbers[key] = unseen
				}
				numbers[key] = numbers[key].with(value)
			}
			integer := func(name string, value *int64) {
				if value == nil {
					observe(name, nil)
				} else {
					observe(name, pointer(float64(*value)))
				}
			}
			integer("lag", c.LagBytes)
			observe("behind", c.BehindSeconds)
			observe("rate", pointer(c.BytesPerSecond))
			if c.Timeline == 0 {
				observe("timeline", nil)
			} else {
				observe("timeline", pointer(float64(c.Timeline)))
			}
			integer("disk", c.DiskFreeBytes)
			var retained *int64
			for _, s := range c.Slots {
				if s.Exists && (retained == nil || s.RetainedBytes > *retained) {
					retained = &s.RetainedBytes
				}
			}
			integer("slot", retained)
		}
		rows := p.rows()
		if problem := compareRows(rows, r, numbers); problem != "" {
			return false, fmt.Sprintf("%s: page %+v, JSON %+v", problem, rows, numbers)
		}
		return true, ""
	})

	// What a person reads says the same as the exact numbers.
	for _, row := range p.rows() {
		for _, cell := range []string{"lag", "rate", "slot", "disk"} {
			checkSize(t, row.Name+", "+cell, row.Text[cell], row.Value[cell])
		}
		if row.Text["timeline"] != row.Value["timeline"] && row.Value["timeline"] != "" {
			t.Errorf("%s: timeline %q is shown, %s is meant", row.Name, row.Text["timeline"], row.Value["timeline"])
		}
		if row.Text["state"] == "" {
			t.Errorf("%s: no word for state %s", row.Name, row.State)
		}
	}
	if got := evaluate[string](p, `document.querySelector("#headline").dataset.health`); got != string(fleet.Critical) {
		t.Errorf("health %q in the headline, want that of the worst", got)
	}
	headline := evaluate[string](p, `document.querySelector("#headline h1").innerText`)
	for _, name := range []string{halted, blocked} {
		if !strings.Contains(headline, name) {
			t.Errorf("the headline does not name %s: %s", name, headline)
		}
	}
	if strings.Contains(headline, healthy) {
		t.Errorf("the headline names %s: %s", healthy, headline)
	}
}

// compareRows says what in the rows of a page differs from the JSON; "": nothing does.
func compareRows(rows []fleetRow, r fleet.Report, numbers map[string]seen) string {
	var order []string
	for _, row := range rows {
		order = append(order, row.Name)
	}
	if !slices.Equal(order, ranking) {
		return fmt.Sprintf("order %v, want %v", order, ranking)
	}
	for _, c := range r.Clusters {
		row := rows[slices.Index(order, c.Name)]
		if row.State != c.State || row.Health != string(c.Health) {
			return fmt.Sprintf("%s is %s, %s; not %s, %s", c.Name, row.State, row.Health, c.State, c.Health)
		}
		why := []string{c.Reason}
		for _, w := range c.Warnings {
			why = append(why, w.Text)
		}
		if c.Gaps > 0 {
			why = append(why, fmt.Sprintf("%d gap", c.Gaps))
		}
		for _, text := range why {
			if !strings.Contains(spaces(row.Text["reason"]), spaces(text)) {
				return fmt.Sprintf("%s: the reason %q lacks %q", c.Name, row.Text["reason"], text)
			}
		}
		for name, value := range row.Value {
			if !numbers[c.Name+" "+name].has(value) {
				return fmt.Sprintf("%s: %s is %q", c.Name, name, value)
			}
		}
	}
	return ""
}

// spaces is a text as a browser shows it.
func spaces(text string) string { return strings.Join(strings.Fields(text), " ") }

var sizeText = regexp.MustCompile(`([\d.]+)\s?(B|kB|MB|GB|TB|PB)\b`)

// checkSize compares a number of bytes as a person reads it with the exact one. Its last digit is rounded.
func checkSize(t *testing.T, what, text, value string) {
	t.Helper()
	found := sizeText.FindStringSubmatch(text)
	if value == "" {
		if found != nil {
			t.Errorf("%s: %q is shown, and not known", what, text)
		}
		return
	}
	exact, err := strconv.ParseFloat(value, 64)
	if err != nil {
		t.Errorf("%s: %v", what, err)
		return
	}
	if found == nil {
		if exact != 0 { // an idle cluster may have a word for that
			t.Errorf("%s: %q has no size, %s are meant", what, text, value)
		}
		return
	}
	unit := math.Pow(1024, float64(slices.Index([]string{"B", "kB", "MB", "GB", "TB", "PB"}, found[2])))
	shown, _ := strconv.ParseFloat(found[1], 64)
	_, decimals, _ := strings.Cut(found[1], ".")
	if math.Abs(shown*unit-exact) > 0.51*unit*math.Pow(10, -float64(len(decimals))) {
		t.Errorf("%s: %q is shown, %s are meant", what, text, value)
	}
}

// checkClusterPage compares a cluster's page with the JSON.
func checkClusterPage(t *testing.T, b *browser, f *troubledFleet, name string) {
	p := b.open(t, f.url+"/clusters/"+name, reader{})
	said := map[string][]any{} // by name in the JSON
	await(t, patience, name+"'s page says what the JSON says", func() (bool, string) {
		c := f.cluster(t, name)
		text, err := json.Marshal(c)
		if err != nil {
			t.Fatal(err)
		}
		var values map[string]any
		if err := json.Unmarshal(text, &values); err != nil {
			t.Fatal(err)
		}
		head := evaluate[fleetRow](p, `(h => ({Name: h.dataset.cluster, State: h.dataset.state, Health: h.dataset.health, Text: {reason: h.innerText}}))(document.querySelector("#headline"))`)
		if head.Name != name || head.State != c.State || head.Health != string(c.Health) {
			return false, fmt.Sprintf("headline %+v; JSON: %s, %s", head, c.State, c.Health)
		}
		for _, text := range []string{c.Reason, c.Hint} {
			if !strings.Contains(spaces(head.Text["reason"]), spaces(text)) {
				return false, fmt.Sprintf("the headline %q lacks %q", head.Text["reason"], text)
			}
		}
		facts := evaluate[map[string]string](p, `Object.fromEntries([...document.querySelectorAll("[data-fact]")].map(e => [e.dataset.fact, e.dataset.value]))`)
		for _, must := range []string{"server_lsn", "written_lsn", "synced_lsn", "flushed_lsn", "lag_bytes", "timeline", "system_identifier", "disk_free_bytes"} {
			if _, shown := facts[must]; !shown && values[must] != nil {
				return false, must + " is not on the page"
			}
		}
		for fact, shown := range facts {
			value, ok := values[fact]
			if archive, _ := values["archive"].(map[string]any); !ok {
				value = archive[fact]
			}
			said[fact] = append(said[fact], value)
			if !saidSo(said[fact], shown) {
				return false, fmt.Sprintf("%s is %q, the JSON said %v", fact, shown, said[fact])
			}
		}
		return true, ""
	})
	c := f.cluster(t, name)
	hosts := evaluate[[]string](p, `[...document.querySelectorAll("#slots tr[data-host]")].map(r => r.dataset.host)`)
	var want []string
	for _, s := range c.Slots {
		want = append(want, s.Host)
	}
	if !slices.Equal(hosts, want) {
		t.Errorf("slots on %v, the JSON has %v", hosts, want)
	}
	settings := evaluate[map[string]string](p, `Object.fromEntries([...document.querySelectorAll("#settings [data-key]")].map(e => [e.dataset.key, e.innerText]))`)
	for key, value := range c.Settings {
		if shown, ok := settings[key]; !ok || !strings.Contains(shown, fmt.Sprint(value)) {
			t.Errorf("%s = %v is %q among the settings %v", key, value, shown, settings)
		}
	}
	if n := evaluate[int](p, `document.querySelectorAll("#events tr").length`); n == 0 {
		t.Error("no event is shown")
	}
}

// saidSo tells whether a page's data-value is one of those that the JSON said, or between two of them where it is a
// number, a position or a time. Pages have times to the second.
func saidSo(said []any, shown string) bool {
	asNumber := func(value any) (n, precision float64) {
		text := fmt.Sprint(value)
		if lsn, err := wal.ParseLSN(text); err == nil {
			return float64(lsn), 0
		}
		if at, err := time.Parse(time.RFC3339Nano, text); err == nil {
			return float64(at.UnixMicro()), 1e6
		}
		n, ok := value.(float64)
		if !ok {
			var err error
			if n, err = strconv.ParseFloat(text, 64); err != nil {
				return math.NaN(), 0
			}
		}
		return n, 1
	}
	number, _ := asNumber(shown)
	lowest, highest := math.Inf(1), math.Inf(-1)
	for _, value := range said {
		list, isList := value.([]any)
		if value == nil && shown == "" || fmt.Sprint(value) == shown || isList && strings.Join(strings.Fields(fmt.Sprint(list...)), "\n") == shown {
			return true
		}
		if n, precision := asNumber(value); value != nil && !math.IsNaN(n) {
			lowest, highest = min(lowest, n-precision), max(highest, n)
		}
	}
	return lowest <= number && number <= highest
}

// checkMap has a gap on record: it is in the JSON, in the text, and in the picture, where it cannot be missed.
func checkMap(t *testing.T, b *browser, f *troubledFleet) {
	var contents fleet.Contents
	getJSON(t, f.url+"/api/v1/contents/"+halted, &contents)
	var want []string
	for _, h := range contents.Holes {
		want = append(want, fmt.Sprintf("%s %s %s", h.Kind, h.From, h.To))
	}
	if len(want) != 1 || contents.Holes[0].Kind != "gap" {
		t.Fatalf("holes %q, want one gap", want)
	}
	p := b.open(t, f.url+"/clusters/"+halted, reader{})
	for _, r := range []reader{{}, {narrow: true}, {dark: true}} {
		p.as(r)
		p.await("the map is drawn", `document.querySelector("#map").dataset.map === "ready"`)
		got := evaluate[[]string](p, `[...document.querySelectorAll("#holes li[data-hole]")].map(e => [e.dataset.hole, e.dataset.from, e.dataset.to].join(" "))`)
		if !slices.Equal(got, want) {
			t.Errorf("holes %q, the JSON has %q", got, want)
		}
		var windows []string
		for _, w := range contents.Recoverable {
			windows = append(windows, w.FromLSN)
		}
		if got := evaluate[[]string](p, `[...document.querySelectorAll("#windows li")].map(e => e.dataset.from)`); !slices.Equal(got, windows) {
			t.Errorf("recoverable from %v, the JSON has %v", got, windows)
		}
		type shape struct{ Width, Height, Left, Right float64 }
		box := func(selector string) []shape {
			return evaluate[[]shape](p, `[...document.querySelectorAll("#map svg `+selector+`")].map(e => e.getBoundingClientRect()).map(b => ({Width: b.width, Height: b.height, Left: b.left, Right: b.right}))`)
		}
		gaps, ranges := box("[data-hole=gap]"), box("[data-range].range")
		if len(gaps) != 1 || gaps[0].Width < 4 || gaps[0].Height < 8 {
			t.Fatalf("a gap of %+v can be missed", gaps)
		}
		if len(ranges) != len(contents.Timelines[0].Ranges) || ranges[0].Right > gaps[0].Right || ranges[1].Left < gaps[0].Left {
			t.Errorf("ranges %+v beside the gap %+v", ranges, gaps)
		}
		for _, visible := range []string{"[data-hole=gap]", "[data-range]"} {
			if !evaluate[bool](p, `((e) => { const b = e.getBoundingClientRect(); e.scrollIntoView(); return e.checkVisibility({opacityProperty: true, visibilityProperty: true}) && b.width > 0; })(document.querySelector("#map svg `+visible+`"))`) {
				t.Errorf("%s is not visible", visible)
			}
		}
	}
}

// checkRestoreCommand runs the very line that the page gives, for a segment that the archive has and one that it has not.
func checkRestoreCommand(t *testing.T, b *browser, f *troubledFleet) {
	p := b.open(t, f.url+"/clusters/"+healthy, reader{})
	line := evaluate[string](p, `document.querySelector("#restore-command").textContent`)
	found := regexp.MustCompile(`^restore_command = '(.+)'$`).FindStringSubmatch(strings.TrimSpace(line))
	if found == nil {
		t.Fatalf("%q is no line of postgresql.conf", line)
	}
	segments, _ := listArchive(t, f.cluster(t, healthy).Directory, f.shared.size)
	there := segments[0].Name()
	if !segments[0].sealed {
		t.Fatalf("%s is not complete", there)
	}
	fetch := func(segment string) (status int, path string) {
		path = filepath.Join(t.TempDir(), "RECOVERYXLOG")
		text := strings.NewReplacer("''", "'", "%f", segment, "%p", path, "%%", "%").Replace(found[1])
		cmd := exec.Command("sh", "-c", text)
		cmd.Env = append(cmd.Environ(), "PATH="+filepath.Dir(walfleet.path)+":/usr/bin:/bin")
		out, err := cmd.CombinedOutput()
		if cmd.ProcessState == nil {
			t.Fatal(err)
		}
		t.Logf("%s: %v %s", text, cmd.ProcessState, out)
		return cmd.ProcessState.ExitCode(), path
	}
	if status, path := fetch(there); status != 0 || string(readFile(t, path)) != f.shared.segmentBytes(t, there) {
		t.Errorf("exit status %d for %s, or other bytes than the server's", status, there)
	}
	if status, _ := fetch("0000000100000FFF00000000"); status != 1 {
		t.Errorf("exit status %d for a segment that is not there, want 1", status)
	}
}

// segmentBytes are those of a segment on the server.
func (s *server) segmentBytes(t *testing.T, name string) string {
	t.Helper()
	conn, err := s.connect(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close(t.Context())
	result := conn.ExecParams(t.Context(), "SELECT pg_read_binary_file('pg_wal/"+name+"')", nil, nil, nil, []int16{1}).Read()
	if result.Err != nil || len(result.Rows) != 1 {
		t.Fatalf("%s: %v", name, result.Err)
	}
	return string(result.Rows[0][0])
}

// checkSecrets asks for everything that is to be had; the clusters' password is in none of it.
func checkSecrets(t *testing.T, f *troubledFleet) {
	for _, path := range append([]string{"/", "/api/v1/status", "/metrics", "/healthz", "/readyz"},
		"/clusters/"+healthy, "/clusters/"+halted, "/api/v1/status/"+healthy, "/api/v1/status/"+halted, "/api/v1/contents/"+halted) {
		body := get(t, f.url+path)
		if len(body) == 0 || strings.Contains(string(body), password) || strings.Contains(string(body), superPassword) {
			t.Errorf("%s is empty, or shows a password", path)
		}
	}
}

// recorder is JavaScript that remembers when a cluster's row changes its state, and what a screen reader is told.
const recorder = `(() => {
	window.changes = [];
	window.told = [];
	let last = "";
	const look = () => {
		const state = document.querySelector("#rows tr[data-cluster=` + down + `]")?.dataset.state ?? "";
		if (state !== last) {
			changes.push({State: state, At: Date.now()});
			last = state;
		}
	};
	look();
	new MutationObserver(look).observe(document.querySelector("#rows"), {subtree: true, childList: true, attributes: true});
	const spoken = document.querySelector("#spoken");
	new MutationObserver(() => told.push(spoken.innerText.trim())).observe(spoken, {subtree: true, childList: true, characterData: true});
})()`

// change is when a page showed a state, in milliseconds since 1970.
type change struct {
	State string
	At    float64
}

// checkLive kills a server, starts it, and kills it again, before a page that stays open.
func checkLive(t *testing.T, b *browser, f *troubledFleet) {
	p := b.open(t, f.url, reader{})
	p.await("the page is live", `document.documentElement.dataset.live === "live"`)
	evaluate[any](p, recorder)
	var delays []time.Duration
	for _, step := range []struct {
		what    string
		act     func(t testing.TB)
		streams bool
	}{{"killed", f.mortal.kill, false}, {"started", f.mortal.start, true}, {"killed again", f.mortal.kill, false}} {
		begin, before := time.Now(), evaluate[int](p, "changes.length")
		acted := make(chan struct{})
		go func() {
			defer close(acted)
			step.act(t)
		}()
		wanted := func(state string) bool { return (state == string(receiver.Streaming)) == step.streams }
		var changed, shown time.Time
		await(t, patience, "the row follows when the server is "+step.what, func() (bool, string) {
			c := f.cluster(t, down)
			if changed.IsZero() && wanted(c.State) {
				changed = c.Since
			}
			changes := evaluate[[]change](p, fmt.Sprintf("changes.slice(%d)", before))
			if i := slices.IndexFunc(changes, func(c change) bool { return wanted(c.State) }); i >= 0 {
				shown = time.UnixMilli(int64(changes[i].At))
			}
			return !changed.IsZero() && !shown.IsZero(), fmt.Sprintf("JSON: %s; page: %v", c.State, changes)
		})
		<-acted
		t.Logf("the server is %s: the page shows it after %s, %s after the daemon's own change of state", step.what,
			shown.Sub(begin).Round(time.Millisecond), shown.Sub(changed).Round(time.Millisecond))
		delays = append(delays, shown.Sub(changed))
	}
	slices.Sort(delays)
	if delays[1] > 2*time.Second { // a machine that is busy may have delayed one of the three
		t.Errorf("the page shows changes of state %s later", delays)
	}
	p.await("what a screen reader says", `told.some(s => s !== "")`)
	t.Logf("told to a screen reader: %q", evaluate[[]string](p, "told"))
	await(t, patience, "the page is as the JSON", func() (bool, string) {
		rows := p.rows()
		return len(rows) == len(ranking) && rows[2].Name == down && rows[2].State == f.cluster(t, down).State, fmt.Sprint(rows)
	})
}

// checkRestart stops walfleet, and starts it again. The page says that it is on its own, and then goes on.
func checkRestart(t *testing.T, b *browser, f *troubledFleet) {
	p := b.open(t, f.url, reader{})
	detail := b.open(t, f.url+"/clusters/"+down, reader{})
	for _, p := range []*page{p, detail} {
		p.await("the page is live", `document.documentElement.dataset.live === "live" && document.querySelector("#lost").hidden`)
		p.away(true)
	}
	f.signal(t, syscall.SIGTERM)
	if status := f.exit(t); status != 0 {
		t.Errorf("exit status %d", status)
	}
	begin := time.Now()
	for _, p := range []*page{p, detail} {
		p.await("the banner", `document.documentElement.dataset.live === "lost" && !document.querySelector("#lost").hidden && document.querySelector("#lost").innerText !== ""`)
	}
	t.Logf("the banners came %s after the end of walfleet", time.Since(begin).Round(time.Millisecond))
	f.mortal.start(t)
	begin = time.Now()
	f.program = startProgram(t, f.text)
	for _, p := range []*page{p, detail} {
		p.await("the page goes on", `document.documentElement.dataset.live === "live" && document.querySelector("#lost").hidden`)
	}
	t.Logf("the pages went on %s after the start of walfleet", time.Since(begin).Round(time.Millisecond))
	p.await("what is new", `document.querySelector("#rows tr[data-cluster=`+down+`]").dataset.state === "streaming"`)
	detail.await("what is new", `document.querySelector("#headline").dataset.state === "streaming"`)
}
