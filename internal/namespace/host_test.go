package namespace

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/need"
	"imans.dev/imans-agent/internal/policy"
	"imans.dev/imans-agent/internal/tpmext"
	"imans.dev/imans-agent/internal/tpmext/tpmtest"
	"imans.dev/imans-agent/internal/verify"
	"imans.dev/imans-agent/internal/vtpm"
)

// host is a native list with a real swtpm for its TPM, and one namespace below it. begin is an agent's start, close its end.
type host struct {
	t      *testing.T
	dir    string
	native *tpmext.TPM
	tree   *Tree
	s      *State
	trees  []*Tree // all that are not closed; an agent that crashed closes nothing
}

func newHost(t *testing.T, swtpm string) *host {
	t.Helper()
	need.Program(t, "swtpm")
	tpm, err := tpmext.Open(t.Context(), tpmtest.Start(t).Address())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tpm.Close() })
	h := &host{t: t, dir: t.TempDir(), native: tpm}
	h.begin(swtpm)
	t.Cleanup(func() { // whatever is left
		if i, err := vtpm.Adopt(h.s.vtpmConfig()); err == nil {
			i.Stop()
		}
		for _, s := range h.tree.states {
			if s.parent != nil {
				s.end()
			}
		}
		h.tree.finishing.Wait()
		for _, tree := range h.trees {
			for _, s := range tree.states {
				if s.list != nil {
					s.list.Close()
				}
			}
		}
	})
	return h
}

// begin makes the tree as an agent does that finds what an earlier one left.
func (h *host) begin(swtpm string) {
	h.t.Helper()
	h.tree = New(Config{Dir: h.dir, RunDir: filepath.Join(h.dir, "run"), Swtpm: swtpm, Log: zap.NewNop()})
	h.tree.again, h.trees = true, append(h.trees, h.tree)
	native := active(h.tree, event.MountNS{Inum: 1, ID: 1}, filepath.Join(h.dir, "native"), 11)
	if err := durable.Mkdir(native.dir); err != nil {
		h.t.Fatal(err)
	}
	if err := native.openList(soon(h.t), measure.Config{TPM: h.native}); err != nil {
		h.t.Fatal(err)
	}
	h.tree.native, h.tree.states[1] = native, native
	h.s = active(h.tree, event.MountNS{Inum: 7, ID: 7}, filepath.Join(h.tree.nsDir(), "7-7"), 10)
	h.s.parent = native
	h.tree.states[7] = h.s
	left, err := leftStates(h.tree.nsDir())
	if err != nil {
		h.t.Fatal(err)
	}
	if f, ok := left[h.s.ns]; ok {
		if err := h.s.restore(f); err != nil {
			h.t.Fatal(err)
		}
		if err := h.s.open(soon(h.t)); err != nil {
			h.t.Fatal(err)
		}
	}
}

// active is an active namespace with an empty policy.
func active(tree *Tree, ns event.MountNS, dir string, pcr int) *State {
	return &State{
		tree: tree, ns: ns, dir: dir, pcr: pcr, active: true, policy: &policy.Policy{}, template: imalog.NG, algo: ima.SHA256,
		gone: make(chan struct{}),
	}
}

// restart ends the agent and starts the next one.
func (h *host) restart(swtpm string) {
	h.t.Helper()
	if err := h.tree.Close(); err != nil {
		h.t.Fatal(err)
	}
	h.trees = slices.DeleteFunc(h.trees, func(tree *Tree) bool { return tree == h.tree })
	h.begin(swtpm)
}

func keyName(c string) binding.Name { return binding.Name("\x00\x0b" + strings.Repeat(c, 32)) }

// given starts the n-th vTPM for the namespace, as a runtime's integration does.
func (h *host) given(n int) Attachment {
	h.t.Helper()
	c := vtpm.Config{
		Program: "swtpm", Dir: filepath.Join(h.dir, "pool", fmt.Sprint(n)), Socket: filepath.Join(h.dir, "run", "pool", fmt.Sprint(n)),
	}
	instance, err := vtpm.Start(soon(h.t), c)
	if err != nil {
		h.t.Fatal(err)
	}
	tpm, err := tpmext.Open(soon(h.t), instance.Address())
	if err != nil {
		h.t.Fatal(errors.Join(err, instance.Stop()))
	}
	h.t.Cleanup(func() { // if the test left it
		if i, err := vtpm.Adopt(c); err == nil {
			i.Stop()
		}
	})
	return Attachment{TPM: tpm, Instance: instance, Config: c, Binding: binding.Attach{
		TPM: binding.TPM20, Way: binding.Proxy, Container: "c1", Image: "alpine", EK: keyName("e"), AK: keyName(fmt.Sprint(n)),
	}}
}

func (h *host) attach(a Attachment) {
	h.t.Helper()
	if err := h.tree.AttachTPM(soon(h.t), h.s.ns, a); err != nil {
		h.t.Fatal(err)
	}
}

// measure appends an entry to the namespace's list and waits until its TPM has it.
func (h *host) measure(name string) {
	h.t.Helper()
	if err := h.s.begin(soon(h.t)); err != nil {
		h.t.Fatal(err)
	}
	e, err := imalog.NewEntry(10, imalog.NG, imalog.FieldValues{Digest: ima.ZeroDigest(ima.SHA256), Name: name})
	if err != nil {
		h.t.Fatal(err)
	}
	if err := h.s.list.Append(e).Extended(soon(h.t)); err != nil {
		h.t.Fatal(err)
	}
}

// verify holds a list against a TPM, which must have all of it.
func (h *host) verify(l *measure.List, tpm *tpmext.TPM, pcr int) verify.Result {
	h.t.Helper()
	if err := l.Settle(soon(h.t)); err != nil {
		h.t.Fatal(err)
	}
	held, err := tpm.ReadPCR(h.t.Context(), pcr)
	if err != nil {
		h.t.Fatal(err)
	}
	r, err := verify.List(l.Snapshot(), verify.Options{PCRs: map[int]map[ima.HashAlgo]ima.Digest{pcr: held}})
	if err := errors.Join(err, r.Err()); err != nil || r.Proven.Entries != r.Entries {
		h.t.Fatalf("%d of %d entries are proven, %v", r.Proven.Entries, r.Entries, err)
	}
	return r
}

// bindings returns what the native list proves of vTPMs.
func (h *host) bindings(want int) []verify.Binding {
	h.t.Helper()
	r := h.verify(h.tree.native.list, h.native, 11)
	if len(r.Bindings) != want {
		h.t.Fatalf("%d bindings, want %d: %+v", len(r.Bindings), want, r.Bindings)
	}
	return r.Bindings
}

func (h *host) names() []string {
	h.t.Helper()
	return names(h.t, h.s.list)
}

func names(t *testing.T, l *measure.List) []string {
	t.Helper()
	var names []string
	for r := imalog.NewReader(l.Snapshot(), ima.SHA1); ; {
		e, err := r.Next()
		if err != nil {
			return names
		}
		names = append(names, e.Name())
	}
}

func gone(t *testing.T, path string) {
	t.Helper()
	if _, err := os.Stat(path); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("%s is still there: %v", path, err)
	}
}

// dead checks that a process has ended.
func dead(t *testing.T, pid int) {
	t.Helper()
	for ctx := soon(t); alive(uint32(pid)); time.Sleep(time.Millisecond) {
		if ctx.Err() != nil {
			t.Errorf("process %d is still there", pid)
			return
		}
	}
}
