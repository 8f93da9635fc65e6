//go:build vm

package guest

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"
)

// load runs programs of their own content, each once, from several goroutines, each unlinked right after.
type load struct {
	dir     string
	workers sync.WaitGroup
	next    atomic.Int64
	stopped atomic.Bool
	mu      sync.Mutex
	digests map[string]string // of each program that ran, by path
}

// startLoad runs at most n programs until stop, by a number of workers.
func startLoad(t *testing.T, dir string, n, workers int) *load {
	l := &load{dir: dir, digests: map[string]string{}}
	for range workers {
		l.workers.Go(func() {
			for !l.stopped.Load() {
				i := l.next.Add(1)
				if i > int64(n) {
					return
				}
				path := fmt.Sprintf("%s/p%d", dir, i)
				sum := makeProgram(t, path)
				runProgram(t, path)
				if i%2 == 0 {
					os.Remove(path)
				}
				l.mu.Lock()
				l.digests[path] = fmt.Sprintf("sha256:%x", sum)
				l.mu.Unlock()
			}
		})
	}
	return l
}

// stop ends the load and returns the digests of what ran.
func (l *load) stop() map[string]string {
	l.stopped.Store(true)
	l.workers.Wait()
	return l.digests
}

func (l *load) wait() map[string]string {
	l.workers.Wait()
	return l.digests
}

// found compares the native list with what ran: how often each program is in it, by a right entry or a violation.
func (a *agent) found(digests map[string]string) (right, violations map[string]int) {
	a.t.Helper()
	right, violations = map[string]int{}, map[string]int{}
	for _, e := range a.list("native") {
		want, ran := digests[e.Name()]
		switch {
		case !ran:
		case e.Violation():
			violations[e.Name()]++
		case e.FileDigest().String() == want:
			right[e.Name()]++
		default:
			a.t.Errorf("%s has digest %v, want %s", e.Name(), e.FileDigest(), want)
		}
	}
	return right, violations
}

// eachOnce checks that each program is in the native list once, or that a violation names it where some may be missing.
func (a *agent) eachOnce(digests map[string]string, all bool) {
	a.t.Helper()
	right, violations := a.found(digests)
	a.t.Logf("%d programs ran, %d entries, %d violations", len(digests), len(right), len(violations))
	for path := range digests {
		if right[path] != 1 && (all || violations[path] == 0) {
			a.t.Errorf("%s: %d entries, %d violations", path, right[path], violations[path])
		}
	}
}

func TestMainJobShortLivedProcesses(t *testing.T) {
	sample(t, "6.18")
	n := sized(300, 2000, 10000)
	for _, mode := range []string{"kernel", "agent"} {
		t.Run(mode, func(t *testing.T) {
			a := startAgent(t, "--digest", mode)
			began := time.Now()
			digests := startLoad(t, tempDir(t, "/root"), n, 3).wait()
			t.Logf("in %v", time.Since(began).Round(time.Second))
			if len(digests) != n {
				t.Fatalf("%d programs ran, want %d", len(digests), n)
			}
			a.eachOnce(digests, mode == "kernel")
			a.verify("native")
		})
	}
}

// A ring buffer that is too small loses events, and the list says how many.
func TestMainJobLossesAreViolations(t *testing.T) {
	sample(t, "6.12")
	const n = 300
	a := startAgent(t, "--ring-size", "4")
	a.cmd.Process.Signal(syscall.SIGSTOP)
	digests := startLoad(t, tempDir(t, "/root"), n, 3).wait()
	a.cmd.Process.Signal(syscall.SIGCONT)
	right, _ := a.found(digests)
	lost := 0
	for _, e := range a.list("native") {
		if rest, ok := strings.CutPrefix(e.Name(), "imans-lost/ring_buffer_full/"); ok && e.Violation() {
			count, err := strconv.Atoi(rest[strings.LastIndexByte(rest, '/')+1:])
			if err != nil {
				t.Fatal(err)
			}
			lost += count
		}
	}
	if len(right) == n || lost == 0 {
		t.Fatalf("nothing was lost: %d of %d programs in the list", len(right), n)
	}
	if missing := n - len(right); lost < missing {
		t.Errorf("%d programs are missing, the list tells of %d losses", missing, lost)
	}
	status, err := a.client().Status(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	if status.Lost["ring_buffer_full"] != uint64(lost) {
		t.Errorf("the counter says %d, the list %d", status.Lost["ring_buffer_full"], lost)
	}
	// A restart tells nothing twice.
	a.signal(syscall.SIGKILL)
	a.start()
	again := 0
	for _, e := range a.list("native") {
		if strings.HasPrefix(e.Name(), "imans-lost/ring_buffer_full/") {
			again++
		}
	}
	if _, violations := names(a.list("native")); again != count(violations, "imans-lost/ring_buffer_full/") {
		t.Errorf("violations %v", violations)
	}
	a.verify("native")
}

func count(violations map[string]int, prefix string) int {
	n := 0
	for name, times := range violations {
		if strings.HasPrefix(name, prefix) {
			n += times
		}
	}
	return n
}

// killedUnderLoad kills the agent again and again while programs run, and returns the digests of those.
func (a *agent) killedUnderLoad(kills int) map[string]string {
	a.t.Helper()
	l := startLoad(a.t, tempDir(a.t, "/root"), 1<<30, 1)
	for range kills {
		time.Sleep(300 * time.Millisecond)
		a.signal(syscall.SIGKILL)
		time.Sleep(100 * time.Millisecond)
		a.start()
	}
	return l.stop()
}

// The agent is killed again and again while programs run: each is in the list once, and the PCR replays.
func TestMainJobKilledUnderLoad(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t)
	digests := a.killedUnderLoad(sized(5, 10, 100))
	right, violations := a.found(digests)
	t.Logf("%d programs ran, %d entries, %d violations", len(digests), len(right), len(violations))
	for path := range digests {
		if right[path] != 1 || violations[path] != 0 {
			t.Errorf("%s: %d entries, %d violations", path, right[path], violations[path])
		}
	}
	if n := a.namespaces(); len(n) == 0 {
		t.Error("no namespaces")
	}
	if _, violations := names(a.list("native")); count(violations, "imans-lost/") != 0 {
		t.Errorf("losses: %v", violations)
	}
	a.verify("native")
	if left := strings.Fields(sh(t, "pgrep swtpm || true")); len(left) > len(a.namespaces()) {
		t.Errorf("%d swtpm processes for %d namespaces", len(left), len(a.namespaces()))
	}
}
