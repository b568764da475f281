package main

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
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
	write(fmt.Sprintf("archive_dir = %q\nhttp.listen = \"\"\n[[cluster]]\nname = \"a\"\nconninfo = \"host=%s/none user=u\"\n", dir, dir))
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

// A daemon is to be seen over HTTP from its start to its end. It does not start where it cannot listen, and a
// reload that would move it there is refused.
func TestRunIsSeenOverHTTP(t *testing.T) {
	dir, err := os.MkdirTemp("", "walfleet") // a socket's path must be short
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	file := filepath.Join(dir, "walfleet.toml")
	write := func(listen string) {
		t.Helper()
		text := fmt.Sprintf("archive_dir = %q\nhttp.listen = %q\n[[cluster]]\nname = \"a\"\nconninfo = \"host=%s/none user=u\"\n", dir, listen, dir)
		if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
			t.Fatal(err)
		}
	}
	taken, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer taken.Close()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	address := free.Addr().String()
	free.Close()

	hangup := make(chan os.Signal)
	write(taken.Addr().String())
	if err := run(t.Context(), file, hangup); err == nil || !strings.Contains(err.Error(), "[http] listen: another program has this address") {
		t.Fatalf("at a taken address: %v", err)
	}
	write(address)
	ctx, cancel := context.WithCancel(t.Context())
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- run(ctx, file, hangup) }()
	client := http.Client{Transport: &http.Transport{DisableKeepAlives: true}, Timeout: time.Minute}
	await := func(path string, status int, says string) {
		t.Helper()
		for began := time.Now(); ; {
			answer, err := client.Get("http://" + address + path)
			text := []byte{}
			if err == nil {
				text, err = io.ReadAll(answer.Body)
				answer.Body.Close()
			}
			if err == nil && answer.StatusCode == status && strings.Contains(string(text), says) {
				return
			}
			if time.Since(began) > time.Minute {
				t.Fatalf("%s: %s, %v", path, text, err)
			}
		}
	}
	await("/readyz", 200, "ok")
	await("/metrics", 200, `walfleet_connected{cluster="a"} 0`)
	write(taken.Addr().String())
	hangup <- os.Interrupt // whatever it is, it comes through this channel
	await("/readyz", 503, "[http] listen: another program has this address")
	await("/metrics", 200, "walfleet_config_last_reload_successful 0")
	write(address)
	hangup <- os.Interrupt
	await("/readyz", 200, "ok")
	cancel()
	if err := <-ended; err != nil {
		t.Error(err)
	}
	if c, err := net.Dial("tcp", address); err == nil {
		c.Close()
		t.Error("something listens after the end")
	}
}
