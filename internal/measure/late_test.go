package measure

import (
	"context"
	"errors"
	"sync/atomic"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/tpmext"
)

// late is a configuration whose TPM comes when the channel gives it, or an error.
func (b *bench) late(come <-chan error) Config {
	c := b.config()
	c.TPM = nil
	c.Late = &Late{
		BootAggregate: tpmext.StartedBootAggregate(b.tpm.Banks(), c.Algo),
		Await: func(ctx context.Context) (TPM, error) {
			select {
			case err := <-come:
				if err != nil {
					return nil, err
				}
				return b.tpm, nil
			case <-ctx.Done():
				return nil, ctx.Err()
			}
		},
	}
	return c
}

// The list is there before its TPM, and the TPM gets all of it.
func TestListBeforeItsTPM(t *testing.T) {
	b := newBench(t)
	come := make(chan error)
	l, _ := b.open(b.late(come))
	first := l.Append(entry(t, 1))
	await(t, first.Logged)
	await(t, l.Append(violation(t)).Logged)
	if s := l.Status(); s.Entries != 3 || s.Extended != 0 || s.TPMError != nil {
		t.Errorf("before: %+v", s)
	}
	if err := l.CheckPCR(t.Context(), 12); err != nil {
		t.Errorf("a register can't be checked yet: %v", err)
	}
	if _, err := l.PCRs(t.Context()); err == nil {
		t.Error("there are PCRs of no TPM")
	}
	short, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	if err := first.Extended(short); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("extended by no TPM: %v", err)
	}
	come <- nil
	await(t, first.Extended)
	await(t, l.Append(entry(t, 2)).Extended)
	if pcrs, err := l.PCRs(t.Context()); err != nil || len(pcrs) == 0 {
		t.Errorf("PCRs %v, %v", pcrs, err)
	}
	if names := b.check(); len(names) != 4 {
		t.Errorf("log %v", names)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	// From now on it is a list as any other.
	l, r := b.open(b.config())
	if r.Entries != 4 || r.Unextended != 0 {
		t.Errorf("recovered %+v", r)
	}
	l.Close()
}

// An agent that ended before the TPM was there: the next one starts it, and the TPM gets all of the log.
func TestListEndsBeforeItsTPM(t *testing.T) {
	b := newBench(t)
	l, _ := b.open(b.late(nil))
	await(t, l.Append(entry(t, 1)).Logged)
	began := time.Now()
	if err := l.Close(); err != nil || time.Since(began) > closeTimeout/2 {
		t.Errorf("close: %v after %v", err, time.Since(began))
	}
	come := make(chan error, 1)
	l, r := b.open(b.late(come))
	if r.Entries != 2 {
		t.Errorf("recovered %+v", r)
	}
	receipt := l.Append(entry(t, 2))
	await(t, receipt.Logged)
	come <- nil
	await(t, receipt.Extended)
	if names := b.check(); len(names) != 3 {
		t.Errorf("log %v", names)
	}
	l.Close()
}

// A TPM that does not come lets nobody wait.
func TestTPMThatDoesNotCome(t *testing.T) {
	b := newBench(t)
	come := make(chan error, 1)
	l, _ := b.open(b.late(come))
	before := l.Append(entry(t, 1))
	waiting := make(chan error, 1)
	go func() { waiting <- before.Extended(t.Context()) }()
	time.Sleep(10 * time.Millisecond)
	gone := errors.New("no swtpm")
	come <- gone
	select {
	case err := <-waiting:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("who waits for the TPM waits for ever")
	}
	await(t, l.Append(entry(t, 2)).Extended)
	if s := l.Status(); !errors.Is(s.TPMError, gone) || s.Fatal != nil || s.Entries != 3 || s.Extended != 0 {
		t.Errorf("status %+v", s)
	}
	l.Close()
}

// A TPM that something was extended in is not the one that was started for the list.
func TestLateTPMThatWasUsed(t *testing.T) {
	for name, pcr := range map[string]int{"its boot_aggregate is another": 4, "its register is used": 10} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			var digests []ima.Digest
			for _, bank := range b.tpm.Banks() {
				digests = append(digests, ima.ZeroDigest(bank))
			}
			if err := b.tpm.Extend(t.Context(), pcr, digests); err != nil {
				t.Fatal(err)
			}
			come := make(chan error, 1)
			come <- nil
			l, _ := b.open(b.late(come))
			if err := l.Append(entry(t, 1)).Extended(t.Context()); !errors.Is(err, ErrForeign) {
				t.Errorf("extended: %v", err)
			}
			l.Close()
		})
	}
}

// A TPM that is silent for a while when it comes is waited for.
func TestLateTPMThatFalters(t *testing.T) {
	b := newBench(t)
	c := b.late(nil)
	f := &falters{TPM: b.tpm}
	f.left.Store(3)
	c.Late.Await = func(context.Context) (TPM, error) { return f, nil }
	l, _ := b.open(c)
	await(t, l.Append(entry(t, 1)).Extended)
	b.check()
	l.Close()
}

// falters does not tell its boot_aggregate a few times.
type falters struct {
	TPM
	left atomic.Int32
}

func (f *falters) BootAggregate(ctx context.Context, bank ima.HashAlgo) (ima.Digest, error) {
	if f.left.Add(-1) >= 0 {
		return ima.Digest{}, tpmext.ErrUnavailable
	}
	return f.TPM.BootAggregate(ctx, bank)
}

func (f *falters) Reopen(context.Context) error { return nil }
