package grant

import (
	"os"
	"path/filepath"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/oci"
	"imans.dev/imans-agent/internal/vtpm"
)

// Whatever a container has come to, each of its TPMs is found, and a record that is damaged hides no other container's.
func TestLeft(t *testing.T) {
	dir := t.TempDir()
	g := open(t, config(dir))
	two, one := []oci.VTPM{{}, {Name: "tpm5"}}, []oci.VTPM{{Version: "1.2", StatePath: "/srv/state", StatePathIsManaged: true}}
	leave(t, g, life{Request: oci.Request{ID: "attached", VTPMs: two}, State: created, Namespace: event.MountNS{Inum: 1, ID: 2}, Attached: true})
	leave(t, g, life{Request: oci.Request{ID: "elsewhere", VTPMs: one}, State: prepared})
	leave(t, g, life{Request: oci.Request{ID: "gone"}, State: stopped})
	if err := os.MkdirAll(filepath.Join(dir, "half-made", "tpm0"), 0o700); err != nil {
		t.Fatal(err)
	}
	want := []string{dir + "/attached/tpm0", dir + "/attached/tpm1", "/srv/state"}
	check := func(left []vtpm.Config) {
		t.Helper()
		var got []string
		for _, c := range left {
			got = append(got, c.Dir)
		}
		if strings.Join(got, " ") != strings.Join(want, " ") {
			t.Errorf("%v, want %v", got, want)
		}
	}
	left, err := Left(dir)
	if err != nil {
		t.Error(err)
	}
	check(left)
	leave(t, g, life{Request: oci.Request{ID: "damaged", VTPMs: []oci.VTPM{{}}}, State: prepared})
	if err := os.WriteFile(filepath.Join(dir, "damaged", recordName), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	left, err = Left(dir)
	if err == nil || !strings.Contains(err.Error(), "container damaged") {
		t.Errorf("a damaged record: %v", err)
	}
	check(left)
	if left, err := Left(filepath.Join(dir, "none")); err != nil || len(left) != 0 {
		t.Errorf("no folder: %v, %v", left, err)
	}
}
