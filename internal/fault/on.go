//go:build faults

package fault

import (
	"fmt"
	"os"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
)

// armed is what Variable says: the point, and the passes that are left.
var armed = sync.OnceValue(func() *fault {
	name, pass, _ := strings.Cut(os.Getenv(Variable), ":")
	if name == "" {
		return &fault{point: end}
	}
	for _, p := range All() {
		n, err := strconv.Atoi(pass)
		if p.String() == name && err == nil && n > 0 {
			f := &fault{point: p}
			f.left.Store(int64(n))
			return f
		}
	}
	fmt.Fprintf(os.Stderr, "%s=%s: want NAME:PASS of one of %v\n", Variable, os.Getenv(Variable), All())
	os.Exit(2)
	return nil
})

type fault struct {
	point Point
	left  atomic.Int64
}

// Pass passes the point. It does not return from the pass at which it is armed.
func (p Point) Pass() { p.PassAfter(func() {}) }

// PassAfter passes the point; if that is the end, last is the last thing that is done.
func (p Point) PassAfter(last func()) {
	f := armed()
	if f.point != p || f.left.Add(-1) != 0 {
		return
	}
	last()
	syscall.Kill(os.Getpid(), syscall.SIGKILL)
	select {} // until it arrives
}
