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
	all, err := readMounts(p.host, fmt.Sprintf("%d/mountinfo", t.PID))
	if err != nil {
		return nil, nil, fmt.Errorf("process %d: %w", t.PID, err)
	}
	fd, err := unix.Openat(p.root, ".", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("process %d: open its root folder: %w", t.PID, err)
	}
	return os.NewFile(uintptr(fd), "root"), exported(all), nil
}

// MachineMounts returns the same of process 1.
func MachineMounts() (*os.File, []Mount, error) {
	all, err := readMounts(unix.AT_FDCWD, "/proc/1/mountinfo")
	if err != nil {
		return nil, nil, fmt.Errorf("process 1: %w", err)
	}
	root, err := os.OpenFile("/proc/1/root", unix.O_PATH|unix.O_DIRECTORY, 0)
	if err != nil {
		return nil, nil, fmt.Errorf("process 1: open its root folder: %w", err)
	}
	return root, exported(all), nil
}

func exported(all []mount) []Mount {
	mounts := make([]Mount, len(all))
	for i, m := range all {
		mounts[i] = Mount{m.point, m.fsType, m.dev}
	}
	return mounts
}
