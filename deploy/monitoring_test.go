package deploy_test

import (
	"encoding/json"
	"fmt"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"

	"go.yaml.in/yaml/v3"
)

const (
	rulesFile     = "prometheus/walfleet.rules.yml"
	dashboardFile = "grafana/walfleet.json"
	runbook       = "https://github.com/walfleet/walfleet/blob/main/docs/operations.md#"
)

type ruleFile struct {
	Groups []struct {
		Name  string
		Rules []rule
	}
}

type rule struct {
	Alert, Expr string
	For         string            `yaml:",omitempty"`
	Labels      map[string]string `yaml:",omitempty"`
	Annotations map[string]string `yaml:",omitempty"`
	Record      string            `yaml:",omitempty"`
}

func rules(t *testing.T) []rule {
	t.Helper()
	var file ruleFile
	if err := yaml.Unmarshal([]byte(read(t, rulesFile)), &file); err != nil {
		t.Fatal(err)
	}
	if len(file.Groups) != 1 || len(file.Groups[0].Rules) == 0 {
		t.Fatalf("%s has %d groups, want one with rules", rulesFile, len(file.Groups))
	}
	return file.Groups[0].Rules
}

type dashboard struct {
	UID, Title    string
	SchemaVersion int
	Panels        []panel
	Annotations   struct{ List []struct{ Name, Expr string } }
	Templating    struct {
		List []struct{ Name, Type, Definition string }
	}
}

type panel struct {
	ID                       int
	Type, Title, Description string
	GridPos                  struct{ X, Y, W, H int }
	Targets                  []struct{ Expr, RefID string }
	Datasource               *struct{ UID string }
	FieldConfig              struct{ Defaults struct{ Unit string } }
}

func grafana(t *testing.T) dashboard {
	t.Helper()
	var d dashboard
	if err := json.Unmarshal([]byte(read(t, dashboardFile)), &d); err != nil {
		t.Fatalf("%s: %v", dashboardFile, err)
	}
	return d
}

// expressions are the dashboard's, with values for Grafana's variables, by where they stand.
func (d dashboard) expressions() map[string]string {
	all := map[string]string{}
	fill := strings.NewReplacer("$cluster", ".*", "$__rate_interval", "1m")
	for _, p := range d.Panels {
		for _, target := range p.Targets {
			all[fmt.Sprintf("panel %q, %s", p.Title, target.RefID)] = fill.Replace(target.Expr)
		}
	}
	for _, a := range d.Annotations.List {
		if a.Expr != "" {
			all["annotation "+a.Name] = fill.Replace(a.Expr)
		}
	}
	return all
}

// promtool runs Prometheus' own checker.
func promtool(t *testing.T, args ...string) {
	t.Helper()
	path, err := exec.LookPath("promtool")
	if err != nil {
		t.Skip("NOT TESTED: no promtool (of Debian's package prometheus; make promtool)")
	}
	cmd := exec.CommandContext(t.Context(), path, args...)
	cmd.Dir = "prometheus"
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Errorf("promtool %q: %v\n%s", args, err, out)
	}
}

// The rules are valid, each alert fires when it should, and not before or otherwise.
func TestAlertsFire(t *testing.T) {
	tests := read(t, "prometheus/walfleet.rules.test.yml")
	for _, r := range rules(t) {
		if !strings.Contains(tests, `alertname="`+r.Alert+`"`) {
			t.Errorf("no test wants %s to fire", r.Alert)
		}
	}
	promtool(t, "check", "rules", "--lint-fatal", "walfleet.rules.yml")
	promtool(t, "check", "config", "--syntax-only", "prometheus.yml")
	promtool(t, "test", "rules", "walfleet.rules.test.yml")
}

// Whoever is woken by an alert reads what is wrong, how bad that is, and where it says what to type.
func TestAlertsLeadToTheRunbook(t *testing.T) {
	anchors := map[string]bool{}
	for line := range strings.Lines(read(t, "../docs/operations.md")) {
		if title, ok := strings.CutPrefix(strings.TrimLeft(line, "#"), " "); ok && strings.HasPrefix(line, "#") {
			anchors[anchor(title)] = true
		}
	}
	explained := read(t, "../docs/operations.md")
	names := map[string]bool{}
	for _, r := range rules(t) {
		if names[r.Alert] {
			t.Errorf("%s is there twice", r.Alert)
		}
		names[r.Alert] = true
		if got := slices.Sorted(maps.Keys(r.Annotations)); !slices.Equal(got, []string{"description", "runbook_url", "summary"}) {
			t.Errorf("%s has annotations %q", r.Alert, got)
		}
		if severity := r.Labels["severity"]; severity != "critical" && severity != "warning" {
			t.Errorf("%s has severity %q", r.Alert, severity)
		}
		if place, ok := strings.CutPrefix(r.Annotations["runbook_url"], runbook); !ok || !anchors[place] {
			t.Errorf("%s leads to %q, which docs/operations.md does not have", r.Alert, r.Annotations["runbook_url"])
		}
		if !strings.Contains(explained, "`"+r.Alert+"`") {
			t.Errorf("docs/operations.md does not explain %s", r.Alert)
		}
	}
	for _, m := range regexp.MustCompile("`(Walfleet[A-Za-z]+)`").FindAllStringSubmatch(explained, -1) {
		if !names[m[1]] {
			t.Errorf("docs/operations.md explains %s, which is no alert", m[1])
		}
	}
}

// anchor is what GitHub makes of a heading.
func anchor(title string) string {
	return strings.Map(func(c rune) rune {
		switch {
		case unicode.IsLetter(c), unicode.IsDigit(c), c == '-', c == '_':
			return unicode.ToLower(c)
		case c == ' ':
			return '-'
		}
		return -1
	}, strings.TrimSpace(title))
}

// documented are the metrics of docs/metrics.md, with the series of histograms.
func documented(t *testing.T) map[string]bool {
	t.Helper()
	names := map[string]bool{}
	for _, m := range regexp.MustCompile("(?m)^\\| `(walfleet_[a-z_]+)` \\| (\\w+)").FindAllStringSubmatch(read(t, "../docs/metrics.md"), -1) {
		names[m[1]] = true
		if m[2] == "histogram" {
			names[m[1]+"_bucket"], names[m[1]+"_count"], names[m[1]+"_sum"] = true, true, true
		}
	}
	if len(names) < 20 {
		t.Fatalf("docs/metrics.md has %d metrics", len(names))
	}
	return names
}

// Alerts and dashboard ask for metrics that there are. An alert for one that is not would never fire.
func TestMetricsThatAreAskedForExist(t *testing.T) {
	known := documented(t)
	asked := grafana(t).expressions()
	for _, r := range rules(t) {
		asked["alert "+r.Alert] = r.Expr + " " + r.Annotations["description"]
	}
	for _, v := range grafana(t).Templating.List {
		asked["variable "+v.Name] = v.Definition
	}
	for where, expr := range asked {
		for _, name := range regexp.MustCompile(`walfleet_[a-z_]+`).FindAllString(expr, -1) {
			if !known[name] {
				t.Errorf("%s asks for %s, which docs/metrics.md does not have", where, name)
			}
		}
	}
	// Prometheus' job is what the rules call it.
	if !strings.Contains(read(t, "prometheus/prometheus.yml"), "job_name: walfleet ") || !strings.Contains(read(t, rulesFile), `up{job="walfleet"}`) {
		t.Error("the rules ask for another job than prometheus.yml has")
	}
}

func TestDashboardIsSound(t *testing.T) {
	d := grafana(t)
	if d.UID != "walfleet" || d.SchemaVersion < 36 {
		t.Errorf("uid %q, schemaVersion %d", d.UID, d.SchemaVersion)
	}
	ids := map[int]string{}
	taken := map[[2]int]string{}
	for _, p := range d.Panels {
		if other, ok := ids[p.ID]; ok || p.ID == 0 {
			t.Errorf("panels %q and %q have the same id %d", p.Title, other, p.ID)
		}
		ids[p.ID] = p.Title
		g := p.GridPos
		if g.W < 1 || g.H < 1 || g.X < 0 || g.X+g.W > 24 {
			t.Errorf("panel %q is out of the grid: %+v", p.Title, g)
		}
		for x := g.X; x < g.X+g.W; x++ {
			for y := g.Y; y < g.Y+g.H; y++ {
				if other := taken[[2]int{x, y}]; other != "" {
					t.Fatalf("panels %q and %q overlap", p.Title, other)
				}
				taken[[2]int{x, y}] = p.Title
			}
		}
		if p.Type == "row" {
			continue
		}
		if p.Description == "" || p.FieldConfig.Defaults.Unit == "" || len(p.Targets) == 0 || p.Datasource == nil || p.Datasource.UID != "${datasource}" {
			t.Errorf("panel %q lacks a description, a unit, a target or the datasource that was chosen", p.Title)
		}
	}

	// Its expressions are Prometheus' language: each becomes a rule, which promtool parses.
	var file ruleFile
	file.Groups = append(file.Groups, struct {
		Name  string
		Rules []rule
	}{Name: "dashboard"})
	for _, where := range slices.Sorted(maps.Keys(d.expressions())) {
		file.Groups[0].Rules = append(file.Groups[0].Rules, rule{Alert: where, Expr: d.expressions()[where]})
	}
	text, err := yaml.Marshal(file)
	if err != nil {
		t.Fatal(err)
	}
	generated := filepath.Join(t.TempDir(), "dashboard.yml")
	if err := os.WriteFile(generated, text, 0o600); err != nil {
		t.Fatal(err)
	}
	promtool(t, "check", "rules", generated)
}

// Prometheus and Grafana of compose.yaml find walfleet, and a person finds them.
func TestTheComposeFileHasMetrics(t *testing.T) {
	var compose struct {
		Services map[string]struct{ Ports, Volumes []string }
	}
	if err := yaml.Unmarshal([]byte(read(t, "compose.yaml")), &compose); err != nil {
		t.Fatal(err)
	}
	cfg := parse(t, "compose/walfleet.toml", read(t, "compose/walfleet.toml"))
	_, port, _ := strings.Cut(cfg.HTTP.Listen, ":")
	if want := "127.0.0.1:" + port + ":" + port; !slices.Contains(compose.Services["walfleet"].Ports, want) {
		t.Errorf("walfleet listens on %s, and publishes %q", cfg.HTTP.Listen, compose.Services["walfleet"].Ports)
	}
	if !strings.Contains(read(t, "prometheus/prometheus.yml"), `targets: ["walfleet:`+port+`"]`) {
		t.Errorf("prometheus.yml does not scrape walfleet:%s", port)
	}
	if !strings.Contains(read(t, "docker/Dockerfile"), "EXPOSE "+port+"\n") {
		t.Errorf("the Dockerfile does not expose %s", port)
	}
	if !strings.Contains(read(t, "grafana/provisioning/datasources/prometheus.yaml"), "http://prometheus:9090") {
		t.Error("Grafana does not ask Prometheus")
	}
	for name, service := range compose.Services {
		for _, p := range service.Ports {
			if !strings.HasPrefix(p, "127.0.0.1:") {
				t.Errorf("%s publishes %s, not on this machine alone", name, p)
			}
		}
		for _, v := range service.Volumes {
			if source, _, _ := strings.Cut(v, ":"); strings.HasPrefix(source, ".") {
				if _, err := os.Stat(source); err != nil {
					t.Errorf("%s mounts %v", name, err)
				}
			}
		}
	}
}
