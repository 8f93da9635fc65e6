package measure

import (
	"context"
	"fmt"
	"io"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// write takes what was handed in, as one batch, and makes it durable. It runs until the list is closed.
func (l *List) write(ctx context.Context) {
	for {
		if l.await(ctx, func() bool { return len(l.pending) > 0 }) != nil {
			return
		}
		l.mu.Lock()
		batch, ends := l.pending, l.pendingEnds
		l.pending, l.pendingEnds = nil, nil
		at := l.loggedSize
		l.mu.Unlock()
		if !l.writeBatch(ctx, batch, at) {
			return
		}
		l.mu.Lock()
		for _, end := range ends {
			l.logged++
			l.loggedSize = at + end
			if l.logged%indexEvery == 0 {
				l.index = append(l.index, l.loggedSize)
			}
		}
		l.notify()
		l.mu.Unlock()
	}
}

// writeBatch writes until it succeeds: a full disk is waited out, and an incomplete write is taken back, so that the log never
// ends in half an entry while the agent lives. False: closed, or fatal.
func (l *List) writeBatch(ctx context.Context, batch []byte, at int64) bool {
	for pause := 10 * time.Millisecond; ; pause = min(2*pause, time.Second) {
		_, err := l.file.WriteAt(batch, at)
		if err == nil {
			// Commit point: before the sync a crash may lose the batch, whose events are still in the ring buffer; after it the
			// next Open finds it. Nothing of it has been extended yet.
			if err := l.file.Sync(); err != nil {
				l.fail(fmt.Errorf("append to list: sync: %w; restart the agent", err))
				return false
			}
			l.trouble(&l.writeTrouble, nil, "writing resumed")
			return true
		}
		if err2 := l.file.Truncate(at); err2 != nil {
			l.fail(fmt.Errorf("append to list: %w; take the part back: %w; restart the agent", err, err2))
			return false
		}
		l.trouble(&l.writeTrouble, err, "can't write the list, waiting; make room on its disk")
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return false
		}
	}
}

// fail ends the list.
func (l *List) fail(err error) {
	l.log.Error("list ended", zap.Error(err))
	l.mu.Lock()
	defer l.mu.Unlock()
	l.fatal = err
	l.notify()
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

// Reader returns a reader of the log as it is now, from entry number first (0 is boot_aggregate), and how many entries it has.
// The log only grows, so the reader stays good.
func (l *List) Reader(first int) (*imalog.Reader, int, error) {
	l.mu.Lock()
	size, entries := l.loggedSize, l.logged
	var at int64
	n := min(first, entries) / indexEvery
	if n > 0 {
		at = l.index[n-1]
	}
	l.mu.Unlock()
	r := imalog.NewReader(io.NewSectionReader(l.file, at, size-at), ima.SHA1)
	for i := n * indexEvery; i < min(first, entries); i++ {
		if _, err := r.Next(); err != nil {
			return nil, 0, fmt.Errorf("read list: %w", err)
		}
	}
	return r, max(0, entries-first), nil
}

// Snapshot returns the log's bytes as they are now: a binary_runtime_measurements.
func (l *List) Snapshot() *io.SectionReader {
	l.mu.Lock()
	defer l.mu.Unlock()
	return io.NewSectionReader(l.file, 0, l.loggedSize)
}

// AwaitEntries waits until the list has more than n entries.
func (l *List) AwaitEntries(ctx context.Context, n int) error {
	return l.await(ctx, func() bool { return l.logged > n })
}

// Settle waits until all that was handed in is in the log and, with a TPM, extended.
func (l *List) Settle(ctx context.Context) error {
	l.mu.Lock()
	n := l.accepted
	l.mu.Unlock()
	return Receipt{l, n}.Extended(ctx)
}

// PCRs returns the list's register in each bank, as the TPM has it now. Without a TPM it is an error.
func (l *List) PCRs(ctx context.Context) (map[ima.HashAlgo]ima.Digest, error) {
	if l.config.TPM == nil {
		return nil, fmt.Errorf("read PCR %d: this list has no TPM", l.config.PCR)
	}
	return l.config.TPM.ReadPCR(ctx, l.config.PCR)
}
