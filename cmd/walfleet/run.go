package main

import (
	"context"
	"errors"
	"log/slog"
	"os"
	"os/signal"
	"syscall"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"

	"github.com/walfleet/walfleet/fleet"
	"github.com/walfleet/walfleet/internal/control"
)

func newRunCommand(g *globals) *cobra.Command {
	return &cobra.Command{
		Use:   "run",
		Short: "Archive the clusters of the configuration file until told to stop",
		Long: `run archives every [[cluster]] of the configuration file until it gets SIGINT
or SIGTERM. It then flushes what it has, tells the servers, and exits with 0
within shutdown_timeout; a second signal ends it at once, which loses nothing
either. A cluster that cannot be reached does not stop it: it is tried again.

SIGHUP reads the file again. Clusters that are the same go on untouched; when
anything in the file is wrong, nothing changes and the log says why.`,
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
	var level slog.LevelVar
	log := newLogger(cfg.Log, &level)
	f := fleet.New(cfg, log)
	listener, err := control.Listen(cfg.RuntimeDir)
	if err != nil {
		// Archiving comes first: a full disk may be why.
		log.Error("commands such as accept-gap cannot reach this walfleet", "error", err)
	}
	ended := make(chan error, 1)
	go func() {
		var group errgroup.Group
		if listener != nil {
			group.Go(func() error { return control.Serve(ctx, listener, f) })
		}
		ended <- errors.Join(f.Run(ctx), group.Wait())
	}()
	log.Info("walfleet started", "version", version(), "config", file, "clusters", len(cfg.Clusters), "archive_dir", cfg.ArchiveDir)
	for {
		select {
		case err := <-ended:
			if err == nil {
				log.Info("walfleet stopped")
			}
			return err
		case <-hangup:
			reload(ctx, f, file, cfg.RuntimeDir, log, &level)
		}
	}
}

func reload(ctx context.Context, f *fleet.Fleet, file, runtimeDir string, log *slog.Logger, level *slog.LevelVar) {
	cfg, err := fleet.Load(file)
	if err != nil {
		log.Error("reload refused, nothing changed", "config", file, "error", err)
		return
	}
	plan, err := f.Reload(ctx, cfg)
	if err != nil {
		log.Error("reload incomplete", "config", file, "done", plan.String(), "error", err)
		return
	}
	setLevel(level, cfg.Log.Level)
	if cfg.RuntimeDir != runtimeDir {
		log.Warn("runtime_dir changes with the next start alone", "runtime_dir", cfg.RuntimeDir, "in_use", runtimeDir)
	}
	log.Info("reloaded", "config", file, "done", plan.String())
}

// newLogger logs to standard error, as the configuration says.
func newLogger(c fleet.LogConfig, level *slog.LevelVar) *slog.Logger {
	setLevel(level, c.Level)
	options := &slog.HandlerOptions{Level: level}
	if c.Format == "json" {
		return slog.New(slog.NewJSONHandler(os.Stderr, options))
	}
	return slog.New(slog.NewTextHandler(os.Stderr, options))
}

func setLevel(v *slog.LevelVar, name string) {
	_ = v.UnmarshalText([]byte(name)) // validated with the file
}
