//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"

	"github.com/walfleet/walfleet/internal/wal"
)

// contender is one of the two programs.
type contender string

const (
	walfleet     contender = "walfleet"
	pgReceivewal contender = "pg_receivewal"
)

// source is where a cluster's WAL comes from: a slot on a port of 127.0.0.1. Its name is the cluster's, and that of
// its directory.
type source struct {
	name string
	port int
	slot string
}

// catchUp is the command that receives from the slot into dir, with every drain of the socket synced, until it is
// past end. Both get the same arguments.
func (b *bench) catchUp(ctx context.Context, c contender, s source, dir string, end wal.LSN) *exec.Cmd {
	args := []string{"-D", dir, "-h", "127.0.0.1", "-p", strconv.Itoa(s.port), "-U", "postgres", "-w",
		"-S", s.slot, "--synchronous", "--endpos", end.String(), "--no-loop"}
	if c == walfleet {
		return command(ctx, b.walfleet, append([]string{"receivewal"}, args...)...)
	}
	return command(ctx, b.pg.Path("pg_receivewal"), args...)
}

// archivers are the commands that archive all sources below dir until they are stopped: one daemon with its default
// configuration, or one "pg_receivewal --synchronous" for each.
func (b *bench) archivers(ctx context.Context, c contender, dir string, sources ...source) ([]*exec.Cmd, error) {
	if c == walfleet {
		file := filepath.Join(dir, "walfleet.toml")
		return []*exec.Cmd{command(ctx, b.walfleet, "run", "-c", file)}, os.WriteFile(file, configuration(dir, sources), 0o600)
	}
	var cmds []*exec.Cmd
	for _, s := range sources {
		if err := os.Mkdir(filepath.Join(dir, s.name), 0o700); err != nil {
			return nil, err
		}
		cmds = append(cmds, command(ctx, b.pg.Path("pg_receivewal"), "-D", filepath.Join(dir, s.name),
			"-h", "127.0.0.1", "-p", strconv.Itoa(s.port), "-U", "postgres", "-w", "-S", s.slot, "--synchronous"))
	}
	return cmds, nil
}

// configuration is a walfleet.toml with defaults, and lines for each cluster.
func configuration(dir string, sources []source, lines ...string) []byte {
	return append(fmt.Appendf(nil, "archive_dir = %q\nhttp.listen = \"127.0.0.1:0\"\n", dir), clusters(sources, lines...)...)
}

// clusters are the sources in a walfleet.toml.
func clusters(sources []source, lines ...string) []byte {
	var b bytes.Buffer
	for _, s := range sources {
		fmt.Fprintf(&b, "[[cluster]]\nname = %q\nslot = %q\nconninfo = \"host=127.0.0.1 port=%d user=postgres sslmode=disable\"\n", s.name, s.slot, s.port)
		for _, line := range lines {
			fmt.Fprintln(&b, line)
		}
	}
	return b.Bytes()
}

// withArchive calls f with an empty directory below parent, on a disk without work left from before, and removes it.
func withArchive(parent string, f func(dir string) error) (err error) {
	dir, err := os.MkdirTemp(parent, "archive-")
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(dir)) }()
	if err := settle(dir); err != nil {
		return err
	}
	return f(dir)
}

// archiving calls f while c archives the server into a directory on the disk, once it has caught up. It connects to port:
// the server's, or that of a proxy.
func (b *bench) archiving(ctx context.Context, c contender, s *server, port int, f func() error) (err error) {
	if err := s.createSlot(ctx, "bench"); err != nil {
		return err
	}
	defer func() { err = errors.Join(err, s.dropSlot(context.WithoutCancel(ctx), "bench")) }()
	// What came before now is not the archiver's business.
	if _, err := s.sql(ctx, "SELECT pg_replication_slot_advance('bench', pg_current_wal_flush_lsn())"); err != nil {
		return err
	}
	return withArchive(b.dir, func(dir string) error {
		cmds, err := b.archivers(ctx, c, dir, source{"bench", port, "bench"})
		if err != nil {
			return err
		}
		_, err = withArchivers(cmds, func(*processes) error {
			if err := s.awaitArchivers(ctx, 1); err != nil {
				return err
			}
			return f()
		})
		return err
	})
}

// slowPairs is the most that is measured of what takes minutes.
const slowPairs = 3

// measure runs f for both contenders (or those named) in turn, a pair that is not counted and then all others, and puts the
// values that it returns into the report's table. The order changes from pair to pair.
func (b *bench) measure(ctx context.Context, t table, f func(ctx context.Context, c contender) ([]value, error), contenders ...contender) error {
	if len(contenders) == 0 {
		contenders = []contender{pgReceivewal, walfleet}
	}
	warm, pairs := 1, b.pairs
	if t.slow {
		warm, pairs = 0, min(b.pairs, slowPairs)
	}
	for pair := 1 - warm; pair <= pairs; pair++ {
		for _, c := range contenders {
			values, err := f(ctx, c)
			if err != nil {
				return fmt.Errorf("%s, %s: %w", t.title, c, err)
			}
			fmt.Fprintf(os.Stderr, "  %s, pair %d of %d, %s: %v\n", t.title, pair, pairs, c, values)
			if pair > 0 {
				t.add(c, pair, values)
			}
		}
		contenders = slices.Clone(contenders)
		slices.Reverse(contenders)
	}
	b.report.tables = append(b.report.tables, t)
	return nil
}
