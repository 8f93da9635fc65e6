package measure

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/tpmext"
	"imans.dev/imans-agent/internal/tpmext/tpmtest"
)

// another gives the same list's folder a TPM that has just been started.
func (b *bench) another() *bench {
	b.t.Helper()
	n := newBench(b.t)
	n.dir = b.dir
	return n
}

func anchor(t testing.TB, l *List, tpm TPM) (held int) {
	t.Helper()
	await(t, func(ctx context.Context) (err error) {
		held, err = l.Anchor(ctx, tpm)
		return err
	})
	return held
}

// registersNow is what the TPM holds in all registers that tests use.
func (b *bench) registersNow() string {
	b.t.Helper()
	values, err := b.tpm.ReadPCRs(b.t.Context(), 10, 11, 12)
	if err != nil {
		b.t.Fatal(err)
	}
	var s string
	for _, pcr := range []int{10, 11, 12} {
		s += fmt.Sprintf("%d: %v\n", pcr, registers(values[pcr]))
	}
	return s
}

// A list goes over to another TPM, whatever it had before: that gets the whole log, the one before nothing more.
func TestAnchor(t *testing.T) {
	never := make(chan error)
	fails := make(chan error, 1)
	fails <- errors.New("no swtpm")
	for _, c := range []struct {
		name string
		open func(b *bench) Config
		held int // entries that the TPM before got
	}{
		{"from a TPM", (*bench).config, 4},
		{"from one that has not come", func(b *bench) Config { return b.late(never) }, 0},
		{"from one that did not come", func(b *bench) Config { return b.late(fails) }, 0},
	} {
		t.Run(c.name, func(t *testing.T) {
			old := newBench(t)
			l, _ := old.open(c.open(old))
			defer l.Close()
			l.Append(entry(t, 1))
			l.Append(entryOf(t, 11, "/bin/other-register"))
			r := l.Append(violation(t))
			await(t, r.Logged)
			if c.held > 0 {
				await(t, r.Extended)
			}
			before := old.registersNow()
			b := old.another()
			if held := anchor(t, l, b.tpm); held != c.held {
				t.Errorf("the TPM before holds %d entries, want %d", held, c.held)
			}
			await(t, l.Settle)
			await(t, l.Append(entry(t, 2)).Extended)
			await(t, l.Append(entry(t, 1)).Extended) // a duplicate stays one
			if names := b.check(); len(names) != 5 {
				t.Errorf("log %v", names)
			}
			if s := l.Status(); s.Entries != 5 || s.Extended != 5 || s.TPMError != nil || s.Fatal != nil {
				t.Errorf("status %+v", s)
			}
			if after := old.registersNow(); after != before {
				t.Errorf("the TPM before went from\n%s to\n%s", before, after)
			}
			l.Close()
			l, recovery := b.open(b.config())
			if recovery.Entries != 5 || recovery.Unextended != 0 {
				t.Errorf("recovered %+v", recovery)
			}
			l.Close()
		})
	}
}

// Who waits for a TPM that is lost gets what he waits for from the next one, and not before.
func TestAnchorFromLostTPM(t *testing.T) {
	old := newBench(t)
	l, _ := old.open(old.config())
	defer l.Close()
	await(t, l.Settle)
	old.swtpm.Kill()
	r := l.Append(entry(t, 1))
	waiting := make(chan error, 1)
	go func() { waiting <- r.Extended(t.Context()) }()
	for l.Status().TPMError == nil {
		time.Sleep(time.Millisecond)
	}
	b := old.another()
	gate := make(chan struct{})
	if held := anchor(t, l, &gatedTPM{TPM: b.tpm, gate: gate}); held != 1 {
		t.Errorf("the lost TPM held %d entries, want 1", held)
	}
	select {
	case err := <-waiting:
		t.Errorf("extended before the new TPM took it: %v", err)
	case <-time.After(50 * time.Millisecond):
	}
	close(gate)
	if err := <-waiting; err != nil {
		t.Error(err)
	}
	b.check()
}

// gatedTPM extends nothing until the gate is open, or the command is interrupted.
type gatedTPM struct {
	*tpmext.TPM
	gate chan struct{}
}

func (t *gatedTPM) Extend(ctx context.Context, pcr int, digests []ima.Digest) error {
	select {
	case <-t.gate:
		return t.TPM.Extend(ctx, pcr, digests)
	case <-ctx.Done():
		return ctx.Err()
	}
}

// A TPM that was used before, or that has another boot_aggregate, is refused, and the list goes on with its own.
func TestAnchorRefuses(t *testing.T) {
	for _, c := range []struct {
		name string
		pcr  int
	}{
		{"its boot_aggregate is another", 4},
		{"the list's register is used", 10},
		{"a register that the log names is used", 11},
	} {
		t.Run(c.name, func(t *testing.T) {
			old := newBench(t)
			l, _ := old.open(old.config())
			defer l.Close()
			await(t, l.Append(entryOf(t, 11, "/bin/other-register")).Extended)
			b := old.another()
			var digests []ima.Digest
			for _, bank := range b.tpm.Banks() {
				digests = append(digests, ima.ZeroDigest(bank))
			}
			if err := b.tpm.Extend(t.Context(), c.pcr, digests); err != nil {
				t.Fatal(err)
			}
			before := b.registersNow()
			if _, err := l.Anchor(t.Context(), b.tpm); !errors.Is(err, ErrForeign) {
				t.Errorf("anchor: %v", err)
			}
			await(t, l.Append(entry(t, 1)).Extended)
			old.check()
			if after := b.registersNow(); after != before {
				t.Errorf("the TPM that was refused went from\n%s to\n%s", before, after)
			}
		})
	}
}

// A register that the log does not name yet may be used; its first entry then ends the list, as with any TPM.
func TestAnchorLeavesOtherRegisters(t *testing.T) {
	old := newBench(t)
	l, _ := old.open(old.config())
	defer l.Close()
	b := old.another()
	var digests []ima.Digest
	for _, bank := range b.tpm.Banks() {
		digests = append(digests, ima.ZeroDigest(bank))
	}
	if err := b.tpm.Extend(t.Context(), 12, digests); err != nil {
		t.Fatal(err)
	}
	anchor(t, l, b.tpm)
	await(t, l.Append(entry(t, 1)).Extended)
	if err := l.Append(entryOf(t, 12, "/bin/used-register")).Extended(t.Context()); !errors.Is(err, ErrForeign) {
		t.Errorf("extended: %v", err)
	}
}

// A list whose boot_aggregate says that there was no TPM gets none.
func TestAnchorListThatBeganWithoutTPM(t *testing.T) {
	b := newBench(t)
	c := b.config()
	c.TPM = nil
	l, _ := b.open(c)
	defer l.Close()
	if _, err := l.Anchor(t.Context(), b.tpm); !errors.Is(err, ErrForeign) {
		t.Errorf("anchor: %v", err)
	}
	await(t, l.Append(entry(t, 1)).Extended) // logged, that is
	if s := l.Status(); s.Entries != 2 || s.Extended != 0 {
		t.Errorf("status %+v", s)
	}
}

// Entries that are appended while the list goes over, from TPM to TPM, are each there once and in their order.
func TestAnchorWhileAppending(t *testing.T) {
	b := newBench(t)
	l, _ := b.open(b.config())
	defer l.Close()
	const n = 600
	want := []string{imalog.BootAggregateName}
	var receipts []Receipt
	var appending sync.WaitGroup
	appending.Go(func() {
		for i := range n {
			e := numbered(t, i)
			want = append(want, e.Name())
			receipts = append(receipts, l.Append(e))
			time.Sleep(100 * time.Microsecond)
		}
	})
	for range 3 {
		time.Sleep(10 * time.Millisecond)
		b = b.another()
		anchor(t, l, b.tpm)
	}
	appending.Wait()
	for _, r := range receipts {
		await(t, r.Extended)
	}
	if names := b.check(); !slices.Equal(names, want) {
		t.Errorf("%d entries, want %d in their order", len(names), len(want))
	}
}

// Two goroutines may append at a time; the entries of each stay in their order.
func TestAppendFromTwo(t *testing.T) {
	b := newBench(t)
	l, _ := b.open(b.config())
	defer l.Close()
	const n = 200
	var appending sync.WaitGroup
	for part := range 2 {
		appending.Go(func() {
			for i := range n {
				l.Append(numbered(t, part*n+i))
				l.Append(numbered(t, 0)) // one that both have
			}
		})
	}
	appending.Wait()
	await(t, l.Settle)
	names := b.check()
	if len(names) != 2*n+1 {
		t.Fatalf("%d entries, want %d", len(names), 2*n+1)
	}
	for part := range 2 {
		last := -1
		for i := range n {
			at := slices.Index(names, numbered(t, part*n+i).Name())
			if at <= last {
				t.Fatalf("entry %d is at %d, the one before at %d", part*n+i, at, last)
			}
			last = at
		}
	}
}

// A command of the old TPM that never ends is interrupted.
func TestAnchorFromHungTPM(t *testing.T) {
	old := newBench(t)
	c := old.config()
	c.TPM = &gatedTPM{TPM: old.tpm}
	l, _ := old.open(c)
	defer l.Close()
	await(t, l.Append(entry(t, 1)).Logged)
	b := old.another()
	if held := anchor(t, l, b.tpm); held != 0 {
		t.Errorf("a TPM that does nothing holds %d entries", held)
	}
	await(t, l.Settle)
	b.check()
}

// stuckTPM is one behind a driver that nothing can interrupt: it extends when the gate opens, whatever the context says.
type stuckTPM struct {
	*tpmext.TPM
	gate chan struct{}
}

func (t *stuckTPM) Extend(_ context.Context, pcr int, digests []ima.Digest) error {
	<-t.gate
	return t.TPM.Extend(context.Background(), pcr, digests)
}

// If it can't be interrupted, the deadline ends the wait, and the list goes on with the TPM that it has.
func TestAnchorWithDeadline(t *testing.T) {
	old := newBench(t)
	c := old.config()
	stuck := &stuckTPM{old.tpm, make(chan struct{})}
	c.TPM = stuck
	l, _ := old.open(c)
	defer l.Close()
	await(t, l.Append(entry(t, 1)).Logged)
	b := old.another()
	before := b.registersNow()
	short, cancel := context.WithTimeout(t.Context(), interruptAfter+50*time.Millisecond)
	defer cancel()
	if _, err := l.Anchor(short, b.tpm); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("anchor: %v", err)
	}
	close(stuck.gate)
	await(t, l.Append(entry(t, 2)).Extended)
	old.check()
	if after := b.registersNow(); after != before {
		t.Errorf("the TPM that did not come in went from\n%s to\n%s", before, after)
	}
}

// A list that is closed while it goes over ends; the next one goes on where it is.
func TestCloseWhileAnchoring(t *testing.T) {
	old := newBench(t)
	l, _ := old.open(old.config())
	for i := range 200 {
		l.Append(numbered(t, i))
	}
	b := old.another()
	result := make(chan error, 1)
	go func() {
		_, err := l.Anchor(t.Context(), b.tpm)
		result <- err
	}()
	if err := l.Close(); err != nil {
		t.Error(err)
	}
	err := <-result
	if err != nil && !errors.Is(err, ErrClosed) {
		t.Errorf("anchor: %v", err)
	}
	if _, err := l.Anchor(t.Context(), b.tpm); !errors.Is(err, ErrClosed) {
		t.Errorf("anchor of a closed list: %v", err)
	}
	l, _ = b.open(b.config())
	await(t, l.Settle)
	l.Close()
	if names := b.check(); len(names) != 201 {
		t.Errorf("%d entries, want 201", len(names))
	}
}

// A list that lets go of its TPM goes on, nobody waits for one, and it may get another.
func TestDetach(t *testing.T) {
	old := newBench(t)
	l, _ := old.open(old.config())
	defer l.Close()
	await(t, l.Append(entry(t, 1)).Extended)
	var held int
	await(t, func(ctx context.Context) (err error) { held, err = l.Detach(ctx); return err })
	if held != 2 {
		t.Errorf("the TPM held %d entries, want 2", held)
	}
	await(t, l.Append(entry(t, 2)).Extended)
	if s := l.Status(); s.Entries != 3 || s.Extended != 0 || s.TPMError != nil {
		t.Errorf("status %+v", s)
	}
	if _, err := l.PCRs(t.Context()); err == nil {
		t.Error("there are PCRs of no TPM")
	}
	b := old.another()
	if held := anchor(t, l, b.tpm); held != 0 {
		t.Errorf("no TPM held %d entries", held)
	}
	await(t, l.Settle)
	b.check()
}

// A list can begin in a TPM 1.2 and go on there, and go over to one from a TPM 2.0: its boot_aggregate says that nothing was booted,
// though in another bank.
func TestTPM12(t *testing.T) {
	for _, c := range []struct {
		name string
		from func(t *testing.T, b *bench) *List
	}{
		{"from the beginning", func(t *testing.T, b *bench) *List {
			l, _ := b.open(b.config())
			return l
		}},
		{"from a TPM 2.0", func(t *testing.T, b *bench) *List {
			old := newBench(t)
			old.dir = b.dir
			l, _ := old.open(old.config())
			await(t, l.Append(entryOf(t, 11, "/bin/other-register")).Extended)
			anchor(t, l, b.tpm)
			return l
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			b := benchOf(t, tpmtest.StartTPM12(t))
			l := c.from(t, b)
			defer l.Close()
			l.Append(violation(t))
			await(t, l.Append(entry(t, 1)).Extended)
			names := b.check()
			l.Close()
			l, recovery := b.open(b.config())
			defer l.Close()
			if recovery.Entries != len(names) || recovery.Unextended != 0 {
				t.Errorf("recovered %+v of %v", recovery, names)
			}
			await(t, l.Append(entry(t, 2)).Extended)
			b.check()
		})
	}
}

// A TPM that has booted something is no other's, whatever its banks.
func TestTPM12RefusesBooted(t *testing.T) {
	old := newBench(t)
	l, _ := old.open(old.config())
	defer l.Close()
	b := benchOf(t, tpmtest.StartTPM12(t))
	if err := b.tpm.Extend(t.Context(), 4, []ima.Digest{ima.ZeroDigest(ima.SHA1)}); err != nil {
		t.Fatal(err)
	}
	if _, err := l.Anchor(t.Context(), b.tpm); !errors.Is(err, ErrForeign) {
		t.Errorf("anchor: %v", err)
	}
}
