package imalog

import (
	"hash"

	"imans.dev/imans-agent/internal/ima"
)

// Replay computes the PCR values that a list leads to, from registers that begin at zero. One goroutine uses it.
type Replay struct {
	banks []replayBank
}

type replayBank struct {
	algo   ima.HashAlgo
	hash   hash.Hash
	values map[int]ima.Digest
	digest []byte // scratch: the entry's digest
	sum    []byte // scratch: the register's new value
}

// NewReplay replays into the given banks. Algorithms that this program lacks are left out.
func NewReplay(banks ...ima.HashAlgo) *Replay {
	r := &Replay{}
	for _, b := range banks {
		if h, ok := b.Hash(); ok {
			r.banks = append(r.banks, replayBank{algo: b, hash: h.New(), values: make(map[int]ima.Digest)})
		}
	}
	return r
}

// Extend adds an entry.
func (r *Replay) Extend(e *Entry) {
	for i := range r.banks {
		b := &r.banks[i]
		b.digest = e.appendExtendDigest(b.digest[:0], b.hash)
		b.extend(e.PCR())
	}
}

// ExtendZeroViolations adds an entry as a verifier does that is told to ignore violations: they extend zeros.
func (r *Replay) ExtendZeroViolations(e *Entry) {
	if !e.violation {
		r.Extend(e)
		return
	}
	for i := range r.banks {
		b := &r.banks[i]
		b.digest = append(b.digest[:0], make([]byte, b.algo.Size())...)
		b.extend(e.PCR())
	}
}

func (b *replayBank) extend(pcr int) {
	b.hash.Reset()
	old, ok := b.values[pcr]
	if !ok {
		old = ima.ZeroDigest(b.algo)
	}
	b.sum = append(b.sum[:0], old.Bytes()...)
	b.hash.Write(b.sum)
	b.hash.Write(b.digest)
	b.sum = b.hash.Sum(b.sum[:0])
	b.values[pcr], _ = ima.NewDigest(b.algo, b.sum)
}

// appendExtendDigest is ExtendDigest into given memory.
func (e *Entry) appendExtendDigest(dst []byte, h hash.Hash) []byte {
	if e.violation {
		for range h.Size() {
			dst = append(dst, 0xff)
		}
		return dst
	}
	h.Reset()
	e.hashTo(h)
	return h.Sum(dst)
}

// Value returns a register's value: zero if nothing was extended, none if the bank is not replayed.
func (r *Replay) Value(pcr int, bank ima.HashAlgo) ima.Digest {
	for i := range r.banks {
		if b := &r.banks[i]; b.algo == bank {
			if v, ok := b.values[pcr]; ok {
				return v
			}
			return ima.ZeroDigest(bank)
		}
	}
	return ima.Digest{}
}

// PCRs returns which registers were extended, in no order.
func (r *Replay) PCRs() []int {
	var pcrs []int
	if len(r.banks) > 0 {
		for pcr := range r.banks[0].values {
			pcrs = append(pcrs, pcr)
		}
	}
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
