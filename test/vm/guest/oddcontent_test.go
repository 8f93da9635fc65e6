//go:build vm

package guest

import (
	"fmt"
	"os"
	"os/exec"
	"testing"

	"golang.org/x/sys/unix"
)

// runMemfd runs a program that is in no file system, and returns its digest. It ends at once, or lives for two seconds: with the kernel's own IMA
// beside it the agent has to hash it, and can while it runs.
func runMemfd(t *testing.T, lives bool) string {
	t.Helper()
	content := tinyProgram("in memory only")
	if lives {
		busybox, err := os.ReadFile("/bin/busybox")
		if err != nil {
			t.Fatal(err)
		}
		content = append(busybox, "in memory only"...)
	}
	fd, err := unix.MemfdCreate("odd", 0)
	if err != nil {
		t.Fatal(err)
	}
	f := os.NewFile(uintptr(fd), "memfd")
	defer f.Close()
	if _, err := f.Write(content); err != nil {
		t.Fatal(err)
	}
	// Through a descriptor for reading only: the kernel refuses to run what is open for writing.
	ro, err := os.Open(fmt.Sprintf("/proc/self/fd/%d", fd))
	if err != nil {
		t.Fatal(err)
	}
	f.Close()
	defer ro.Close()
	cmd := exec.Command("/proc/self/fd/3")
	cmd.ExtraFiles = []*os.File{ro}
	if lives {
		cmd.Args = []string{"sleep", "2"}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("run a memfd: %v %s", err, out)
	}
	return digestOf(content)
}

// mapExecutableLater maps a file for reading and makes the mapping executable afterwards.
func mapExecutableLater(t *testing.T, path string) {
	t.Helper()
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	m, err := unix.Mmap(int(f.Fd()), 0, os.Getpagesize(), unix.PROT_READ, unix.MAP_PRIVATE)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Munmap(m) })
	if err := unix.Mprotect(m, unix.PROT_READ|unix.PROT_EXEC); err != nil {
		t.Fatal(err)
	}
}
