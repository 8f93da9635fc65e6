package container

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

func TestReattach(t *testing.T) {
	dir := serverDir(t)
	bound := t.TempDir()
	odd := filepath.Join(bound, "a b\tc")
	for _, d := range []string{odd, bound + "/ima"} {
		if err := os.Mkdir(d, 0o755); err != nil {
			t.Fatal(err)
		}
	}
	s := startServer(t, dir)
	// One has the window by Attach, one by binds of its own: whole, in part and read only; one has none; one is nested, and its
	// windows came from outside.
	attached := startChild(t, "--mount", "umount -l "+dir+"; "+sysFolder)
	binds := startChild(t, "--mount", fmt.Sprintf("mount --bind %s '%s'; mount --bind %[1]s/ima %[3]s/ima; mount -o remount,bind,ro %[3]s/ima; umount -l %[1]s; ", dir, odd, bound))
	none := startChild(t, "--mount", "umount -l "+dir+"; ")
	nested := startChild(t, "--user --map-root-user --mount", "")
	targets := []Target{attached.Target, binds.Target, none.Target, nested.Target}
	if err := Attach(t.Context(), dir, attached.Target); err != nil {
		t.Fatal(err)
	}
	for round := range 3 {
		if round > 0 {
			s.kill()
			if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
				t.Fatal(err)
			}
			s = startServer(t, dir)
			ended := startChild(t, "--mount", "")
			syscall.Kill(ended.PID, syscall.SIGKILL)
			own := Target{PID: os.Getpid(), Inum: 1}
			for deadline := time.Now().Add(time.Minute); ended.alive(); time.Sleep(time.Millisecond) {
				if time.Now().After(deadline) {
					t.Fatal("a killed process lives")
				}
			}
			n, err := Reattach(t.Context(), dir, append([]Target{ended.Target}, targets...))
			if err != nil || n != 4 {
				t.Errorf("round %d: %d windows replaced, %v; want 4", round, n, err)
			}
			if _, err := Reattach(t.Context(), dir, []Target{own}); err != nil && !errors.Is(err, ErrChanged) {
				t.Errorf("the agent's own: %v", err)
			}
		}
		attached.shows(s, window)
		binds.shows(s, odd+"/ima")
		binds.shows(s, bound+"/ima")
		nested.shows(s, dir+"/ima")
		if n, err := Reattach(t.Context(), dir, targets); err != nil || n != 0 {
			t.Errorf("round %d: living windows: %d replaced, %v", round, n, err)
		}
	}
	for _, c := range []struct {
		child *child
		want  int
	}{{attached, 1}, {binds, 2}, {none, 0}, {nested, 2}} { // the nested one's first is locked: it stays below
		if n := c.child.count(); n != c.want {
			w, _ := Attached(c.child.PID)
			t.Errorf("%d windows, want %d: %+v", n, c.want, w)
		}
	}
	w, err := Attached(binds.PID)
	if err != nil {
		t.Fatal(err)
	}
	for _, w := range w {
		if w.ReadOnly != (w.Point == bound+"/ima") {
			t.Errorf("read only is %v: %+v", w.ReadOnly, w)
		}
	}
}

// alive reports whether the child has a mount namespace still.
func (c *child) alive() bool {
	_, err := os.Readlink(fmt.Sprintf("/proc/%d/ns/mnt", c.PID))
	return err == nil
}
