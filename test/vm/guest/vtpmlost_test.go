//go:build vm

package guest

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// later runs a program in a container that has not run there before, and finds it in the container's list.
const later = "printf '#!/bin/sh\n# later\n' >/tmp/later; chmod 755 /tmp/later; /tmp/later; grep -q /tmp/later /sys/kernel/security/ima/ascii_runtime_measurements"

// swtpmOf returns the process number of a container's vTPM.
func (a *agent) swtpmOf(folder string) string {
	a.t.Helper()
	return sh(a.t, fmt.Sprintf("pgrep -f '^swtpm:%s'", folder))
}

// A vTPM that dies takes its registers with it: its list says so, the native list says so, and both go on.
func TestVTPMDies(t *testing.T) {
	sample(t, "6.18")
	a := startAgent(t, "--namespaces", "all")
	useWrapper(t, a)
	c, other := startBundle(t, "runc", tenantRoot(t), "dies", nil), startBundle(t, "runc", tenantRoot(t), "lives", nil)
	b := startUnshared(t, 1, a.windowDir()) // with a vTPM of its own that is no container's
	b.sh("true")
	a.settled(b.ns())
	lost := "grep -q imans-lost/vtpm_lost /sys/kernel/security/ima/ascii_runtime_measurements"
	sh(t, "kill -9 "+a.swtpmOf(a.dir+"/state/containers/dies/"))
	sh(t, "kill -9 "+a.swtpmOf(fmt.Sprintf("%s/run/tpm/%s-", a.dir, b.ns())))
	c.eventually(lost)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if strings.Contains(a.cli("measurements", b.ns()), "imans-lost/vtpm_lost") {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("the list of %s does not say that its vTPM is lost", b.ns())
		}
	}
	if got := a.bindingOf("dies"); got.End == nil || got.End.Cause != "lost" {
		t.Errorf("binding %+v", got)
	}
	for _, c := range []*tenant{c, other} { // programs are measured as before
		c.sh("printf '#!/bin/sh\n# " + c.id + "\n' >/tmp/later; chmod 755 /tmp/later; /tmp/later; grep -q /tmp/later /sys/kernel/security/ima/ascii_runtime_measurements")
	}
	a.verifyNow(other.ns())
	if out := other.sh(ownTPM); !strings.Contains(out, "Matched per TPM bank") {
		t.Errorf("evmctl in the other container: %s", out)
	}
	if status, out := exits(t, program, "verify", a.write("list", a.cli("measurements", c.ns(), "--format", "binary")), "--ns", c.ns(), "--run-dir", a.dir+"/run"); status == 0 {
		t.Errorf("the list without a TPM verifies: %s", out)
	}
	a.removed(c)
	a.removed(other)
}

// A vTPM that hangs holds up nobody but its own list's extends, and goes on where it was.
func TestVTPMHangs(t *testing.T) {
	leave(t)
	a := startAgent(t, "--namespaces", "containers")
	useWrapper(t, a)
	c, other := startBundle(t, "runc", tenantRoot(t), "hangs", nil), startBundle(t, "runc", tenantRoot(t), "goes-on", nil)
	pid := a.swtpmOf(a.dir + "/state/containers/hangs/")
	sh(t, "kill -STOP "+pid)
	c.sh(later)
	other.sh(later)
	a.verifyNow(other.ns())
	third := startBundle(t, "runc", tenantRoot(t), "third", nil)
	a.verifyNow(third.ns())
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(time.Second) {
		n, err := a.client().Namespace(t.Context(), c.ns())
		if err == nil && n.State == "waiting" && n.Extended < n.Entries {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("while it hangs %d of %d entries are extended, state %s, %v", n.Extended, n.Entries, n.State, err)
		}
	}
	sh(t, "kill -CONT "+pid)
	a.verifyNow(c.ns())
	for _, c := range []*tenant{c, other, third} {
		a.removed(c)
	}
}
