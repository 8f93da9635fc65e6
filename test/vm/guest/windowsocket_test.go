//go:build vm

package guest

import (
	"encoding/json"
	"fmt"
	"os/exec"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/control"
)

// Who asks the agent from a namespace learns of that one alone, and can do nothing to others.
func TestWindowSocket(t *testing.T) {
	a := startAgent(t, "--namespaces", "all")
	other := exec.Command("unshare", "--mount", "sleep", "1000")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Process.Kill(); other.Wait() })
	theirs := fmt.Sprint(mountNS(t, other.Process.Pid))
	ask := program + " --run-dir " + a.dir + "/run "
	for _, options := range []string{"--mount", "--mount --user --map-root-user"} {
		t.Run(options, func(t *testing.T) {
			out := sh(t, fmt.Sprintf("unshare %s sh -c 'readlink /proc/self/ns/mnt; exec %s ns list --json'", options, ask))
			first, rest, _ := strings.Cut(out, "\n")
			own := strings.Trim(first, "mnt:[]")
			var seen []control.Namespace
			if err := json.Unmarshal([]byte(rest), &seen); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if len(seen) != 1 || fmt.Sprint(seen[0].Inum) != own || seen[0].Parent != "" || seen[0].PID != 0 {
				t.Errorf("in %s: %+v", own, seen)
			}
			inside := func(line string) (int, string) { // $own is the namespace's name
				return exits(t, "unshare", append(strings.Fields(options), "sh", "-c", "own=$(readlink /proc/self/ns/mnt | tr -dc 0-9); "+line)...)
			}
			if status, out := inside(ask + "measurements $own && " + ask + "policy show $own && " + ask + "ns activate $own"); status != 0 || !strings.Contains(out, "boot_aggregate") || !strings.Contains(out, "BPRM_CHECK") {
				t.Errorf("its own: exit status %d: %s", status, out)
			}
			for _, line := range []string{"measurements native", "ns show native", "ns show " + theirs, "ns activate " + theirs, "policy show " + theirs,
				"policy load exec --ns " + theirs, "ns window $own", "ns window native"} {
				if status, out := inside(ask + line); status != exitLacksSomething {
					t.Errorf("%s: exit status %d: %s", line, status, out)
				}
			}
			if status, out := inside(ask + "ns show 1"); status != exitLacksSomething || !strings.Contains(out, "no namespace") {
				t.Errorf("one that is not there: exit status %d: %s", status, out)
			}
		})
	}
	if out := a.cli("ns", "show", theirs); !strings.Contains(out, theirs) {
		t.Errorf("root of the host: %s", out)
	}
}
