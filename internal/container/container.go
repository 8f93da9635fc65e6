// Package container puts the window, the file system that shows each namespace its own IMA, into running containers, and
// mends the windows there after the agent was started anew.
//
// Attach mounts it over /sys/kernel/security in the mount namespace of a process; Detach takes it away; Attached lists the
// windows that a process has; Reattach replaces those whose agent has ended. Process and Processes find ways in. None of
// them needs the container's help or runs anything of the container's.
//
// # What is promised
//
// A namespace is entered by a thread of its own, which ends afterwards and never runs other Go code; the process's first
// thread, which /proc/self shows, is never taken for it. The namespace entered is the one whose inode number was asked
// for, however processes come and go meanwhile. Paths are resolved below the container's root and without symbolic links.
// What is mounted there is private: nothing that the container mounts inside its window is seen outside. A window whose
// server does not answer is not waited for.
//
// Mounts are told from each other as the kernel does: proc(5) for /proc/PID/mountinfo, open_tree(2), mount_setattr(2) and
// move_mount(2) for detached ones. Linux 5.12 and newer; needs root of the initial user namespace, and the host's /proc.
package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"slices"

	"golang.org/x/sys/unix"
)

const (
	// SecurityFS is where the window is put: the place at which tools expect the kernel's securityfs.
	SecurityFS = "/sys/kernel/security"
	// FSType is the type of our file system in /proc/PID/mountinfo.
	FSType = "fuse." + Source
	// Source is its source there.
	Source = "imans"
)

// Target is one process of a mount namespace, as a way in.
type Target struct {
	PID  int    // as the agent sees it
	Inum uint32 // of the mount namespace that is meant
}

// Window is one mount of our file system. Everything but Dev and ID is the container's to arrange.
type Window struct {
	Point    string // as the container's processes see it
	Root     string // which folder of the file system, "/" for all of it
	ID       int    // of the mount
	Dev      uint64 // of the file system: each agent's is another one
	ReadOnly bool
}

var (
	// ErrNoAgent means that the folder to attach shows no window.
	ErrNoAgent = errors.New("no window is mounted there; start the agent: imans-agent --policy FILE")
	// ErrOwn means that the namespace is the agent's own: the window would cover the host's securityfs.
	ErrOwn = errors.New("this is the agent's own mount namespace; its window is in the agent's run folder")
	// ErrShared means that a mount there would appear on the host, too.
	ErrShared = errors.New("mounts made there appear on the host, too; make it private first: mount --make-rprivate /")
	// ErrLocked means that a mount came with the namespace and only an outer one can take it away.
	ErrLocked = errors.New("it was made in an outer namespace; detach it there")
	// ErrChanged means that the process is not, or no more, in the namespace that was meant.
	ErrChanged = errors.New("the process is in another mount namespace now; imans-agent ns lists them")
)

// maxStack bounds how many dead windows in one place are taken away at a time.
const maxStack = 64

// Attach mounts the file system at fsDir over /sys/kernel/security in the target's namespace. If its window is there already,
// nothing is done; a dead one is replaced. It returns ErrNoAgent, ErrOwn, ErrShared or ErrChanged, wrapped, or a PathError if
// the container has no /sys/kernel/security.
func Attach(ctx context.Context, fsDir string, t Target) error {
	if err := attach(ctx, fsDir, t); err != nil {
		return fmt.Errorf("attach the window to namespace %d: %w", t.Inum, err)
	}
	return nil
}

func attach(ctx context.Context, fsDir string, t Target) error {
	s, err := openSource(fsDir)
	if err != nil {
		return err
	}
	defer s.close()
	w := Window{Point: SecurityFS, Root: "/"}
	tree, err := s.clone(w)
	if err != nil {
		return err
	}
	return enter(ctx, t, tree, func(in *inside) error { return in.place(ctx, s, w) })
}

// Detach takes the window, alive or dead, away from /sys/kernel/security in the target's namespace. If none is to be seen
// there, nothing is done. It returns ErrOwn, ErrLocked or ErrChanged, wrapped.
func Detach(ctx context.Context, t Target) error {
	if err := enter(ctx, t, -1, (*inside).remove); err != nil {
		return fmt.Errorf("detach the window from namespace %d: %w", t.Inum, err)
	}
	return nil
}

// Attached returns the windows in a process's mount namespace, as far as they can be reached from the process's root, alive or
// dead, in the order of mounting.
func Attached(pid int) ([]Window, error) {
	mounts, err := readMounts(unix.AT_FDCWD, fmt.Sprintf("/proc/%d/mountinfo", pid))
	if err != nil {
		return nil, fmt.Errorf("list the windows of process %d: %w", pid, err)
	}
	return windows(mounts), nil
}

func windows(mounts []mount) []Window {
	var found []Window
	for _, m := range mounts {
		if m.ours() {
			found = append(found, m.window())
		}
	}
	return found
}

// Reattach replaces every dead window in the targets' namespaces, wherever it is mounted, by the file system at fsDir, and
// returns in how many places it did. Windows that an outer namespace made can't be taken away: the new one covers them. What
// fails in one place does not keep it from the others; all errors are returned. The agent's own namespace and processes that
// have ended are passed over. Give outer namespaces before inner ones, as Processes does: what is mounted in those may reach
// these by itself.
func Reattach(ctx context.Context, fsDir string, targets []Target) (int, error) {
	s, err := openSource(fsDir)
	if err != nil {
		return 0, fmt.Errorf("reattach windows: %w", err)
	}
	defer s.close()
	count := 0
	var errs []error
	for _, t := range targets {
		n, err := reattach(ctx, s, t)
		count += n
		if err != nil && !errors.Is(err, errEnded) && !errors.Is(err, ErrOwn) {
			errs = append(errs, fmt.Errorf("reattach windows in namespace %d: %w", t.Inum, err))
		}
	}
	return count, errors.Join(errs...)
}

func reattach(ctx context.Context, s *source, t Target) (int, error) {
	left, err := Attached(t.PID)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) || errors.Is(err, unix.EINVAL) { // EINVAL: it is ending
		err = errEnded
	}
	if err != nil {
		return 0, err
	}
	left = slices.DeleteFunc(left, func(w Window) bool { return w.Dev == s.dev })
	count := 0
	var errs []error
	seen := make(map[string]bool)
	for _, w := range slices.Backward(left) { // the last one mounted in a place is on top
		if seen[w.Point] {
			continue
		}
		seen[w.Point] = true
		replaced := make(chan bool, 1)
		tree, err := s.clone(w)
		if err == nil {
			err = enter(ctx, t, tree, func(in *inside) error {
				ok, err := in.replace(ctx, s, w)
				replaced <- ok
				return err
			})
		}
		if err != nil {
			errs = append(errs, err)
		} else if <-replaced {
			count++
		}
	}
	return count, errors.Join(errs...)
}
