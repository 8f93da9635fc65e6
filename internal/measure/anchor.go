package measure

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"time"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/tpmext"
)

// interruptAfter is how long a command of the TPM that a list has may keep it from going over to another.
const interruptAfter = time.Second

var (
	errMoved = errors.New("the list goes over to another TPM")
	errIdle  = errors.New("nothing to extend for a while")
)

// move is the TPM that a list goes over to; nil: to none.
type move struct {
	tpm  TPM
	held int           // entries that the TPM before has got
	done chan struct{} // closed when the list has gone over
}

// Anchor takes the list over to a TPM that has just been started and that nothing else extends. When it returns, the TPM that the
// list had, or waited for, is used no more: it is the caller's to read and to close. held is how many entries it has got, as far as
// it acknowledged them; no more will come. The new one gets the whole log, in order, from the first entry on, then what is appended:
// Settle waits for what there is now, and a Receipt's Extended means the new one from here on.
//
// What must hold is looked at before anything changes (CheckTPM); after any error the list goes on as before. Besides CheckTPM's
// these are what ended the list, and the context's if the old TPM has a command under way that nothing can interrupt: give it a
// deadline.
//
// The banks are the new TPM's own. An entry extends each of them with the digest of that bank, computed from the log, so a list may
// go over to one with other banks; only boot_aggregate has to be the same, in its bank (that of Config.Algo, else SHA-256, else
// SHA-1). If both TPMs were just started when they said so, it may be in another bank: that no register had anything.
//
// A crash: from this call on Open is to be given the new TPM, be it with none, some or all of the log, and goes on with the rest. So
// a caller has on record which one that is before it calls Anchor.
func (l *List) Anchor(ctx context.Context, tpm TPM) (held int, err error) {
	if err := l.CheckTPM(ctx, tpm); err != nil {
		return 0, fmt.Errorf("anchor list: %w", err)
	}
	if held, err = l.goOver(ctx, tpm); err != nil {
		return 0, fmt.Errorf("anchor list: %w", err)
	}
	return held, nil
}

// Detach lets the list go on without a TPM: what is appended is logged, and nothing anchors it. When it returns, the TPM is the
// caller's, and held is how many entries it has got, as with Anchor. Errors are Anchor's but CheckTPM's.
func (l *List) Detach(ctx context.Context) (held int, err error) {
	if held, err = l.goOver(ctx, nil); err != nil {
		return 0, fmt.Errorf("detach list from its TPM: %w", err)
	}
	return held, nil
}

// CheckTPM reports whether the list can go over to a TPM: ErrForeign if its boot_aggregate is not the one in the log, or if a
// register that the log names is not as the start left it. Any other error is the TPM's, what ended the list, or the context's.
func (l *List) CheckTPM(ctx context.Context, tpm TPM) error {
	logged, err := l.first(ctx)
	if err != nil {
		return err
	}
	d, err := tpm.BootAggregate(ctx, l.config.Algo)
	if err != nil {
		return err
	}
	want, err := imalog.BootAggregate(l.config.PCR, l.config.Template, d)
	if err != nil {
		return err
	}
	if have := logged.FileDigest(); !bytes.Equal(want.Data(), logged.Data()) && !(bootedNothing(have) && bootedNothing(d)) {
		if have.IsZero() {
			return fmt.Errorf("%w: the list began without a TPM, its boot_aggregate says so, and it can't get one any more; "+
				"give the namespace its TPM before its first entry, or run the agent with --ns-tpm swtpm", ErrForeign)
		}
		return fmt.Errorf("%w: its boot_aggregate is %v, which is not that of the log; a TPM that was just started has zeros in PCRs 0 to 9: "+
			"start another one", ErrForeign, d)
	}
	l.mu.Lock()
	pcrs := l.pcrs
	l.mu.Unlock()
	for pcr := range imalog.MaxPCR + 1 {
		if pcrs&(1<<pcr) == 0 {
			continue
		}
		held, err := tpm.ReadPCR(ctx, pcr)
		if err != nil {
			return err
		}
		if !allZero(held) {
			return fmt.Errorf("%w: PCR %d is %v, and a TPM that was just started has zeros there: start another one",
				ErrForeign, pcr, registers(held))
		}
	}
	return nil
}

// bootedNothing reports whether a boot_aggregate is that of a TPM which was just started.
func bootedNothing(d ima.Digest) bool {
	return !d.IsZero() && d == tpmext.StartedBootAggregate([]ima.HashAlgo{d.Algo()}, d.Algo())
}

// first reads boot_aggregate back from the log.
func (l *List) first(ctx context.Context) (*imalog.Entry, error) {
	if err := l.await(ctx, &l.logged, 1); err != nil {
		return nil, err
	}
	r, _, err := l.Reader(0)
	if err != nil {
		return nil, err
	}
	e, err := r.Next()
	if l.hasEnded() { // and its file may be closed
		return nil, l.whyEnded()
	}
	if err != nil {
		return nil, fmt.Errorf("read boot_aggregate: %w", err)
	}
	return e, nil
}

// goOver hands a TPM to the extender. Until it is taken nothing has changed.
func (l *List) goOver(ctx context.Context, tpm TPM) (held int, err error) {
	m := &move{tpm: tpm, done: make(chan struct{})}
	hurry := time.AfterFunc(interruptAfter, func() {
		l.mu.Lock()
		defer l.mu.Unlock()
		l.interrupt()
	})
	defer hurry.Stop()
	select {
	case l.moves <- m:
		<-m.done
		return m.held, nil
	case <-l.ended:
		return 0, l.whyEnded()
	case <-ctx.Done():
		return 0, ctx.Err()
	}
}

// goOver makes the TPM that was taken the list's.
func (x *extender) goOver() {
	l, m := x.list, x.move
	x.move = nil
	x.use(m.tpm)
	l.mu.Lock()
	m.held = l.extended.n
	if m.tpm == nil {
		l.extended.release()
	} else {
		l.extended.n, l.extended.off = 0, false
	}
	l.tpm, l.tpmTrouble = m.tpm, nil
	l.mu.Unlock()
	x.renew()
	close(m.done)
}

// use begins with a TPM that has nothing of the log. Its registers are not known: each is looked at before its first entry.
func (x *extender) use(tpm TPM) {
	x.tpm, x.banks, x.known = tpm, nil, make(map[int]bool)
	if tpm != nil {
		x.banks = tpm.Banks()
	}
	x.at, x.reader, x.now, x.next = 0, nil, ahead{}, ahead{}
}

// interrupted looks, between two entries, whether the extender is to do something else: ErrClosed, errMoved.
func (x *extender) interrupted() error {
	if x.list.hasEnded() {
		return ErrClosed
	}
	select {
	case x.move = <-x.list.moves:
		return errMoved
	default:
		return nil
	}
}

// pause waits until the channel has something or is closed; without one, for ever. Errors: ErrClosed, errMoved.
func pause[T any](x *extender, until <-chan T) error {
	defer x.renew()
	select {
	case <-until:
		return nil
	case <-x.list.ended:
		return ErrClosed
	case x.move = <-x.list.moves:
		return errMoved
	}
}

// awaitLogged waits until n entries are logged. Errors: ErrClosed, errMoved, and errIdle when the time has come.
func (x *extender) awaitLogged(n int, idle <-chan time.Time) error {
	l := x.list
	if err := x.interrupted(); err != nil {
		return err
	}
	w, err := l.waiter(&l.logged, n)
	if w == nil {
		return closed(err)
	}
	select {
	case <-w.reached:
		return x.interrupted()
	case <-l.ended:
		return ErrClosed
	case x.move = <-l.moves:
		l.giveUp(&l.logged, w, nil)
		return errMoved
	case <-idle:
		return closed(l.giveUp(&l.logged, w, errIdle))
	}
}

// closed is ErrClosed for whatever ended the list.
func closed(err error) error {
	if err == nil || errors.Is(err, errIdle) {
		return err
	}
	return ErrClosed
}

// renew makes a new context for TPM commands if the last one was cancelled.
func (x *extender) renew() {
	if x.ctx != nil && x.ctx.Err() == nil {
		return
	}
	l := x.list
	l.mu.Lock()
	defer l.mu.Unlock()
	x.ctx, l.interrupt = context.WithCancel(x.running)
}
