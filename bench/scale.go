//go:build linux

package main

import (
	"bufio"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/walfleet/walfleet/internal/pgtest"
	"github.com/walfleet/walfleet/internal/wal"
)

const (
	scaleClusters = 500
	scaleWAL      = 64 << 10 // bytes that each cluster has
)

// scaleScenario starts and reloads a daemon with many clusters, whose servers are scripted.
func scaleScenario(ctx context.Context, b *bench) error {
	ports, stop, err := startWalsenders(ctx, scaleClusters)
	if err != nil {
		return err
	}
	var sources []source
	for i, port := range ports {
		sources = append(sources, source{fmt.Sprintf("c%03d", i), port, "walfleet"})
	}
	t := table{title: fmt.Sprintf("Start and reload of %d clusters", scaleClusters), slow: true, about: fmt.Sprintf("Each cluster is a scripted walsender, all "+
		"of them in one other process, with %d KB of WAL in segments of 1 MB. A start is from exec until the last cluster is caught up and streams: "+
		"first with no archives, which creates the slots too, then with those that are there. A reload is from SIGHUP until its end, and all that it restarted stream again. "+
		"pg_receivewal has nothing like it.", scaleWAL>>10)}
	err = b.measure(ctx, t, func(ctx context.Context, c contender) (values []value, err error) {
		err = withArchive(b.dir, func(dir string) error {
			values, err = scaleOnce(ctx, b, dir, sources)
			return err
		})
		return values, err
	}, walfleet)
	return errors.Join(err, stop())
}

func scaleOnce(ctx context.Context, b *bench, dir string, sources []source) (values []value, err error) {
	const (
		streams  = `msg="caught up, streaming"`
		reloaded = "msg=reloaded"
	)
	note := func(name, unit string, v float64) { values = append(values, value{quantity{name, unit, false}, v}) }
	// daemon starts one, and calls f once all clusters stream.
	daemon := func(name string, f func(ps *processes) error) error {
		cmds, err := b.archivers(ctx, walfleet, dir, sources...)
		if err != nil {
			return err
		}
		_, err = withArchivers(cmds, func(ps *processes) error {
			p := ps.all[0]
			if err := p.awaitText(ctx, streams, len(sources)); err != nil {
				return err
			}
			note(name, "s", time.Since(ps.started).Seconds())
			c, err := ps.cost()
			if err != nil {
				return err
			}
			note(name+", CPU", "s", c.cpu.Seconds())
			return f(ps)
		})
		return err
	}
	// reload changes the first n clusters in what a connection depends on, and reads the file anew.
	reload := func(ps *processes, name string, n int, line string) error {
		p := ps.all[0]
		reloads, starts := p.log.count(reloaded), p.log.count(streams)
		text := append(configuration(dir, sources[:n], line), clusters(sources[n:])...)
		if err := os.WriteFile(filepath.Join(dir, "walfleet.toml"), text, 0o600); err != nil {
			return err
		}
		began := time.Now()
		if err := p.cmd.Process.Signal(syscall.SIGHUP); err != nil {
			return err
		}
		if err := errors.Join(p.awaitText(ctx, reloaded, reloads+1), p.awaitText(ctx, streams, starts+n)); err != nil {
			return err
		}
		note(name, "s", time.Since(began).Seconds())
		return nil
	}
	err = daemon("first start", func(*processes) error { return nil })
	if err != nil {
		return nil, err
	}
	err = daemon("start", func(ps *processes) error {
		if err := reload(ps, "reload that changes 1 cluster", 1, `application_name = "one"`); err != nil {
			return err
		}
		if err := reload(ps, fmt.Sprintf("reload that changes %d clusters", len(sources)), len(sources), `application_name = "all"`); err != nil {
			return err
		}
		if err := pause(ctx, 10*time.Second); err != nil {
			return err
		}
		c, err := ps.cost()
		if err != nil {
			return err
		}
		note("PSS, idle for 10 s", "MB", float64(c.pss)/(1<<20))
		note("threads", "", float64(c.threads))
		note("descriptors", "", float64(c.descriptors))
		return nil
	})
	return values, err
}

// startWalsenders starts this program as n scripted servers, each on a port of its own. stop ends it.
func startWalsenders(ctx context.Context, n int) (ports []int, stop func() error, err error) {
	self, err := os.Executable()
	if err != nil {
		return nil, nil, err
	}
	cmd := command(ctx, self, walsendersMode, strconv.Itoa(n))
	cmd.Stderr = os.Stderr
	stdin, err := cmd.StdinPipe()
	if err != nil {
		return nil, nil, err
	}
	stdout, err := cmd.StdoutPipe()
	if err != nil {
		return nil, nil, err
	}
	if err := cmd.Start(); err != nil {
		return nil, nil, err
	}
	stop = func() error {
		err := errors.Join(stdin.Close(), cmd.Wait())
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return err
	}
	if err := json.NewDecoder(bufio.NewReader(stdout)).Decode(&ports); err != nil {
		return nil, nil, errors.Join(fmt.Errorf("the scripted walsenders do not start: %w", err), stop())
	}
	return ports, stop, nil
}

// walsendersMode is the argument that makes this program scripted servers.
const walsendersMode = "walsenders"

// walsenders runs n scripted servers until standard input ends. It prints their ports.
func walsenders(number string) error {
	n, err := strconv.Atoi(number)
	if err != nil {
		return err
	}
	size := wal.SegmentSize(1 << 20)
	var host serverHost
	defer host.close()
	ports := make([]int, n)
	for i := range ports {
		w := pgtest.NewWAL(pgtest.WALConfig{SystemID: uint64(i + 1), Size: size})
		begin := w.End()
		w.FillTo(begin + scaleWAL)
		s := pgtest.NewServer(&host, pgtest.State{Redo: begin})
		s.Publish(w)
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			return err
		}
		host.Cleanup(func() { _ = l.Close() })
		ports[i] = l.Addr().(*net.TCPAddr).Port
		go func() { // ends with l
			for {
				c, err := l.Accept()
				if err != nil {
					return
				}
				s.Accept(c)
			}
		}()
	}
	if err := json.NewEncoder(os.Stdout).Encode(ports); err != nil {
		return err
	}
	_, err = io.Copy(io.Discard, os.Stdin)
	return err
}

// serverHost is a process of scripted servers: what they need of a test.
type serverHost struct{ cleanups []func() }

func (h *serverHost) Cleanup(f func()) { h.cleanups = append(h.cleanups, f) }

func (h *serverHost) Errorf(format string, args ...any) {
	fmt.Fprintf(os.Stderr, format+"\n", args...)
}

func (h *serverHost) close() {
	for _, f := range h.cleanups {
		f()
	}
}
