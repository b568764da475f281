package main

import (
	"context"
	"errors"
	"time"

	"github.com/spf13/cobra"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/archive"
	"github.com/walfleet/walfleet/internal/control"
	"github.com/walfleet/walfleet/internal/wal"
)

func newPruneCommand(g *globals) *cobra.Command {
	var o pruneOptions
	cmd := &cobra.Command{
		Use:   "prune CLUSTER",
		Short: "Remove the oldest WAL of an archive",
		Long: `prune removes the beginning of a cluster's archive: all WAL before one position, of
every timeline, so that what stays has no hole. It shows the files, the WAL, and what
can be recovered before and after; with --dry-run it shows that, and does nothing.

Give one of:
  --older-than AGE   segments that were last written to, and whose last commit was,
                     longer ago than that
  --keep-size SIZE   the oldest segments, until the files have at most that size; with
                     --older-than, whichever removes more
  --before WHAT      what comes before a segment, or before a base backup: the name of
                     a segment or a .backup file, as pg_archivecleanup takes them; or
                     the path of a backup's directory, backup_label or backup_manifest

The base backups below --backups DIR, and below [retention] backups of the
configuration, keep the WAL from where each begins on. They are told by their
backup_manifest, backup_label or base.tar (.gz, .lz4, .zst); when one cannot be read, or
none is there, nothing is removed.

Histories, archive.json, what is kept aside, and the last segment before those in
progress always stay. A running daemon does the removing, beside its archiving; when
none answers, prune does it itself, if nobody else archives into the directory. An
archive without archive.json, of pg_receivewal alone, is left to pg_archivecleanup.`,
		Example: `  walfleet prune orders --older-than 14d --dry-run
  walfleet prune orders --before /backups/orders/2026-11-01
  walfleet prune orders --keep-size 500GB --backups /backups/orders`,
		Args: func(cmd *cobra.Command, args []string) error {
			switch {
			case len(args) != 1:
				return &usageError{errors.New("prune takes one argument, the cluster's name")}
			case o.olderThan == "" && o.keepSize == "" && o.before == "":
				return &usageError{errors.New("prune needs --older-than, --keep-size or --before: what may go?")}
			case o.before != "" && (o.olderThan != "" || o.keepSize != ""):
				return &usageError{errors.New("--before names the place, and takes no --older-than or --keep-size")}
			}
			return nil
		},
		RunE: func(cmd *cobra.Command, args []string) error {
			p, err := o.run(cmd.Context(), g.configFile, args[0])
			if err != nil {
				return err
			}
			if o.asJSON {
				err = printJSON(cmd, p)
			} else {
				err = p.Write(cmd.OutOrStdout())
			}
			if err == nil && p.Error != "" {
				return exitStatus(1)
			}
			return err
		},
	}
	f := cmd.Flags()
	f.StringVar(&o.olderThan, "older-than", "", "remove WAL that is older, such as 14d or 36h")
	f.StringVar(&o.keepSize, "keep-size", "", "remove the oldest WAL beyond that size, such as 500GB")
	f.StringVar(&o.before, "before", "", "remove WAL before a segment or a base backup")
	f.StringVar(&o.backups, "backups", "", "directory of base backups, whose WAL stays")
	f.BoolVar(&o.dryRun, "dry-run", false, "show what would be removed, and remove nothing")
	f.BoolVar(&o.asJSON, "json", false, "print JSON")
	return cmd
}

type pruneOptions struct {
	olderThan, keepSize, before, backups string
	dryRun, asJSON                       bool
}

func (o pruneOptions) run(ctx context.Context, file, name string) (p fleet.Pruning, err error) {
	cfg, err := fleet.Load(file)
	if err != nil {
		return p, err
	}
	cluster, err := clusterIn(cfg, file, name)
	if err != nil {
		return p, err
	}
	keep := cluster.Retention // for its base backups
	if keep.KeepAge, err = fleet.ParseAge(orZero(o.olderThan)); err != nil {
		return p, &usageError{err}
	}
	if keep.KeepSize, err = fleet.ParseSize(orZero(o.keepSize), 1<<60); err != nil {
		return p, &usageError{err}
	}
	var backups []archive.Backup
	if o.backups != "" {
		if backups, err = archive.FindBackups(ctx, o.backups); err != nil {
			return p, err
		}
	}
	c, err := archive.ReadCatalogue(ctx, cluster.Dir)
	if err != nil {
		return p, err
	}
	rule, err := keep.Rule(ctx, name, c.Newest(time.Now()))
	if err != nil {
		return p, err
	}
	rule.Backups = append(rule.Backups, backups...)
	if o.before != "" {
		if rule.Before, err = archive.ParseBefore(o.before, c.Identity.SegmentSize); err != nil {
			return p, err
		}
	}
	p, err = fleet.PlanPruning(ctx, name, cluster.Dir, rule)
	if err != nil || o.dryRun || p.Limit == 0 {
		return p, err
	}
	p.Removed = true
	p.Files, err = prune(ctx, cfg.RuntimeDir, name, cluster.Dir, p.Limit)
	if len(p.Files) == 0 && err != nil {
		return p, err
	}
	if err != nil {
		p.Error = err.Error()
	}
	return p, nil
}

// prune has the daemon do it, or does it where there is none.
func prune(ctx context.Context, runtimeDir, name, dir string, limit wal.LSN) (removed []string, err error) {
	removed, err = control.Prune(ctx, runtimeDir, name, limit)
	if !errors.Is(err, control.ErrNoDaemon) {
		return removed, err
	}
	d, err := archive.Open(dir)
	if err != nil {
		return nil, err
	}
	removed, err = d.Prune(ctx, limit)
	return removed, errors.Join(err, d.Close())
}

func orZero(s string) string {
	if s == "" {
		return "0"
	}
	return s
}
