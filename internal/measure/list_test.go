package measure

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// waits reports whether a wait does not come to an end for now.
func waits(t *testing.T, wait func(context.Context) error) bool {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Millisecond)
	defer cancel()
	return errors.Is(wait(ctx), context.DeadlineExceeded)
}

// A dead TPM: logging goes on, duplicates have the first one's Receipt, and extending resumes in order.
func TestDeadTPMIsWaitedOut(t *testing.T) {
	b := newBench(t)
	f := &faults{failures: map[string]int{}}
	c := b.config()
	c.TPM = &faultyTPM{b.tpm, f}
	l, _ := b.open(c)
	await(t, l.Append(entry(t, 1)).Extended)
	f.fail("extend", 1)
	f.fail("reopen", 1<<30)
	var rs []Receipt
	for i := 2; i < 2+2*recentMax; i++ {
		rs = append(rs, l.Append(entryOf(t, 10, fmt.Sprint(i))))
	}
	last := rs[len(rs)-1]
	await(t, last.Logged)
	for deadline := time.Now().Add(10 * time.Second); l.Status().TPMError == nil && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	s := l.Status()
	if s.Entries != 2+len(rs) || s.Extended != 2 || s.TPMError == nil || s.Fatal != nil {
		t.Errorf("status %+v, want all logged, two extended, and why not more", s)
	}
	if !waits(t, last.Extended) || !waits(t, rs[0].Extended) || !waits(t, l.Settle) {
		t.Error("an entry is said to be extended by a dead TPM")
	}
	if twin := l.Append(entryOf(t, 10, fmt.Sprint(1+2*recentMax))); twin != last {
		t.Errorf("a duplicate's Receipt is %d, the first one's %d", twin.n, last.n)
	}
	if twin := l.Append(entryOf(t, 10, "2")); twin.n < rs[0].n || twin.n > last.n {
		t.Errorf("the Receipt of an old duplicate is %d, want from %d to %d", twin.n, rs[0].n, last.n)
	}
	f.fail("reopen", 0)
	await(t, last.Extended)
	if err := l.Status().TPMError; err != nil {
		t.Errorf("trouble left: %v", err)
	}
	l.Close()
	if names := b.check(); len(names) != 2+len(rs) {
		t.Errorf("%d entries, want %d", len(names), 2+len(rs))
	}
}

// A swtpm that crashed and came back has lost its registers: that is not papered over, neither at once nor after a restart.
func TestResetTPMIsDiverged(t *testing.T) {
	b := newBench(t)
	l, _ := b.open(b.config())
	await(t, l.Append(entry(t, 1)).Extended)
	b.swtpm.Kill()
	r := l.Append(entry(t, 2))
	await(t, r.Logged)
	b.swtpm.Run("not-need-init,startup-clear")
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if err := r.Extended(ctx); !errors.Is(err, ErrDiverged) || !strings.Contains(err.Error(), "PCR 10") {
		t.Errorf("Extended: %v, want ErrDiverged", err)
	}
	if s := l.Status(); !errors.Is(s.Fatal, ErrDiverged) || s.Extended != 2 {
		t.Errorf("status %+v", s)
	}
	l.Close()
	held, err := b.tpm.ReadPCR(t.Context(), 10)
	if err != nil || !allZero(held) {
		t.Errorf("PCR 10 is %v, %v: it was extended", held, err)
	}
}

// Someone else extends the list's register.
func TestMeddledPCRIsDiverged(t *testing.T) {
	b := newBench(t)
	l, _ := b.open(b.config())
	await(t, l.Append(entry(t, 1)).Extended)
	l.Close()
	var ds []ima.Digest
	for _, bank := range b.tpm.Banks() {
		ds = append(ds, ima.ZeroDigest(bank))
	}
	if err := b.tpm.Extend(t.Context(), 10, ds); err != nil {
		t.Fatal(err)
	}
	before, _ := b.tpm.ReadPCR(t.Context(), 10)
	_, _, err := Open(t.Context(), b.config())
	if !errors.Is(err, ErrDiverged) || !strings.Contains(err.Error(), before[ima.SHA256].String()) {
		t.Errorf("Open: %v, want ErrDiverged with the register's value", err)
	}
	if after, _ := b.tpm.ReadPCR(t.Context(), 10); after[ima.SHA256] != before[ima.SHA256] {
		t.Error("the register was changed")
	}
}

func TestSeveralRegisters(t *testing.T) {
	b := newBench(t)
	c := b.config()
	l, _ := b.open(c)
	l.Append(entryOf(t, 10, "/a"))
	l.Append(entryOf(t, 11, "/a")) // the same data in another register is no duplicate
	await(t, l.Append(entryOf(t, 12, "/b")).Extended)
	l.Close()
	c.TPM = nil
	l, _ = b.open(c)
	l.Append(entryOf(t, 11, "/c"))
	l.Append(entryOf(t, 13, "/c")) // a register that only the unextended part names
	l.Close()
	l, r := b.open(b.config())
	if r.Entries != 6 || r.Unextended != 2 {
		t.Errorf("recovery %+v, want 6 entries, 2 to extend", r)
	}
	await(t, l.Settle)
	l.Close()
	if names := b.check(); len(names) != 6 {
		t.Errorf("entries %v", names)
	}
}

func TestRegisterOfSomeoneElse(t *testing.T) {
	b := newBench(t)
	var ds []ima.Digest
	for _, bank := range b.tpm.Banks() {
		ds = append(ds, ima.ZeroDigest(bank))
	}
	if err := b.tpm.Extend(t.Context(), 11, ds); err != nil {
		t.Fatal(err)
	}
	l, _ := b.open(b.config())
	if err := l.CheckPCR(t.Context(), 11); !errors.Is(err, ErrForeign) {
		t.Errorf("CheckPCR(11): %v, want ErrForeign", err)
	}
	if err := l.CheckPCR(t.Context(), 12); err != nil {
		t.Errorf("CheckPCR(12): %v", err)
	}
	await(t, l.Append(entry(t, 1)).Extended)
	if err := l.Append(entryOf(t, 11, "/a")).Extended(t.Context()); !errors.Is(err, ErrForeign) {
		t.Errorf("Extended: %v, want ErrForeign", err)
	}
	l.Close()
	c := b.config()
	c.Dir, c.PCR = t.TempDir(), 11
	if _, _, err := Open(t.Context(), c); !errors.Is(err, ErrForeign) || !strings.Contains(err.Error(), "--pcr") {
		t.Errorf("a list for it: %v, want ErrForeign and what to do", err)
	}
}

func TestOpenedTwice(t *testing.T) {
	b := newBench(t)
	l, _ := b.open(b.config())
	if _, _, err := Open(t.Context(), b.config()); !errors.Is(err, durable.ErrLocked) {
		t.Errorf("second Open: %v, want ErrLocked", err)
	}
	if err := l.Close(); err != nil {
		t.Fatal(err)
	}
	l, _ = b.open(b.config())
	l.Close()
}

// A full disk for long: Append waits when too much is pending, Close tells what is not in the log.
func TestBackPressure(t *testing.T) {
	b := newBench(t)
	f := &faults{failures: map[string]int{}}
	c := b.config()
	c.TPM, c.OpenFile = nil, f.open
	l, _ := b.open(c)
	await(t, l.Settle)
	l.pendingMax = 1000
	f.fail("write", 1<<30)
	var handedIn sync.WaitGroup
	var last Receipt
	handedIn.Go(func() {
		for i := range 100 {
			last = l.Append(entryOf(t, 10, fmt.Sprint(i)))
		}
	})
	for deadline := time.Now().Add(10 * time.Second); l.Status().LogError == nil && time.Now().Before(deadline); {
		time.Sleep(time.Millisecond)
	}
	time.Sleep(20 * time.Millisecond)
	l.mu.Lock()
	pending, accepted := len(l.pending), l.accepted.n
	l.mu.Unlock()
	if pending > 1200 || accepted >= 101 {
		t.Errorf("%d bytes pending of %d entries: Append did not wait", pending, accepted)
	}
	f.fail("write", 0)
	handedIn.Wait()
	await(t, last.Logged)
	if s := l.Status(); s.Entries != 101 || s.LogError != nil {
		t.Errorf("status %+v", s)
	}
	l.Close()
}

func TestFollow(t *testing.T) {
	b := newBench(t)
	c := b.config()
	c.TPM = nil
	l, _ := b.open(c)
	const n = 3*indexEvery + 7
	followed := make(chan []string)
	go func() {
		var names []string
		for len(names) < n+1 && l.AwaitEntries(t.Context(), len(names)) == nil {
			r, some, err := l.Reader(len(names))
			for range some {
				var e *imalog.Entry
				if e, err = r.Next(); err != nil {
					break
				}
				names = append(names, e.Name())
			}
			if err != nil {
				t.Error(err)
				break
			}
		}
		followed <- names
	}()
	for i := range n {
		l.Append(entryOf(t, 10, fmt.Sprint(i)))
		if i%50 == 0 {
			await(t, l.Barrier)
		}
	}
	names := <-followed
	if len(names) != n+1 || names[0] != imalog.BootAggregateName || names[n] != fmt.Sprint(n-1) || !slices.Contains(names, "300") {
		t.Errorf("followed %d entries, last %q", len(names), names[len(names)-1])
	}
	for _, from := range []int{0, 1, indexEvery - 1, indexEvery, indexEvery + 1, 3 * indexEvery, n, n + 1, n + 5} {
		r, some, err := l.Reader(from)
		if err != nil || some != max(0, n+1-from) {
			t.Errorf("Reader(%d): %d entries, %v", from, some, err)
		}
		if some > 0 {
			if e, err := r.Next(); err != nil || e.Name() != names[from] {
				t.Errorf("Reader(%d): %v, %v; want %s", from, e, err, names[from])
			}
		}
	}
	var log bytes.Buffer
	if _, err := log.ReadFrom(l.Snapshot()); err != nil {
		t.Fatal(err)
	}
	if onDisk, _ := os.ReadFile(filepath.Join(b.dir, LogName)); !bytes.Equal(onDisk, log.Bytes()) {
		t.Error("the snapshot is not the file")
	}
	l.Close()
	if err := l.AwaitEntries(t.Context(), n+1); !errors.Is(err, ErrClosed) {
		t.Errorf("following a closed list: %v", err)
	}
}

func TestMarkWakesThoseItReached(t *testing.T) {
	var m mark
	var ws []*waiter
	for _, n := range []int{3, 1, 2, 5, 3, 4} {
		ws = append(ws, m.wait(n))
	}
	m.forget(ws[5])
	for n := 1; n <= 5; n++ {
		m.advance(n)
		for i, w := range ws {
			select {
			case <-w.reached:
				if w.n > n || i == 5 {
					t.Errorf("woken at %d: waiter %d for %d", n, i, w.n)
				}
			default:
				if w.n <= n && i != 5 {
					t.Errorf("not woken at %d: waiter %d for %d", n, i, w.n)
				}
			}
		}
	}
	if len(m.waiting) != 0 {
		t.Errorf("%d waiters left", len(m.waiting))
	}
}

// evmctl is a verifier that is not ours.
func TestEvmctlVerifiesTheLog(t *testing.T) {
	b := newBench(t)
	l, _ := b.open(b.config())
	for i := range 40 {
		l.Append(entry(t, i))
	}
	l.Append(violation(t))
	await(t, l.Settle)
	l.Close()
	held, err := b.tpm.ReadPCR(t.Context(), 10)
	if err != nil {
		t.Fatal(err)
	}
	run := func(bank ima.HashAlgo, pcr []byte) (string, error) {
		file := filepath.Join(t.TempDir(), "pcrs")
		var text []byte
		for i := range 10 { // it reads the registers by their place
			text = fmt.Appendf(text, "PCR-%02d: %x\n", i, make([]byte, bank.Size()))
		}
		if err := os.WriteFile(file, fmt.Appendf(text, "PCR-10: %x\n", pcr), 0o600); err != nil {
			t.Fatal(err)
		}
		out, err := exec.Command("evmctl", "ima_measurement", "--ignore-violations", "--pcrs", bank.String()+","+file,
			filepath.Join(b.dir, LogName)).CombinedOutput()
		return string(out), err
	}
	for _, bank := range []ima.HashAlgo{ima.SHA1, ima.SHA256} {
		if out, err := run(bank, held[bank].Bytes()); err != nil {
			t.Errorf("%v: %v: %s", bank, err, out)
		}
		wrong := held[bank].Bytes()
		wrong[0] ^= 1
		if out, err := run(bank, wrong); err == nil {
			t.Errorf("%v: evmctl takes any PCR: %s", bank, out)
		}
	}
}
