package namespace

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"testing"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/need"
	"imans.dev/imans-agent/internal/policy"
	"imans.dev/imans-agent/internal/vtpm"
)

// newState makes an active namespace, without a kernel side, whose vTPM is started by that program.
func newState(t *testing.T, dir, program string) *State {
	t.Helper()
	tree := New(Config{RunDir: filepath.Join(dir, "run"), Swtpm: program, Log: zap.NewNop()})
	s := &State{
		tree: tree, ns: event.MountNS{Inum: 7, ID: 7}, parent: &State{}, dir: filepath.Join(dir, "ns"), pcr: 10, active: true,
		policy: &policy.Policy{}, template: imalog.NG, algo: ima.SHA256, gone: make(chan struct{}),
	}
	tree.states[s.ns.ID] = s
	return s
}

// script makes a program that stands in swtpm's place.
func script(t *testing.T, text string) string {
	t.Helper()
	path := filepath.Join(t.TempDir(), "swtpm")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n"+text+"\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	return path
}

func soon(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	return ctx
}

// A list is there before its vTPM; the vTPM gets all of it, and a restart finds both.
func TestListBeforeItsVTPM(t *testing.T) {
	need.Program(t, "swtpm")
	dir := t.TempDir()
	s := newState(t, dir, "swtpm")
	ctx := soon(t)
	if err := s.begin(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.appendViolation("first", event.LossReadError); err != nil {
		t.Fatal(err)
	}
	if err := s.list.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	if st := s.list.Status(); st.Extended != 2 || st.Fatal != nil || st.TPMError != nil {
		t.Errorf("status %+v", st)
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	s = newState(t, dir, "swtpm")
	if err := s.open(ctx); err != nil || s.starting != nil || s.tpm == nil {
		t.Fatalf("adopted: %v", err)
	}
	if st := s.list.Status(); st.Entries != 2 || st.Extended != 2 {
		t.Errorf("status after a restart %+v", st)
	}
	if err := s.end(); err != nil {
		t.Fatal(err)
	}
}

// An end in the middle of the start waits for nobody, and the next agent starts the vTPM.
func TestEndWhileVTPMStarts(t *testing.T) {
	need.Program(t, "swtpm")
	dir := t.TempDir()
	s := newState(t, dir, script(t, "exec sleep 60"))
	ctx := soon(t)
	began := time.Now()
	if err := s.begin(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("it took %v", d)
	}
	if err := s.tree.recordUnanchored(ctx); err != nil || len(s.tree.unanchored) != 0 {
		t.Errorf("a start that was ended counts as a loss: %v", err)
	}
	s = newState(t, dir, "swtpm")
	if err := s.begin(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.list.Settle(ctx); err != nil {
		t.Fatal(err)
	}
	if st := s.list.Status(); st.Entries != 1 || st.Extended != 1 {
		t.Errorf("status %+v", st)
	}
	if err := s.end(); err != nil {
		t.Fatal(err)
	}
}

// A vTPM that does not come is a violation in the list, which goes on.
func TestVTPMThatDoesNotCome(t *testing.T) {
	s := newState(t, t.TempDir(), script(t, "echo no TPM today >&2; exit 1"))
	ctx := soon(t)
	if err := s.begin(ctx); err != nil {
		t.Fatal(err)
	}
	if err := s.list.Settle(ctx); err != nil { // waits until the start has failed
		t.Fatal(err)
	}
	<-s.starting.done
	if err := s.tree.recordUnanchored(ctx); err != nil {
		t.Fatal(err)
	}
	if st := s.list.Status(); st.Entries != 2 || st.Violations != 1 || st.TPMError == nil || st.Fatal != nil {
		t.Errorf("status %+v", st)
	}
	if err := s.end(); err != nil {
		t.Fatal(err)
	}
}

// A list that began without a vTPM gets none later.
func TestListThatBeganWithoutVTPM(t *testing.T) {
	dir := t.TempDir()
	s := newState(t, dir, "")
	if err := s.begin(soon(t)); err != nil {
		t.Fatal(err)
	}
	if err := s.close(); err != nil {
		t.Fatal(err)
	}
	s = newState(t, dir, "swtpm")
	if _, err := s.adoptTPM(soon(t)); !errors.Is(err, vtpm.ErrLost) {
		t.Errorf("adopt: %v", err)
	}
	if _, err := os.Stat(filepath.Join(s.dir, measure.LogName)); err != nil {
		t.Error(err)
	}
}
