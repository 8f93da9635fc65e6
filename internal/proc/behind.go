package proc

import (
	"errors"
	"sync"
	"time"
)

// BehindMax is how many looks may be left behind in one place.
const BehindMax = 16

var (
	// ErrHangs means that a look did not come back in time, and was left behind.
	ErrHangs = errors.New("looking at the file hangs")
	// ErrManyHang means that nothing was looked at, as BehindMax looks have not come back.
	ErrManyHang = errors.New("too many looks at files hang")
)

// Behind counts the looks that were left behind and have not come back, which take a thread each. The zero value has none.
type Behind struct {
	mu    sync.Mutex
	looks int
}

// Count returns how many there are.
func (b *Behind) Count() int {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.looks
}

func (b *Behind) add(n int) {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.looks += n
}

// Within returns what a look finds that may hang, at whatever somebody lets hang. One that does not come back within the limit is left
// behind, with ErrHangs; it goes on when it can. With too many of those the error is ErrManyHang.
func Within[T any](b *Behind, limit time.Duration, look func() T) (found T, err error) {
	if b.Count() >= BehindMax {
		return found, ErrManyHang
	}
	done := make(chan T, 1)
	go func() { done <- look() }()
	timeout := time.NewTimer(limit)
	defer timeout.Stop()
	select {
	case found = <-done:
		return found, nil
	case <-timeout.C:
	}
	b.add(1)
	go func() {
		<-done
		b.add(-1)
	}()
	return found, ErrHangs
}
