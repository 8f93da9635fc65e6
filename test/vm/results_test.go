package vm

import (
	"bytes"
	"slices"
	"testing"
)

func TestResultWriter(t *testing.T) {
	tests := []struct {
		name, output            string
		passed, failed, skipped []string
	}{
		{
			name: "each verdict",
			output: "\x16=== SUITE s\n\x16=== RUN   TestA\n\x16--- PASS: TestA (0.01s)\n\x16=== RUN   TestB\nsaid\n" +
				"\x16--- FAIL: TestB (0.01s)\n\x16=== RUN   TestC\n\x16--- SKIP: TestC (0.00s)\nFAIL\n\x16=== EXIT 1\n",
			passed: []string{"s.TestA"}, failed: []string{"s.TestB"}, skipped: []string{"s.TestC"},
		},
		{
			name: "subtests are not counted",
			output: "\x16=== SUITE s\n\x16=== RUN   TestA\n\x16=== RUN   TestA/x\n\x16--- FAIL: TestA/x (0.01s)\n" +
				"\x16--- FAIL: TestA (0.01s)\n\x16=== EXIT 1\n",
			failed: []string{"s.TestA"},
		},
		{
			name:   "output without a line end before the verdict",
			output: "\x16=== SUITE s\n\x16=== RUN   TestA\nno end\x16--- PASS: TestA (0.01s)\n\x16=== EXIT 0\n",
			passed: []string{"s.TestA"},
		},
		{
			name:   "a test that says what a verdict says",
			output: "\x16=== SUITE s\n\x16=== RUN   TestA\n--- PASS: TestB (0.01s)\n\x16--- PASS: TestA (0.01s)\n\x16=== EXIT 0\n",
			passed: []string{"s.TestA"},
		},
		{
			name:   "the machine dies in a test",
			output: "\x16=== SUITE s\n\x16=== RUN   TestA\n\x16--- PASS: TestA (0.01s)\n\x16=== RUN   TestB\nabou",
			passed: []string{"s.TestA"}, failed: []string{"s.TestB"},
		},
		{
			name: "a panic ends one suite, the next goes on",
			output: "\x16=== SUITE s\n\x16=== RUN   TestA\npanic: x\n\x16=== EXIT 2\n\x16=== SUITE t\n\x16=== RUN   TestA\n" +
				"\x16--- PASS: TestA (0.01s)\n\x16=== EXIT 0\n",
			passed: []string{"t.TestA"}, failed: []string{"s.TestA"},
		},
		{
			name:   "all passed, yet the suite exits with an error",
			output: "\x16=== SUITE s\n\x16=== RUN   TestA\n\x16--- PASS: TestA (0.01s)\n\x16=== EXIT 3\n",
			passed: []string{"s.TestA"}, failed: []string{"s.(exit status 3)"},
		},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			var out bytes.Buffer
			w := NewResultWriter(&out, "> ")
			for _, b := range []byte(tt.output) { // the worst case of cut-up output
				if _, err := w.Write([]byte{b}); err != nil {
					t.Fatal(err)
				}
			}
			got, err := w.Close()
			if err != nil {
				t.Fatal(err)
			}
			for _, c := range []struct {
				verdict   string
				got, want []string
			}{{"passed", got.Passed, tt.passed}, {"failed", got.Failed, tt.failed}, {"skipped", got.Skipped, tt.skipped}} {
				if !slices.Equal(c.got, c.want) {
					t.Errorf("%s: got %q, want %q", c.verdict, c.got, c.want)
				}
			}
			if bytes.IndexByte(out.Bytes(), frame) >= 0 {
				t.Errorf("framing was handed on: %q", out.String())
			}
		})
	}
}

func TestLastLines(t *testing.T) {
	for _, tt := range []struct {
		n       int
		s, want string
	}{
		{2, "a\nb\nc\n", "b\nc"}, {5, "a\nb", "a\nb"}, {1, "", ""}, {1, "a\r\n\r\n", "a"},
	} {
		if got := lastLines(tt.s, tt.n); got != tt.want {
			t.Errorf("lastLines(%q, %d) = %q, want %q", tt.s, tt.n, got, tt.want)
		}
	}
}
