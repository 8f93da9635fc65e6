package verify

import (
	"bufio"
	"errors"
	"fmt"
	"io"
	"maps"
	"slices"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// Options is what a list is held against. The zero value checks a classic list against itself alone.
type Options struct {
	// FileBank is whose binary_runtime_measurements the list is; 0 means SHA1, the classic file.
	FileBank ima.HashAlgo
	// PCRs are the values of the registers, by number and bank. Entries of registers that are not here can't be proven.
	// The caller vouches for the values. None at all means that nothing will be proven.
	PCRs map[int]map[ima.HashAlgo]ima.Digest
	// Banks are further banks to compute values of. Without PCRs and Banks it is the list's own. Each bank costs time.
	Banks []ima.HashAlgo
	// BootAggregate is what the first entry must say; none means anything.
	BootAggregate ima.Digest
	// ZeroViolations lets violations extend zeros, as evmctl does unless it is told --ignore-violations, so as to compute
	// the values that it computes. No kernel does it: a TPM's values then match no prefix that has a violation.
	ZeroViolations bool
}

// maxBroken is how many places Result.Broken holds.
const maxBroken = 100

// List replays the list in r and compares it as the package comment says. A list that does not verify is no error here:
// the Result says so. The error is about the options or what r returned; the Result then covers what was read before.
// It reads ahead and hashes in goroutines that have ended when it returns, r with them.
func List(r io.Reader, opts Options) (Result, error) {
	c, err := newChecker(opts)
	if err != nil {
		return Result{}, fmt.Errorf("verify list: %w", err)
	}
	err = c.run(imalog.NewReader(bufio.NewReaderSize(r, readSize), c.fileBank))
	if corrupt, ok := errors.AsType[*imalog.CorruptError](err); ok {
		kind := Corrupt
		if corrupt.Cut {
			kind = Cut
		}
		c.broken(&ReplayError{Kind: kind, Entry: corrupt.Entry, Offset: corrupt.Offset, PCR: -1, Bank: c.fileBank,
			Reason: corrupt.Reason, Err: corrupt})
		err = nil
	}
	c.finish()
	if err != nil {
		return c.result, fmt.Errorf("verify list: %w", err)
	}
	return c.result, nil
}

// checker goes through a list once. One goroutine uses it.
type checker struct {
	opts     Options
	fileBank ima.HashAlgo
	banks    []ima.HashAlgo // replayed
	given    []given
	covered  [imalog.MaxPCR + 1]bool // registers with a given value
	differ   int                     // how many of given don't hold after the entries so far
	replay   *imalog.Replay
	result   Result

	entries, violations int  // so far, of covered registers
	bootCovered         bool // the boot aggregate is of a covered register

	attached map[binding.ID]int // index in result.Bindings
}

// given is one PCR value that the list is held against.
type given struct {
	pcr   int
	value ima.Digest
	bytes []byte // of value
	holds bool
	after int // how many entries lead to it, the last time; -1 never
}

func newChecker(opts Options) (*checker, error) {
	c := &checker{opts: opts, fileBank: opts.FileBank, attached: make(map[binding.ID]int)}
	if c.fileBank == 0 {
		c.fileBank = ima.SHA1
	}
	for _, bank := range append([]ima.HashAlgo{c.fileBank}, opts.Banks...) {
		if err := imalog.CheckBank(bank); err != nil {
			return nil, err
		}
	}
	for _, bank := range opts.Banks {
		c.addBank(bank)
	}
	for _, pcr := range slices.Sorted(maps.Keys(opts.PCRs)) {
		if err := c.addPCR(pcr, opts.PCRs[pcr]); err != nil {
			return nil, err
		}
	}
	if len(c.banks) == 0 {
		c.addBank(c.fileBank)
	}
	c.replay = imalog.NewReplay(c.banks...)
	c.differ = len(c.given)
	for pcr := range c.covered {
		c.compare(pcr)
	}
	c.mark()
	return c, nil
}

func (c *checker) addPCR(pcr int, values map[ima.HashAlgo]ima.Digest) error {
	if pcr < 0 || pcr > imalog.MaxPCR {
		return fmt.Errorf("PCR %d is not one of 0 to %d", pcr, imalog.MaxPCR)
	}
	if len(values) == 0 {
		return fmt.Errorf("PCR %d is given without a value", pcr)
	}
	for _, bank := range slices.Sorted(maps.Keys(values)) {
		value := values[bank]
		if err := imalog.CheckBank(bank); err != nil {
			return fmt.Errorf("PCR %d: %w", pcr, err)
		}
		if value.IsNone() || value.Algo() != bank {
			return fmt.Errorf("PCR %d: the value for bank %s is %s", pcr, bank, value)
		}
		c.addBank(bank)
		c.covered[pcr] = true
		c.given = append(c.given, given{pcr: pcr, value: value, bytes: value.Bytes(), after: -1})
	}
	return nil
}

func (c *checker) addBank(bank ima.HashAlgo) {
	if !slices.Contains(c.banks, bank) {
		c.banks = append(c.banks, bank)
	}
}

// add takes the next entry, its digests already computed.
func (c *checker) add(it *item, sums []byte) {
	e := &it.entry
	if c.result.Entries == 0 {
		c.first(e)
	}
	for i, bank := range c.banks {
		c.replay.ExtendDigest(e.PCR(), bank, sums[i*sumSize:i*sumSize+bank.Size()])
	}
	if it.altered {
		c.broken(&ReplayError{Kind: TemplateDigest, Entry: c.result.Entries, Offset: it.offset, PCR: e.PCR(),
			Bank: c.fileBank, Reason: fmt.Sprintf("%s: the template digest is %s:%x, that of the data %s", quote(e.Name()),
				c.fileBank, it.stored[:c.fileBank.Size()], e.Digest(c.fileBank))})
	}
	c.binding(e, it.offset)
	c.result.Entries++
	c.result.Size = it.end
	if e.Violation() {
		c.result.Violations++
	}
	if !c.covered[e.PCR()] {
		return
	}
	c.entries++
	if e.Violation() {
		c.violations++
	}
	c.compare(e.PCR())
	c.mark()
}

// first checks the entry that must be the boot aggregate.
func (c *checker) first(e *imalog.Entry) {
	reason := ""
	switch {
	case e.Name() != imalog.BootAggregateName:
		reason = fmt.Sprintf("the list begins with %s, not with %s", quote(e.Name()), imalog.BootAggregateName)
	case e.Violation():
		reason = "the boot aggregate is a violation"
	default:
		c.result.BootAggregate = e.FileDigest()
		c.bootCovered = c.covered[e.PCR()] && !c.result.BootAggregate.IsNone()
		if c.result.BootAggregate.IsNone() {
			reason = "the boot aggregate holds no digest of a known algorithm"
		} else if want := c.opts.BootAggregate; !want.IsNone() && c.result.BootAggregate != want {
			reason = fmt.Sprintf("the boot aggregate is %s, %s was expected", c.result.BootAggregate, want)
		}
	}
	if reason != "" {
		c.broken(&ReplayError{Kind: BootAggregate, PCR: e.PCR(), Bank: c.fileBank, Reason: reason})
	}
}

// compare looks whether the given values of a register hold now.
func (c *checker) compare(pcr int) {
	for i := range c.given {
		g := &c.given[i]
		if g.pcr != pcr {
			continue
		}
		holds := c.replay.Holds(pcr, g.value.Algo(), g.bytes)
		if holds {
			g.after = c.result.Entries
		}
		if holds != g.holds {
			g.holds = holds
			if holds {
				c.differ--
			} else {
				c.differ++
			}
		}
	}
}

// mark takes the entries so far for the longest prefix if all given values hold.
func (c *checker) mark() {
	if len(c.given) == 0 || c.differ > 0 {
		return
	}
	c.result.Proven = Proven{
		Matched: true, Prefix: c.result.Entries, End: c.result.Size, Entries: c.entries, Violations: c.violations,
		BootAggregate: c.bootCovered,
	}
}

// finish draws the conclusions at the list's end.
func (c *checker) finish() {
	res := &c.result
	for _, pcr := range c.replay.PCRs() {
		for _, bank := range slices.Sorted(slices.Values(c.banks)) {
			res.Computed = append(res.Computed, PCRValue{pcr, c.replay.Value(pcr, bank)})
		}
	}
	if res.Entries == 0 && len(res.Broken) == 0 {
		c.broken(&ReplayError{Kind: BootAggregate, PCR: -1, Bank: c.fileBank,
			Reason: "the list is empty: it has no boot aggregate"})
	}
	c.proveBindings()
	res.Claimed = Claimed{Trailing: res.Entries - res.Proven.Prefix, Uncovered: res.Proven.Prefix - res.Proven.Entries}
	if len(c.given) == 0 || res.Proven.Matched {
		return
	}
	reached := !slices.ContainsFunc(c.given, func(g given) bool { return g.after < 0 })
	for _, g := range c.given {
		switch {
		case g.after < 0:
			c.mismatch(g, fmt.Sprintf("no part of the list leads to %s; all %d entries lead to %s", g.value, res.Entries,
				c.replay.Value(g.pcr, g.value.Algo())))
		case reached:
			c.mismatch(g, fmt.Sprintf("%d entries lead to %s, but not to the other values", g.after, g.value))
		}
	}
}

func (c *checker) mismatch(g given, reason string) {
	c.broken(&ReplayError{Kind: PCRMismatch, Entry: c.result.Entries, Offset: c.result.Size, PCR: g.pcr,
		Bank: g.value.Algo(), Reason: reason})
}

func (c *checker) broken(e *ReplayError) {
	if len(c.result.Broken) == maxBroken {
		c.result.BrokenMore++
		return
	}
	c.result.Broken = append(c.result.Broken, e)
}

// quote prints a name that anyone may have chosen, shortened.
func quote(name string) string {
	const most = 200
	if len(name) > most {
		return fmt.Sprintf("%q (and %d bytes more)", name[:most], len(name)-most)
	}
	return fmt.Sprintf("%q", name)
}
