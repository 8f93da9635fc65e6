package measure

import (
	"bytes"
	"context"
	"fmt"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// Late is a TPM that is being started for a list. The list begins, or goes on, without it: entries are logged, and extended once
// it is there. Nothing else has ever extended it, and nothing of the log is in it.
type Late struct {
	// Await waits for the TPM. An error but the context's means that there will be none: the list stays without, Status has the
	// error as TPMError, and Receipts are Extended when they are logged. The one who started the TPM tells of it in the list.
	Await func(ctx context.Context) (TPM, error)
	// BootAggregate is that of a TPM that has just been started. It is compared with the TPM's before anything is extended.
	BootAggregate ima.Digest
}

// extendLate waits for the TPM, then extends the log from its first entry on.
func (l *List) extendLate(ctx context.Context) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	tpm, err := l.awaitTPM(ctx)
	switch {
	case l.hasEnded():
		return // the next Open finds out how much is extended: nothing
	case err != nil:
		l.trouble(&l.tpmTrouble, err, "the list has no TPM, it is not anchored")
		l.mu.Lock()
		l.config.Late = nil
		l.extended.release()
		l.mu.Unlock()
		return
	}
	l.mu.Lock()
	l.tpm = tpm
	l.mu.Unlock()
	if err := l.checkBootAggregate(ctx, tpm); err != nil {
		if !l.hasEnded() {
			l.fail(fmt.Errorf("extend list: %w", err))
		}
		return
	}
	// The registers are not known: each is looked at before its first entry, and must be as the start left it.
	x := &extender{list: l, tpm: tpm, banks: tpm.Banks(), known: make(map[int]bool)}
	x.run(ctx)
}

// awaitTPM waits no longer than the list lives.
func (l *List) awaitTPM(ctx context.Context) (TPM, error) {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	go func() { // ends with this call
		select {
		case <-l.ended:
			cancel()
		case <-ctx.Done():
		}
	}()
	return l.config.Late.Await(ctx)
}

// checkBootAggregate compares the log's first entry with the TPM. ErrForeign: the TPM is not one that has just been started.
func (l *List) checkBootAggregate(ctx context.Context, tpm TPM) error {
	if err := l.await(ctx, &l.logged, 1); err != nil {
		return err
	}
	r, _, err := l.Reader(0)
	if err != nil {
		return err
	}
	logged, err := r.Next()
	if err != nil {
		return fmt.Errorf("read boot_aggregate: %w", err)
	}
	var d ima.Digest
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		if d, err = tpm.BootAggregate(ctx, l.config.Algo); err == nil {
			break
		}
		l.trouble(&l.tpmTrouble, err, "the TPM can't be read, waiting; nothing is lost")
		if !l.pause(pause) {
			return ErrClosed
		}
		if tpm.Reopen(ctx) == nil {
			l.trouble(&l.tpmTrouble, nil, "the TPM is back")
		}
	}
	want, err := imalog.BootAggregate(l.config.PCR, l.config.Template, d)
	if err != nil {
		return err
	}
	if !bytes.Equal(want.Data(), logged.Data()) {
		return fmt.Errorf("%w: its boot_aggregate is %v, which is not that of the log; a TPM that was just started has zeros in PCRs 0 to 9",
			ErrForeign, d)
	}
	return nil
}

// currentTPM returns the list's TPM; nil: it has none, or not yet.
func (l *List) currentTPM() TPM {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tpm
}

// anchored reports whether the list has a TPM, or will.
func (l *List) anchored() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tpm != nil || l.config.Late != nil
}
