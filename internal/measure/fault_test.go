package measure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"syscall"
	"testing"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/tpmext"
)

// faults makes chosen steps fail a number of times: lost (not done), or done and not acknowledged.
type faults struct {
	mu       sync.Mutex
	failures map[string]int
	done     bool  // the step is carried out all the same
	cause    error // syscall.ENOSPC if nil
}

func (f *faults) fail(step string, times int) {
	f.mu.Lock()
	defer f.mu.Unlock()
	f.failures[step] = times
}

func (f *faults) left(step string) int {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.failures[step]
}

// step carries out do unless the step is to be lost, and says whether to report a failure.
func (f *faults) step(name string, do func() error) error {
	f.mu.Lock()
	failing := f.failures[name] > 0
	if failing {
		f.failures[name]--
	}
	done, cause := f.done, f.cause
	f.mu.Unlock()
	if !failing {
		return do()
	}
	if done {
		if err := do(); err != nil {
			return err
		}
	}
	if cause == nil {
		cause = syscall.ENOSPC
	}
	return fmt.Errorf("%s: %w", name, cause)
}

func (f *faults) open(path string) (File, error) {
	file, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	return &faultyFile{file, f}, err
}

type faultyFile struct {
	*os.File
	faults *faults
}

func (f *faultyFile) WriteAt(b []byte, off int64) (n int, err error) {
	err = f.faults.step("write", func() (err error) { n, err = f.File.WriteAt(b, off); return err })
	if err != nil && n == 0 {
		n, _ = f.File.WriteAt(b[:len(b)/2], off) // a full disk takes a part
	}
	return n, err
}

func (f *faultyFile) Sync() error { return f.faults.step("sync", f.File.Sync) }

// faultyTPM loses its connection at chosen commands.
type faultyTPM struct {
	*tpmext.TPM
	faults *faults
}

func (t *faultyTPM) Extend(ctx context.Context, pcr int, digests []ima.Digest) error {
	return t.faults.step("extend", func() error { return t.TPM.Extend(ctx, pcr, digests) })
}

func (t *faultyTPM) ReadPCR(ctx context.Context, pcr int) (held map[ima.HashAlgo]ima.Digest, err error) {
	err = t.faults.step("read", func() (err error) { held, err = t.TPM.ReadPCR(ctx, pcr); return err })
	return held, err
}

func (t *faultyTPM) BootAggregate(ctx context.Context, bank ima.HashAlgo) (d ima.Digest, err error) {
	err = t.faults.step("boot_aggregate", func() (err error) { d, err = t.TPM.BootAggregate(ctx, bank); return err })
	return d, err
}

func (t *faultyTPM) Reopen(ctx context.Context) error {
	return t.faults.step("reopen", func() error { return t.TPM.Reopen(ctx) })
}

// Each step of appending, failed and lost or done and unacknowledged; then the ordinary start path; then the oracle.
func TestEachStepLostOrUnacknowledged(t *testing.T) {
	for _, step := range []string{"write", "sync", "extend", "reopen"} {
		for _, done := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/done=%v", step, done), func(t *testing.T) {
				b := newBench(t)
				f := &faults{failures: map[string]int{}, done: done}
				c := b.config()
				c.OpenFile, c.TPM = f.open, &faultyTPM{b.tpm, f}
				l, _ := b.open(c)
				await(t, l.Append(entry(t, 1)).Extended)
				f.fail(step, 1)
				if step == "reopen" {
					f.fail("extend", 1)
				}
				r := l.Append(entry(t, 2))
				await(t, r.Extended)
				if f.left(step) != 0 {
					t.Fatal("the step was never met")
				}
				l.Close()

				l, _ = b.open(b.config())
				await(t, l.Append(entry(t, 2)).Extended)
				await(t, l.Append(entry(t, 3)).Extended)
				l.Close()
				if names := b.check(); len(names) != 4 {
					t.Errorf("entries %v, want each once", names)
				}
			})
		}
	}
}

// Each step of going over to another TPM, failed and lost or done and unacknowledged; then the ordinary start path with the new
// TPM; then the oracle. What is looked at beforehand fails the call alone: nothing has changed then.
func TestEachStepOfAnchorLostOrUnacknowledged(t *testing.T) {
	for _, step := range []string{"boot_aggregate", "read", "extend", "reopen", "write", "sync"} {
		for _, done := range []bool{false, true} {
			t.Run(fmt.Sprintf("%s/done=%v", step, done), func(t *testing.T) {
				anchorWithFault(t, step, done)
			})
		}
	}
}

func anchorWithFault(t *testing.T, step string, done bool) {
	old := newBench(t)
	f := &faults{failures: map[string]int{}, done: done}
	c := old.config()
	c.OpenFile = f.open
	l, _ := old.open(c)
	for i := range 3 {
		l.Append(entry(t, i))
	}
	await(t, l.Settle)
	b := old.another()
	faulty := &faultyTPM{b.tpm, f}
	f.fail(step, 1)
	if step == "boot_aggregate" || step == "read" {
		before := b.registersNow()
		if _, err := l.Anchor(t.Context(), faulty); err == nil || errors.Is(err, ErrForeign) {
			t.Fatalf("anchor: %v", err)
		}
		await(t, l.Append(entry(t, 3)).Extended)
		old.check()
		if after := b.registersNow(); after != before {
			t.Errorf("the TPM that failed went from\n%s to\n%s", before, after)
		}
	}
	if step == "reopen" {
		f.fail("extend", 1)
	}
	anchor(t, l, faulty)
	l.Append(entry(t, 3))
	await(t, l.Append(entry(t, 4)).Extended)
	if f.left(step) != 0 {
		t.Fatal("the step was never met")
	}
	l.Close()

	l, r := b.open(b.config())
	if r.Unextended != 0 {
		t.Errorf("recovered %+v", r)
	}
	await(t, l.Append(entry(t, 4)).Extended)
	await(t, l.Append(entry(t, 5)).Extended)
	l.Close()
	if names := b.check(); len(names) != 7 {
		t.Errorf("entries %v, want each once", names)
	}
}

// TestClaimAfterAnchorFalters: the new TPM stops answering after it was looked at, and comes back.
func TestClaimAfterAnchorFalters(t *testing.T) {
	old := newBench(t)
	l, _ := old.open(old.config())
	defer l.Close()
	b := old.another()
	f := &faults{failures: map[string]int{}}
	anchor(t, l, &faultyTPM{b.tpm, f})
	await(t, l.Settle)
	f.fail("read", 2)
	await(t, l.Append(entryOf(t, 11, "/bin/other-register")).Extended)
	if f.left("read") != 0 {
		t.Error("the register was not looked at")
	}
	b.check()
}

// everyNth loses the connection at each n-th extend, carried out or not in turn.
type everyNth struct {
	*tpmext.TPM
	n, calls int
}

func (t *everyNth) Extend(ctx context.Context, pcr int, digests []ima.Digest) error {
	t.calls++
	switch t.calls % (2 * t.n) {
	case t.n:
		return tpmext.ErrUnavailable
	case 0:
		if err := t.TPM.Extend(ctx, pcr, digests); err != nil {
			return err
		}
		return tpmext.ErrUnavailable
	}
	return t.TPM.Extend(ctx, pcr, digests)
}

// TestBacklogWithFaults: far more entries than are prepared at once, with a TPM that goes away among them.
func TestBacklogWithFaults(t *testing.T) {
	b := newBench(t)
	c := b.config()
	flaky := &everyNth{TPM: b.tpm, n: 37}
	c.TPM = flaky
	l, _ := b.open(c)
	const n = 5 * aheadMax
	for i := range n {
		l.Append(numbered(t, i))
	}
	await(t, l.Settle)
	l.Close()
	if names := b.check(); len(names) != n+1 || flaky.calls <= n+1 {
		t.Errorf("%d entries by %d commands, want %d each once", len(names), flaky.calls, n+1)
	}
}

// emptied is a log whose content is gone once it was written.
type emptied struct{ *os.File }

func (emptied) ReadAt([]byte, int64) (int, error) { return 0, io.EOF }

// TestLogGone: a log that lost what was logged ends the list, and nothing is extended.
func TestLogGone(t *testing.T) {
	b := newBench(t)
	c := b.config()
	c.OpenFile = func(path string) (File, error) {
		f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
		return emptied{f}, err
	}
	l, _ := b.open(c)
	defer l.Close()
	if err := l.Append(entry(t, 1)).Extended(t.Context()); !errors.Is(err, io.ErrUnexpectedEOF) {
		t.Errorf("extended: %v", err)
	}
	if s := l.Status(); s.Fatal == nil || s.Extended != 0 {
		t.Errorf("%+v", s)
	}
}
