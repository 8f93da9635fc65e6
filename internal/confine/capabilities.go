// Package confine gives up, for good, what a running agent does not need: capabilities, and system calls. So does all that it starts later.
package confine

import (
	"errors"
	"fmt"
	"slices"

	"kernel.org/pub/linux/libs/security/libcap/cap"
)

// needed are the capabilities of a running agent, of which it keeps those that it has.
func needed() []cap.Value {
	return []cap.Value{
		cap.SYS_ADMIN,                         // mounts, namespaces of containers, fanotify, BPF programs by their ids
		cap.BPF,                               // maps
		cap.SYS_PTRACE,                        // what is below /proc of processes in user namespaces
		cap.SYS_CHROOT,                        // entering mount namespaces
		cap.DAC_OVERRIDE, cap.DAC_READ_SEARCH, // files of all users
		cap.CHOWN, cap.FOWNER, cap.MKNOD, // windows, and the nodes of vTPMs
		cap.SETUID, cap.SETGID, // swtpm has its own user
		cap.KILL, cap.SYS_NICE, // and is ended and hurried
		cap.NET_ADMIN, // the loopback of a network namespace; who the other end of a connection is
		cap.SETPCAP,   // what is started gets no more than this
	}
}

// Capabilities drops all capabilities but those that are needed, of all threads and of all that is started from now on.
func Capabilities() error {
	has := cap.GetProc()
	keep := slices.DeleteFunc(needed(), func(v cap.Value) bool {
		got, err := has.GetFlag(cap.Permitted, v)
		return err != nil || !got
	})
	for v := range cap.MaxBits() {
		if slices.Contains(keep, v) {
			continue
		}
		if err := cap.DropBound(v); err != nil {
			return fmt.Errorf("drop %v from what programs may get: %w", v, err)
		}
	}
	set := cap.NewSet()
	err := errors.Join(set.SetFlag(cap.Permitted, true, keep...), set.SetFlag(cap.Effective, true, keep...))
	if err == nil {
		err = set.SetProc()
	}
	if err != nil {
		return fmt.Errorf("drop capabilities: %w", err)
	}
	return nil
}
