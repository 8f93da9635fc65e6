//go:build vm

package guest

import (
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
)

// asksVTPM is what a pod says whose containers want a vTPM.
func asksVTPM() map[string]string { return map[string]string{"imans.dev/vtpm": "true"} }

// Kubernetes' containers get what their pods ask for, while containerd and the agent come and go.
func TestVTPMNRI(t *testing.T) {
	leave(t)
	k := newKubelet(t)
	a := newAgent(t, "--namespaces", "containers", "--nri", k.nri(), "--nri-namespace", "chosen")
	policies := a.dir + "/policies"
	sh(t, fmt.Sprintf("mkdir -p %[1]s && echo 'measure func=BPRM_CHECK fowner=7' >%[1]s/mine", policies))
	a.args = append(a.args, "--policy-dir", policies)
	a.start() // before there is a runtime
	k.start()
	k.image(tenantRoot(t))
	k.connected()

	asks := k.pod("asks", "default", asksVTPM())
	asks.sh("printf '#!/bin/sh\n' >/tmp/own; chmod 755 /tmp/own; /tmp/own")
	if out := asks.sh(ownTPM); !strings.Contains(out, "Matched per TPM bank") {
		t.Errorf("evmctl inside: %s", out)
	}
	if got := asks.sh("head -n 1 /sys/kernel/security/ima/ascii_runtime_measurements | cut -d ' ' -f 5; grep -c dash /sys/kernel/security/ima/ascii_runtime_measurements"); got != "boot_aggregate\n1" {
		t.Errorf("first entry, the container's first program: %q", got)
	}
	ns := fmt.Sprint(mountNS(t, asks.pid))
	a.verifyNow(ns)
	if b := a.bindingOf(asks.id); b.End != nil || !strings.HasPrefix(b.Namespace, ns+":") || b.Way != "proxy" || len(b.AK) != 68 {
		t.Errorf("binding %+v", b)
	}
	hasTPM(t, k.pod("plain", "default", nil), false)

	k.stop()
	k.start()
	k.connected()
	named := k.pod("named", "chosen", map[string]string{"imans.dev/policy": "mine"})
	hasTPM(t, named, true)
	if got := strings.TrimSpace(a.cli("policy", "show", fmt.Sprint(mountNS(t, named.pid)))); got != "measure func=BPRM_CHECK fowner=7" {
		t.Errorf("the policy is %q", got)
	}

	a.signal(syscall.SIGTERM)
	k.disconnected()
	k.remove("named")
	hasTPM(t, k.pod("without", "default", asksVTPM()), false)
	needs := asksVTPM()
	needs["required-plugins.noderesource.dev"] = "[imans]"
	if c, err := k.run("needs", "default", needs); err == nil {
		t.Errorf("container %s is created without the agent, which its pod says it needs", c)
	} else if !strings.Contains(err.Error(), "imans") {
		t.Errorf("a container that needs the agent: %v", err)
	}
	a.start()
	k.connected()
	a.removed(named)
	asks.sh("/tmp/own; tpm2_getrandom -T device:/dev/tpmrm0 --hex 8")
	a.verifyNow(ns)

	k.removeAll()
	a.removed(asks)
	if b := a.bindingOf(asks.id); b.End == nil || b.End.Cause != "ended" || b.End.Entries < 3 {
		t.Errorf("binding at the end %+v", b)
	}
	noVTPMs(t)
	if left, _ := os.ReadDir(a.dir + "/state/containers"); len(left) > 0 {
		t.Errorf("containers left: %v", left)
	}
}

// hasTPM checks whether a container has a TPM, which then answers.
func hasTPM(t *testing.T, c *tenant, want bool) {
	t.Helper()
	devices := ""
	if want {
		devices = "tpm0\ntpmrm0"
		c.sh("tpm2_getrandom -T device:/dev/tpmrm0 --hex 8")
	}
	if got := c.sh("ls /dev | grep '^tpm' || true"); got != devices {
		t.Errorf("container %s has the devices %q, want %q", c.id, got, devices)
	}
}
