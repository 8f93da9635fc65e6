package namespace

import (
	"errors"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// closer notes when it was closed.
type closer struct{ close func() error }

func (c closer) Close() error { return c.close() }

// A vTPM that dies is noticed once, its list goes on without, and of one that was given the native list says that it is lost.
func TestLostTPMs(t *testing.T) {
	for name, given := range map[string]bool{"its own": false, "one that it was given": true} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, "swtpm")
			h.measure("/bin/first")
			if given {
				h.attach(h.given(1))
				h.measure("/bin/second")
			}
			h.tree.LostTPMs(soon(t))
			if slices.ContainsFunc(h.names(), isLoss) {
				t.Fatalf("nothing is lost, entries %v", h.names())
			}
			pid := h.s.swtpm.PID()
			if err := unix.Kill(pid, unix.SIGKILL); err != nil {
				t.Fatal(err)
			}
			dead(t, pid)
			for range 2 {
				h.tree.LostTPMs(soon(t))
			}
			h.tree.finishing.Wait()
			e, err := imalog.NewEntry(10, imalog.NG, imalog.FieldValues{Digest: ima.ZeroDigest(ima.SHA256), Name: "/bin/later"})
			if err != nil {
				t.Fatal(err)
			}
			if err := h.s.list.Append(e).Logged(soon(t)); err != nil {
				t.Fatal(err)
			}
			names := h.names()
			if n := len(names); n < 2 || !isLoss(names[n-2]) || names[n-1] != "/bin/later" || slices.ContainsFunc(names[:n-2], isLoss) {
				t.Errorf("entries %v", names)
			}
			if h.s.tpm != nil || h.s.swtpm != nil || h.s.attached != nil || h.s.starting != nil {
				t.Error("the namespace still has a vTPM")
			}
			if given {
				if b := h.bindings(1)[0]; b.End == nil || b.End.Cause != binding.Lost || len(b.End.Values) > 0 {
					t.Errorf("binding %+v", b)
				}
			}
			gone(t, h.s.vtpmConfig().Dir)
			h.restart("swtpm")
			if h.s.swtpm != nil || h.s.starting != nil {
				t.Error("another vTPM pretends to be the old one after a restart")
			}
		})
	}
}

// What shares a vTPM ends after the agent's own use of it, and before the vTPM does, which can then be shut down.
func TestShareEndsBeforeTheTPM(t *testing.T) {
	for name, end := range map[string]func(*host) error{
		"released": func(h *host) error {
			return errors.Join(h.tree.ReleaseTPM(soon(h.t), h.s.ns, binding.Released), h.s.list.Close())
		},
		"ended":  func(h *host) error { delete(h.tree.states, 7); h.tree.finish(soon(h.t), h.s); return nil },
		"closed": func(h *host) error { return h.tree.Close() },
	} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, "")
			a, closed := h.given(1), 0
			a.Share = closer{func() error {
				closed++
				if _, err := a.TPM.ReadPCR(t.Context(), 10); err == nil {
					t.Error("the agent is still connected")
				}
				if !a.Instance.Running() {
					t.Error("the vTPM has ended before")
				}
				return nil
			}}
			h.attach(a)
			h.measure("/bin/first")
			if err := end(h); err != nil {
				t.Fatal(err)
			}
			h.tree.finishing.Wait()
			delete(h.tree.states, 7)
			if closed != 1 {
				t.Errorf("closed %d times", closed)
			}
		})
	}
}
