package imalog

import (
	"bytes"
	"slices"

	"imans.dev/imans-agent/internal/ima"
)

// Replay computes the PCR values that a list leads to, from registers that begin at zero. (A TPM's registers 17 to 22
// begin at all ones, but no one who writes a list may extend those.) One goroutine uses it.
type Replay struct {
	banks []replayBank
}

// replayBank is one bank's registers: few, so they are searched in a row.
type replayBank struct {
	algo ima.HashAlgo
	pcrs []register
}

type register struct {
	pcr   int
	value [ima.MaxDigestSize]byte
}

// NewReplay replays into the given banks. Algorithms that this program lacks (CheckBank) are left out.
func NewReplay(banks ...ima.HashAlgo) *Replay {
	r := &Replay{}
	for _, b := range banks {
		if CheckBank(b) == nil {
			r.banks = append(r.banks, replayBank{algo: b})
		}
	}
	return r
}

// Extend adds an entry.
func (r *Replay) Extend(e *Entry) {
	var sum [ima.MaxDigestSize]byte
	for i := range r.banks {
		b := &r.banks[i]
		b.extend(e.PCR(), e.AppendExtendDigest(sum[:0], b.algo))
	}
}

// ExtendZeroViolations adds an entry as evmctl does unless it is told --ignore-violations: a violation extends zeros.
// No kernel does that, so a list with a violation then leads to a value that no TPM has.
func (r *Replay) ExtendZeroViolations(e *Entry) {
	var sum [ima.MaxDigestSize]byte
	for i := range r.banks {
		b := &r.banks[i]
		b.extend(e.PCR(), e.AppendDigest(sum[:0], b.algo))
	}
}

// ExtendDigest extends one register of one bank with a digest that the caller has computed already; a bank that is not
// replayed is left out.
func (r *Replay) ExtendDigest(pcr int, bank ima.HashAlgo, sum []byte) {
	for i := range r.banks {
		if b := &r.banks[i]; b.algo == bank {
			b.extend(pcr, sum)
		}
	}
}

func (b *replayBank) find(pcr int) *register {
	for i := range b.pcrs {
		if b.pcrs[i].pcr == pcr {
			return &b.pcrs[i]
		}
	}
	return nil
}

func (b *replayBank) extend(pcr int, sum []byte) {
	v := b.find(pcr)
	if v == nil {
		b.pcrs = append(b.pcrs, register{pcr: pcr})
		v = &b.pcrs[len(b.pcrs)-1]
	}
	var room [2 * ima.MaxDigestSize]byte
	size := b.algo.Size()
	n := copy(room[:], v.value[:size])
	n += copy(room[n:], sum)
	appendSum(v.value[:0], b.algo, room[:n])
}

// Value returns a register's value: zero if nothing was extended, none if the bank is not replayed.
func (r *Replay) Value(pcr int, bank ima.HashAlgo) ima.Digest {
	for i := range r.banks {
		b := &r.banks[i]
		if b.algo != bank {
			continue
		}
		v := b.find(pcr)
		if v == nil {
			return ima.ZeroDigest(bank)
		}
		d, _ := ima.NewDigest(bank, v.value[:bank.Size()]) // of the bank's own size
		return d
	}
	return ima.Digest{}
}

// Holds reports whether a register has the given value in a bank that is replayed: it saves the copy that Value makes.
func (r *Replay) Holds(pcr int, bank ima.HashAlgo, value []byte) bool {
	for i := range r.banks {
		b := &r.banks[i]
		if b.algo != bank {
			continue
		}
		if v := b.find(pcr); v != nil {
			return bytes.Equal(v.value[:bank.Size()], value)
		}
		return len(value) == bank.Size() && allZero(value)
	}
	return false
}

// PCRs returns which registers were extended, in rising order.
func (r *Replay) PCRs() []int {
	var pcrs []int
	if len(r.banks) > 0 {
		for i := range r.banks[0].pcrs {
			pcrs = append(pcrs, r.banks[0].pcrs[i].pcr)
		}
	}
	slices.Sort(pcrs)
	return pcrs
}

// Banks returns which banks are replayed.
func (r *Replay) Banks() []ima.HashAlgo {
	banks := make([]ima.HashAlgo, len(r.banks))
	for i := range r.banks {
		banks[i] = r.banks[i].algo
	}
	return banks
}
