package fault

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"testing"
)

func TestNames(t *testing.T) {
	seen := map[string]Point{}
	for _, p := range All() {
		if other, ok := seen[p.String()]; ok || p.String() == "" {
			t.Errorf("point %d is named %q, as %d is", p, p, other)
		}
		seen[p.String()] = p
	}
}

// TestShippedBuildHasNone: the agent as users have it knows neither the variable nor a point; the one of the tests does.
func TestShippedBuildHasNone(t *testing.T) {
	if testing.Short() {
		t.Skip("links the agent twice")
	}
	for tags, has := range map[string]bool{"": false, "faults": true} {
		path := filepath.Join(t.TempDir(), "imans-agent")
		cmd := exec.Command("go", "build", "-trimpath", "-tags", tags, "-o", path, "imans.dev/imans-agent/cmd/imans-agent")
		cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("build with tags %q: %v\n%s", tags, err, out)
		}
		program, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		for _, text := range []string{Variable, LogTorn.String(), NamespaceArchiving.String()} {
			if bytes.Contains(program, []byte(text)) != has {
				t.Errorf("the agent built with tags %q: it has %q: %v", tags, text, !has)
			}
		}
	}
}
