package measure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"time"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// extend sends what is logged to the TPM, in order, until the list is closed.
func (l *List) extend(ctx context.Context) {
	replay := imalog.NewReplay(l.config.TPM.Banks()...)
	r, _, err := l.Reader(0)
	for i := 0; err == nil && i < l.extended; i++ {
		var e *imalog.Entry
		if e, err = r.Next(); err == nil {
			replay.Extend(e)
		}
	}
	if err != nil {
		l.fail(fmt.Errorf("extend list: %w", err))
		return
	}
	for {
		if l.await(ctx, func() bool { return l.logged > l.extended }) != nil {
			return
		}
		if err := l.extendLogged(ctx, replay); err != nil {
			if ctx.Err() == nil {
				l.fail(err)
			}
			return
		}
	}
}

// extendLogged extends all entries that are logged now.
func (l *List) extendLogged(ctx context.Context, replay *imalog.Replay) error {
	r, n, err := l.Reader(l.extended)
	if err != nil {
		return err
	}
	for range n {
		e, err := r.Next()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return fmt.Errorf("extend list: %w", err)
		}
		if err := l.extendEntry(ctx, e, replay); err != nil {
			return err
		}
		l.mu.Lock()
		l.extended++
		l.notify()
		l.mu.Unlock()
	}
	return nil
}

// extendEntry extends one entry, however long the TPM takes to come back. Only ErrDiverged and a closed list are errors.
func (l *List) extendEntry(ctx context.Context, e *imalog.Entry, replay *imalog.Replay) error {
	t := l.config.TPM
	digests := make([]ima.Digest, 0, 4)
	for _, b := range t.Banks() {
		digests = append(digests, e.ExtendDigest(b))
	}
	before := values(replay, t.Banks(), e.PCR())
	replay.Extend(e)
	err := t.Extend(ctx, e.PCR(), digests)
	for pause := 10 * time.Millisecond; err != nil; pause = min(2*pause, time.Second) {
		if ctx.Err() != nil {
			return ctx.Err()
		}
		l.trouble(&l.tpmTrouble, err, "the TPM does not extend, waiting; nothing is lost")
		select {
		case <-time.After(pause):
		case <-ctx.Done():
			return ctx.Err()
		}
		var done bool
		if done, err = l.resume(ctx, e, before, values(replay, t.Banks(), e.PCR())); err == nil && !done {
			err = t.Extend(ctx, e.PCR(), digests)
		}
		if errors.Is(err, ErrDiverged) {
			return err
		}
	}
	l.trouble(&l.tpmTrouble, nil, "the TPM is back, extending resumed")
	return nil
}

// resume connects again after a command whose outcome is not known, and finds out from the register whether it was carried out.
func (l *List) resume(ctx context.Context, e *imalog.Entry, before, after map[ima.HashAlgo]ima.Digest) (done bool, err error) {
	t := l.config.TPM
	if err := t.Reopen(ctx); err != nil {
		return false, err
	}
	now, err := t.ReadPCR(ctx, e.PCR())
	switch {
	case err != nil:
		return false, err
	case equal(now, after):
		return true, nil
	case equal(now, before):
		return false, nil
	}
	return false, fmt.Errorf("extend %q: %w: PCR %d is %v, the log leads to %v; the TPM was reset or something else extends it",
		e.Name(), ErrDiverged, e.PCR(), now, before)
}

func values(r *imalog.Replay, banks []ima.HashAlgo, pcr int) map[ima.HashAlgo]ima.Digest {
	m := make(map[ima.HashAlgo]ima.Digest, len(banks))
	for _, b := range banks {
		m[b] = r.Value(pcr, b)
	}
	return m
}

func equal(a, b map[ima.HashAlgo]ima.Digest) bool {
	if len(a) != len(b) {
		return false
	}
	for k, v := range a {
		if b[k] != v {
			return false
		}
	}
	return true
}
