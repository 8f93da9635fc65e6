//go:build vm

package guest

import (
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
	"time"
)

// successes is how often the machine slept.
const successes = "/sys/power/suspend_stats/success"

// The machine goes to sleep while programs run, as far as the freezing of all its tasks, and wakes after five seconds: the kernel's own test
// of that (pm_test). It counts them with a loop, which is over sooner on an emulated processor with Linux 6.1. Devices don't sleep: the virtual
// machine's file systems (9p) don't outlive that. Nothing is lost, and the registers replay.
func TestNeverSilentFrozen(t *testing.T) {
	sample(t, "6.12")
	if _, err := os.Stat("/sys/power/pm_test"); err != nil {
		t.Skipf("the kernel has no test of its own: %v", err)
	}
	a := startAgent(t, "--namespaces", "all")
	c := &crashes{t: t, a: a, dir: tempDir(t, "/root") + "/programs"}
	c.standing = c.open()
	c.execute(nil, false)
	c.execute(c.standing, false)
	c.check()
	l := startLoad(t, tempDir(t, "/root"), 1<<30, 2)
	began, times := bootTime(t), readFile(t, successes)
	sh(t, "echo freezer >/sys/power/pm_test && echo freeze >/sys/power/state")
	slept := bootTime(t) - began
	digests := l.stop()
	c.execute(nil, false)
	c.execute(c.standing, false)
	a.catchesUp()
	t.Logf("%d programs around %v of sleep", len(digests), slept)
	if readFile(t, successes) == times || slept < 4*time.Second && os.Getenv("IMANS_VM_KERNEL") != "6.1" || len(digests) == 0 {
		t.Errorf("the machine did not sleep: %v, %d programs", slept, len(digests))
	}
	a.eachOnce(digests, true)
	c.check()
}

// What waits at a gate sleeps with the machine, and goes on afterwards: it runs when its TPM has it, and nothing is said of it. Linux 6.1 has no
// sleep for what waits for an answer of fanotify's: there the machine stays awake, and the rest holds.
func TestNeverSilentFrozenAtGate(t *testing.T) {
	sample(t, "6.18")
	if _, err := os.Stat("/sys/power/pm_test"); err != nil {
		t.Skipf("the kernel has no test of its own: %v", err)
	}
	g := startGated(t, startAgent(t, "--namespaces", "all", "--gate-timeout", "1m"), "exec")
	g.runs("/bin/sh", "-c", ":") // what the script needs is measured
	path, ran := g.script("sleeps")
	g.signalTPM(syscall.SIGSTOP)
	cmd := g.command(path)
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	g.waitsFor("it waits", func() bool { return heldUp(t, cmd.Process.Pid) })
	times := readFile(t, successes)
	out, err := exec.Command("sh", "-c", "echo freezer >/sys/power/pm_test && echo freeze >/sys/power/state").CombinedOutput()
	if slept := err == nil && readFile(t, successes) != times; slept == (os.Getenv("IMANS_VM_KERNEL") == "6.1") {
		t.Errorf("the machine slept: %v, %v %s", slept, err, out)
	}
	early := exists(ran)
	g.signalTPM(syscall.SIGCONT)
	if err := cmd.Wait(); err != nil || early || !exists(ran) {
		t.Errorf("%v; it ran early: %v, ran: %v", err, early, exists(ran))
	}
	if measured, violations := names(g.list(g.ns)); measured[path] != 1 || len(violations) != 0 {
		t.Errorf("%d entries, violations %v", measured[path], violations)
	}
	g.waits("afterwards")
	g.verifyNow(g.ns)
}

// bootTime is the time since boot, with that of sleep.
func bootTime(t *testing.T) time.Duration {
	t.Helper()
	var seconds float64
	if _, err := fmt.Sscan(readFile(t, "/proc/uptime"), &seconds); err != nil {
		t.Fatal(err)
	}
	return time.Duration(seconds * float64(time.Second))
}
