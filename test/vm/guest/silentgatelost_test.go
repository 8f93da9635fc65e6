//go:build vm

package guest

import (
	"fmt"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"
)

// An agent that hangs holds up nobody for long: its guard lets all through. When it goes on, so does the gate, and the list tells of what ran.
func TestNeverSilentGateHangs(t *testing.T) {
	sample(t, "6.18")
	g := startGated(t, startAgent(t, "--namespaces", "all", "--gate-timeout", "3s"), "exec")
	g.runs("/bin/sh", "-c", ":")
	path, ran := g.script("hangs")
	g.cmd.Process.Signal(syscall.SIGSTOP)
	began := time.Now()
	g.runs(path)
	if took := time.Since(began); took > 30*time.Second || !exists(ran) {
		t.Errorf("ran: %v, after %v", exists(ran), took)
	}
	sh(t, "true") // the machine itself is not held up
	g.cmd.Process.Signal(syscall.SIGCONT)
	g.waitsFor("what ran is told of", func() bool { return g.violations()[path] >= 1 })
	g.waitsUntilGated()
}

// waitsUntilGated returns when programs wait for the TPM again.
func (g *gated) waitsUntilGated() {
	g.t.Helper()
	next := 0
	g.waitsFor("the gate is back", func() bool {
		path, ran := g.script(fmt.Sprintf("back%d", next))
		next++
		early, _ := g.whileStopped(g.command(path), ran, time.Second)
		return !early
	})
}

// What runs while there is no agent is told of when there is one again, and the gate is back. A closed gate lets nothing run meanwhile, but
// what it does not concern: another namespace may have a gate that is not closed.
func TestNeverSilentGateKilled(t *testing.T) {
	sample(t, "6.1")
	for _, closed := range []bool{false, true} {
		t.Run(fmt.Sprintf("closed=%v", closed), func(t *testing.T) {
			a, mode := startAgent(t, "--namespaces", "all", "--gate-timeout", "20s"), "exec"
			if closed {
				mode = "exec-closed"
			}
			g, other := startGated(t, a, mode), startGated(t, a, "exec")
			g.runs("/bin/sh", "-c", ":")
			path, ran := g.script("between")
			g.signal(syscall.SIGKILL)
			out, err := g.command(path).CombinedOutput()
			if exists(ran) == closed || (err == nil) == closed {
				t.Errorf("ran: %v, %v %s", exists(ran), err, out)
			}
			own := tempDir(t, "/root") + "/own"
			makeProgram(t, own)
			runProgram(t, own)
			theirs, _ := other.script("theirs")
			other.runs(theirs)
			g.start()
			if v := g.violations(); !closed && v[path] != 1 || closed && len(v) != 0 {
				t.Errorf("violations %v", v)
			}
			again, ran := g.script("again")
			g.waitsFor("the gate is back", func() bool { return g.command(again).Run() == nil })
			if closed && g.violations()[again] != 0 {
				t.Errorf("violations %v", g.violations())
			}
			if !exists(ran) {
				t.Error("it did not run")
			}
			g.waitsUntilGated()
			g.signal(syscall.SIGTERM)
			last, ran := g.script("last") // the gate is open when the agent has stopped in order; a closed one until it is unloaded
			if err := g.command(last).Run(); (err == nil) == closed || exists(ran) == closed {
				t.Errorf("without an agent: ran %v, %v", exists(ran), err)
			}
			run(t, program, append([]string{"unload"}, g.folders()...)...)
			g.runs(last)
		})
	}
}

// Agent and guard that are killed in the same moment may hold each other up while programs wait at gates that watch the same files (ADR 0014). Then
// the next agent names these programs, and starts when they are killed.
func TestNeverSilentGateKilledWhole(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t, "--namespaces", "all", "--gate-timeout", "20s")
	both := []*gated{startGated(t, a, "exec"), startGated(t, a, "exec")}
	var waiting []*exec.Cmd
	var ran [2]string
	for i, g := range both { // what one gate knows is asked about by the other: of two groups the kernel asks one first
		var path string
		path, ran[i] = g.script("known")
		knows := both[1-i]
		knows.waitsFor("it asks no more about it", func() bool {
			knows.runs(path)
			// Source: fs/notify/fdinfo.c, fanotify_fdinfo.
			return exec.Command("grep", "-rqs", "fanotify ino:"+sh(t, "printf %x $(stat -c %i "+path+") "), fmt.Sprintf("/proc/%d/fdinfo", a.cmd.Process.Pid)).Run() == nil
		})
		if err := os.Remove(ran[i]); err != nil {
			t.Fatal(err)
		}
		g.runs("/bin/sh", "-c", ":")
		waiting = append(waiting, g.command(path))
	}
	a.cmd.Process.Signal(syscall.SIGSTOP)
	for i, cmd := range waiting {
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		both[i].waitsFor("it waits", func() bool {
			return strings.HasPrefix(readFile(t, fmt.Sprintf("/proc/%d/wchan", cmd.Process.Pid)), "fanotify_")
		})
	}
	guard := sh(t, fmt.Sprintf("pgrep -P %d -f gate-guard", a.cmd.Process.Pid))
	sh(t, fmt.Sprintf("kill -9 %d %s", a.cmd.Process.Pid, guard))

	named, killed := regexp.MustCompile(`kill"?:? ?\[([0-9 ,]+)\]`), false
	killNamed := func() {
		if found := named.FindStringSubmatch(a.log.String()); found != nil {
			sh(t, "kill -9 "+strings.ReplaceAll(found[1], ",", " "))
			killed = true
		}
	}
	a.launch()
	both[0].waitsFor("the next agent starts", func() bool {
		if a.answers(time.Second) == nil {
			return true
		}
		select {
		case <-a.exited:
			killNamed()
			a.launch()
		default:
		}
		return false
	})
	ended := make(chan error, len(waiting))
	for _, cmd := range waiting {
		go func() { ended <- cmd.Wait() }()
	}
	time.Sleep(time.Second) // what is not held up has ended
	killNamed()
	for range waiting {
		select {
		case err := <-ended:
			if err != nil && !killed {
				t.Errorf("what waited: %v", err)
			}
		case <-time.After(time.Minute):
			t.Fatalf("what waited waits still: %s", a.stands())
		}
	}
	if !killed && !(exists(ran[0]) && exists(ran[1])) {
		t.Error("what waited did not run")
	}
	t.Logf("they held each other up: %v", killed)
	both[0].waitsUntilGated()
}
