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
	out   io.Writer
	width func() int  // of the terminal, in columns; nil: plain lines
	lost  func(error) // called when out takes no more

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

// newScreen writes to out, and calls lost when that fails.
func newScreen(out io.Writer, plain bool, lost func(error)) *screen {
	s := &screen{out: out, lost: lost}
	if f, ok := out.(*os.File); ok && !plain && os.Getenv("TERM") != "dumb" && terminalWidth(f) > 0 {
		s.width = func() int { return terminalWidth(f) }
	}
	return s
}

// say adds a line, or several, to the story.
func (s *screen) say(format string, args ...any) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.erase()
	s.write(format+"\n", args...)
	s.draw()
}

// Write adds lines as they are: the log's, with --verbose.
func (s *screen) Write(p []byte) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.erase()
	s.write("%s", p)
	s.draw()
	return len(p), nil
}

// show replaces the table. Where it does not move it is printed when it is
// news, or has changed since some seconds.
func (s *screen) show(table []string, news bool) {
	s.mu.Lock()
	defer s.mu.Unlock()
	changed := !slices.Equal(s.table, table)
	s.table = table
	if s.width != nil {
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

func (s *screen) write(format string, args ...any) {
	if _, err := fmt.Fprintf(s.out, format, args...); err != nil {
		s.lost(fmt.Errorf("nobody reads on: %w", err))
	}
}

func (s *screen) print() {
	for _, line := range s.table {
		s.write("%s\n", indent+line)
	}
	s.printed, s.stale = time.Now(), false
}

// indent sets the table off from the story.
const indent = "   "

// erase and draw do nothing where there is no terminal. A line longer than
// the terminal is wide would wrap, and erase would miss a line.
func (s *screen) erase() {
	if s.drawn > 0 {
		s.write("\x1b[%dA\x1b[J", s.drawn) // cursor up, clear to the end
		s.drawn = 0
	}
}

func (s *screen) draw() {
	if s.width == nil || s.table == nil {
		return
	}
	width := s.width()
	var b strings.Builder
	for _, line := range s.table {
		line = indent + line
		if width > 0 && len(line) >= width {
			line = line[:width-1]
		}
		b.WriteString(line + "\n")
	}
	s.write("%s", b.String())
	s.drawn = len(s.table)
}
