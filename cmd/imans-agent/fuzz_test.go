package main

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
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
