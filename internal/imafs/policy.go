package imafs

import (
	"bytes"
	"context"
	"os"
	"sync"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

const (
	// policyMax bounds what one writer's rules may take in memory.
	policyMax = 16 << 20
	// applyTimeout bounds how long a close waits for its rules to be in effect: long, as shells don't look at what it returns.
	applyTimeout = time.Minute
)

// policyWriter is the policy open for writing. Source: security/integrity/ima/ima_fs.c, ima_open_policy, ima_write_policy,
// ima_release_policy.
type policyWriter struct {
	open *openFiles
	log  *zap.Logger
	view View
	task *task
	ino  uint64 // of the file, as the processes that have it open see it

	mu sync.Mutex
	position
	rules  []byte
	bad    bool // a write failed: nothing of it takes effect
	closed bool // its rules took effect, or were dropped, and others may write
	idle   bool // nothing was written since the last close of a descriptor
}

// begin makes w the writer. One whose every descriptor is closed is none, though its release is still on its way.
func (w *policyWriter) begin() error {
	other := w.open.setWriter(w)
	if other == nil {
		return nil
	}
	if !other.mu.TryLock() {
		return unix.EBUSY
	}
	defer other.mu.Unlock()
	gone := ended(other.view) || other.idle && !heldOpen(other.task.NS.Inum, other.ino, 0)
	if !other.closed && !gone {
		return unix.EBUSY
	}
	other.finish()
	if w.open.setWriter(w) != nil {
		return unix.EBUSY
	}
	return nil
}

func (w *policyWriter) read(context.Context, []byte, int64) (int, error) { return 0, unix.EINVAL }

// write takes one line, or the file that it names.
func (w *policyWriter) write(ctx context.Context, data []byte, off int64) (int, error) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if ended(w.view) {
		return 0, ErrEnded
	}
	if w.closed { // what was hidden from heldOpen writes on
		if w.open.setWriter(w) != nil {
			return 0, unix.EBUSY
		}
		w.closed = false
	}
	w.idle = false
	n, err := w.take(ctx, data, off)
	if err != nil {
		w.bad = true
		return 0, err
	}
	w.next += int64(n)
	return n, nil
}

func (w *policyWriter) take(ctx context.Context, data []byte, off int64) (int, error) {
	if err := w.check(off); err != nil || len(data) == 0 {
		return 0, err
	}
	data = data[:min(len(data), os.Getpagesize()-1)]
	line, n := data, len(data)
	if i := bytes.IndexAny(data, "\n\x00"); i >= 0 {
		line, n = data[:i], i+1
	}
	if data[0] == '/' {
		if i := bytes.IndexByte(data, 0); i >= 0 {
			n = i
		} else {
			n = len(data)
		}
		return n, w.load(ctx, string(line))
	}
	return n, w.add(line)
}

// add takes lines of rules.
func (w *policyWriter) add(text []byte) error {
	rule := bytes.TrimLeft(text, " \t")
	if len(rule) == 0 || rule[0] == '#' && !bytes.Contains(rule, []byte("\n")) {
		return nil
	}
	if len(w.rules)+len(text)+1 > policyMax {
		return unix.ENOSPC
	}
	if err := w.view.CheckPolicy(&w.task.Caller, text); err != nil {
		w.log.Info("a policy rule was refused", zap.Stringer("ns", w.task.NS), zap.Error(err))
		return refused(err)
	}
	w.rules = append(append(w.rules, text...), '\n')
	return nil
}

// flush is called before a close returns, of one descriptor of possibly several.
func (w *policyWriter) flush(by uint32) error {
	w.mu.Lock()
	defer w.mu.Unlock()
	if w.closed {
		return nil
	}
	if heldOpen(w.task.NS.Inum, w.ino, by) {
		w.idle = true
		return nil
	}
	return w.finish()
}

func (w *policyWriter) release() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.finish()
}

// finish puts the rules into effect, or drops them and says so, and lets others write. w.mu is held.
func (w *policyWriter) finish() error {
	if w.closed {
		return nil
	}
	rules, bad := w.rules, w.bad
	w.rules, w.bad, w.closed = nil, false, true
	defer w.open.unsetWriter(w)
	if bad || len(rules) == 0 || ended(w.view) {
		return nil
	}
	// Nobody can interrupt a close.
	ctx, cancel := context.WithTimeout(context.Background(), applyTimeout)
	defer cancel()
	err := w.view.AppendPolicy(ctx, &w.task.Caller, rules)
	if err != nil {
		w.log.Warn("a policy does not take effect", zap.Stringer("ns", w.task.NS), zap.Error(err))
	}
	return err
}
