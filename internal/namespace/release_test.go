package namespace

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"testing"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/vtpm"
)

// The next agent finds the vTPM again, whether the one before it was done with attaching or not.
func TestAttachedTPMAfterRestart(t *testing.T) {
	for _, crashed := range []string{"", "after the record", "after the native list", "after going over"} {
		t.Run("crashed "+crashed, func(t *testing.T) {
			h := newHost(t, "swtpm")
			h.measure("/bin/first")
			own := h.s.vtpmConfig()
			a := h.given(1)
			if crashed == "" {
				h.attach(a)
			} else {
				h.attachInPart(a, crashed)
			}
			h.restart("swtpm")
			if h.s.tpm == nil || h.s.attached == nil {
				t.Fatal("the vTPM was not adopted")
			}
			h.measure("/bin/later")
			if h.verify(h.s.list, h.s.tpm, 10); len(h.names()) != 3 {
				t.Errorf("entries %v", h.names())
			}
			if b := h.bindings(1)[0]; b.End != nil || b.AK != a.Binding.AK {
				t.Errorf("binding %+v", b)
			}
			gone(t, own.Dir)
			if configs, err := LeftAttached(h.dir); err != nil || !slices.Equal(configs, []vtpm.Config{a.Config}) {
				t.Errorf("left: %+v, %v", configs, err)
			}
			delete(h.tree.states, 7)
			h.tree.finish(soon(t), h.s)
			if e := h.bindings(1)[0].End; e == nil || e.Cause != binding.Ended || e.Entries != 3 {
				t.Errorf("end %+v", e)
			}
		})
	}
}

// attachInPart does what an agent does that dies in the middle of attaching.
func (h *host) attachInPart(a Attachment, until string) {
	h.t.Helper()
	a.Binding.ID, a.Binding.PCR = binding.ID{Inum: 7, NSID: 7, Number: 1}, 10
	buffer, err := a.Binding.Encode()
	if err != nil {
		h.t.Fatal(err)
	}
	h.s.given, h.s.attached = 1, &attached{Attachment: a, buffer: buffer}
	steps := []func(context.Context) error{
		func(context.Context) error { return h.s.writeRecord() },
		h.s.tellAttached,
		func(ctx context.Context) error { _, err := h.s.list.Anchor(ctx, a.TPM); return err },
	}
	n := 1 + slices.Index([]string{"after the record", "after the native list", "after going over"}, until)
	for _, step := range steps[:n] {
		if err := step(soon(h.t)); err != nil {
			h.t.Fatal(err)
		}
	}
	if err := a.TPM.Close(); err != nil && until != "after going over" {
		h.t.Fatal(err)
	}
}

// A vTPM that died is told as lost, once, and the list goes on without.
func TestAttachedTPMIsLost(t *testing.T) {
	for _, swtpm := range []string{"swtpm", ""} {
		t.Run("own "+swtpm, func(t *testing.T) {
			h := newHost(t, swtpm)
			a := h.given(1)
			h.attach(a)
			h.measure("/bin/first")
			i, err := vtpm.Adopt(a.Config)
			if err == nil {
				err = i.Stop()
			}
			if err != nil {
				t.Fatal(err)
			}
			for range 2 {
				h.restart(swtpm)
				if h.s.attached != nil || h.s.tpm != nil || h.s.list.Status().Violations == 0 {
					t.Errorf("attached %v, entries %v", h.s.attached, h.names())
				}
				if e := h.bindings(1)[0].End; e == nil || e.Cause != binding.Lost || len(e.Values) != 0 {
					t.Errorf("end %+v", e)
				}
			}
			h.tree.finishing.Wait()
			gone(t, a.Config.Dir)
		})
	}
}

// A vTPM that is released ends, both lists say so, and the list may be given another.
func TestReleaseTPM(t *testing.T) {
	for _, cause := range []binding.Cause{binding.Released, binding.Lost, binding.Replaced} {
		t.Run(cause.String(), func(t *testing.T) {
			h := newHost(t, "swtpm")
			if err := h.tree.ReleaseTPM(soon(t), h.s.ns, cause); !errors.Is(err, ErrNotAttached) {
				t.Errorf("released none: %v", err)
			}
			first := h.given(1)
			h.attach(first)
			h.measure("/bin/first")
			last, err := first.TPM.ReadPCR(t.Context(), 10)
			if err != nil {
				t.Fatal(err)
			}
			if err := h.tree.ReleaseTPM(soon(t), h.s.ns, binding.Ended); err == nil {
				t.Error("a caller ended the namespace")
			}
			if err := h.tree.ReleaseTPM(soon(t), h.s.ns, cause); err != nil {
				t.Fatal(err)
			}
			h.tree.finishing.Wait()
			gone(t, first.Config.Dir)
			dead(t, first.Instance.PID())
			e := h.bindings(1)[0].End
			if e == nil || e.Cause != cause || e.Entries != 2 {
				t.Fatalf("end %+v", e)
			}
			if want := slices.Sorted(maps.Keys(last)); cause != binding.Lost && (len(e.Values) != len(want) || e.Values[0] != last[want[0]]) {
				t.Errorf("last values %v, want %v", e.Values, last)
			}
			if lost := slices.ContainsFunc(h.names(), isLoss); lost == (cause == binding.Replaced) {
				t.Errorf("entries %v", h.names())
			}
			second := h.given(2)
			h.attach(second)
			h.measure("/bin/later")
			h.verify(h.s.list, second.TPM, 10)
			if b := h.bindings(2)[1]; b.Number != 2 || b.End != nil {
				t.Errorf("binding %+v", b)
			}
		})
	}
}

// An end that was decided is told by the next agent, as it was decided and once.
func TestCrashBeforeTheEndIsTold(t *testing.T) {
	for _, cause := range []binding.Cause{binding.Ended, binding.Released} {
		for _, told := range []bool{false, true} {
			t.Run(fmt.Sprintf("%v and told %v", cause, told), func(t *testing.T) {
				h := newHost(t, "swtpm")
				a := h.given(1)
				h.attach(a)
				h.measure("/bin/first")
				if err := h.s.decideEnd(soon(t), cause, 2); err != nil {
					t.Fatal(err)
				}
				if told {
					if err := h.tree.tellEnd(soon(t), h.s.attached.end); err != nil {
						t.Fatal(err)
					}
				}
				decided := bytes.Clone(h.s.attached.end)
				h.restart("swtpm")
				delete(h.tree.states, 7)
				h.tree.finish(soon(t), h.s)
				h.tree.finishing.Wait()
				end := h.bindings(1)[0].End
				if end == nil {
					t.Fatal("no end")
				}
				if b, err := end.End.Encode(); err != nil || !bytes.Equal(b, decided) {
					t.Errorf("end %+v, %v", end, err)
				}
				gone(t, h.s.dir)
				gone(t, a.Config.Dir)
				dead(t, a.Instance.PID())
			})
		}
	}
}

// A namespace that ends with a vTPM that died is told so.
func TestEndWithLostTPM(t *testing.T) {
	h := newHost(t, "swtpm")
	a := h.given(1)
	h.attach(a)
	h.measure("/bin/first")
	i, err := vtpm.Adopt(a.Config)
	if err == nil {
		err = i.Stop()
	}
	if err != nil {
		t.Fatal(err)
	}
	delete(h.tree.states, 7)
	h.tree.finish(soon(t), h.s)
	if e := h.bindings(1)[0].End; e == nil || e.Cause != binding.Lost || e.Entries != 2 {
		t.Errorf("end %+v", e)
	}
	gone(t, h.s.dir)
}

// An agent that ends while a namespace does leaves the end of its vTPM to the next one.
func TestEndWhileAgentEnds(t *testing.T) {
	h := newHost(t, "swtpm")
	a := h.given(1)
	h.attach(a)
	h.measure("/bin/first")
	if err := h.tree.native.list.Close(); err != nil {
		t.Fatal(err)
	}
	h.tree.finish(soon(t), h.s)
	if _, err := os.Stat(h.s.dir); err != nil || !alive(uint32(a.Instance.PID())) {
		t.Fatalf("ended before the native list says so: %v", err)
	}
	h.begin("swtpm")
	delete(h.tree.states, 7)
	h.tree.finish(soon(t), h.s)
	if e := h.bindings(1)[0].End; e == nil || e.Cause != binding.Ended || e.Entries != 2 {
		t.Errorf("end %+v", e)
	}
	dead(t, a.Instance.PID())
	gone(t, h.s.dir)
}
