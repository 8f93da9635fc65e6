package measure

import (
	"context"
	"fmt"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/fault"
)

// Pauses between two tries of what does not work for now: a full or faulty disk, a dead TPM.
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
		fault.LogSynced.Pass()
		l.mu.Lock()
		for _, end := range ends {
			l.noteLogged(at + end)
		}
		l.mu.Unlock()
		fault.LogTold.Pass()
	}
}

// writeBatch writes until it succeeds, however long the disk is full or faulty, so that the log never ends in half an entry while the
// agent lives. False: the list has ended.
func (l *List) writeBatch(batch []byte, at int64) bool {
	said := ""
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		err := l.writeOnce(batch, at)
		if err == nil {
			l.trouble(&l.writeTrouble, nil, "writing resumed")
			return true
		}
		advice := durable.Advice(err)
		err = fmt.Errorf("%w; %s", err, advice)
		l.mu.Lock()
		l.writeTrouble = err
		l.mu.Unlock()
		if advice != said {
			l.log.Warn("can't write the list, waiting; nothing is lost", zap.Error(err))
			said = advice
		}
		if !l.pause(pause) {
			return false
		}
	}
}

// writeOnce makes a batch durable, or takes it back. After a sync that did not succeed the kernel may have marked as clean what is not on
// the disk, so another sync proves nothing: the next try writes all of the batch anew, which makes its pages dirty again. What is before
// the batch was synced successfully. Where nothing can be taken back either, the next try writes the same bytes to the same place.
func (l *List) writeOnce(batch []byte, at int64) error {
	l.writing.Lock()
	defer l.writing.Unlock()
	fault.LogWrite.Pass()
	fault.LogTorn.PassAfter(func() { l.file.WriteAt(batch[:len(batch)-1], at) })
	_, err := l.file.WriteAt(batch, at)
	if err == nil {
		fault.LogWritten.Pass()
		// Commit point: before the sync a crash of the machine may lose the batch, whose events the kernel side still has as pending;
		// after it the next Open finds it. Nothing of it has been extended yet.
		if err = l.file.Sync(); err == nil {
			return nil
		}
		err = fmt.Errorf("sync: %w", err)
	}
	if err2 := l.file.Truncate(at); err2 != nil {
		return fmt.Errorf("%w; take the part back: %w", err, err2)
	}
	return err
}

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
