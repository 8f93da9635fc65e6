package container

import (
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/need"
)

func TestProcesses(t *testing.T) {
	need.Mounts(t)
	outer := startChild(t, "--mount", "")
	inner := startChild(t, "--mount", "sleep 1000 >/dev/null & ")
	all, err := Processes()
	if err != nil {
		t.Fatal(err)
	}
	at := map[uint32]int{}
	for i, target := range all {
		at[target.Inum] = i
	}
	for _, c := range []*child{outer, inner} {
		if i, ok := at[c.Inum]; !ok || all[i] != c.Target {
			t.Errorf("namespace %d: not its first process, %d: %+v", c.Inum, c.PID, all)
		}
		if got, err := Process(c.Inum); err != nil || got != c.Target {
			t.Errorf("Process(%d) = %+v, %v", c.Inum, got, err)
		}
	}
	if at[outer.Inum] > at[inner.Inum] {
		t.Error("the older namespace comes last")
	}
	if _, err := Process(1); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("Process(1): %v", err)
	}
}

// Each use takes a thread of its own that ends with it.
func TestThreadsEnd(t *testing.T) {
	dir := serverDir(t)
	c := startChild(t, "--mount", sysFolder)
	startServer(t, dir)
	for range 200 {
		if err := Attach(t.Context(), dir, c.Target); err != nil {
			t.Fatal(err)
		}
	}
	strangers := func() int {
		own, err := os.Readlink("/proc/self/ns/mnt")
		if err != nil {
			t.Fatal(err)
		}
		links, err := filepath.Glob("/proc/self/task/*/ns/mnt")
		if err != nil {
			t.Fatal(err)
		}
		n := 0
		for _, l := range links {
			if ns, err := os.Readlink(l); err == nil && ns != own {
				n++
			}
		}
		return n
	}
	for deadline := time.Now().Add(30 * time.Second); strangers() > 0; time.Sleep(10 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatalf("%d threads are still in the container's namespace", strangers())
		}
	}
}
