//go:build vm

package guest

import (
	"encoding/hex"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"
)

// keepSecrets makes in a container's TPM what outlives a stop (a key of the owner's, an NV index), and extends a register, which does not.
const keepSecrets = `set -e
export TPM2TOOLS_TCTI=device:/dev/tpmrm0
tpm2_createprimary -Q -C o -g sha256 -G ecc -c /tmp/primary.ctx
tpm2_evictcontrol -Q -C o -c /tmp/primary.ctx 0x81000001
tpm2_flushcontext -t
tpm2_nvdefine -Q 0x1500001 -C o -s 8
printf secretly | tpm2_nvwrite -Q 0x1500001 -C o -i -
tpm2_pcrextend 16:sha256=` + "5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a5a"

// keptSecrets prints them: the key's Name, the index's content, the register.
const keptSecrets = `set -e
export TPM2TOOLS_TCTI=device:/dev/tpmrm0
tpm2_readpublic -c 0x81000001 | grep '^name:'
tpm2_nvread 0x1500001 -C o -s 8; echo
tpm2_pcrread sha256:16 | grep 16:`

// A container that is stopped and started again finds its TPM as a machine does that was switched off: keys and NV storage are there,
// PCRs are new. When it is removed, so is its TPM.
func TestVTPMKept(t *testing.T) {
	sample(t, "6.18")
	a := startAgent(t, "--namespaces", "containers")
	useWrapper(t, a)
	managers := []engine{{"podman", startPodman}}
	if !short() {
		managers = append(managers, engine{"docker", startDocker})
	}
	for _, e := range managers {
		t.Run(e.name, func(t *testing.T) {
			a := a.in(t)
			name := "kept-" + e.name
			c := e.start(t, tenantRoot(t), name)
			c.sh(keepSecrets)
			key, nv, register := secrets(c.sh(keptSecrets))
			if key == "" || nv != "secretly" || isZeros(register) {
				t.Fatalf("before: key %q, NV %q, register %q", key, nv, register)
			}
			first := fmt.Sprint(mountNS(t, c.pid))
			a.verifyNow(first)
			c.sh("rm /tmp/ready")
			sh(t, fmt.Sprintf("%s stop --time 10 %s", e.name, name))
			sh(t, fmt.Sprintf("%s start %s", e.name, name))
			c = inspected(t, e.name, name)
			if again, nv, register := secrets(c.sh(keptSecrets)); again != key || nv != "secretly" || !isZeros(register) {
				t.Errorf("started again: key %q, was %q; NV %q; register %q", again, key, nv, register)
			}
			a.verifyNow(fmt.Sprint(mountNS(t, c.pid)))
			checkTwoRuns(t, a, c)
			a.removed(c)
		})
	}
}

// secrets takes apart what keptSecrets prints.
func secrets(out string) (key, nv, register string) {
	lines := strings.Split(out, "\n")
	if len(lines) != 3 {
		return "", out, ""
	}
	return lines[0], lines[1], lines[2]
}

// isZeros reports whether a line of tpm2_pcrread shows a register that nobody has extended.
func isZeros(line string) bool {
	_, value, ok := strings.Cut(line, "0x")
	return ok && strings.Trim(value, "0") == ""
}

// checkTwoRuns looks at what the native list says of a container that was stopped and started again.
func checkTwoRuns(t *testing.T, a *agent, c *tenant) {
	t.Helper()
	var of []vtpmBinding
	for _, b := range a.bindings() {
		if b.Container == c.id {
			of = append(of, b)
		}
	}
	if len(of) != 2 {
		t.Fatalf("%d bindings of %s: %+v", len(of), c.id, of)
	}
	if of[0].End == nil || of[0].End.Cause != "ended" || of[0].End.Entries < 3 || of[1].End != nil {
		t.Errorf("the first has not ended, or the second has: %+v, %+v; %+v", of[0], of[0].End, of[1])
	}
	if of[0].AK != of[1].AK || of[0].EK != of[1].EK || of[0].Namespace == of[1].Namespace {
		t.Errorf("not the same keys in another namespace: %+v, %+v", of[0], of[1])
	}
}

// A TPM's state that somebody else manages outlives its container, and another container finds it as it was; one that nobody manages
// goes with its container.
func TestVTPMKeptElsewhere(t *testing.T) {
	leave(t)
	a := startAgent(t, "--namespaces", "containers")
	useWrapper(t, a)
	dir := tempDir(t, "/root")
	managed, own := dir+"/managed", dir+"/own"
	with := func(id string, vtpms ...map[string]any) *tenant {
		t.Helper()
		return startBundle(t, "runc", tenantRoot(t), id, func(spec map[string]any) {
			spec["linux"].(map[string]any)["resources"].(map[string]any)["vtpms"] = vtpms
		})
	}
	keep := map[string]any{"statePath": managed, "statePathIsManaged": true}
	c := with("first", keep, map[string]any{"statePath": own, "vtpmName": "tpm1"})
	c.sh(keepSecrets)
	key, _, _ := secrets(c.sh(keptSecrets))
	a.removed(c)
	if _, err := os.Stat(managed + "/state/tpm2-00.permall"); err != nil {
		t.Errorf("the managed state: %v", err)
	}
	if _, err := os.Stat(own); !os.IsNotExist(err) {
		t.Errorf("the state that nobody manages: %v", err)
	}
	c = with("second", keep)
	if again, nv, register := secrets(c.sh(keptSecrets)); key == "" || again != key || nv != "secretly" || !isZeros(register) {
		t.Errorf("in another container: key %q, was %q; NV %q; register %q", again, key, nv, register)
	}
	a.verifyNow(fmt.Sprint(mountNS(t, c.pid)))
	a.removed(c)
}

// nothingLeft waits until containers have left nothing: no swtpm, device, folder, socket or mount. before is what there was without them.
func (a *agent) nothingLeft(before surroundings) {
	a.t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		left := a.containersLeft(before)
		if left == "" {
			return
		}
		if time.Now().After(deadline) {
			a.t.Fatalf("left behind: %s", left)
		}
	}
}

func (a *agent) containersLeft(before surroundings) string {
	a.t.Helper()
	var left []string
	for _, pattern := range []string{
		"/dev/tpm*[1-9]", a.dir + "/state/containers/*", a.dir + "/state/boots/*/ns/*", a.dir + "/run/tpm/*",
	} {
		found, err := filepath.Glob(pattern)
		if err != nil {
			a.t.Fatal(err)
		}
		left = append(left, found...)
	}
	running := sh(a.t, "pgrep -a swtpm || true") // each time, as what the test runs for the first time is measured
	if now := look(a.t); now.processes > before.processes || now.mounts > before.mounts {
		left = append(left, fmt.Sprintf("%+v, before %+v: %s", now, before, running))
	}
	return strings.Join(left, " ")
}

// surroundings is what containers share with all others.
type surroundings struct {
	processes int // swtpm
	mounts    int
}

func look(t *testing.T) surroundings {
	t.Helper()
	return surroundings{strings.Count(sh(t, "ps -e -o comm="), "swtpm"), strings.Count(readFile(t, "/proc/self/mountinfo"), "\n")}
}

// atOnce runs all lines of shell at the same time; each must succeed.
func atOnce(t *testing.T, lines []string) {
	t.Helper()
	errs := make([]error, len(lines))
	var all sync.WaitGroup
	for i, line := range lines {
		all.Go(func() {
			if out, err := exec.Command("/bin/bash", "-c", line).CombinedOutput(); err != nil {
				errs[i] = fmt.Errorf("%s: %w\n%s", line, err, tail(string(out), 1000))
			}
		})
	}
	all.Wait()
	for _, err := range errs {
		if err != nil {
			t.Error(err)
		}
	}
	if t.Failed() {
		t.FailNow()
	}
}

// pooled waits until the pool is full.
func (a *agent) pooled(n int) {
	a.t.Helper()
	for deadline := time.Now().Add(10 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		ready, err := filepath.Glob(a.dir + "/state/pool/*/identity.json")
		if err != nil {
			a.t.Fatal(err)
		}
		if len(ready) >= n {
			return
		}
		if time.Now().After(deadline) {
			a.t.Fatalf("%d of %d vTPMs are ready: %s", len(ready), n, tail(a.log.String(), 2000))
		}
	}
}

// Containers that are created at once get a TPM each, and leave nothing when they are removed at once.
func TestVTPMAtOnce(t *testing.T) {
	leave(t)
	many := sized(4, 20, 200)
	pool := min(many, 20)
	a := startAgent(t, "--namespaces", "containers", "--vtpm-pool", strconv.Itoa(pool))
	useWrapper(t, a)
	a.pooled(pool)
	var all []*tenant
	var starts, ends, roots []string
	for i := range many {
		root, id := tenantRoot(t), fmt.Sprintf("many-%d", i)
		c, start := makeBundle(t, "runc", root, id, func(spec map[string]any) {
			own := fmt.Sprintf("printf '#!/bin/sh\\n# %s\\n' >/tmp/own; chmod 755 /tmp/own; /tmp/own; ", id) // a list like no other
			spec["process"].(map[string]any)["args"] = []string{"/bin/sh", "-c", own + tenantMain}
			spec["annotations"].(map[string]string)["imans.dev/required"] = "true"
		})
		all, starts, roots = append(all, c), append(starts, start), append(roots, root)
		ends = append(ends, strings.Join(c.end, " "))
	}
	before, began := look(t), time.Now()
	for some := range slices.Chunk(starts, pool) {
		atOnce(t, some)
		t.Logf("%d more containers after %v", len(some), time.Since(began).Round(time.Millisecond))
	}
	seen := map[string]string{}
	for i, c := range all {
		c.started(roots[i])
		ready(t, c)
		ns := fmt.Sprint(mountNS(t, c.pid))
		a.verifyNow(ns)
		if measured, violations := names(a.list(ns)); measured["/tmp/own"] != 1 || len(violations) > 0 {
			t.Errorf("%s has entries %v, violations %v", c.id, measured, violations)
		}
		register := sh(t, "tpm2_pcrread -T device:"+a.settled(ns).TPM+" sha256:10 | grep 10:")
		if other := seen[register]; other != "" || isZeros(register) {
			t.Errorf("PCR 10 of %s is %s, as that of %q", c.id, register, other)
		}
		seen[register] = c.id
		progress(t, i+1, many, began)
	}
	bound, aks := map[string]int{}, map[string]int{}
	for _, b := range a.bindings() {
		if b.End == nil {
			bound[b.Container]++
			aks[b.AK]++
		}
	}
	if len(bound) != many || len(aks) != many {
		t.Errorf("%d containers and %d keys are bound, want %d: %v", len(bound), len(aks), many, bound)
	}
	began = time.Now()
	for some := range slices.Chunk(ends, pool) {
		atOnce(t, some)
	}
	a.pooled(pool)
	a.nothingLeft(before)
	t.Logf("removed in %v", time.Since(began).Round(time.Millisecond))
	for _, b := range a.bindings() {
		if b.End == nil || b.End.Cause != "ended" {
			t.Errorf("binding of %s at the end: %+v", b.Container, b.End)
		}
	}
}

// Containers that come and go leave nothing behind, and the agent as it was.
func TestVTPMCycles(t *testing.T) {
	leave(t)
	cycles := sized(3, 100, 1000)
	a := startAgent(t, "--namespaces", "containers")
	useWrapper(t, a)
	alone := look(t)
	root := tenantRoot(t)
	_, start := makeBundle(t, "runc", root, "cycle", func(spec map[string]any) {
		spec["process"].(map[string]any)["args"] = []string{"/bin/sh", "-c", "test -c /dev/tpmrm0"}
		spec["annotations"].(map[string]string)["imans.dev/required"] = "true"
	})
	start = strings.Replace(start, "--detach --pid-file pid ", "", 1)
	run := func(n int) {
		t.Helper()
		began := time.Now()
		for done := range n {
			sh(t, start)
			a.nothingLeft(alone)
			progress(t, done+1, n, began)
		}
	}
	run(max(2, cycles/10))
	a.leavings() // what it runs itself is measured, too
	a.bindings()
	before, began := a.leavings(), time.Now()
	run(cycles)
	t.Logf("%d cycles in %v", cycles, time.Since(began).Round(time.Second))
	a.asBefore(before, 8<<10) // the native list has an entry of each
	if got := len(a.bindings()); got != cycles+max(2, cycles/10) {
		t.Errorf("%d bindings", got)
	}
}

// Each entry is extended once and nothing else is, by what the TPM itself logs of its commands; in a TPM 1.2, too.
func TestVTPMExtends(t *testing.T) {
	leave(t)
	for _, c := range []struct {
		version, extend string
	}{{"2", "00000182"}, {"1.2", "00000014"}} { // TPM2_PCR_Extend, TPM_Extend
		t.Run("TPM "+c.version, func(t *testing.T) {
			a := newAgent(t, "--namespaces", "containers")
			logs := tempDir(t, "/root")
			wrapper := a.write("swtpm-that-logs", fmt.Sprintf(`#!/bin/sh
exec /usr/bin/swtpm "$@" --log "level=2,file=%s/$(readlink /proc/self/fd/4 | tr / _).log"
`, logs))
			if err := os.Chmod(wrapper, 0o755); err != nil {
				t.Fatal(err)
			}
			a.args = append(a.args, "--swtpm", wrapper, "--swtpm-user", "root")
			a.start()
			useWrapper(t, a)
			box := startBundle(t, "runc", tenantRoot(t), "counts", func(spec map[string]any) {
				spec["linux"].(map[string]any)["resources"].(map[string]any)["vtpms"] = []map[string]any{{"vtpmVersion": c.version}}
				spec["annotations"].(map[string]string)["imans.dev/required"] = "true"
			})
			for i := range sized(5, 50, 500) {
				box.sh(fmt.Sprintf("printf '#!/bin/sh\n# %d\n' >/tmp/p%[1]d; chmod 755 /tmp/p%[1]d; /tmp/p%[1]d", i))
			}
			ns := fmt.Sprint(mountNS(t, box.pid))
			a.verifyNow(ns)
			entries := a.settled(ns).Entries
			logged := readFile(t, logs+"/"+strings.ReplaceAll(a.dir, "/", "_")+"_state_containers_counts_tpm0_state.log")
			if got := countCommands(t, logged, c.extend); got != entries || got < sized(5, 50, 500) {
				t.Errorf("the TPM got %d extends, the list has %d entries", got, entries)
			}
			a.removed(box)
		})
	}
}

// countCommands counts the commands of a code, in hexadecimal, in a swtpm's log: it has each command's bytes below a line that tells their
// number.
func countCommands(t *testing.T, log, code string) int {
	t.Helper()
	n, all := 0, 0
	lines := strings.Split(log, "\n")
	for i, line := range lines {
		if !strings.Contains(line, "SWTPM_IO_Read: length") || i+1 == len(lines) {
			continue
		}
		header, err := hex.DecodeString(strings.ReplaceAll(strings.TrimSpace(lines[i+1]), " ", ""))
		if err != nil || len(header) < 10 {
			t.Fatalf("below %q is %q: %v", line, lines[i+1], err)
		}
		all++
		if hex.EncodeToString(header[6:10]) == code {
			n++
		}
	}
	t.Logf("%d of %d commands are %s", n, all, code)
	return n
}

// read12 reads PCR 10 by the container's own TPM 1.2: TPM_PcrRead, as whoever has no tools for it. The agent may have the device for a
// moment.
const read12 = `for i in $(seq 100); do
	if command exec 3<>/dev/tpm0; then
		printf '\000\301\000\000\000\016\000\000\000\025\000\000\000\012' >&3
		dd bs=4096 count=1 status=none <&3 | od -An -v -tx1 | tr -d ' \n'
		exit 0
	fi 2>/dev/null
	sleep 0.1
done; exit 1`

// A container's TPM 1.2 holds its list, in its one bank, and the container uses it as well: the agent has its device, which one program
// at a time can have, only during a command. It goes on through the agent's death, whoever has the device then.
func TestVTPM12(t *testing.T) {
	leave(t)
	for _, namespaces := range []string{"containers", "all"} { // the list begins with the TPM, or before it
		t.Run(namespaces, func(t *testing.T) {
			a := startAgent(t, "--namespaces", namespaces)
			useWrapper(t, a)
			useTPM12(t, a)
		})
	}
}

func useTPM12(t *testing.T, a *agent) {
	t.Helper()
	c := startBundle(t, "runc", tenantRoot(t), "old", func(spec map[string]any) {
		spec["linux"].(map[string]any)["resources"].(map[string]any)["vtpms"] = []map[string]any{{"vtpmVersion": "1.2"}}
		spec["annotations"].(map[string]string)["imans.dev/required"] = "true"
	})
	ns := fmt.Sprint(mountNS(t, c.pid))
	runs := func(name string) {
		t.Helper()
		c.sh(fmt.Sprintf("printf '#!/bin/sh\n# %[1]s\n' >/tmp/%[1]s; chmod 755 /tmp/%[1]s; /tmp/%[1]s", name))
	}
	if got := c.sh("cd /dev && echo tpm*"); got != "tpm0" {
		t.Errorf("devices: %s", got)
	}
	runs("before")
	a.verifyNow(ns)
	c.sh(read12) // what it runs is measured
	var inside, outside string
	for range 10 { // unless something was measured in between
		a.settled(ns)
		inside, outside = c.sh(read12), sh(t, "cat /sys/class/tpm/"+filepath.Base(a.settled(ns).TPM)+"/pcr-sha1/10")
		if strings.HasSuffix(inside, strings.ToLower(outside)) {
			break
		}
	}
	if !strings.HasPrefix(inside, "00c40000001e00000000") || !strings.HasSuffix(inside, strings.ToLower(outside)) || isZeros("0x"+outside) {
		t.Errorf("inside TPM_PcrRead says %s, outside the kernel %s", inside, outside)
	}

	// The container has the device while the agent dies and comes back.
	hold := exec.Command(c.exec[0], append(c.exec[1:len(c.exec):len(c.exec)], "/bin/sh", "-c",
		"until command exec 3<>/dev/tpm0; do sleep 0.1; done; : >/tmp/holding; until [ -e /tmp/enough ]; do sleep 0.1; done")...)
	if err := hold.Start(); err != nil {
		t.Fatal(err)
	}
	c.sh("for i in $(seq 600); do [ -e /tmp/holding ] && exit 0; sleep 0.1; done; exit 1")
	runs("held")
	a.signal(syscall.SIGKILL)
	a.start()
	runs("again")
	if n, err := a.client().Namespace(t.Context(), ns); err != nil || n.Extended >= n.Entries {
		t.Errorf("while the container has the device: %d of %d entries extended, %v", n.Extended, n.Entries, err)
	}
	c.sh(": >/tmp/enough")
	hold.Wait()
	runs("after")
	a.verifyNow(ns)
	if measured, violations := names(a.list(ns)); measured["/tmp/held"] != 1 || measured["/tmp/again"] != 1 || measured["/tmp/after"] != 1 || len(violations) > 0 {
		t.Errorf("entries %v, violations %v", measured, violations)
	}
	if b := a.bindingOf(c.id); b.End != nil || b.TPM != "1.2" || b.AK != "" || b.EK != "" || b.Way != "proxy" {
		t.Errorf("binding %+v", b)
	}
	a.removed(c)
	if b := a.bindingOf(c.id); b.End == nil || b.End.Cause != "ended" || b.End.Entries < 5 {
		t.Errorf("binding at the end %+v, %+v", b, b.End)
	}
}

// The machine's own list can be in a TPM 1.2, too.
func TestVTPM12Native(t *testing.T) {
	leave(t)
	dir := tempDir(t, "/root")
	swtpm := exec.Command("swtpm", "socket", "--tpmstate", "dir="+dir, "--server", "type=unixio,path="+dir+"/s",
		"--ctrl", "type=unixio,path="+dir+"/c", "--flags", "not-need-init,startup-clear")
	if err := swtpm.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { swtpm.Process.Kill(); swtpm.Wait() })
	sh(t, fmt.Sprintf("for i in $(seq 600); do [ -S %s/s ] && exit 0; sleep 0.1; done; exit 1", dir))
	a := startAgent(t, "--namespaces", "containers", "--tpm", "unix:"+dir+"/s")
	for restart := range 2 {
		file := fmt.Sprintf("%s/own-%d", dir, restart)
		makeProgram(t, file)
		runProgram(t, file)
		if measured, _ := names(a.list("native")); measured[file] != 1 {
			t.Errorf("%s is not in the list", file)
		}
		a.verifyNow("native")
		a.signal(syscall.SIGKILL)
		a.start()
	}
}
