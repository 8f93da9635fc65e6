package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// tests returns the names of all tests of the repository, and whether make test runs each on some kernel.
func tests(t *testing.T) map[string]bool {
	t.Helper()
	found := make(map[string]bool)
	declared := regexp.MustCompile(`(?ms)^func (Test\w+)\(.*?^}`)
	left := regexp.MustCompile(`(?m)^\tleave\(t\)$`)
	err := filepath.WalkDir("../..", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		for _, m := range declared.FindAllStringSubmatch(string(text), -1) {
			found[m[1]] = !left.MatchString(m[0])
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// Each row of the threat model names tests that there are, one of which at least make test runs, or says that it is out of reach.
func TestThreatModelNamesTests(t *testing.T) {
	text, err := os.ReadFile("../../docs/security.md")
	if err != nil {
		t.Fatal(err)
	}
	have, rows := tests(t), 0
	named := regexp.MustCompile("`(Test\\w+)`")
	for line := range strings.Lines(string(text)) {
		cells := strings.Split(strings.Trim(strings.TrimSpace(line), "|"), "|")
		if !strings.HasPrefix(line, "|") || len(cells) != 4 || strings.Contains(line, "---") || strings.Contains(line, "shown by") {
			continue
		}
		rows++
		shown := named.FindAllStringSubmatch(cells[3], -1)
		if len(shown) == 0 && !strings.HasPrefix(strings.TrimSpace(cells[2]), "out of reach: ") {
			t.Errorf("no test is named by: %s", line)
		}
		runs := len(shown) == 0
		for _, m := range shown {
			run, there := have[m[1]]
			if !there {
				t.Errorf("there is no %s, named by: %s", m[1], line)
			}
			runs = runs || run
		}
		if !runs {
			t.Errorf("make test leaves out all tests that are named by: %s", line)
		}
	}
	if rows < 20 {
		t.Errorf("the threat model has %d rows", rows)
	}
}
