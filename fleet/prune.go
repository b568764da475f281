package fleet

import (
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"strings"

	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/wal"
)

// Pruning is what a prune of a cluster's archive removes, or has removed.
type Pruning struct {
	Cluster   string         `json:"cluster"`
	Directory string         `json:"directory"`
	Removed   bool           `json:"removed"`            // it was done; false: this is what would be
	Error     string         `json:"error,omitempty"`    // why not all of it was done
	FromLSN   string         `json:"from_lsn,omitempty"` // of the WAL that goes, inclusive
	ToLSN     string         `json:"to_lsn,omitempty"`   // exclusive: where the archive begins afterwards; "": nothing goes
	Segments  int            `json:"segments"`           // of which files go, each counted once
	Bytes     int64          `json:"bytes"`              // of these files, as they are stored
	Files     []string       `json:"files"`              // oldest first
	Held      []string       `json:"held"`               // what kept WAL that would go otherwise
	Before    []WindowReport `json:"recoverable_before"`
	After     []WindowReport `json:"recoverable_after"`
	Limit     wal.LSN        `json:"-"`
}

// PlanPruning finds out what a rule removes from a cluster's archive, and what can be
// recovered before and after that. It changes nothing.
func PlanPruning(ctx context.Context, cluster, dir string, rule archive.PruneRule) (Pruning, error) {
	for attempt := 1; ; attempt++ {
		p, err := planPruning(ctx, cluster, dir, rule)
		if err == nil || !errors.Is(err, fs.ErrNotExist) || attempt == 5 || ctx.Err() != nil { // a segment was sealed or pruned meanwhile
			return p, err
		}
	}
}

func planPruning(ctx context.Context, cluster, dir string, rule archive.PruneRule) (p Pruning, err error) {
	c, err := archive.ReadCatalogue(ctx, dir)
	if err != nil {
		return p, err
	}
	plan, err := c.PlanPrune(ctx, rule)
	if err != nil {
		return p, err
	}
	p = Pruning{Cluster: cluster, Directory: dir, ToLSN: lsn(plan.Limit), Files: []string{}, Held: append([]string{}, plan.Held...), Limit: plan.Limit}
	for i, f := range plan.Files {
		p.Files = append(p.Files, f.File)
		p.Bytes += f.Bytes
		if i == 0 || f.Segment != plan.Files[i-1].Segment {
			p.Segments++
		}
	}
	if len(plan.Files) > 0 {
		p.FromLSN = plan.Files[0].Start.String()
	}
	histories, problems := c.ReadHistories()
	if p.Before, err = windows(ctx, c, c.Lineage(histories, problems)); errors.Is(err, fs.ErrNotExist) {
		return p, err
	}
	after := c.Without(plan)
	if p.After, err = windows(ctx, after, after.Lineage(histories, problems)); errors.Is(err, fs.ErrNotExist) {
		return p, err
	}
	return p, nil
}

// Write writes it for people.
func (p Pruning) Write(w io.Writer) error {
	var b strings.Builder
	verb := "would be removed"
	if p.Removed {
		verb = "removed"
	}
	for _, name := range p.Files {
		fmt.Fprintf(&b, "%s: %s\n", verb, name)
	}
	if len(p.Files) == 0 {
		fmt.Fprintf(&b, "%s: nothing to remove\n", p.Cluster)
	} else {
		fmt.Fprintf(&b, "%s: WAL from %s to %s %s: %d segments in %d files, %s\n", p.Cluster, p.FromLSN, p.ToLSN, verb, p.Segments, len(p.Files), BytesText(p.Bytes))
	}
	for _, held := range p.Held {
		fmt.Fprintf(&b, "held: %s\n", oneLine(held))
	}
	if p.Error != "" {
		fmt.Fprintf(&b, "NOT ALL WAS REMOVED: %s\n", oneLine(p.Error))
	}
	b.WriteString("\nWhat could be recovered before, with a base backup that begins there or later:\n")
	writeWindows(&b, p.Before)
	if len(p.Files) > 0 {
		b.WriteString("\nAnd after:\n")
		writeWindows(&b, p.After)
	}
	_, err := io.WriteString(w, b.String())
	return err
}
