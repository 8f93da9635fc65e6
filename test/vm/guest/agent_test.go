//go:build vm

package guest

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/control"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// program is the agent as users run it.
const program = "/usr/local/bin/imans-agent"

// faultProgram is the same with its fault points compiled in.
const faultProgram = program + "-faults"

// nativePCR is free on the matrix's kernels (their own IMA extends its boot_aggregate into PCR 10), and can be reset for the next
// test.
const nativePCR = "16"

// execPolicy measures what runs.
const execPolicy = "measure func=BPRM_CHECK mask=MAY_EXEC\nmeasure func=MMAP_CHECK mask=MAY_EXEC\n"

// agent is one running imans-agent with folders of its own.
type agent struct {
	t      *testing.T
	dir    string
	args   []string
	under  []string // the command that starts it, if it is not started by itself
	cmd    *exec.Cmd
	log    *bytes.Buffer
	exited chan struct{}
	fault  string // arms a point of package fault in what is launched; "": it is the agent as users have it
}

// in is the agent as a subtest asks it.
func (a *agent) in(t *testing.T) *agent {
	sub := *a
	sub.t = t
	return &sub
}

// newAgent prepares an agent that is not running yet. Whatever happens, it and its kernel side are gone when the test ends.
func newAgent(t *testing.T, args ...string) *agent {
	t.Helper()
	dir, err := os.MkdirTemp("/root", "agent")
	if err != nil {
		t.Fatal(err)
	}
	run(t, "tpm2_pcrreset", "-T", "device:/dev/tpmrm0", nativePCR)
	a := &agent{t: t, dir: dir}
	a.args = append([]string{"--pcr", nativePCR}, args...)
	if !slices.Contains(args, "--policy") {
		a.args = append(a.args, "--policy", a.write("policy", execPolicy))
	}
	t.Cleanup(a.cleanup)
	return a
}

// startAgent starts an agent and waits until it measures.
func startAgent(t *testing.T, args ...string) *agent {
	t.Helper()
	a := newAgent(t, args...)
	a.start()
	return a
}

// write makes a file in the agent's folder.
func (a *agent) write(name, content string) string {
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, []byte(content), 0o600); err != nil {
		a.t.Fatal(err)
	}
	return path
}

func (a *agent) folders() []string {
	return []string{"--state-dir", a.dir + "/state", "--run-dir", a.dir + "/run", "--pin-dir", "/sys/fs/bpf/" + filepath.Base(a.dir)}
}

// launch starts the process; whether it gets anywhere is not waited for.
func (a *agent) launch() {
	a.t.Helper()
	a.log = &bytes.Buffer{}
	line := slices.Concat(a.under, []string{program}, a.folders(), a.args)
	a.cmd = exec.Command(line[0], line[1:]...)
	if a.fault != "" {
		a.cmd.Path = faultProgram
		a.cmd.Env = append(os.Environ(), fault.Variable+"="+a.fault)
	}
	a.cmd.Stdout, a.cmd.Stderr = a.log, a.log
	if err := a.cmd.Start(); err != nil {
		a.t.Fatal(err)
	}
	exited, cmd := make(chan struct{}), a.cmd
	a.exited = exited
	go func() { cmd.Wait(); close(exited) }()
}

func (a *agent) start() {
	a.t.Helper()
	a.launch()
	deadline := time.Now().Add(2 * time.Minute)
	for {
		err := a.answers(10 * time.Second)
		if err == nil {
			return
		}
		select {
		case <-a.exited:
			a.t.Fatalf("the agent ended: %s", a.log)
		case <-time.After(20 * time.Millisecond):
		}
		if time.Now().After(deadline) {
			a.signal(syscall.SIGQUIT) // and says what it does
			a.t.Fatalf("the agent does not answer, %v: %s", err, a.log)
		}
	}
}

// answers asks the agent for its status, and waits for that so long: the socket may be that of one that was killed and has not ended.
func (a *agent) answers(within time.Duration) error {
	ctx, cancel := context.WithTimeout(a.t.Context(), within)
	defer cancel()
	client := a.client()
	defer client.Close()
	_, err := client.Status(ctx)
	return err
}

// signal ends the process.
func (a *agent) signal(s syscall.Signal) {
	a.t.Helper()
	a.cmd.Process.Signal(s)
	select {
	case <-a.exited:
	case <-time.After(60 * time.Second):
		a.cmd.Process.Kill()
		a.t.Fatalf("the agent does not end: %s", a.log)
	}
}

// processes returns the agent's process number and those of what it started, the gates' guard and vTPMs.
func (a *agent) processes() []int {
	a.t.Helper()
	pids := []int{a.cmd.Process.Pid}
	for _, word := range strings.Fields(sh(a.t, fmt.Sprintf("pgrep -P %d || true", a.cmd.Process.Pid))) {
		pid, err := strconv.Atoi(word)
		if err != nil {
			a.t.Fatal(err)
		}
		pids = append(pids, pid)
	}
	return pids
}

func (a *agent) cleanup() {
	if a.cmd != nil {
		a.isItself()
		a.cmd.Process.Kill()
		<-a.exited
	}
	args := append([]string{"unload"}, a.folders()...)
	if out, err := exec.Command(program, args...).CombinedOutput(); err != nil {
		a.t.Errorf("unload: %v %s", err, out)
	}
	if left, err := exec.Command("pgrep", "-fa", "swtpm.*"+a.dir).Output(); err == nil {
		a.t.Errorf("vTPMs are left: %s", left)
	}
	if a.t.Failed() && a.log != nil {
		a.t.Logf("the agent's log:\n%s", tail(a.log.String(), 4000))
		kernel, _ := exec.Command("dmesg").Output()
		a.t.Logf("the kernel's log:\n%s", tail(string(kernel), 4000))
	}
	os.RemoveAll(a.dir)
}

// isItself checks that the agent's first thread, by which others know the agent, is where and who it was when it began.
func (a *agent) isItself() {
	a.t.Helper()
	ns, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", a.cmd.Process.Pid))
	if err != nil {
		return // it has ended
	}
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil || ns != own {
		a.t.Errorf("the agent is in %s, this test in %s, %v", ns, own, err)
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid))
	if err == nil && !strings.Contains(string(status), "\nUid:\t0\t0\t0\t0\n") {
		a.t.Errorf("the agent is another user: %s", status)
	}
}

// stands ends an agent that does not go on, and returns where its goroutines and the kernel's tasks that sleep without end stand.
func (a *agent) stands() string {
	before := len(a.log.String())
	a.cmd.Process.Signal(syscall.SIGQUIT)
	<-a.exited
	os.WriteFile("/proc/sysrq-trigger", []byte("w"), 0)
	kernel, _ := exec.Command("dmesg").Output()
	return a.log.String()[before:] + tail(string(kernel), 8000)
}

func tail(s string, n int) string {
	if len(s) > n {
		return "…" + s[len(s)-n:]
	}
	return s
}

func (a *agent) client() *control.Client {
	return control.NewClient(a.dir + "/run/" + control.SocketName)
}

// cli runs a subcommand that asks the agent.
func (a *agent) cli(args ...string) string {
	a.t.Helper()
	out, err := exec.Command(program, append(args, "--run-dir", a.dir+"/run")...).CombinedOutput()
	if err != nil {
		a.t.Fatalf("imans-agent %s: %v\n%s", strings.Join(args, " "), err, out)
	}
	return string(out)
}

// list returns a namespace's list.
func (a *agent) list(name string) []*imalog.Entry {
	a.t.Helper()
	client := a.client()
	defer client.Close()
	body, err := client.Measurements(a.t.Context(), name, "binary", "sha1", false)
	if err != nil {
		a.t.Fatal(err)
	}
	defer body.Close()
	return readList(a.t, body)
}

func readList(t *testing.T, r io.Reader) []*imalog.Entry {
	t.Helper()
	reader := imalog.NewReader(r, ima.SHA1)
	var entries []*imalog.Entry
	for {
		e, err := reader.Next()
		if err == io.EOF {
			return entries
		} else if err != nil {
			t.Fatal(err)
		}
		entries = append(entries, e)
	}
}

// readListFile reads a binary list with SHA-1 template digests.
func readListFile(t *testing.T, path string) []*imalog.Entry {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	return readList(t, f)
}

// names counts the names of a list's entries, violations apart.
func names(entries []*imalog.Entry) (measured, violations map[string]int) {
	measured, violations = map[string]int{}, map[string]int{}
	for _, e := range entries {
		if e.Violation() {
			violations[e.Name()]++
		} else {
			measured[e.Name()]++
		}
	}
	return measured, violations
}

// namespaces returns all namespaces by inode number.
func (a *agent) namespaces() map[uint32]control.Namespace {
	a.t.Helper()
	client := a.client()
	defer client.Close()
	list, err := client.Namespaces(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	byInum := map[uint32]control.Namespace{}
	for _, n := range list {
		byInum[n.Inum] = n
	}
	return byInum
}

// settled waits until a namespace's list is in its TPM, and returns the namespace.
func (a *agent) settled(name string) control.Namespace {
	a.t.Helper()
	client := a.client()
	defer client.Close()
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		n, err := client.Namespace(a.t.Context(), name)
		if err != nil {
			a.t.Fatal(err)
		}
		if n.Entries > 0 && n.Extended == n.Entries {
			return n
		}
		if time.Now().After(deadline) {
			a.t.Fatalf("namespace %s: %d of %d entries extended: %s", name, n.Extended, n.Entries, n.Trouble)
		}
	}
}

// mountNS returns the inode number of a process's mount namespace.
func mountNS(t *testing.T, pid int) uint32 {
	t.Helper()
	link, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", pid))
	if err != nil {
		t.Fatal(err)
	}
	var inum uint32
	if _, err := fmt.Sscanf(link, "mnt:[%d]", &inum); err != nil {
		t.Fatal(err)
	}
	return inum
}

// sh runs a line of shell and returns its output.
func sh(t *testing.T, line string) string {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, "/bin/bash", "-c", line).CombinedOutput()
	if err != nil {
		t.Fatalf("%s: %v\n%s", line, err, out)
	}
	return strings.TrimSpace(string(out))
}

// exits runs a command and returns its exit status and output.
func exits(t *testing.T, name string, args ...string) (int, string) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	out, err := exec.CommandContext(ctx, name, args...).CombinedOutput()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		t.Fatalf("%s: %v", name, err)
	}
	if exit != nil {
		return exit.ExitCode(), string(out)
	}
	return 0, string(out)
}

// short reports whether IMANS_SHORT is set: there is little time, so what differs in surroundings only is left out.
func short() bool { return os.Getenv("IMANS_SHORT") != "" }

// sample leaves a test that depends little on the kernel to some of them, if IMANS_SAMPLE is set: there is little time, and all run.
func sample(t *testing.T, kernels ...string) {
	t.Helper()
	if os.Getenv("IMANS_SAMPLE") != "" && !slices.Contains(kernels, os.Getenv("IMANS_VM_KERNEL")) {
		t.Skipf("in this run on %s alone", strings.Join(kernels, " and "))
	}
}

// leave leaves a test out if IMANS_SAMPLE is set.
func leave(t *testing.T) {
	t.Helper()
	if os.Getenv("IMANS_SAMPLE") != "" {
		t.Skipf("not in this run; make test-vm RUN=%s", t.Name())
	}
}

// progress tells each tenth of long work: how many of all are done, since when.
func progress(t *testing.T, done, all int, began time.Time) {
	t.Helper()
	if all >= 100 && done%(all/10) == 0 {
		t.Logf("%d of %d in %v", done, all, time.Since(began).Round(time.Second))
	}
}

// sized returns how much a test does: little where IMANS_SHORT is set, most where IMANS_SOAK is.
func sized(little, usual, most int) int {
	switch {
	case short():
		return little
	case os.Getenv("IMANS_SOAK") != "":
		return most
	}
	return usual
}
