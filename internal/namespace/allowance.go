package namespace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"time"

	"imans.dev/imans-agent/internal/proc"
)

// allowance is how long looks at the files of a container may hold up the goroutine that handles records, and with it all lists. A container may
// run a file system that never answers, and a file may be as long as it likes. A look that takes longer is given up, and the file is a
// violation; one that does not even come back is left behind, with its thread.
//
// Each look may take lookFree. What it takes beyond that is the container's to spend: allowanceMax, and a fourth of the time that goes by.
type allowance struct {
	left time.Duration // at that time
	at   time.Time     // zero: nothing was spent yet

	behind proc.Behind
}

const (
	lookFree     = 100 * time.Millisecond
	allowanceMax = time.Minute
	// lookGrace is how long a look may take to notice that it was given up.
	lookGrace = 100 * time.Millisecond
)

// allowance returns that of the container: of the native namespace's child that the namespace is, or is below; or the native one's.
func (s *State) allowance() *allowance {
	n := s
	for n.parent != nil && n.parent.parent != nil {
		n = n.parent
	}
	return &n.looks
}

// limit returns how long a look may take.
func (a *allowance) limit(now time.Time) time.Duration {
	if a.at.IsZero() {
		a.left = allowanceMax
	} else {
		a.left = min(a.left+now.Sub(a.at)/4, allowanceMax)
	}
	a.at = now
	return lookFree + a.left
}

// spend takes note of what a look took.
func (a *allowance) spend(took time.Duration) { a.left = max(a.left-max(took-lookFree, 0), 0) }

// lookWithin returns what a look found. The error is os.ErrDeadlineExceeded if it was given up. Its context ends then.
func lookWithin[T any](a *allowance, look func(ctx context.Context) (T, error)) (found T, err error) {
	type answer struct {
		found T
		err   error
	}
	began := time.Now()
	limit := a.limit(began)
	got, err := proc.Within(&a.behind, limit+lookGrace, func() answer {
		ctx, cancel := context.WithTimeoutCause(context.Background(), limit, os.ErrDeadlineExceeded)
		defer cancel()
		found, err := look(ctx)
		return answer{found, err}
	})
	a.spend(time.Since(began))
	switch {
	case errors.Is(err, proc.ErrManyHang):
		return found, fmt.Errorf("%w: others hang", os.ErrDeadlineExceeded)
	case err != nil:
		return found, fmt.Errorf("%w: a file system does not answer", os.ErrDeadlineExceeded)
	}
	return got.found, got.err
}
