package standing

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
)

// childVariable is in the environment of the test program where it is to change how it stands.
const childVariable = "IMANS_TEST_STANDING"

func TestMain(m *testing.M) {
	if os.Getenv(childVariable) != "" {
		if err := child(); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		os.Exit(0)
	}
	os.Exit(m.Run())
}

// child asks for what anybody may have.
func child() error {
	if err := errors.Join(Nice(7), OOMScore(300)); err != nil {
		return err
	}
	if err := StayInMemory(); errors.Is(err, unix.EPERM) {
		fmt.Println("nothing is locked here:", err) // TestNeverSilentScarce looks where it is
	} else if err != nil {
		return err
	} else if err := locked(); err != nil {
		return err
	}
	tasks, err := filepath.Glob("/proc/self/task/[0-9]*")
	if err != nil || len(tasks) < 2 {
		return fmt.Errorf("threads %v, %w", tasks, err)
	}
	for _, task := range tasks {
		tid, err := strconv.Atoi(filepath.Base(task))
		if err != nil {
			return err
		}
		if is, err := unix.Getpriority(unix.PRIO_PROCESS, tid); err != nil || 20-is != 7 {
			return fmt.Errorf("thread %d: nice %d, %w", tid, 20-is, err)
		}
	}
	out, err := exec.Command("sh", "-c", "nice; cat /proc/self/oom_score_adj").Output()
	if err != nil || string(out) != "7\n300\n" {
		return fmt.Errorf("what it starts has %q, %w; want nice 7, oom_score_adj 300", out, err)
	}
	return nil
}

// locked checks that what it has of the program, but for its variables, is locked.
func locked() error {
	status, err := os.ReadFile("/proc/self/status")
	if err != nil {
		return err
	}
	_, after, _ := strings.Cut(string(status), "VmLck:")
	_, code, _ := strings.Cut(string(status), "VmExe:")
	var is, want int
	if _, err := fmt.Sscan(after, &is); err != nil {
		return err
	}
	if _, err := fmt.Sscan(code, &want); err != nil {
		return err
	}
	if is < want || want == 0 {
		return fmt.Errorf("%d KiB are locked, the code has %d", is, want)
	}
	return nil
}

func TestStanding(t *testing.T) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), childVariable+"=1")
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Error(err)
	}
	t.Logf("%s", out)
}
