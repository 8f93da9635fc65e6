package proc

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestAsk(t *testing.T) {
	if answer, ok := Ask(1, func() int { return 7 }); !ok || answer != 7 {
		t.Errorf("got %d, %v", answer, ok)
	}
	hold := make(chan struct{})
	held := func() int { <-hold; return 7 }
	if _, ok := Ask(2, held); ok {
		t.Error("an answer from a look that does not come back")
	}
	began := time.Now()
	if _, ok := Ask(2, func() int { return 7 }); ok || time.Since(began) >= Patience {
		t.Error("a process that one look hangs at was looked at again")
	}
	if _, ok := Ask(1, func() int { return 7 }); !ok {
		t.Error("one process holds up the look at another")
	}
	close(hold)
	for deadline := time.Now().Add(10 * time.Second); ; time.Sleep(time.Millisecond) {
		if _, ok := Ask(2, func() int { return 7 }); ok {
			break
		} else if time.Now().After(deadline) {
			t.Fatal("the process is not looked at again")
		}
	}
}

// A program's name may look like the end of it.
func TestStat(t *testing.T) {
	path := filepath.Join(t.TempDir(), "a) S 1 (b")
	if err := os.Symlink("/bin/sleep", path); err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(path, "100")
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() { cmd.Process.Kill(); cmd.Wait() }()
	fields, err := Stat(cmd.Process.Pid)
	if err != nil {
		t.Fatal(err)
	}
	if fields[StatParent] != strconv.Itoa(os.Getpid()) || len(fields[StatState]) != 1 {
		t.Errorf("%v", fields)
	}
	if _, err := strconv.ParseUint(fields[StatStart], 10, 64); err != nil {
		t.Error(err)
	}
	if _, err := Stat(-1); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of no process: %v", err)
	}
}

func TestNamespace(t *testing.T) {
	for _, kind := range []string{"mnt", "user"} {
		var st unix.Stat_t
		if err := unix.Stat("/proc/self/ns/"+kind, &st); err != nil {
			t.Fatal(err)
		}
		if n, err := Namespace(os.Getpid(), kind); err != nil || uint64(n) != st.Ino {
			t.Errorf("%s: %d, %v; want %d", kind, n, err, st.Ino)
		}
	}
	if _, err := Namespace(os.Getpid(), "nosuch"); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("of no kind: %v", err)
	}
}
