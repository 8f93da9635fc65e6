package imafs

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/need"
	"imans.dev/imans-agent/internal/policy"
)

// TestMain is also the agent that a test kills: it mounts at the folder named, says so, and serves.
func TestMain(m *testing.M) {
	if os.Getenv("IMAFS_TEST_WRITE") != "" {
		writeAs()
		return
	}
	dir := os.Getenv("IMAFS_TEST_SERVE")
	if dir == "" {
		os.Exit(need.RunWithOwnMounts(m))
	}
	s, err := Mount(dir, &fakeViews{}, zap.NewNop())
	if err == nil {
		fmt.Println("mounted")
		err = s.Run(context.Background())
	}
	fmt.Fprintln(os.Stderr, err)
	os.Exit(1)
}

// fakeViews knows every namespace that asks, each with a real list once it is active.
type fakeViews struct {
	t     testing.TB
	dir   string // of the lists
	store *measure.Store

	mu     sync.Mutex
	spaces map[uint32]*fakeView
	before func(*fakeView) // is told of each new one
}

func (f *fakeViews) View(_ context.Context, ns event.MountNS) (View, error) {
	f.mu.Lock()
	defer f.mu.Unlock()
	v := f.spaces[ns.Inum]
	if v == nil {
		v = &fakeView{
			views: f, ns: ns, hash: ima.SHA256.String(), template: imalog.NG, policy: new(policy.Policy),
			ended: make(chan struct{}), barrier: func(context.Context) error { return nil },
		}
		if f.before != nil {
			f.before(v)
		}
		f.spaces[ns.Inum] = v
	}
	return v, nil
}

// onNew sets what is done with each new namespace.
func (f *fakeViews) onNew(do func(*fakeView)) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.before = do
}

// all returns the namespaces that asked so far.
func (f *fakeViews) all() []*fakeView {
	f.mu.Lock()
	defer f.mu.Unlock()
	return slices.Collect(maps.Values(f.spaces))
}

// rulesMax is what the fake's namespaces can hold.
const rulesMax = 1024

type fakeView struct {
	views *fakeViews
	ns    event.MountNS
	ended chan struct{}

	mu        sync.Mutex
	owner     Owner
	hash      string
	template  string
	list      *measure.List
	policy    *policy.Policy
	requested []Caller
	wrote     *Caller
	applied   int // how many times rules were appended
	barrier   func(context.Context) error
	apply     func() // called before rules are appended
}

func (v *fakeView) Ended() <-chan struct{} { return v.ended }

func (v *fakeView) Owner() Owner { defer v.lock()(); return v.owner }

func (v *fakeView) Active() bool { return v.List() != nil }

func (v *fakeView) Lazy() bool { return false }

func (v *fakeView) lock() func() { v.mu.Lock(); return v.mu.Unlock }

func (v *fakeView) Activate(ctx context.Context) error {
	defer v.lock()()
	algo, _ := ima.HashAlgoByName(v.hash)
	dir := filepath.Join(v.views.dir, v.ns.String())
	if err := os.Mkdir(dir, 0o700); err != nil {
		return err
	}
	var err error
	v.list, _, err = measure.Open(ctx, measure.Config{
		Dir: dir, PCR: 10, Template: v.template, Algo: algo, Store: v.views.store, Log: zap.NewNop(),
	})
	if err == nil {
		err = v.list.Barrier(ctx)
	}
	return err
}

func (v *fakeView) HashName() string     { defer v.lock()(); return v.hash }
func (v *fakeView) TemplateName() string { defer v.lock()(); return v.template }

func (v *fakeView) SetHash(name string) error {
	defer v.lock()()
	algo, ok := ima.HashAlgoByName(name)
	if !ok {
		return errors.New("no such algorithm")
	}
	v.hash = algo.String()
	return nil
}

func (v *fakeView) SetTemplate(name string) error {
	defer v.lock()()
	if err := imalog.CheckTemplate(name); err != nil {
		return err
	}
	v.template = name
	return nil
}

func (v *fakeView) RequestNew(_ context.Context, c *Caller) error {
	defer v.lock()()
	v.requested = append(v.requested, *c)
	return nil
}

func (v *fakeView) WithdrawNew(context.Context, *Caller) error {
	defer v.lock()()
	v.requested = nil
	return nil
}

func (v *fakeView) Requested(context.Context, *Caller) (bool, error) {
	defer v.lock()()
	return len(v.requested) > 0, nil
}

func (v *fakeView) Barrier(ctx context.Context) error {
	unlock := v.lock()
	wait := v.barrier
	unlock()
	return wait(ctx)
}

func (v *fakeView) setBarrier(wait func(context.Context) error) { defer v.lock()(); v.barrier = wait }

func (v *fakeView) List() *measure.List { defer v.lock()(); return v.list }

func (v *fakeView) PolicyText(*Caller) string { defer v.lock()(); return v.policy.String() }

func (v *fakeView) CheckPolicy(_ *Caller, text []byte) error {
	_, err := policy.Parse("written", text)
	return err
}

func (v *fakeView) AppendPolicy(_ context.Context, c *Caller, text []byte) error {
	unlock := v.lock()
	apply := v.apply
	unlock()
	if apply != nil {
		apply()
	}
	defer v.lock()()
	p, err := policy.Parse("written", text)
	if err != nil {
		return err
	}
	v.wrote, v.applied = c, v.applied+1
	if len(v.policy.Rules())+len(p.Rules()) > rulesMax {
		return fmt.Errorf("too many rules: %w", syscall.ENOSPC)
	}
	v.policy = policy.Append(v.policy, p)
	return nil
}

// set changes the view.
func (v *fakeView) set(change func()) { defer v.lock()(); change() }

// rules returns the policy in force.
func (v *fakeView) rules() string { return v.PolicyText(nil) }

// writeAs is what a test does in another root and with other file system ids: open, change, write, close, and print how much was
// written and the error's number.
func writeAs() {
	fd, err := unix.Open(os.Getenv("IMAFS_TEST_FILE"), unix.O_WRONLY, 0)
	var uid, n int
	fmt.Sscan(os.Getenv("IMAFS_TEST_UID"), &uid)
	if err == nil {
		err = unix.Chroot(os.Getenv("IMAFS_TEST_ROOT"))
	}
	runtime.LockOSThread()
	if err == nil {
		err = unix.Setfsuid(uid)
	}
	var no syscall.Errno
	if err == nil {
		n, err = unix.Write(fd, []byte(os.Getenv("IMAFS_TEST_WRITE")))
	}
	if err == nil {
		err = unix.Close(fd)
	}
	errors.As(err, &no)
	fmt.Println(n, int(no))
}

// window is a mounted window.
type window struct {
	t     testing.TB
	dir   string
	views *fakeViews
	stop  func()
}

// own returns the view of the test's own namespace.
func (w *window) own() *fakeView {
	w.t.Helper()
	inum, err := callerNS(uint32(os.Getpid()))
	if err != nil {
		w.t.Fatal(err)
	}
	v, _ := w.views.View(w.t.Context(), event.MountNS{Inum: inum})
	return v.(*fakeView)
}

// path returns a file's path.
func (w *window) path(name string) string { return filepath.Join(w.dir, "ima", name) }

// open mounts a window, without a namespace that is active.
func open(t testing.TB) *window {
	t.Helper()
	need.Mounts(t)
	views := &fakeViews{t: t, dir: t.TempDir(), store: measure.NewStore(), spaces: make(map[uint32]*fakeView)}
	dir := filepath.Join(t.TempDir(), "window")
	if err := os.Chmod(filepath.Dir(views.dir), 0o755); err != nil { // for other users
		t.Fatal(err)
	}
	s, err := Mount(dir, views, zap.NewNop())
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.Run(ctx) }()
	if err := s.fuse.WaitMount(); err != nil { // this process opens files of the window: Go's poller has to learn not to ask for them
		t.Fatal(err)
	}
	w := &window{t: t, dir: dir, views: views}
	w.stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
		views.mu.Lock()
		defer views.mu.Unlock()
		for _, v := range views.spaces {
			if v.list != nil {
				v.list.Close()
			}
		}
	})
	t.Cleanup(w.stop)
	return w
}

// openActive mounts a window; the test's own namespace is active.
func openActive(t testing.TB) (*window, *fakeView) {
	w := open(t)
	v := w.own()
	if err := v.Activate(t.Context()); err != nil {
		t.Fatal(err)
	}
	return w, v
}

// fill appends entries to a list, and waits for them.
func fill(t testing.TB, l *measure.List, first, n int) {
	t.Helper()
	for i := first; i < first+n; i++ {
		sum := fmt.Appendf(make([]byte, 0, 32), "%032d", i)
		d, err := ima.NewDigest(ima.SHA256, sum)
		if err != nil {
			t.Fatal(err)
		}
		e, err := imalog.NewEntry(10, imalog.NG, imalog.FieldValues{Digest: d, Name: fmt.Sprintf("/usr/bin/program-%d", i)})
		if err != nil {
			t.Fatal(err)
		}
		l.Append(e)
	}
	if err := l.Barrier(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// shell runs a script as a container's user would. W is the window's folder.
func (w *window) shell(script string, options ...func(*exec.Cmd)) (string, error) {
	cmd := exec.Command("sh", "-c", script)
	cmd.Env = append(os.Environ(), "W="+w.dir)
	cmd.SysProcAttr = &syscall.SysProcAttr{}
	for _, o := range options {
		o(cmd)
	}
	out, err := cmd.CombinedOutput()
	return string(out), err
}

// newNS runs the command in a new mount namespace.
func newNS(cmd *exec.Cmd) { cmd.SysProcAttr.Unshareflags |= syscall.CLONE_NEWNS }

// as runs the command with other ids, and so without capabilities.
func as(id uint32) func(*exec.Cmd) {
	return func(cmd *exec.Cmd) { cmd.SysProcAttr.Credential = &syscall.Credential{Uid: id, Gid: id} }
}

// want fails unless a script prints that and succeeds.
func (w *window) want(script, out string, options ...func(*exec.Cmd)) {
	w.t.Helper()
	if got, err := w.shell(script, options...); err != nil || got != out {
		w.t.Errorf("%s\nprinted %q, %v; want %q", script, got, err, out)
	}
}

// openErr is the error of an open.
func openErr(path string, flags int) error {
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err == nil {
		unix.Close(fd)
	}
	return err
}

// mustOpen opens and closes at the end of the test.
func mustOpen(t testing.TB, path string, flags int) int {
	t.Helper()
	fd, err := unix.Open(path, flags|unix.O_CLOEXEC, 0)
	if err != nil {
		t.Fatalf("open %s: %v", path, err)
	}
	t.Cleanup(func() { unix.Close(fd) })
	return fd
}

// readAll reads from where the descriptor is to the end, with reads of a size.
func readAll(t testing.TB, fd, size int) []byte {
	t.Helper()
	var all bytes.Buffer
	for b := make([]byte, size); ; {
		n, err := unix.Read(fd, b)
		if err != nil {
			t.Fatal(err)
		}
		if n == 0 {
			return all.Bytes()
		}
		all.Write(b[:n])
	}
}

// eventually waits for something that another process or the kernel does.
func eventually(t testing.TB, what string, is func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !is(); time.Sleep(time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%s: not within 10 s", what)
		}
	}
}

// expected is a list as it should read, made in another way: from the log as it is on disk.
func expected(t testing.TB, l *measure.List, format func(*imalog.Entry, []byte, ima.HashAlgo) []byte, bank ima.HashAlgo, out io.Writer) {
	t.Helper()
	r := imalog.NewReader(l.Snapshot(), ima.SHA1)
	var b []byte
	for {
		e, err := r.Next()
		if err == io.EOF {
			return
		}
		if err != nil {
			t.Fatal(err)
		}
		b = format(e, b[:0], bank)
		out.Write(b)
	}
}
