package imafs

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/proc"
)

// heldOpen reports whether a process of that mount namespace has the file of that inode number open for writing. It asks no file
// system but proc: what others run could let it wait for ever. A process that proc itself waits for counts as none that has it
// open, but for the one that is closing it: that waits for us, and closes all that it has.
func heldOpen(inum uint32, ino uint64, closing uint32) bool {
	dir, err := os.Open("/proc")
	if err != nil {
		return false
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return false
	}
	for _, name := range names {
		pid, err := strconv.ParseUint(name, 10, 31)
		if err != nil {
			continue
		}
		held, ok := proc.Ask(int(pid), func() bool {
			n, err := callerNS(uint32(pid))
			return err == nil && n == inum && holds(pid, ino)
		})
		if held || !ok && uint32(pid) == closing {
			return true
		}
	}
	return false
}

func holds(pid, ino uint64) bool {
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		return false
	}
	for _, fd := range fds {
		path, err := os.Readlink(fmt.Sprintf("/proc/%d/fd/%s", pid, fd.Name()))
		if err != nil || !strings.HasPrefix(path, "/") || strings.HasPrefix(path, "/dev/") {
			continue // a socket, a pipe, a device: most are
		}
		info, err := os.ReadFile(fmt.Sprintf("/proc/%d/fdinfo/%s", pid, fd.Name()))
		if err != nil {
			continue
		}
		flags, inode := parseFDInfo(string(info))
		if inode == ino && flags&unix.O_ACCMODE == unix.O_WRONLY && flags&unix.O_PATH == 0 {
			return true
		}
	}
	return false
}

// parseFDInfo reads what /proc/PID/fdinfo/FD tells of an open file; 0 is what it does not tell.
func parseFDInfo(text string) (flags, inode uint64) {
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(line, ":")
		switch value = strings.TrimSpace(value); name {
		case "flags":
			flags, _ = strconv.ParseUint(value, 8, 64)
		case "ino":
			inode, _ = strconv.ParseUint(value, 10, 64)
		}
	}
	return flags, inode
}
