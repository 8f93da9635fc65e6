//go:build vm

package guest

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/test/vm/scripts/window"
)

// Namespaces that come and go leave nothing behind: no file descriptor, process, mount, file, map entry or memory of theirs.
func TestWindowEnd(t *testing.T) {
	sample(t, "6.12")
	for _, c := range []struct {
		tpm    string
		cycles int
	}{{"none", sized(150, 1000, 10000)}, {"swtpm", sized(5, 20, 1000)}} {
		t.Run(c.tpm, func(t *testing.T) {
			a := newAgent(t, "--ns-tpm", c.tpm, "--namespaces", "all")
			a.start()
			extended := c.tpm != "none"
			a.cycle(c.cycles/5, extended)
			a.leavings() // what it runs itself is measured, too
			a.namespaces()
			before, began := a.leavings(), time.Now()
			a.cycle(c.cycles, extended)
			t.Logf("%d cycles in %v", c.cycles, time.Since(began).Round(time.Second))
			a.asBefore(before, 2<<10)
			if status, err := a.client().Status(t.Context()); err != nil || len(status.Lost) > 0 {
				t.Errorf("lost: %v, %v", status.Lost, err)
			}
		})
	}
}

// cycle makes mount namespaces one after another, runs a program in each, waits if asked to until its entries are in the namespace's
// TPM, and at last until the agent has let go of all.
func (a *agent) cycle(n int, extended bool) {
	a.t.Helper()
	count := len(a.namespaces())
	began := time.Now()
	failed := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // and never unlocked
		home, err := os.Open("/proc/thread-self/ns/mnt")
		if err != nil {
			failed <- err
			return
		}
		defer home.Close()
		for done := range n {
			if err = unix.Unshare(unix.CLONE_NEWNS); err == nil {
				err = exec.Command("/bin/true").Run()
			}
			if err == nil && extended {
				err = a.awaitExtends("/proc/thread-self/ns/mnt")
			}
			if err != nil {
				break
			}
			progress(a.t, done+1, n, began)
		}
		failed <- errors.Join(err, unix.Setns(int(home.Fd()), unix.CLONE_NEWNS))
	}()
	if err := <-failed; err != nil {
		a.t.Fatal(err)
	}
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(100 * time.Millisecond) {
		left, err := a.client().Namespaces(a.t.Context())
		if err == nil && len(left) <= count {
			return
		}
		if time.Now().After(deadline) { // until then it may also be that there is too much that the lists don't have yet
			a.t.Fatalf("%d namespaces, %d before, %v", len(left), count, err)
		}
	}
}

// awaitExtends waits until all entries of the namespace that a link is of are in its TPM.
func (a *agent) awaitExtends(link string) error {
	var st unix.Stat_t
	if err := unix.Stat(link, &st); err != nil {
		return err
	}
	client := a.client()
	defer client.Close()
	for deadline := time.Now().Add(3 * time.Minute); ; time.Sleep(20 * time.Millisecond) {
		n, err := client.Namespace(a.t.Context(), fmt.Sprint(st.Ino))
		if err == nil && n.Entries > 0 && n.Extended == n.Entries {
			return nil
		}
		if time.Now().After(deadline) {
			return errors.Join(err, fmt.Errorf("%d of %d entries extended", n.Extended, n.Entries))
		}
	}
}

// Many namespaces at once, each with its own settings, do not disturb one another.
func TestWindowMany(t *testing.T) {
	leave(t)
	t.Run("swtpm", func(t *testing.T) { manyNamespaces(t, sized(4, 10*runtime.NumCPU(), 200), "swtpm") })
	if sized(0, 0, 1) > 0 { // as many vTPMs would not fit into the machine
		t.Run("none", func(t *testing.T) { manyNamespaces(t, 1000, "none") })
	}
}

func manyNamespaces(t *testing.T, many int, tpm string) {
	a := startAgent(t, "--namespaces", "lazy", "--ns-tpm", tpm)
	dir := tempDir(t, "/root")
	for _, name := range []string{"many.sh", "lib.sh"} {
		text, err := window.Scripts.ReadFile(name)
		if err == nil {
			err = os.WriteFile(filepath.Join(dir, name), text, 0o755)
		}
		if err != nil {
			t.Fatal(err)
		}
	}
	// Programs of a disk's own file system, which are hashed once; the machine's own are the host's, and hashed each time.
	sh(t, fmt.Sprintf("cd %s && mkdir bin && cp $(command -v busybox) bin && bin/busybox --install -s bin", dir))
	hashes, templates := []string{"sha1", "sha256", "sha384", "sha512"}, []string{"ima-ng", "ima-sig"}
	var all []*exec.Cmd
	var outs []*strings.Builder
	apart := cgroup(t, "many") // as containers are: however many want the processor, the agent is not one among them
	wait := func(name string) {
		t.Helper()
		began, told := time.Now(), 0
		for deadline := began.Add(5*time.Minute + time.Duration(many)*5*time.Second); ; time.Sleep(500 * time.Millisecond) {
			found, _ := filepath.Glob(dir + "/*/" + name)
			if tenth := len(found) * 10 / many; tenth > told {
				told = tenth
				t.Logf("%d of %d are %s after %v", len(found), many, name, time.Since(began).Round(time.Second))
			}
			if len(found) == many {
				return
			} else if time.Now().After(deadline) {
				t.Fatalf("%d of %d are %s", len(found), many, name)
			}
		}
	}
	start, end := pipe(t, dir+"/start"), pipe(t, dir+"/end")
	defer func() {
		start.Close()
		end.Close()
		for _, cmd := range all {
			cmd.Wait()
		}
	}()
	for i := range many {
		work := fmt.Sprintf("%s/%d", dir, i)
		if err := os.Mkdir(work, 0o755); err != nil {
			t.Fatal(err)
		}
		cmd, out := exec.Command("unshare", "--mount", dir+"/bin/sh", dir+"/many.sh"), &strings.Builder{}
		cmd.Env = append(os.Environ(), "PATH="+dir+"/bin", "IMA="+a.windowDir()+"/ima", "WORK="+work, "START="+dir+"/start", "END="+dir+"/end",
			"HASH="+hashes[i%len(hashes)], "TEMPLATE="+templates[i/2%len(templates)], fmt.Sprintf("NUMBER=%d", 2000+i))
		cmd.Stdout, cmd.Stderr = out, out
		cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: int(apart.Fd())}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		all, outs = append(all, cmd), append(outs, out)
	}
	wait("ready")
	start.Close()
	wait("done")
	for _, cmd := range all {
		if name := fmt.Sprint(mountNS(t, cmd.Process.Pid)); tpm != "none" {
			a.verifyNow(name)
		} else if n := len(a.list(name)); n != 3 {
			t.Errorf("namespace %s: %d entries, want boot_aggregate and 2", name, n)
		}
	}
	end.Close()
	var ended sync.WaitGroup
	for _, cmd := range all {
		ended.Go(func() { cmd.Wait() })
	}
	ended.Wait()
	for i, out := range outs {
		if v := readVerdict(out.String()); len(v.failed) > 0 || len(v.ok) != v.planned || v.planned < 1 {
			t.Errorf("namespace %d: %s", i, out)
		}
	}
	all = nil
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(100 * time.Millisecond) {
		if left := strings.Fields(sh(t, "pgrep swtpm || true")); len(left) <= len(a.namespaces()) {
			break
		} else if time.Now().After(deadline) {
			t.Fatalf("%d swtpm processes for %d namespaces", len(left), len(a.namespaces()))
		}
	}
}

// cgroup makes a control group whose members share the processor as one.
func cgroup(t *testing.T, name string) *os.File {
	t.Helper()
	path := "/sys/fs/cgroup/" + name
	if err := os.Mkdir(path, 0o755); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.Remove(path) })
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { f.Close() })
	return f
}

// pipe makes a pipe, and is its writer until it is closed.
func pipe(t *testing.T, path string) *os.File {
	t.Helper()
	if err := syscall.Mkfifo(path, 0o600); err != nil {
		t.Fatal(err)
	}
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		t.Fatal(err)
	}
	return f
}

// What ended namespaces measured is in the archive, and verifies there without anything else. What can't be archived is kept.
func TestWindowArchive(t *testing.T) {
	sample(t, "6.18")
	a := newAgent(t, "--namespaces", "all")
	archive := a.dir + "/archive"
	a.args = append(a.args, "--archive", archive)
	sh(t, fmt.Sprintf("mkdir %[1]s && mount -t tmpfs -o nr_inodes=4 full %[1]s", archive))
	t.Cleanup(func() { exec.Command("umount", "-l", archive).Run() })
	a.start()
	sh(t, "unshare --mount sh -c '/bin/true; /bin/ls /'")
	kept := func() int { return len(strings.Fields(sh(t, "ls "+a.dir+"/state/boots/*/ns"))) }
	before := kept()
	awaitLog(t, a, "was not archived")
	if got := sh(t, "ls -A "+archive); got != "" {
		t.Errorf("in the full archive: %s", got)
	}
	if n := kept(); n == 0 || n > before {
		t.Errorf("%d namespaces' state kept", n)
	}
	a.signal(syscall.SIGTERM)
	sh(t, "mount -o remount,nr_inodes=0 "+archive)
	a.start()
	find := fmt.Sprintf("grep -l /usr/bin/ls %s/*/%s", archive, namespace.ArchivedList)
	folder := filepath.Dir(sh(t, fmt.Sprintf("for i in $(seq 600); do %s 2>/dev/null && exit 0; sleep 0.1; done; exit 1", find)))
	if out := a.cli("verify", folder); !strings.Contains(out, "ok") {
		t.Errorf("verify: %s", out)
	}
	if got, want := readFile(t, folder+"/"+namespace.ArchivedPolicy), "func=BPRM_CHECK"; !strings.Contains(got, want) {
		t.Errorf("the archived policy is %q", got)
	}
	list := []byte(readFile(t, folder+"/"+namespace.ArchivedList))
	list[len(list)/2] ^= 1
	if err := os.WriteFile(folder+"/"+namespace.ArchivedList, list, 0o600); err != nil {
		t.Fatal(err)
	}
	if status, out := exits(t, program, "verify", folder); status != 1 {
		t.Errorf("a changed byte: exit status %d: %s", status, out)
	}
	for deadline := time.Now().Add(time.Minute); kept() >= before; time.Sleep(100 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("the state of what is archived stays")
		}
	}
	if status, out := exits(t, program, append(a.folders(), "--policy", "exec", "--pcr", nativePCR, "--archive", "/proc/nowhere")...); status != exitBadPolicy || !strings.Contains(out, "--archive") {
		t.Errorf("an archive that can't be: exit status %d: %s", status, out)
	}
}

// awaitLog waits for a line of the running agent's log.
func awaitLog(t *testing.T, a *agent, want string) {
	t.Helper()
	for deadline := time.Now().Add(time.Minute); !strings.Contains(a.log.String(), want); time.Sleep(50 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("the agent does not say %q", want)
		}
	}
}
