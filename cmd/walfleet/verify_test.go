package main

import (
	"encoding/json"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/verify"
)

// An archive that is whole, one that is not, and one that is not there: what is printed, and the exit status.
func TestVerifyPrints(t *testing.T) {
	dir := t.TempDir()
	const size = 1 << 20
	w := pgtest.NewWAL(pgtest.WALConfig{SystemID: 77})
	w.FillTo(3*size + 1000)
	for _, name := range []string{"good", "bad"} {
		if err := os.Mkdir(filepath.Join(dir, name), 0o700); err != nil {
			t.Fatal(err)
		}
		for file, data := range map[string][]byte{
			"000000010000000000000001": w.Bytes(size, 2*size),
			"000000010000000000000002": w.Bytes(2*size, 3*size),
			"archive.json": []byte(`{"format": 1, "system_identifier": "77", "segment_size": 1048576,
				"origin": {"timeline": 1, "lsn": "0/100000", "source": "slot", "time": "2026-01-31T09:30:00Z"}}`),
		} {
			if name == "bad" && file == "000000010000000000000002" {
				data[8192+4] ^= 2
			}
			if err := os.WriteFile(filepath.Join(dir, name, file), data, 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	file := filepath.Join(dir, "walfleet.toml")
	config := "archive_dir = \"" + dir + "\"\n"
	for _, name := range []string{"good", "bad", "none"} {
		config += "[[cluster]]\nname = \"" + name + "\"\nconninfo = \"host=" + name + "\"\n"
	}
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	for _, c := range []struct {
		args   []string
		failed bool
		says   []string
	}{
		{[]string{"verify", "--archive", filepath.Join(dir, "good")}, false, []string{"good: whole; "}},
		{[]string{"verify", "good"}, false, []string{"good: whole; 2 segments (2.0 MB) checked in "}},
		{[]string{"verify"}, true, []string{"good: whole; ", "bad: 1 FAULT; ",
			"timeline   000000010000000000000002, offset 8192, LSN 0/202000 to 0/204000\n", "page of timeline 3", "→ ",
			"none: NOT CHECKED: ", "no such file"}},
		{[]string{"verify", "bad", "--json"}, true, []string{`"kind": "timeline"`, `"lsn": "0/202000"`, `"whole": false`}},
	} {
		out, err := execute(t, append(c.args, "-c", file)...)
		var status exitStatus
		if failed := errors.As(err, &status) && status == 1; failed != c.failed || err != nil && !failed {
			t.Errorf("walfleet %q: %v\n%s", c.args, err, out)
		}
		for _, words := range c.says {
			if !strings.Contains(out, words) {
				t.Errorf("walfleet %q lacks %q:\n%s", c.args, words, out)
			}
		}
		if _, err := os.Stat(filepath.Join(dir, "good", archive.VerifyRecord)); slices.Contains(c.args, "--archive") != errors.Is(err, fs.ErrNotExist) {
			t.Errorf("walfleet %q: the outcome is to be kept for a cluster alone: %v", c.args, err)
		}
		if c.args[len(c.args)-1] == "--json" {
			var reports []verify.Report
			if err := json.Unmarshal([]byte(out), &reports); err != nil || len(reports) != 1 {
				t.Errorf("%v: %s", err, out)
			}
		}
	}
}

// What a verification came to is kept as status shows it.
func TestVerifyIsRemembered(t *testing.T) {
	dir := t.TempDir()
	r := verify.Report{Faults: []verify.Fault{{}, {}}, Unproven: []verify.Unproven{{}}, Segments: 4, Skipped: 3, Bytes: 5, Seconds: 1.5, Error: "no"}
	if err := recordVerify(dir, r); err != nil {
		t.Fatal(err)
	}
	var kept fleet.VerifyReport
	if err := archive.ReadRecord(dir, archive.VerifyRecord, &kept); err != nil {
		t.Fatal(err)
	}
	if age := time.Since(kept.Time); age < 0 || age > time.Minute {
		t.Errorf("kept %s", kept.Time)
	}
	kept.Time = time.Time{}
	if want := (fleet.VerifyReport{Seconds: 1.5, Error: "no", Faults: 2, Unproven: 1, Segments: 4, Skipped: 3, CheckedBytes: 5}); kept != want {
		t.Errorf("%+v, want %+v", kept, want)
	}
}

// A verification of the newest segments does not take back the faults that were found in older ones.
func TestVerifyThatLeavesSegmentsOutDoesNotHideFaults(t *testing.T) {
	dir := t.TempDir()
	for _, c := range []struct {
		r    verify.Report
		want int // faults that are remembered
		ok   bool
	}{
		{verify.Report{Whole: true, Segments: 4, Skipped: 3}, 0, true},
		{verify.Report{Faults: []verify.Fault{{}, {}}, Segments: 7}, 2, true},
		{verify.Report{Whole: true, Segments: 4, Skipped: 3}, 2, false},
		{verify.Report{Faults: []verify.Fault{{}}, Segments: 4, Skipped: 3}, 1, true},
		{verify.Report{Whole: true, Segments: 7}, 0, true},
	} {
		err := recordVerify(dir, c.r)
		var kept fleet.VerifyReport
		if e := archive.ReadRecord(dir, archive.VerifyRecord, &kept); e != nil || kept.Faults != c.want || (err == nil) != c.ok {
			t.Errorf("%+v: %v; kept %+v, %v", c.r, err, kept, e)
		}
	}
}

func TestParseSince(t *testing.T) {
	now := time.Date(2026, 1, 31, 12, 0, 0, 0, time.UTC)
	for text, want := range map[string]time.Time{"36h": now.Add(-36 * time.Hour), "7d": now.Add(-7 * 24 * time.Hour), "": {}} {
		if got, from, err := parseSince(text, now); err != nil || !got.Equal(want) || from != 0 {
			t.Errorf("%q: %s, %s, %v", text, got, from, err)
		}
	}
	if got, from, err := parseSince("16/B3000000", now); err != nil || !got.IsZero() || from != 0x16B3000000 {
		t.Errorf("an LSN: %s, %s, %v", got, from, err)
	}
	for _, text := range []string{"yesterday", "-1h", "d", "1/x", "0d"} {
		if _, _, err := parseSince(text, now); err == nil {
			t.Errorf("%q passes", text)
		}
	}
}

func TestProgressText(t *testing.T) {
	if got := progressText(3<<30, 12<<30, 3*time.Second); got != "25 % of 12.0 GB, 1.0 GB/s, 9s left" {
		t.Error(got)
	}
	if got := progressText(0, 0, 0); got != "begins" {
		t.Error(got)
	}
}
