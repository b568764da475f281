// Package wal knows the shape of PostgreSQL's write-ahead log: positions, segment names, timeline
// histories, and how pages and records follow each other. It holds values and does no I/O; whatever it
// parses may be hostile.
//
// Positions are byte positions in the log (XLogRecPtr). Where a range of them is meant, its start is
// inclusive and its end exclusive.
package wal

import (
	"fmt"
	"strings"
)

// LSN is a byte position in the write-ahead log (XLogRecPtr). 0 stands for "not known", as
// InvalidXLogRecPtr does: no WAL is ever written there.
type LSN uint64

// String gives the form that PostgreSQL prints: two hexadecimal halves, "16/B374D848".
func (l LSN) String() string {
	return fmt.Sprintf("%X/%X", uint32(l>>32), uint32(l))
}

// ParseLSN reads what PostgreSQL's pg_lsn type accepts (pg_lsn.c): two hexadecimal numbers of one to
// eight digits with a slash between them, and nothing else around them.
func ParseLSN(s string) (LSN, error) {
	hi, lo, ok := strings.Cut(s, "/")
	if ok {
		h, okH := parseHex(hi)
		l, okL := parseHex(lo)
		if okH && okL {
			return LSN(h)<<32 | LSN(l), nil
		}
	}
	return 0, fmt.Errorf("invalid WAL position %s", quote(s))
}

// parseHex reads one to eight hexadecimal digits of either case.
func parseHex(s string) (uint32, bool) {
	if len(s) < 1 || len(s) > 8 {
		return 0, false
	}
	var v uint32
	for i := range len(s) {
		var d byte
		switch c := s[i]; {
		case '0' <= c && c <= '9':
			d = c - '0'
		case 'A' <= c && c <= 'F':
			d = c - 'A' + 10
		case 'a' <= c && c <= 'f':
			d = c - 'a' + 10
		default:
			return 0, false
		}
		v = v<<4 | uint32(d)
	}
	return v, true
}

// parseUpperHex8 reads exactly eight hexadecimal digits in upper case, as file names have them.
func parseUpperHex8(s string) (uint32, bool) {
	if len(s) != 8 || strings.ContainsAny(s, "abcdef") {
		return 0, false
	}
	return parseHex(s)
}

// quote escapes s for an error message and bounds its length: it comes from a file or a server.
func quote(s string) string {
	const limit = 64
	if len(s) > limit {
		return fmt.Sprintf("%q…", s[:limit])
	}
	return fmt.Sprintf("%q", s)
}
