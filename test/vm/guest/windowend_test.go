//go:build vm

package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// holdings is what an agent and the machine hold for namespaces.
type holdings struct {
	namespaces, descriptors, processes, mounts, folders int
}

func (a *agent) holdings() holdings {
	a.t.Helper()
	count := func(pattern string) int {
		found, err := filepath.Glob(pattern)
		if err != nil {
			a.t.Fatal(err)
		}
		return len(found)
	}
	return holdings{
		namespaces:  len(a.namespaces()),
		descriptors: count(fmt.Sprintf("/proc/%d/fd/*", a.cmd.Process.Pid)),
		processes:   len(descendants(a.cmd.Process.Pid)),
		mounts:      strings.Count(readFile(a.t, "/proc/self/mountinfo"), "\n"),
		folders:     count(a.dir + "/state/boots/*/ns/*"),
	}
}

// Namespaces that come, become active, measure and go leave nothing behind.
func TestWindowEnd(t *testing.T) {
	a := startAgent(t, "--namespaces", "lazy", "--ns-tpm", "none")
	cycle := func(n int) {
		sh(t, fmt.Sprintf(`for i in $(seq %d); do unshare --mount sh -ec '
mount --bind %s /sys/kernel/security
echo 1 >/sys/kernel/security/ima/active
echo "measure func=BPRM_CHECK" >/sys/kernel/security/ima/policy
/bin/true
grep -q /bin/true /sys/kernel/security/ima/ascii_runtime_measurements'; done`, n, a.windowDir()))
	}
	cycle(10) // what is kept for good is there after a few
	settled := func() holdings {
		var last holdings
		for deadline := time.Now().Add(time.Minute); time.Now().Before(deadline); time.Sleep(time.Second) {
			if h := a.holdings(); h == last {
				break
			} else {
				last = h
			}
		}
		return last
	}
	before := settled()
	for done := 0; done < soak(1000, 10000); done += 100 {
		cycle(100)
	}
	if after := settled(); after != before {
		t.Errorf("before %+v, after %+v", before, after)
	}
	if left := sh(t, "ls "+a.dir+"/state/boots/*/ns | wc -l"); left != "0" {
		t.Errorf("%s folders of namespaces are left", left)
	}
}

// The end of a container with a window, however it ends, takes the namespace from the agent.
func TestWindowEndOfContainer(t *testing.T) {
	a := startAgent(t, "--namespaces", "lazy")
	for _, kind := range kinds() {
		t.Run(kind.name, func(t *testing.T) {
			var inum uint32
			t.Run("alive", func(t *testing.T) {
				b := kind.start(t, a.windowDir())
				b.sh("echo 1 >/sys/kernel/security/ima/active; echo 'measure func=BPRM_CHECK' >/sys/kernel/security/ima/policy; ls >/dev/null")
				inum = b.target().Inum
				if n := a.settled(b.ns()); n.Entries < 2 {
					t.Errorf("namespace %+v", n)
				}
			})
			a.awaitGone(inum)
			if left, err := filepath.Glob(fmt.Sprintf("%s/state/boots/*/ns/%d-*", a.dir, inum)); err != nil || len(left) > 0 {
				t.Errorf("state outlived its namespace: %v, %v", left, err)
			}
			if _, err := os.Stat(a.windowDir() + "/ima/active"); err != nil {
				t.Errorf("the agent's own window: %v", err)
			}
		})
	}
}
