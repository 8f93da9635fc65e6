//go:build vm

package guest

import (
	"strconv"
	"strings"
	"syscall"
	"testing"

	"imans.dev/imans-agent/internal/fault"
)

// replacedPrefix begins the violation that tells of another kernel side.
const replacedPrefix = "imans-lost/programs_replaced/"

// replacements returns how often a list tells of another kernel side.
func (a *agent) replacements(list string) int {
	a.t.Helper()
	_, violations := names(a.list(list))
	return count(violations, replacedPrefix)
}

// When the kernel side is another than the lists know, each list that there was says so: something may have run unseen. vTPMs stay.
func TestNeverSilentKernelSide(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t, "--namespaces", "all")
	b := startUnshared(t, 1, a.windowDir())
	b.sh("true")
	a.settled(b.ns())
	swtpm := a.swtpmOf(a.dir + "/run/tpm/" + b.ns() + "-")
	pins := "/sys/fs/bpf/" + a.dir[strings.LastIndexByte(a.dir, '/')+1:]
	told := 0
	check := func(how string, more int) {
		t.Helper()
		told += more
		for _, list := range []string{"native", b.ns()} {
			if n := a.replacements(list); n != told {
				t.Errorf("%s: %d violations %s in the list %s, want %d", how, n, replacedPrefix, list, told)
			}
		}
	}
	check("at first", 0)

	a.signal(syscall.SIGTERM)
	a.start()
	check("started again", 0)

	a.signal(syscall.SIGTERM)
	a.args = append(a.args, "--ring-size", "1024")
	a.start()
	check("of another size", 1)

	a.signal(syscall.SIGKILL)
	sh(t, "rm "+pins+"/*")
	a.start()
	check("the pins cleaned away", 1)

	if now := a.swtpmOf(a.dir + "/run/tpm/" + b.ns() + "-"); now != swtpm {
		t.Errorf("the vTPM was process %s and is %s", swtpm, now)
	}
	b.sh("true")
	for _, list := range []string{"native", b.ns()} {
		a.verifyNow(list)
	}

	a.signal(syscall.SIGTERM)
	run(t, program, append([]string{"unload"}, a.folders()...)...)
	a.start()
	check("unloaded", 1)
}

// An agent that dies between telling of another kernel side and noting that it did leaves it to the next one to tell again.
func TestNeverSilentKernelSideCrashPoints(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t)
	a.signal(syscall.SIGTERM)
	a.fault = fault.KernelSideTold.String() + ":1"
	a.args = append(a.args, "--ring-size", "1024")
	a.launch()
	<-a.exited
	a.fault = ""
	a.start()
	if n := a.replacements("native"); n != 2 {
		t.Errorf("%d violations %s, want 2", n, replacedPrefix)
	}
	a.verifyNow("native")
}

// What another kernel side lost is no part of what this one did.
func TestNeverSilentLossesBeginAnew(t *testing.T) {
	sample(t, "6.18")
	a := startAgent(t, "--ring-size", "4")
	lose := func(programs int) {
		t.Helper()
		a.cmd.Process.Signal(syscall.SIGSTOP)
		startLoad(t, tempDir(t, "/root"), programs, 3).wait()
		a.cmd.Process.Signal(syscall.SIGCONT)
		a.catchesUp()
	}
	// lost adds up what the native list tells of since the kernel side is the one that it is.
	lost := func() (entries int, events uint64) {
		t.Helper()
		for _, e := range a.list("native") {
			if strings.HasPrefix(e.Name(), replacedPrefix) {
				entries, events = 0, 0
			}
			if rest, ok := strings.CutPrefix(e.Name(), "imans-lost/ring_buffer_full/"); ok {
				n, err := strconv.ParseUint(rest[strings.LastIndexByte(rest, '/')+1:], 10, 64)
				if err != nil {
					t.Fatal(err)
				}
				entries, events = entries+1, events+n
			}
		}
		return entries, events
	}
	lose(200)
	_, first := lost()
	a.signal(syscall.SIGTERM)
	a.args = append(a.args, "--ring-size", "8")
	a.start()
	if _, n := lost(); n != 0 {
		t.Errorf("at its start the new kernel side has lost %d", n)
	}
	lose(100)
	_, second := lost()
	if first == 0 || second == 0 || second >= first {
		t.Fatalf("lost %d, then %d: the test needs fewer the second time", first, second)
	}
	entries, _ := lost()
	a.signal(syscall.SIGKILL)
	a.start()
	a.catchesUp()
	if n, events := lost(); n != entries || events != second {
		t.Errorf("after a restart %d violations tell of %d losses, before %d of %d", n, events, entries, second)
	}
	a.verifyNow("native")
}
