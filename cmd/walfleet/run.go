package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"runtime/debug"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/console"
	"github.com/walfleet/walfleet/internal/control"
	"github.com/walfleet/walfleet/internal/systemd"
)

func newRunCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "run",
		Short: "Archive the clusters of the configuration file until told to stop",
		Long: `run archives every [[cluster]] of the configuration file until it gets SIGINT
or SIGTERM. It then flushes what it has, tells the servers, and exits with 0
within shutdown_timeout; a second signal ends it at once, which loses nothing
either. A cluster that cannot be reached does not stop it: it is tried again.

SIGHUP, and "walfleet reload", read the file again. Clusters that are the same go
on untouched; when anything in the file is wrong, nothing changes and the log
says why.`,
		Args: noArgs,
		RunE: func(cmd *cobra.Command, _ []string) error {
			// After the first signal the default action is back: a second one
			// ends the process.
			ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM)
			defer stop()
			context.AfterFunc(ctx, stop)
			hangup := make(chan os.Signal, 1)
			signal.Notify(hangup, syscall.SIGHUP)
			defer signal.Stop(hangup)
			return run(ctx, g.configFile, hangup)
		},
	}
}

// run archives until ctx is done, and reloads the file at each hangup.
func run(ctx context.Context, file string, hangup <-chan os.Signal) error {
	cfg, err := fleet.Load(file)
	if err != nil {
		return err
	}
	if os.Getenv("GOGC") == "" {
		// What lives is small, and receiving makes no garbage: to collect it twice as often costs next to nothing, and
		// what a fleet's memory is counted by is the garbage between two collections.
		debug.SetGCPercent(50)
	}
	var level slog.LevelVar
	log := newLogger(cfg.Log, &level)
	d, err := fleet.NewDaemon(file, cfg, log, &level, version())
	if err != nil {
		return err
	}
	service := systemd.New(d, log)
	d.Reloading = service.Reloading
	listener, err := control.Listen(cfg.RuntimeDir)
	if err != nil {
		return err
	}
	web := console.New(d, log)
	if err := web.Follow(cfg.HTTP); err != nil {
		return errors.Join(err, listener.Close())
	}
	d.Follow = web.Follow
	var commands errgroup.Group
	commands.Go(func() error { web.Run(ctx); return nil })
	commands.Go(func() error {
		err := control.Serve(ctx, listener, d)
		if err != nil {
			log.Error("commands cannot reach this walfleet any more, archiving goes on", "error", err)
		}
		return err
	})
	commands.Go(func() error { service.Run(ctx); return nil })
	// Nobody waits for it: a reload that a file system holds for good must not hold the end.
	go func() {
		for {
			select {
			case <-ctx.Done():
				return
			case <-hangup:
				d.Reload(ctx, "")
			}
		}
	}()
	log.Info("walfleet started", "version", version(), "config", file, "clusters", len(cfg.Clusters), "archive_dir", cfg.ArchiveDir)
	err = errors.Join(d.Run(ctx), commands.Wait())
	if err == nil {
		log.Info("walfleet stopped")
	}
	return err
}

// newLogger logs to standard error, as the configuration says, from level on.
func newLogger(c fleet.LogConfig, level *slog.LevelVar) *slog.Logger {
	options := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, options))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, options))
}
