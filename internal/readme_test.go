package internal_test

import (
	"os"
	"path/filepath"
	"regexp"
	"slices"
	"strings"
	"testing"
	"unicode"
)

// markdown is what a translation of a page leaves as it is.
type markdown struct {
	blocks []string // lines of code blocks
	levels []string // of headings: "##"
	rows   []string // columns of table rows: "|||"
	links  []string // targets, other than the pages themselves
	code   []string // spans of code, sorted, each once
}

var (
	linkTarget = regexp.MustCompile(`\]\(([^)]*)\)`)
	codeSpan   = regexp.MustCompile("`[^`]+`")
)

func readMarkdown(t *testing.T, name string) (m markdown) {
	t.Helper()
	data, err := os.ReadFile(filepath.Join("..", name))
	if err != nil {
		t.Fatal(err)
	}
	text := ""
	for line := range strings.Lines(string(data)) {
		switch {
		case strings.HasPrefix(line, "    "):
			m.blocks = append(m.blocks, line)
			continue
		case strings.HasPrefix(line, "#"):
			level, _, _ := strings.Cut(line, " ")
			m.levels = append(m.levels, level)
		case strings.HasPrefix(line, "|"):
			m.rows = append(m.rows, strings.Repeat("|", strings.Count(line, "|")))
		}
		text += line
	}
	for _, found := range linkTarget.FindAllStringSubmatch(text, -1) {
		if !strings.HasPrefix(found[1], "README") {
			m.links = append(m.links, strings.Replace(found[1], "-zh.png", "-light-wide.png", 1)) // the same picture, in Chinese
		}
	}
	m.code = codeSpan.FindAllString(text, -1)
	slices.Sort(m.code)
	m.code = slices.Compact(m.code)
	return m
}

// The Chinese README says the same as the English one: what can be compared without knowing the languages
// is the same.
func TestTheChineseReadmeIsTheEnglishOne(t *testing.T) {
	english, chinese := readMarkdown(t, "README.md"), readMarkdown(t, "README.zh-CN.md")
	if len(english.blocks) == 0 || len(english.code) == 0 {
		t.Fatal("nothing was found in README.md")
	}
	for _, c := range []struct {
		what             string
		english, chinese []string
	}{
		{"lines of code blocks", english.blocks, chinese.blocks},
		{"headings", english.levels, chinese.levels},
		{"rows of tables", english.rows, chinese.rows},
		{"links", english.links, chinese.links},
		{"spans of code", english.code, chinese.code},
	} {
		if slices.Equal(c.english, c.chinese) {
			continue
		}
		i := 0
		for i < min(len(c.english), len(c.chinese)) && c.english[i] == c.chinese[i] {
			i++
		}
		at := func(all []string) string { return append(slices.Clone(all), "(the end)")[i] }
		t.Errorf("%s: number %d is %q in README.md, %q in README.zh-CN.md", c.what, i+1, at(c.english), at(c.chinese))
	}
}

// TestLinksWithinAPageLeadSomewhere goes by GitHub's names for headings.
func TestLinksWithinAPageLeadSomewhere(t *testing.T) {
	pages, err := filepath.Glob("../docs/*.md")
	if err != nil || len(pages) == 0 {
		t.Fatalf("no pages found: %v", err)
	}
	for _, page := range pages {
		data, err := os.ReadFile(page)
		if err != nil {
			t.Fatal(err)
		}
		anchors := map[string]bool{}
		for line := range strings.Lines(string(data)) {
			if _, heading, ok := strings.Cut(strings.TrimLeft(line, "#"), " "); ok && strings.HasPrefix(line, "#") {
				anchors["#"+anchor(strings.TrimSpace(heading))] = true
			}
		}
		for _, found := range linkTarget.FindAllStringSubmatch(string(data), -1) {
			if strings.HasPrefix(found[1], "#") && !anchors[found[1]] {
				t.Errorf("%s: no heading is %s", page, found[1])
			}
		}
	}
}

// anchor is what a heading is called in a link.
func anchor(heading string) string {
	return strings.Map(func(r rune) rune {
		switch {
		case r == ' ':
			return '-'
		case r == '-' || r == '_' || unicode.IsLetter(r) || unicode.IsDigit(r):
			return unicode.ToLower(r)
		}
		return -1
	}, heading)
}
