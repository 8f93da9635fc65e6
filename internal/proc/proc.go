// Package proc asks about other processes, and files of theirs, without being held up by them.
//
// Looking at the namespaces and descriptors of a process in /proc waits while the process goes over to another program
// (exec_update_lock; since 6.18.y for links in /proc/PID/ns, fs/proc/namespaces.c). In doing so the process closes its
// descriptors, and whoever serves one of those by FUSE may let it wait for ever.
package proc

import (
	"sync"
	"time"
)

// Patience is how long Ask waits: long, as a machine with too much to do also lets a look wait.
const Patience = 3 * time.Second

var (
	mu    sync.Mutex
	stuck = make(map[int]bool) // processes that a look at has not come back from in time
)

// Ask returns what look says of a process, or false if it does not come back. Looks at a process that one hangs at fail at once
// until that one has come back: a process costs one thread at most, and one wait.
func Ask[T any](pid int, look func() T) (answer T, ok bool) {
	mu.Lock()
	held := stuck[pid]
	mu.Unlock()
	if held {
		return answer, false
	}
	done := make(chan T, 1)
	go func() {
		answer := look()
		mu.Lock()
		defer mu.Unlock()
		done <- answer
		delete(stuck, pid)
	}()
	timeout := time.NewTimer(Patience)
	defer timeout.Stop()
	select {
	case answer = <-done:
		return answer, true
	case <-timeout.C:
	}
	mu.Lock()
	defer mu.Unlock()
	select {
	case answer = <-done:
		return answer, true
	default:
		stuck[pid] = true
		return answer, false
	}
}
