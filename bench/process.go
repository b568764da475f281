//go:build linux

package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// processes are archivers that run at the same time.
type processes struct {
	all     []*process
	started time.Time
}

// process is one of them.
type process struct {
	cmd  *exec.Cmd
	log  output
	done chan struct{}
	err  error // how it ended, set before done is closed
	peak int64 // VmHWM in bytes, set before done is closed
}

// output is what a process has printed so far.
type output struct {
	mu   sync.Mutex
	text []byte
}

func (o *output) Write(p []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	o.text = append(o.text, p...)
	return len(p), nil
}

// count is how often text stands there.
func (o *output) count(text string) int {
	o.mu.Lock()
	defer o.mu.Unlock()
	return bytes.Count(o.text, []byte(text))
}

// last are the last n lines.
func (o *output) last(n int) string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return lastLines(o.text, n)
}

// awaitText waits until the process has printed text n times, two minutes at most.
func (p *process) awaitText(ctx context.Context, text string, n int) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 2*time.Minute, errors.New("not within two minutes"))
	defer cancel()
	for p.log.count(text) < n {
		if err := pause(ctx, time.Millisecond); err != nil {
			return fmt.Errorf("%s printed %q %d times, not %d: %w\n%s", p.cmd.Path, text, p.log.count(text), n, err, p.log.last(5))
		}
	}
	return nil
}

// usage is what processes took in their life.
type usage struct {
	wall time.Duration // from the first start to the last end
	cpu  time.Duration // of all, user and system
	peak int64         // bytes; of several processes the sum of each one's
}

// start starts commands of this program. wait or stop follows.
func start(cmds ...*exec.Cmd) (*processes, error) {
	ps := &processes{started: time.Now()}
	for _, cmd := range cmds {
		p := &process{cmd: cmd, done: make(chan struct{})}
		cmd.Stdout, cmd.Stderr = &p.log, &p.log
		if err := cmd.Start(); err != nil {
			_, stopErr := ps.stop()
			return nil, errors.Join(err, stopErr)
		}
		sampled := make(chan int64, 1)
		exited := make(chan struct{})
		go func() { sampled <- watchPeak(cmd.Process.Pid, exited) }()
		go func() {
			p.err = cmd.Wait()
			close(exited)
			p.peak = <-sampled
			close(p.done)
		}()
		ps.all = append(ps.all, p)
	}
	return ps, nil
}

// wait waits until all have ended by themselves and with status 0.
func (ps *processes) wait() (usage, error) {
	var errs []error
	for _, p := range ps.all {
		<-p.done
		if p.err != nil {
			errs = append(errs, p.failure())
		}
	}
	return ps.usage(), errors.Join(errs...)
}

// stop ends all with SIGTERM, and returns when they have ended. One that had ended before is an error.
func (ps *processes) stop() (usage, error) {
	var errs []error
	for _, p := range ps.all {
		select {
		case <-p.done:
			errs = append(errs, fmt.Errorf("ended too early: %w", p.failure()))
		default:
			_ = p.cmd.Process.Signal(syscall.SIGTERM)
		}
	}
	for _, p := range ps.all {
		select {
		case <-p.done:
		case <-time.After(30 * time.Second):
			errs = append(errs, fmt.Errorf("%s did not end by SIGTERM", p.cmd.Path))
			_ = p.cmd.Process.Kill()
			<-p.done
		}
	}
	return ps.usage(), errors.Join(errs...)
}

func (p *process) failure() error {
	return fmt.Errorf("%s: %v\n%s", strings.Join(p.cmd.Args, " "), p.err, p.log.last(5))
}

// usage of processes that have ended.
func (ps *processes) usage() usage {
	u := usage{wall: time.Since(ps.started)}
	for _, p := range ps.all {
		u.cpu += p.cmd.ProcessState.UserTime() + p.cmd.ProcessState.SystemTime()
		u.peak += p.peak
	}
	return u
}

// withArchivers calls f while the commands run, and ends them.
func withArchivers(cmds []*exec.Cmd, f func(ps *processes) error) (u usage, err error) {
	ps, err := start(cmds...)
	if err != nil {
		return usage{}, err
	}
	defer func() {
		var stopErr error
		u, stopErr = ps.stop()
		err = errors.Join(err, stopErr)
	}()
	return usage{}, f(ps)
}

// watchPeak reads VmHWM, the peak of a process's memory, until it has exited. ru_maxrss would not do: it begins
// with that of the program which forked.
func watchPeak(pid int, exited <-chan struct{}) int64 {
	var peak int64
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		status, _ := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid)) // empty at its end
		peak = max(peak, kilobytes(status, "VmHWM:"))
		select {
		case <-exited:
			return peak
		case <-tick.C:
		}
	}
}

// kilobytes is the value of a line "key   N kB" of a file in /proc, in bytes; 0 where there is none.
func kilobytes(file []byte, key string) int64 {
	for line := range strings.Lines(string(file)) {
		if fields := strings.Fields(line); len(fields) == 3 && fields[0] == key {
			n, _ := strconv.ParseInt(fields[1], 10, 64)
			return n << 10
		}
	}
	return 0
}

// cost is what running processes hold together, and the CPU time that they have taken so far.
type cost struct {
	pss         int64 // proportional memory in bytes: a page that n processes share counts 1/n in each
	threads     int
	descriptors int
	cpu         time.Duration
}

// cost looks at all processes now.
func (ps *processes) cost() (cost, error) {
	var sum cost
	for _, p := range ps.all {
		proc := fmt.Sprintf("/proc/%d/", p.cmd.Process.Pid)
		rollup, err1 := os.ReadFile(proc + "smaps_rollup")
		threads, err2 := os.ReadDir(proc + "task")
		descriptors, err3 := os.ReadDir(proc + "fd")
		stat, err4 := os.ReadFile(proc + "stat")
		if err := errors.Join(err1, err2, err3, err4); err != nil {
			return cost{}, err
		}
		sum.pss += kilobytes(rollup, "Pss:")
		sum.threads += len(threads)
		sum.descriptors += len(descriptors)
		cpu, err := cpuTime(string(stat))
		if err != nil {
			return cost{}, err
		}
		sum.cpu += cpu
	}
	return sum, nil
}

// cpuTime reads utime and stime from /proc/PID/stat (proc(5)), fields 14 and 15, in ticks of 10 ms. The second field is
// the command in parentheses, and may hold anything.
func cpuTime(stat string) (time.Duration, error) {
	fields := strings.Fields(stat[strings.LastIndexByte(stat, ')')+1:])
	if len(fields) < 13 {
		return 0, fmt.Errorf("/proc/PID/stat: %q", stat)
	}
	user, err1 := strconv.ParseInt(fields[11], 10, 64)
	system, err2 := strconv.ParseInt(fields[12], 10, 64)
	return time.Duration(user+system) * 10 * time.Millisecond, errors.Join(err1, err2)
}

// pause waits for d or the end of ctx.
func pause(ctx context.Context, d time.Duration) error {
	select {
	case <-ctx.Done():
		return context.Cause(ctx)
	case <-time.After(d):
		return nil
	}
}
