package confine

import (
	"fmt"
	"slices"

	"github.com/elastic/go-seccomp-bpf"
	"github.com/elastic/go-seccomp-bpf/arch"
)

// SystemCalls makes every system call fail (EPERM) that is not in allowed, for all threads and for all that is started from now on. Those of
// another architecture fail, too. It needs CAP_SYS_ADMIN.
func SystemCalls() error {
	a, err := arch.GetInfo("")
	if err != nil {
		return fmt.Errorf("filter system calls: %w", err)
	}
	var names []string
	for _, group := range allowed() {
		for _, name := range group {
			if _, known := a.SyscallNames[name]; known { // each architecture has its own
				names = append(names, name)
			}
		}
	}
	slices.Sort(names)
	filter := seccomp.Filter{
		Flag: seccomp.FilterFlagTSync,
		Policy: seccomp.Policy{
			DefaultAction: seccomp.ActionErrno,
			Syscalls:      []seccomp.SyscallGroup{{Action: seccomp.ActionAllow, Names: slices.Compact(names)}},
		},
	}
	if err := seccomp.LoadFilter(filter); err != nil {
		return fmt.Errorf("filter system calls: %w", err)
	}
	return nil
}

// allowed are the system calls of the agent, of its guard and of swtpm, and their near kin: a library's next version may take another of
// the same group. What is not here changes the kernel, the clock or the hardware, debugs other processes, or has a larger attack surface than
// use: kernel modules, kexec, reboot, swap, clocks, ports, ptrace, perf events, io_uring, userfaultfd, keys, quotas, accounting, SysV IPC.
func allowed() map[string][]string {
	return map[string][]string{
		"files": {
			"access", "chdir", "chmod", "chown", "close", "close_range", "copy_file_range", "creat", "dup", "dup2", "dup3", "faccessat", "faccessat2",
			"fadvise64", "fallocate", "fchdir", "fchmod", "fchmodat", "fchmodat2", "fchown", "fchownat", "fcntl", "fdatasync", "fgetxattr", "flistxattr",
			"flock", "fremovexattr", "fsetxattr", "fstat", "fstatfs", "fsync", "ftruncate", "getcwd", "getdents", "getdents64", "getxattr",
			"inotify_add_watch", "inotify_init", "inotify_init1", "inotify_rm_watch", "ioctl", "lchown", "lgetxattr", "link", "linkat", "listxattr",
			"llistxattr", "lremovexattr", "lseek", "lsetxattr", "lstat", "mkdir", "mkdirat", "mknod", "mknodat", "name_to_handle_at", "newfstatat", "open",
			"openat", "openat2", "pread64", "preadv", "preadv2", "pwrite64", "pwritev", "pwritev2", "read", "readahead", "readlink", "readlinkat",
			"readv", "removexattr", "rename", "renameat", "renameat2", "rmdir", "sendfile", "setxattr", "splice", "stat", "statfs", "statx", "symlink",
			"symlinkat", "sync", "sync_file_range", "syncfs", "tee", "truncate", "umask", "unlink", "unlinkat", "utime", "utimensat", "utimes", "vmsplice",
			"write", "writev",
		},
		"events": {
			"epoll_create", "epoll_create1", "epoll_ctl", "epoll_pwait", "epoll_pwait2", "epoll_wait", "eventfd", "eventfd2", "pipe", "pipe2", "poll", "ppoll",
			"pselect6", "select", "signalfd", "signalfd4", "timerfd_create", "timerfd_gettime", "timerfd_settime",
		},
		"memory": {
			"brk", "madvise", "membarrier", "memfd_create", "mincore", "mlock", "mlock2", "mlockall", "mmap", "mprotect", "mremap", "msync", "munlock",
			"munlockall", "munmap",
		},
		"sockets": {
			"accept", "accept4", "bind", "connect", "getpeername", "getsockname", "getsockopt", "listen", "recvfrom", "recvmmsg", "recvmsg", "sendmmsg",
			"sendmsg", "sendto", "setsockopt", "shutdown", "socket", "socketpair",
		},
		"processes": {
			"arch_prctl", "capget", "capset", "clone", "clone3", "execve", "execveat", "exit", "exit_group", "fork", "futex", "futex_waitv",
			"get_robust_list", "getcpu", "getegid", "geteuid", "getgid", "getgroups", "getpgid", "getpgrp", "getpid", "getppid", "getpriority", "getresgid",
			"getresuid", "getrlimit", "getrusage", "getsid", "gettid", "getuid", "kill", "pidfd_open", "pidfd_send_signal", "prctl", "prlimit64",
			"restart_syscall", "rseq", "rt_sigaction", "rt_sigpending", "rt_sigprocmask", "rt_sigqueueinfo", "rt_sigreturn", "rt_sigsuspend",
			"rt_sigtimedwait", "rt_tgsigqueueinfo", "sched_get_priority_max", "sched_get_priority_min", "sched_getaffinity", "sched_getattr",
			"sched_getparam", "sched_getscheduler", "sched_setaffinity", "sched_setattr", "sched_setparam", "sched_setscheduler", "sched_yield", "seccomp",
			"set_robust_list", "set_tid_address", "setfsgid", "setfsuid", "setgid", "setgroups", "setpgid", "setpriority", "setregid", "setresgid",
			"setresuid", "setreuid", "setrlimit", "setsid", "setuid", "sigaltstack", "sysinfo", "tgkill", "times", "tkill", "uname", "vfork", "wait4",
			"waitid",
		},
		"time": {
			"alarm", "clock_getres", "clock_gettime", "clock_nanosleep", "getitimer", "getrandom", "gettimeofday", "nanosleep", "pause", "setitimer", "time",
			"timer_create", "timer_delete", "timer_getoverrun", "timer_gettime", "timer_settime",
		},
		"containers": {
			"bpf", "chroot", "fanotify_init", "fanotify_mark", "fsconfig", "fsmount", "fsopen", "fspick", "mount", "mount_setattr", "move_mount", "open_tree",
			"setns", "umount2", "unshare",
		},
	}
}
