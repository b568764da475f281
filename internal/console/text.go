package console

import (
	"fmt"
	"net/http"
	"strconv"
	"strings"
	"time"
	"unicode"
)

// language is one that the pages speak. What servers, the log and the configuration say stays English.
type language int

const (
	english language = iota
	chinese
	languages // how many there are
)

// languageNames are how each is called in a URL and a cookie, in HTML, and by itself.
var languageNames = [languages]struct{ Short, Tag, Name string }{
	{"en", "en", "English"},
	{"zh", "zh-CN", "中文"},
}

const languageCookie = "lang"

func parseLanguage(short string) (language, bool) {
	for i, l := range languageNames {
		if l.Short == short {
			return language(i), true
		}
	}
	return english, false
}

// languageOf is the language that a request asks for: by its URL, a cookie, or what the browser prefers. chosen
// says that the URL named it.
func languageOf(r *http.Request) (l language, chosen bool) {
	if l, ok := parseLanguage(r.URL.Query().Get("lang")); ok {
		return l, true
	}
	if c, err := r.Cookie(languageCookie); err == nil {
		if l, ok := parseLanguage(c.Value); ok {
			return l, false
		}
	}
	return accepted(r.Header.Get("Accept-Language")), false
}

// accepted is the language that an Accept-Language header prefers; English, when it names none of ours.
func accepted(header string) language {
	best, most := english, 0.0
	for i, item := range strings.Split(header, ",") {
		if i == 20 { // no browser sends so many
			break
		}
		tag, parameter, _ := strings.Cut(item, ";")
		weight := 1.0
		if q, ok := strings.CutPrefix(strings.TrimSpace(parameter), "q="); ok {
			var err error
			if weight, err = strconv.ParseFloat(q, 64); err != nil {
				continue
			}
		}
		primary, _, _ := strings.Cut(strings.ToLower(strings.TrimSpace(tag)), "-")
		if l, ok := parseLanguage(primary); ok && weight > most && weight <= 1 {
			best, most = l, weight
		}
	}
	return best
}

// text is the text of that key. Where the texts differ by number they have a "|" between the one for 1 and the one
// for others, and the first argument decides.
func (l language) text(key string, args ...any) string {
	s, ok := texts[key]
	if !ok {
		return "⟦" + key + "⟧" // which a test looks for
	}
	format := s[l]
	if one, many, ok := strings.Cut(format, "|"); ok {
		format = many
		if len(args) > 0 && fmt.Sprint(args[0]) == "1" {
			format = one
		}
	}
	if !strings.Contains(format, "%") {
		return format
	}
	return fmt.Sprintf(format, args...)
}

// span is a number of seconds in its two largest units, as the script writes ages.
func (l language) span(seconds int64) string {
	units := strings.Split(l.text("age.units"), ",")
	s := max(seconds, 0)
	for i, unit := range []int64{24 * 3600, 3600, 60} {
		if s >= unit {
			smaller := []int64{3600, 60, 1}[i]
			return fmt.Sprintf("%d%s %d%s", s/unit, units[i], s%unit/smaller, units[i+1])
		}
	}
	return fmt.Sprintf("%d%s", s, units[3])
}

// moment is a time as HTML has it, to the second; "": not known. As it is text, two views that show the same time
// are equal.
type moment string

func momentOf(t time.Time) moment {
	if t.IsZero() {
		return ""
	}
	return moment(t.UTC().Format(time.RFC3339))
}

// clock is a moment for people, the same in every language.
func clock(s moment) string {
	t, err := time.Parse(time.RFC3339, string(s))
	if err != nil {
		return ""
	}
	return t.Format("2006-01-02 15:04:05 UTC")
}

// visible is text of somebody else, with what has no shape or changes the direction of what stands around it
// written out. Lines stay.
func visible(s string) string {
	plain := func(r rune) bool { return r == '\n' || unicode.IsPrint(r) && r != unicode.ReplacementChar }
	if strings.IndexFunc(s, func(r rune) bool { return !plain(r) }) < 0 {
		return s
	}
	var b strings.Builder
	for _, r := range s {
		if plain(r) {
			b.WriteRune(r)
			continue
		}
		quoted := strconv.QuoteRuneToASCII(r)
		b.WriteString(quoted[1 : len(quoted)-1])
	}
	return b.String()
}
