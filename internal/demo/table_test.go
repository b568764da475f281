package demo

import (
	"bytes"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/receiver"
)

func TestStatusTable(t *testing.T) {
	got := strings.Join(statusTable([]fleet.ClusterStatus{
		{Name: "pg-16mb", Status: receiver.Status{
			State: receiver.Streaming, Timeline: 1, SegmentSize: 16 << 20,
			Flushed: 0x2000000, ServerEnd: 0x2000000 + 300<<10, ReceivedBytes: 5 << 20, SegmentsSealed: 12,
		}},
		{Name: "pg-1gb", Status: receiver.Status{
			State: receiver.CatchingUp, Timeline: 2, SegmentSize: 1 << 30,
			Flushed: 0x1_C0000000, ServerEnd: 0x1_BFFFFFFF, ReceivedBytes: 1288490189, Reconnects: 3,
		}},
		{Name: "down", Status: receiver.Status{
			State: receiver.Backoff, Timeline: 1, SegmentSize: 1 << 20, Flushed: 0x500, ServerEnd: 0x600,
		}},
		{Name: "new", Status: receiver.Status{State: receiver.Connecting}},
	}), "\n")
	want := strings.Trim(`
CLUSTER  STATE       TIMELINE SEGMENT-SIZE     FLUSHED     LAG RECEIVED SEALED RECONNECTS
pg-16mb  streaming          1        16 MB   0/2000000  300 kB     5 MB     12          0
pg-1gb   catching_up        2         1 GB  1/C0000000     0 B   1.2 GB      0          3
down     backoff            1         1 MB       0/500       -      0 B      0          0
new      connecting         -            -           -       -      0 B      0          0
`, "\n")
	if got != want {
		t.Errorf("got:\n%s\nwant:\n%s", got, want)
	}
}

func TestSize(t *testing.T) {
	for n, want := range map[int64]string{
		0: "0 B", 1: "1 B", 999: "999 B", 1000: "1.0 kB", 1024: "1 kB", 1536: "1.5 kB", 10 << 10: "10 kB",
		16 << 20: "16 MB", 1000 << 20: "1.0 GB", 1 << 30: "1 GB", 2469606195: "2.3 GB", 1 << 50: "1024 TB",
	} {
		if got := size(n); got != want {
			t.Errorf("size(%d) = %q, want %q", n, got, want)
		}
	}
}

// TestPlainScreen: where the output is no terminal, there are no control
// characters, and a table only now and then.
func TestPlainScreen(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		var out bytes.Buffer
		s := newScreen(&out, false, nil)
		s.say("story")
		s.show([]string{"a 1"}, true)
		s.show([]string{"a 2"}, false) // too early
		time.Sleep(plainInterval)
		s.show([]string{"a 3"}, false)
		time.Sleep(plainInterval)
		s.show([]string{"a 3"}, false) // nothing new
		s.show([]string{"b 3"}, true)
		s.settle([]string{"end"})
		want := "story\n   a 1\n   a 3\n   b 3\n   end\n"
		if got := out.String(); got != want {
			t.Errorf("got %q, want %q", got, want)
		}
	})
}

// TestMovingScreen: on a terminal the table is redrawn in place, stays below
// the story, and no line of it wraps.
func TestMovingScreen(t *testing.T) {
	var out bytes.Buffer
	s := &screen{out: &out, width: func() int { return 10 }}
	s.show([]string{"a", "0123456789"}, false)
	s.say("story")
	s.show([]string{"b"}, false)
	s.settle([]string{"0123456789"})
	s.say("end")
	const up1, up2 = "\x1b[1A\x1b[J", "\x1b[2A\x1b[J"
	want := "   a\n   012345\n" + // one column stays free
		up2 + "story\n   a\n   012345\n" +
		up2 + "   b\n" +
		up1 + "   0123456789\nend\n"
	if got := out.String(); got != want {
		t.Errorf("got %q, want %q", got, want)
	}
}

func TestLatencies(t *testing.T) {
	l := &load{}
	if got := l.latencies(); got != (latencies{}) {
		t.Errorf("of nothing: %+v", got)
	}
	l.times = []time.Duration{9, 1, 5}
	if got, want := l.latencies(), (latencies{commits: 3, median: 5, worst: 9}); got != want {
		t.Errorf("got %+v, want %+v", got, want)
	}
}
