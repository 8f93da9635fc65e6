package policy

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// TestPublishedPolicies: policies of the kernel's documentation, distributions and projects parse, and print as the
// kernel prints them. What is printed is the same policy again.
func TestPublishedPolicies(t *testing.T) {
	files, err := filepath.Glob("testdata/policies/*.policy")
	if err != nil || len(files) < 10 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		t.Run(filepath.Base(file), func(t *testing.T) {
			p, err := Parse(file, read(t, file))
			if err != nil {
				t.Fatal(err)
			}
			want := string(read(t, strings.TrimSuffix(file, ".policy")+".printed"))
			if p.String() != want {
				t.Errorf("printed\n%s\nwant\n%s", p, want)
			}
			if again := mustParse(t, p.String()); again.String() != want {
				t.Errorf("printed, parsed and printed again\n%s\nwant\n%s", again, want)
			}
		})
	}
}

// TestRefusedPolicies: each with the line and what the message must say.
func TestRefusedPolicies(t *testing.T) {
	tests := map[string]struct {
		line int
		says string
	}{
		"ima-doc-tcb.policy":           {1, `unknown word "#"`},
		"kernel-continued-line.policy": {2, `unknown word "\\"`},
		"kernel-sigv3-template.policy": {1, "unknown template"},
		"ltp-measure-invalid.policy":   {9, `unknown word "dnt_measure"`},
		"openeuler-exec-tcb.policy":    {7, "unknown function"},
		"openeuler-immutable.policy":   {1, "unknown appraise type"},
		"windows.policy":               {1, "control byte 0x0d"},
	}
	files, err := filepath.Glob("testdata/refused/*.policy")
	if err != nil || len(files) < 5 {
		t.Fatalf("%d files, %v", len(files), err)
	}
	for _, file := range files {
		name := filepath.Base(file)
		want, ok := tests[name]
		if !ok {
			t.Errorf("%s: no line of the table is about it", name)
			continue
		}
		_, err := Parse(name, read(t, file))
		var syntax *SyntaxError
		if !errors.As(err, &syntax) {
			t.Errorf("%s: got %v, want a SyntaxError", name, err)
			continue
		}
		if syntax.Line != want.line || syntax.File != name || !strings.Contains(syntax.Reason, want.says) {
			t.Errorf("%s: got %v, want line %d and %q", name, err, want.line, want.says)
		}
	}
}

func read(t *testing.T, file string) []byte {
	t.Helper()
	b, err := os.ReadFile(file)
	if err != nil {
		t.Fatal(err)
	}
	return b
}
