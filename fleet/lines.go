package fleet

import (
	"slices"
	"strconv"
	"strings"
)

// place is where a key stands: in the nth (from 0) table of that name, of which
// one within another has both names, with a dot. An empty table is the top of the
// file, an empty key the table's header.
type place struct {
	table string
	nth   int
	key   string
}

// lineIndex knows the lines (from 1) of the places of a TOML file.
type lineIndex map[place]int

// find gives the line of a place, or of the nearest thing around it that has
// one, or 0.
func (x lineIndex) find(at place) int {
	if at.table == "" {
		return x[place{table: at.key}]
	}
	for _, p := range []place{at, {table: at.table, nth: at.nth}, {table: at.table}} {
		if line := x[p]; line > 0 {
			return line
		}
	}
	return 0
}

// findLines scans a file that TOML's parser has accepted, since that one does
// not tell where a key stands. Inline tables count as one value, with the line
// of their key. On other input the result is of no use, but there is one.
func findLines(text string) lineIndex {
	s := &scanner{text: strings.TrimPrefix(text, "\ufeff"), line: 1}
	index := make(lineIndex)
	note := func(p place, line int) {
		if _, ok := index[p]; !ok {
			index[p] = line
		}
	}
	var header []string           // the keys of the last [header]
	count := make(map[string]int) // how many [[header]] of that name
	for s.skipBlank() {
		line := s.line
		isHeader, isArray := false, false
		var path []string
		if s.accept("[") {
			isHeader, isArray = true, s.accept("[")
			path = s.keys()
			header = path
		} else {
			path = append(slices.Clone(header), s.keys()...)
		}
		if isArray && len(path) == 1 {
			count[path[0]]++
		}
		if len(path) > 0 {
			p := place{table: path[0], nth: max(count[path[0]]-1, 0)}
			note(p, line)
			if len(path) > 1 {
				p.key = path[1]
				note(p, line)
				inner := place{table: path[0] + "." + path[1], nth: p.nth}
				note(inner, line)
				if len(path) > 2 {
					inner.key = path[2]
					note(inner, line)
				}
			}
		}
		if isHeader || !s.accept("=") {
			s.skipLine()
		} else {
			s.skipValue()
		}
	}
	return index
}

// scanner walks over TOML, byte by byte, counting lines.
type scanner struct {
	text string
	pos  int
	line int
}

// peek is the next byte, or 0 at the end.
func (s *scanner) peek() byte {
	if s.pos < len(s.text) {
		return s.text[s.pos]
	}
	return 0
}

func (s *scanner) next() {
	if s.peek() == '\n' {
		s.line++
	}
	s.pos++
}

func (s *scanner) done() bool { return s.pos >= len(s.text) }

// accept takes token if it comes next. It must not hold a newline.
func (s *scanner) accept(token string) bool {
	if !strings.HasPrefix(s.text[min(s.pos, len(s.text)):], token) {
		return false
	}
	s.pos += len(token)
	return true
}

func (s *scanner) skipSpace() {
	for s.peek() == ' ' || s.peek() == '\t' {
		s.pos++
	}
}

func (s *scanner) skipLine() {
	for !s.done() && s.peek() != '\n' {
		s.pos++
	}
}

// skipBlank goes to the next thing that is no space, newline or comment, and
// reports whether there is one.
func (s *scanner) skipBlank() bool {
	for !s.done() {
		switch s.peek() {
		case ' ', '\t', '\r', '\n':
			s.next()
		case '#':
			s.skipLine()
		default:
			return true
		}
	}
	return false
}

// keys takes a dotted key, as of `a."b.c" . d`, and the space after it.
func (s *scanner) keys() []string {
	var path []string
	for {
		s.skipSpace()
		start := s.pos
		switch s.peek() {
		case '"', '\'':
			s.skipString()
			quoted := s.text[start:min(s.pos, len(s.text))]
			if name, err := strconv.Unquote(quoted); err == nil {
				path = append(path, name)
			} else {
				path = append(path, strings.Trim(quoted, `'"`))
			}
		default:
			for !s.done() && !strings.ContainsRune(" \t\r\n.=[]#\"'", rune(s.peek())) {
				s.pos++
			}
			path = append(path, s.text[start:s.pos])
		}
		s.skipSpace()
		if !s.accept(".") {
			return path
		}
	}
}

// skipValue goes to the end of the line on which a value ends.
func (s *scanner) skipValue() {
	depth := 0
	for !s.done() {
		switch s.peek() {
		case '"', '\'':
			s.skipString()
			continue
		case '#':
			s.skipLine()
			continue
		case '[', '{':
			depth++
		case ']', '}':
			depth--
		case '\n':
			if depth <= 0 {
				return
			}
		}
		s.next()
	}
}

// skipString takes a string of any of TOML's four kinds. A string of one line
// ends at the end of its line at the latest.
func (s *scanner) skipString() {
	quote := s.text[s.pos : s.pos+1]
	end, long := quote, false
	if s.accept(strings.Repeat(quote, 3)) {
		end, long = strings.Repeat(quote, 3), true
	} else {
		s.pos++
	}
	for !s.done() {
		switch {
		case s.accept(end):
			for long && s.accept(quote) { // """a"""" ends with a quote in the string
			}
			return
		case quote == `"` && s.peek() == '\\':
			s.pos++ // the escaped byte, a newline maybe, goes below
			if s.done() {
				return
			}
		case s.peek() == '\n' && !long:
			return
		}
		s.next()
	}
}
