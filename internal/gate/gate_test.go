package gate

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/zap/zaptest"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/need"
	"imans.dev/imans-agent/internal/proc"
)

// The guard is the program itself.
func TestMain(m *testing.M) {
	if len(os.Args) > 3 && os.Args[1] == "guard" {
		agent, err := strconv.Atoi(os.Args[2])
		ms, err2 := strconv.Atoi(os.Args[3])
		if err = errors.Join(err, err2); err == nil {
			err = Guard(3, agent, time.Duration(ms)*time.Millisecond)
		}
		if err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(need.RunClean(m))
}

// mounted is a file system of the test's own, with a gate.
type mounted struct {
	t       *testing.T
	root    *os.File // of this process
	dir     string
	fsType  string
	gates   *Gates
	owner   event.MountNS
	all     bool
	asked   atomic.Int32
	missed  atomic.Int32
	dropped atomic.Int32
}

func mount(t *testing.T, c Config) *mounted {
	t.Helper()
	if os.Getuid() != 0 {
		need.Skip(t, "fanotify permission events need root")
	}
	m := &mounted{t: t, dir: t.TempDir(), fsType: "tmpfs"}
	if err := unix.Mount("none", m.dir, m.fsType, 0, ""); err != nil {
		need.Skip(t, "mounting a tmpfs: %v", err)
	}
	dir := m.dir
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	inum, err := proc.Namespace(os.Getpid(), "mnt")
	if err != nil {
		t.Fatal(err)
	}
	if m.root, err = os.OpenFile("/", unix.O_PATH|unix.O_DIRECTORY, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { m.root.Close() })
	m.owner = event.MountNS{Inum: inum, ID: 1}
	ask := c.Ask
	c.Ask = func(ctx context.Context, owner event.MountNS, a *Asked) error {
		m.asked.Add(1)
		return ask(ctx, owner, a)
	}
	if c.Below == nil {
		c.Below = func(event.MountNS, uint32) (bool, bool) { return true, true }
	}
	c.Missed = func(event.MountNS, *Asked) { m.missed.Add(1) }
	c.Dropped = func() {
		m.open()
		m.dropped.Add(1)
	}
	c.Log = zaptest.NewLogger(t)
	stateFile := filepath.Join(t.TempDir(), "guard.json")
	m.gates = New(c, []string{"guard"}, stateFile)
	t.Cleanup(func() {
		if err := errors.Join(m.gates.Shutdown(), EndGuard(stateFile)); err != nil && !errors.Is(err, unix.ESRCH) { // the guard of closed gates stays
			t.Error(err)
		}
	})
	m.open()
	return m
}

// mounts are some that this process sees.
func (m *mounted) mounts(all ...Mount) Mounts {
	return Mounts{PID: os.Getpid(), Root: m.root, All: all}
}

func (m *mounted) open() {
	if err := m.gates.Open(m.owner, m.mounts(Mount{m.dir, m.fsType, 1}, Mount{"/proc", "proc", 2}), Mounts{}, How{All: m.all}); err != nil && !errors.Is(err, os.ErrClosed) {
		m.t.Error(err)
	}
}

// start has a program of its own content run by a process that is no descendant of this one, and returns what exists once it ran.
func (m *mounted) start(name string) (path, ran string) {
	m.t.Helper()
	path, ran = filepath.Join(m.dir, name), filepath.Join(m.dir, name+".ran")
	if err := os.WriteFile(path, []byte("#!/bin/sh\n: >"+ran+"\n"), 0o755); err != nil {
		m.t.Fatal(err)
	}
	m.run(path)
	return path, ran
}

// run waits a moment before the program, in which its parent ends.
func (m *mounted) run(path string) {
	m.t.Helper()
	if out, err := exec.Command("/bin/sh", "-c", "(sleep 0.3; exec "+path+") >/dev/null 2>&1 &").CombinedOutput(); err != nil {
		m.t.Fatalf("%v %s", err, out)
	}
}

// guard returns the guard's process, or 0 while there is none.
func (m *mounted) guard() int {
	g := m.gates.guard
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.conn < 0 {
		return 0
	}
	return g.cmd.Process.Pid
}

func (m *mounted) eventually(what string, holds func() bool) {
	m.t.Helper()
	for deadline := time.Now().Add(20 * time.Second); !holds(); time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			m.t.Fatalf("%s: not within 20 s", what)
		}
	}
}

func exists(path string) bool {
	_, err := os.Stat(path)
	return err == nil
}

func TestAsked(t *testing.T) {
	release := make(chan struct{})
	seen := make(chan Asked, 1)
	m := mount(t, Config{Timeout: 10 * time.Second, Ask: func(_ context.Context, _ event.MountNS, a *Asked) error {
		seen <- *a
		<-release
		return nil
	}})
	path, ran := m.start("asked")
	a := <-seen
	if a.Event.Path != path || a.Event.Func != ima.BPRMCheck || a.Inum != m.owner.Inum || a.Event.SeenFS.Name != "tmpfs" || a.Event.Nlink != 1 {
		t.Errorf("asked about %+v in %d", a.Event, a.Inum)
	}
	time.Sleep(300 * time.Millisecond)
	if exists(ran) {
		t.Error("it did not wait")
	}
	if pid := a.Event.Process.PID; !slices.Contains(Waiting(), int(pid)) {
		t.Errorf("%d waits, and is not among %v", pid, Waiting())
	}
	close(release)
	m.eventually("it runs", func() bool { return exists(ran) })
	if m.missed.Load() != 0 {
		t.Error("it was told to be missed")
	}
}

// A file system is called what it is mounted as: ext2 is not what serves it.
func TestFileSystemType(t *testing.T) {
	seen := make(chan event.FileSystem, 1)
	m := mount(t, Config{Timeout: 10 * time.Second, Ask: func(_ context.Context, _ event.MountNS, a *Asked) error {
		seen <- a.Event.SeenFS
		return nil
	}})
	image := filepath.Join(m.dir, "image")
	m.dir, m.fsType = t.TempDir(), "ext2"
	for _, args := range [][]string{{"mke2fs", "-q", "-t", "ext2", image, "1M"}, {"mount", "-t", "ext2", "-o", "loop", image, m.dir}} {
		if out, err := exec.Command(args[0], args[1:]...).CombinedOutput(); err != nil {
			need.Skip(t, "%v: %v %s", args, err, out)
		}
	}
	dir := m.dir
	t.Cleanup(func() { unix.Unmount(dir, unix.MNT_DETACH) })
	m.open()
	_, ran := m.start("asked")
	if fs := <-seen; fs.Name != "ext2" || fs.Magic != unix.EXT2_SUPER_MAGIC {
		t.Errorf("asked about %+v", fs)
	}
	m.eventually("it runs", func() bool { return exists(ran) })
}

// What the hook has seen settled is asked about no more, until it is changed.
func TestSettled(t *testing.T) {
	seen := make(chan event.File, 10)
	m := mount(t, Config{Timeout: 10 * time.Second, Ask: func(_ context.Context, _ event.MountNS, a *Asked) error {
		seen <- *a.Event
		return nil
	}})
	path, ran := m.start("settled")
	f := <-seen
	m.eventually("it runs", func() bool { return exists(ran) })
	m.gates.Settled(&f)
	again := func() {
		t.Helper()
		os.Remove(ran)
		m.run(path)
		m.eventually("it runs again", func() bool { return exists(ran) })
	}
	again()
	if n := m.asked.Load(); n != 1 {
		t.Errorf("%d questions for two runs", n)
	}
	text, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, append(text, "# changed\n"...), 0o755); err != nil {
		t.Fatal(err)
	}
	again()
	if n := m.asked.Load(); n != 2 {
		t.Errorf("%d questions after a change, want 2", n)
	}
	f = <-seen
	m.gates.Settled(&f)
	if err := m.gates.Flush(m.owner); err != nil {
		t.Fatal(err)
	}
	again()
	if n := m.asked.Load(); n != 3 {
		t.Errorf("%d questions after all was to be asked about anew, want 3", n)
	}
}

func TestTooLate(t *testing.T) {
	for _, closed := range []bool{false, true} {
		t.Run(fmt.Sprint(closed), func(t *testing.T) {
			m := mount(t, Config{Timeout: 200 * time.Millisecond, Closed: closed, Ask: func(ctx context.Context, _ event.MountNS, _ *Asked) error {
				<-ctx.Done()
				return ctx.Err()
			}})
			_, ran := m.start("late")
			m.eventually("the question", func() bool { return m.asked.Load() == 1 })
			if closed {
				time.Sleep(time.Second)
				if exists(ran) || m.missed.Load() != 0 {
					t.Errorf("ran: %v, missed %d", exists(ran), m.missed.Load())
				}
				return
			}
			m.eventually("it runs", func() bool { return exists(ran) && m.missed.Load() == 1 })
		})
	}
}

// Whoever the gate does not concern is let through unasked: other namespaces' processes, and the agent's own.
func TestNotConcerned(t *testing.T) {
	var below atomic.Bool
	m := mount(t, Config{
		Timeout: 10 * time.Second, Ask: func(context.Context, event.MountNS, *Asked) error { return errors.New("asked") },
		Below: func(event.MountNS, uint32) (bool, bool) { return below.Load(), true },
	})
	path, ran := m.start("foreign")
	m.eventually("it runs", func() bool { return exists(ran) })
	below.Store(true)
	if out, err := exec.Command(path).CombinedOutput(); err != nil {
		t.Errorf("a child: %v %s", err, out)
	}
	if n := m.asked.Load(); n != 0 {
		t.Errorf("%d questions", n)
	}
}

// Nor is a thread of the agent's held up, whichever it is, when each open is asked about.
func TestOwnThreads(t *testing.T) {
	m := mount(t, Config{Timeout: 2 * time.Second, Ask: func(ctx context.Context, _ event.MountNS, _ *Asked) error {
		<-ctx.Done()
		return ctx.Err()
	}})
	m.all = true
	m.open()
	program, err := os.ReadFile("/bin/sh")
	if err != nil {
		t.Fatal(err)
	}
	var opens sync.WaitGroup
	for i := range 4 {
		opens.Go(func() {
			runtime.LockOSThread() // each on another one
			defer runtime.UnlockOSThread()
			path := filepath.Join(m.dir, fmt.Sprint(i))
			if err := os.WriteFile(path, program, 0o755); err != nil {
				t.Error(err)
			}
			if _, err := os.ReadFile(path); err != nil {
				t.Error(err)
			}
		})
	}
	opens.Wait()
	if n := m.asked.Load() + m.missed.Load(); n != 0 {
		t.Errorf("%d questions", n)
	}
}

// A look at a file that does not come back holds up its own question alone, and no longer than it may. With too many nothing is looked at.
func TestLookHangs(t *testing.T) {
	hang := make(chan struct{})
	m := mount(t, Config{Timeout: 200 * time.Millisecond, Ask: func(_ context.Context, _ event.MountNS, a *Asked) error {
		if strings.HasPrefix(filepath.Base(a.Event.Path), "hangs") {
			<-hang
		}
		return nil
	}})
	t.Cleanup(func() { close(hang) })
	for i := range proc.BehindMax {
		_, ran := m.start(fmt.Sprint("hangs", i))
		m.eventually("it runs", func() bool { return exists(ran) })
		if i == 0 {
			_, ran = m.start("meanwhile")
			m.eventually("another runs", func() bool { return exists(ran) })
		}
	}
	before := m.asked.Load()
	_, ran := m.start("more")
	m.eventually("it runs", func() bool { return exists(ran) })
	if n := m.asked.Load(); n != before || before != proc.BehindMax+1 {
		t.Errorf("%d questions, then %d", before, n)
	}
	for range proc.BehindMax {
		hang <- struct{}{}
	}
	m.eventually("it is asked again", func() bool {
		_, ran := m.start(fmt.Sprint("again", m.asked.Load()))
		m.eventually("it runs", func() bool { return exists(ran) })
		return m.asked.Load() > before
	})
	if n := m.dropped.Load(); n != 0 {
		t.Errorf("the guard let all through %d times", n)
	}
}

// An agent that does not answer at all is taken for hanging: the guard lets all through.
func TestGuard(t *testing.T) {
	m := mount(t, Config{Timeout: 200 * time.Millisecond, Ask: func(context.Context, event.MountNS, *Asked) error { return nil }})
	m.gates.mu.Lock() // so that nothing goes on
	_, ran := m.start("hangs")
	m.eventually("it runs", func() bool { return exists(ran) })
	_, other := m.start("other")
	m.eventually("the next runs", func() bool { return exists(other) })
	if n := m.asked.Load(); n != 0 {
		t.Errorf("%d questions, though the guard has taken the marks off", n)
	}
	m.gates.mu.Unlock() // and so does the gate
	m.eventually("the gate is back", func() bool { return m.dropped.Load() == 1 })
	asked := m.asked.Load()
	_, back := m.start("back")
	m.eventually("a question", func() bool { return exists(back) && m.asked.Load() == asked+1 })
}

// Who waits for an answer when the gate is renewed, or begins to ask for less, waits on.
func TestRenewedWhileAsked(t *testing.T) {
	answer := make(chan struct{})
	m := mount(t, Config{Timeout: 10 * time.Second, Ask: func(ctx context.Context, _ event.MountNS, a *Asked) error {
		if filepath.Base(a.Event.Path) != "waits" {
			return nil
		}
		select {
		case <-answer:
			return nil
		case <-ctx.Done():
			return ctx.Err()
		}
	}})
	_, ran := m.start("waits")
	m.eventually("the question", func() bool { return m.asked.Load() == 1 })
	if err := m.gates.Renew(m.owner, m.mounts(Mount{m.dir, m.fsType, 1}), Mounts{}, How{}); err != nil {
		t.Fatal(err)
	}
	time.Sleep(300 * time.Millisecond)
	if exists(ran) {
		t.Fatal("it did not wait")
	}
	_, other := m.start("other")
	m.eventually("another runs", func() bool { return exists(other) })
	close(answer)
	m.eventually("it runs", func() bool { return exists(ran) && m.missed.Load() == 0 })
}

// Who waits at one gate holds, in the kernel, what another one ignores about the same file, and so that one's end (see letGo): neither the agent
// nor its guard waits for it, nor does a child of the agent. The kernel asks the groups in their order, and holds what is behind.
func TestCloseBesideAnother(t *testing.T) {
	type question struct {
		owner event.MountNS
		Asked
	}
	seen, answer := make(chan question, 4), make(chan struct{})
	var waits atomic.Bool
	m := mount(t, Config{Timeout: time.Minute, Ask: func(ctx context.Context, owner event.MountNS, a *Asked) error {
		seen <- question{owner, *a}
		if waits.Load() && filepath.Base(a.Event.Path) == "waits" {
			<-answer
		}
		return nil
	}})
	other := event.MountNS{Inum: m.owner.Inum, ID: 2}
	if err := m.gates.Open(other, m.mounts(Mount{m.dir, m.fsType, 1}), Mounts{}, How{}); err != nil {
		t.Fatal(err)
	}
	path, ran := m.start("waits")
	m.eventually("it runs", func() bool { return exists(ran) })
	first, second := <-seen, <-seen
	m.gates.Settled(first.Event)
	if err := m.gates.Flush(first.owner); err != nil {
		t.Fatal(err)
	}
	waits.Store(true)
	m.run(path)
	if q := <-seen; q.owner != first.owner {
		t.Fatalf("%v asks, which was to ignore it", q.owner)
	}

	began := time.Now()
	if err := m.gates.Close(second.owner); err != nil {
		t.Fatal(err)
	}
	_, ran = m.start("other")
	if d := time.Since(began); d > 10*time.Second {
		t.Errorf("closing it and starting a program took %v", d)
	}
	m.eventually("another one runs", func() bool { return exists(ran) })
	groups := func() (n int) {
		guard := fmt.Sprintf("/proc/%d/fd", m.guard())
		all, err := os.ReadDir(guard)
		if err != nil {
			t.Fatal(err)
		}
		for _, one := range all {
			if to, _ := os.Readlink(filepath.Join(guard, one.Name())); to == "anon_inode:[fanotify]" {
				n++
			}
		}
		return n
	}
	const each = 2 // the group, and its reader's
	if n := groups(); n != 2*each {
		t.Errorf("the guard has %d descriptors of groups, want those of two", n)
	}
	close(answer)
	m.eventually("the group is closed", func() bool { return groups() == each })
}

// Who waits when the agent stops is turned away where the gate is closed, and let through elsewhere. A gate that is closed later is so from
// then on.
func TestClosedAtTheEnd(t *testing.T) {
	for name, how := range map[string][]How{"closed": {{Closed: true}}, "later": {{}, {Closed: true}}, "opened": {{Closed: true}, {}}} {
		t.Run(name, func(t *testing.T) {
			m := mount(t, Config{Timeout: 10 * time.Second, Ask: func(ctx context.Context, _ event.MountNS, _ *Asked) error {
				<-ctx.Done()
				return ctx.Err()
			}})
			for _, h := range how {
				if err := m.gates.Open(m.owner, m.mounts(Mount{m.dir, m.fsType, 1}), Mounts{}, h); err != nil {
					t.Fatal(err)
				}
			}
			_, ran := m.start("waits")
			m.eventually("the question", func() bool { return m.asked.Load() == 1 })
			if err := m.gates.Shutdown(); err != nil {
				t.Fatal(err)
			}
			if how[len(how)-1].Closed {
				time.Sleep(300 * time.Millisecond)
				if exists(ran) {
					t.Error("it ran")
				}
				return
			}
			m.eventually("it runs", func() bool { return exists(ran) })
		})
	}
}

// A guard that is killed, or hangs, is replaced, and the new one knows the gates.
func TestGuardLost(t *testing.T) {
	for name, signal := range map[string]unix.Signal{"killed": unix.SIGKILL, "hangs": unix.SIGSTOP} {
		t.Run(name, func(t *testing.T) {
			m := mount(t, Config{Timeout: 10 * time.Second, Ask: func(context.Context, event.MountNS, *Asked) error { return nil }})
			first := m.guard()
			if err := unix.Kill(first, signal); err != nil {
				t.Fatal(err)
			}
			m.eventually("another guard", func() bool { p := m.guard(); return p != 0 && p != first && m.dropped.Load() == 1 })
			_, ran := m.start("guarded")
			m.eventually("it runs", func() bool { return exists(ran) && m.asked.Load() == 1 })
		})
	}
}

// A file system that the namespace does not have any more is not asked about.
func TestRenew(t *testing.T) {
	m := mount(t, Config{Timeout: 10 * time.Second, Ask: func(context.Context, event.MountNS, *Asked) error { return nil }})
	other := t.TempDir()
	if err := unix.Mount("none", other, "tmpfs", 0, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(other, unix.MNT_DETACH) })
	if err := m.gates.Renew(m.owner, m.mounts(Mount{other, "tmpfs", 1}), Mounts{}, How{}); err != nil {
		t.Fatal(err)
	}
	_, ran := m.start("gone")
	m.eventually("it runs", func() bool { return exists(ran) })
	if n := m.asked.Load(); n != 0 {
		t.Errorf("%d questions about what is gone", n)
	}
	m.dir = other
	_, ran = m.start("new")
	m.eventually("it runs", func() bool { return exists(ran) })
	if n := m.asked.Load(); n != 1 {
		t.Errorf("%d questions about what is new, want 1", n)
	}
}

// What is opened by a mount of the machine's own is not asked about, also after files there were changed; the same file by another mount is.
func TestSpared(t *testing.T) {
	m := mount(t, Config{Timeout: 10 * time.Second, Ask: func(context.Context, event.MountNS, *Asked) error { return nil }})
	its, other := m.dir, t.TempDir()
	if err := unix.Mount(its, other, "", unix.MS_BIND, ""); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Unmount(other, unix.MNT_DETACH) })
	machine := m.mounts(Mount{other, m.fsType, 1}, Mount{filepath.Join(its, "gone"), m.fsType, 1}, Mount{t.TempDir(), "ext4", 3})
	if err := m.gates.Open(m.owner, m.mounts(Mount{its, m.fsType, 1}), machine, How{}); err != nil {
		t.Fatal(err)
	}
	m.dir = other
	for _, name := range []string{"first", "second"} { // which is a change of the file system
		_, ran := m.start(name)
		m.eventually("it runs", func() bool { return exists(ran) })
	}
	if n := m.asked.Load(); n != 0 {
		t.Fatalf("%d questions about the machine's programs", n)
	}
	m.run(filepath.Join(its, "first"))
	m.eventually("it is asked about", func() bool { return m.asked.Load() == 1 })
}

func TestOpenRefused(t *testing.T) {
	m := mount(t, Config{Timeout: time.Second, Ask: func(context.Context, event.MountNS, *Asked) error { return nil }})
	other := event.MountNS{Inum: 1, ID: 2}
	if err := m.gates.Open(other, m.mounts(Mount{"/proc", "proc", 1}), Mounts{}, How{}); err == nil {
		t.Error("a gate without a file system")
	}
	if m.gates.gates[other] != nil {
		t.Error("it is kept")
	}
}

func TestKindOf(t *testing.T) {
	interp, err := filepath.Glob("/lib*/*/ld-linux*.so.*")
	if err != nil || len(interp) == 0 {
		if interp, err = filepath.Glob("/lib64/ld-linux*.so.*"); err != nil || len(interp) == 0 {
			need.Skip(t, "there is no dynamic loader")
		}
	}
	script := filepath.Join(t.TempDir(), "script")
	if err := os.WriteFile(script, []byte("#!/bin/sh\n"), 0o755); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]fileKind{"/bin/sh": dynamic, interp[0]: interpreter, script: other} {
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		if got := kindOf(f); got != want {
			t.Errorf("%s: %d, want %d", path, got, want)
		}
	}
}
