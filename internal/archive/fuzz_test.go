package archive_test

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/walfleet/walfleet/internal/archive"
)

// FuzzArchiveJSON: whatever stands in archive.json, it is refused with an error that names the file, or it makes sense
// and is understood the same way after it was written anew.
func FuzzArchiveJSON(f *testing.F) {
	const good = `{"format": 1, "system_identifier": "42", "segment_size": 1048576, "origin": {"timeline": 1, "lsn": "0/4000000", "source": "slot", "time": "2024-02-29T00:02:03Z"}`
	f.Add([]byte(good + "}"))
	f.Add([]byte(good + `, "gaps": [{"timeline": 2, "from": "0/4000007", "to": "0/4100000", "time": "2024-02-29T00:02:03Z", "reason": "\u001b"}]}`))
	f.Add([]byte(good + `, "gaps": [{"timeline": 0, "from": "0/4000008", "to": "0/4100000"}]}`))
	f.Add([]byte(good[:70]))
	f.Add([]byte(nil))
	f.Fuzz(func(t *testing.T, data []byte) {
		dir := t.TempDir()
		if err := os.WriteFile(filepath.Join(dir, "archive.json"), data, 0o600); err != nil {
			t.Fatal(err)
		}
		d, err := archive.Open(dir)
		if err != nil {
			if !errors.As(err, new(*archive.FileError)) {
				t.Fatalf("%T %v", err, err)
			}
			return
		}
		defer func() { d.Close() }()
		tli, lsn, bound := d.Origin()
		if !bound || tli == 0 || lsn%mb != 0 {
			t.Fatalf("origin: timeline %d, %s, %t", tli, lsn, bound)
		}
		gaps := d.Gaps()
		for _, g := range gaps {
			if g.Timeline == 0 || g.From >= g.To || g.To%mb != 0 {
				t.Errorf("gap: %+v", g)
			}
		}
		tail, ok, err := d.Tail(mb)
		if err != nil || ok != (len(gaps) > 0) || ok && tail.Timeline == 0 {
			t.Errorf("tail: %+v, %t, %v", tail, ok, err)
		}
		last := archive.Gap{Timeline: tli, From: 1, To: 1 << 40, Reason: "new", Time: time.Unix(5e8, 0).UTC()}
		if err := d.RecordGap(last); err != nil {
			t.Fatal(err)
		}
		d.Close()
		if d, err = archive.Open(dir); err != nil {
			t.Fatal(err)
		}
		again, lsnAgain, _ := d.Origin()
		same := func(a, b archive.Gap) bool {
			return a.Timeline == b.Timeline && a.From == b.From && a.To == b.To && a.Reason == b.Reason && a.Time.Equal(b.Time)
		}
		if again != tli || lsnAgain != lsn || !slices.EqualFunc(d.Gaps(), append(gaps, last), same) {
			t.Errorf("understood as origin %d, %s and gaps %+v, and as %d, %s and %+v after it was written",
				tli, lsn, gaps, again, lsnAgain, d.Gaps())
		}
	})
}
