package need

import (
	"flag"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// cleanWithin is how long what tests have ended has to be gone.
const cleanWithin = 10 * time.Second

// RunClean is m.Run, and fails if the tests leave goroutines behind, or descriptors, but for those of the kinds given, as /proc/self/fd has
// them. It is the last call of TestMain, with os.Exit around it.
func RunClean(m *testing.M, but ...string) int {
	before := descriptors()
	code := m.Run()
	if code != 0 || fuzzing() {
		return code
	}
	err := goleak.Find()
	for deadline := time.Now().Add(cleanWithin); err != nil && time.Now().Before(deadline); {
		err = goleak.Find()
	}
	if err != nil {
		fmt.Fprintf(os.Stderr, "the tests leave goroutines behind: %v\n", err)
		code = 1
	}
	if left := descriptorsBeside(before, but); len(left) > 0 {
		fmt.Fprintf(os.Stderr, "the tests leave descriptors behind: %v\n", left)
		code = 1
	}
	return code
}

// fuzzing reports whether this is a fuzz target's run, whose engine has goroutines and descriptors of its own.
func fuzzing() bool {
	for _, name := range []string{"test.fuzz", "test.fuzzworker"} {
		if f := flag.Lookup(name); f != nil && f.Value.String() != f.DefValue {
			return true
		}
	}
	return false
}

// descriptorsBeside waits until no more is open than before, and returns what is.
func descriptorsBeside(before map[string]int, but []string) map[string]int {
	for deadline := time.Now().Add(cleanWithin); ; time.Sleep(10 * time.Millisecond) {
		left := descriptors()
		maps.DeleteFunc(left, func(what string, n int) bool { return n <= before[what] || slices.Contains(but, what) })
		if len(left) == 0 || time.Now().After(deadline) {
			return left
		}
	}
}

// descriptors counts what is open, by what it is. Go's own poller, and what it reads random numbers from, stay.
func descriptors() map[string]int {
	open := make(map[string]int)
	entries, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return open // not Linux, or no /proc
	}
	for _, e := range entries {
		what, err := os.Readlink("/proc/self/fd/" + e.Name())
		if err != nil || what == "anon_inode:[eventpoll]" || what == "anon_inode:[eventfd]" || what == "/dev/urandom" {
			continue
		}
		if kind, _, ok := strings.Cut(what, ":["); ok && kind != "anon_inode" {
			what = kind // sockets and pipes have a number each
		}
		open[what]++
	}
	return open
}
