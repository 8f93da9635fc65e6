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
)

// gated is a mount namespace with a gate, on the machine's own file systems.
type gated struct {
	*agent
	t   *testing.T
	pid int
	ns  string
	dir string // a folder on ext4 that it sees
	tpm string // process number of its vTPM

	stopped time.Duration // how long waits stops the vTPM
}

// startGated makes a namespace and gives it a gate.
func startGated(t *testing.T, a *agent, mode string) *gated {
	t.Helper()
	cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sleep", "infinity")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cmd.Process.Kill()
		cmd.Wait()
	})
	g := &gated{agent: a, t: t, pid: cmd.Process.Pid, dir: tempDir(t, "/srv"), stopped: 2 * time.Second}
	own := mountNS(t, os.Getpid())
	for deadline := time.Now().Add(time.Minute); mountNS(t, g.pid) == own || !strings.Contains(readFile(t, fmt.Sprintf("/proc/%d/comm", g.pid)), "sleep"); {
		if time.Now().After(deadline) {
			t.Fatal("unshare does not run sleep")
		}
		time.Sleep(10 * time.Millisecond)
	}
	g.ns = fmt.Sprint(mountNS(t, g.pid))
	g.settled(g.ns)
	g.tpm = g.swtpmOf(fmt.Sprintf("%s/run/tpm/%s-", a.dir, g.ns))
	g.cli("ns", "gate", g.ns, mode)
	return g
}

// command is a program that runs in the namespace.
func (g *gated) command(name string, args ...string) *exec.Cmd {
	return exec.CommandContext(g.t.Context(), "nsenter", append([]string{"--target", strconv.Itoa(g.pid), "--mount", "--", name}, args...)...)
}

func (g *gated) runs(name string, args ...string) {
	g.t.Helper()
	if out, err := g.command(name, args...).CombinedOutput(); err != nil {
		g.t.Errorf("%s: %v %s", name, err, out)
	}
}

// script makes a script that tells when it ran by making a file.
func (g *gated) script(name string) (path, ran string) {
	g.t.Helper()
	path, ran = filepath.Join(g.dir, name), filepath.Join(g.dir, name+".ran")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n: >"+ran+"\n"), 0o755); err != nil {
		g.t.Fatal(err)
	}
	return path, ran
}

func (g *gated) signalTPM(s syscall.Signal) {
	g.t.Helper()
	pid, err := strconv.Atoi(g.tpm)
	if err != nil {
		g.t.Fatal(err)
	}
	if err := syscall.Kill(pid, s); err != nil {
		g.t.Fatal(err)
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

// violations counts the violations of its list by name.
func (g *gated) violations() map[string]int {
	g.t.Helper()
	_, violations := names(g.list(g.ns))
	return violations
}

// whileStopped starts a command, stops the vTPM for a while from before that, and returns how the command ended, and whether by then it had
// made the file that tells that it ran.
func (g *gated) whileStopped(cmd *exec.Cmd, ran string, d time.Duration) (early bool, err error) {
	g.t.Helper()
	g.signalTPM(syscall.SIGSTOP)
	if err := cmd.Start(); err != nil {
		g.t.Fatal(err)
	}
	time.Sleep(d)
	early = exists(ran)
	g.signalTPM(syscall.SIGCONT)
	return early, cmd.Wait()
}

// waits checks that a script waits while the TPM takes nothing, and runs when it does.
func (g *gated) waits(name string) {
	g.t.Helper()
	path, ran := g.script(name)
	g.runs("/bin/sh", "-c", ":") // what the script needs is measured
	early, err := g.whileStopped(g.command(path), ran, g.stopped)
	if err != nil {
		g.t.Errorf("%s: %v", path, err)
	}
	if early {
		g.t.Errorf("%s ran while its TPM did not have it", path)
	}
	if !exists(ran) {
		g.t.Errorf("%s did not run", path)
	}
	if measured, violations := names(g.list(g.ns)); measured[path] != 1 || violations[path] != 0 {
		g.t.Errorf("%s: %d entries, violations %v", path, measured[path], violations)
	}
}

// A gated program waits until its entry is in the TPM; the next time, and the file unchanged, nobody is asked.
func TestNeverSilentGate(t *testing.T) {
	sample(t, "6.1", "6.18")
	began := time.Now()
	a := startAgent(t, "--namespaces", "all", "--gate-timeout", "20s")
	g := startGated(t, a, "exec")
	g.waits("first")
	if v := g.violations(); len(v) != 0 {
		t.Errorf("violations %v", v)
	}

	t.Run("nested", func(t *testing.T) {
		path, ran := g.script("nested")
		g.runs("unshare", "--mount", path)
		if !exists(ran) || len(g.violations()) != 0 {
			t.Errorf("ran: %v, violations %v", exists(ran), g.violations())
		}
		if measured, _ := names(g.list(g.ns)); measured[path] != 1 {
			t.Errorf("%d entries", measured[path])
		}
	})
	t.Run("asked once", func(t *testing.T) {
		path := filepath.Join(g.dir, "again")
		makeProgram(t, path)
		time.Sleep(100 * time.Millisecond) // younger than its clock's step, a content is never settled
		g.runs(path)
		g.runs(path)
		before := g.asked()
		g.runs("/bin/sh", "-c", "for i in 1 2 3 4 5 6 7 8 9 10; do "+path+"; done")
		if n := g.asked() - before; n >= 10 {
			t.Errorf("%d questions for ten runs", n)
		}
		if err := os.WriteFile(path, tinyProgram("changed"), 0o755); err != nil {
			t.Fatal(err)
		}
		g.runs(path)
		if measured, violations := names(g.list(g.ns)); measured[path] != 2 || len(violations) != 0 {
			t.Errorf("after a change: %d entries, violations %v", measured[path], violations)
		}
	})
	t.Run("the machine's", func(t *testing.T) { // programs of the same file system, by its own mount
		path := filepath.Join(g.dir, "machine")
		makeProgram(t, path)
		before := g.asked()
		for range 10 {
			runProgram(t, path)
		}
		if n := g.asked() - before; n != 0 {
			t.Errorf("%d questions about the machine's programs", n)
		}
		g.runs(path)
		if n := g.asked() - before; n == 0 {
			t.Error("the namespace runs it without a question")
		}
	})
	t.Run("first act", func(t *testing.T) {
		n := sized(20, 1000, 1000)
		log := filepath.Join(a.dir, "state/boots", strings.TrimSpace(readFile(t, "/proc/sys/kernel/random/boot_id")), "ns")
		folders, err := filepath.Glob(log + "/" + g.ns + "-*")
		if err != nil || len(folders) != 1 {
			t.Fatalf("folders %v, %v", folders, err)
		}
		load := startLoad(t, tempDir(t, "/root"), 1<<30, 1)
		for i := range n {
			path := fmt.Sprintf("%s/act%d", g.dir, i)
			text := fmt.Sprintf("#!/usr/local/bin/firstact %s/binary_runtime_measurements %s/run/agent.sock %s\n# %d\n", folders[0], a.dir, g.ns, i)
			if err := os.WriteFile(path, []byte(text), 0o755); err != nil {
				t.Fatal(err)
			}
			g.signalTPM(syscall.SIGSTOP)
			cont := time.AfterFunc(100*time.Millisecond, func() { g.signalTPM(syscall.SIGCONT) })
			g.runs(path)
			cont.Stop()
			g.signalTPM(syscall.SIGCONT)
			os.Remove(path)
		}
		load.stop()
		if v := g.violations(); len(v) != 0 {
			t.Errorf("violations %v", v)
		}
	})
	t.Run("out of reach", func(t *testing.T) { // a file system that is mounted later, and a file without one
		path := g.dir + "/mnt/late"
		if err := os.Mkdir(g.dir+"/mnt", 0o755); err != nil {
			t.Fatal(err)
		}
		g.runs("mount", "-t", "tmpfs", "none", g.dir+"/mnt")
		g.runs("cp", "/bin/true", path)
		g.runs(path)
		if v := g.violations(); v[path] != 1 {
			t.Errorf("violations %v", v)
		}
		next := g.dir + "/mnt/next" // by now the file system is watched
		makeProgram(t, g.dir+"/next")
		g.runs("cp", g.dir+"/next", next)
		g.runs(next)
		if measured, v := names(g.list(g.ns)); measured[next] != 1 || v[next] != 0 {
			t.Errorf("%d entries, violations %v", measured[next], v)
		}
	})
	t.Run("refused", func(t *testing.T) {
		for _, args := range [][]string{
			{"ns", "gate", "native", "exec", "--run-dir", a.dir + "/run"}, {"ns", "gate", g.ns, "ajar", "--run-dir", a.dir + "/run"},
			{"--policy", "exec", "--gate", "ajar"}, {"--policy", "exec", "--gate-timeout", "1ms"},
		} {
			if status, out := exits(t, program, args...); status == 0 || !strings.Contains(out, "gate") {
				t.Errorf("%v: status %d, %s", args, status, out)
			}
		}
	})
	a.verifyNow(g.ns)
	if s, err := g.client().Status(t.Context()); err != nil || time.Duration(s.Latency.Max)*time.Microsecond > time.Since(began) {
		t.Errorf("a question counts as a hook: the longest took %d µs, %v", s.Latency.Max, err)
	}
	g.cli("ns", "gate", g.ns, "off")
	path, ran := g.script("off")
	g.signalTPM(syscall.SIGSTOP)
	g.runs(path)
	g.signalTPM(syscall.SIGCONT)
	if !exists(ran) {
		t.Error("without a gate a program waits")
	}
}

// With all, what a program maps executable waits too.
func TestNeverSilentGateAll(t *testing.T) {
	sample(t, "6.12")
	g := startGated(t, startAgent(t, "--namespaces", "all", "--gate-timeout", "20s"), "all")
	library, ran := filepath.Join(g.dir, "lib.so"), filepath.Join(g.dir, "ran")
	sh(t, "cp -L $(ldd /bin/ls | grep -o '/[^ ]*/libselinux[^ ]*\\|/[^ ]*/libc.so[^ ]*' | head -n 1) "+library+" && echo unique >>"+library)
	line := "LD_PRELOAD=" + library + " /bin/ls / >/dev/null && : >" + ran
	g.runs("/bin/sh", "-c", "/bin/ls / >/dev/null") // all but the library is measured
	early, err := g.whileStopped(g.command("/bin/sh", "-c", line), ran, g.stopped)
	if err != nil || early || !exists(ran) {
		t.Errorf("%v; it ran early: %v, ran: %v", err, early, exists(ran))
	}
	if measured, violations := names(g.list(g.ns)); measured[library] != 1 || len(violations) != 0 {
		t.Errorf("%d entries, violations %v", measured[library], violations)
	}
}

// Whoever lets a file system hang holds up nobody by what is mounted below it.
func TestNeverSilentGateWayHangs(t *testing.T) {
	sample(t, "6.12")
	g := startGated(t, startAgent(t, "--namespaces", "all", "--gate-timeout", "20s"), "exec")
	hanging := g.dir + "/hanging"
	sh(t, "mkdir -p "+g.dir+"/behind/below")
	server := g.serves(g.dir+"/behind", hanging, "1")
	g.runs("mount", "-t", "tmpfs", "none", hanging+"/below")
	server.Process.Signal(syscall.SIGSTOP)
	time.Sleep(2 * time.Second) // what the kernel knows of a name is good for a second
	began := time.Now()
	g.cli("ns", "gate", g.ns, "all")
	if took := time.Since(began); took > 15*time.Second {
		t.Errorf("the gate was open after %v", took)
	}
	if log := g.log.String(); !strings.Contains(log, "the way to it hangs") {
		t.Errorf("nothing hung: %s", tail(log, 2000))
	}
	g.waits("meanwhile")
}

// A container that is given its vTPM is given its gate, which watches its own file system and not the machine's.
func TestNeverSilentGateOfContainer(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t, "--namespaces", "containers", "--gate-timeout", "20s")
	useWrapper(t, a)
	root := tenantRoot(t)
	sh(t, fmt.Sprintf("mount -t tmpfs none %[1]s && mkdir -p %[1]s/proc %[1]s/dev %[1]s/sys %[1]s/tmp %[1]s/bin && cp /bin/busybox %[1]s/bin/ && for c in sh mkdir sleep cat true; do ln -s busybox %[1]s/bin/$c; done", root))
	t.Cleanup(func() { exec.Command("umount", "--lazy", root).Run() })
	c := startBundle(t, "runc", root, "gated", func(spec map[string]any) {
		mounts := spec["mounts"].([]any)
		spec["mounts"] = mounts[:len(mounts)-1] // without the machine's programs
	})
	g := &gated{agent: a, t: t, pid: c.pid, ns: c.ns(), dir: root, tpm: a.swtpmOf(a.dir + "/state/containers/gated/")}
	if out := a.cli("ns", "show", g.ns); !strings.Contains(out, "exec") {
		t.Errorf("no gate: %s", out)
	}
	run := func(name string) *exec.Cmd {
		text := fmt.Sprintf("#!/bin/sh\n: >/tmp/%s.ran\n", name)
		if err := os.WriteFile(root+"/tmp/"+name, []byte(text), 0o755); err != nil {
			t.Fatal(err)
		}
		return exec.Command(c.exec[0], append(c.exec[1:], "/tmp/"+name)...)
	}
	if out, err := run("first").CombinedOutput(); err != nil {
		t.Fatalf("%v %s", err, out)
	}
	early, err := g.whileStopped(run("held"), root+"/tmp/held.ran", 3*time.Second)
	if err != nil || early || !exists(root+"/tmp/held.ran") {
		t.Errorf("%v; it ran early: %v, ran: %v", err, early, exists(root+"/tmp/held.ran"))
	}
	before := g.asked()
	for range 10 {
		sh(t, "true")
	}
	if n := g.asked() - before; n != 0 {
		t.Errorf("%d questions about the machine's programs", n)
	}
	a.verifyNow(g.ns)
	a.removed(c)
}

// A container that asks for a gate has it from its first program on, with a vTPM or without; one that asks for less than others get has what
// they have.
func TestNeverSilentGateAnnotated(t *testing.T) {
	sample(t, "6.18")
	a := startAgent(t, "--namespaces", "containers", "--gate", "off", "--gate-timeout", "20s")
	useWrapper(t, a)
	annotated := func(id string, annotations map[string]string) (c *tenant, root, start string) {
		root = tenantRoot(t)
		c, start = makeBundle(t, "runc", root, id, func(spec map[string]any) { spec["annotations"] = annotations })
		return c, root, start
	}
	first, root, start := annotated("first", map[string]string{"imans.dev/gate": "exec", "imans.dev/required": "true"})
	sh(t, strings.Replace(start, "run --detach", "create", 1))
	first.started(root)
	g := &gated{agent: a, t: t, pid: first.pid, ns: first.ns(), tpm: a.swtpmOf(a.dir + "/state/containers/first/")}
	early, err := g.whileStopped(exec.Command("imans-runc", "start", "first"), root+"/tmp/ready", 3*time.Second)
	if err != nil || early {
		t.Errorf("%v; the first program ran early: %v", err, early)
	}
	ready(t, first)
	if v := g.violations(); len(v) > 0 {
		t.Errorf("violations %v", v)
	}
	a.removed(first)

	gate := func(id string, annotations map[string]string, want string) {
		t.Helper()
		c, root, start := annotated(id, annotations)
		sh(t, start)
		c.started(root)
		if got := a.settled(ready(t, c).ns()).Gate; got != want {
			t.Errorf("container %s has the gate %q, want %q", id, got, want)
		}
		a.verifyNow(c.ns())
		a.removed(c)
	}
	if !short() {
		gate("plain", nil, "")
		gate("without", map[string]string{"imans.dev/gate": "exec", "imans.dev/vtpm": "false"}, "exec")
	}
	for _, wrong := range []string{"ajar", ""} {
		_, root, start := annotated("wrong", map[string]string{"imans.dev/gate": wrong})
		if status, out := exits(t, "/bin/sh", "-c", start); status == 0 || !strings.Contains(out, `want "off", "exec", "all", "exec-closed" or "all-closed"`) || exists(root+"/tmp/ready") {
			t.Errorf("annotation %q: status %d, ran: %v, %s", wrong, status, exists(root+"/tmp/ready"), out)
		}
	}
	a.signal(syscall.SIGTERM)
	a.args = append(a.args, "--gate", "exec") // the later one counts
	a.start()
	gate("less", map[string]string{"imans.dev/gate": "off"}, "exec")
	gate("more", map[string]string{"imans.dev/gate": "all"}, "all")
}

// Gates that come and go with their namespaces leave the agent as it was.
func TestNeverSilentGateCycles(t *testing.T) {
	sample(t, "6.1")
	a := startAgent(t, "--namespaces", "all", "--ns-tpm", "none", "--gate-timeout", "20s")
	own, client := mountNS(t, os.Getpid()), a.client()
	cycle := func(n int) {
		t.Helper()
		for range n {
			cmd := exec.Command("unshare", "--mount", "--propagation", "private", "sleep", "infinity")
			if err := cmd.Start(); err != nil {
				t.Fatal(err)
			}
			g := &gated{agent: a, t: t, pid: cmd.Process.Pid}
			g.waitsFor("unshare runs sleep", func() bool {
				return mountNS(t, g.pid) != own && strings.Contains(readFile(t, fmt.Sprintf("/proc/%d/comm", g.pid)), "sleep")
			})
			g.ns = fmt.Sprint(mountNS(t, g.pid))
			if n, err := client.SetGate(t.Context(), g.ns, "exec"); err != nil || n.Gate != "exec" {
				t.Errorf("gate %q, %v", n.Gate, err)
			}
			g.runs("/bin/sh", "-c", ":")
			cmd.Process.Kill()
			cmd.Wait()
			g.waitsFor("the namespace is gone", func() bool {
				_, err := client.Namespace(t.Context(), g.ns)
				return err != nil
			})
		}
	}
	cycle(3)
	a.leavings()
	before, asked := a.leavings(), (&gated{agent: a, t: t}).asked()
	cycle(sized(12, 30, 1000))
	if n := (&gated{agent: a, t: t}).asked() - asked; n < 12 {
		t.Errorf("%d questions", n)
	}
	a.asBefore(before, 2<<10)
}

// asked is how many questions were answered.
func (g *gated) asked() uint64 {
	g.t.Helper()
	s, err := g.client().Status(g.t.Context())
	if err != nil {
		g.t.Fatal(err)
	}
	return s.Asked
}

// An answer that comes too late lets the program run, and the list says so; a closed gate does not.
func TestNeverSilentGateTooLate(t *testing.T) {
	sample(t, "6.12")
	for _, closed := range []bool{false, true} {
		t.Run(fmt.Sprintf("closed=%v", closed), func(t *testing.T) {
			args := []string{"--namespaces", "all", "--gate-timeout", "4s"}
			if closed {
				args = append(args, "--gate-closed")
			}
			g := startGated(t, startAgent(t, args...), "exec")
			g.runs("/bin/sh", "-c", ":")
			path, ran := g.script("late")
			g.signalTPM(syscall.SIGSTOP)
			out, err := g.command(path).CombinedOutput()
			g.signalTPM(syscall.SIGCONT)
			if exists(ran) == closed || (err == nil) == closed {
				t.Errorf("ran: %v, %v %s", exists(ran), err, out)
			}
			g.settled(g.ns)
			if v := g.violations(); !closed && v[path] != 1 || closed && len(v) != 0 {
				t.Errorf("violations %v", v)
			}
			inTime, _ := g.script("in time") // until one is, opens wait a quarter of the time
			g.runs(inTime)
			g.stopped = 500 * time.Millisecond
			g.waits("afterwards")
		})
	}
}

func (g *gated) waitsFor(what string, holds func() bool) {
	g.t.Helper()
	for deadline := time.Now().Add(time.Minute); !holds(); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			g.t.Fatalf("%s: not within a minute", what)
		}
	}
}
