//go:build vm

package guest

import (
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"
)

// socketTPM is ownTPM for who reaches the TPM by socket.
var socketTPM = strings.Replace(ownTPM, "device:/dev/tpmrm0", socketTCTI, 1)

const socketTCTI = "swtpm:host=127.0.0.1,port=2321"

// withoutProxy takes the vTPM proxy driver away for the test.
func withoutProxy(t *testing.T) {
	t.Helper()
	sh(t, "modprobe -r tpm_vtpm_proxy && [ ! -e /dev/vtpmx ]")
	t.Cleanup(func() { exec.Command("modprobe", "tpm_vtpm_proxy").Run() })
}

// plain is the spec of a container that has nothing to do with us.
func plain(spec map[string]any) {
	spec["annotations"] = map[string]string{"imans.dev/vtpm": "false"}
}

// eventually waits until a line of shell in the container succeeds.
func (c *tenant) eventually(line string) {
	c.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		out, err := exec.Command(c.exec[0], append(c.exec[1:len(c.exec):len(c.exec)], "/bin/sh", "-c", line)...).CombinedOutput()
		if err == nil {
			return
		} else if time.Now().After(deadline) {
			c.t.Fatalf("in container %s: %s: %v\n%s", c.id, line, err, out)
		}
	}
}

func (c *tenant) ns() string { return fmt.Sprint(mountNS(c.t, c.pid)) }

// Without the driver containers reach their vTPM by socket: one that is created, and one that was running already.
func TestVTPMSocket(t *testing.T) {
	sample(t, "6.12")
	withoutProxy(t)
	a := startAgent(t, "--namespaces", "containers")
	useWrapper(t, a)
	created := startBundle(t, "runc", tenantRoot(t), "created", nil)
	if got := created.sh("ls /dev | grep -c '^tpm' || true; tr '\\0' '\\n' </proc/1/environ | grep TPM2TOOLS_TCTI"); got != "0\nTPM2TOOLS_TCTI="+socketTCTI {
		t.Errorf("devices, the first program's environment: %q", got)
	}
	running := startBundle(t, "crun", tenantRoot(t), "running", plain)
	if out := a.cli("vtpm", "attach", running.ns()); !strings.Contains(out, "export TPM2TOOLS_TCTI="+socketTCTI+"\n") {
		t.Errorf("vtpm attach says %q", out)
	}
	sh(t, "imans-agent ns window "+running.ns()+" --run-dir "+a.dir+"/run")
	if status, out := exits(t, program, "vtpm", "attach", running.ns(), "--run-dir", a.dir+"/run"); status == 0 || !strings.Contains(out, "release that first") {
		t.Errorf("a second one: exit status %d: %s", status, out)
	}
	values := map[string]bool{}
	for _, c := range []*tenant{created, running} {
		c.sh("printf '#!/bin/sh\n# " + c.id + "\n' >/tmp/own; chmod 755 /tmp/own; /tmp/own")
		out := c.sh(socketTPM)
		if !strings.Contains(out, "Matched per TPM bank") {
			t.Errorf("evmctl in %s: %s", c.id, out)
		}
		_, register, _ := strings.Cut(out, "PCR-10: ")
		values[register] = true
		c.sh("export TPM2TOOLS_TCTI=" + socketTCTI + "; ! tpm2_pcrextend 10:sha256=" + strings.Repeat("5a", 32) + " 2>/dev/null && ! tpm2_clear 2>/dev/null && tpm2_pcrreset 16")
		if b := a.bindingOf(c.id); b.End != nil || b.Way != "socket" || !strings.HasPrefix(b.Namespace, c.ns()+":") {
			t.Errorf("binding %+v", b)
		}
		a.verifyNow(c.ns())
	}
	if len(values) != 2 {
		t.Errorf("both containers have the PCR 10 %v", values)
	}
	sh(t, "! (exec 3<>/dev/tcp/127.0.0.1/2321) 2>/dev/null") // only the containers' own networks lead there

	a.signal(syscall.SIGKILL)
	a.start()
	for _, c := range []*tenant{created, running} {
		c.eventually("TPM2TOOLS_TCTI=" + socketTCTI + " tpm2_getrandom --hex 8")
		if out := c.sh(socketTPM); !strings.Contains(out, "Matched per TPM bank") {
			t.Errorf("evmctl in %s after a restart of the agent: %s", c.id, out)
		}
	}

	ns := running.ns()
	a.cli("vtpm", "release", ns)
	if b := a.bindingOf(running.id); b.End == nil || b.End.Cause != "released" || b.End.Entries < 3 {
		t.Errorf("binding after the release: %+v", b)
	}
	running.sh("grep -q imans-lost/vtpm_lost /sys/kernel/security/ima/ascii_runtime_measurements; ! TPM2TOOLS_TCTI=" + socketTCTI + " tpm2_getrandom 8 2>/dev/null")
	a.cli("vtpm", "attach", ns) // it gets the whole list, what was said of the first one's end included
	running.sh("TPM2TOOLS_TCTI=" + socketTCTI + " tpm2_getrandom 8 >/tmp/random")
	a.verifyNow(ns)
	a.removed(created)
	sh(t, strings.Join(running.end, " "))
	sh(t, fmt.Sprintf("for i in $(seq 600); do [ -z \"$(ls %s/state/containers; pgrep swtpm)\" ] && exit 0; sleep 0.2; done; ls %[1]s/state/containers; exit 1", a.dir))
}

// Whoever has the host's network can't have a TPM by socket: others would reach it.
func TestVTPMSocketRefused(t *testing.T) {
	sample(t, "6.1")
	withoutProxy(t)
	a := startAgent(t, "--namespaces", "containers")
	useWrapper(t, a)
	onHostNetwork := func(annotations map[string]string) func(map[string]any) {
		return func(spec map[string]any) {
			linux := spec["linux"].(map[string]any)
			var kept []any
			for _, n := range linux["namespaces"].([]any) {
				if n.(map[string]any)["type"] != "network" {
					kept = append(kept, n)
				}
			}
			linux["namespaces"] = kept
			spec["annotations"] = annotations
		}
	}
	c := startBundle(t, "runc", tenantRoot(t), "host-network", onHostNetwork(nil))
	status, out := exits(t, program, "vtpm", "attach", c.ns(), "--run-dir", a.dir+"/run")
	if status == 0 || !strings.Contains(out, "the host's network namespace") {
		t.Errorf("attach: exit status %d: %s", status, out)
	}
	for name, want := range map[string]string{"native": "TPM of --tpm", "1": "no namespace"} {
		if status, out := exits(t, program, "vtpm", "attach", name, "--run-dir", a.dir+"/run"); status == 0 || !strings.Contains(out, want) {
			t.Errorf("attach %s: exit status %d: %s", name, status, out)
		}
	}
	if status, out := exits(t, program, "vtpm", "release", c.ns(), "--run-dir", a.dir+"/run"); status == 0 || !strings.Contains(out, "attach one first") {
		t.Errorf("release: exit status %d: %s", status, out)
	}
	noVTPMs(t)
}

// By a CDI specification a container gets a vTPM without any other runtime.
func TestVTPMCDI(t *testing.T) {
	leave(t)
	a := startAgent(t, "--namespaces", "containers")
	sh(t, "mkdir -p /etc/cdi && imans-agent cdi --run-dir "+a.dir+"/run >/etc/cdi/imans.json")
	t.Cleanup(func() { os.RemoveAll("/etc/cdi") })
	c := runPodman(t, tenantRoot(t), "cdi", "", "--device imans.dev/vtpm=auto")
	if got := c.sh("tr '\\0' '\\n' </proc/1/environ | grep TPM2TOOLS_TCTI; grep -c dash /sys/kernel/security/ima/ascii_runtime_measurements"); got != "TPM2TOOLS_TCTI="+socketTCTI+"\n1" {
		t.Errorf("the first program's environment, and how often it is in the list: %q", got)
	}
	if out := c.sh(socketTPM); !strings.Contains(out, "Matched per TPM bank") {
		t.Errorf("evmctl inside: %s", out)
	}
	a.verifyNow(c.ns())
	if b := a.bindingOf(c.id); b.Way != "socket" || b.End != nil {
		t.Errorf("binding %+v", b)
	}
	a.removed(c)
	if b := a.bindingOf(c.id); b.End == nil || b.End.Cause != "ended" {
		t.Errorf("binding at the end %+v", b)
	}
}

// A container that floods its vTPM with commands, garbage and connections whose answers it never reads holds up neither its neighbour nor
// its own list.
func TestVTPMFlood(t *testing.T) {
	sample(t, "6.1")
	withoutProxy(t)
	a := startAgent(t, "--namespaces", "containers")
	useWrapper(t, a)
	floods, calm := startBundle(t, "runc", tenantRoot(t), "floods", nil), startBundle(t, "runc", tenantRoot(t), "calm", nil)
	floods.sh(`touch /tmp/flood; cat >/tmp/flood.sh <<'END'
export TPM2TOOLS_TCTI=` + socketTCTI + `
while [ -e /tmp/flood ]; do tpm2_getrandom 8; done &
while [ -e /tmp/flood ]; do head -c 5000 /dev/urandom >/dev/tcp/127.0.0.1/2321; done &
while [ -e /tmp/flood ]; do printf '\x80\x01\x00\x00\x00\x0c\x00\x00' >/dev/tcp/127.0.0.1/2321; done &
for i in $(seq 80); do exec {fd}<>/dev/tcp/127.0.0.1/2321; done
while [ -e /tmp/flood ]; do printf '\x80\x01\x00\x00\x00\x0c\x00\x00\x01\x7b\x00\x20' >&$fd; done
END
setsid bash /tmp/flood.sh >/dev/null 2>&1 </dev/null &`)
	for _, c := range []*tenant{calm, floods} {
		c.sh(later)
		a.verifyNow(c.ns())
	}
	calm.eventually("TPM2TOOLS_TCTI=" + socketTCTI + " tpm2_getrandom --hex 8")
	floods.sh("rm /tmp/flood")
	floods.eventually("TPM2TOOLS_TCTI=" + socketTCTI + " tpm2_getrandom --hex 8")
	a.verifyNow(floods.ns())
	a.removed(floods)
	a.removed(calm)
}
