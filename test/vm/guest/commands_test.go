//go:build vm

package guest

import (
	"bufio"
	"encoding/json"
	"os/exec"
	"strings"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/control"
)

// What people and programs read on the command line.
func TestMainJobCommands(t *testing.T) {
	a := startAgent(t)
	dir := tempDir(t, "/root")
	makeProgram(t, dir+"/shown")
	runProgram(t, dir+"/shown")

	if out := a.cli("ns"); !strings.Contains(out, "NAMESPACE") || !strings.Contains(out, "native") {
		t.Errorf("ns: %s", out)
	}
	var list []control.Namespace
	if err := json.Unmarshal([]byte(a.cli("ns", "list", "--json")), &list); err != nil || len(list) == 0 {
		t.Errorf("ns list --json: %v, %v", list, err)
	}
	var one control.Namespace
	if err := json.Unmarshal([]byte(a.cli("ns", "show", list[0].Name(), "--json")), &one); err != nil || one.Inum != list[0].Inum {
		t.Errorf("ns show --json: %+v, %v", one, err)
	}
	if out := a.cli("measurements", "native"); !strings.Contains(out, dir+"/shown\n") {
		t.Errorf("a program that ran just before is not in the list:\n%s", out)
	}
	last := ""
	for line := range strings.Lines(a.cli("measurements", "native", "--json")) {
		last = line
	}
	var entry control.Entry
	if err := json.Unmarshal([]byte(last), &entry); err != nil || entry.Name == "" {
		t.Errorf("measurements --json: %q, %v", last, err)
	}
	if out := a.cli("policy", "show", "native"); out != "measure func=BPRM_CHECK mask=MAY_EXEC \nmeasure func=MMAP_CHECK mask=MAY_EXEC \n" {
		t.Errorf("policy show: %q", out)
	}
	for _, c := range []struct {
		args   []string
		status int
		want   string
	}{
		{[]string{"ns", "show", "12345", "--run-dir", a.dir + "/run"}, 3, "imans-agent ns lists them"},
		{[]string{"ns", "--run-dir", "/nonexistent"}, 3, "no agent is running"},
		{[]string{"measurements"}, 2, "takes 1 argument"},
		{[]string{"measurements", "native", "--format", "xml"}, 2, "want ascii, binary or json"},
		{[]string{"verify", "/nonexistent"}, 2, "no such file"},
		{[]string{"policy", "check", "tcb"}, 2, "not done yet"},
		{[]string{"unload", "--state-dir", a.dir + "/state"}, 3, "another imans-agent is running"},
		{[]string{"--policy"}, 2, "needs an argument"},
		{[]string{"completion", "bash"}, 0, "imans-agent"},
		{[]string{"doctor"}, 0, "BPF LSM"},
	} {
		status, out := exits(t, program, c.args...)
		if status != c.status || !strings.Contains(out, c.want) {
			t.Errorf("imans-agent %v: exit status %d, want %d with %q: %s", c.args, status, c.status, c.want, tail(out, 500))
		}
	}
}

func TestMainJobFollow(t *testing.T) {
	a := startAgent(t)
	dir := tempDir(t, "/root")
	cmd := exec.Command(program, "measurements", "native", "--follow", "--run-dir", a.dir+"/run")
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { cmd.Process.Kill(); cmd.Wait() })
	lines := make(chan string)
	go func() {
		for s := bufio.NewScanner(out); s.Scan(); {
			lines <- s.Text()
		}
	}()
	await := func(want string) {
		t.Helper()
		for deadline := time.After(time.Minute); ; {
			select {
			case line := <-lines:
				if strings.Contains(line, want) {
					return
				}
			case <-deadline:
				t.Fatalf("no line with %q", want)
			}
		}
	}
	await("boot_aggregate")
	for _, name := range []string{"/first", "/second"} {
		makeProgram(t, dir+name)
		runProgram(t, dir+name)
		await(dir + name)
	}
}
