package fleet

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/receiver"
)

func TestHistoryIsTheLastQuarterOfAnHour(t *testing.T) {
	var s seen
	now, received := reportTime, int64(0)
	for i := range 200 { // more than are kept
		received += int64(i) * 10 * 1000
		s.take(now, receiver.Status{ReceivedBytes: received, DiskFree: -1})
		now = now.Add(sampleInterval)
	}
	h := s.memory(0).history
	if len(h.BytesPerSecond) != historySamples || h.IntervalSeconds*historySamples != (15*time.Minute).Seconds() {
		t.Fatalf("%d samples of %g s", len(h.BytesPerSecond), h.IntervalSeconds)
	}
	for i, rate := range h.BytesPerSecond {
		if want := int64(200-historySamples+i) * 1000; rate != want {
			t.Errorf("sample %d: %d bytes a second, want %d", i, rate, want)
		}
	}
	s.take(now, receiver.Status{DiskFree: -1}) // another receiver, which has received nothing
	if h := s.memory(0).history.BytesPerSecond; h[len(h)-1] != 0 {
		t.Errorf("%d bytes a second received by a receiver that has received nothing", h[len(h)-1])
	}
}

func TestSecondsToFull(t *testing.T) {
	const gb = 1 << 30
	for name, c := range map[string]struct {
		free    []int64 // a minute apart
		minFree int64
		want    float64 // -1: nothing is said
	}{
		"nothing":         {nil, 0, -1},
		"one sample":      {[]int64{gb}, 0, -1},
		"too short":       {[]int64{10 * gb, 9 * gb, 8 * gb}, 0, -1},
		"a GB a minute":   {[]int64{20 * gb, 19 * gb, 18 * gb, 17 * gb, 16 * gb, 15 * gb, 14 * gb}, 0, 840},
		"min_free stays":  {[]int64{20 * gb, 19 * gb, 18 * gb, 17 * gb, 16 * gb, 15 * gb, 14 * gb}, 4 * gb, 600},
		"below min_free":  {[]int64{20 * gb, 19 * gb, 18 * gb, 17 * gb, 16 * gb, 15 * gb, 14 * gb}, 15 * gb, 0},
		"no reserve":      {[]int64{20 * gb, 19 * gb, 18 * gb, 17 * gb, 16 * gb, 15 * gb, 14 * gb}, -1, 840},
		"does not fill":   {[]int64{gb, gb, gb, gb, gb, gb, gb}, 0, -1},
		"gets emptier":    {[]int64{gb, gb, gb, gb, gb, gb, 2 * gb}, 0, -1},
		"in a hundred y":  {[]int64{100 * gb, 100 * gb, 100 * gb, 100 * gb, 100 * gb, 100 * gb, 100*gb - 1}, 0, -1},
		"known later":     {[]int64{-1, -1, 20 * gb, 20 * gb, 20 * gb, 20 * gb, 20 * gb, 20 * gb, 14 * gb}, 0, 840},
		"not known again": {[]int64{20 * gb, 19 * gb, 18 * gb, 17 * gb, 16 * gb, 15 * gb, -1}, 0, -1},
	} {
		var s seen
		for i, free := range c.free {
			s.take(reportTime.Add(time.Duration(i)*time.Minute), receiver.Status{DiskFree: free})
		}
		got := -1.0
		if seconds := s.memory(c.minFree).secondsToFull; seconds != nil {
			got = *seconds
		}
		if got != c.want {
			t.Errorf("%s: %g s, want %g", name, got, c.want)
		}
	}
}

// The last lines about a cluster are kept, whatever the log itself leaves out, and the log
// is what it would be without that.
func TestEventsAreTheLogsLines(t *testing.T) {
	var with, without bytes.Buffer
	options := &slog.HandlerOptions{Level: slog.LevelWarn}
	var s seen
	logs := []*slog.Logger{
		slog.New(&recorder{Handler: slog.NewTextHandler(&with, options), seen: &s}),
		slog.New(slog.NewTextHandler(&without, options)),
	}
	for _, l := range logs {
		l = l.With("cluster", "orders").With("slot", "one")
		l.Debug("nobody wants to know")
		l.Info("connected", "host", "db1:5432", "wait", 2*time.Second)
		l.Info(receiver.MsgSealed, "segment", "000000010000000000000001")
		l.Info(receiver.MsgCompressed, "segment", "000000010000000000000001")
		l.Error("not archiving", "error", errors.New("no \x1b[31m \"luck\"\n"))
		l.Warn("long", "stack", strings.Repeat("x", 10000))
	}
	got := []string{}
	for _, e := range s.events {
		got = append(got, e.Level+": "+e.Text)
		if e.Time.IsZero() {
			t.Errorf("no time: %+v", e)
		}
	}
	if len(got) != 3 || got[0] != `info: connected slot=one host=db1:5432 wait=2s` ||
		got[1] != `error: not archiving slot=one error="no \x1b[31m \"luck\"\n"` || len([]rune(s.events[2].Text)) != eventLimit {
		t.Errorf("events %q", got)
	}
	withoutTimes := func(b *bytes.Buffer) string {
		var lines []string
		for line := range strings.Lines(b.String()) {
			lines = append(lines, line[strings.Index(line, "level="):])
		}
		return strings.Join(lines, "")
	}
	if a, b := withoutTimes(&with), withoutTimes(&without); a != b || strings.Count(a, "\n") != 2 {
		t.Errorf("logged\n%s\nand without a recorder\n%s", a, b)
	}
	for i := range 3 * keptEvents {
		logs[0].Info(fmt.Sprint(i))
	}
	if len(s.events) != keptEvents || s.events[keptEvents-1].Text != fmt.Sprint(3*keptEvents-1) {
		t.Errorf("%d events, the last is %q", len(s.events), s.events[len(s.events)-1].Text)
	}
}

// A receiver that takes the place of another one goes on with what people know of the
// cluster, and counts from 0.
func TestWhatWasSeenIsInherited(t *testing.T) {
	var before, after seen
	before.record(EventReport{Text: "old"})
	before.archive = &ArchiveReport{Segments: 7}
	before.take(reportTime, receiver.Status{ReceivedBytes: 1000})
	after.record(EventReport{Text: "new"})
	after.inherit(&before, true)
	if len(after.events) != 2 || after.events[0].Text != "old" || after.events[1].Text != "new" || after.archive.Segments != 7 || len(after.samples) != 0 {
		t.Errorf("%+v", &after)
	}
	var elsewhere seen
	if elsewhere.inherit(&before, false); len(elsewhere.events) != 1 || elsewhere.archive != nil {
		t.Errorf("in another directory: %+v", &elsewhere)
	}
}

// A directory is looked into again after a minute, and what has changed is seen then.
func TestDirectoryIsLookedIntoOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := listArchive(t)
		var s seen
		look := func() bool {
			began := s.look(t.Context(), time.Now(), dir, slog.New(slog.DiscardHandler))
			synctest.Wait()
			return began
		}
		if !look() || look() {
			t.Error("it was not looked into once at the beginning")
		}
		first := s.memory(0).archive
		if first == nil || first.Segments == 0 || first.Error != "" || first.LastVerify != nil {
			t.Fatalf("%+v", first)
		}
		if err := (VerifyReport{Faults: 3}).Record(dir); err != nil {
			t.Fatal(err)
		}
		if err := (DrillReport{OK: true, Backup: "/b"}).Record(dir); err != nil {
			t.Fatal(err)
		}
		time.Sleep(lookInterval - time.Second)
		if look() {
			t.Error("it was looked into again within a minute")
		}
		time.Sleep(time.Second)
		if !look() {
			t.Error("it was not looked into again after a minute")
		}
		second := s.memory(0).archive
		if second.LastVerify == nil || second.LastVerify.Faults != 3 || second.LastDrill == nil || second.LastDrill.Backup != "/b" || !second.Time.After(first.Time) {
			t.Errorf("%+v", second)
		}
		if err := os.WriteFile(filepath.Join(dir, archive.VerifyRecord), []byte("{"), 0o600); err != nil {
			t.Fatal(err)
		}
		time.Sleep(lookInterval)
		look()
		if a := s.memory(0).archive; !strings.Contains(a.Error, archive.VerifyRecord) || a.LastVerify != nil || a.LastDrill == nil || a.Segments != first.Segments {
			t.Errorf("a record that makes no sense: %+v", a)
		}
	})
}

// A fault in reading an archive, which people alone want, is an error and not the end of the daemon.
func TestAPanicWhileAnArchiveIsReadEndsNothingElse(t *testing.T) {
	var log bytes.Buffer
	f := New(config(time.Second, receiver.Config{Name: "a", Dir: listArchive(t), Conninfo: "host=a"}), slog.New(slog.NewTextHandler(&log, nil)))
	f.readings.read = func(context.Context, string, string) (Contents, error) { panic("no luck") }
	if _, err := f.Contents(t.Context(), "a"); err == nil || strings.Contains(err.Error(), "no luck") {
		t.Errorf("%v", err)
	}
	if !strings.Contains(log.String(), "no luck") || !strings.Contains(log.String(), "seen_test.go") {
		t.Errorf("the log lacks the panic and its stack: %s", log.String())
	}
}

// However many ask, and however often, an archive is read once a minute.
func TestContentsAreReadOnceAMinute(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := New(config(time.Second, receiver.Config{Name: "a", Dir: listArchive(t), Conninfo: "host=a"}), slog.New(slog.DiscardHandler))
		read := func() time.Time {
			t.Helper()
			var all sync.WaitGroup
			times := make([]time.Time, 20)
			for i := range times {
				all.Go(func() {
					c, err := f.Contents(t.Context(), "a")
					if err != nil || c.Cluster != "a" || c.Segments == 0 {
						t.Errorf("%+v, %v", c, err)
					}
					times[i] = c.Time
				})
			}
			all.Wait()
			if len(slices.Compact(times)) != 1 {
				t.Errorf("read more than once: %v", times)
			}
			return times[0]
		}
		first := read()
		time.Sleep(contentsAge - time.Second)
		if again := read(); !again.Equal(first) {
			t.Error("read again within a minute")
		}
		time.Sleep(2 * time.Second)
		if again := read(); again.Equal(first) {
			t.Error("not read again after a minute")
		}
		if _, err := f.Contents(t.Context(), "b"); err == nil || !strings.Contains(err.Error(), `no cluster "b"`) {
			t.Errorf("an unknown cluster: %v", err)
		}
	})
}

// Who asks while another archive is being read waits for it, but no longer than it wants to.
func TestContentsWaitForTheirTurn(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		f := New(config(time.Second, receiver.Config{Name: "a", Dir: listArchive(t), Conninfo: "host=a"}), slog.New(slog.DiscardHandler))
		f.readings.slots <- struct{}{} // another one is read
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		if _, err := f.Contents(ctx, "a"); !errors.Is(err, context.DeadlineExceeded) || !strings.Contains(err.Error(), "archive of a") {
			t.Errorf("%v", err)
		}
		<-f.readings.slots
		if c, err := f.Contents(t.Context(), "a"); err != nil || c.Segments == 0 {
			t.Errorf("%+v, %v", c, err)
		}
	})
}

func TestHealth(t *testing.T) {
	now := reportTime
	late, inTime := LateAfter.Seconds(), 1.0
	fine := ClusterReport{State: string(receiver.Streaming), Host: "db1:5432", BehindSeconds: &inTime, Since: now.Add(-time.Hour)}
	with := func(change func(*ClusterReport)) ClusterReport {
		r := fine
		change(&r)
		return r
	}
	warning := func(kind, host string) func(*ClusterReport) {
		return func(r *ClusterReport) { r.Warnings = []WarningReport{{Kind: kind, Host: host}} }
	}
	archived := func(a ArchiveReport) func(*ClusterReport) { return func(r *ClusterReport) { r.Archive = &a } }
	state := func(s receiver.State) func(*ClusterReport) { return func(r *ClusterReport) { r.State = string(s) } }
	for name, c := range map[string]struct {
		r       ClusterReport
		trouble time.Duration // since when; 0: none
		want    Health
	}{
		"fine":                      {fine, 0, Healthy},
		"halted":                    {with(state(receiver.Halted)), time.Second, Critical},
		"blocked":                   {with(state(receiver.Blocked)), time.Second, Critical},
		"stopped":                   {with(state(receiver.Stopped)), 0, Warning},
		"tries again":               {with(state(receiver.Backoff)), outageAfter - 1, Warning},
		"tries again and again":     {with(state(receiver.Connecting)), outageAfter, Critical},
		"first attempt":             {with(func(r *ClusterReport) { r.State, r.Since = string(receiver.Connecting), now }), 0, Healthy},
		"an attempt without end":    {with(func(r *ClusterReport) { r.State, r.Since = string(receiver.Connecting), now.Add(-outageAfter) }), 0, Critical},
		"late":                      {with(func(r *ClusterReport) { r.BehindSeconds = &late }), 0, Warning},
		"catches up since long":     {with(func(r *ClusterReport) { r.BehindSeconds, r.State = nil, string(receiver.CatchingUp) }), 0, Warning},
		"catches up":                {with(func(r *ClusterReport) { r.BehindSeconds, r.Since = nil, now }), 0, Healthy},
		"slot lost":                 {with(warning(receiver.WarnSlotLost, "db1:5432")), 0, Critical},
		"slot lost on an old host":  {with(warning(receiver.WarnSlotLost, "db0:5432")), 0, Warning},
		"slot retains much":         {with(warning(receiver.WarnSlotRetained, "db1:5432")), 0, Warning},
		"does not stop":             {with(func(r *ClusterReport) { r.Stopping = now }), 0, Warning},
		"archive looked into":       {with(archived(ArchiveReport{LastVerify: &VerifyReport{Whole: true}, LastDrill: &DrillReport{OK: true}})), 0, Healthy},
		"archive damaged":           {with(archived(ArchiveReport{LastVerify: &VerifyReport{Faults: 1}})), 0, Critical},
		"archive could not be read": {with(archived(ArchiveReport{LastVerify: &VerifyReport{Error: "no"}})), 0, Healthy},
		"directory is gone":         {with(archived(ArchiveReport{Time: now, Error: "there is no directory yet"})), 0, Warning},
		"directory was not yet":     {with(archived(ArchiveReport{Time: fine.Since.Add(time.Second), Error: "there is no directory yet"})), 0, Healthy},
		"drill failed":              {with(archived(ArchiveReport{LastDrill: &DrillReport{}})), 0, Warning},
	} {
		since := time.Time{}
		if c.trouble != 0 {
			since = now.Add(-c.trouble)
		}
		if got := healthOf(c.r, since, now); got != c.want {
			t.Errorf("%s: %s, want %s", name, got, c.want)
		}
	}
	if c := configured(defaultCluster()); c.Health != Critical || healthOf(c, time.Time{}, now) != Critical {
		t.Error("without a daemon nothing is archived")
	}
}

// A running fleet remembers its clusters by itself.
func TestFleetIsWatched(t *testing.T) {
	c := newCluster(t, "a")
	r := run(t, config(patience, c.cfg))
	r.wait("a streaming")
	for begun := time.Now(); ; time.Sleep(10 * time.Millisecond) {
		s := r.Status()[0]
		if a := s.memory.archive; a != nil && a.SystemIdentifier == "42" && s.memory.history != nil {
			break
		}
		if time.Since(begun) > patience {
			t.Fatalf("%+v", s.memory)
		}
	}
	events := r.events("a")
	if !slices.ContainsFunc(events, func(e EventReport) bool { return strings.HasPrefix(e.Text, receiver.MsgConnected+" host=") }) {
		t.Errorf("events %+v", events)
	}
	if r.events("b") != nil {
		t.Error("events of a cluster that there is not")
	}
	if err := r.stop(); err != nil {
		t.Error(err)
	}
}

// Whoever looks at a cluster does not get in the way of a reload that changes its settings: for the race detector.
func TestAReloadWhileArchivesAreLookedInto(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		cfg := config(time.Second, receiver.Config{Name: "a", Dir: listArchive(t), Conninfo: "host=a"})
		f := New(cfg, slog.New(slog.DiscardHandler))
		base, cancel := context.WithCancel(t.Context())
		f.base = base // of receivers: none is started
		var all sync.WaitGroup
		all.Go(func() { f.watch(base) })
		changed := *cfg
		changed.Clusters = slices.Clone(cfg.Clusters)
		for range 3 {
			changed.Clusters[0].MinFree++
			all.Go(func() {
				if _, err := f.Contents(base, "a"); err != nil {
					t.Error(err)
				}
			})
			time.Sleep(time.Second) // when watch has its turn, too
			next := changed
			next.Clusters = slices.Clone(changed.Clusters)
			if plan, err := f.Reload(base, &next); err != nil || plan.String() != "adjusted a; kept 0" {
				t.Errorf("%s, %v", plan, err)
			}
		}
		cancel()
		all.Wait()
	})
}

// Gaps on record are not forgotten while a server is away: they would be taken for new ones when it is back.
func TestGapsOfAReceiverThatHasNotOpenedItsArchive(t *testing.T) {
	c := ClusterStatus{Status: receiver.Status{State: receiver.Connecting}}
	c.memory.archive = &ArchiveReport{Gaps: []GapReport{{}, {}}}
	if r := reportOf(c, reportTime); r.Gaps != 2 {
		t.Errorf("%d gaps", r.Gaps)
	}
	c.Gaps = 3 // one was just recorded
	if r := reportOf(c, reportTime); r.Gaps != 3 {
		t.Errorf("%d gaps", r.Gaps)
	}
}
