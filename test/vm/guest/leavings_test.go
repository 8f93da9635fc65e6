//go:build vm

package guest

import (
	"errors"
	"fmt"
	"io/fs"
	"math"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"github.com/cilium/ebpf"
)

// asBefore waits until no more is held than before, but for heap KiB of memory that may well be in use.
func (a *agent) asBefore(held map[string]int, heap int) {
	a.t.Helper()
	const (
		asking    = 8               // descriptors and goroutines, for the connections of this test's own questions
		unused    = 32 << 10        // KiB that may not be given back: it had as little as 14 MiB before, and twice that later
		collected = 6 * time.Minute // Go collects garbage every two minutes at the latest, and gives memory back little by little
	)
	held["file descriptors"] += asking
	held["goroutines"] += asking
	mostLive, most := held[heapLive]+heap, held[memory]+heap+unused
	held[heapLive], held[memory] = math.MaxInt, math.MaxInt
	a.awaitAtMost(held, time.Minute)
	held[heapLive], held[memory] = mostLive, most
	now := a.awaitAtMost(held, collected)
	a.t.Logf("%d %s, %d at most; %d %s, %d at most", now[heapLive], heapLive, mostLive, now[memory], memory, most)
}

// awaitAtMost waits so long until no more is held, and returns what is.
func (a *agent) awaitAtMost(most map[string]int, long time.Duration) map[string]int {
	a.t.Helper()
	for began := time.Now(); ; time.Sleep(time.Second) {
		now := a.leavings()
		more := beyond(now, most)
		if more == "" {
			return now
		}
		if time.Since(began) > long {
			a.t.Errorf("left behind: %s", more)
			return now
		}
	}
}

// beyond says of what there is more than the most.
func beyond(now, most map[string]int) string {
	var text strings.Builder
	for what, n := range now {
		if n > most[what] {
			fmt.Fprintf(&text, "%s: %d, at most %d; ", what, n, most[what])
		}
	}
	return text.String()
}

// The agent's memory in KiB, among what it holds.
const (
	heapLive = "KiB of heap in use"
	memory   = "KiB of memory"
)

// leavings counts what a namespace could leave behind.
func (a *agent) leavings() map[string]int {
	a.t.Helper()
	held := map[string]int{
		"processes": strings.Count(sh(a.t, "ps -e -o comm="), "swtpm"),
		"mounts":    strings.Count(readFile(a.t, "/proc/self/mountinfo"), "\n"),
	}
	fds, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", a.cmd.Process.Pid))
	if err != nil {
		a.t.Fatal(err)
	}
	held["file descriptors"] = len(fds)
	client := a.client()
	defer client.Close()
	status, err := client.Status(a.t.Context())
	if err != nil {
		a.t.Fatal(err)
	}
	held["goroutines"] = status.Goroutines
	held[heapLive] = int(status.HeapLive >> 10)
	held[memory] = a.memory()
	for _, dir := range []string{"state", "run"} {
		err := filepath.WalkDir(filepath.Join(a.dir, dir), func(_ string, d fs.DirEntry, err error) error {
			held["files in "+dir]++
			if errors.Is(err, fs.ErrNotExist) {
				return nil // it is on its way out
			}
			return err
		})
		if err != nil {
			a.t.Fatal(err)
		}
	}
	for _, name := range []string{"mount_namespaces", "namespace_ids", "measured_contents", "measured_by_subject"} {
		held[name] = a.mapEntries(name)
	}
	return held
}

// mapEntries counts the entries of a pinned map.
func (a *agent) mapEntries(name string) int {
	a.t.Helper()
	m, err := ebpf.LoadPinnedMap("/sys/fs/bpf/"+filepath.Base(a.dir)+"/map_"+name, &ebpf.LoadPinOptions{ReadOnly: true})
	if err != nil {
		a.t.Fatal(err)
	}
	defer m.Close()
	n := 0
	key, value := make([]byte, m.KeySize()), make([]byte, m.ValueSize())
	entries := m.Iterate()
	for entries.Next(&key, &value) {
		n++
	}
	if err := entries.Err(); err != nil {
		a.t.Fatalf("map %s: %v", name, err)
	}
	return n
}

// memory returns the agent's own memory in KiB.
func (a *agent) memory() int {
	a.t.Helper()
	kib, err := strconv.Atoi(field(a.t, readFile(a.t, fmt.Sprintf("/proc/%d/status", a.cmd.Process.Pid)), "RssAnon:"))
	if err != nil {
		a.t.Fatal(err)
	}
	return kib
}
