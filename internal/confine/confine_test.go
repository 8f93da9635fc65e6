package confine

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"kernel.org/pub/linux/libs/security/libcap/cap"

	"imans.dev/imans-agent/internal/need"
)

// confinedChild is in the environment of the test program where it is to confine itself.
const confinedChild = "IMANS_TEST_CONFINED"

func TestMain(m *testing.M) {
	if os.Getenv(confinedChild) != "" {
		if err := confined(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// keyring asks for this thread's session keyring, which anybody may: a call that the agent has no use for.
func keyring() error {
	_, err := unix.KeyctlGetKeyringID(unix.KEY_SPEC_SESSION_KEYRING, true)
	return err
}

// confined confines the process and looks what it and a program it starts can do.
func confined() error {
	if err := keyring(); errors.Is(err, unix.EPERM) {
		return fmt.Errorf("a keyring is not to be had before: %w", err)
	}
	started := make(chan struct{})
	asked := make(chan struct{})
	result := make(chan error)
	go func() { // on a thread that is there before
		close(started)
		<-asked
		result <- keyring()
	}()
	<-started
	if err := errors.Join(Capabilities(), SystemCalls()); err != nil {
		return err
	}
	close(asked)
	for _, err := range []error{keyring(), <-result} {
		if !errors.Is(err, unix.EPERM) {
			return fmt.Errorf("a call that is not allowed gives %v, want EPERM", err)
		}
	}
	status, err := exec.Command("cat", "/proc/self/status").Output()
	if err != nil {
		return fmt.Errorf("start a program: %w", err)
	}
	own, err := os.ReadFile("/proc/thread-self/status")
	if err != nil {
		return err
	}
	// Of needed: bits 0 to 3, 5 to 7, 8, 12, 18, 19, 21, 23, 27 and 39.
	for _, b := range [][]byte{status, own} {
		for _, name := range []string{"CapPrm:", "CapEff:", "CapBnd:"} {
			if got := field(b, name); got&^0x8008ac11ef != 0 || got&(1<<21) == 0 {
				return fmt.Errorf("%s %016x, want at most 0000008008ac11ef and CAP_SYS_ADMIN", name, got)
			}
		}
		if field(b, "Seccomp:") != 2 {
			return fmt.Errorf("no filter of system calls: %s", b)
		}
	}
	return nil
}

// field returns the hexadecimal value of a line of /proc/PID/status.
func field(status []byte, name string) (value uint64) {
	for line := range bytes.Lines(status) {
		if rest, ok := strings.CutPrefix(string(line), name); ok {
			fmt.Sscanf(rest, "%x", &value)
		}
	}
	return value
}

func TestConfined(t *testing.T) {
	if has, err := cap.GetProc().GetFlag(cap.Effective, cap.SYS_ADMIN); err != nil || !has {
		need.Skip(t, "confining needs CAP_SYS_ADMIN")
	}
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), confinedChild+"=1")
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
}

func TestAllowedAreKnown(t *testing.T) {
	names := make(map[string]bool)
	for group, calls := range allowed() {
		for _, call := range calls {
			if names[call] {
				t.Errorf("%s: %s is there twice", group, call)
			}
			names[call] = true
		}
	}
}
