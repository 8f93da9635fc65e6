package measure

import (
	"context"
	"errors"

	"imans.dev/imans-agent/internal/ima"
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

// awaitLate waits for the TPM and looks at it; the log is extended from its first entry on.
func (x *extender) awaitLate() error {
	l := x.list
	tpm, err := x.awaitTPM(l.config.Late.Await)
	switch {
	case errors.Is(err, errMoved) || errors.Is(err, ErrClosed):
		return err
	case err != nil:
		l.trouble(&l.tpmTrouble, err, "the list has no TPM, it is not anchored")
		l.mu.Lock()
		l.extended.release()
		l.mu.Unlock()
		return nil
	}
	l.mu.Lock()
	l.tpm = tpm
	l.mu.Unlock()
	x.use(tpm)
	return x.untilAnswered(func() error { return l.CheckTPM(x.ctx, tpm) })
}

// awaitTPM waits no longer than the list lives, or until another TPM comes. ErrClosed: the next Open finds out how much is
// extended, which is nothing.
func (x *extender) awaitTPM(await func(context.Context) (TPM, error)) (tpm TPM, err error) {
	ctx, cancel := context.WithCancel(x.running)
	came := make(chan struct{})
	go func() { // ends with this call
		defer close(came)
		tpm, err = await(ctx)
	}()
	pauseErr := pause(x, came)
	cancel()
	<-came
	if pauseErr != nil {
		return nil, pauseErr
	}
	return tpm, err
}

// currentTPM returns the list's TPM; nil: it has none, or not yet.
func (l *List) currentTPM() TPM {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.tpm
}
