package measure

import (
	"context"
	"errors"
	"fmt"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// Pauses between two tries of what does not work for now: a full disk, a dead TPM.
const (
	firstPause   = 10 * time.Millisecond
	longestPause = time.Second
)

// spareMax bounds the memory, in bytes, that is kept from one batch for the next.
const spareMax = 16 << 10

// write takes what was handed in, as one batch, and makes it durable. It runs until the list ends.
func (l *List) write() {
	var batch []byte
	var ends []int64
	for {
		if cap(batch) > spareMax || cap(ends) > spareMax/64 {
			batch, ends = nil, nil
		}
		if l.await(context.Background(), &l.accepted, l.logged.n+1) != nil {
			return
		}
		l.mu.Lock()
		batch, l.pending = l.pending, batch[:0]
		ends, l.pendingEnds = l.pendingEnds, ends[:0]
		at := l.loggedSize
		l.mu.Unlock()
		if !l.writeBatch(batch, at) {
			return
		}
		l.mu.Lock()
		for _, end := range ends {
			l.noteLogged(at + end)
		}
		l.mu.Unlock()
	}
}

// writeBatch writes until it succeeds: a full disk is waited out, and an incomplete write is taken back, so that the log never
// ends in half an entry while the agent lives. False: the list has ended.
func (l *List) writeBatch(batch []byte, at int64) bool {
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		_, err := l.file.WriteAt(batch, at)
		if err == nil {
			// Commit point: before the sync a crash may lose the batch, whose events the kernel side still has as pending; after
			// it the next Open finds it. Nothing of it has been extended yet.
			err = l.file.Sync()
			if err != nil && !isFull(err) {
				l.fail(fmt.Errorf("append to list: sync: %w; restart the agent", err))
				return false
			}
		}
		if err == nil {
			l.trouble(&l.writeTrouble, nil, "writing resumed")
			return true
		}
		// A sync may also be what finds the disk full. What it failed to write must be written anew, not synced again: the
		// kernel may have marked it clean.
		if err2 := l.file.Truncate(at); err2 != nil {
			l.fail(fmt.Errorf("append to list: %w; take the part back: %w; restart the agent", err, err2))
			return false
		}
		l.trouble(&l.writeTrouble, err, "can't write the list, waiting; make room on its disk")
		if !l.pause(pause) {
			return false
		}
	}
}

func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// fail ends the list.
func (l *List) fail(err error) {
	l.log.Error("list ended", zap.Error(err))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fatal = err
	l.end(err)
}

// trouble notes why work waits, and says so once.
func (l *List) trouble(which *error, err error, message string) {
	l.mu.Lock()
	before := *which
	*which = err
	l.mu.Unlock()
	switch {
	case err != nil && before == nil:
		l.log.Warn(message, zap.Error(err))
	case err == nil && before != nil:
		l.log.Info(message, zap.NamedError("was", before))
	}
}
