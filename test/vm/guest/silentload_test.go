//go:build vm

package guest

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

// grownMax is how much the agent's own memory may grow under load, in KiB.
const grownMax = 48 << 10

// loadedAgent is an agent under a load that it can't keep up with. It goes on without a restart afterwards.
func loadedAgent(t *testing.T, under func(a *agent), args ...string) {
	t.Helper()
	a := startAgent(t, args...)
	a.caughtUp()
	before := a.memory()
	under(a)
	a.caughtUp()
	if grown := a.memory() - before; grown > grownMax {
		t.Errorf("the agent's memory has grown by %d KiB", grown)
	}
	after := tempDir(t, "/root") + "/after"
	makeProgram(t, after)
	runProgram(t, after)
	measured, violations := names(a.list("native"))
	if measured[after] != 1 {
		t.Errorf("what ran afterwards has %d entries", measured[after])
	}
	if n := count(violations, "imans-lost/"); n != 0 {
		t.Errorf("%d losses", n)
	}
	a.verifyNow("native")
}

// catchesUp waits until the lists have all that ran before, however far they are behind.
func (a *agent) catchesUp() {
	a.t.Helper()
	for deadline := time.Now().Add(5 * time.Minute); ; time.Sleep(200 * time.Millisecond) {
		err := a.answers(time.Minute)
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			a.t.Fatal(err)
		}
	}
}

// An agent that is stopped under load finds everything in the ring buffer when it goes on.
func TestNeverSilentStopped(t *testing.T) {
	sample(t, "6.1")
	loadedAgent(t, func(a *agent) {
		a.cmd.Process.Signal(syscall.SIGSTOP)
		began := time.Now()
		l := startLoad(t, tempDir(t, "/root"), sized(500, 3000, 20000), 3)
		digests := l.wait()
		if rest := time.Duration(sized(5, 60, 60))*time.Second - time.Since(began); rest > 0 {
			time.Sleep(rest)
		}
		a.cmd.Process.Signal(syscall.SIGCONT)
		a.catchesUp()
		a.eachOnce(digests, true)
	})
}

// Files that take long to hash hold up those behind them, and lose none.
func TestNeverSilentSlowHashing(t *testing.T) {
	sample(t, "6.12")
	loadedAgent(t, func(a *agent) {
		dir := tempDir(t, "/root")
		large := map[string]string{}
		for i := range sized(2, 4, 20) {
			path := fmt.Sprintf("%s/large%d", dir, i)
			makeProgram(t, path)
			if err := os.Truncate(path, 24<<20); err != nil {
				t.Fatal(err)
			}
			content, err := os.ReadFile(path)
			if err != nil {
				t.Fatal(err)
			}
			large[path] = digestOf(content)
		}
		a.catchesUp()
		l := startLoad(t, tempDir(t, "/root"), sized(100, 500, 5000), 2)
		for path := range large {
			runProgram(t, path)
		}
		small := l.wait()
		a.catchesUp()
		a.eachOnce(small, false)
		a.eachOnce(large, true)
	}, "--digest", "agent")
}

// A TPM that takes its time holds up no entry: the list has all, and the register when the TPM goes on.
func TestNeverSilentSlowTPM(t *testing.T) {
	sample(t, "6.12")
	loadedAgent(t, func(a *agent) {
		b := startUnshared(t, 1, a.windowDir())
		b.sh("true")
		a.settled(b.ns())
		pid := a.swtpmOf(fmt.Sprintf("%s/run/tpm/%s-", a.dir, b.ns()))
		sh(t, "kill -STOP "+pid)
		n := sized(50, 300, 3000)
		b.sh(fmt.Sprintf("i=0; while [ $i -lt %d ]; do printf '#!/bin/sh\n# %%d\n' $i >/tmp/s$i; chmod 755 /tmp/s$i; /tmp/s$i; rm /tmp/s$i; i=$((i + 1)); done", n))
		measured, violations := names(a.list(b.ns()))
		for i := range n {
			if measured[fmt.Sprintf("/tmp/s%d", i)] != 1 {
				t.Errorf("/tmp/s%d has %d entries; violations %v", i, measured[fmt.Sprintf("/tmp/s%d", i)], violations)
				break
			}
		}
		if s, err := a.client().Namespace(t.Context(), b.ns()); err != nil || s.Extended >= s.Entries {
			t.Errorf("while the TPM is stopped %d of %d entries are extended, %v", s.Extended, s.Entries, err)
		}
		sh(t, "kill -CONT "+pid)
		a.verifyNow(b.ns())
		if strings.Contains(a.cli("measurements", b.ns()), "imans-lost/") {
			t.Error("the list tells of losses")
		}
	}, "--namespaces", "all")
}

// Many programs at once wait at a gate for an agent that is too slow for them: that holds them up, and the agent keeps no more than it has room
// for. None is missing.
func TestNeverSilentGateLoad(t *testing.T) {
	sample(t, "6.1")
	a := startAgent(t, "--namespaces", "all", "--gate-timeout", "20s")
	g := startGated(t, a, "exec")
	g.runs("/bin/sh", "-c", ":")
	n := sized(200, 500, 3000)
	digests := map[string]string{}
	for i := range n {
		path := fmt.Sprintf("%s/p%d", g.dir, i)
		digests[path] = fmt.Sprintf("sha256:%x", makeProgram(t, path))
	}
	a.caughtUp()
	before, asked := a.most(), g.asked()
	slow, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case <-slow:
				return
			default:
			}
			a.cmd.Process.Signal(syscall.SIGSTOP)
			time.Sleep(200 * time.Millisecond)
			a.cmd.Process.Signal(syscall.SIGCONT)
			time.Sleep(50 * time.Millisecond)
		}
	}()
	began := time.Now()
	g.runs("/bin/sh", "-c", fmt.Sprintf("i=0; while [ $i -lt %d ]; do %s/p$i & i=$((i + 1)); done; wait", n, g.dir))
	t.Logf("%d programs in %v", n, time.Since(began).Round(time.Millisecond))
	close(slow)
	<-stopped
	a.catchesUp()
	questions := g.asked() - asked
	if grown := a.most() - before; grown > grownMax {
		t.Errorf("the agent's memory had grown by %d KiB", grown)
	}
	a.eachOnce(digests, false)
	measured, violations := names(a.list(g.ns))
	for path := range digests {
		if measured[path] != 1 && violations[path] == 0 {
			t.Errorf("%s: %d entries in its own list, and no violation", path, measured[path])
		}
	}
	if got := int(questions) + count(violations, g.dir); got < n {
		t.Errorf("%d questions and violations for %d programs", got, n)
	}
	if count(violations, "imans-lost/") != 0 {
		t.Errorf("losses: %v", violations)
	}
	a.verifyNow(g.ns)
}

// most is the most memory that the agent had until now, in KiB.
func (a *agent) most() int {
	a.t.Helper()
	kib, err := strconv.Atoi(field(a.t, readFile(a.t, fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid)), "VmHWM:"))
	if err != nil {
		a.t.Fatal(err)
	}
	return kib
}

// The agent is killed again and again while programs run whose files are gone before it hashes them: no entry and no violation is told
// twice. A program is two events, for its exec and for its mapping.
func TestNeverSilentKilled(t *testing.T) {
	sample(t, "6.1")
	a := startAgent(t, "--digest", "agent")
	digests := a.killedUnderLoad(sized(3, 10, 100))
	a.catchesUp()
	right, violations := a.found(digests)
	t.Logf("%d programs ran, %d entries, %d with violations", len(digests), len(right), len(violations))
	for path := range digests {
		if right[path] > 1 || violations[path] > 2 || right[path] == 0 && violations[path] == 0 {
			t.Errorf("%s: %d entries, %d violations", path, right[path], violations[path])
		}
	}
	if len(violations) == 0 {
		t.Error("nothing was gone before it was hashed")
	}
	a.verifyNow("native")
}
