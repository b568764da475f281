package check

import (
	"fmt"
	"io"
	"strings"
)

// Print writes the report for people: each cluster's tests in a table, with hints
// under what is not right.
func (r Report) Print(w io.Writer) error {
	var b strings.Builder
	for i, c := range r.Clusters {
		if i > 0 {
			b.WriteString("\n")
		}
		fmt.Fprintf(&b, "%s: %s\n", c.Name, c.Level)
		for _, result := range c.Results {
			text := result.Text
			if result.Host != "" && !strings.Contains(text, result.Host) {
				text = result.Host + ": " + text
			}
			fmt.Fprintf(&b, "  %-24s%-9s%s\n", result.Test, result.Level, OneLine(text))
			if result.Hint != "" {
				fmt.Fprintf(&b, "  %-33s→ %s\n", "", OneLine(result.Hint))
			}
		}
	}
	if len(r.Clusters) > 1 {
		fmt.Fprintf(&b, "\n%s\n", r.summary())
	}
	_, err := io.WriteString(w, b.String())
	return err
}

// OneLine makes text that is several lines, as some errors are, one.
func OneLine(s string) string {
	return strings.NewReplacer("\t", " ", "\r", " ", "\n", "; ").Replace(s)
}

func (r Report) summary() string {
	counts := r.counts()
	return fmt.Sprintf("%d clusters: %d OK, %d WARNING, %d FAILED", len(r.Clusters), counts[OK], counts[Warning], counts[Failed])
}

func (r Report) counts() (counts [Failed + 1]int) {
	for _, c := range r.Clusters {
		counts[c.Level]++
	}
	return counts
}

// NagiosUnknown is the exit status of a plugin that could not check.
const NagiosUnknown = 3

// nagiosNames are the words for levels in the plugins' guidelines, whose exit statuses
// 0, 1 and 2 are the levels'.
var nagiosNames = [...]string{"OK", "WARNING", "CRITICAL"}

// Nagios is the report as one line of a Nagios plugin, with performance data, and the
// plugin's exit status (https://nagios-plugins.org/doc/guidelines.html).
func (r Report) Nagios() (line string, status int) {
	counts := r.counts()
	var b strings.Builder
	fmt.Fprintf(&b, "WALFLEET %s - %s", nagiosNames[r.Level], r.summary())
	for _, level := range []Level{Failed, Warning} {
		for _, c := range r.Clusters {
			if c.Level == level {
				fmt.Fprintf(&b, "; %s: %s", c.Name, strings.Join(c.tests(level), ", "))
			}
		}
	}
	// A | begins the performance data.
	line = strings.ReplaceAll(OneLine(b.String()), "|", "/")
	line += fmt.Sprintf(" | clusters=%d ok=%d warning=%d failed=%d", len(r.Clusters), counts[OK], counts[Warning], counts[Failed])
	for _, c := range r.Clusters {
		line += fmt.Sprintf(" '%s slot_retained'=%dB", c.Name, c.Retained)
		if c.Free >= 0 {
			line += fmt.Sprintf(" '%s free'=%dB", c.Name, c.Free)
		}
	}
	return line, int(r.Level)
}

// tests names the tests that came out at a level, each once.
func (c Cluster) tests(level Level) []string {
	var names []string
	seen := map[string]bool{}
	for _, result := range c.Results {
		if result.Level == level && !seen[result.Test] {
			seen[result.Test] = true
			names = append(names, result.Test)
		}
	}
	return names
}
