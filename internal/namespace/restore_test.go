package namespace

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/measure"
)

// Logs that were removed come back, those of many lists in a few calls, none of which looks for all.
func TestRestoreLogsOfMany(t *testing.T) {
	dir := t.TempDir()
	tree := New(Config{Dir: dir, RunDir: filepath.Join(dir, "run"), Log: zap.NewNop()})
	const many = restoreMost + 50
	for id := range uint64(many) {
		s := active(tree, event.MountNS{Inum: 7, ID: id}, filepath.Join(dir, fmt.Sprint(id)), 10)
		if err := durable.Mkdir(s.dir); err != nil {
			t.Fatal(err)
		}
		if err := s.openList(soon(t), measure.Config{}); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.list.Close() })
		if err := os.RemoveAll(s.dir); err != nil {
			t.Fatal(err)
		}
		tree.states[id] = s
	}
	there := func() int {
		found, err := filepath.Glob(filepath.Join(dir, "*", measure.LogName))
		if err != nil {
			t.Fatal(err)
		}
		return len(found)
	}
	for before := 0; before < many; {
		tree.RestoreLogs()
		now := there()
		if now-before < 1 || now-before > restoreMost {
			t.Fatalf("a call restores %d logs", now-before)
		}
		before = now
	}
}
