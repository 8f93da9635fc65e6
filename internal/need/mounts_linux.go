package need

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"syscall"
	"testing"
)

// ownMounts is in the environment of a test program that has a mount namespace of its own.
const ownMounts = "IMANS_TEST_OWN_MOUNTS"

// RunWithOwnMounts is RunClean in a mount namespace that this test program shares with no other: what one mounts, or leaves behind
// when it is killed, is never in the namespaces that another makes. It is the last call of TestMain, with os.Exit around it.
// Without root the tests run where they are, and Mounts leaves them out.
func RunWithOwnMounts(m *testing.M) int {
	if os.Geteuid() != 0 || os.Getenv(ownMounts) != "" {
		return RunClean(m)
	}
	cmd := exec.Command("/proc/self/exe", os.Args[1:]...)
	cmd.Args[0] = os.Args[0]
	cmd.Env = append(os.Environ(), ownMounts+"=1")
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{Unshareflags: syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) && exit.Exited() {
		return exit.ExitCode()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "run the tests in a mount namespace of their own: %v\n", err)
		return 1
	}
	return 0
}

// Mounts wants leave to mount FUSE file systems.
func Mounts(t testing.TB) {
	t.Helper()
	if os.Geteuid() != 0 {
		Skip(t, "mounting needs root")
	}
	f, err := os.OpenFile("/dev/fuse", os.O_RDWR, 0)
	if err != nil {
		Skip(t, "mounting needs /dev/fuse: %v", err)
	}
	f.Close()
}
