//go:build linux

package main

import (
	"math"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

// TestStatistics: the numbers of the report are the usual ones, of any number of values in any order.
func TestStatistics(t *testing.T) {
	for _, tt := range []struct {
		values           []float64
		median, p50, p99 float64
	}{
		{nil, math.NaN(), math.NaN(), math.NaN()},
		{[]float64{7}, 7, 7, 7},
		{[]float64{3, 1}, 2, 1, 3},
		{[]float64{5, 1, 3}, 3, 3, 5},
		{[]float64{4, 1, 3, 2}, 2.5, 2, 4},
	} {
		same := func(a, b float64) bool { return a == b || math.IsNaN(a) && math.IsNaN(b) }
		if got := median(tt.values); !same(got, tt.median) {
			t.Errorf("median of %v: %v", tt.values, got)
		}
		if got := percentile(tt.values, 50); !same(got, tt.p50) {
			t.Errorf("50 %% of %v: %v", tt.values, got)
		}
		if got := percentile(tt.values, 99); !same(got, tt.p99) {
			t.Errorf("99 %% of %v: %v", tt.values, got)
		}
	}
	var thousand []float64
	for i := range 1000 {
		thousand = append(thousand, float64(1000-i))
	}
	for p, want := range map[float64]float64{0: 1, 50: 500, 99: 990, 99.9: 999, 100: 1000} {
		if got := percentile(thousand, p); got != want {
			t.Errorf("%v %% of 1 to 1000: %v", p, got)
		}
	}
}

func TestNumber(t *testing.T) {
	for v, want := range map[float64]string{0: "0", 12345.6: "12346", 100: "100", 12.345: "12.3", 1.2345: "1.23", 0.12345: "0.123", 0.00012: "0.000", -2.5: "-2.50"} {
		if got := number(v); got != want {
			t.Errorf("number(%v) = %q, want %q", v, got, want)
		}
	}
	if got := number(math.NaN()); got != "–" {
		t.Errorf("number(NaN) = %q", got)
	}
}

// TestReport: ratios are those of the pairs, not of the medians; every measurement is in the CSV file; and what a person
// wrote stays.
func TestReport(t *testing.T) {
	speed, syncs := quantity{"throughput", "MB/s", true}, quantity{"syncs", "", false}
	pairs := table{title: "Pairs", about: "About pairs."}
	for i, v := range [][2]float64{{100, 300}, {200, 200}, {400, 400}} { // ratios 3, 1, 1; of the medians 1.5
		pairs.add(pgReceivewal, i+1, []value{{speed, v[0]}, {syncs, 0}})
		pairs.add(walfleet, i+1, []value{{speed, v[1]}, {syncs, 1}})
	}
	alone := table{title: "Alone", about: "One side."}
	alone.add(walfleet, 1, []value{{speed, 1.5}})
	r := report{machine: [][2]string{{"disk", "a disk"}}, pairs: 3, tables: []table{pairs, alone, {title: "Nothing", about: "Not measured."}}}

	dir := t.TempDir()
	const kept = "\n## What was tried\n\nMuch.\n"
	if err := os.WriteFile(filepath.Join(dir, "benchmarks.md"), []byte("old\n"+kept), 0o600); err != nil {
		t.Fatal(err)
	}
	for range 2 { // the second time the same
		if err := r.write(dir); err != nil {
			t.Fatal(err)
		}
	}
	md, err := os.ReadFile(filepath.Join(dir, "benchmarks.md"))
	if err != nil {
		t.Fatal(err)
	}
	for _, line := range []string{
		"| throughput, MB/s ↑ | 200 | 300 | **1.00** (1.00 … 3.00) |\n",
		"| syncs ↓ | 0 | 1.00 | – |\n",
		"| throughput, MB/s ↑ | – | 1.50 | – |\n",
		"## Nothing\n\nNot measured.\n",
		"| disk | a disk |\n",
		"go run ./bench -pairs 3 -run ''",
	} {
		if !strings.Contains(string(md), line) {
			t.Errorf("no line %q in\n%s", line, md)
		}
	}
	if strings.Contains(string(md), "old") || !strings.HasSuffix(string(md), kept) || strings.Count(string(md), kept) != 1 {
		t.Errorf("want the handwritten part once, and nothing else of the old file, in\n%s", md)
	}
	csv, err := os.ReadFile(filepath.Join(dir, "benchmarks.csv"))
	if err != nil {
		t.Fatal(err)
	}
	if got := strings.Count(string(csv), "\n"); got != 1+12+1 || !strings.Contains(string(csv), "Pairs,throughput,MB/s,walfleet,3,400\n") {
		t.Errorf("%d lines in\n%s", got, csv)
	}
	if err := (&report{}).write(dir); err == nil {
		t.Error("an empty report replaces the last one")
	}
}

// TestCPUTime: the command in /proc/PID/stat may hold spaces and parentheses.
func TestCPUTime(t *testing.T) {
	const stat = "42 (a) b (c) S 1 42 42 0 -1 4194560 100 0 0 0 150 25 0 0 20 0 5 0 1000 0 0"
	if got, err := cpuTime(stat); err != nil || got.Seconds() != 1.75 {
		t.Errorf("%v, %v", got, err)
	}
	if _, err := cpuTime("42 (a) S 1"); err == nil {
		t.Error("a short line is taken")
	}
}

// TestParseTransactions: latencies are milliseconds, times seconds with their fraction; a line that is not understood
// is an error, and not left out.
func TestParseTransactions(t *testing.T) {
	got, err := parseTransactions("0 199 2241 0 1175850568 995598\n3 1 250 0 1175850569 5\n")
	if want := []transaction{{2.241, 1175850568.995598}, {0.25, 1175850569.000005}}; err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v, want %v", got, err, want)
	}
	if got, err := parseTransactions("0 199 2241 0 1175850568\n"); err == nil {
		t.Errorf("a short line gives %v", got)
	}
}
