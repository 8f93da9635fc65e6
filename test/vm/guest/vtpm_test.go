//go:build vm

package guest

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// engine starts containers with our runtime.
type engine struct {
	name  string
	start func(t *testing.T, root, id string) *tenant
}

// tenant is a running container with a vTPM.
type tenant struct {
	t    *testing.T
	id   string   // as the runtime has it
	pid  int      // of its first process
	exec []string // a command that runs what follows in it
	end  []string // a command that removes it
}

// engines are what people start containers with.
var engines = []engine{
	{"runc", func(t *testing.T, root, id string) *tenant { return startBundle(t, "runc", root, id, nil) }},
	{"crun", func(t *testing.T, root, id string) *tenant { return startBundle(t, "crun", root, id, nil) }},
	{"podman", startPodman},
	{"docker", startDocker},
}

const (
	// tenantMain is what a container runs: it stays until it is ended.
	tenantMain = "trap 'exit 0' TERM; sleep infinity & : >/tmp/ready; wait"
	wrapperDir = "/usr/local/bin"
)

// useWrapper makes the agent's program the runtimes imans-runc and imans-crun, which ask that agent.
func useWrapper(t *testing.T, a *agent) {
	t.Helper()
	sh(t, fmt.Sprintf(`mkdir -p /etc/imans && printf '{"run_dir": "%s/run", "wait_seconds": 1200}' >/etc/imans/runtime.json
for r in runc crun; do ln -sf imans-agent %s/imans-$r; done`, a.dir, wrapperDir))
}

// tenantRoot makes a root folder whose programs are the host's /usr, to be bound there.
func tenantRoot(t *testing.T) string {
	t.Helper()
	root := filepath.Join(tempDir(t, "/srv"), "rootfs")
	sh(t, fmt.Sprintf(`mkdir -p %[1]s && cd %[1]s && mkdir -p usr proc dev sys tmp run var etc root && chmod 1777 tmp
for d in bin sbin lib lib64; do ln -s usr/$d $d; done
printf 'root:x:0:0::/root:/bin/sh\n' >etc/passwd; printf 'root:x:0:\n' >etc/group; cp /etc/ld.so.cache etc/`, root))
	return root
}

// ready waits for a container's first program.
func ready(t *testing.T, c *tenant) *tenant {
	t.Helper()
	for deadline := time.Now().Add(2 * time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if _, err := os.Stat(fmt.Sprintf("/proc/%d/root/tmp/ready", c.pid)); err == nil {
			return c
		} else if time.Now().After(deadline) {
			t.Fatalf("container %s does not come up", c.id)
		}
	}
}

// startBundle starts a container by a runtime itself, its spec as edit leaves it.
func startBundle(t *testing.T, runtime, root, id string, edit func(spec map[string]any)) *tenant {
	t.Helper()
	c, start := makeBundle(t, runtime, root, id, edit)
	sh(t, start)
	c.started(root)
	return ready(t, c)
}

// makeBundle makes what startBundle starts, and returns the line of shell that starts it.
func makeBundle(t *testing.T, runtime, root, id string, edit func(spec map[string]any)) (c *tenant, start string) {
	t.Helper()
	bundle := filepath.Dir(root)
	sh(t, fmt.Sprintf("cd %s && %s spec", bundle, runtime))
	var spec map[string]any
	if err := json.Unmarshal([]byte(readFile(t, bundle+"/config.json")), &spec); err != nil {
		t.Fatal(err)
	}
	process := spec["process"].(map[string]any)
	process["terminal"] = false
	process["args"] = []string{"/bin/sh", "-c", tenantMain}
	spec["root"] = map[string]any{"path": "rootfs", "readonly": false}
	spec["annotations"] = map[string]string{"org.opencontainers.image.ref.name": "docker.io/library/" + id + ":1"}
	spec["mounts"] = append(spec["mounts"].([]any), map[string]any{"destination": "/usr", "type": "bind", "source": "/usr", "options": []string{"bind", "ro"}})
	if edit != nil {
		edit(spec)
	}
	text, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(bundle+"/config.json", text, 0o644); err != nil {
		t.Fatal(err)
	}
	wrapped := wrapperDir + "/imans-" + runtime
	c = &tenant{t: t, id: id, exec: []string{wrapped, "exec", id}, end: []string{wrapped, "delete", "--force", id}}
	t.Cleanup(func() { exec.Command(runtime, "delete", "--force", id).Run() })
	return c, fmt.Sprintf("cd %s && %s run --detach --pid-file pid %s >log 2>&1 </dev/null || { cat log; exit 1; }; cat log", bundle, wrapped, id)
}

// started finds out the process of a bundle that was started.
func (c *tenant) started(root string) {
	c.t.Helper()
	var err error
	if c.pid, err = strconv.Atoi(readFile(c.t, filepath.Dir(root)+"/pid")); err != nil {
		c.t.Fatal(err)
	}
}

// startPodman starts one by podman and crun.
func startPodman(t *testing.T, root, id string) *tenant {
	t.Helper()
	return runPodman(t, root, id, "--runtime "+wrapperDir+"/imans-crun", "")
}

// runPodman starts one by podman with options of its own and of its run.
func runPodman(t *testing.T, root, id, global, options string) *tenant {
	t.Helper()
	t.Cleanup(func() { exec.Command("podman", "rm", "--force", "--time", "0", id).Run() })
	sh(t, fmt.Sprintf("mkdir -p /var/tmp; podman image exists tenant || tar -C %s -c . | podman import --quiet - tenant", root))
	sh(t, fmt.Sprintf("podman %s run --detach --network none %s --volume /usr:/usr:ro --name %s tenant /bin/sh -c %q", global, options, id, tenantMain))
	return inspected(t, "podman", id)
}

// startDocker starts one by docker, its daemon with it.
func startDocker(t *testing.T, root, id string) *tenant {
	t.Helper()
	data := tempDir(t, "/srv")                    // in /run it would be of one boot: its containers could not return
	daemon := func(name string, args ...string) { // dockerd gives its own containerd eight seconds, which is not enough here
		t.Helper()
		cmd := exec.Command(name, args...)
		var said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &said, &said
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			cmd.Process.Signal(os.Interrupt)
			cmd.Wait()
			if t.Failed() {
				t.Logf("%s said: %s", name, tail(said.String(), 3000))
			}
		})
	}
	socket := data + "/containerd.sock"
	daemon("containerd", "--address="+socket, "--root="+data+"/containerd", "--state="+data+"/state")
	sh(t, fmt.Sprintf("for i in $(seq 600); do [ -S %s ] && exit 0; sleep 0.2; done; exit 1", socket))
	daemon("dockerd", "--bridge=none", "--iptables=false", "--data-root="+data+"/docker", "--exec-root="+data+"/exec",
		"--pidfile="+data+"/pid", "--storage-driver=overlay2", "--containerd="+socket, "--add-runtime", "imans="+wrapperDir+"/imans-runc")
	t.Cleanup(func() { exec.Command("docker", "rm", "--force", id).Run() })
	sh(t, "for i in $(seq 300); do docker info >/dev/null 2>&1 && exit 0; sleep 0.2; done; exit 1")
	sh(t, fmt.Sprintf("tar -C %s -c . | docker import - tenant", root))
	sh(t, fmt.Sprintf("docker run --detach --runtime imans --network none --security-opt apparmor=unconfined --volume /usr:/usr:ro --name %s tenant /bin/sh -c %q", id, tenantMain))
	return inspected(t, "docker", id)
}

// inspected finds out what an engine made.
func inspected(t *testing.T, engine, name string) *tenant {
	t.Helper()
	c := &tenant{t: t, exec: []string{engine, "exec", name}, end: []string{engine, "rm", "--force", name}}
	var err error
	if c.pid, err = strconv.Atoi(sh(t, engine+" inspect --format '{{.State.Pid}}' "+name)); err != nil {
		t.Fatal(err)
	}
	c.id = sh(t, engine+" inspect --format '{{.Id}}' "+name)
	return ready(t, c)
}

// sh runs a line of shell in the container that must succeed.
func (c *tenant) sh(line string) string {
	c.t.Helper()
	out, err := exec.Command(c.exec[0], append(c.exec[1:len(c.exec):len(c.exec)], "/bin/sh", "-c", line)...).CombinedOutput()
	if err != nil {
		c.t.Fatalf("in container %s: %s: %v\n%s", c.id, line, err, out)
	}
	return strings.TrimSpace(string(out))
}

// ownTPM is what a container's user does with its own TPM and list: the TPM's commands, and evmctl with the TPM's registers. What it
// runs is measured, so the second time is the one that counts.
const ownTPM = `set -e
export TPM2TOOLS_TCTI=device:/dev/tpmrm0
ima=/sys/kernel/security/ima
tpm2_getrandom --hex 8 >/dev/null
tpm2_createprimary -Q -C o -g sha256 -G ecc -c /tmp/primary.ctx
registers() { tpm2_pcrread $1 | mawk '/: 0x/ { sub(":", "", $1); printf "PCR-%02d: %s\n", $1, tolower(substr($2, 3)) }' >/tmp/$1; }
evmctl --version >/dev/null
i=0
while :; do
	n=$(cat $ima/runtime_measurements_count)
	registers sha1; registers sha256
	[ "$n" = "$(cat $ima/runtime_measurements_count)" ] && evmctl ima_measurement --pcrs sha1,/tmp/sha1 --pcrs sha256,/tmp/sha256 $ima/binary_runtime_measurements >/tmp/said 2>&1 && break
	i=$((i + 1)); [ $i -lt 20 ] || { cat /tmp/said; exit 1; }
	sleep 0.3
done
grep 'Matched per TPM bank' /tmp/said
grep PCR-10 /tmp/sha256`

// Containers of each engine use a TPM of their own, and their lists verify against it inside.
func TestVTPMInContainers(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t, "--namespaces", "containers")
	useWrapper(t, a)
	seen := map[string]string{}
	started := engines
	if short() {
		started = []engine{engines[0], engines[2]} // both runtimes, and a manager
	}
	for _, e := range started {
		t.Run(e.name, func(t *testing.T) {
			a := a.in(t)
			c := e.start(t, tenantRoot(t), "box-"+e.name)
			c.sh("printf '#!/bin/sh\n# " + c.id + "\n' >/tmp/own; chmod 755 /tmp/own; /tmp/own") // else two lists could be the same
			out := c.sh(ownTPM)
			if !strings.Contains(out, "Matched per TPM bank") {
				t.Errorf("evmctl inside: %s", out)
			}
			_, register, _ := strings.Cut(out, "PCR-10: ")
			if other := seen[register]; other != "" {
				t.Errorf("PCR 10 is that of %s, too", other)
			}
			seen[register] = e.name
			if got := c.sh("ls /dev | grep -c '^tpm'; head -n 1 /sys/kernel/security/ima/ascii_runtime_measurements | cut -d ' ' -f 5; grep -c dash /sys/kernel/security/ima/ascii_runtime_measurements"); got != "2\nboot_aggregate\n1" {
				t.Errorf("devices, first entry, the container's first program: %q", got)
			}
			ns := fmt.Sprint(mountNS(t, c.pid))
			a.verifyNow(ns)
			b := a.bindingOf(c.id)
			if b.End != nil || !strings.HasPrefix(b.Namespace, ns+":") || b.Way != "proxy" || len(b.AK) != 68 {
				t.Errorf("binding %+v", b)
			}
			a.removed(c)
			if b := a.bindingOf(c.id); b.End == nil || b.End.Cause != "ended" || b.End.Entries < 3 {
				t.Errorf("binding at the end %+v", b)
			}
		})
	}
	noVTPMs(t)
}

// A container's spec asks for a policy and for several TPMs; they are there as asked, and go on through the agent's death.
func TestVTPMAsked(t *testing.T) {
	sample(t, "6.1")
	a := newAgent(t, "--namespaces", "containers")
	policies := a.dir + "/policies"
	sh(t, fmt.Sprintf("mkdir -p %[1]s && echo 'measure func=BPRM_CHECK fowner=7' >%[1]s/mine", policies))
	a.args = append(a.args, "--policy-dir", policies)
	a.start()
	useWrapper(t, a)
	c := startBundle(t, "runc", tenantRoot(t), "asks", func(spec map[string]any) {
		for set, caps := range spec["process"].(map[string]any)["capabilities"].(map[string]any) {
			spec["process"].(map[string]any)["capabilities"].(map[string]any)[set] = append(caps.([]any), "CAP_CHOWN")
		}
		spec["annotations"] = map[string]string{"imans.dev/policy": "mine", "imans.dev/required": "true"}
		spec["linux"].(map[string]any)["resources"].(map[string]any)["vtpms"] = []map[string]any{
			{"pcrBanks": "sha256", "vtpmVersion": "2"}, {"vtpmName": "tpm5"},
		}
	})
	if got := c.sh("cd /dev && echo tpm*"); got != "tpm0 tpm5 tpmrm0 tpmrm5" {
		t.Errorf("devices: %s", got)
	}
	if got := c.sh("tpm2_getcap -T device:/dev/tpmrm0 pcrs | grep -c ': \\[ [0-9]'"); got != "1" {
		t.Errorf("%s banks have registers, want sha256 alone", got)
	}
	if got := strings.TrimSpace(a.cli("policy", "show", fmt.Sprint(mountNS(t, c.pid)))); got != "measure func=BPRM_CHECK fowner=7" {
		t.Errorf("the policy is %q", got)
	}
	runs := func(name string) {
		t.Helper()
		c.sh(fmt.Sprintf("printf '#!/bin/sh\n# %[1]s\n' >/tmp/%[1]s; chmod 755 /tmp/%[1]s; chown 7 /tmp/%[1]s; /tmp/%[1]s", name))
		if got := c.sh("cut -d ' ' -f 5 /sys/kernel/security/ima/ascii_runtime_measurements | tail -n 1"); got != "/tmp/"+name {
			t.Errorf("the last entry is %q, want /tmp/%s", got, name)
		}
	}
	second := func() string { return c.sh("tpm2_pcrread -T device:/dev/tpmrm5 sha256:16") }
	runs("before")
	c.sh("tpm2_pcrextend -T device:/dev/tpmrm5 16:sha256=" + strings.Repeat("5a", 32))
	before := second()
	a.signal(syscall.SIGKILL)
	a.start()
	runs("after")
	if got := second(); got != before {
		t.Errorf("PCR 16 of the second TPM was %s, is %s", before, got)
	}
	a.verifyNow(fmt.Sprint(mountNS(t, c.pid)))
	a.removed(c)
	if left, _ := filepath.Glob("/dev/tpm*[1-9]"); len(left) > 0 {
		t.Errorf("devices left: %v", left)
	}
	if status, out := exits(t, wrapperDir+"/imans-runc", "run", "--bundle", filepath.Dir(tenantRoot(t)), "none"); status == 0 {
		t.Errorf("a bundle without a spec: exit status %d: %s", status, out)
	}
}

// noVTPMs checks that no vTPM is left, neither a process nor a device.
func noVTPMs(t *testing.T) {
	t.Helper()
	if left := sh(t, "pgrep -a swtpm || true"); left != "" {
		t.Errorf("swtpm processes are left: %s", left)
	}
	if left, _ := filepath.Glob("/dev/tpm*[1-9]"); len(left) > 0 {
		t.Errorf("devices left: %v", left)
	}
}

// removed removes a container, and waits until nothing of it is left with the agent.
func (a *agent) removed(c *tenant) {
	a.t.Helper()
	sh(a.t, strings.Join(c.end, " "))
	folder := a.dir + "/state/containers/" + c.id
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if _, err := os.Stat(folder); os.IsNotExist(err) {
			return
		} else if time.Now().After(deadline) {
			a.t.Fatalf("%s is still there: %s\n%s", folder, sh(a.t, "cat "+folder+"/container.json; ls -la "+folder), a.stands())
		}
	}
}

// vtpmBinding is what verify says of a vTPM.
type vtpmBinding struct {
	Namespace, Container, TPM, Way, EK, AK string
	End                                    *struct {
		Cause   string
		Entries int
	}
}

// bindingOf returns what the native list says of a container's first vTPM, which the machine's own TPM proves.
func (a *agent) bindingOf(id string) vtpmBinding {
	a.t.Helper()
	for _, b := range a.bindings() {
		if b.Container == id {
			return b
		}
	}
	a.t.Fatalf("no binding of %s", id)
	return vtpmBinding{}
}

// bindings returns all that the native list says of vTPMs, in its order.
func (a *agent) bindings() []vtpmBinding {
	a.t.Helper()
	a.settled("native")
	file := a.write("native-list", a.cli("measurements", "native", "--format", "binary"))
	out := a.cli("verify", file, "--ns", "native", "--json")
	var result struct{ Bindings []vtpmBinding }
	if err := json.Unmarshal([]byte(out), &result); err != nil {
		a.t.Fatalf("%v: %s", err, out)
	}
	return result.Bindings
}
