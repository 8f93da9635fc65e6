//go:build vm

package guest

import (
	"encoding/json"
	"fmt"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/control"
	"imans.dev/imans-agent/internal/oci"
)

// softwarePID returns the process of the native list's software TPM.
func (a *agent) softwarePID() int {
	a.t.Helper()
	var record struct{ PID int }
	if err := json.Unmarshal([]byte(readFile(a.t, a.dir+"/state/native-tpm/process.json")), &record); err != nil || record.PID == 0 {
		a.t.Fatalf("no process on record: %v", err)
	}
	return record.PID
}

// says makes sure that a command of the agent says all of that.
func (a *agent) says(args []string, want ...string) {
	a.t.Helper()
	out := a.cli(args...)
	for _, w := range want {
		if !strings.Contains(strings.Join(strings.Fields(out), " "), w) {
			a.t.Errorf("imans-agent %s: no %q in:\n%s", strings.Join(args, " "), w, out)
		}
	}
}

// unloaded unloads a stopped agent, and makes sure that no swtpm and no device is left.
func (a *agent) unloaded() {
	a.t.Helper()
	if status, out := exits(a.t, program, append([]string{"unload"}, a.folders()...)...); status != 0 {
		a.t.Errorf("unload: exit status %d: %s", status, out)
	}
	noVTPMs(a.t)
}

// The native list in software measures and verifies, is told to be that, and is the same after the agent was killed. Its PCR is the
// default one, which the kernel's own IMA extends in the machine's TPM.
func TestVTPMNativeSoftware(t *testing.T) {
	sample(t, "6.1")
	a := newAgent(t, "--tpm", "swtpm", "--pcr", "10")
	a.start()
	dir := tempDir(t, "/root")
	makeProgram(t, dir+"/before")
	runProgram(t, dir+"/before")
	n := a.settled("native")
	if want := "unix:" + a.dir + "/run/tpm/native"; n.TPM != want || n.Trust != control.Software || n.PCR != 10 {
		t.Errorf("the native namespace: %+v, want TPM %s", n, want)
	}
	p, err := a.client().PCRs(t.Context(), "native")
	if err != nil || !p.Software || p.PCR != 10 || len(p.Values) == 0 {
		t.Errorf("PCRs: %+v, %v", p, err)
	}
	a.says([]string{"ns"}, "10 software measuring")
	a.says([]string{"ns", "show", "native"}, "trust software: a TPM that is a program")
	a.says([]string{"ns", "show", "native", "--json"}, `"trust": "software"`, `"tpm": "`+n.TPM+`"`)
	list := a.write("native-list", a.cli("measurements", "native", "--format", "binary"))
	a.settled("native")
	a.says([]string{"verify", list, "--ns", "native"}, "trust software:")
	a.verify("native")

	pid, tcti := a.softwarePID(), "swtpm:path="+a.dir+"/run/tpm/native"
	a.settled("native")
	a.signal(syscall.SIGKILL)
	held := run(t, "tpm2_pcrread", "-T", tcti, "sha256:10") // the next agent measures it
	if strings.Contains(held, strings.Repeat("0", 64)) {
		t.Errorf("the agent's death took the PCR along: %s", held)
	}
	makeProgram(t, dir+"/meanwhile")
	runProgram(t, dir+"/meanwhile")
	a.start()
	if now := a.softwarePID(); now != pid {
		t.Errorf("process %d is the TPM now, it was %d", now, pid)
	}
	measured, violations := names(a.list("native"))
	if measured[dir+"/before"] != 1 || measured[dir+"/meanwhile"] != 1 || measured["boot_aggregate"] != 1 || len(violations) != 0 {
		t.Errorf("the list after the agent's death: %v, violations %v", measured, violations)
	}
	a.verify("native")
	a.stop()
	a.unloaded()
}

// A software TPM that died is never replaced behind a list that it proved.
func TestVTPMNativeLost(t *testing.T) {
	leave(t)
	a := newAgent(t, "--tpm", "swtpm")
	a.start()
	identity := readFile(t, a.dir+"/state/native-tpm/identity.json")
	a.settled("native")
	a.stop()
	if err := syscall.Kill(a.softwarePID(), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	boot := sh(t, "echo "+a.dir+"/state/boots/*")
	log := boot + "/native/binary_runtime_measurements"
	before := readFile(t, log)
	for range 2 {
		a.refused(3, "--tpm swtpm", "its PCR is lost", boot+"/native", "start again", "--tpm none")
	}
	if readFile(t, log) != before {
		t.Error("the log was changed")
	}
	if left := sh(t, "pgrep -a swtpm || true"); left != "" {
		t.Errorf("a TPM was started: %s", left)
	}

	software := a.args
	a.args = append(a.args[:len(a.args):len(a.args)], "--tpm", "none")
	a.start()
	a.says([]string{"ns"}, "16 none measuring")
	a.says([]string{"ns", "show", "native"}, "trust none: no TPM proves this list")
	if _, err := a.client().PCRs(t.Context(), "native"); err == nil || !strings.Contains(err.Error(), "no TPM proves the native list") {
		t.Errorf("PCRs: %v", err)
	}
	a.stop()

	if err := os.Rename(boot+"/native", a.dir+"/evidence"); err != nil {
		t.Fatal(err)
	}
	a.args = software
	a.start()
	if again := readFile(t, a.dir+"/state/native-tpm/identity.json"); again != identity {
		t.Errorf("its keys are others now: %s, were %s", again, identity)
	}
	a.verify("native")
	a.stop()
	a.unloaded()
}

// What doctor says of TPMs: the native list's is what it is, or the ways out.
func TestVTPMNativeDoctor(t *testing.T) {
	sample(t, "6.1")
	for _, c := range []struct {
		args []string
		want []string
	}{
		{nil, []string{"ok TPM hardware: /dev/tpmrm0", "ok swtpm TPM emulator version", "ok vTPM proxy /dev/vtpmx"}},
		{[]string{"--tpm", "swtpm"}, []string{"ok TPM software: TPM emulator version"}},
		{[]string{"--tpm", "swtpm", "--json"}, []string{`"found": "software: TPM emulator version`}},
		{[]string{"--tpm", "none"}, []string{"absent TPM", "no TPM proves the native list", "--tpm swtpm"}},
		{[]string{"--tpm", "/dev/tpm99"}, []string{"absent TPM", "--tpm swtpm", "--tpm none"}},
	} {
		status, out := exits(t, program, append([]string{"doctor"}, c.args...)...)
		for _, w := range c.want {
			if status != 0 || !strings.Contains(strings.Join(strings.Fields(out), " "), w) {
				t.Errorf("doctor %v: exit status %d, no %q in:\n%s", c.args, status, w, out)
			}
		}
	}
}

// Unloading ends each TPM of each container: the one that a list has, others, one in a folder of somebody else's, and those of a
// container that was not created yet.
func TestVTPMNativeUnloadEndsAll(t *testing.T) {
	leave(t)
	a := startAgent(t, "--namespaces", "containers")
	useWrapper(t, a)
	elsewhere := tempDir(t, "/srv") + "/state"
	c := startBundle(t, "runc", tenantRoot(t), "unloaded", func(spec map[string]any) {
		spec["annotations"] = map[string]string{"imans.dev/required": "true"}
		spec["linux"].(map[string]any)["resources"].(map[string]any)["vtpms"] = []map[string]any{
			{}, {"vtpmName": "tpm5"}, {"vtpmName": "tpm6", "statePath": elsewhere, "statePathIsManaged": true},
		}
	})
	if _, err := a.client().PrepareContainer(t.Context(), oci.Request{ID: "prepared", VTPM: true}); err != nil {
		t.Fatal(err)
	}
	if n := sh(t, "pgrep -c swtpm"); n != "4" {
		t.Errorf("%s swtpm processes, want 4: %s", n, sh(t, "pgrep -a swtpm"))
	}
	c.sh("tpm2_pcrread -T device:/dev/tpmrm6 sha256:16")
	a.signal(syscall.SIGKILL)
	a.unloaded()
	if _, err := os.Stat(elsewhere + "/identity.json"); err != nil {
		t.Errorf("a folder of somebody else's: %v", err)
	}
	if status, out := exits(t, program, append([]string{"unload"}, a.folders()...)...); status != 0 {
		t.Errorf("unload once more: exit status %d: %s", status, out)
	}
	// What the containers kept is there for the next agent, which goes on without their TPMs.
	a.start()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		n, err := a.client().Namespace(t.Context(), fmt.Sprint(mountNS(t, c.pid)))
		if err != nil {
			t.Fatal(err)
		}
		if n.Trust == control.Nothing {
			break
		}
		if time.Now().After(deadline) {
			t.Fatalf("the container's namespace: %+v", n)
		}
	}
	a.removed(c)
}
