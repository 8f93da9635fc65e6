package measure

import (
	"errors"
	"io"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"testing"

	"imans.dev/imans-agent/internal/durable"
)

// TestRemovedLogIsWrittenAnew: with its folder, while entries come and somebody reads.
func TestRemovedLogIsWrittenAnew(t *testing.T) {
	b := newBench(t)
	l, _ := b.open(b.config())
	for i := range 10 {
		l.Append(entry(t, i))
	}
	await(t, l.Settle)
	if restored, err := l.Restore(); restored || err != nil {
		t.Errorf("a log that is there: restored %v, %v", restored, err)
	}
	before := l.Snapshot()
	if err := os.RemoveAll(b.dir); err != nil {
		t.Fatal(err)
	}
	await(t, l.Append(entry(t, 10)).Extended)
	if restored, err := l.Restore(); !restored || err != nil {
		t.Fatalf("restored %v, %v", restored, err)
	}
	old, err := io.ReadAll(before)
	if err != nil || len(old) == 0 {
		t.Errorf("who read before: %d bytes, %v", len(old), err)
	}
	await(t, l.Append(entry(t, 11)).Extended)
	if names := b.check(); len(names) != 13 {
		t.Errorf("entries %v", names)
	}
	path := filepath.Join(b.dir, LogName)
	if _, err := durable.OpenLog(path); !errors.Is(err, durable.ErrLocked) {
		t.Errorf("the new log is not locked: %v", err)
	}
	if err := os.Rename(path, path+".moved"); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte("another"), 0o600); err != nil {
		t.Fatal(err)
	}
	if restored, err := l.Restore(); restored || err == nil || !strings.Contains(err.Error(), "move it away") {
		t.Errorf("with another file in its place: restored %v, %v", restored, err)
	}
	if err := os.Remove(path); err != nil {
		t.Fatal(err)
	}
	if restored, err := l.Restore(); !restored || err != nil {
		t.Errorf("moved away: restored %v, %v", restored, err)
	}
	l.Close()
	l, r := b.open(b.config())
	if r.Entries != 13 || r.Unextended != 0 {
		t.Errorf("recovered %+v", r)
	}
	l.Close()
}

// TestRestoreFalters: the disk takes nothing, or the folder can't be made: the list goes on as it was, and the next try succeeds.
func TestRestoreFalters(t *testing.T) {
	b := newBench(t)
	l, _ := b.open(b.config())
	defer l.Close()
	await(t, l.Append(entry(t, 1)).Extended)
	if err := os.RemoveAll(b.dir); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(b.dir, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	if restored, err := l.Restore(); restored || err == nil || errors.Is(err, syscall.ENOENT) {
		t.Errorf("with a file in place of the folder: restored %v, %v", restored, err)
	}
	await(t, l.Append(entry(t, 2)).Extended)
	if err := os.Remove(b.dir); err != nil {
		t.Fatal(err)
	}
	if restored, err := l.Restore(); !restored || err != nil {
		t.Errorf("restored %v, %v", restored, err)
	}
	if names := b.check(); len(names) != 3 {
		t.Errorf("entries %v", names)
	}
}
