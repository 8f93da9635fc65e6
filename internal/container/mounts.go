package container

import (
	"fmt"
	"os"

	"golang.org/x/sys/unix"
)

// Mount is a file system as a namespace has it mounted.
type Mount struct {
	Point string // below the root folder of the process that was asked about
	Type  string // as in /proc/filesystems
}

// Mounts returns the root folder of a process, open for its path only, and one mount of each file system below it.
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
	var mounts []Mount
	seen := make(map[uint64]bool)
	for _, m := range all {
		if !seen[m.dev] {
			seen[m.dev] = true
			mounts = append(mounts, Mount{m.point, m.fsType})
		}
	}
	return os.NewFile(uintptr(fd), "root"), mounts, nil
}
