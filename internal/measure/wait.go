package measure

import (
	"context"
	"slices"
	"time"
)

// mark is a count that only grows, and the goroutines that wait for it to get somewhere. The list's mutex guards it.
type mark struct {
	n       int
	off     bool      // it will not grow, and nobody is to wait for it
	waiting []*waiter // by rising n
}

type waiter struct {
	n       int
	reached chan struct{} // closed when the count is n
}

// advance raises the count and wakes those who waited for no more than that, and nobody else.
func (m *mark) advance(n int) {
	m.n = n
	i := 0
	for ; i < len(m.waiting) && m.waiting[i].n <= n; i++ {
		close(m.waiting[i].reached)
	}
	if i == len(m.waiting) {
		m.waiting = nil
	} else {
		m.waiting = m.waiting[i:]
	}
}

// wait adds a waiter. Later ones mostly wait for higher counts, so its place is looked for from the end.
func (m *mark) wait(n int) *waiter {
	w := &waiter{n: n, reached: make(chan struct{})}
	i := len(m.waiting)
	for i > 0 && m.waiting[i-1].n > n {
		i--
	}
	m.waiting = slices.Insert(m.waiting, i, w)
	return w
}

// release begins the count anew and wakes all, though it will not get there.
func (m *mark) release() {
	m.n, m.off = 0, true
	for _, w := range m.waiting {
		close(w.reached)
	}
	m.waiting = nil
}

// forget takes out a waiter that waits no longer.
func (m *mark) forget(w *waiter) {
	if i := slices.Index(m.waiting, w); i >= 0 {
		m.waiting = slices.Delete(m.waiting, i, i+1)
	}
}

// await waits until one of the list's counts is at least n. Errors: what ended the list, if it can't get there any more, or the
// context's.
func (l *List) await(ctx context.Context, m *mark, n int) error {
	w, err := l.waiter(m, n)
	if w == nil {
		return err
	}
	select {
	case <-w.reached:
		return nil
	case <-l.ended:
	case <-ctx.Done():
	}
	return l.giveUp(m, w, ctx.Err())
}

// waiter makes one that waits until a count is at least n. None: the wait is over, with that error.
func (l *List) waiter(m *mark, n int) (*waiter, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	switch {
	case m.n >= n || m.off:
		return nil, nil
	case l.endErr != nil:
		return nil, l.endErr
	}
	return m.wait(n), nil
}

// giveUp ends a wait, and says what came of it: otherwise, if the list goes on.
func (l *List) giveUp(m *mark, w *waiter, otherwise error) error {
	l.mu.Lock()
	defer l.mu.Unlock()
	m.forget(w)
	switch {
	case m.n >= w.n || m.off:
		return nil
	case l.endErr != nil:
		return l.endErr
	}
	return otherwise
}

// pause waits before something is tried again; false: the list ended meanwhile.
func (l *List) pause(d time.Duration) bool {
	select {
	case <-time.After(d):
		return true
	case <-l.ended:
		return false
	}
}

// hasEnded reports whether the list was closed or failed.
func (l *List) hasEnded() bool {
	select {
	case <-l.ended:
		return true
	default:
		return false
	}
}

// whyEnded returns what ended the list.
func (l *List) whyEnded() error {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.endErr
}

// end makes err what all get who still wait, and what every later Append gets. Only the first call counts. l.mu is held.
func (l *List) end(err error) {
	if l.endErr == nil {
		l.endErr = err
		close(l.ended)
	}
}

// Receipt waits for what becomes of an entry. Any number of goroutines may wait.
type Receipt struct {
	list *List
	n    int // how many of the list's entries must be through
}

// Logged waits until the entry is in the log, durable. A full disk is waited out; the errors are the context's and the list's
// end: ErrClosed, or what Status has as Fatal.
func (r Receipt) Logged(ctx context.Context) error {
	return r.list.await(ctx, &r.list.logged, r.n)
}

// Extended waits until the entry is in the TPM; without a TPM, until it is logged. A dead TPM is waited out. If the list goes over to
// another TPM meanwhile, it is that one.
func (r Receipt) Extended(ctx context.Context) error {
	if err := r.list.await(ctx, &r.list.extended, r.n); err != nil {
		return err
	}
	return r.Logged(ctx) // at once, if it is extended
}

// Accepted returns how many entries were handed in so far, which is the number of the next one.
func (l *List) Accepted() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.accepted.n
}

// All is the Receipt of the last entry that was handed in.
func (l *List) All() Receipt {
	l.mu.Lock()
	defer l.mu.Unlock()
	return Receipt{l, l.accepted.n}
}

// Barrier waits until all that was handed in so far is in the log.
func (l *List) Barrier(ctx context.Context) error { return l.All().Logged(ctx) }

// Settle waits until all that was handed in so far is in the log and, with a TPM, extended.
func (l *List) Settle(ctx context.Context) error { return l.All().Extended(ctx) }

// AwaitEntries waits until the list has more than n entries.
func (l *List) AwaitEntries(ctx context.Context, n int) error {
	return l.await(ctx, &l.logged, n+1)
}
