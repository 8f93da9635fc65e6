package imafs

import (
	"context"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// handle is an open file: text, setting, list or policyWriter.
type handle interface {
	read(ctx context.Context, dest []byte, off int64) (int, error)
	write(ctx context.Context, data []byte, off int64) (int, error)
	// flush is one of possibly several closes; release comes after the last, when nobody waits any more.
	flush(by uint32) error // before a close by that task returns
	release()
}

// barrierTimeout bounds how long an open or read waits for what the kernel recorded to be in the lists.
const barrierTimeout = 2 * time.Second

func barrier(ctx context.Context, v View) error {
	ctx, cancel := context.WithTimeout(ctx, barrierTimeout)
	defer cancel()
	return v.Barrier(ctx)
}

func ended(v View) bool {
	select {
	case <-v.Ended():
		return true
	default:
		return false
	}
}

// text is a short file that is made when it is opened, and again when it is read from the start again.
type text struct {
	view View
	fill func(ctx context.Context) (string, error)

	mu      sync.Mutex
	content string
	fresh   bool // not read yet
}

func (t *text) open(ctx context.Context) (err error) {
	t.content, err = t.fill(ctx)
	t.fresh = true
	return err
}

func (t *text) read(ctx context.Context, dest []byte, off int64) (int, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if ended(t.view) {
		return 0, ErrEnded
	}
	if off == 0 && !t.fresh {
		if err := t.open(ctx); err != nil {
			return 0, err
		}
	}
	t.fresh = false
	if off >= int64(len(t.content)) {
		return 0, nil
	}
	return copy(dest, t.content[off:]), nil
}

func (t *text) write(context.Context, []byte, int64) (int, error) { return 0, unix.EINVAL }
func (t *text) flush(uint32) error                                { return nil }
func (t *text) release()                                          {}

// position follows where writes go. The kernel's files do not count what was written, FUSE does: a write where the last one
// ended is a write at 0 to them.
type position struct {
	appending bool // then the kernel side chooses an offset that means nothing
	next      int64
}

func (p *position) check(off int64) error {
	if !p.appending && off != 0 && off != p.next {
		return unix.EINVAL
	}
	p.next = off
	return nil
}

// setting is a file whose write does something at once.
type setting struct {
	text
	set func(ctx context.Context, value string) error
	position
}

// settingMax is longer than any name that can be written.
const settingMax = 512

func (s *setting) write(ctx context.Context, data []byte, off int64) (int, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if ended(s.view) {
		return 0, ErrEnded
	}
	if err := s.check(off); err != nil {
		return 0, err
	}
	if len(data) > settingMax {
		return 0, unix.EINVAL
	}
	if err := s.set(ctx, trimLine(data)); err != nil {
		return 0, err
	}
	s.next, s.fresh = off+int64(len(data)), false
	return len(data), nil
}
