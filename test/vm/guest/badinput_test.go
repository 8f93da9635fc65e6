//go:build vm

package guest

import (
	"bytes"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// refused starts an agent that must end by itself, and checks what it says.
func (a *agent) refused(status int, want ...string) {
	a.t.Helper()
	a.launch()
	select {
	case <-a.exited:
	case <-time.After(60 * time.Second):
		a.t.Fatalf("the agent runs: %s", a.log)
	}
	out := a.log.String()
	for _, w := range want {
		if !strings.Contains(out, w) {
			a.t.Errorf("no %q in: %s", w, out)
		}
	}
	if code := a.cmd.ProcessState.ExitCode(); code != status {
		a.t.Errorf("exit status %d, want %d: %s", code, status, out)
	}
	if n := strings.Count(out, "goroutine "); n > 0 {
		a.t.Errorf("a stack trace: %s", out)
	}
}

func TestMainJobBadPolicy(t *testing.T) {
	for name, c := range map[string]struct {
		text string
		want []string
	}{
		"empty":         {"", []string{"has no rules", "add one"}},
		"comments only": {"# nothing\n", []string{"has no rules"}},
		"unparsable":    {"measure func=BPRM_CHECK\nmeasure func=BOGUS\n", []string{"policy:2:", "BOGUS", "unknown function"}},
		"not wired":     {"measure func=MODULE_CHECK\n", []string{"policy:1:", "MODULE_CHECK", "not done yet"}},
		"appraise":      {"appraise func=BPRM_CHECK\n", []string{"policy:1:", "appraise is not done yet"}},
		"a binary file": {"\x7fELF\x02\x01\x01\x00", []string{"policy:1:", "control byte"}},
	} {
		t.Run(name, func(t *testing.T) {
			a := newAgent(t, "--policy", "replaced below")
			a.args = append(a.args, "--policy", a.write("policy", c.text))
			a.refused(2, c.want...)
		})
	}
	t.Run("missing", func(t *testing.T) {
		newAgent(t, "--policy", "/nonexistent/policy").refused(3, "/nonexistent/policy", "no such file")
	})
}

func TestMainJobBadSurroundings(t *testing.T) {
	t.Run("no TPM", func(t *testing.T) {
		newAgent(t, "--tpm", "/dev/tpm99").refused(3, "/dev/tpm99", "--tpm swtpm", "--tpm none")
	})
	t.Run("no such user", func(t *testing.T) {
		newAgent(t, "--swtpm-user", "user-that-is-not-there").refused(2, "--swtpm-user", "user-that-is-not-there", "useradd")
		newAgent(t, "--swtpm-user", "4294967295").refused(2, "--swtpm-user", "0 to 4294967294")
	})
	t.Run("a PCR that something else extended", func(t *testing.T) {
		a := newAgent(t)
		before := run(t, "tpm2_pcrread", "-T", "device:/dev/tpmrm0", "sha256:10")
		a.args = append(a.args, "--pcr", "10")
		a.refused(3, "PCR 10", "--pcr 11", "own IMA")
		if after := run(t, "tpm2_pcrread", "-T", "device:/dev/tpmrm0", "sha256:10"); after != before {
			t.Error("PCR 10 was extended all the same")
		}
	})
	t.Run("started twice", func(t *testing.T) {
		a := startAgent(t)
		second := &agent{t: t, dir: a.dir, args: a.args}
		second.refused(3, "another imans-agent is running", "stop it first")
		if len(a.list("native")) == 0 {
			t.Error("the first agent is disturbed")
		}
	})
	t.Run("not root", func(t *testing.T) {
		status, out := exits(t, "setpriv", "--reuid", "65534", "--clear-groups", program, "--policy", "exec")
		if status != 3 || !strings.Contains(out, "run as root") {
			t.Errorf("exit status %d: %s", status, out)
		}
	})
	t.Run("state folder read only", func(t *testing.T) {
		a := newAgent(t)
		sh(t, fmt.Sprintf("mkdir %[1]s/state && mount -t tmpfs -o ro tmpfs %[1]s/state", a.dir))
		defer sh(t, "umount "+a.dir+"/state")
		a.refused(3, "state folder", "read-only", "--state-dir")
	})
	t.Run("no bpffs", func(t *testing.T) {
		a := newAgent(t)
		a.args = append(a.args, "--pin-dir", "/root/pins")
		a.refused(3, "mount -t bpf")
	})
}

// The state folder fills up while the agent works: it waits, says so, and nothing is lost once there is room.
func TestMainJobFullStateFolder(t *testing.T) {
	a := newAgent(t)
	sh(t, fmt.Sprintf("mkdir %[1]s/state && mount -t tmpfs -o size=64k tmpfs %[1]s/state", a.dir))
	t.Cleanup(func() { exec.Command("umount", "-l", a.dir+"/state").Run() })
	a.start()
	sh(t, fmt.Sprintf("dd if=/dev/zero of=%s/state/filler bs=1k 2>/dev/null || true", a.dir))
	digests := startLoad(t, tempDir(t, "/root"), 100, 3).wait()
	deadline := time.Now().Add(time.Minute)
	for !bytes.Contains(a.log.Bytes(), []byte("make room")) && time.Now().Before(deadline) {
		time.Sleep(50 * time.Millisecond)
	}
	if !bytes.Contains(a.log.Bytes(), []byte("make room")) {
		t.Errorf("the agent does not tell that the disk is full: %s", a.log)
	}
	if err := os.Remove(a.dir + "/state/filler"); err != nil {
		t.Fatal(err)
	}
	time.Sleep(2 * time.Second)
	right, _ := a.found(digests)
	if len(right) != len(digests) {
		t.Errorf("%d of %d programs are in the list", len(right), len(digests))
	}
	a.verify("native")
}

// A log that was cut or changed while the agent was stopped.
func TestMainJobDamagedLog(t *testing.T) {
	a := startAgent(t)
	runProgram(t, "/bin/true")
	a.settled("native")
	a.stop()
	path := strings.TrimSpace(sh(t, "ls "+a.dir+"/state/boots/*/native/binary_runtime_measurements"))
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	flipped := bytes.Clone(good)
	flipped[len(flipped)-3] ^= 1
	for name, c := range map[string]struct {
		log    []byte
		status int
		want   string
	}{
		"a byte changed":     {flipped, 1, "was altered"},
		"an entry cut off":   {good[:len(good)-10], 1, "contradict"},
		"removed altogether": {nil, 3, "extended by something else"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(path, c.log, 0o600); err != nil {
				t.Fatal(err)
			}
			second := &agent{t: t, dir: a.dir, args: a.args}
			second.refused(c.status, c.want)
			if now, err := os.ReadFile(path); err != nil || !bytes.Equal(now, c.log) {
				t.Errorf("the log was touched: %v", err)
			}
		})
	}
	// Half an entry more, as a crash in the middle of a write leaves it: removed, and the list goes on.
	if err := os.WriteFile(path, append(good, good[:30]...), 0o600); err != nil {
		t.Fatal(err)
	}
	a.start()
	a.verify("native")
}

// State of another boot is kept and not mixed with this one's.
func TestMainJobStateOfAnotherBoot(t *testing.T) {
	a := newAgent(t)
	old := a.dir + "/state/boots/00000000-0000-4000-8000-000000000000/native"
	if err := os.MkdirAll(old, 0o700); err != nil {
		t.Fatal(err)
	}
	log := filepath.Join(old, "binary_runtime_measurements")
	if err := os.WriteFile(log, []byte("the list of that boot"), 0o600); err != nil {
		t.Fatal(err)
	}
	a.start()
	if got := readFile(t, log); got != "the list of that boot" {
		t.Errorf("changed to %q", got)
	}
	if !strings.Contains(a.log.String(), "lists of earlier boots are kept") {
		t.Errorf("nothing said of it: %s", a.log)
	}
}

// The TPM goes away and comes back: nothing is lost.
func TestMainJobTPMGoesAway(t *testing.T) {
	a := startAgent(t)
	c := startContainer(t, "away", "/bin/first", func(root string) {
		makeProgram(t, root+"/bin/first")
		makeProgram(t, root+"/bin/second")
	})
	n := a.settled(c.ns())
	pid := strings.TrimSpace(sh(t, "pgrep -f "+strings.TrimPrefix(n.TPM, "unix:")))
	var swtpm int
	if _, err := fmt.Sscan(pid, &swtpm); err != nil {
		t.Fatal(err)
	}
	syscall.Kill(swtpm, syscall.SIGSTOP)
	sh(t, "runc exec "+c.id+" /bin/second")
	got, _ := names(a.list(c.ns()))
	if got["/bin/second"] != 1 {
		t.Errorf("not in the list while the vTPM hangs: %v", got)
	}
	syscall.Kill(swtpm, syscall.SIGCONT)
	a.verify(c.ns())
}

// Someone extends a container's vTPM behind the agent's back: that list ends, the lists above say so, and the others go on.
func TestMainJobForeignExtend(t *testing.T) {
	sample(t, "6.1")
	a := startAgent(t)
	prepare := func(root string) { makeProgram(t, root+"/bin/later") }
	victim, other := startContainer(t, "victim", ":", prepare), startContainer(t, "other", ":", prepare)
	n := a.settled(victim.ns())
	a.settled(other.ns())
	a.stop()
	run(t, "tpm2_pcrextend", "-T", "swtpm:path="+strings.TrimPrefix(n.TPM, "unix:"), "10:sha256="+strings.Repeat("5a", 32))
	a.start()
	sh(t, "runc exec victim /bin/later; runc exec other /bin/later")
	got, _ := names(a.list(other.ns()))
	if got["/bin/later"] != 1 {
		t.Errorf("the other container's list does not go on: %v", got)
	}
	_, violations := names(a.list("native"))
	if violations["imans-lost/list_ended/"+n.Name()+"/1"] != 1 {
		t.Errorf("the native list does not say that a list ended: %v", violations)
	}
	if !strings.Contains(a.log.String(), "contradict each other") {
		t.Errorf("the log does not say why: %s", a.log)
	}
	a.verify("native", other.ns())
}
