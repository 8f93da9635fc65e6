package gate

import (
	"errors"
	"fmt"
	"runtime"
	"unsafe"

	"golang.org/x/sys/unix"
)

// nameSeenBy returns the path of a descriptor as a task sees it: what the kernel's d_path gives from the task's root folder. It takes a thread,
// which goes to that folder, and ends. The folder may be of a file system that somebody lets hang.
func nameSeenBy(fd int32, task uint32) (name string, err error) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread() // and never unlocked: the thread ends with the goroutine
		if err = unix.Unshare(unix.CLONE_FS); err == nil {
			name, err = nameFrom(fd, task)
		}
	}()
	<-done
	return name, err
}

// nameFrom changes the thread's root folder.
func nameFrom(fd int32, task uint32) (string, error) {
	proc, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	defer unix.Close(proc)
	root, err := unix.Openat(proc, fmt.Sprintf("%d/root", task), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
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
	size, err := unix.Readlinkat(proc, fmt.Sprintf("self/fd/%d", fd), buf)
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
