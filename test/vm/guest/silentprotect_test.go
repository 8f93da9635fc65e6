//go:build vm

package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// fromContainer is the start of a command that runs with all capabilities and sees all processes and pins, in another mount namespace than
// the host's.
var fromContainer = []string{"unshare", "--mount"}

// attempts returns what a command that starts so can do to processes and pins, by names. Nothing of it harms.
func attempts(t *testing.T, start []string, pins string, pids ...string) string {
	t.Helper()
	line := fmt.Sprintf(`tried() { what=$1; shift; if "$@" >/dev/null 2>&1; then echo $what; fi; }
as_it_is() { old=$(cat $1) && echo $old >$1; }
there_and_back() { mv "$1" "$1-moved" && mv "$1-moved" "$1"; }
for pid in %s; do
	tried signal kill -0 $pid
	tried descriptors readlink /proc/$pid/fd/1
	tried program readlink /proc/$pid/exe
	tried limit prlimit --pid $pid --core=0:0
	thread=$(ls /proc/$pid/task | tail -n 1)
	tried processors taskset -p $(taskset -p $thread | sed 's/.* //') $thread
	tried scheduler chrt --other -p 0 $pid
	tried nice renice -n $(ps -o ni= -p $pid) -p $pid
	tried disk ionice -c 0 -p $pid
	tried slack as_it_is /proc/$pid/timerslack_ns
done
tried pin there_and_back %[2]s/link_imans_mmap_file
tried folder there_and_back %[2]s`, strings.Join(pids, " "), pins)
	args := append(start[:len(start):len(start)], "bash", "-c", line)
	return strings.Join(strings.Fields(run(t, args[0], args[1:]...)), " ")
}

// harm is what attempts calls all that it can do to a process.
const harm = "signal descriptors program limit processors scheduler nice disk slack"

// notKeptOff makes sure that the protection is worth what docs/security.md says, and no more: these ways are open to who has the capabilities.
func notKeptOff(t *testing.T, pid string) {
	t.Helper()
	for what, line := range map[string]string{
		"entering the host's mount namespace": "nsenter --mount=/proc/1/ns/mnt kill -0 $0",
		"oom_score_adj":                       "old=$(cat /proc/$0/oom_score_adj) && echo $old >/proc/$0/oom_score_adj",
		"a cgroup": `home=/sys/fs/cgroup$(sed -n 's/^0:://p' /proc/$0/cgroup) && mkdir /sys/fs/cgroup/held && cd /sys/fs/cgroup/held &&
echo $0 >cgroup.procs && echo 1 >cgroup.freeze && until grep -q 'frozen 1' cgroup.events; do sleep 0.1; done
echo 0 >cgroup.freeze && echo $0 >$home/cgroup.procs && cd / && rmdir /sys/fs/cgroup/held`,
	} {
		if status, out := exits(t, fromContainer[0], append(fromContainer[1:len(fromContainer):len(fromContainer)], "bash", "-ec", line, pid)...); status != 0 {
			t.Errorf("%s is refused now, mend docs/security.md: exit status %d: %s", what, status, out)
		}
	}
}

// signalByDescriptor has a pipe of this process send SIGKILL.
func signalByDescriptor(t *testing.T, pid int) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer w.Close()
	for _, set := range [][2]int{{unix.F_SETOWN, pid}, {unix.F_SETSIG, int(unix.SIGKILL)}, {unix.F_SETFL, unix.O_ASYNC}} {
		if _, err := unix.FcntlInt(r.Fd(), set[0], set[1]); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := w.Write([]byte("x")); err != nil {
		t.Fatal(err)
	}
}

// With --protect who is in a container can do nothing to the agent, its vTPMs and its pins, whatever capabilities it has; the host can, and so can a
// later agent, in a container itself.
func TestNeverSilentProtected(t *testing.T) {
	a := startAgent(t, "--namespaces", "all")
	pins := "/sys/fs/bpf/" + filepath.Base(a.dir)
	all := harm + " pin folder"
	if got := attempts(t, fromContainer, pins, strconv.Itoa(a.cmd.Process.Pid)); got != all {
		t.Errorf("without protection: %q, want %q", got, all)
	}
	b := startUnshared(t, 1, a.windowDir())
	b.sh("true")
	a.settled(b.ns())
	swtpm := a.swtpmOf(fmt.Sprintf("%s/run/tpm/%s-", a.dir, b.ns()))
	signalByDescriptor(t, a.cmd.Process.Pid)
	select {
	case <-a.exited:
	case <-time.After(time.Minute):
		t.Error("a signal by a descriptor does not end an agent that nothing protects")
	}

	plain := a.args
	a.args = append(plain[:len(plain):len(plain)], "--protect")
	a.start()
	pids := []string{strconv.Itoa(a.cmd.Process.Pid), swtpm} // the second was started by an agent without protection
	later := startUnshared(t, 1, a.windowDir())
	later.sh("true")
	a.settled(later.ns())
	pids = append(pids, a.swtpmOf(fmt.Sprintf("%s/run/tpm/%s-", a.dir, later.ns())))
	for _, pid := range pids {
		if got := attempts(t, fromContainer, pins, pid); got != "" {
			t.Errorf("protected, process %s: %q, want nothing", pid, got)
		}
	}
	for _, pin := range []string{pins + "/build", pins + "-protect/link_imans_inode_unlink"} {
		if status, out := exits(t, fromContainer[0], append(fromContainer[1:], "rm", "-f", pin)...); status == 0 {
			t.Errorf("protected, remove %s: %s", pin, out)
		}
	}
	if status, _ := exits(t, "unshare", "--user", "--map-root-user", "kill", "-0", pids[0]); status == 0 {
		t.Error("protected: a signal from another user namespace")
	}
	notKeptOff(t, swtpm)
	signalByDescriptor(t, a.cmd.Process.Pid)
	if got := attempts(t, []string{"env"}, pins, pids...); strings.Count(got, harm) != len(pids) || !strings.HasSuffix(got, "pin folder") {
		t.Errorf("protected, from the host: %q", got)
	}
	awaitLog(t, a, "were refused")

	a.signal(syscall.SIGKILL)
	if got := attempts(t, fromContainer, pins, pids[1:]...); got != "" {
		t.Errorf("protected, with no agent: %q, want nothing", got)
	}
	a.under, a.args = fromContainer, append(a.args, "--ring-size", "1024") // another size: what is pinned is replaced
	a.start()
	a.under = nil
	if got := attempts(t, fromContainer, pins, append(pids[1:], strconv.Itoa(a.cmd.Process.Pid))...); got != "" {
		t.Errorf("protected by an agent in a container: %q, want nothing", got)
	}
	a.verifyNow(b.ns())
	a.signal(syscall.SIGTERM)
	a.args = plain
	a.start()
	if got := attempts(t, fromContainer, pins, swtpm); got != all {
		t.Errorf("an agent that is not to protect: %q, want %q", got, all)
	}
}

// asTPM returns what whoever has taken over a swtpm can do to the machine, the agent and other vTPMs, by names. Nothing of it harms.
func (a *agent) asTPM(t *testing.T, pid string, others []string) string {
	t.Helper()
	status := readFile(t, "/proc/"+pid+"/status")
	line := fmt.Sprintf(`tried() { what=$1; shift; if "$@" >/dev/null 2>&1; then echo $what; fi; }
opened() { : >>"$1"; }
tried own cat /proc/%s/fd/4/tpm2-00.permall
tried core_pattern opened /proc/sys/kernel/core_pattern
tried agent kill -0 %d
for pid in %s; do
	tried state cat /proc/$pid/fd/4/tpm2-00.permall
	tried signal kill -0 $pid
	tried memory head -c 0 /proc/$pid/mem
done
tried folders ls %s`, pid, a.cmd.Process.Pid, strings.Join(others, " "), a.dir)
	return strings.Join(strings.Fields(run(t, "setpriv", "--reuid", field(t, status, "Uid:"), "--regid", field(t, status, "Gid:"), "--clear-groups",
		"--no-new-privs", "--inh-caps=-all", "--bounding-set=-all", "bash", "-c", line)), " ")
}

// swtpmsOfEachKind returns the processes of the native list's TPM, of a namespace's own, and of two containers', one of which was ready in the pool.
func swtpmsOfEachKind(t *testing.T, a *agent) map[string]string {
	t.Helper()
	useWrapper(t, a)
	a.pooled(1)
	for _, id := range []string{"pooled", "other"} {
		startBundle(t, "runc", tenantRoot(t), id, nil)
	}
	a.pooled(1) // none is being made any more
	g := startGated(t, a, "exec")
	return map[string]string{
		"native": strconv.Itoa(a.softwarePID()), "namespace": g.tpm,
		"pooled": a.swtpmOf(a.dir + "/state/containers/pooled/"), "other": a.swtpmOf(a.dir + "/state/containers/other/"),
	}
}

// Once it has started, the agent has the capabilities and system calls that it needs and no others; so has what it starts. Each swtpm has no
// capability, and reaches nothing that is not its own.
func TestNeverSilentConfined(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t, "--namespaces", "all", "--gate", "exec", "--tpm", "swtpm", "--vtpm-pool", "1")
	kinds := swtpmsOfEachKind(t, a)
	users := map[string]string{"0": "root"}
	for kind, pid := range kinds {
		uid := field(t, readFile(t, "/proc/"+pid+"/status"), "Uid:")
		if other, ok := users[uid]; ok {
			t.Errorf("the user of %s, %s, is that of %s", kind, uid, other)
		}
		users[uid] = kind
		var others []string
		for other, pid := range kinds {
			if other != kind {
				others = append(others, pid)
			}
		}
		if got := a.asTPM(t, pid, others); got != "own" {
			t.Errorf("who has taken over the swtpm of %s can reach: %q, want its own state alone", kind, got)
		}
	}
	const needed = 0x8008ac11ef // of package confine
	swtpms := 0
	pids := a.processes()
	if len(pids) < 3 {
		t.Errorf("agent, guard and swtpm: %v", pids)
	}
	for _, pid := range pids {
		status := readFile(t, fmt.Sprintf("/proc/%d/status", pid))
		name, may := field(t, status, "Name:"), uint64(needed)
		if name == "swtpm" {
			swtpms, may = swtpms+1, 0
			if field(t, status, "NoNewPrivs:") != "1" {
				t.Errorf("swtpm can gain privileges: %s", status)
			}
		}
		for _, set := range []string{"CapPrm:", "CapEff:", "CapInh:", "CapAmb:", "CapBnd:"} {
			if got, err := strconv.ParseUint(field(t, status, set), 16, 64); err != nil || got&^may != 0 {
				t.Errorf("%s (%d): %s %x, want at most %x", name, pid, set, got, may)
			}
		}
		if field(t, status, "Seccomp:") != "2" {
			t.Errorf("%s (%d): no filter of system calls", name, pid)
		}
	}
	if swtpms == 0 {
		t.Error("no swtpm")
	}
	out, err := exec.Command(program, append(a.folders(), "--policy", "exec", "--confine=false")...).CombinedOutput()
	if err == nil || !strings.Contains(string(out), "another imans-agent is running") {
		t.Errorf("--confine=false: %v %s", err, out)
	}
}

// vTPMs of an agent that ran them as root go on with the next, which has users for them.
func TestNeverSilentConfinedUpgrade(t *testing.T) {
	sample(t, "6.12")
	a := newAgent(t, "--namespaces", "all", "--tpm", "swtpm")
	plain := a.args
	a.args = append(plain[:len(plain):len(plain)], "--swtpm-user", "root")
	a.start()
	b := startUnshared(t, 1, a.windowDir())
	b.sh("true")
	a.settled(b.ns())
	own, native := a.swtpmOf(fmt.Sprintf("%s/run/tpm/%s-", a.dir, b.ns())), strconv.Itoa(a.softwarePID())
	a.signal(syscall.SIGKILL)
	a.args = plain
	a.start()
	b.sh("printf '#!/bin/sh\n' >/tmp/upgraded; chmod 755 /tmp/upgraded; /tmp/upgraded")
	a.verifyNow(b.ns())
	for old, now := range map[string]string{own: a.swtpmOf(fmt.Sprintf("%s/run/tpm/%s-", a.dir, b.ns())), native: strconv.Itoa(a.softwarePID())} {
		if uid := field(t, readFile(t, "/proc/"+now+"/status"), "Uid:"); now != old || uid != "0" {
			t.Errorf("process %s of user %s is the TPM now, it was %s of root", now, uid, old)
		}
	}
	later := startUnshared(t, 1, a.windowDir())
	later.sh("true")
	a.settled(later.ns())
	pid := a.swtpmOf(fmt.Sprintf("%s/run/tpm/%s-", a.dir, later.ns()))
	if got := a.asTPM(t, pid, []string{own, native}); got != "own" {
		t.Errorf("beside vTPMs of root's who has taken over another can reach: %q", got)
	}
	if got := a.asTPM(t, own, []string{native}); got != "own core_pattern agent state signal memory folders" {
		t.Errorf("who has taken over root's can reach: %q", got)
	}
}

// field returns the first word of a line of /proc/PID/status.
func field(t *testing.T, status, name string) string {
	t.Helper()
	for line := range strings.Lines(status) {
		if rest, ok := strings.CutPrefix(line, name); ok {
			return strings.Fields(rest)[0]
		}
	}
	t.Fatalf("no %s in %s", name, status)
	return ""
}
