package vm

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"runtime"
	"strings"
	"sync"
	"syscall"
	"time"
)

// tool is a program of the host and the Debian package that has it.
type tool struct{ program, debian string }

func hostTools() []tool {
	return []tool{
		{"qemu-system-x86_64", "qemu-system-x86"},
		{"swtpm", "swtpm"},
		{"mmdebstrap", "mmdebstrap"},
		{"mke2fs", "e2fsprogs"},
		{"depmod", "kmod"},
		{"xz", "xz-utils"},
		{"zstd", "zstd"},
		{"dpkg-deb", "dpkg"},
		{"apt-get", "apt"},
	}
}

// Missing tells what this host lacks for running machines, with what to do; nil when nothing is missing.
func Missing() error {
	if runtime.GOOS != "linux" || runtime.GOARCH != "amd64" {
		return fmt.Errorf("virtual machines want a linux/amd64 host, this is %s/%s", runtime.GOOS, runtime.GOARCH)
	}
	tools := hostTools()
	if os.Geteuid() != 0 {
		tools = append(tools, tool{"fakeroot", "fakeroot"})
	}
	var programs, packages []string
	for _, t := range tools {
		if _, err := exec.LookPath(t.program); err != nil {
			programs, packages = append(programs, t.program), append(packages, t.debian)
		}
	}
	if programs == nil {
		return nil
	}
	return fmt.Errorf("virtual machines want %s; run: apt-get install %s",
		strings.Join(programs, ", "), strings.Join(packages, " "))
}

// haveKVM reports whether QEMU can start a processor with KVM here. That /dev/kvm can be opened is not enough: a machine that is
// virtual itself may refuse what QEMU sets up.
var haveKVM = sync.OnceValue(func() bool {
	f, err := os.OpenFile("/dev/kvm", os.O_RDWR, 0)
	if err != nil {
		return false
	}
	f.Close()
	ctx, cancel := context.WithTimeout(context.Background(), probeLimit)
	defer cancel()
	cmd := exec.CommandContext(ctx, "qemu-system-x86_64", "-accel", "kvm", "-cpu", "host", "-S", "-m", "64", "-nodefaults", "-display", "none",
		"-chardev", "stdio,id=c", "-mon", "chardev=c,mode=control")
	tieToUs(cmd)
	cmd.Stdin = strings.NewReader(`{"execute":"qmp_capabilities"}{"execute":"quit"}`)
	return cmd.Run() == nil
})

// probeLimit is how long QEMU may take to say whether KVM works.
const probeLimit = 10 * time.Second

// waitDelay is how long a killed command's descendants may hold its output open.
const waitDelay = 5 * time.Second

// tieToUs puts the command into a process group of its own, which the command's cancellation kills whole, and has the
// kernel kill it if this process dies without a chance to.
func tieToUs(cmd *exec.Cmd) {
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	cmd.WaitDelay = waitDelay
	cmd.Cancel = func() error { return syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) }
}

// lastLines returns at most n last lines of s.
func lastLines(s string, n int) string {
	s = strings.TrimRight(s, "\r\n\t ")
	at := len(s)
	for ; n > 0 && at >= 0; n-- {
		at = strings.LastIndexByte(s[:at], '\n')
	}
	return s[at+1:]
}
