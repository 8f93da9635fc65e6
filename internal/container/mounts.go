package container

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Mount is one of a namespace.
type Mount struct {
	Point string // below the root folder of the process that was asked about
	Type  string // as in /proc/filesystems
	Dev   uint64 // of its file system, as mountinfo has it
}

// Mounts returns the root folder of a process, open for its path only, and the mounts below it. It is not one of the agent's own namespace.
func Mounts(t Target) (*os.File, []Mount, error) {
	p, err := openProcess(t)
	if err != nil {
		return nil, nil, err
	}
	defer p.close()
	return mountsOf(p.host, t.PID, p.root)
}

// MachineMounts returns the same of process 1.
func MachineMounts() (*os.File, []Mount, error) {
	root, err := unix.Open("/proc/1/root", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("process 1: open its root folder: %w", err)
	}
	defer unix.Close(root)
	host, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("open /proc: %w", err)
	}
	defer unix.Close(host)
	return mountsOf(host, 1, root)
}

func mountsOf(proc, pid, root int) (*os.File, []Mount, error) {
	all, err := readMounts(proc, fmt.Sprintf("%d/mountinfo", pid))
	if err != nil {
		return nil, nil, fmt.Errorf("process %d: %w", pid, err)
	}
	mounts := make([]Mount, len(all))
	for i, m := range all {
		mounts[i] = Mount{m.point, m.fsType, m.dev}
	}
	fd, err := unix.Openat(root, ".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("process %d: open its root folder: %w", pid, err)
	}
	return os.NewFile(uintptr(fd), "root"), mounts, nil
}
