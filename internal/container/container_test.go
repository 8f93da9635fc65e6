package container

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	fusefs "github.com/hanwen/go-fuse/v2/fs"
	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/need"
)

// serveEnv makes the test program a FUSE server: its value is the folder to mount on.
const serveEnv = "IMANS_TEST_SERVE"

func TestMain(m *testing.M) {
	if dir := os.Getenv(serveEnv); dir != "" {
		if err := serve(dir); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(need.RunWithOwnMounts(m))
}

// serve serves a file system with ima/pid, whose text is the server's process id, until the process is killed.
func serve(dir string) error {
	root := &fusefs.Inode{}
	server, err := fusefs.Mount(dir, root, &fusefs.Options{
		MountOptions: fuse.MountOptions{AllowOther: true, FsName: Source, Name: Source, DirectMountStrict: true},
		OnAdd: func(ctx context.Context) {
			ima := root.NewPersistentInode(ctx, &fusefs.Inode{}, fusefs.StableAttr{Mode: syscall.S_IFDIR})
			root.AddChild("ima", ima, false)
			text := &fusefs.MemRegularFile{Data: fmt.Appendf(nil, "%d\n", os.Getpid()), Attr: fuse.Attr{Mode: 0o444}}
			ima.AddChild("pid", ima.NewPersistentInode(ctx, text, fusefs.StableAttr{}), false)
		},
	})
	if err != nil {
		return err
	}
	fmt.Println("serving")
	server.Wait()
	return nil
}

// server is a running FUSE server.
type server struct {
	dir string
	cmd *exec.Cmd
}

// startServer starts a server at dir. What it leaves is unmounted when the test ends.
func startServer(t *testing.T, dir string) *server {
	t.Helper()
	s := &server{dir, exec.Command("/proc/self/exe")}
	s.cmd.Env = append(os.Environ(), serveEnv+"="+dir)
	s.cmd.Stderr = os.Stderr
	out, err := s.cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := s.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.kill(); unix.Unmount(dir, unix.MNT_DETACH) })
	if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || line != "serving\n" {
		t.Fatalf("the FUSE server said %q, %v", line, err)
	}
	return s
}

func (s *server) kill() {
	s.cmd.Process.Kill()
	s.cmd.Wait()
}

// stop has the server answer nothing any more.
func (s *server) stop(t *testing.T) {
	t.Helper()
	s.cmd.Process.Signal(syscall.SIGSTOP)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", s.cmd.Process.Pid))
		if err != nil || time.Now().After(deadline) {
			t.Fatalf("the server does not stop: %v", err)
		}
		if strings.Contains(string(b), "T (stopped)") {
			break
		}
	}
}

// child is a process in a mount namespace of its own.
type child struct {
	t *testing.T
	Target
}

// sysFolder gives a namespace a /sys with the folder, on a file system that is read only, as a container's sysfs is.
const sysFolder = "mount -t tmpfs t /sys; mkdir -p /sys/kernel/security; mount -o remount,ro /sys; "

// startChild runs a line of shell by unshare with the options, and then keeps the namespace.
func startChild(t *testing.T, options, line string) *child {
	t.Helper()
	cmd := exec.Command("unshare", append(strings.Fields(options), "sh", "-ec", line+`echo "up $(readlink /proc/self/ns/mnt)"; exec sleep 1000`)...)
	cmd.Stderr = os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL, Setpgid: true}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	runtime.LockOSThread() // the signal comes when this thread ends
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL); cmd.Wait(); runtime.UnlockOSThread() })
	c := &child{t: t, Target: Target{PID: cmd.Process.Pid}}
	if _, err := fmt.Fscanf(out, "up mnt:[%d]\n", &c.Inum); err != nil {
		t.Fatalf("unshare %s: %v", options, err)
	}
	return c
}

// serverSeen returns the process id of the server whose window is at a path of the child's.
func (c *child) serverSeen(path string) string {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/root%s/pid", c.PID, path))
	if err != nil {
		return err.Error()
	}
	return strings.TrimSpace(string(b))
}

// shows checks which server the child sees.
func (c *child) shows(s *server, path string) {
	c.t.Helper()
	if got, want := c.serverSeen(path), fmt.Sprint(s.cmd.Process.Pid); got != want {
		c.t.Errorf("%s shows the server %s, want %s", path, got, want)
	}
}

func (c *child) count() int {
	c.t.Helper()
	w, err := Attached(c.PID)
	if err != nil {
		c.t.Fatal(err)
	}
	return len(w)
}

const window = SecurityFS + "/ima"

// serverDir returns a folder for a server.
func serverDir(t *testing.T) string {
	t.Helper()
	need.Mounts(t)
	return t.TempDir()
}

func TestAttach(t *testing.T) {
	dir := serverDir(t)
	c := startChild(t, "--mount", sysFolder)
	user := startChild(t, "--user --map-root-user --mount", sysFolder)
	s := startServer(t, dir)
	for name, c := range map[string]*child{"mount namespace": c, "user namespace": user} {
		for range 3 {
			if err := Attach(t.Context(), dir, c.Target); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			c.shows(s, window)
			if n := c.count(); n != 1 {
				t.Errorf("%s: %d windows, want 1", name, n)
			}
		}
		for range 2 {
			if err := Detach(t.Context(), c.Target); err != nil {
				t.Fatalf("%s: %v", name, err)
			}
			if n := c.count(); n != 0 {
				t.Errorf("%s: %d windows after Detach", name, n)
			}
		}
	}
	own, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		t.Fatal(err)
	}
	if own == fmt.Sprintf("mnt:[%d]", c.Inum) {
		t.Error("the process's first thread is in the container's namespace")
	}
}

// What covers the window, as a container may, does not count as the window; taken away, the window is there.
func TestAttachOnTop(t *testing.T) {
	dir := serverDir(t)
	c := startChild(t, "--mount", sysFolder+"mount -t tmpfs securityfs /sys/kernel/security; ")
	s := startServer(t, dir)
	if err := Attach(t.Context(), dir, c.Target); err != nil {
		t.Fatal(err)
	}
	c.shows(s, window)
}

func TestAttachDead(t *testing.T) {
	dir := serverDir(t)
	c := startChild(t, "--mount", sysFolder)
	for range 3 {
		s := startServer(t, dir)
		if err := Attach(t.Context(), dir, c.Target); err != nil {
			t.Fatal(err)
		}
		c.shows(s, window)
		if n := c.count(); n != 1 {
			t.Errorf("%d windows, want 1: the dead one stayed", n)
		}
		s.kill()
		if got := c.serverSeen(window); !strings.Contains(got, unix.ENOTCONN.Error()) {
			t.Errorf("the dead window says %q", got)
		}
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			t.Fatal(err)
		}
	}
	if err := Detach(t.Context(), c.Target); err != nil || c.count() != 0 {
		t.Errorf("detach a dead window: %v, %d left", err, c.count())
	}
}

// A container's root below the namespace's root, as chroot makes it: the window is where the container sees it.
func TestAttachBelowChroot(t *testing.T) {
	dir := serverDir(t)
	root := t.TempDir()
	c := startChild(t, "--mount", fmt.Sprintf("mount --rbind / %[1]s; mount -t tmpfs t %[1]s/sys; mkdir -p %[1]s/sys/kernel/security; cd %[1]s; "+
		`echo "up $(readlink /proc/self/ns/mnt)"; exec chroot . sleep 1000; `, root))
	s := startServer(t, dir)
	for deadline := time.Now().Add(time.Minute); ; time.Sleep(10 * time.Millisecond) {
		if link, _ := os.Readlink(fmt.Sprintf("/proc/%d/root", c.PID)); link == root {
			break
		}
		if time.Now().After(deadline) {
			t.Fatal("chroot was not run")
		}
	}
	if err := Attach(t.Context(), dir, c.Target); err != nil {
		t.Fatal(err)
	}
	c.shows(s, window)
}

func TestAttachRefuses(t *testing.T) {
	dir := serverDir(t)
	plain := startChild(t, "--mount", sysFolder)
	noSysfs := startChild(t, "--mount", "mount -t tmpfs t /sys; ")
	link := startChild(t, "--mount", "mount -t tmpfs t /sys; mkdir -p /sys/elsewhere/security; ln -s elsewhere /sys/kernel; ")
	sharedDir := t.TempDir()
	startServer(t, dir)
	inum := func(path string) uint32 {
		var st unix.Stat_t
		if err := unix.Stat(path, &st); err != nil {
			t.Fatal(err)
		}
		return uint32(st.Ino)
	}
	for _, c := range []struct {
		name, dir string
		target    Target
		want      error
		text      string
	}{
		{"another namespace", dir, Target{plain.PID, noSysfs.Inum}, ErrChanged, "imans-agent ns"},
		{"the agent's own", dir, Target{os.Getpid(), inum("/proc/self/ns/mnt")}, ErrOwn, "run folder"},
		{"no process", dir, Target{1 << 30, plain.Inum}, errEnded, "has ended"},
		{"no sysfs", dir, noSysfs.Target, fs.ErrNotExist, "no sysfs at /sys: mount it there"},
		{"a symbolic link", dir, link.Target, unix.ELOOP, SecurityFS},
		{"no window", sharedDir, plain.Target, ErrNoAgent, "start the agent"},
		{"no folder", filepath.Join(dir, "none"), plain.Target, ErrNoAgent, "no such file"},
	} {
		err := Attach(t.Context(), c.dir, c.target)
		if !errors.Is(err, c.want) || !strings.Contains(err.Error(), c.text) {
			t.Errorf("%s: %v; want %v, with %q", c.name, err, c.want, c.text)
		}
	}
	if n := plain.count(); n != 0 {
		t.Errorf("%d windows were made", n)
	}
}

// A mount in a namespace that shares its mounts with the host would cover the host's folder.
func TestAttachShared(t *testing.T) {
	dir := serverDir(t)
	base := t.TempDir()
	if err := unix.Mount("t", base, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(base, unix.MNT_DETACH) })
	if err := unix.Mount("", base, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	if err := os.MkdirAll(base+"/kernel/security", 0o755); err != nil {
		t.Fatal(err)
	}
	c := startChild(t, "--mount --propagation unchanged", fmt.Sprintf("mount --make-private /; mount --rbind %s /sys; ", base))
	startServer(t, dir)
	if err := Attach(t.Context(), dir, c.Target); !errors.Is(err, ErrShared) {
		t.Errorf("attach: %v, want %v", err, ErrShared)
	}
	if _, err := os.Stat(base + "/kernel/security/ima"); err == nil {
		t.Error("the window appeared on the host")
	}
}

// What a container mounts inside its window stays there, even if the agent's own mount is a shared one.
func TestAttachedIsPrivate(t *testing.T) {
	dir := serverDir(t)
	one := startChild(t, "--mount", sysFolder)
	two := startChild(t, "--mount", sysFolder)
	startServer(t, dir)
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		t.Fatal(err)
	}
	for _, c := range []*child{one, two} {
		if err := Attach(t.Context(), dir, c.Target); err != nil {
			t.Fatal(err)
		}
	}
	out, err := exec.Command("nsenter", "--target", fmt.Sprint(one.PID), "--mount", "mount", "-t", "tmpfs", "t", window).CombinedOutput()
	if err != nil {
		t.Fatalf("mount inside the window: %v %s", err, out)
	}
	if _, err := os.Stat(dir + "/ima/pid"); err != nil {
		t.Errorf("the host sees what a container mounted: %v", err)
	}
	if got := two.serverSeen(window); strings.Contains(got, "no such") {
		t.Errorf("another container sees it: %s", got)
	}
	if got := one.serverSeen(window); !strings.Contains(got, "no such") {
		t.Errorf("the container does not see what it mounted: %s", got)
	}
}

// The agent is its window's server: killed while it waits for itself, it would never end. So it asks itself nothing.
func TestServerIsNotAsked(t *testing.T) {
	dir := serverDir(t)
	old, fresh := startChild(t, "--mount", sysFolder), startChild(t, "--mount", sysFolder)
	before := startServer(t, dir)
	if err := Attach(t.Context(), dir, old.Target); err != nil {
		t.Fatal(err)
	}
	before.kill()
	if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	s := startServer(t, dir)
	s.stop(t)
	done := make(chan error, 1)
	go func() {
		err := Attach(t.Context(), dir, fresh.Target)
		n, again := Reattach(t.Context(), dir, []Target{old.Target})
		if n != 1 {
			again = errors.Join(again, fmt.Errorf("%d windows are alive again", n))
		}
		done <- errors.Join(err, again)
	}()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(5 * probeTimeout):
		t.Error("it waits for an answer")
	}
	s.cmd.Process.Signal(syscall.SIGCONT)
	for _, c := range []*child{old, fresh} {
		c.shows(s, window)
	}
}

// A server that does not answer holds nobody up for longer than it is given.
func TestDeadWindowIsNotWaitedFor(t *testing.T) {
	dir := serverDir(t)
	s := startServer(t, dir)
	s.stop(t)
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatal(err)
	}
	defer unix.Close(fd)
	began := time.Now()
	if dead(t.Context(), fd) {
		t.Error("a server that is slow to answer is taken for dead")
	}
	if took := time.Since(began); took > 10*probeTimeout {
		t.Errorf("it took %v to find out", took)
	}
	s.kill()
	if !dead(t.Context(), fd) {
		t.Error("a killed server's file system is not dead")
	}
}
