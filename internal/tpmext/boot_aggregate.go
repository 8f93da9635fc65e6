package tpmext

import (
	"context"
	"slices"

	"imans.dev/imans-agent/internal/ima"
)

// BootAggregate returns the digest of what the machine booted: the hash of PCRs 0 to 7, and of 8 and 9 too in all banks but
// SHA1. The bank is that of algo; if it is not active, SHA256's; if that is not, SHA1's; and the digest is the bank's. With
// none of them it is algo's zero digest. Source: ima_calc_boot_aggregate in security/integrity/ima/ima_crypto.c.
func (t *TPM) BootAggregate(ctx context.Context, algo ima.HashAlgo) (ima.Digest, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	bank, pcrs := bootAggregateOf(t.banks, algo)
	if pcrs == nil {
		return ima.ZeroDigest(algo), nil
	}
	values, err := t.readPCRs(ctx, []ima.HashAlgo{bank}, pcrs)
	if err != nil {
		return ima.Digest{}, named("read boot aggregate", err)
	}
	return bootAggregate(bank, pcrs, func(pcr int) ima.Digest { return values[pcr][bank] })
}

// StartedBootAggregate returns the BootAggregate of a TPM with those active banks in which nothing has been extended since its
// start: its registers 0 to 9 are zero.
func StartedBootAggregate(banks []ima.HashAlgo, algo ima.HashAlgo) ima.Digest {
	bank, pcrs := bootAggregateOf(banks, algo)
	if pcrs == nil {
		return ima.ZeroDigest(algo)
	}
	d, _ := bootAggregate(bank, pcrs, func(int) ima.Digest { return ima.ZeroDigest(bank) }) // of the bank's own size
	return d
}

func bootAggregate(bank ima.HashAlgo, pcrs []int, value func(pcr int) ima.Digest) (ima.Digest, error) {
	hash, _ := bank.Hash()
	h := hash.New()
	for _, pcr := range pcrs {
		h.Write(value(pcr).Bytes())
	}
	return ima.NewDigest(bank, h.Sum(nil))
}

// bootAggregateOf returns the bank and the registers; none if there is no such bank.
func bootAggregateOf(banks []ima.HashAlgo, algo ima.HashAlgo) (ima.HashAlgo, []int) {
	for _, bank := range []ima.HashAlgo{algo, ima.SHA256, ima.SHA1} {
		if _, computable := bank.Hash(); computable && slices.Contains(banks, bank) {
			pcrs := []int{0, 1, 2, 3, 4, 5, 6, 7}
			if bank != ima.SHA1 {
				pcrs = append(pcrs, 8, 9)
			}
			return bank, pcrs
		}
	}
	return 0, nil
}
