package container

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"runtime"
	"slices"
	"strconv"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/proc"
)

// errEnded means that a process has ended.
var errEnded = errors.New("the process has ended")

// process is an open way into a mount namespace. It stays the same whatever becomes of the process that it was taken from.
type process struct {
	host int // the agent's /proc
	ns   int
	root int
}

func (p *process) close() {
	for _, fd := range []int{p.host, p.ns, p.root} {
		if fd >= 0 {
			unix.Close(fd)
		}
	}
}

// openProcess opens what is needed to enter the target's namespace. One descriptor of /proc/PID serves for all of it: it means
// that very process, even when its number is given away again.
func openProcess(t Target) (*process, error) {
	p := &process{-1, -1, -1}
	fail := func(err error) (*process, error) {
		p.close()
		if errors.Is(err, unix.ENOENT) || errors.Is(err, unix.ESRCH) {
			err = errEnded
		}
		return nil, fmt.Errorf("process %d: %w", t.PID, err)
	}
	var err error
	if p.host, err = unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return fail(err)
	}
	dir, err := unix.Openat(p.host, strconv.Itoa(t.PID), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fail(err)
	}
	defer unix.Close(dir)
	if p.ns, err = unix.Openat(dir, "ns/mnt", unix.O_RDONLY|unix.O_CLOEXEC, 0); err != nil {
		return fail(err)
	}
	if p.root, err = unix.Openat(dir, "root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0); err != nil {
		return fail(err)
	}
	var before, after, own unix.Stat_t
	if err := unix.Fstat(p.ns, &before); err != nil {
		return fail(err)
	}
	if err := unix.Fstatat(dir, "ns/mnt", &after, 0); err != nil {
		return fail(err)
	}
	if err := unix.Fstatat(p.host, "self/ns/mnt", &own, 0); err != nil {
		return fail(err)
	}
	if before.Ino != uint64(t.Inum) || after.Ino != before.Ino { // else the root could be of another namespace
		return fail(ErrChanged)
	}
	if before.Ino == own.Ino {
		return fail(ErrOwn)
	}
	return p, nil
}

// enter runs f in the target's mount namespace, its root that of the target, and closes the tree afterwards. When ctx ends
// first, enter returns and f goes on until what it waits for is over.
func enter(ctx context.Context, t Target, tree int, f func(*inside) error) error {
	p, err := openProcess(t)
	if err != nil {
		unix.Close(tree)
		return err
	}
	done := onOwnThread(func() error {
		defer p.close()
		defer unix.Close(tree)
		if err := p.enter(); err != nil {
			return fmt.Errorf("enter the namespace of process %d: %w", t.PID, err)
		}
		return f(&inside{proc: p.host, tree: tree})
	})
	select {
	case err := <-done:
		return err
	case <-ctx.Done():
		return ctx.Err()
	}
}

// enter takes the calling thread into the namespace, for good. Its working folder is the host's /proc.
func (p *process) enter() error {
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return fmt.Errorf("unshare the root folder: %w", err)
	}
	if err := unix.Setns(p.ns, unix.CLONE_NEWNS); err != nil {
		return fmt.Errorf("setns: %w", err)
	}
	if err := unix.Fchdir(p.root); err != nil {
		return err
	}
	if err := unix.Chroot("."); err != nil {
		return fmt.Errorf("chroot: %w", err)
	}
	return unix.Fchdir(p.host)
}

// onOwnThread runs f on a thread that ends with it. The process's first thread can't end, and /proc/self is its view: if the
// goroutine happens to be on that one, it stays there, so that another has to be taken.
func onOwnThread(f func() error) <-chan error {
	done := make(chan error, 1)
	go func() {
		runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			done <- <-onOwnThread(f)
			return
		}
		done <- f()
	}()
	return done
}

// Process returns a process of the mount namespace with that inode number: the oldest, which in a container is its first one.
// It returns an error that is fs.ErrNotExist if there is none.
func Process(inum uint32) (Target, error) {
	all, err := Processes()
	if err != nil {
		return Target{}, err
	}
	if i := slices.IndexFunc(all, func(t Target) bool { return t.Inum == inum }); i >= 0 {
		return all[i], nil
	}
	return Target{}, fmt.Errorf("no process is in namespace %d: %w", inum, fs.ErrNotExist)
}

// Processes returns the oldest process of each mount namespace, the oldest first: outer namespaces come before inner ones. Those
// that can't be looked at now are left out.
func Processes() ([]Target, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return nil, fmt.Errorf("look for processes: %w", err)
	}
	oldest := make(map[uint32]aged)
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		p, ok := proc.Ask(pid, func() *aged { return lookAt(pid) })
		if !ok || p == nil {
			continue // ended, or a zombie, or it lets us wait
		}
		if o, ok := oldest[p.Inum]; !ok || p.start < o.start {
			oldest[p.Inum] = *p
		}
	}
	found := slices.SortedFunc(maps.Values(oldest), func(a, b aged) int {
		return cmp.Or(cmp.Compare(a.start, b.start), cmp.Compare(a.PID, b.PID))
	})
	targets := make([]Target, len(found))
	for i, p := range found {
		targets[i] = p.Target
	}
	return targets, nil
}

// aged is a process with when it began, in clock ticks since boot.
type aged struct {
	Target
	start uint64
}

// lookAt returns what Processes wants to know of a process; nil if it is gone.
func lookAt(pid int) *aged {
	inum, err := proc.Namespace(pid, "mnt")
	if err != nil {
		return nil
	}
	fields, err := proc.Stat(pid)
	if err != nil {
		return nil
	}
	start, err := strconv.ParseUint(fields[proc.StatStart], 10, 64)
	if err != nil {
		return nil
	}
	return &aged{Target{PID: pid, Inum: inum}, start}
}
