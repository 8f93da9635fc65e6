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
	for _, name := range []string{"imans-agent", "swtpm"} {
		want := standing{nice: -10, oom: "-999"}
		if name == "swtpm" {
			want.nice = 0
		}
		if got := before[name]; len(got) == 0 || slices.ContainsFunc(got, func(s standing) bool { return s.nice != want.nice || s.oom != want.oom }) {
			t.Errorf("%s: %+v, want %+v", name, got, want)
		}
	}

	for _, name := range []string{"imans-agent", "exe"} { // the guard has the kernel's name of what it was started as
		for _, pid := range strings.Fields(sh(t, "pgrep -x "+name)) {
			if kib, err := strconv.Atoi(field(t, readFile(t, "/proc/"+pid+"/status"), "VmLck:")); err != nil || kib < 1<<10 {
				t.Errorf("%s (%s) has locked %d KiB, %v", name, pid, kib, err)
			}
		}
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
	for name, was := range before {
		for _, s := range was {
			if now := a.standings()[name]; !slices.ContainsFunc(now, func(other standing) bool { return other.pid == s.pid }) {
				t.Errorf("%s is not what it was: %+v, before %+v", name, now, was)
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
	for _, s := range a.standings()["imans-agent"] {
		if s.pid == a.cmd.Process.Pid && (s.nice != 0 || s.oom != "0") {
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
	pid, nice int
	oom       string
}

// standings looks at all threads of the agent and of what it started, by their program's name.
func (a *agent) standings() map[string][]standing {
	a.t.Helper()
	found := map[string][]standing{}
	pids := append(strings.Fields(sh(a.t, fmt.Sprintf("pgrep -P %d || true", a.cmd.Process.Pid))), strconv.Itoa(a.cmd.Process.Pid))
	for _, word := range pids {
		pid, err := strconv.Atoi(word)
		if err != nil {
			a.t.Fatal(err)
		}
		exe, err := os.Readlink("/proc/" + word + "/exe")
		if err != nil {
			a.t.Fatal(err)
		}
		tasks, err := filepath.Glob("/proc/" + word + "/task/*")
		if err != nil {
			a.t.Fatal(err)
		}
		for _, task := range tasks {
			tid, err := strconv.Atoi(filepath.Base(task))
			if err != nil {
				a.t.Fatal(err)
			}
			nice, err := unix.Getpriority(unix.PRIO_PROCESS, tid)
			if err != nil {
				a.t.Fatal(err)
			}
			name := filepath.Base(exe)
			found[name] = append(found[name], standing{pid, 20 - nice, strings.TrimSpace(readFile(a.t, "/proc/"+word+"/oom_score_adj"))})
		}
	}
	return found
}
