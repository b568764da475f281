package main

import (
	"context"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"regexp"
	"testing"
	"time"
)

// A daemon under systemd says that it is ready, that it reloads and that this has ended, a refused
// file too, and that it stops.
func TestRunTellsSystemd(t *testing.T) {
	dir, err := os.MkdirTemp("", "walfleet") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	file := filepath.Join(dir, "walfleet.toml")
	write := func(text string) {
		t.Helper()
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	write(fmt.Sprintf("archive_dir = %q\n[[cluster]]\nname = \"a\"\nconninfo = \"host=%s/none user=u\"\n", dir, dir))
	systemd, err := net.ListenUnixgram("unixgram", &net.UnixAddr{Name: filepath.Join(dir, "notify"), Net: "unixgram"})
	if err != nil {
		t.Fatal(err)
	}
	defer systemd.Close()
	if err := systemd.SetReadDeadline(time.Now().Add(time.Minute)); err != nil {
		t.Fatal(err)
	}
	t.Setenv("NOTIFY_SOCKET", filepath.Join(dir, "notify"))
	t.Setenv("WATCHDOG_USEC", "")

	// expect waits for a message; those of nothing but a status come when they come.
	expect := func(pattern string) {
		t.Helper()
		buffer := make([]byte, 4096)
		for {
			n, err := systemd.Read(buffer)
			if err != nil {
				t.Fatalf("waiting for %s: %v", pattern, err)
			}
			got := string(buffer[:n])
			if regexp.MustCompile("^(?:" + pattern + ")$").MatchString(got) {
				return
			}
			if !regexp.MustCompile(`^STATUS=1 [a-z]+$`).MatchString(got) {
				t.Fatalf("systemd was told %q, want %s", got, pattern)
			}
		}
	}
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	hangup := make(chan os.Signal)
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, file, hangup) }()
	expect(`READY=1\nSTATUS=1 [a-z]+`)
	for _, text := range []string{"", "no TOML"} {
		if text != "" {
			write(text)
		}
		hangup <- os.Interrupt // whatever it is, it comes through this channel
		expect(`RELOADING=1\nMONOTONIC_USEC=\d+`)
		expect(`READY=1`)
	}
	cancel()
	expect(`STOPPING=1\nSTATUS=stopping`)
	if err := <-ended; err != nil {
		t.Error(err)
	}
}
