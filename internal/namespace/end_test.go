package namespace

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/need"
)

// A namespace's values are in the archive, whether its vTPM was started beside the list or by an earlier agent.
func TestArchive(t *testing.T) {
	need.Program(t, "swtpm")
	for _, restarted := range []bool{false, true} {
		t.Run(fmt.Sprintf("restarted %v", restarted), func(t *testing.T) {
			dir, ctx := t.TempDir(), soon(t)
			s := newState(t, dir, "swtpm")
			if err := s.begin(ctx); err != nil {
				t.Fatal(err)
			}
			if err := s.appendViolation("first", event.LossReadError); err != nil {
				t.Fatal(err)
			}
			if err := s.list.Settle(ctx); err != nil {
				t.Fatal(err)
			}
			values, err := s.list.PCRs(ctx)
			if err != nil || len(values) == 0 {
				t.Fatalf("PCRs: %v, %v", values, err)
			}
			var want []string
			for _, d := range values {
				want = append(want, fmt.Sprintf("10=%v", d))
			}
			slices.Sort(want)
			list, err := os.ReadFile(filepath.Join(s.dir, measure.LogName))
			if err != nil {
				t.Fatal(err)
			}
			if restarted {
				if err := s.close(); err != nil {
					t.Fatal(err)
				}
				s = newState(t, dir, "swtpm")
			}
			s.tree.config.Dir, s.tree.config.Archive = filepath.Join(dir, "boot"), filepath.Join(dir, "archive")
			s.tree.finish(ctx, s)
			folder := filepath.Join(dir, "archive", "boot-7-7")
			if got, err := os.ReadFile(filepath.Join(folder, ArchivedPCRs)); err != nil || !slices.Equal(strings.Fields(string(got)), want) {
				t.Errorf("values %q, %v; want %q", got, err, want)
			}
			if got, err := os.ReadFile(filepath.Join(folder, ArchivedList)); err != nil || string(got) != string(list) {
				t.Errorf("%d bytes of the list, %v; want %d", len(got), err, len(list))
			}
			if _, err := os.Stat(s.dir); !os.IsNotExist(err) {
				t.Errorf("the state stays: %v", err)
			}
		})
	}
}
