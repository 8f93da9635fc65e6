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
	bank, ok := t.bootAggregateBank(algo)
	if !ok {
		return ima.ZeroDigest(algo), nil
	}
	pcrs := []int{0, 1, 2, 3, 4, 5, 6, 7}
	if bank != ima.SHA1 {
		pcrs = append(pcrs, 8, 9)
	}
	values, err := t.readPCRs(ctx, []ima.HashAlgo{bank}, pcrs)
	if err != nil {
		return ima.Digest{}, named("boot aggregate: TPM2_PCR_Read", err)
	}
	hash, _ := bank.Hash()
	h := hash.New()
	for _, pcr := range pcrs {
		h.Write(values[pcr][bank].Bytes())
	}
	return ima.NewDigest(bank, h.Sum(nil))
}

func (t *TPM) bootAggregateBank(algo ima.HashAlgo) (ima.HashAlgo, bool) {
	for _, bank := range []ima.HashAlgo{algo, ima.SHA256, ima.SHA1} {
		if _, computable := bank.Hash(); computable && slices.Contains(t.banks, bank) {
			return bank, true
		}
	}
	return 0, false
}
