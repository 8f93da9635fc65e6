//go:build vm

package guest

import (
	"fmt"
	"os"
	"testing"
	"time"
)

// The machine goes to sleep while programs run, as far as the freezing of all its tasks, and wakes after five seconds: the kernel's own test
// of that (pm_test). It counts them with a loop, which is over sooner on an emulated processor with Linux 6.1. Devices don't sleep: the virtual
// machine's file systems (9p) don't outlive that. Nothing is lost, and the registers replay.
func TestNeverSilentFrozen(t *testing.T) {
	const successes = "/sys/power/suspend_stats/success" // how often the machine slept
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

// bootTime is the time since boot, with that of sleep.
func bootTime(t *testing.T) time.Duration {
	t.Helper()
	var seconds float64
	if _, err := fmt.Sscan(readFile(t, "/proc/uptime"), &seconds); err != nil {
		t.Fatal(err)
	}
	return time.Duration(seconds * float64(time.Second))
}
