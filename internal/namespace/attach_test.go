package namespace

import (
	"errors"
	"os"
	"slices"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/vtpm"
)

// A namespace's list, whatever it had, goes over to the vTPM that it is given; the native list says so, and says when it ends.
func TestAttachTPM(t *testing.T) {
	for _, c := range []struct {
		name, swtpm string
		before      bool // there are entries
		keep        bool
	}{
		{"before the first entry", "swtpm", false, false},
		{"before the first entry without vTPMs of their own", "", false, true},
		{"in place of its own", "swtpm", true, false},
	} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t, c.swtpm)
			want := []string{imalog.BootAggregateName}
			if c.before {
				h.measure("/bin/first")
				want = append(want, "/bin/first")
			}
			a := h.given(1)
			a.Keep = c.keep
			h.attach(a)
			h.measure("/bin/later")
			want = append(want, "/bin/later")
			if r := h.verify(h.s.list, a.TPM, 10); r.Violations != 0 || !slices.Equal(h.names(), want) {
				t.Errorf("entries %v, want %v", h.names(), want)
			}
			b := h.bindings(1)[0]
			if b.ID != (binding.ID{Inum: 7, NSID: 7, Number: 1}) || b.AK != a.Binding.AK || b.PCR != 10 || b.Container != "c1" || b.End != nil {
				t.Errorf("binding %+v", b)
			}
			if err := h.tree.AttachTPM(t.Context(), h.s.ns, a); !errors.Is(err, ErrAttached) {
				t.Errorf("attached a second time: %v", err)
			}
			last, err := a.TPM.ReadPCR(t.Context(), 10)
			if err != nil {
				t.Fatal(err)
			}
			delete(h.tree.states, 7)
			h.tree.finish(soon(t), h.s)
			h.tree.finishing.Wait()
			e := h.bindings(1)[0].End
			if e == nil || e.Cause != binding.Ended || int(e.Entries) != len(want) || len(e.Values) != len(last) {
				t.Fatalf("end %+v", e)
			}
			for _, v := range e.Values {
				if last[v.Algo()] != v {
					t.Errorf("last value %v, the vTPM had %v", v, last[v.Algo()])
				}
			}
			dead(t, a.Instance.PID())
			gone(t, h.s.dir)
			if _, err := os.Stat(a.Config.Dir); (err == nil) != c.keep {
				t.Errorf("what the vTPM kept, to be kept %v: %v", c.keep, err)
			}
		})
	}
}

// The vTPM of the namespace's own ends, if it runs and if it is being started.
func TestAttachTPMEndsItsOwn(t *testing.T) {
	for name, swtpm := range map[string]string{"running": "swtpm", "being started": script(t, "exec sleep 60"), "not to be had": script(t, "exit 1")} {
		t.Run(name, func(t *testing.T) {
			h := newHost(t, swtpm)
			if err := h.s.begin(soon(t)); err != nil {
				t.Fatal(err)
			}
			if swtpm == "swtpm" {
				h.measure("/bin/first")
			}
			own, pid := h.s.vtpmConfig(), 0
			if i, err := vtpm.Adopt(own); err == nil {
				pid = i.PID()
				i.Close()
			}
			a, starting := h.given(1), h.s.starting
			h.attach(a)
			h.tree.finishing.Wait()
			select {
			case <-starting.done:
			default:
				t.Error("its own is still being started")
			}
			if h.s.starting != nil || h.s.swtpm != a.Instance || h.s.tpm != a.TPM {
				t.Error("the namespace does not have the vTPM that it was given")
			}
			if (pid != 0) != (swtpm == "swtpm") {
				t.Errorf("its own was process %d", pid)
			}
			dead(t, pid)
			gone(t, own.Dir)
			h.measure("/bin/later")
			h.verify(h.s.list, a.TPM, 10)
			if err := h.tree.recordUnanchored(soon(t)); err != nil || slices.ContainsFunc(h.names(), isLoss) {
				t.Errorf("entries %v, %v: its own is told as lost", h.names(), err)
			}
		})
	}
}

func isLoss(name string) bool { return strings.HasPrefix(name, lossPrefix) }

// A vTPM that was used is refused, and all is as it was.
func TestAttachTPMRefuses(t *testing.T) {
	for _, c := range []struct {
		name   string
		before bool
		pcr    int
	}{{"to a list", true, 10}, {"to a list by its boot_aggregate", true, 4}, {"before the first entry", false, 10}, {"before by its boot_aggregate", false, 4}} {
		t.Run(c.name, func(t *testing.T) {
			h := newHost(t, "swtpm")
			if c.before {
				h.measure("/bin/first")
			}
			a := h.given(1)
			var digests []ima.Digest
			for _, bank := range a.TPM.Banks() {
				digests = append(digests, ima.ZeroDigest(bank))
			}
			if err := a.TPM.Extend(t.Context(), c.pcr, digests); err != nil {
				t.Fatal(err)
			}
			if err := h.tree.AttachTPM(soon(t), h.s.ns, a); !errors.Is(err, measure.ErrForeign) {
				t.Fatalf("attach: %v", err)
			}
			if !a.Instance.Running() {
				t.Error("the caller's vTPM was ended")
			}
			h.bindings(0)
			h.measure("/bin/later") // with its own
			h.verify(h.s.list, h.s.starting.tpm, 10)
			h.restart("swtpm")
			if h.s.attached != nil || slices.ContainsFunc(h.names(), isLoss) {
				t.Errorf("after a restart: %+v, %v", h.s.attached, h.names())
			}
			h.verify(h.s.list, h.s.tpm, 10)
			// A number is not used twice.
			h.attach(h.given(2))
			h.bindings(1)
		})
	}
	h := newHost(t, "")
	h.measure("/bin/first")
	if err := h.tree.AttachTPM(soon(t), h.s.ns, h.given(1)); !errors.Is(err, measure.ErrForeign) {
		t.Errorf("a list that began without a TPM: %v", err)
	}
	if err := h.tree.AttachTPM(soon(t), h.tree.native.ns, Attachment{}); err == nil {
		t.Error("the native list was given a vTPM")
	}
	if err := h.tree.AttachTPM(soon(t), event.MountNS{Inum: 9, ID: 9}, Attachment{}); !errors.Is(err, ErrEnded) {
		t.Errorf("a namespace that is not there: %v", err)
	}
}

// An attaching that fails after the native list had it is taken back there too.
func TestAttachTPMWithdrawn(t *testing.T) {
	h := newHost(t, "swtpm")
	h.measure("/bin/first")
	own := h.s.starting.tpm
	a := h.given(1)
	a.Binding.ID, a.Binding.PCR = binding.ID{Inum: 7, NSID: 7, Number: 1}, 10
	buffer, err := a.Binding.Encode()
	if err != nil {
		t.Fatal(err)
	}
	h.s.given, h.s.attached = 1, &attached{Attachment: a, buffer: buffer}
	if err := errors.Join(h.s.writeRecord(), h.s.tellAttached(soon(t)), h.s.withdraw(false)); err != nil {
		t.Fatal(err)
	}
	if e := h.bindings(1)[0].End; e == nil || e.Cause != binding.Released || e.Entries != 0 || len(e.Values) != 0 {
		t.Errorf("end %+v", e)
	}
	h.measure("/bin/later")
	h.verify(h.s.list, own, 10)
	h.attach(h.given(2))
	if b := h.bindings(2)[1]; b.Number != 2 || b.End != nil {
		t.Errorf("binding %+v", b)
	}
}
