package imafs

import (
	"unsafe"

	"golang.org/x/sys/unix"
)

// mountNSID returns the unique id of an open mount namespace, 0 where the kernel has no way to ask (before 6.11).
func mountNSID(fd int) uint64 {
	var id uint64
	_, _, no := unix.Syscall(unix.SYS_IOCTL, uintptr(fd), unix.NS_GET_MNTNS_ID, uintptr(unsafe.Pointer(&id)))
	if no != 0 {
		return 0
	}
	return id
}
