package imafs

import (
	"bytes"
	"context"
	"errors"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/need"
)

// wait is a barrier that does not come to its end.
func wait(ctx context.Context) error {
	<-ctx.Done()
	return ctx.Err()
}

// TestBarrier: an open comes after the barrier, or fails in time; a slow namespace holds up no other.
func TestBarrier(t *testing.T) {
	w, v := openActive(t)
	v.setBarrier(func(context.Context) error { fill(t, v.list, int(time.Now().UnixNano()), 1); return nil })
	w.want(`[ $(cat $W/ima/runtime_measurements_count) -ge 2 ] && [ $(grep -c program $W/ima/ascii_runtime_measurements) -ge 2 ] && echo new`, "new\n")
	open := mustOpen(t, w.path("ascii_runtime_measurements"), unix.O_RDONLY)
	readAll(t, open, 1000)
	v.setBarrier(wait)
	w.views.onNew(func(v *fakeView) {
		if err := v.Activate(t.Context()); err != nil {
			t.Error(err)
		}
	})
	failed := make(chan error, 3)
	start := time.Now()
	for _, name := range []string{"ascii_runtime_measurements", "violations"} {
		go func() { failed <- openErr(w.path(name), unix.O_RDONLY) }()
	}
	go func() { _, err := unix.Read(open, make([]byte, 100)); failed <- err }()
	time.Sleep(50 * time.Millisecond)
	w.want(`cat $W/ima/runtime_measurements_count`, "1\n", newNS)
	w.want(`cat $W/ima/active`, "1\n")
	if d := time.Since(start); d > time.Second {
		t.Errorf("others waited %v", d)
	}
	for range 3 {
		if err := <-failed; err != unix.EAGAIN {
			t.Errorf("%v, want EAGAIN", err)
		}
	}
	if d := time.Since(start); d < barrierTimeout || d > 2*barrierTimeout+time.Second { // look-ups in one folder wait for each other
		t.Errorf("failed after %v", d)
	}
	v.setBarrier(func(context.Context) error { return errors.New("broken") })
	if err := openErr(w.path("violations"), unix.O_RDONLY); err != unix.EIO {
		t.Errorf("a barrier that fails: %v", err)
	}
}

// TestKilledClient: who is killed while it waits is gone at once, and what was done for it ends.
func TestKilledClient(t *testing.T) {
	w, v := openActive(t)
	begun, over := make(chan bool, 1), make(chan error, 1)
	v.setBarrier(func(ctx context.Context) error { begun <- true; err := wait(ctx); over <- ctx.Err(); return err })
	cmd := exec.Command("cat", w.path("ascii_runtime_measurements"))
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-begun
	start := time.Now()
	cmd.Process.Kill()
	cmd.Wait()
	if cmd.ProcessState == nil {
		t.Error("it is still there")
	}
	if err := <-over; err != context.Canceled || time.Since(start) > time.Second {
		t.Errorf("%v after %v", err, time.Since(start))
	}
}

// TestSignals: one that does not kill does not interrupt.
func TestSignals(t *testing.T) {
	w, v := openActive(t)
	begun, goOn := make(chan bool, 1), make(chan bool)
	v.setBarrier(func(ctx context.Context) error {
		select {
		case begun <- true:
		default:
		}
		select {
		case <-goOn:
		case <-ctx.Done():
		}
		return ctx.Err()
	})
	var out bytes.Buffer
	cmd := exec.Command("busybox", "sh", "-c", "trap 'echo signal' USR1; read -r x <"+w.path("violations")+"; echo $x")
	cmd.Stdout = &out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	<-begun
	for range 3 {
		cmd.Process.Signal(unix.SIGUSR1)
		time.Sleep(100 * time.Millisecond)
	}
	close(goOn)
	if err := cmd.Wait(); err != nil || !strings.HasSuffix(out.String(), "signal\n0\n") {
		t.Errorf("printed %q, %v", out.String(), err)
	}
}

// TestThousandHandles: a namespace has so many and no more, which is nothing to the others; and has them again.
func TestThousandHandles(t *testing.T) {
	w, v := openActive(t)
	fill(t, v.list, 0, 2000)
	base := heap()
	var fds []int
	for b := make([]byte, 100); ; {
		fd, err := unix.Open(w.path("ascii_runtime_measurements"), unix.O_RDONLY|unix.O_CLOEXEC, 0)
		if err != nil {
			if err != unix.EMFILE {
				t.Error(err)
			}
			break
		}
		fds = append(fds, fd)
		if _, err := unix.Read(fd, b); err != nil {
			t.Error(err)
		}
	}
	if len(fds) != handlesMax {
		t.Errorf("%d handles, want %d", len(fds), handlesMax)
	}
	if grown := int64(heap()) - int64(base); grown > 16<<20 {
		t.Errorf("they take %d bytes", grown)
	}
	w.want(`cat $W/ima/active`, "0\n", newNS)
	for _, fd := range fds {
		unix.Close(fd)
	}
	eventually(t, "room again", func() bool { return openErr(w.path("active"), unix.O_RDONLY) == nil })
}

// TestEndedNamespace: what is open fails, and closes; nothing new opens.
func TestEndedNamespace(t *testing.T) {
	w, v := openActive(t)
	fill(t, v.list, 0, 5000)
	var fds []int
	for _, f := range files {
		if f.mode&0o400 != 0 {
			fds = append(fds, mustOpen(t, w.path(f.name), unix.O_RDONLY))
		}
	}
	policy := mustOpen(t, w.path("policy"), unix.O_WRONLY)
	if _, err := unix.Write(policy, []byte("measure func=BPRM_CHECK\n")); err != nil {
		t.Fatal(err)
	}
	list := mustOpen(t, w.path("ascii_runtime_measurements"), unix.O_RDONLY)
	if _, err := unix.Read(list, make([]byte, 10)); err != nil {
		t.Fatal(err)
	}
	if err := v.list.Close(); err != nil {
		t.Fatal(err)
	}
	if _, err := unix.Pread(list, make([]byte, 100_000), 0); err != unix.ENODEV {
		t.Errorf("with its list closed: %v", err)
	}
	close(v.ended)
	for _, fd := range append(fds, list) {
		if _, err := unix.Read(fd, make([]byte, 10)); err != unix.ENODEV {
			t.Errorf("read: %v", err)
		}
	}
	if _, err := unix.Write(policy, []byte("measure func=BPRM_CHECK\n")); err != unix.ENODEV {
		t.Errorf("write: %v", err)
	}
	if err := unix.Close(policy); err != nil || v.applied != 0 {
		t.Errorf("close: %v, applied %d", err, v.applied)
	}
	for _, f := range files {
		if err := openErr(w.path(f.name), unix.O_WRONLY); err != unix.ENODEV && err != unix.EACCES {
			t.Errorf("open %s: %v", f.name, err)
		}
	}
}

// TestReadsDuringDestruction: readers and writers at work while the list goes.
func TestReadsDuringDestruction(t *testing.T) {
	w, v := openActive(t)
	fill(t, v.list, 0, 20000)
	done := make(chan string)
	for range 4 {
		go func() {
			out, _ := w.shell(`while cat $W/ima/ascii_runtime_measurements_sha256 >/dev/null && /bin/echo >> $W/ima/policy; do :; done`)
			done <- out
		}()
	}
	time.Sleep(300 * time.Millisecond)
	close(v.ended)
	v.list.Close()
	for range 4 {
		if out := <-done; !strings.Contains(out, "No such device") && !strings.Contains(out, "busy") {
			t.Errorf("ended with %q", out)
		}
	}
}

// TestStaleMount: what an agent that was killed left is replaced, and nothing hangs on its connection.
func TestStaleMount(t *testing.T) {
	need.Mounts(t)
	dir := filepath.Join(t.TempDir(), "a window")
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = []string{"IMAFS_TEST_SERVE=" + dir}
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	if _, err := io.ReadFull(out, make([]byte, len("mounted\n"))); err != nil {
		t.Fatal(err)
	}
	cmd.Process.Kill()
	cmd.Wait()
	if _, err := os.Stat(dir); !errors.Is(err, unix.ENOTCONN) {
		t.Errorf("what is left says %v", err)
	}
	s, err := Mount(dir, &fakeViews{dir: t.TempDir(), spaces: make(map[uint32]*fakeView)}, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	// By another process: the runtime holds a processor while it asks a new descriptor's file for events, which is asked of this server.
	if b, err := exec.Command("cat", dir+"/ima/active").CombinedOutput(); err != nil || string(b) != "0\n" {
		t.Errorf("read %q, %v", b, err)
	}
	cancel()
	if err := <-done; err != nil {
		t.Error(err)
	}
}

// TestUnmount: clean, also with files open and with the window bound elsewhere; and by someone else it is an error.
func TestUnmount(t *testing.T) {
	w, _ := openActive(t)
	if children, err := w.shell(`ls -l /proc/self/fd | grep -c /dev/fuse`); err == nil {
		t.Errorf("a child inherits the connection: %s", children)
	}
	elsewhere := t.TempDir()
	if err := unix.Mount(w.dir, elsewhere, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	defer unix.Unmount(elsewhere, unix.MNT_DETACH)
	fd := mustOpen(t, w.path("ascii_runtime_measurements"), unix.O_RDONLY)
	w.stop()
	if _, err := unix.Read(fd, make([]byte, 10)); err != unix.ENOTCONN && err != unix.ECONNABORTED {
		t.Errorf("read after the end: %v", err)
	}
	if table, _ := os.ReadFile("/proc/self/mountinfo"); bytes.Contains(table, []byte(" "+w.dir+" ")) {
		t.Error("still mounted")
	}
	s, err := Mount(w.dir, w.views, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	done := make(chan error, 1)
	go func() { done <- s.Run(t.Context()) }()
	eventually(t, "served", func() bool { return openErr(w.path("active"), unix.O_RDONLY) != unix.ENOTCONN })
	if err := unix.Unmount(w.dir, unix.MNT_DETACH); err != nil {
		t.Fatal(err)
	}
	if err := <-done; err == nil {
		t.Error("unmounted by someone else, and no error")
	}
}

// TestSlowPolicyFile: a file system that does not answer holds up its own writer alone, and no longer than that one lives.
func TestSlowPolicyFile(t *testing.T) {
	w, v := openActive(t)
	release := make(chan struct{})
	slow := open(t)
	slow.own().setBarrier(func(ctx context.Context) error { <-release; return nil })
	if err := slow.own().Activate(t.Context()); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	// A counter is a regular file whose open waits, like one of a FUSE that a container runs; but its size is 0.
	cmd := exec.CommandContext(ctx, "sh", "-c", "echo "+slow.path("binary_runtime_measurements")+" > "+w.path("policy"))
	start := time.Now()
	if err := cmd.Run(); err == nil {
		t.Error("loaded")
	}
	if d := time.Since(start); d > 2*time.Second {
		t.Errorf("the writer could be killed only after %v", d)
	}
	fd := mustOpen(t, w.path("policy"), unix.O_WRONLY)
	if _, err := unix.Write(fd, []byte("/etc/passwd\n")); err != unix.EBUSY {
		t.Errorf("another load meanwhile: %v", err)
	}
	close(release)
	eventually(t, "it answered", func() bool {
		_, err := unix.Write(fd, []byte("/etc/passwd\n"))
		return err == unix.EINVAL
	})
	if unix.Close(fd) != nil || v.rules() != "" {
		t.Errorf("in force: %q", v.rules())
	}
}
