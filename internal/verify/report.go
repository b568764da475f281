// Package verify tells whether an archive is whole: it reads every byte of every segment, and compares files, pages,
// records, timelines and gaps with each other. It neither locks nor changes the archive, which may change meanwhile.
// docs/recovery.md says what it proves and what it cannot.
package verify

import (
	"cmp"
	"maps"
	"slices"
	"strings"
	"time"

	"github.com/walfleet/walfleet/internal/wal"
)

// Kind is what is wrong, in a word. There are no others than these.
type Kind string

const (
	// In a segment's WAL; wal.CorruptKind has the same words.
	Page     Kind = "page"     // a page's header
	Identity Kind = "identity" // a segment's header, of another cluster
	Timeline Kind = "timeline" // a page or a segment of a timeline that it cannot be of
	Record   Kind = "record"   // a record's header, or its link to the record before
	Checksum Kind = "checksum" // a record's CRC-32C
	Zeros    Kind = "zeros"    // bytes that servers leave zero

	// Of a file.
	Name       Kind = "name"       // one that nothing here has
	Size       Kind = "size"       // not a segment's
	Unreadable Kind = "unreadable" // the system does not give it
	Compressed Kind = "compressed" // it cannot be decompressed to its end
	Duplicate  Kind = "duplicate"  // two files of a segment differ

	// Between files.
	Missing  Kind = "missing"  // segments, and no gap is recorded
	Gap      Kind = "gap"      // WAL where a gap is recorded
	Partial  Kind = "partial"  // a segment is not complete, and later ones are
	History  Kind = "history"  // a timeline's history is missing, makes no sense, or contradicts another
	Metadata Kind = "metadata" // archive.json
	Aside    Kind = "aside"    // what was kept aside is not as archive.json says

	Differs Kind = "differs" // from what the server has
)

// hints say what a kind of fault means, and what to do.
var hints = map[Kind]string{
	Page:       damaged,
	Record:     damaged,
	Checksum:   damaged,
	Zeros:      "recovery does not read these bytes, but something changed them after the server wrote them, or a server's crash left them: distrust the disk",
	Identity:   "the file is another cluster's, or its header is damaged: move it away, and bring back the right one",
	Timeline:   "recovery would follow the wrong WAL: find out who put this file there, and bring back the right one",
	Name:       "nothing reads it, and nothing of walfleet's writes it: find out who put it there, and move it away",
	Size:       damaged,
	Unreadable: "its bytes are not known to be right until it can be read: look at the permissions, and at the system's log for errors of the disk",
	Compressed: damaged,
	Duplicate:  "one of the two is wrong, and which one recovery gets is chance: keep the one without faults",
	Missing:    "no recovery can pass: bring the segments back from a copy, or take a base backup at once",
	Gap:        "archive.json says that this WAL is missing: restore-wal will not serve it; find out who put it there",
	Partial:    "recovery stops here: its WAL may be complete, see \"Is it whole\" in docs/recovery.md",
	History:    "recovery along this timeline fails or goes astray: fetch the file from a server's pg_wal",
	Metadata:   "gaps, and where the archive began, are not known: restore the file from a copy",
	Aside:      "nothing that is recovered needs it",
	Differs:    "either the archive or the server is damaged, or the server is not the one that was archived: find out before anything is recovered",
}

const damaged = "recovery stops here: bring the file back from a copy, or move it away if the server still has this WAL, else take a base backup at once"

// Fault is something that is not as it must be.
type Fault struct {
	File   string `json:"file"`
	Offset int64  `json:"offset"`            // in the segment's WAL, which in a compressed file is not the file's
	LSN    string `json:"lsn,omitempty"`     // "": it is not about a place in the WAL
	End    string `json:"end_lsn,omitempty"` // exclusive; what lies between was not checked any further
	Kind   Kind   `json:"kind"`
	Text   string `json:"text"`
	Hint   string `json:"hint"` // what it means, and what to do

	at, end wal.LSN
}

// Unproven is WAL that nothing can vouch for, and nothing speaks against.
type Unproven struct {
	File string `json:"file"`
	LSN  string `json:"lsn"`
	End  string `json:"end_lsn"` // exclusive
	Text string `json:"text"`

	at wal.LSN
}

// PartialFile is a segment in progress, or left by a change of timeline.
type PartialFile struct {
	File string `json:"file"`
	End  string `json:"end_lsn"` // exclusive end of its complete records
}

// Report is what was found out about one archive.
type Report struct {
	Cluster   string `json:"cluster,omitempty"`
	Directory string `json:"directory"`
	Whole     bool   `json:"whole"` // everything was checked that was to be, and there is no fault
	Error     string `json:"error,omitempty"`

	Faults     []Fault       `json:"faults"`
	Unproven   []Unproven    `json:"unproven"`
	Partial    []PartialFile `json:"partial"`
	Notes      []string      `json:"notes"`
	NotChecked []string      `json:"not_checked"` // what an interruption kept from being checked
	Compared   []Compared    `json:"compared,omitempty"`

	Segments int     `json:"segments"`      // that were checked
	Skipped  int     `json:"skipped"`       // that were not to be checked (since), or had been before (resume)
	Bytes    int64   `json:"checked_bytes"` // of WAL
	Seconds  float64 `json:"seconds"`
}

// Compared is WAL that is the same in the archive and on a server.
type Compared struct {
	Timeline wal.Timeline `json:"timeline"`
	From     string       `json:"from_lsn"`
	To       string       `json:"to_lsn"` // exclusive
}

// finish sorts what was found, and makes up the verdict.
func (r *Report) finish(begin time.Time) {
	slices.SortStableFunc(r.Faults, func(a, b Fault) int {
		return cmp.Or(cmp.Compare(a.at, b.at), strings.Compare(a.File, b.File), strings.Compare(string(a.Kind), string(b.Kind)))
	})
	for i := range r.Faults {
		f := &r.Faults[i]
		f.Hint = hints[f.Kind]
		f.LSN, f.End = lsnText(f.at), lsnText(f.end)
	}
	slices.SortFunc(r.Unproven, func(a, b Unproven) int { return cmp.Or(cmp.Compare(a.at, b.at), strings.Compare(a.File, b.File)) })
	slices.SortFunc(r.Partial, func(a, b PartialFile) int { return strings.Compare(a.File, b.File) })
	r.Whole = r.Error == "" && len(r.Faults) == 0 && len(r.NotChecked) == 0
	r.Seconds = time.Since(begin).Seconds()
}

func lsnText(l wal.LSN) string {
	if l == 0 {
		return ""
	}
	return l.String()
}

// Kinds lists all kinds of faults, sorted.
func Kinds() []Kind { return slices.Sorted(maps.Keys(hints)) }
