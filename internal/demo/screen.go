package demo

import (
	"fmt"
	"io"
	"os"
	"slices"
	"strings"
	"sync"
	"time"
)

// A screen shows the story line by line and, below it, a table that is redrawn
// in place on a terminal. Elsewhere the table is printed anew now and then.
type screen struct {
	out      io.Writer
	terminal *os.File // nil: plain lines

	mu      sync.Mutex
	table   []string  // below the story, none: nil
	drawn   int       // lines of it on the terminal
	stale   bool      // it has changed since it was last printed as plain lines,
	printed time.Time // which was then
}

const (
	redrawInterval = 200 * time.Millisecond // on a terminal
	plainInterval  = 3 * time.Second        // elsewhere, at most
)

func newScreen(out io.Writer, plain bool) *screen {
	s := &screen{out: out}
	if f, ok := out.(*os.File); ok && !plain && os.Getenv("TERM") != "dumb" && terminalWidth(f) > 0 {
		s.terminal = f
	}
	return s
}

// say adds a line, or several, to the story.
func (s *screen) say(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.erase()
	fmt.Fprintf(s.out, format+"\n", args...)
	s.draw()
}

// Write adds lines as they are: the log's, with --verbose.
func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.erase()
	n, err := s.out.Write(p)
	s.draw()
	return n, err
}

// show replaces the table. Where it does not move it is printed when it is
// news, or has changed since some seconds.
func (s *screen) show(table []string, news bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := !slices.Equal(s.table, table)
	s.table = table
	if s.terminal != nil {
		s.erase()
		s.draw()
		return
	}
	s.stale = s.stale || changed
	if news || s.stale && time.Since(s.printed) >= plainInterval {
		s.print()
	}
}

// settle shows a table for the last time: it becomes part of the story.
func (s *screen) settle(table []string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.erase()
	s.table = table
	s.print()
	s.table = nil
}

func (s *screen) print() {
	for _, line := range s.table {
		fmt.Fprintln(s.out, indent+line)
	}
	s.printed, s.stale = time.Now(), false
}

// indent sets the table off from the story.
const indent = "   "

// erase and draw do nothing where there is no terminal. A line longer than
// the terminal is wide would wrap, and erase would miss a line.
func (s *screen) erase() {
	if s.drawn > 0 {
		fmt.Fprintf(s.out, "\x1b[%dA\x1b[J", s.drawn) // cursor up, clear to the end
		s.drawn = 0
	}
}

func (s *screen) draw() {
	if s.terminal == nil || s.table == nil {
		return
	}
	width := terminalWidth(s.terminal)
	var b strings.Builder
	for _, line := range s.table {
		line = indent + line
		if width > 0 && len(line) >= width {
			line = line[:width-1]
		}
		b.WriteString(line + "\n")
	}
	_, _ = io.WriteString(s.out, b.String())
	s.drawn = len(s.table)
}
