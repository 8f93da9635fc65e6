package gate

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// names finds how a task sees a file that is open here: what the kernel's d_path gives from the task's root folder. It has a thread of its
// own, whose root folder it changes.
type names struct {
	requests chan nameRequest
}

type nameRequest struct {
	fd     int32
	task   uint32
	answer chan nameAnswer
}

type nameAnswer struct {
	name string
	err  error
}

func newNames() (*names, error) {
	n := &names{requests: make(chan nameRequest)}
	ready := make(chan error)
	go n.run(ready)
	return n, <-ready
}

func (n *names) close() { close(n.requests) }

// of returns the path of a descriptor as a task sees it.
func (n *names) of(fd int32, task uint32) (string, error) {
	r := nameRequest{fd, task, make(chan nameAnswer, 1)}
	n.requests <- r
	a := <-r.answer
	return a.name, a.err
}

func (n *names) run(ready chan<- error) {
	runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
	proc, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err == nil {
		err = unix.Unshare(unix.CLONE_FS)
	}
	ready <- err
	if err != nil {
		return
	}
	defer unix.Close(proc)
	for r := range n.requests {
		name, err := nameFrom(proc, r)
		r.answer <- nameAnswer{name, err}
	}
}

func nameFrom(proc int, r nameRequest) (string, error) {
	root, err := unix.Openat(proc, fmt.Sprintf("%d/root", r.task), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(root)
	if err := unix.Fchdir(root); err != nil {
		return "", err
	}
	if err := unix.Chroot("."); err != nil {
		return "", err
	}
	buf := make([]byte, unix.PathMax+1)
	size, err := unix.Readlinkat(proc, fmt.Sprintf("self/fd/%d", r.fd), buf)
	if err != nil {
		return "", err
	}
	if size == len(buf) {
		return "", errors.New("the path is too long")
	}
	return string(buf[:size]), nil
}

func ioctl[T any](fd int32, request uintptr, argument *T) error {
	if _, _, errno := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), request, uintptr(unsafe.Pointer(argument))); errno != 0 {
		return errno
	}
	return nil
}
