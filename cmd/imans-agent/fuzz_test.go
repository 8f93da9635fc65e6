package main

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/imalog"
)

// FuzzSettings: settings of the wrapper are taken, and make sense, or the error names their file.
func FuzzSettings(f *testing.F) {
	f.Add([]byte(`{"runtime": "runc", "run_dir": "/run/imans", "on_failure": "continue", "default_vtpm": true, "wait_seconds": 90}`))
	f.Add([]byte(`{"wait_seconds": -1}`))
	f.Add([]byte(`{"run_dir": 7}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		path := filepath.Join(t.TempDir(), "runtime.json")
		if err := os.WriteFile(path, text, 0o600); err != nil {
			t.Fatal(err)
		}
		s, err := readSettings(path)
		if err != nil && !strings.Contains(err.Error(), path) {
			t.Fatal(err)
		}
		if s.WaitSeconds < 1 || !filepath.IsAbs(s.RunDir) || s.OnFailure != onFailureContinue && s.OnFailure != onFailureFail {
			t.Fatalf("%+v, %v", s, err)
		}
	})
}

// FuzzPCR: a register's value that is taken is one of a TPM, and is written as it is read.
func FuzzPCR(f *testing.F) {
	f.Add("10=sha1:da39a3ee5e6b4b0d3255bfef95601890afd80709")
	f.Add("24=sha256:00")
	f.Add("-1=")
	f.Fuzz(func(t *testing.T, text string) {
		pcr, d, err := parsePCR(text)
		if err != nil {
			return
		}
		if again, value, err := parsePCR(fmt.Sprintf("%d=%v", pcr, d)); err != nil || again != pcr || value != d || pcr < 0 || pcr > imalog.MaxPCR {
			t.Fatalf("%q is %d and %v; read again %d and %v, %v", text, pcr, d, again, value, err)
		}
	})
}
