package main

import (
	"context"
	"errors"
	"fmt"
	"math"
	"os"
	"os/signal"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/spf13/cobra"
	"golang.org/x/sync/errgroup"
	"golang.org/x/sys/unix"
	"golang.org/x/term"

	"github.com/walfleet/walfleet/fleet"
)

const (
	// watchInterval is the time from one look at the daemon to the next.
	watchInterval = time.Second
	// lateAnswer is how long the daemon may take to answer before what is shown counts as
	// old.
	lateAnswer = 3 * time.Second
)

// watch shows the status on the terminal until a person or a signal ends it.
func watch(cmd *cobra.Command, read func(context.Context) (fleet.Report, error), details bool) error {
	ctx, stop := signal.NotifyContext(cmd.Context(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	context.AfterFunc(ctx, stop) // a second signal ends the process, even where the terminal takes nothing more
	resized := make(chan os.Signal, 1)
	signal.Notify(resized, syscall.SIGWINCH)
	defer signal.Stop(resized)

	in, out := os.Stdin, os.Stdout
	if !term.IsTerminal(int(in.Fd())) || !term.IsTerminal(int(out.Fd())) || os.Getenv("TERM") == "dumb" {
		return &usageError{errors.New("--watch needs a terminal: use --json, or \"watch walfleet status\"")}
	}

	// What is wrong with the command line or the file is said where it stays.
	report, err := read(ctx)
	if err != nil {
		return err
	}
	if report.Daemon == nil {
		report = report.Peek(ctx)
	}
	w := watcher{in: in, out: out, report: report, lost: report.Error, answered: time.Now()}
	w.view = fleet.View{Color: os.Getenv("NO_COLOR") == "", Details: details}
	return w.run(ctx, read, resized)
}

// watcher has a status on a terminal.
type watcher struct {
	in, out *os.File

	report   fleet.Report // the last one of a daemon; without any the first one
	answered time.Time    // when the daemon was heard last, if only to fail
	lost     string       // why report is not the last answer

	view  fleet.View
	drawn []string // what stands on the terminal
}

// answer is what came of a look at the daemon.
type answer struct {
	report fleet.Report
	err    error
}

// run draws until ctx is done, a key ends it, or the terminal fails, and gives the
// terminal back as it was.
func (w *watcher) run(ctx context.Context, read func(context.Context) (fleet.Report, error), resized <-chan os.Signal) (err error) {
	before, err := term.MakeRaw(int(w.in.Fd()))
	if err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	ctx, cancel := context.WithCancel(ctx)
	var helpers errgroup.Group
	defer func() {
		cancel()
		_, errWrite := w.out.WriteString(leaveScreen)
		errRestore := term.Restore(int(w.in.Fd()), before) // before waiting for who may read a file that does not come
		err = errors.Join(err, errWrite, errRestore, helpers.Wait())
	}()
	answers, keys := make(chan answer), make(chan key)
	helpers.Go(func() error { return ask(ctx, read, answers) })
	helpers.Go(func() error { return readKeys(ctx, w.in, keys) })
	clock := time.NewTicker(watchInterval)
	defer clock.Stop()
	if _, err := w.out.WriteString(enterScreen); err != nil {
		return fmt.Errorf("terminal: %w", err)
	}
	for {
		if err := w.draw(); err != nil {
			return fmt.Errorf("terminal: %w", err)
		}
		select {
		case <-ctx.Done():
			return nil
		case a := <-answers:
			w.take(a)
		case k, ok := <-keys:
			if !ok || k == keyQuit {
				return nil
			}
			w.scroll(k)
		case <-resized:
		case <-clock.C:
		}
	}
}

// ask looks at the daemon again and again, and passes on what comes of it.
func ask(ctx context.Context, read func(context.Context) (fleet.Report, error), answers chan<- answer) error {
	ticker := time.NewTicker(watchInterval)
	defer ticker.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticker.C:
		}
		report, err := read(ctx)
		select {
		case <-ctx.Done():
			return nil
		case answers <- answer{report, err}:
		}
	}
}

// take keeps a daemon's answer. Of a look that found none the reason is kept.
func (w *watcher) take(a answer) {
	w.answered = time.Now()
	switch {
	case a.err != nil:
		w.lost = a.err.Error()
	case a.report.Daemon == nil:
		w.lost = a.report.Error
	default:
		w.report, w.lost = a.report, ""
	}
}

func (w *watcher) scroll(k key) {
	page := max(w.view.Height-8, 1) // about what is seen of the rows
	switch k {
	case keyUp:
		w.view.Top--
	case keyDown:
		w.view.Top++
	case keyPageUp:
		w.view.Top -= page
	case keyPageDown:
		w.view.Top += page
	case keyHome:
		w.view.Top = 0
	case keyEnd:
		w.view.Top = math.MaxInt
	}
}

const (
	enterScreen = "\x1b[?1049h\x1b[?25l\x1b[?7l" // the alternate screen, without a cursor and without wrapping
	leaveScreen = "\x1b[?7h\x1b[?25h\x1b[?1049l"
)

// draw writes the lines that are not on the terminal yet, all at once.
func (w *watcher) draw() error {
	width, height, err := term.GetSize(int(w.out.Fd()))
	if err != nil {
		return err
	}
	if width != w.view.Width || height != w.view.Height { // not every process of a terminal is sent a signal
		w.drawn = nil
	}
	w.view.Width, w.view.Height, w.view.Now, w.view.Lost = width, height, time.Now(), w.lost
	if late := time.Since(w.answered); w.lost == "" && late > lateAnswer {
		w.view.Lost = "walfleet takes long to answer"
	}
	var lines []string
	lines, w.view.Top = w.report.Draw(w.view)
	var b strings.Builder
	if w.drawn == nil {
		b.WriteString("\x1b[2J")
	}
	for i, line := range lines {
		if i >= len(w.drawn) || w.drawn[i] != line {
			fmt.Fprintf(&b, "\x1b[%d;1H\x1b[K%s", i+1, line) // go there, clear the line, write it
		}
	}
	w.drawn = slices.Clone(lines)
	if b.Len() == 0 {
		return nil
	}
	_, err = w.out.WriteString(b.String())
	return err
}

// key is what a person pressed.
type key int

const (
	keyQuit key = iota
	keyUp
	keyDown
	keyPageUp
	keyPageDown
	keyHome
	keyEnd
)

// keySequences are what terminals send for keys: xterm's, those of its application mode,
// the Linux console's, and less's letters.
var keySequences = map[string]key{
	"q": keyQuit, "Q": keyQuit, "\x03": keyQuit, "\x04": keyQuit, // Ctrl-C, Ctrl-D
	"\x1b[A": keyUp, "\x1bOA": keyUp, "k": keyUp,
	"\x1b[B": keyDown, "\x1bOB": keyDown, "j": keyDown,
	"\x1b[5~": keyPageUp, "b": keyPageUp,
	"\x1b[6~": keyPageDown, " ": keyPageDown,
	"\x1b[H": keyHome, "\x1bOH": keyHome, "\x1b[1~": keyHome, "g": keyHome,
	"\x1b[F": keyEnd, "\x1bOF": keyEnd, "\x1b[4~": keyEnd, "G": keyEnd,
}

// nextKey takes a key from the front of what a terminal sent; ok is false when more has
// to come first. What is no key is dropped.
func nextKey(input string) (k key, rest string, ok bool) {
	for input != "" {
		unfinished := false
		for sequence, k := range keySequences {
			if rest, found := strings.CutPrefix(input, sequence); found {
				return k, rest, true
			}
			unfinished = unfinished || strings.HasPrefix(sequence, input)
		}
		if unfinished {
			break
		}
		input = input[1:]
	}
	return 0, input, false
}

// readKeys passes on the keys that are pressed, until ctx is done or the terminal ends. A
// terminal is not read until there is something to read: nothing would end that.
func readKeys(ctx context.Context, tty *os.File, keys chan<- key) error {
	defer close(keys)
	ended, end, err := os.Pipe()
	if err != nil {
		return err
	}
	defer ended.Close()
	context.AfterFunc(ctx, func() { end.Close() })
	var input string
	buffer := make([]byte, 256)
	for ctx.Err() == nil {
		ready := []unix.PollFd{{Fd: int32(tty.Fd()), Events: unix.POLLIN}, {Fd: int32(ended.Fd()), Events: unix.POLLIN}}
		if _, err := unix.Poll(ready, -1); err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("terminal: %w", err)
		}
		if ready[0].Revents == 0 {
			continue
		}
		n, err := tty.Read(buffer)
		if err != nil {
			return nil // the terminal is gone
		}
		for input += string(buffer[:n]); ; {
			k, rest, ok := nextKey(input)
			input = rest
			if !ok {
				break
			}
			select {
			case keys <- k:
			case <-ctx.Done():
				return nil
			}
		}
	}
	return nil
}
