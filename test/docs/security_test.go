package docs

import (
	"io/fs"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"
)

// tests returns the names of all tests of the repository.
func tests(t *testing.T) map[string]bool {
	t.Helper()
	found := make(map[string]bool)
	declared := regexp.MustCompile(`(?m)^func (Test\w+)\(`)
	err := filepath.WalkDir("../..", func(path string, e fs.DirEntry, err error) error {
		if err != nil || e.IsDir() || !strings.HasSuffix(path, "_test.go") {
			return err
		}
		text, err := os.ReadFile(path)
		for _, m := range declared.FindAllStringSubmatch(string(text), -1) {
			found[m[1]] = true
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
	return found
}

// Each row of the threat model names tests that there are, or says that it is out of reach.
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
		for _, m := range shown {
			if !have[m[1]] {
				t.Errorf("there is no %s, named by: %s", m[1], line)
			}
		}
	}
	if rows < 20 {
		t.Errorf("the threat model has %d rows", rows)
	}
}
