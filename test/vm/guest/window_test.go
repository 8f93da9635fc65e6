//go:build vm

package guest

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	containers "imans.dev/imans-agent/internal/container"
)

// windowDir is where an agent has its window.
func (a *agent) windowDir() string { return a.dir + "/run/fs" }

// marked makes a folder that passes for a window: a file system with ima/marker.
func marked(t *testing.T) string {
	t.Helper()
	dir := tempDir(t, "/root")
	if err := unix.Mount("marked", dir, "tmpfs", 0, "mode=755"); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	if err := os.Mkdir(dir+"/ima", 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(dir+"/ima/marker", []byte(dir), 0o644); err != nil {
		t.Fatal(err)
	}
	return dir
}

// The boxes are what the tests below take them for.
func TestWindowBoxes(t *testing.T) {
	for _, kind := range kinds() {
		t.Run(kind.name, func(t *testing.T) {
			dir := marked(t)
			b := kind.start(t, dir)
			if got := b.sh("cat /sys/kernel/security/ima/marker"); got != dir {
				t.Errorf("the window shows %q, want %q", got, dir)
			}
			if got := b.sh("id -u"); got != "0" {
				t.Errorf("user %s in the box", got)
			}
			if got, own := mountNS(t, b.pid), mountNS(t, os.Getpid()); got == own {
				t.Error("the box is in the host's mount namespace")
			}
			if got := b.sh("readlink /proc/self/ns/mnt"); got != fmt.Sprintf("mnt:[%d]", mountNS(t, b.pid)) {
				t.Errorf("what runs in the box is in %s", got)
			}
			if got := b.sh("readlink /proc/1/ns/mnt"); got != fmt.Sprintf("mnt:[%d]", mountNS(t, b.pid)) {
				t.Errorf("its process 1 is in %s", got)
			}
			levels := map[string]int{"unshare": 1, "nested": nestedLevels, "mapped": 1, "runc": 0}[kind.name]
			if got := userLevels(t, b.pid); got != levels {
				t.Errorf("the box is %d user namespaces deep, want %d", got, levels)
			}
			b.sh("unshare --mount true && unshare --user --map-root-user true && mkdir -p /tmp/m && mount -t tmpfs t /tmp/m && umount /tmp/m")
			if got := b.sh("[ $(awk '{ n += $3 } END { print n }' /proc/self/uid_map) = 1 ] || su -s /bin/sh other -c 'id -u'"); got != "" && got != "1000" {
				t.Errorf("the other user is %q", got)
			}
			b.sh("printf 'some text' >/tmp/f && mapstore /tmp/f 5 TEXT && [ \"$(cat /tmp/f)\" = 'some TEXT' ] && evmctl --version")
		})
	}
}

// userLevels counts the user namespaces from a process's up to the initial one.
func userLevels(t *testing.T, pid int) int {
	t.Helper()
	inode := func(fd int) uint64 {
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			t.Fatal(err)
		}
		return st.Ino
	}
	own, err := unix.Open("/proc/self/ns/user", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(own)
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/user", pid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for ; inode(fd) != inode(own); n++ {
		parent, err := unix.IoctlRetInt(fd, unix.NS_GET_PARENT)
		unix.Close(fd)
		if err != nil {
			t.Fatal(err)
		}
		fd = parent
	}
	unix.Close(fd)
	return n
}

// What scripts say is read as they mean it.
func TestWindowVerdicts(t *testing.T) {
	v := readVerdict("ok one\nnot ok two: got 'x',\nwant 'y'\nok three # skip no users\n1..3\n")
	if len(v.ok) != 1 || len(v.failed) != 1 || len(v.skipped) != 1 || len(v.other) != 1 || v.planned != 3 {
		t.Errorf("%+v", v)
	}
	if v := readVerdict("ok one\n"); v.planned != -1 {
		t.Errorf("a script that stopped half-way: %+v", v)
	}
}

// The window is put into running containers of every kind, and taken away.
func TestWindowAttach(t *testing.T) {
	for _, kind := range boxKinds {
		t.Run(kind.name, func(t *testing.T) {
			one := marked(t)
			b := kind.start(t, "")
			target, err := containers.Process(b.target().Inum)
			if err != nil {
				t.Fatal(err)
			}
			for _, target := range []containers.Target{target, b.target()} {
				if err := containers.Attach(t.Context(), one, target); err != nil {
					t.Fatal(err)
				}
			}
			if got := b.sh("cat /sys/kernel/security/ima/marker; grep -c ' /sys/kernel/security .* - tmpfs marked ' /proc/self/mountinfo"); got != one+"1" {
				t.Errorf("the window shows %q, want %q once", got, one)
			}
			if _, err := os.Stat("/sys/kernel/security/ima/marker"); err == nil {
				t.Error("the window is on the host")
			}
		})
	}
}

// A container's user finds what the kernel's own IMA would show.
func TestWindowScripts(t *testing.T) {
	sample(t, "6.12")
	scripts := []string{"activation", "policy", "barrier", "prompt", "remeasure", "ids", "siblings", "nested", "tools", "end"}
	a := startAgent(t, "--namespaces", "lazy")
	for _, kind := range kinds() {
		for _, name := range scripts {
			t.Run(kind.name+"/"+name, func(t *testing.T) {
				b := kind.start(t, a.windowDir())
				b.script(t, name, fmt.Sprintf("ROUNDS=%d", sized(20, 200, 200)))
				if !slices.Contains([]string{"activation", "ids", "nested"}, name) {
					a.verifyNow(b.ns())
				}
			})
		}
	}
}

// verifyNow holds a namespace's list against its TPM while the agent runs. One that grows between the look at the list and that at the TPM, as
// the native one does when an earlier namespace's end is told, is looked at again.
func (a *agent) verifyNow(ns string) {
	a.t.Helper()
	for {
		before := a.settled(ns).Entries
		file := a.write("list-"+ns, a.cli("measurements", ns, "--format", "binary"))
		status, out := exits(a.t, program, "verify", file, "--ns", ns, "--run-dir", a.dir+"/run")
		if status == 0 {
			return
		}
		if a.settled(ns).Entries == before {
			a.t.Fatalf("verify %s: exit status %d\n%s", file, status, out)
		}
	}
}

// ns returns the name of the box's mount namespace.
func (b *box) ns() string { return fmt.Sprint(b.target().Inum) }

// The ways for a namespace to come to be.
func TestWindowComingToBe(t *testing.T) {
	sample(t, "6.18")
	for _, way := range []struct{ namespaces, script string }{
		{"newns", "newns"}, {"lazy", "lazy"}, {"all", "always"}, {"lazy", "byhand"}, {"newns", "byhand"},
	} {
		t.Run(way.namespaces+"/"+way.script, func(t *testing.T) {
			a := newAgent(t, "--namespaces", way.namespaces)
			if way.namespaces == "all" {
				a.args = append(a.args, "--ns-policy", a.write("ns-policy", "measure func=BPRM_CHECK\n"))
			}
			a.start()
			for _, kind := range kinds() {
				t.Run(kind.name, func(t *testing.T) {
					b := kind.start(t, a.windowDir())
					if way.script == "byhand" {
						a.cli("ns", "activate", b.ns())
					}
					b.script(t, way.script, "")
				})
			}
		})
	}
}

// A vTPM that takes its time holds up nobody: not its own namespace's list, nor another's.
func TestWindowComingToBeBeforeTheTPM(t *testing.T) {
	sample(t, "6.18")
	a := newAgent(t, "--namespaces", "lazy")
	slow := a.write("slow-swtpm", "#!/bin/sh\nsleep 15\nexec swtpm \"$@\"\n")
	if err := os.Chmod(slow, 0o755); err != nil {
		t.Fatal(err)
	}
	a.args = append(a.args, "--swtpm", slow, "--swtpm-user", "root") // who else can't reach it in the agent's folder
	a.start()
	one, two := startMapped(t, a.windowDir()), startMapped(t, a.windowDir())
	began := time.Now()
	for _, b := range []*box{one, two} {
		b.sh("cd /sys/kernel/security/ima; echo 1 >active; echo 'measure func=BPRM_CHECK' >policy")
		b.sh(`printf '#!/bin/sh\n' >/tmp/early; chmod 755 /tmp/early; /tmp/early; grep -q ' /tmp/early$' /sys/kernel/security/ima/ascii_runtime_measurements`)
	}
	if n := a.namespaces()[two.target().Inum]; n.Extended != 0 || n.Entries == 0 {
		t.Errorf("after %v %d of %d entries are extended: the vTPM was not late", time.Since(began), n.Extended, n.Entries)
	}
	a.verifyNow(one.ns())
	a.verifyNow(two.ns())
}

// Ids of a policy are shown as they map where the reader is.
func TestWindowIDsFromOutside(t *testing.T) {
	a := startAgent(t, "--namespaces", "lazy")
	b := startMapped(t, a.windowDir())
	b.sh("echo 1 >/sys/kernel/security/ima/active; echo 'measure func=BPRM_CHECK fowner=7' >/sys/kernel/security/ima/policy")
	enter := fmt.Sprintf("nsenter --target %d --mount ", b.pid)
	if got, want := sh(t, enter+"cat /sys/kernel/security/ima/policy"), fmt.Sprintf("measure func=BPRM_CHECK fowner=%d", mappedIDs+7); got != want {
		t.Errorf("root of the host reads %q, want %q", got, want)
	}
	sh(t, enter+"sh -c 'echo \"measure func=BPRM_CHECK fowner=5\" >/sys/kernel/security/ima/policy'")
	if got := b.sh("sed 's/ *$//' /sys/kernel/security/ima/policy"); got != "measure func=BPRM_CHECK fowner=7\nmeasure func=BPRM_CHECK fowner=65534" {
		t.Errorf("the container reads %q, want the overflow id for one that it has not", got)
	}
}

// The policy for new namespaces means each namespace's own ids, also with a bound that it does not have; and a restart changes
// nothing.
func TestWindowIDsOfNewNamespaces(t *testing.T) {
	const rule, added = "measure func=BPRM_CHECK uid<70000", "measure func=BPRM_CHECK fowner>0"
	a := newAgent(t, "--namespaces", "all")
	a.args = append(a.args, "--ns-policy", a.write("ns-policy", rule+"\n"))
	a.start()
	b := startMapped(t, a.windowDir())
	check := func(name, rules string) {
		t.Helper()
		inside, outside := "/tmp/inside-"+name, "/tmp/outside-"+name
		b.sh(fmt.Sprintf(`for f in %s %s; do printf '#!/bin/sh\n# %%s\n' "$f" >$f; chmod 755 $f; done; %[1]s`, inside, outside))
		sh(t, fmt.Sprintf("nsenter --target %d --mount %s", b.pid, outside))
		if got := b.sh("grep -o '[^ ]*side-" + name + "$' /sys/kernel/security/ima/ascii_runtime_measurements"); got != inside {
			t.Errorf("%s: in the list is %q, want what the namespace's own root ran only", name, got)
		}
		if got := b.sh("sed 's/ *$//' /sys/kernel/security/ima/policy"); got != rules {
			t.Errorf("%s: the container reads %q, want %q", name, got, rules)
		}
	}
	check("given", rule)
	b.sh("echo '" + added + "' >/sys/kernel/security/ima/policy")
	check("written", rule+"\n"+added)
	a.stop()
	a.start()
	b.sh("for i in $(seq 600); do cat /sys/kernel/security/ima/active >/dev/null 2>&1 && exit 0; sleep 0.1; done; exit 1")
	check("restarted", rule+"\n"+added)
}

// A file that the host or a sibling changed is measured again.
func TestWindowChangedFromOutside(t *testing.T) {
	a := startAgent(t, "--namespaces", "lazy")
	for _, kind := range kinds() {
		t.Run(kind.name, func(t *testing.T) {
			b := kind.start(t, a.windowDir())
			b.sh("echo 1 >/sys/kernel/security/ima/active; echo 'measure func=BPRM_CHECK' >/sys/kernel/security/ima/policy")
			b.sh(`printf '#!/bin/sh\n' >/tmp/shared; chmod 755 /tmp/shared; /tmp/shared`)
			path := filepath.Join(b.root, "tmp/shared")
			for i, change := range []string{"echo '# host' >>" + path, "truncate -s -2 " + path,
				fmt.Sprintf("cp %[1]s %[1]s.new; echo '# new' >>%[1]s.new; mv %[1]s.new %[1]s", path), "mapstore " + path + " 11 '# ma'"} {
				sh(t, "sleep 0.05; "+change)
				if got, want := b.sh("/tmp/shared; /tmp/shared; grep -c ' /tmp/shared$' /sys/kernel/security/ima/ascii_runtime_measurements"), fmt.Sprint(i+2); got != want {
					t.Errorf("after %s: %s entries, want %s", change, got, want)
				}
			}
		})
	}
}

// evmctl accepts a container's list with the values of its own TPM, inside the container. It is measured itself, and so is the way
// in: it waits inside until the values are there.
func TestWindowEvmctl(t *testing.T) {
	a := startAgent(t, "--namespaces", "lazy")
	b := startRunc(t, a.windowDir())
	b.sh("echo 1 >/sys/kernel/security/ima/active; echo 'measure func=BPRM_CHECK' >/sys/kernel/security/ima/policy")
	type result struct {
		out string
		err error
	}
	done := make(chan result, 1)
	go func() {
		out, err := b.run(`evmctl --version; sleep 0.1; touch /tmp/waits; while [ ! -e /tmp/go ]; do sleep 0.1; done
			evmctl ima_measurement --ignore-violations --pcrs sha1,/tmp/pcrs.sha1 --pcrs sha256,/tmp/pcrs.sha256 /sys/kernel/security/ima/binary_runtime_measurements`)
		done <- result{out, err}
	}()
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(50 * time.Millisecond) {
		if _, err := os.Stat(filepath.Join(b.root, "tmp/waits")); err == nil {
			break
		} else if time.Now().After(deadline) {
			t.Fatal("the shell inside does not get to where it waits")
		}
	}
	a.settled(b.ns())
	pcrs, err := a.client().PCRs(t.Context(), b.ns())
	if err != nil {
		t.Fatal(err)
	}
	for _, v := range pcrs.Values {
		algo, hex, _ := strings.Cut(v, ":")
		var text []byte
		for n := range 24 { // evmctl wants them all
			value := strings.Repeat("0", len(hex))
			if n == pcrs.PCR {
				value = hex
			}
			text = fmt.Appendf(text, "PCR-%02d: %s\n", n, value)
		}
		if err := os.WriteFile(filepath.Join(b.root, "tmp/pcrs."+algo), text, 0o644); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(b.root, "tmp/go"), nil, 0o644); err != nil {
		t.Fatal(err)
	}
	if r := <-done; r.err != nil || !strings.Contains(r.out, "Matched per TPM bank") {
		t.Errorf("evmctl: %v\n%s", r.err, r.out)
	}
}

// The window comes into a running container by the command, and outlives the agent's death.
func TestWindowOfRunningContainer(t *testing.T) {
	a := startAgent(t, "--namespaces", "lazy")
	var boxes []*box
	for _, kind := range kinds() {
		b := kind.start(t, "")
		if out := a.cli("ns", "window", b.ns()); !strings.Contains(out, containers.SecurityFS) {
			t.Errorf("ns window: %s", out)
		}
		a.cli("ns", "window", b.ns())
		b.sh("echo 1 >/sys/kernel/security/ima/active; echo 'measure func=BPRM_CHECK' >/sys/kernel/security/ima/policy")
		boxes = append(boxes, b)
	}
	for round := range 3 {
		for _, b := range boxes {
			b.sh(fmt.Sprintf(`printf '#!/bin/sh\n# %[1]d\n' >/tmp/p%[1]d; chmod 755 /tmp/p%[1]d; /tmp/p%[1]d; grep -q ' /tmp/p%[1]d$' /sys/kernel/security/ima/ascii_runtime_measurements`, round))
			if w, err := containers.Attached(b.pid); err != nil || len(w) != 1 || w[0].Point != containers.SecurityFS {
				t.Errorf("round %d: windows %+v, %v; want one", round, w, err)
			}
		}
		a.signal(syscall.SIGKILL)
		if out, err := boxes[0].run("cat /sys/kernel/security/ima/active"); err == nil {
			t.Errorf("a window without an agent says %q", out)
		}
		a.start()
	}
	for _, b := range boxes {
		a.cli("ns", "window", b.ns(), "--detach")
		if w, err := containers.Attached(b.pid); err != nil || len(w) != 0 {
			t.Errorf("detached: windows %+v, %v", w, err)
		}
	}
	if status, out := exits(t, program, "ns", "window", "native", "--run-dir", a.dir+"/run"); status != exitLacksSomething || !strings.Contains(out, "own mount namespace") {
		t.Errorf("the native namespace: exit status %d: %s", status, out)
	}
}

// exitLacksSomething is what the program exits with when it can't do what it was asked for.
const exitLacksSomething = 3

// Root of the host gives a container rules from outside: all of them or none, and they judge the next event.
func TestWindowPolicyLoad(t *testing.T) {
	a := startAgent(t, "--namespaces", "newns", "--max-rules", "3")
	b := startMapped(t, a.windowDir())
	load := func(status int, want, rules string) {
		t.Helper()
		got, out := exits(t, program, "policy", "load", a.write("rules", rules), "--ns", b.ns(), "--run-dir", a.dir+"/run")
		if got != status || !strings.Contains(out, want) {
			t.Errorf("load %q: exit status %d, want %d with %q: %s", rules, got, status, want, out)
		}
	}
	owned := fmt.Sprintf("measure func=BPRM_CHECK fowner=%d\n", mappedIDs+5)
	load(exitLacksSomething, "imans-agent ns activate", owned)
	a.cli("ns", "activate", b.ns())
	load(0, b.ns(), owned)
	b.sh(`for p in /tmp/of5 /tmp/of6; do printf '#!/bin/sh\n' >$p; chmod 755 $p; done; chown 5 /tmp/of5; chown 6 /tmp/of6; /tmp/of5; /tmp/of6`)
	if got := b.sh("cut -d ' ' -f 5 /sys/kernel/security/ima/ascii_runtime_measurements | tr '\\n' ' '"); got != "boot_aggregate /tmp/of5" {
		t.Errorf("measured: %s", got)
	}
	load(exitBadPolicy, "rules:2", "dont_measure func=BPRM_CHECK\nmeasure func=NONSENSE\n")
	load(exitLacksSomething, "nothing was loaded", "audit func=BPRM_CHECK\naudit func=BPRM_CHECK uid=1\naudit func=BPRM_CHECK uid=2\n")
	if got := b.sh("sed 's/ *$//' /sys/kernel/security/ima/policy"); got != "measure func=BPRM_CHECK fowner=5" {
		t.Errorf("the policy is %q", got)
	}
	if status, out := exits(t, program, "policy", "load", "exec", "--ns", "native", "--run-dir", a.dir+"/run"); status != exitLacksSomething || !strings.Contains(out, "--policy") {
		t.Errorf("the native policy: exit status %d: %s", status, out)
	}
}

// exitBadPolicy is what the program exits with when a policy is none.
const exitBadPolicy = 2
