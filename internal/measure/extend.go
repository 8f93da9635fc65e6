package measure

import (
	"context"
	"errors"
	"fmt"
	"io"
	"math"
	"time"

	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// idleAfter is how long the extender keeps its read buffer when there is nothing to extend.
const idleAfter = time.Second

// aheadMax is how many entries are prepared at once while the TPM works on those before.
const aheadMax = 64

// extender sends what is logged to the TPM, in order. One goroutine, the only one that extends for the list, owns it. It reads
// the entries back from the log, whether they were logged a moment ago or before a crash.
type extender struct {
	list    *List
	tpm     TPM // nil: none
	banks   []ima.HashAlgo
	known   map[int]bool    // registers that hold nothing but this list's entries
	running context.Context // of the goroutine
	ctx     context.Context // of TPM commands; Anchor may cancel it
	move    *move           // another TPM, taken and not gone over to yet

	// Of fill, which runs beside the extending, never twice at a time.
	at     int64          // of the first entry that is not prepared, in the log
	reader *imalog.Reader // nil while idle
	base   int64          // where reader began
	sum    []byte         // scratch

	now, next ahead // being extended, being prepared
}

// ahead is entries read back from the log, which were durable before, in order.
type ahead struct {
	items []prepared // their memory is used again; nil while idle
	n     int
	err   error // what came instead of a further entry
}

// prepared is an entry and what it extends in each bank, in the order of banks.
type prepared struct {
	entry   imalog.Entry
	digests []ima.Digest
}

// run extends, in one TPM after the other, until the list ends.
func (x *extender) run(ctx context.Context) {
	x.running = ctx
	x.renew()
	var err error
	if x.list.config.Late != nil {
		err = x.awaitLate()
	}
	for {
		if err == nil {
			err = x.extend()
		}
		switch {
		case errors.Is(err, errMoved):
			x.goOver()
			err = nil
		case errors.Is(err, ErrClosed):
			return // the next Open extends what is left
		default:
			x.list.fail(fmt.Errorf("extend list: %w", err))
			return
		}
	}
}

// extend extends what is logged. The TPM need not wait for the next entries' digests: they are computed while it works. It always
// returns an error: errMoved, ErrClosed, or one that ends the list.
func (x *extender) extend() error {
	if x.tpm == nil {
		return pause[struct{}](x, nil)
	}
	for {
		if err := x.await(); err != nil {
			return err
		}
		x.fill(&x.next)
		if x.next.n == 0 && x.next.err == nil {
			x.next.err = io.ErrUnexpectedEOF // what is logged is no longer there
		}
		for x.next.n > 0 || x.next.err != nil {
			x.now, x.next = x.next, x.now
			filled := make(chan struct{})
			go func() {
				defer close(filled)
				x.fill(&x.next)
			}()
			err := x.extendAll(&x.now)
			<-filled
			if err != nil {
				return err
			}
		}
	}
}

// await waits until there is something to extend. After a while its buffers are let go.
func (x *extender) await() error {
	next := x.list.extended.n + 1
	if x.reader != nil {
		err := x.awaitLogged(next, time.After(idleAfter))
		if !errors.Is(err, errIdle) {
			return err
		}
		x.reader, x.now, x.next = nil, ahead{}, ahead{}
	}
	return x.awaitLogged(next, nil)
}

// fill prepares what is logged and not prepared yet, as far as there is room.
func (x *extender) fill(a *ahead) {
	if x.reader == nil {
		x.base = x.at
		x.reader = imalog.NewReader(&tail{x.list, x.at}, ima.SHA1)
	}
	if a.items == nil {
		a.items = make([]prepared, aheadMax)
	}
	a.n, a.err = 0, nil
	for a.n < len(a.items) {
		p := &a.items[a.n]
		err := x.reader.ReadInto(&p.entry)
		if err == nil {
			err = x.setDigests(p)
		}
		if err != nil {
			if err != io.EOF { // the end for now
				a.err = err
			}
			return
		}
		x.at = x.base + x.reader.End()
		a.n++
	}
}

// extendAll extends what was prepared. Errors: those of extendEntry, errMoved, and what came behind the last entry.
func (x *extender) extendAll(a *ahead) error {
	l := x.list
	for i := range a.items[:a.n] {
		if err := x.interrupted(); err != nil {
			return err
		}
		if err := x.extendEntry(&a.items[i]); err != nil {
			return err
		}
		l.mu.Lock()
		l.extended.advance(l.extended.n + 1)
		l.mu.Unlock()
		fault.ExtendNoted.Pass()
	}
	return a.err
}

// extendEntry extends an entry, however long the TPM takes to come back. Errors: ErrClosed, errMoved, ErrForeign, ErrDiverged.
func (x *extender) extendEntry(p *prepared) error {
	pcr := p.entry.PCR()
	if !x.known[pcr] {
		if err := x.claim(pcr); err != nil {
			return err
		}
	}
	fault.Extend.Pass()
	err := x.extendWatched(p)
	if err != nil {
		return x.persist(p, err)
	}
	fault.Extended.Pass()
	// Commit point: before this line a crash leaves the entry logged, and extended or not; Open finds out from the register.
	return nil
}

// slowAfter is how long a TPM may take for an entry before that is trouble: it hangs, or has too much to do.
const slowAfter = 10 * time.Second

var errSlow = fmt.Errorf("the TPM has not answered for %v", slowAfter)

// extendWatched extends an entry, and says so when that takes long.
func (x *extender) extendWatched(p *prepared) error {
	l := x.list
	told := make(chan struct{})
	slow := time.AfterFunc(slowAfter, func() {
		defer close(told)
		l.trouble(&l.tpmTrouble, errSlow, "the TPM does not answer, waiting; nothing is lost")
	})
	err := x.tpm.Extend(x.ctx, p.entry.PCR(), p.digests)
	if !slow.Stop() {
		<-told
		if err == nil {
			l.trouble(&l.tpmTrouble, nil, "the TPM answers again")
		}
	}
	return err
}

// setDigests computes what each bank is extended with. A bank whose algorithm this program lacks gets the SHA-1 digest and zeros,
// as in the kernel, so that it isn't left open to others. Source: ima_calc_field_array_hash in ima_crypto.c.
func (x *extender) setDigests(p *prepared) error {
	p.digests = p.digests[:0]
	for _, bank := range x.banks {
		d := p.entry.ExtendDigest(bank)
		if d.IsNone() {
			x.sum = append(x.sum[:0], p.entry.ExtendDigest(ima.SHA1).Bytes()...)
			var err error
			if d, err = ima.NewDigest(bank, append(x.sum, make([]byte, bank.Size()-len(x.sum))...)); err != nil {
				return err
			}
		}
		p.digests = append(p.digests, d)
	}
	return nil
}

// claim makes sure, before the first entry for a register, that nothing else has extended it: it would never replay.
func (x *extender) claim(pcr int) error {
	return x.untilAnswered(func() error {
		held, err := x.tpm.ReadPCR(x.ctx, pcr)
		switch {
		case err == nil && !allZero(held):
			return foreign(pcr, held)
		case err == nil:
			x.known[pcr] = true
		}
		return err
	})
}

// untilAnswered asks the TPM until it answers. Errors: ErrClosed, errMoved, ErrForeign.
func (x *extender) untilAnswered(ask func() error) error {
	l := x.list
	for wait := firstPause; ; wait = min(2*wait, longestPause) {
		err := ask()
		if err == nil || errors.Is(err, ErrForeign) {
			return err
		}
		l.trouble(&l.tpmTrouble, err, "the TPM can't be read, waiting; nothing is lost")
		if err := pause(x, time.After(wait)); err != nil {
			return err
		}
		if x.tpm.Reopen(x.ctx) == nil {
			l.trouble(&l.tpmTrouble, nil, "the TPM is back")
		}
	}
}

// persist goes on after an Extend whose outcome is not known: it connects again, finds out from the registers whether the
// command was carried out, and sends it again if it was not, until it is done.
func (x *extender) persist(p *prepared, err error) error {
	l := x.list
	var around *surroundings
	for wait := firstPause; err != nil; wait = min(2*wait, longestPause) {
		l.trouble(&l.tpmTrouble, err, "the TPM does not extend, waiting; nothing is lost")
		if err := pause(x, time.After(wait)); err != nil {
			return err
		}
		if err = x.tpm.Reopen(x.ctx); err != nil {
			continue
		}
		if around == nil {
			if around, err = x.surroundings(p); err != nil {
				return err
			}
		}
		var done bool
		if done, err = around.extended(x.ctx, x.tpm); errors.Is(err, ErrDiverged) {
			return fmt.Errorf("entry %d (%q): %w", l.extended.n, p.entry.Name(), err)
		}
		if err == nil && !done {
			err = x.tpm.Extend(x.ctx, p.entry.PCR(), p.digests)
		}
	}
	l.trouble(&l.tpmTrouble, nil, "the TPM is back, extending resumed")
	return nil
}

// surroundings is what all of a list's registers hold before one entry, and after it.
type surroundings struct {
	before, after map[int]registers
}

// surroundings replays the log up to an entry. It takes seconds for a million entries, which only a TPM in trouble costs.
func (x *extender) surroundings(p *prepared) (*surroundings, error) {
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
	pcrs := append(replay.PCRs(), p.entry.PCR())
	for _, pcr := range pcrs {
		s.before[pcr] = values(replay, pcr)
	}
	replay.Extend(&p.entry)
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
