package receivewal

import (
	"bytes"
	"fmt"
	"os"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// The terminal has no room for the prompt at first. What is typed is not shown even then, since no one can tell when
// the prompt is seen.
func TestNothingIsShownFromThePromptOn(t *testing.T) {
	terminal, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Skipf("NOT TESTED: no terminal can be made here: %v", err)
	}
	defer terminal.Close()
	fd := int(terminal.Fd())
	n, err := unix.IoctlGetInt(fd, unix.TIOCGPTN)
	if err == nil {
		err = unix.IoctlSetPointerInt(fd, unix.TIOCSPTLCK, 0)
	}
	if err != nil {
		t.Fatal(err)
	}
	name := fmt.Sprintf("/dev/pts/%d", n)
	other, err := unix.Open(name, unix.O_WRONLY|unix.O_NOCTTY|unix.O_NONBLOCK, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(other)
	for err == nil {
		_, err = unix.Write(other, []byte("."))
	}
	shows := func() bool {
		termios, err := unix.IoctlGetTermios(fd, unix.TCGETS)
		if err != nil {
			t.Fatal(err)
		}
		return termios.Lflag&unix.ECHO != 0
	}
	if !shows() {
		t.Fatal("the terminal shows nothing from the start")
	}

	type answer struct {
		password string
		err      error
	}
	answered := make(chan answer, 1)
	go func() {
		password, err := askPassword(name, nil, nil)
		answered <- answer{password, err}
	}()
	for begun := time.Now(); shows(); time.Sleep(time.Millisecond) {
		if time.Since(begun) > time.Minute {
			t.Fatal("what is typed is shown")
		}
	}
	var seen []byte
	for buffer := make([]byte, 1000); !bytes.HasSuffix(seen, []byte("Password: ")); {
		n, err := terminal.Read(buffer)
		if err != nil {
			t.Fatal(err)
		}
		seen = append(seen, buffer[:n]...)
	}
	if _, err := terminal.WriteString("secret\n"); err != nil {
		t.Fatal(err)
	}
	if got := <-answered; got != (answer{"secret", nil}) {
		t.Errorf("%+v", got)
	}
	rest := make([]byte, 1000)
	if n, err := terminal.Read(rest); err != nil || string(rest[:n]) != "\r\n" {
		t.Errorf("then the terminal shows %q, %v", rest[:n], err)
	}
	if !shows() {
		t.Error("the terminal is not as it was")
	}
}
