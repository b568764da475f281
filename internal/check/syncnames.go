package check

import (
	"errors"
	"strconv"
	"strings"
)

// syncNames is synchronous_standby_names, taken apart.
type syncNames struct {
	quorum bool     // ANY; else FIRST, or a list alone
	need   int      // standbys that commits wait for
	names  []string // "*" is any standby
}

// parseSyncNames follows PostgreSQL's syncrep_scanner.l and syncrep_gram.y. An empty
// string is no names.
func parseSyncNames(s string) (syncNames, error) {
	bad := errors.New("synchronous_standby_names is not understood")
	tokens, ok := syncTokens(s)
	if !ok {
		return syncNames{}, bad
	}
	if len(tokens) == 0 {
		return syncNames{}, nil
	}
	n := syncNames{need: 1}
	if word := strings.ToUpper(tokens[0]); (word == "ANY" || word == "FIRST") && len(tokens) > 1 {
		n.quorum = word == "ANY"
		tokens = tokens[1:]
	}
	if len(tokens) > 1 && tokens[1] == "(" {
		count, err := strconv.Atoi(tokens[0])
		if err != nil || count < 1 || tokens[len(tokens)-1] != ")" {
			return syncNames{}, bad
		}
		n.need = count
		tokens = tokens[2 : len(tokens)-1]
	}
	for i, token := range tokens {
		if i%2 == 1 {
			if token != "," {
				return syncNames{}, bad
			}
			continue
		}
		if token == "," || token == "(" || token == ")" {
			return syncNames{}, bad
		}
		n.names = append(n.names, strings.TrimPrefix(token, `"`))
	}
	if len(tokens)%2 == 0 {
		return syncNames{}, bad
	}
	return n, nil
}

// syncTokens splits the list. A name that was quoted keeps its first quote, so that
// it is no sign.
func syncTokens(s string) (tokens []string, ok bool) {
	for s = strings.TrimLeft(s, " \t\r\n\v\f"); s != ""; s = strings.TrimLeft(s, " \t\r\n\v\f") {
		switch {
		case strings.ContainsRune("(),*", rune(s[0])):
			tokens, s = append(tokens, s[:1]), s[1:]
		case s[0] == '"':
			name, rest, closed := `"`, s[1:], false
			for !closed {
				i := strings.IndexByte(rest, '"')
				if i < 0 {
					return nil, false
				}
				name, rest = name+rest[:i], rest[i+1:]
				if closed = !strings.HasPrefix(rest, `"`); !closed {
					name, rest = name+`"`, rest[1:]
				}
			}
			tokens, s = append(tokens, name), rest
		default:
			i := strings.IndexAny(s, " \t\r\n\v\f(),*\"")
			if i < 0 {
				i = len(s)
			}
			tokens, s = append(tokens, s[:i]), s[i:]
		}
	}
	return tokens, true
}

// place is where an application_name stands in the list, as PostgreSQL compares
// (SyncRepGetStandbyPriority in syncrep.c); -1: nowhere.
func (n syncNames) place(application string) int {
	for i, name := range n.names {
		if name == "*" || strings.EqualFold(name, application) {
			return i
		}
	}
	return -1
}

// needs tells whether commits wait for the standby at a place even while all others
// of the list are there.
func (n syncNames) needs(place int) bool {
	if !n.quorum {
		return place < n.need
	}
	for _, name := range n.names {
		if name == "*" {
			return false // any number of others
		}
	}
	return len(n.names) <= n.need
}
