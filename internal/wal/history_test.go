package wal_test

import (
	"math"
	"reflect"
	"strings"
	"testing"

	"github.com/walfleet/walfleet/internal/wal"
)

func TestParseHistory(t *testing.T) {
	for _, c := range []struct {
		name string
		tli  wal.Timeline
		data string
		want []wal.Fork
	}{
		{"timeline 1", 1, "", nil},
		{"no ancestors", 5, "# began here\n", nil},
		{"one", 2, "1\t0/3000000\tno recovery target specified\n", []wal.Fork{{1, 0x3000000, "no recovery target specified"}}},
		{"no newline at the end", 2, "1\t0/3000000", []wal.Fork{{1, 0x3000000, ""}}},
		{"three, as servers write them", 12, "1\t0/3000000\tno recovery target specified\n\n3\tA/5000108\tbefore 2024-01-01 00:00:00+00\n\n11\tA/5000108\tat restore point \"x\"\n",
			[]wal.Fork{{1, 0x3000000, "no recovery target specified"}, {3, 0xA05000108, "before 2024-01-01 00:00:00+00"}, {11, 0xA05000108, `at restore point "x"`}}},
		{"comments, blanks, CRLF, spaces", 3, "# 9 0/0\n\n  \t \r\n  # x\n  1 0/1000 why not\r\n\f2\t\t0/2000\r\n",
			[]wal.Fork{{1, 0x1000, "why not"}, {2, 0x2000, ""}}},
		// PostgreSQL 15, told to recover along timeline 2 to before its fork, wrote this.
		{"positions descend", 3, "1\t0/F00000\tno recovery target specified\n\n2\t0/825AD8\tafter LSN 0/825A98\n",
			[]wal.Fork{{1, 0x825AD8, "no recovery target specified"}, {2, 0x825AD8, "after LSN 0/825A98"}}},
	} {
		h, err := wal.ParseHistory(c.tli, []byte(c.data))
		if want := (wal.History{Timeline: c.tli, Forks: c.want}); err != nil || !reflect.DeepEqual(h, want) {
			t.Errorf("%s: got %+v, %v", c.name, h, err)
		}
	}
}

func TestParseHistoryRefuses(t *testing.T) {
	for _, c := range []struct {
		tli  wal.Timeline
		data string
	}{
		{1, "1\t0/3000000\tx\n"},
		{2, "2\t0/3000000\tx\n"},
		{2, "3\t0/3000000\tx\n"},
		{4, "1\t0/1000\n1\t0/2000\n"},
		{4, "2\t0/1000\n1\t0/2000\n"},
		{4, "0\t0/1000\n"},
		{4, "-1\t0/1000\n"},
		{4, "+1\t0/1000\n"},
		{4, "4294967297\t0/1000\n"},
		{4, "0x1\t0/1000\n"},
		{4, "one\t0/1000\n"},
		{4, "1\n"},
		{4, "1\t\n"},
		{4, "1\t0\n"},
		{4, "1\t0/\n"},
		{4, "1\t0/0\n"},
		{4, "1\t0/100000000\n"},
		{4, "1 0 / 1000\n"},
		{4, "1\t0/1000\n\x00\n"},
		{4, strings.Repeat("x", 1<<16)},
	} {
		h, err := wal.ParseHistory(c.tli, []byte(c.data))
		if err == nil {
			t.Errorf("ParseHistory(%d, %q) = %+v", c.tli, c.data, h)
		} else if len(err.Error()) > 300 {
			t.Errorf("an error of %d bytes", len(err.Error()))
		}
	}
}

func TestHistory(t *testing.T) {
	h, err := wal.ParseHistory(7, []byte("1\t0/1000\n3\t0/3000\n4\t0/2000\n"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		tli  wal.Timeline
		end  wal.LSN
		isIn bool
		next wal.Timeline // 0 = none
	}{
		{0, 0, false, 0},
		{1, 0x1000, true, 3},
		{2, 0, false, 0},
		{3, 0x2000, true, 4}, // left for good where 4 was
		{4, 0x2000, true, 7},
		{5, 0, false, 0},
		{7, math.MaxUint64, true, 0},
		{8, 0, false, 0},
	} {
		if end, ok := h.End(c.tli); end != c.end || ok != c.isIn {
			t.Errorf("End(%d) = %s, %v", c.tli, end, ok)
		}
		if next, ok := h.Next(c.tli); next != c.next || ok != (c.next != 0) {
			t.Errorf("Next(%d) = %d, %v", c.tli, next, ok)
		}
	}
	if next, ok := (wal.History{Timeline: 1}).Next(1); ok {
		t.Errorf("timeline %d follows a timeline 1 that has not ended", next)
	}
}

func TestHistoryName(t *testing.T) {
	for tli, name := range map[wal.Timeline]string{
		1: "00000001.history", 2: "00000002.history", 10: "0000000A.history", math.MaxUint32: "FFFFFFFF.history",
	} {
		if got := wal.HistoryName(tli); got != name {
			t.Errorf("HistoryName(%d) = %s", tli, got)
		}
		if got, err := wal.ParseHistoryName(name); err != nil || got != tli {
			t.Errorf("ParseHistoryName(%s) = %d, %v", name, got, err)
		}
	}
	for _, name := range []string{
		"", ".history", "00000000.history", "0000000a.history", "2.history", "000000002.history", "00000002",
		"00000002.HISTORY", "00000002.history.tmp", "../00002.history", "0000002\x00.history",
	} {
		if got, err := wal.ParseHistoryName(name); err == nil {
			t.Errorf("ParseHistoryName(%q) = %d", name, got)
		}
	}
}

func FuzzParseHistory(f *testing.F) {
	f.Add(uint32(1), []byte(""))
	f.Add(uint32(3), []byte("1\t0/F00000\tno recovery target specified\n\n2\t0/825AD8\tafter LSN 0/825A98\n"))
	f.Add(uint32(9), []byte("# x\n 1 A/5 y\r\n\n7\tFFFFFFFF/FFFFFFFF"))
	f.Fuzz(func(t *testing.T, tli uint32, data []byte) {
		h, err := wal.ParseHistory(wal.Timeline(tli), data)
		if err != nil {
			return
		}
		at, end := wal.Timeline(0), wal.LSN(1)
		for i, fork := range h.Forks {
			if fork.Timeline <= at || fork.End < end || fork.Timeline >= h.Timeline {
				t.Fatalf("fork %d of %+v", i, h)
			}
			if e, ok := h.End(fork.Timeline); !ok || e != fork.End {
				t.Fatalf("End(%d) = %s, %v", fork.Timeline, e, ok)
			}
			if i > 0 {
				if next, ok := h.Next(at); !ok || next != fork.Timeline {
					t.Fatalf("Next(%d) = %d, %v", at, next, ok)
				}
			}
			at, end = fork.Timeline, fork.End
		}
	})
}
