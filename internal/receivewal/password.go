package receivewal

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/term"
)

// askPassword asks for a password on a terminal, without showing it. Where that
// cannot be opened it comes from in, as a line, as with PostgreSQL's programs.
func askPassword(terminal string, in io.Reader, out io.Writer) (string, error) {
	const prompt = "Password: "
	tty, err := os.OpenFile(terminal, os.O_RDWR, 0)
	if err != nil {
		fmt.Fprint(out, prompt)
		line, err := bufio.NewReader(in).ReadString('\n')
		fmt.Fprintln(out)
		if err != nil && err != io.EOF {
			return "", fmt.Errorf("reading a password: %w", err)
		}
		return strings.TrimRight(line, "\r\n"), nil
	}
	defer tty.Close()
	fd := int(tty.Fd())
	defer restoreOnSignal(fd)()
	shown, rawErr := term.MakeRaw(fd) // whoever sees the prompt may type already
	fmt.Fprint(tty, prompt)
	password, err := term.ReadPassword(fd)
	if rawErr == nil {
		err = errors.Join(err, term.Restore(fd, shown))
	}
	fmt.Fprintln(tty)
	if err != nil {
		return "", fmt.Errorf("reading a password: %w", err)
	}
	return string(password), nil
}

// restoreOnSignal makes a signal that ends the program leave the terminal as it is
// now; stop ends that.
func restoreOnSignal(fd int) (stop func()) {
	state, err := term.GetState(fd)
	if err != nil {
		return func() {}
	}
	signals := make(chan os.Signal, 1)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM)
	done, ended := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(ended)
		select {
		case s := <-signals:
			_ = term.Restore(fd, state)
			signal.Reset(syscall.SIGINT, syscall.SIGTERM)
			_ = syscall.Kill(os.Getpid(), s.(syscall.Signal))
		case <-done:
		}
	}()
	return func() {
		signal.Stop(signals)
		close(done)
		<-ended
	}
}
