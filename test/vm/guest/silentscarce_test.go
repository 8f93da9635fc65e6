//go:build vm

package guest

import (
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"

	"golang.org/x/sys/unix"
)

// Where time is short the agent runs before others, and its vTPMs as any program; where memory runs out neither of them is ended, and
// nothing that ran meanwhile is missing.
func TestNeverSilentScarce(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t, "--namespaces", "all", "--gate", "exec")
	g := startGated(t, a, "exec")
	before := a.standings()
	for name, want := range map[string]standing{"imans-agent": {nice: -10, oom: "-999", locked: true}, "swtpm": {nice: 0, oom: "-999"}} {
		if len(before[name]) == 0 {
			t.Errorf("no %s", name)
		}
		for pid, threads := range before[name] {
			if slices.ContainsFunc(threads, func(s standing) bool { return s != want }) {
				t.Errorf("%s (%d): %+v, want %+v", name, pid, threads, want)
			}
		}
	}
	if n := len(before["imans-agent"]); n != 2 {
		t.Errorf("%d processes, want the agent and its gates' guard", n)
	}
	// Less memory runs out sooner.
	sh(t, "awk '/^MemAvailable/ { print int($2 / 2048) - 200 }' /proc/meminfo >/proc/sys/vm/nr_hugepages")
	t.Cleanup(func() { os.WriteFile("/proc/sys/vm/nr_hugepages", []byte("0"), 0) })
	l := startLoad(t, tempDir(t, "/root"), 1<<30, 2)
	for range sized(1, 3, 20) {
		// The kernel chooses by what a process has; tail keeps a line that never ends.
		err := exec.Command("tail", "/dev/zero").Run()
		if exit, ok := err.(*exec.ExitError); !ok || exit.Sys().(syscall.WaitStatus).Signal() != syscall.SIGKILL {
			t.Errorf("a program that takes all memory: %v, want it killed", err)
		}
	}
	digests := l.stop()
	a.catchesUp()
	after := a.standings()
	for name, was := range before {
		for pid := range was {
			if _, runs := after[name][pid]; !runs {
				t.Errorf("%s (%d) does not run any more: %+v", name, pid, after[name])
			}
		}
	}
	a.eachOnce(digests, true)
	a.verifyNow(g.ns)
	a.verifyNow("native")

	// Who may not have that goes on without, and says so.
	a.signal(syscall.SIGTERM)
	a.under = []string{"setpriv", "--bounding-set=-sys_nice,-sys_resource"}
	a.start()
	awaitLog(t, a, "set nice to -10: ")
	awaitLog(t, a, "set oom_score_adj to -999: ")
	for _, s := range a.standings()["imans-agent"][a.cmd.Process.Pid] {
		if s.nice != 0 || s.oom != "0" {
			t.Errorf("without the capabilities: %+v", s)
		}
	}
	for option, value := range map[string]string{"--nice": "-21", "--oom-score-adj": "1001"} {
		if status, out := exits(t, program, append(a.folders(), "--policy", "exec", option, value)...); status != 2 || !strings.Contains(out, option+" "+value+": want ") {
			t.Errorf("%s %s: exit status %d, %s", option, value, status, out)
		}
	}
}

// standing is how a thread stands among others.
type standing struct {
	nice   int
	oom    string
	locked bool // a MiB of its process's memory, or more
}

// standings looks at all threads of the agent and of what it started, by the name of their program's file and process number.
func (a *agent) standings() map[string]map[int][]standing {
	a.t.Helper()
	found := map[string]map[int][]standing{}
	for _, pid := range a.processes() {
		dir := fmt.Sprintf("/proc/%d/", pid)
		exe, err := os.Readlink(dir + "exe")
		if err != nil {
			a.t.Fatal(err)
		}
		kib, err := strconv.Atoi(field(a.t, readFile(a.t, dir+"status"), "VmLck:"))
		if err != nil {
			a.t.Fatal(err)
		}
		tasks, err := os.ReadDir(dir + "task")
		if err != nil {
			a.t.Fatal(err)
		}
		name := filepath.Base(exe)
		if found[name] == nil {
			found[name] = map[int][]standing{}
		}
		for _, task := range tasks {
			tid, err := strconv.Atoi(task.Name())
			if err != nil {
				a.t.Fatal(err)
			}
			is, err := unix.Getpriority(unix.PRIO_PROCESS, tid)
			if err != nil {
				a.t.Fatal(err)
			}
			s := standing{nice: 20 - is, oom: strings.TrimSpace(readFile(a.t, dir+"oom_score_adj")), locked: kib >= 1<<10}
			found[name][pid] = append(found[name][pid], s)
		}
	}
	return found
}
