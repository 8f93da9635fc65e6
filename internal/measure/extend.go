package measure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// idleAfter is how long the extender keeps its read buffer when there is nothing to extend.
const idleAfter = time.Second

// extender sends what is logged to the TPM, in order. One goroutine, the only one that extends for the list, owns it. It reads
// the entries back from the log, whether they were logged a moment ago or before a crash.
type extender struct {
	list   *List
	tpm    TPM
	banks  []ima.HashAlgo
	known  map[int]bool   // registers that hold nothing but this list's entries
	at     int64          // of the first entry that is not extended, in the log
	reader *imalog.Reader // nil while idle
	base   int64          // where reader began

	entry   imalog.Entry // the one being extended; its memory is used again
	digests []ima.Digest // its digests, in the order of banks
	sum     []byte       // scratch
}

// run extends until the list ends.
func (x *extender) run(ctx context.Context) {
	for x.await(ctx) {
		if x.reader == nil {
			x.base = x.at
			x.reader = imalog.NewReader(&tail{x.list, x.at}, ima.SHA1)
		}
		err := x.reader.ReadInto(&x.entry)
		if err == nil {
			err = x.extendEntry(ctx)
		}
		if errors.Is(err, ErrClosed) {
			return // the next Open extends what is left
		}
		if err != nil {
			x.list.fail(fmt.Errorf("extend list: %w", err))
			return
		}
		x.at = x.base + x.reader.End()
		l := x.list
		l.mu.Lock()
		l.extended.advance(l.extended.n + 1)
		l.mu.Unlock()
	}
}

// await waits until there is something to extend; false: the list has ended.
func (x *extender) await(ctx context.Context) bool {
	l, next := x.list, x.list.extended.n+1
	if x.reader != nil {
		l.mu.Lock()
		ready := l.logged.n >= next && l.endErr == nil
		l.mu.Unlock()
		if ready {
			return true // a timer for each entry would wake the one who waits for the TPM
		}
		idle, cancel := context.WithTimeout(ctx, idleAfter)
		err := l.await(idle, &l.logged, next)
		cancel()
		if err == nil {
			return !l.hasEnded()
		}
		x.reader = nil
	}
	return l.await(ctx, &l.logged, next) == nil && !l.hasEnded()
}

// extendEntry extends x.entry, however long the TPM takes to come back. Errors: ErrClosed, ErrForeign, ErrDiverged.
func (x *extender) extendEntry(ctx context.Context) error {
	pcr := x.entry.PCR()
	if !x.known[pcr] {
		if err := x.claim(ctx, pcr); err != nil {
			return err
		}
	}
	if err := x.setDigests(); err != nil {
		return err
	}
	err := x.tpm.Extend(ctx, pcr, x.digests)
	if err != nil {
		return x.persist(ctx, err)
	}
	// Commit point: before this line a crash leaves the entry logged, and extended or not; Open finds out from the register.
	return nil
}

// setDigests computes what each bank is extended with. A bank whose algorithm this program lacks gets the SHA-1 digest and zeros,
// as in the kernel, so that it isn't left open to others. Source: ima_calc_field_array_hash in ima_crypto.c.
func (x *extender) setDigests() error {
	x.digests = x.digests[:0]
	for _, bank := range x.banks {
		d := x.entry.ExtendDigest(bank)
		if d.IsNone() {
			x.sum = append(x.sum[:0], x.entry.ExtendDigest(ima.SHA1).Bytes()...)
			var err error
			if d, err = ima.NewDigest(bank, append(x.sum, make([]byte, bank.Size()-len(x.sum))...)); err != nil {
				return err
			}
		}
		x.digests = append(x.digests, d)
	}
	return nil
}

// claim makes sure, before the first entry for a register, that nothing else has extended it: it would never replay.
func (x *extender) claim(ctx context.Context, pcr int) error {
	for pause := firstPause; ; pause = min(2*pause, longestPause) {
		held, err := x.tpm.ReadPCR(ctx, pcr)
		switch {
		case err == nil && !allZero(held):
			return foreign(pcr, held)
		case err == nil:
			x.known[pcr] = true
			return nil
		}
		x.list.trouble(&x.list.tpmTrouble, err, "the TPM can't be read, waiting; nothing is lost")
		if !x.list.pause(pause) {
			return ErrClosed
		}
		if x.tpm.Reopen(ctx) == nil {
			x.list.trouble(&x.list.tpmTrouble, nil, "the TPM is back")
		}
	}
}

// persist goes on after an Extend whose outcome is not known: it connects again, finds out from the registers whether the
// command was carried out, and sends it again if it was not, until it is done.
func (x *extender) persist(ctx context.Context, err error) error {
	l := x.list
	var around *surroundings
	for pause := firstPause; err != nil; pause = min(2*pause, longestPause) {
		if ctx.Err() != nil {
			return ErrClosed
		}
		l.trouble(&l.tpmTrouble, err, "the TPM does not extend, waiting; nothing is lost")
		if !l.pause(pause) {
			return ErrClosed
		}
		if err = x.tpm.Reopen(ctx); err != nil {
			continue
		}
		if around == nil {
			if around, err = x.surroundings(); err != nil {
				return err
			}
		}
		var done bool
		if done, err = around.extended(ctx, x.tpm); errors.Is(err, ErrDiverged) {
			return fmt.Errorf("entry %d (%q): %w", l.extended.n, x.entry.Name(), err)
		}
		if err == nil && !done {
			err = x.tpm.Extend(ctx, x.entry.PCR(), x.digests)
		}
	}
	l.trouble(&l.tpmTrouble, nil, "the TPM is back, extending resumed")
	return nil
}

// surroundings is what all of a list's registers hold before one entry, and after it.
type surroundings struct {
	before, after map[int]registers
}

// surroundings replays the log up to x.entry. It takes seconds for a million entries, which only a TPM in trouble costs.
func (x *extender) surroundings() (*surroundings, error) {
	replay := imalog.NewReplay(x.banks...)
	r := imalog.NewReader(io.NewSectionReader(x.list.file, 0, math.MaxInt64), ima.SHA1)
	var e imalog.Entry
	for range x.list.extended.n {
		if err := r.ReadInto(&e); err != nil {
			return nil, err
		}
		replay.Extend(&e)
	}
	s := &surroundings{before: make(map[int]registers), after: make(map[int]registers)}
	pcrs := append(replay.PCRs(), x.entry.PCR())
	for _, pcr := range pcrs {
		s.before[pcr] = values(replay, pcr)
	}
	replay.Extend(&x.entry)
	for _, pcr := range pcrs {
		s.after[pcr] = values(replay, pcr)
	}
	return s, nil
}

// extended reads the registers; ErrDiverged if they hold neither what they did before the entry nor what they do after it.
func (s *surroundings) extended(ctx context.Context, t TPM) (bool, error) {
	before, after := true, true
	for pcr := range s.before {
		held, err := t.ReadPCR(ctx, pcr)
		if err != nil {
			return false, err
		}
		before = before && s.before[pcr].matches(held)
		after = after && s.after[pcr].matches(held)
		if !before && !after {
			return false, fmt.Errorf("%w: PCR %d is %v, the log leads to %v; the TPM was reset or something else extends it: "+
				"keep both as evidence, then reboot, which begins new lists", ErrDiverged, pcr, registers(held), s.before[pcr])
		}
	}
	return after, nil
}
