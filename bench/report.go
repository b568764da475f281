//go:build linux

package main

import (
	"bytes"
	"encoding/csv"
	"errors"
	"fmt"
	"math"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
)

// quantity is what a number means. Its name is unique in a table.
type quantity struct {
	name string
	unit string
	more bool // is better; else less is
}

func (q quantity) String() string {
	arrow := "↓"
	if q.more {
		arrow = "↑"
	}
	if q.unit != "" {
		return q.name + ", " + q.unit + " " + arrow
	}
	return q.name + " " + arrow
}

// value is one number of one run; NaN where this machine cannot tell.
type value struct {
	quantity
	v float64
}

func (v value) String() string { return fmt.Sprintf("%s %s %s", v.name, number(v.v), v.unit) }

// table is one table of the report: quantities that were measured together.
type table struct {
	title      string // unique
	about      string // what was done, and what a reader must know to judge it
	slow       bool   // a run takes so long that slowPairs are measured at most, and nothing before them
	quantities []quantity
	runs       []result
}

// result is what one contender did in one pair. Its values are in the order of the table's quantities.
type result struct {
	contender contender
	pair      int
	values    []float64
}

// report is what is written in the end.
type report struct {
	machine [][2]string // "what", "value"
	pairs   int
	filter  string
	tables  []table
}

func (t *table) add(c contender, pair int, values []value) {
	r := result{contender: c, pair: pair}
	if t.quantities == nil {
		for _, v := range values {
			t.quantities = append(t.quantities, v.quantity)
		}
	}
	for _, v := range values {
		r.values = append(r.values, v.v)
	}
	t.runs = append(t.runs, r)
}

// of are the values of quantity i that contender c had, in the order of pairs.
func (t *table) of(c contender, i int) []float64 {
	var values []float64
	for _, r := range t.runs {
		if r.contender == c {
			values = append(values, r.values[i])
		}
	}
	return values
}

// ratios divides pairwise; nil where there are no pairs, or nothing to divide by.
func ratios(a, b []float64) []float64 {
	if len(a) != len(b) {
		return nil
	}
	var quotients []float64
	for i := range a {
		q := a[i] / b[i]
		if math.IsNaN(q) || math.IsInf(q, 0) {
			return nil
		}
		quotients = append(quotients, q)
	}
	return quotients
}

// percentile is the smallest value that p of 100 values do not exceed (nearest rank); NaN of none.
func percentile(values []float64, p float64) float64 {
	if len(values) == 0 {
		return math.NaN()
	}
	sorted := slices.Sorted(slices.Values(values))
	rank := int(math.Ceil(p/100*float64(len(sorted)) - 1e-9)) // 99.9 is a little more than that in binary
	return sorted[max(rank, 1)-1]
}

// median is the middle value, or the mean of the two in the middle; NaN of none.
func median(values []float64) float64 {
	sorted := slices.Sorted(slices.Values(values))
	n := len(sorted)
	switch {
	case n == 0:
		return math.NaN()
	case n%2 == 0:
		return (sorted[n/2-1] + sorted[n/2]) / 2
	}
	return sorted[n/2]
}

// number has three significant digits, and all before the point.
func number(v float64) string {
	if math.IsNaN(v) {
		return "–"
	}
	decimals := 0
	for limit := 100.0; math.Abs(v) < limit && decimals < 3 && v != 0; limit /= 10 {
		decimals++
	}
	return strconv.FormatFloat(v, 'f', decimals, 64)
}

// markdown is the table with its text.
func (t *table) markdown() string {
	var b strings.Builder
	fmt.Fprintf(&b, "## %s\n\n%s", t.title, strings.TrimSpace(t.about))
	if t.slow {
		fmt.Fprintf(&b, " %d times at most, with none before that.", slowPairs)
	}
	b.WriteString("\n\n")
	if len(t.runs) == 0 {
		return b.String()
	}
	b.WriteString("| | pg_receivewal | walfleet | walfleet / pg_receivewal |\n|---|---:|---:|---:|\n")
	for i, q := range t.quantities {
		theirs, ours := t.of(pgReceivewal, i), t.of(walfleet, i)
		ratio := "–"
		if r := ratios(ours, theirs); r != nil {
			ratio = fmt.Sprintf("**%s** (%s … %s)", number(median(r)), number(slices.Min(r)), number(slices.Max(r)))
		}
		fmt.Fprintf(&b, "| %s | %s | %s | %s |\n", q, number(median(theirs)), number(median(ours)), ratio)
	}
	return b.String() + "\n"
}

// handwritten begins the part of benchmarks.md that stays when it is written anew.
const handwritten = "\n## What was tried\n"

// markdown is the report without its handwritten part.
func (r *report) markdown() string {
	var b strings.Builder
	repeat := "make bench"
	if r.filter != "" || r.pairs != 5 {
		repeat = fmt.Sprintf("go run ./bench -pairs %d -run '%s'", r.pairs, r.filter)
	}
	fmt.Fprintf(&b, `# Benchmarks

walfleet and pg_receivewal do the same work on the same WAL, on one machine, in turn, in one run: first a pair that
does not count, then those that do (here %d). The order within a pair changes from one to the next. Columns are medians. The
ratio is the median of those of the pairs, with the least and the greatest. ↑: more is better, ↓: less is. Every single measurement is in
[benchmarks.csv](benchmarks.csv). Servers, load and archivers share the machine.

To repeat it: `+"`%s`"+`. It needs Linux, Go, PostgreSQL 15 or later, and %d GB on a disk (`+"`go run ./bench -h`"+` for where and what).

| | |
|---|---|
`, r.pairs, repeat, diskNeeded>>30)
	for _, m := range r.machine {
		fmt.Fprintf(&b, "| %s | %s |\n", m[0], m[1])
	}
	b.WriteString("\n")
	for _, t := range r.tables {
		b.WriteString(t.markdown())
	}
	return strings.TrimRight(b.String(), "\n") + "\n"
}

// csv has one row for each measurement.
func (r *report) csv() ([]byte, error) {
	rows := [][]string{{"table", "quantity", "unit", "contender", "pair", "value"}}
	for _, t := range r.tables {
		for _, run := range t.runs {
			for i, q := range t.quantities {
				rows = append(rows, []string{t.title, q.name, q.unit, string(run.contender), strconv.Itoa(run.pair),
					strconv.FormatFloat(run.values[i], 'g', 7, 64)})
			}
		}
	}
	var b bytes.Buffer
	err := csv.NewWriter(&b).WriteAll(rows)
	return b.Bytes(), err
}

// write writes benchmarks.md and benchmarks.csv, and keeps what was written by hand.
func (r *report) write(dir string) error {
	if len(r.tables) == 0 {
		return errors.New("nothing was measured, so nothing is written")
	}
	file := filepath.Join(dir, "benchmarks.md")
	text := r.markdown()
	old, err := os.ReadFile(file)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	if _, kept, ok := strings.Cut(string(old), handwritten); ok {
		text += handwritten + kept
	}
	raw, err := r.csv()
	if err != nil {
		return err
	}
	return errors.Join(os.WriteFile(file, []byte(text), 0o644), os.WriteFile(filepath.Join(dir, "benchmarks.csv"), raw, 0o644))
}
