//go:build linux

package main

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	compressClusters = 4
	compressSegments = 16 // of each cluster
)

// compressionScenario archives compressed segments of several clusters, which are slots on one server.
func compressionScenario(ctx context.Context, b *bench) (err error) {
	const segmentSize = 16 << 20
	// A segment is sealed once the record that crosses its end is there.
	s, _, _, err := b.startBehind(ctx, segmentSize, compressSegments*segmentSize+1<<20)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.stop()) }()

	for _, m := range []struct {
		name, suffix, level string
		contenders          []contender
	}{
		{"gzip", ".gz", "at level 6, which both take by default", nil},
		{"lz4", ".lz4", "at the fastest level, which both take by default", nil},
		{"zstd", ".zst", "at level 3, the default (pg_receivewal does not know zstd)", []contender{walfleet}},
	} {
		t := table{title: "Compression, " + m.name, slow: true, about: fmt.Sprintf("%d clusters, slots on one server, from empty directories until "+
			"each has %d segments of 16 MB complete and compressed, %s. One daemon with `compress = %q` against %d processes of "+
			"`pg_receivewal --compress=%s`; neither is synchronous. The CPU is that of the whole life of the processes.",
			compressClusters, compressSegments, m.level, m.name, compressClusters, m.name)}
		err := b.measure(ctx, t, func(ctx context.Context, c contender) (values []value, err error) {
			err = withArchive(b.dir, func(dir string) error {
				values, err = compressOnce(ctx, b, s, c, dir, m.name, m.suffix)
				return err
			})
			return values, err
		}, m.contenders...)
		if err != nil {
			return err
		}
	}
	return nil
}

func compressOnce(ctx context.Context, b *bench, s *server, c contender, dir, method, suffix string) (_ []value, err error) {
	var sources []source
	for i := range compressClusters {
		name := fmt.Sprintf("c%d", i)
		sources = append(sources, source{name, s.port, name})
	}
	defer func() { err = errors.Join(err, s.dropSlots(context.WithoutCancel(ctx), sources)) }()
	for _, source := range sources {
		if _, err := s.sql(ctx, fmt.Sprintf("SELECT pg_copy_physical_replication_slot('base', '%s')", source.slot)); err != nil {
			return nil, err
		}
	}
	cmds, err := b.archivers(ctx, c, dir, sources...)
	if err != nil {
		return nil, err
	}
	if c == walfleet {
		text := configuration(dir, sources, "synchronous = false", fmt.Sprintf("compress = %q", method))
		if err := os.WriteFile(filepath.Join(dir, "walfleet.toml"), text, 0o600); err != nil {
			return nil, err
		}
	} else {
		for _, cmd := range cmds {
			compressing(cmd, method)
		}
	}
	var took time.Duration
	var size int64
	u, err := withArchivers(cmds, func(ps *processes) error {
		if size, err = awaitCompressed(ctx, dir, sources, suffix); err != nil {
			return err
		}
		took = time.Since(ps.started)
		return nil
	})
	if err != nil {
		return nil, err
	}
	const segments = compressClusters * compressSegments
	return []value{
		{quantity{"segments per second", "", true}, segments / took.Seconds()},
		{quantity{"CPU per segment", "s", false}, u.cpu.Seconds() / segments},
		{quantity{"peak memory", "MB", false}, float64(u.peak) / (1 << 20)},
		{quantity{"size", "% of the WAL", false}, 100 * float64(size) / (segments * 16 << 20)},
	}, nil
}

// compressing makes a command of pg_receivewal compress.
func compressing(cmd *exec.Cmd, method string) {
	cmd.Args = append(slices.DeleteFunc(cmd.Args, func(arg string) bool { return arg == "--synchronous" }), "--compress="+method)
}

// awaitCompressed waits until every cluster has its compressed segments, ten minutes at most, and returns their size.
func awaitCompressed(ctx context.Context, dir string, sources []source, suffix string) (int64, error) {
	ctx, cancel := context.WithTimeoutCause(ctx, 10*time.Minute, errors.New("not all segments are compressed after 10 minutes"))
	defer cancel()
	for {
		missing, size := false, int64(0)
		for _, source := range sources {
			entries, err := os.ReadDir(filepath.Join(dir, source.name))
			if err != nil && !errors.Is(err, os.ErrNotExist) {
				return 0, err
			}
			n := 0
			for _, e := range entries { // in the order of names
				name, ok := strings.CutSuffix(e.Name(), suffix)
				if info, err := e.Info(); ok && len(name) == 24 && n < compressSegments && err == nil {
					n++
					size += info.Size()
				}
			}
			missing = missing || n < compressSegments
		}
		if !missing {
			return size, nil
		}
		if err := pause(ctx, 10*time.Millisecond); err != nil {
			return 0, err
		}
	}
}
