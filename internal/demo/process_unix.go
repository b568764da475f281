//go:build unix

package demo

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/walfleet/walfleet/internal/postgres"
)

// process is a server that is a child process.
type process struct {
	primary
	bin   postgres.Installation
	owner *postgres.Owner // nil: this process's own user

	cmd    *exec.Cmd     // nil before the first start
	exited chan struct{} // closed when the postmaster has ended
}

func newProcess(p primary, bin postgres.Installation, o *postgres.Owner) *process {
	return &process{primary: p, bin: bin, owner: o}
}

// ownGroup keeps the terminal's Ctrl-C from a child: this process decides when
// it ends.
func ownGroup(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
}

// command runs a program of the installation as the servers' user.
func (p *process) command(program string, args ...string) *exec.Cmd {
	cmd := exec.Command(p.bin.Path(program), args...)
	cmd.Env = p.environment()
	cmd.Dir = p.dir // the servers' user may not be allowed in ours
	ownGroup(cmd)
	cmd.SysProcAttr.Credential = p.owner.Credential()
	return cmd
}

func (p *process) data() string    { return filepath.Join(p.dir, "data") }
func (p *process) logFile() string { return filepath.Join(p.dir, "server.log") }

func (p *process) start(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if p.cmd == nil {
		if err := p.initdb(ctx); err != nil {
			return fmt.Errorf("%s: initdb: %w", p.name, err)
		}
	}
	log, err := os.OpenFile(p.logFile(), os.O_CREATE|os.O_APPEND|os.O_WRONLY, 0o600)
	if err != nil {
		return err
	}
	defer func() { _ = log.Close() }() // the child has its own descriptor
	cmd := p.command("postgres", append(p.flags(),
		"-D", p.data(), "-p", strconv.Itoa(p.port), "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories=")...)
	cmd.Stdout, cmd.Stderr = log, log
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("%s: %w", p.name, err)
	}
	exited := make(chan struct{})
	go func() {
		_ = cmd.Wait() // how it ended stands in its log
		close(exited)
	}()
	p.cmd, p.exited = cmd, exited
	if err := awaitConnections(ctx, p, exited); err != nil {
		return fmt.Errorf("%s: starting the server: %w; its log ends with:\n%s", p.name, err, lastLines(p.logFile(), 10))
	}
	return nil
}

// initdb creates the data directory, unsynced: the demo does not survive a
// power failure.
func (p *process) initdb(ctx context.Context) error {
	if err := p.owner.Give(p.dir); err != nil {
		return err
	}
	password := filepath.Join(p.dir, "password")
	if err := os.WriteFile(password, []byte(p.password+"\n"), 0o600); err != nil {
		return err
	}
	defer func() { _ = os.Remove(password) }()
	if err := p.owner.Give(password); err != nil {
		return err
	}
	cmd := p.command("initdb",
		"-D", p.data(), "-U", "postgres", "--auth=scram-sha-256", "--pwfile="+password, "--no-sync",
		"--encoding=UTF8", "--locale=C", "--wal-segsize="+strconv.Itoa(int(p.size)>>20))
	var out tail
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		return err
	}
	stop := context.AfterFunc(ctx, func() { _ = killTree(cmd.Process.Pid) })
	defer stop()
	if err := cmd.Wait(); err != nil {
		if ctx.Err() != nil {
			return context.Cause(ctx)
		}
		return fmt.Errorf("%w: %s", err, strings.TrimSpace(out.String()))
	}
	segments, err := filepath.Glob(filepath.Join(p.data(), "pg_wal", "*[0-9A-F]"))
	if err != nil {
		return err
	}
	for _, file := range segments {
		if err := makeHole(file); err != nil {
			return err
		}
	}
	return nil
}

// makeHole turns the zeros at the end of a file into a hole. initdb fills the
// first segment with them, and 1 GB that is not on disk yet need not get there.
func makeHole(file string) (err error) {
	f, err := os.OpenFile(file, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, f.Close()) }()
	var size, used int64 // used: the end of the last chunk that is not all zero
	for chunk, zero := make([]byte, 1<<20), make([]byte, 1<<20); ; {
		n, err := f.Read(chunk)
		if errors.Is(err, io.EOF) {
			break
		}
		if err != nil {
			return err
		}
		size += int64(n)
		if !bytes.Equal(chunk[:n], zero[:n]) {
			used = size
		}
	}
	if err := f.Truncate(used); err != nil {
		return err
	}
	return f.Truncate(size)
}

func (p *process) running() bool {
	if p.cmd == nil {
		return false
	}
	select {
	case <-p.exited:
		return false
	default:
		return true
	}
}

func (p *process) kill(ctx context.Context) error {
	if !p.running() {
		return nil
	}
	killed := killTree(p.cmd.Process.Pid)
	select {
	case <-p.exited:
	case <-ctx.Done():
		return context.Cause(ctx)
	}
	// The next postmaster refuses to start while a process of this one is
	// attached to its shared memory.
	for slices.ContainsFunc(killed, alive) {
		select {
		case <-ctx.Done():
			return context.Cause(ctx)
		case <-time.After(5 * time.Millisecond):
		}
	}
	return nil
}

// killTree sends SIGKILL to pid, a child of ours, and to its children, which
// it returns. A signal to the process group would miss them: each process of
// a server leads a group of its own (InitPostmasterChild in miscinit.c). The
// parent is stopped first, so that it neither forks nor reaps: no child is
// missed, and no other process can have got a child's pid.
func killTree(pid int) []int {
	_ = syscall.Kill(pid, syscall.SIGSTOP)
	pids := children(pid)
	for _, child := range pids {
		_ = syscall.Kill(child, syscall.SIGKILL)
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
	return pids
}

// children lists the child processes of pid.
func children(pid int) []int {
	var pids []int
	for _, p := range processes() {
		if p.parent == pid {
			pids = append(pids, p.pid)
		}
	}
	return pids
}

// alive tells whether pid is a process, and not a zombie: that one holds
// nothing, and stays where no init reaps it.
func alive(pid int) bool {
	if syscall.Kill(pid, 0) != nil {
		return false
	}
	return slices.ContainsFunc(processes(), func(p processState) bool { return p.pid == pid && p.state[0] != 'Z' })
}

// processState is a line of ps: state begins with Z for a zombie.
type processState struct {
	pid, parent int
	state       string
}

// processes lists all processes of the system: from /proc, since ps is not
// everywhere where that is, else from ps.
func processes() []processState {
	var lines []string
	stats, _ := filepath.Glob("/proc/[0-9]*/stat") // the pattern is well formed
	for _, file := range stats {
		// "pid (command) state ppid ..." (proc(5)); the command may hold anything.
		stat, err := os.ReadFile(file)
		if err != nil {
			continue // it has ended
		}
		pid, rest, _ := strings.Cut(string(stat), " ")
		fields := strings.Fields(rest[strings.LastIndexByte(rest, ')')+1:])
		if len(fields) >= 2 {
			lines = append(lines, pid+" "+fields[1]+" "+fields[0])
		}
	}
	if len(stats) == 0 {
		out, err := exec.Command("ps", "-A", "-o", "pid=,ppid=,stat=").Output()
		if err != nil {
			return nil
		}
		lines = strings.Split(string(out), "\n")
	}
	var all []processState
	for _, line := range lines {
		var p processState
		if _, err := fmt.Sscan(line, &p.pid, &p.parent, &p.state); err == nil {
			all = append(all, p)
		}
	}
	return all
}

// stop is PostgreSQL's immediate shutdown: no checkpoint, which would write
// what nobody reads.
func (p *process) stop(ctx context.Context) error {
	if !p.running() {
		return nil
	}
	_ = p.cmd.Process.Signal(syscall.SIGQUIT)
	select {
	case <-p.exited:
		return nil
	case <-ctx.Done():
		return fmt.Errorf("%s: stopping the server: %w", p.name, context.Cause(ctx))
	}
}

func (p *process) remove() error {
	ctx, cancel := context.WithTimeout(context.Background(), stopTimeout)
	defer cancel()
	return p.kill(ctx)
}

func (p *process) psql(ctx context.Context) *exec.Cmd {
	cmd := exec.CommandContext(ctx, p.bin.Path("psql"), psqlArgs(p.port)...)
	cmd.Env = p.environment()
	return cmd
}

func (p *process) openWAL(_ context.Context, name string) (io.ReadCloser, error) {
	return os.Open(filepath.Join(p.data(), "pg_wal", name))
}
