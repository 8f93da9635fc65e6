//go:build vm

package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	containers "imans.dev/imans-agent/internal/container"
	"imans.dev/imans-agent/test/vm/scripts/window"
)

// box is a busybox container that lives until the test ends.
type box struct {
	t     *testing.T
	root  string
	pid   int      // of its first process
	enter []string // a command that runs what follows in it
}

// kinds are the boxes that a test is made in: the plainest when time is short.
func kinds() []boxKind {
	if short() {
		return boxKinds[:1]
	}
	return boxKinds
}

// boxKind makes a box of one kind.
type boxKind struct {
	name  string
	start func(t *testing.T, window string) *box
}

// boxKinds are the ways to make a box. Each takes the folder to bind over /sys/kernel/security; "" is none.
var boxKinds = []boxKind{
	{"unshare", func(t *testing.T, w string) *box { return startUnshared(t, 1, w) }},
	{"runc", startRunc},
	{"nested", func(t *testing.T, w string) *box { return startUnshared(t, nestedLevels, w) }},
	{"mapped", startMapped},
}

// nestedLevels is how deep the innermost box is, in user, mount and pid namespaces: as deep as the kernel lets user namespaces
// nest, less the one that the scripts make themselves.
const nestedLevels = 32

// boxRoot makes the root folder of a box, with the scripts in it. Ids are shifted up by shift.
func boxRoot(t *testing.T, shift int) string {
	t.Helper()
	base := tempDir(t, "/srv")
	root := filepath.Join(base, "root")
	for _, dir := range []string{"bin", "proc", "dev", "sys", "tmp", "etc", "scripts", "lib64"} {
		if err := os.MkdirAll(filepath.Join(root, dir), 0o755); err != nil {
			t.Fatal(err)
		}
	}
	scripts, err := fs.Glob(window.Scripts, "*.sh")
	if err != nil {
		t.Fatal(err)
	}
	for _, name := range scripts {
		text, err := window.Scripts.ReadFile(name)
		if err != nil {
			t.Fatal(err)
		}
		if err := os.WriteFile(filepath.Join(root, "scripts", name), text, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	for path, text := range map[string]string{
		"etc/passwd": "root:x:0:0::/:/bin/sh\nother:x:1000:1000::/:/bin/sh\n", "etc/group": "root:x:0:\nother:x:1000:\n",
	} {
		if err := os.WriteFile(filepath.Join(root, path), []byte(text), 0o644); err != nil {
			t.Fatal(err)
		}
	}
	for _, applet := range strings.Fields(run(t, "/bin/busybox", "--list")) {
		if applet == "busybox" {
			continue
		}
		if err := os.Symlink("busybox", filepath.Join(root, "bin", applet)); err != nil {
			t.Fatal(err)
		}
	}
	// evmctl comes with its libraries; every other command is busybox's.
	sh(t, fmt.Sprintf(`chmod 755 %[1]s && chmod 1777 %[2]s/tmp && mkfifo %[2]s/stop &&
cp /bin/busybox /usr/local/bin/mapstore /usr/bin/evmctl %[2]s/bin &&
cp -L --parents $(ldd /usr/bin/evmctl | grep -o '/[^ ]*') %[2]s && chown -R %[3]d:%[3]d %[2]s`, base, root, shift))
	return root
}

// startBox runs box.sh by a command, and waits until the box is ready.
func startBox(t *testing.T, cmd *exec.Cmd, root string) *box {
	t.Helper()
	b := &box{t: t, root: root}
	var out bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	exited := make(chan struct{})
	go func() { cmd.Wait(); close(exited) }()
	t.Cleanup(func() {
		for _, pid := range descendants(cmd.Process.Pid) {
			syscall.Kill(pid, syscall.SIGKILL)
		}
		<-exited
	})
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(root, "ready")); err == nil {
			break
		}
		select {
		case <-exited:
			t.Fatalf("the box ended: %s", out.String())
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("the box does not come up: %s", out.String())
		}
	}
	all := descendants(cmd.Process.Pid)
	b.pid = all[len(all)-1]
	b.enter = []string{"nsenter", "--target", strconv.Itoa(b.pid), "--user", "--mount", "--pid", "--wd=/"}
	return b
}

// descendants returns a process and all below it, each after its parent.
func descendants(pid int) []int {
	all := []int{pid}
	children, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%[1]d/children", pid))
	if err != nil {
		return all
	}
	for _, c := range strings.Fields(string(children)) {
		if n, err := strconv.Atoi(c); err == nil {
			all = append(all, descendants(n)...)
		}
	}
	return all
}

// startUnshared makes a box as unshare does for anybody, the given number of levels deep. There is one user id in it: 0.
func startUnshared(t *testing.T, levels int, window string) *box {
	t.Helper()
	root := boxRoot(t, 0)
	b := startBox(t, exec.Command("unshare", "--user", "--map-root-user", "--mount", "--pid", "--fork",
		"sh", root+"/scripts/box.sh", strconv.Itoa(levels), root, window), root)
	b.enter = append(b.enter, "--preserve-credentials")
	return b
}

// mappedIDs is what user 0 of a mapped box is outside.
const mappedIDs = 100000

// startMapped makes a box in a user namespace that has a range of ids, none of them root's outside. The window comes from
// outside, too: no one in there can reach the agent's folder.
func startMapped(t *testing.T, window string) *box {
	t.Helper()
	root := boxRoot(t, mappedIDs)
	cmd := exec.Command("sh", root+"/scripts/box.sh", "1", root)
	ids := []syscall.SysProcIDMap{{ContainerID: 0, HostID: mappedIDs, Size: 65536}}
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags:  syscall.CLONE_NEWUSER | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		UidMappings: ids, GidMappings: ids, GidMappingsEnableSetgroups: true, Credential: &syscall.Credential{Uid: 0, Gid: 0},
	}
	b := startBox(t, cmd, root)
	if window != "" {
		if err := containers.Attach(t.Context(), window, b.target()); err != nil {
			t.Fatal(err)
		}
	}
	return b
}

// startRunc makes a box as container engines do.
func startRunc(t *testing.T, window string) *box {
	t.Helper()
	root := boxRoot(t, 0)
	bundle := filepath.Dir(root)
	sh(t, fmt.Sprintf("mv %s %s/rootfs && cd %[2]s && runc spec", root, bundle))
	path := bundle + "/config.json"
	var spec map[string]any
	if err := json.Unmarshal([]byte(readFile(t, path)), &spec); err != nil {
		t.Fatal(err)
	}
	process := spec["process"].(map[string]any)
	process["terminal"] = false
	process["args"] = []string{"sh", "-c", ": >/ready; until read -r _ </stop; do :; done"}
	// A container that may make namespaces and mounts of its own.
	caps := []string{"CAP_SYS_ADMIN", "CAP_SYS_CHROOT", "CAP_SETUID", "CAP_SETGID", "CAP_CHOWN", "CAP_FOWNER", "CAP_DAC_OVERRIDE",
		"CAP_MAC_ADMIN", "CAP_SYS_PTRACE", "CAP_KILL", "CAP_SETPCAP", "CAP_SETFCAP"}
	for set := range process["capabilities"].(map[string]any) {
		process["capabilities"].(map[string]any)[set] = caps
	}
	spec["root"] = map[string]any{"path": "rootfs", "readonly": false}
	if window != "" {
		spec["mounts"] = append(spec["mounts"].([]any), map[string]any{
			"destination": containers.SecurityFS, "type": "bind", "source": window, "options": []string{"bind", "nosuid", "nodev", "noexec"},
		})
	}
	text, err := json.Marshal(spec)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, text, 0o644); err != nil {
		t.Fatal(err)
	}
	id := "box-" + filepath.Base(bundle)
	t.Cleanup(func() { exec.Command("runc", "delete", "--force", id).Run() })
	sh(t, fmt.Sprintf("cd %s && runc run --detach --pid-file pid %s >log 2>&1 </dev/null || { cat log; exit 1; }", bundle, id))
	b := &box{t: t, root: bundle + "/rootfs", enter: []string{"runc", "exec", id}}
	sh(t, fmt.Sprintf("for i in $(seq 600); do [ -e %s/ready ] && exit 0; sleep 0.1; done; cat %s/log; exit 1", b.root, bundle))
	if b.pid, err = strconv.Atoi(readFile(t, bundle+"/pid")); err != nil {
		t.Fatal(err)
	}
	return b
}

// target is the way into the box for package container.
func (b *box) target() containers.Target {
	b.t.Helper()
	return containers.Target{PID: b.pid, Inum: mountNS(b.t, b.pid)}
}

// run runs a line of shell in the box and returns what it printed.
func (b *box) run(line string) (string, error) {
	ctx, cancel := context.WithTimeout(b.t.Context(), 10*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, b.enter[0], append(b.enter[1:len(b.enter):len(b.enter)], "/bin/sh", "-c", line)...)
	cmd.Env = []string{"PATH=/bin:/usr/bin:/sbin:/usr/sbin", "HOME=/"}
	cmd.WaitDelay = 5 * time.Second
	out, err := cmd.CombinedOutput()
	return strings.TrimSpace(string(out)), err
}

// sh runs a line of shell in the box that must succeed.
func (b *box) sh(line string) string {
	b.t.Helper()
	out, err := b.run(line)
	if err != nil {
		b.t.Fatalf("in the box: %s: %v\n%s", line, err, out)
	}
	return out
}

// verdict is what a script said.
type verdict struct {
	ok, failed, skipped []string
	planned             int // -1: it did not come to its end
	other               []string
}

var verdictLine = regexp.MustCompile(`^(ok|not ok) (.+)$`)

// readVerdict reads a script's output.
func readVerdict(out string) verdict {
	v := verdict{planned: -1}
	for line := range strings.Lines(out) {
		line = strings.TrimRight(line, "\n")
		m := verdictLine.FindStringSubmatch(line)
		switch {
		case m != nil && m[1] == "not ok":
			v.failed = append(v.failed, m[2])
		case m != nil && strings.Contains(m[2], " # skip "):
			v.skipped = append(v.skipped, m[2])
		case m != nil:
			v.ok = append(v.ok, m[2])
		case strings.HasPrefix(line, "1.."):
			if n, err := strconv.Atoi(line[3:]); err == nil {
				v.planned = n
			}
		default:
			v.other = append(v.other, line)
		}
	}
	return v
}

// script runs one of the scripts in the box, after the setting of variables, and reports what it found.
func (b *box) script(t *testing.T, name, settings string) {
	t.Helper()
	out, err := b.run(settings + " sh /scripts/" + name + ".sh")
	v := readVerdict(out)
	for _, f := range v.failed {
		t.Errorf("%s: %s", name, f)
	}
	if n := len(v.ok) + len(v.failed) + len(v.skipped); n == 0 || v.planned != n {
		t.Errorf("%s: %d checks, want %d: it did not come to its end", name, n, v.planned)
	}
	var exit *exec.ExitError
	if (err == nil) != (len(v.failed) == 0) || err != nil && !errors.As(err, &exit) {
		t.Errorf("%s: %v with %d failures", name, err, len(v.failed))
	}
	t.Logf("%s: %d held, %d failed, skipped: %v", name, len(v.ok), len(v.failed), v.skipped)
	if t.Failed() && len(v.other) > 0 {
		t.Logf("%s also said:\n%s", name, tail(strings.Join(v.other, "\n"), 3000))
	}
}
