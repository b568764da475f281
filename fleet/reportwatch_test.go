package fleet

import (
	"fmt"
	"math"
	"regexp"
	"slices"
	"strings"
	"testing"
	"time"

	"pgregory.net/rapid"

	"github.com/walfleet/walfleet/receiver"
)

// drawn draws a report in black and white, as one text.
func drawn(r Report, v View) string {
	v.Now = reportTime.Add(time.Second)
	lines, _ := r.Draw(v)
	return strings.Join(lines, "\n") + "\n"
}

// watchedReport has a cluster of each health.
func watchedReport() Report {
	r := testReport()
	for i := range r.Clusters {
		c := &r.Clusters[i]
		if c.Name == "good" {
			c.History = &HistoryReport{IntervalSeconds: 30, BytesPerSecond: []int64{0, 0, 1, 1, 500, 500, 1000, 0}}
		}
		c.Health = map[string]Health{"good": Healthy, "idle": Healthy, "stuck": Warning, "halted": Critical}[c.Name]
	}
	return r
}

// What a person needs most comes first, and is there on a small terminal, too.
func TestWatchShowsTheWorstOnTop(t *testing.T) {
	wantText(t, drawn(watchedReport(), View{Width: 100, Height: 10}), `
1 of 4 databases is NOT being archived: halted; 1 of 4 databases needs attention: stu…  12:00:01 UTC
4 clusters: 1 halted, 1 backoff, 2 streaming

CLUSTER  STATE      SINCE  LAG     BEHIND  LAST 15 MINUTES  REASON
halted   !! halted  1m30s  -       -                        the server no longer has the WAL that c…
stuck    ! backoff  3s     -       -                        told to stop 31s ago by a reload, and h…
good     streaming  2d02h  1.5 kB  2s                 ▁▂▅█  the slot retains much; gaps on record: 1
idle     streaming  1s     -       0s

q quits
`)
	wantText(t, drawn(watchedReport(), View{Width: 40, Height: 8}), `
1 of 4 databases is NOT b…  12:00:01 UTC
4 clusters: 1 halted, 1 backoff, 2 stre…

CLUSTER  STATE      LAG     REASON
halted   !! halted  -       the server …
stuck    ! backoff  -       told to sto…
good     streaming  1.5 kB  the slot re…
… 1 more; ↑↓ PgUp PgDn Home End scroll,…
`)
}

func TestWatchScrollsToTheLastRowAndNoFurther(t *testing.T) {
	r := Report{Time: reportTime, Daemon: &DaemonReport{}}
	for i := range 500 {
		r.Clusters = append(r.Clusters, ClusterReport{Name: fmt.Sprintf("c%03d", i), State: "streaming", Health: Healthy})
	}
	for _, c := range []struct{ top, first, want int }{{-3, 0, 0}, {0, 0, 0}, {7, 7, 7}, {480, 480, 480}, {481, 480, 480}, {math.MaxInt, 480, 480}} {
		lines, top := r.Draw(View{Width: 80, Height: 25, Top: c.top})
		if top != c.want || len(lines) != 25 || !strings.HasPrefix(lines[4], fmt.Sprintf("c%03d", c.first)) || !strings.HasPrefix(lines[24], "… 480 more; ↑↓ PgUp PgDn Home End scroll") {
			t.Errorf("scrolled to %d: top %d, %d lines, want %d:\n%s", c.top, top, len(lines), c.want, strings.Join(lines, "\n"))
		}
	}
}

// The headline counts those as not archived from which no WAL comes.
func TestHeadlineSaysWhetherAllIsArchived(t *testing.T) {
	cluster := func(name string, state receiver.State, health Health) ClusterReport {
		return ClusterReport{Name: name, State: string(state), Health: health}
	}
	good, bad := cluster("good", receiver.Streaming, Healthy), cluster("bad", receiver.Halted, Critical)
	late, faulty := cluster("late", receiver.CatchingUp, Warning), cluster("faulty", receiver.Streaming, Critical)
	gap := good
	gap.Gaps = 2
	for _, c := range []struct {
		clusters []ClusterReport
		want     string
		health   Health
	}{
		{[]ClusterReport{good}, "The database is archived: good", Healthy},
		{[]ClusterReport{good, good}, "All 2 databases are archived", Healthy},
		{[]ClusterReport{good, gap}, "All 2 databases are archived; WAL is missing for good in 1 archive", Healthy},
		{[]ClusterReport{late, good}, "1 of 2 databases needs attention: late", Warning},
		{[]ClusterReport{late, good, faulty}, "1 of 3 archives is damaged or in danger: faulty; 1 of 3 databases needs attention: late", Critical},
		{[]ClusterReport{late, good, bad}, "1 of 3 databases is NOT being archived: bad; 1 of 3 databases needs attention: late", Critical},
		{[]ClusterReport{bad, bad}, "2 of 2 databases are NOT being archived: bad, bad", Critical},
		{[]ClusterReport{bad}, "1 of 1 database is NOT being archived: bad", Critical},
	} {
		words, health := Report{Daemon: &DaemonReport{}, Clusters: c.clusters}.headline()
		if words != c.want || health != c.health {
			t.Errorf("%q, %s, want %q, %s", words, health, c.want, c.health)
		}
	}
}

// An old state is never taken for a new one, with colours or without.
func TestWatchMarksWhatIsOld(t *testing.T) {
	r := watchedReport()
	r.Daemon.LastReload = &Outcome{Time: reportTime.Add(-time.Minute), Error: "line 3: bogus"}
	v := View{Width: 200, Height: 12, Lost: "no walfleet answers at /run/walfleet", Now: reportTime.Add(75 * time.Second)}
	lines, _ := r.Draw(v)
	want := []string{
		"NO NEWS for 1m15s: no walfleet answers at /run/walfleet",
		"What follows is how it was at 12:00:00 UTC",
		"LAST RELOAD FAILED, 1m00s ago: line 3: bogus",
	}
	if !slices.Equal(lines[1:4], want) {
		t.Errorf("%q, want %q", lines[1:4], want)
	}
	v.Color = true
	lines, _ = r.Draw(v)
	for _, line := range lines {
		if line != "" && !strings.HasPrefix(line, "\x1b[1;7m") && regexp.MustCompile(`^\x1b\[2m[^\x1b]*\x1b\[0m$`).FindString(strings.ReplaceAll(line, "\x1b[0m\x1b[2m", "")) == "" {
			t.Errorf("neither a notice nor faint: %q", line)
		}
	}
}

// Without a daemon there is what the archives say.
func TestWatchWithoutADaemon(t *testing.T) {
	r := Report{Time: reportTime, Error: "no walfleet answers", Clusters: []ClusterReport{{Name: "a", State: stateUnknown, Health: Critical, Slot: "s",
		Archive: &ArchiveReport{Segments: 3, Bytes: 3 << 24, SealedLSN: "0/4000000", Timeline: 1}}}}
	wantText(t, drawn(r, View{Width: 90, Height: 7, Lost: r.Error}), `
NO DAEMON: what the archives say by themselves                                12:00:01 UTC
no walfleet answers

CLUSTER  TLI  SEALED     SEGMENTS  SIZE   IN PROGRESS  MODIFIED  SLOT  FREE  GAPS  NOTE
a        1    0/4000000  3         48 MB  -            -         s     -     0

q quits
`)
}

func TestStatesHaveColoursAndWords(t *testing.T) {
	lines, _ := watchedReport().Draw(View{Width: 100, Height: 10, Color: true, Now: reportTime})
	for i, want := range []string{"\x1b[1;31m!! halted", "\x1b[33m! backoff", "\x1b[32mstreaming", "\x1b[32mstreaming"} {
		if !strings.Contains(lines[4+i], want) {
			t.Errorf("%q, want %q in it", lines[4+i], want)
		}
	}
	if !strings.HasPrefix(lines[0], "\x1b[1;31m1 of 4") {
		t.Errorf("headline %q", lines[0])
	}
}

// Whatever a server or a file says, and however small the terminal, what is drawn stays
// in its lines, and no byte of theirs is a command to the terminal.
func TestWatchStaysWithinTheTerminal(t *testing.T) {
	escape := regexp.MustCompile(`\x1b\[[0-9;]+m`)
	rapid.Check(t, func(t *rapid.T) {
		hostile := rapid.StringOf(rapid.SampledFrom([]rune("ab 中文\x1b[31m\x9b\u009b2J\r\n\t\u202e\u0301…\x00\x07😀"))).Draw(t, "text")
		r := watchedReport()
		r.Clusters = append(r.Clusters, ClusterReport{Name: "x" + hostile, State: "backoff", Reason: hostile, Health: Critical, Host: hostile, Slot: hostile, LastError: hostile})
		r.Daemon.LastReload = &Outcome{Error: hostile}
		v := View{Width: rapid.IntRange(0, 200).Draw(t, "width"), Height: rapid.IntRange(0, 40).Draw(t, "height"), Color: rapid.Bool().Draw(t, "color"),
			Details: rapid.Bool().Draw(t, "details"), Top: rapid.IntRange(-5, 500).Draw(t, "top"), Lost: rapid.SampledFrom([]string{"", hostile}).Draw(t, "lost"), Now: reportTime}
		lines, _ := r.Draw(v)
		if len(lines) > v.Height {
			t.Fatalf("%d lines of %d", len(lines), v.Height)
		}
		for _, line := range lines {
			plain := line
			if v.Color {
				plain = escape.ReplaceAllString(line, "")
			}
			if columns(plain) > v.Width || strings.ContainsFunc(plain, func(c rune) bool { return c < ' ' || c >= 0x7f && c < 0xa0 || c == 0x202e }) {
				t.Fatalf("%d columns of %d: %q", columns(plain), v.Width, line)
			}
		}
	})
}

// Columns below each other begin at the same column of the terminal, though Chinese
// characters are twice as wide as others.
func TestWideCharactersCountTwice(t *testing.T) {
	for s, want := range map[string]int{"abc": 3, "中文": 4, "ａ": 2, "e\u0301": 1, "▁█…": 3, "😀": 2} {
		if got := columns(s); got != want {
			t.Errorf("%q takes %d columns, want %d", s, got, want)
		}
	}
	for _, c := range []struct {
		text  string
		limit int
		want  string
	}{
		{"中文集群", 8, "中文集群"}, {"中文集群", 7, "中文集…"}, {"中文集群", 6, "中文…"}, {"中文", 1, "…"}, {"中", 0, ""},
		{"ab  ", 3, "ab "}, {"ab  ", 2, "ab"}, {"abc", 2, "a…"},
	} {
		if got := fit(c.text, c.limit); got != c.want || columns(got) > c.limit {
			t.Errorf("%q in %d columns: %q, want %q", c.text, c.limit, got, c.want)
		}
	}
}

func TestSparklineIsAQuarterOfAnHour(t *testing.T) {
	full := make([]int64, 90)
	full[0], full[89] = 70, 10
	for _, c := range []struct {
		history *HistoryReport
		want    string
	}{
		{nil, ""},
		{&HistoryReport{IntervalSeconds: 10}, ""},
		{&HistoryReport{IntervalSeconds: 10, BytesPerSecond: []int64{0}}, "              ▁"},
		{&HistoryReport{IntervalSeconds: 60, BytesPerSecond: []int64{7, 6, 5, 4, 3, 2, 1, 0}}, "       █▇▆▅▄▃▂▁"},
		{&HistoryReport{IntervalSeconds: 60, BytesPerSecond: []int64{1 << 60, 1}}, "             █▂"}, // the least is seen
		{&HistoryReport{IntervalSeconds: 10, BytesPerSecond: full}, "█▁▁▁▁▁▁▁▁▁▁▁▁▁▂"},
		{&HistoryReport{IntervalSeconds: 10, BytesPerSecond: append([]int64{1000}, full...)}, "█▁▁▁▁▁▁▁▁▁▁▁▁▁▂"}, // what is older is not
	} {
		if got := sparkline(c.history, 15); got != c.want {
			t.Errorf("%+v: %q, want %q", c.history, got, c.want)
		}
	}
}
