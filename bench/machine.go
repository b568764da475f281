//go:build linux

package main

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"time"
)

// machine is what a reader must know of the machine and the versions.
func machine(ctx context.Context, b *bench) ([][2]string, error) {
	cpuinfo, err := os.ReadFile("/proc/cpuinfo")
	if err != nil {
		return nil, err
	}
	meminfo, err := os.ReadFile("/proc/meminfo")
	if err != nil {
		return nil, err
	}
	kernel, err := os.ReadFile("/proc/sys/kernel/osrelease")
	if err != nil {
		return nil, err
	}
	fs, err := fileSystemOf(b.dir)
	if err != nil {
		return nil, err
	}
	return [][2]string{
		{"date", time.Now().UTC().Format(time.DateOnly)},
		{"walfleet", commit(ctx)},
		{"pg_receivewal and servers", "PostgreSQL " + b.pg.Version},
		{"Go", runtime.Version()},
		{"processors", fmt.Sprintf("%d, %s", runtime.NumCPU(), field(string(cpuinfo), "model name"))},
		{"memory", fmt.Sprintf("%d GB", (kilobytes(meminfo, "MemTotal:")+1<<29)>>30)},
		{"kernel", strings.TrimSpace(string(kernel))},
		{"disk", disk(ctx, b.dir, fs)},
	}, nil
}

// field is the value of the first line "key : value"; "unknown" where there is none.
func field(text, key string) string {
	for line := range strings.Lines(text) {
		if k, v, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(k) == key {
			return strings.TrimSpace(v)
		}
	}
	return "unknown"
}

// commit is that of the working tree, with a "+" where it has changes.
func commit(ctx context.Context) string {
	out, err := exec.CommandContext(ctx, "git", "describe", "--always", "--abbrev=12", "--dirty=+").Output()
	if err != nil {
		return "unknown commit"
	}
	return "commit " + strings.TrimSpace(string(out))
}

// disk names the device of dir, as far as the kernel does.
func disk(ctx context.Context, dir string, fs fileSystem) string {
	text := "unknown file system"
	if out, err := exec.CommandContext(ctx, "findmnt", "-no", "FSTYPE", "-T", dir).Output(); err == nil {
		text = strings.TrimSpace(string(out))
	}
	sys, err := filepath.EvalSymlinks("/sys/dev/block/" + fs.device)
	if err != nil {
		return text
	}
	text += " on " + filepath.Base(sys)
	if model, err := os.ReadFile(filepath.Join(sys, "device/model")); err == nil {
		text += ", " + strings.TrimSpace(string(model))
	}
	return text
}
