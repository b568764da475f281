package verify

import (
	"fmt"
	"io"
	"strings"
	"time"
)

// Print writes the report for people. Names that could be anything are escaped.
func (r Report) Print(w io.Writer) error {
	var b strings.Builder
	name := r.Cluster
	if name == "" {
		name = r.Directory
	}
	fmt.Fprintf(&b, "%s: %s\n", name, r.verdict())
	for _, f := range r.Faults {
		fmt.Fprintf(&b, "  %-11s%s%s\n", f.Kind, file(f.File), f.place())
		fmt.Fprintf(&b, "  %-11s%s\n  %-11s→ %s\n", "", f.Text, "", f.Hint)
	}
	for _, u := range r.Unproven {
		fmt.Fprintf(&b, "  unproven   %s, %s to %s: %s\n", file(u.File), u.LSN, u.End, u.Text)
	}
	for _, p := range r.Partial {
		fmt.Fprintf(&b, "  partial    %s has complete records up to %s\n", file(p.File), p.End)
	}
	for _, c := range r.Compared {
		fmt.Fprintf(&b, "  compared   timeline %d from %s to %s: the server has the same\n", c.Timeline, c.From, c.To)
	}
	for _, n := range r.Notes {
		fmt.Fprintf(&b, "  note       %s\n", n)
	}
	for _, n := range r.NotChecked {
		fmt.Fprintf(&b, "  NOT CHECKED %s\n", n)
	}
	_, err := io.WriteString(w, b.String())
	return err
}

func (r Report) verdict() string {
	checked := fmt.Sprintf("%d segments (%s) checked in %s", r.Segments, SizeText(r.Bytes),
		time.Duration(r.Seconds*float64(time.Second)).Round(10*time.Millisecond))
	if r.Skipped > 0 {
		checked += fmt.Sprintf(", %d left out", r.Skipped)
	}
	var wrong []string
	if n := len(r.Faults); n == 1 {
		wrong = append(wrong, "1 FAULT")
	} else if n > 1 {
		wrong = append(wrong, fmt.Sprintf("%d FAULTS", n))
	}
	if len(r.NotChecked) > 0 {
		wrong = append(wrong, "INTERRUPTED")
	}
	if r.Error != "" {
		wrong = append(wrong, "NOT CHECKED: "+r.Error)
	}
	if len(wrong) == 0 {
		wrong = append(wrong, "whole")
	}
	return strings.Join(wrong, ", ") + "; " + checked
}

// place is where a fault is, if it is about a place.
func (f Fault) place() string {
	switch {
	case f.LSN == "":
		return ""
	case f.End == "":
		return fmt.Sprintf(", offset %d, LSN %s", f.Offset, f.LSN)
	}
	return fmt.Sprintf(", offset %d, LSN %s to %s", f.Offset, f.LSN, f.End)
}

// file is a file's name, escaped unless it is plain.
func file(name string) string {
	if q := fmt.Sprintf("%q", name); len(q) != len(name)+2 {
		return q
	}
	return name
}

// SizeText is a number of bytes for people.
func SizeText(n int64) string {
	size, units := float64(n), []string{"B", "kB", "MB", "GB", "TB", "PB"}
	for size >= 1024 && len(units) > 1 {
		size, units = size/1024, units[1:]
	}
	if units[0] == "B" {
		return fmt.Sprintf("%d B", n)
	}
	return fmt.Sprintf("%.1f %s", size, units[0])
}
