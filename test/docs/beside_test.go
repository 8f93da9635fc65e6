package docs

import (
	"os"
	"slices"
	"strings"
	"testing"
)

// rows returns the lines of a file that are a table's rows with numbers or answers, headings apart.
func rows(t *testing.T, path string) []string {
	t.Helper()
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	var found []string
	lines := strings.Split(string(text), "\n")
	for i, line := range lines {
		heading := strings.HasPrefix(line, "|---") || i+1 < len(lines) && strings.HasPrefix(lines[i+1], "|---")
		if strings.HasPrefix(line, "|") && !heading {
			found = append(found, line)
		}
	}
	return found
}

// What is said of the kernel's IMA and ours is what the tests that compare both demand.
func TestBesideTheKernelIsTested(t *testing.T) {
	said, tested := rows(t, "../../docs/beside-the-kernel.md"), rows(t, "../vm/guest/silentoracle_test.go")
	if len(said) < 20 || !slices.Equal(said, tested) {
		t.Errorf("docs/beside-the-kernel.md has\n%s\nthe tests\n%s", strings.Join(said, "\n"), strings.Join(tested, "\n"))
	}
}
