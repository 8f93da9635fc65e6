package tpmext

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"imans.dev/imans-agent/internal/ima"
)

// NumPCRs is how many PCRs a PC Client TPM has.
const NumPCRs = 24

// algorithms pairs the TCG's hash algorithm numbers with the kernel's. Source: TCG Algorithm Registry, section 6.10;
// tpm2_hash_map in drivers/char/tpm/tpm2-cmd.c.
var algorithms = []struct {
	tpm tpm2.TPMAlgID
	ima ima.HashAlgo
}{
	{tpm2.TPMAlgSHA1, ima.SHA1}, {tpm2.TPMAlgSHA256, ima.SHA256}, {tpm2.TPMAlgSHA384, ima.SHA384},
	{tpm2.TPMAlgSHA512, ima.SHA512}, {tpm2.TPMAlgSM3256, ima.SM3}, {tpm2.TPMAlgSHA3256, ima.SHA3256},
	{tpm2.TPMAlgSHA3384, ima.SHA3384}, {tpm2.TPMAlgSHA3512, ima.SHA3512},
}

func imaAlgo(a tpm2.TPMAlgID) (ima.HashAlgo, bool) {
	for _, m := range algorithms {
		if m.tpm == a {
			return m.ima, true
		}
	}
	return 0, false
}

func tpmAlgo(a ima.HashAlgo) (tpm2.TPMAlgID, bool) {
	for _, m := range algorithms {
		if m.ima == a {
			return m.tpm, true
		}
	}
	return 0, false
}

// activeBanks lists the banks that have a PCR at all. A bank of an unknown algorithm is an error: left out, it would be open to
// anyone's extends.
func (t *TPM) activeBanks(ctx context.Context) ([]ima.HashAlgo, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapPCRs, PropertyCount: 1}.Execute(command{t, ctx})
	if err != nil {
		return nil, named("TPM2_GetCapability", err)
	}
	assigned, err := rsp.CapabilityData.Data.AssignedPCR()
	if err != nil {
		return nil, err
	}
	var banks []ima.HashAlgo
	for _, s := range assigned.PCRSelections {
		if !slices.ContainsFunc(s.PCRSelect, func(b byte) bool { return b != 0 }) {
			continue
		}
		a, ok := imaAlgo(s.Hash)
		if !ok {
			return nil, fmt.Errorf("PCR bank of unknown algorithm %#04x is active; disable it in the firmware's setup", uint16(s.Hash))
		}
		banks = append(banks, a)
	}
	return banks, nil
}

// ReadPCR returns a PCR's value in each active bank.
func (t *TPM) ReadPCR(ctx context.Context, pcr int) (map[ima.HashAlgo]ima.Digest, error) {
	values, err := t.ReadPCRs(ctx, pcr)
	if err != nil {
		return nil, err
	}
	return values[pcr], nil
}

// ReadPCRs returns the values of several PCRs in each active bank, all of one moment by the TPM's update counter. Errors:
// ErrUnavailable, ErrUnstable, a tpm2.TPMRC, or a Code12.
func (t *TPM) ReadPCRs(ctx context.Context, pcrs ...int) (map[int]map[ima.HashAlgo]ima.Digest, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	values, err := t.readPCRs(ctx, t.banks, pcrs)
	if err != nil {
		return nil, named(fmt.Sprintf("read PCRs %v", pcrs), err)
	}
	return values, nil
}

// unstableTries is how often a read of several commands begins anew before it is ErrUnstable.
const unstableTries = 20

// readPCRs reads PCRs in some banks. t.mu is held, so a counter that moves means another program extends.
func (t *TPM) readPCRs(ctx context.Context, banks []ima.HashAlgo, pcrs []int) (map[int]map[ima.HashAlgo]ima.Digest, error) {
	for _, pcr := range pcrs {
		if pcr < 0 || pcr >= NumPCRs {
			return nil, fmt.Errorf("PCR %d is not one of 0 to %d", pcr, NumPCRs-1)
		}
	}
	if t.tpm12 {
		return t.readPCRs12(ctx, pcrs)
	}
	for range unstableTries {
		r := pcrRead{c: command{t, ctx}, values: make(map[int]map[ima.HashAlgo]ima.Digest)}
		stable, err := r.read(banks, pcrs)
		if err != nil {
			return nil, err
		}
		if stable {
			return r.values, nil
		}
	}
	return nil, fmt.Errorf("%w: %d reads were overtaken by extends of another program", ErrUnstable, unstableTries)
}

// pcrRead gathers what one or more TPM2_PCR_Read return: a TPM gives at most 8 digests at once, and may give fewer.
type pcrRead struct {
	c       transport.TPM
	counter uint32
	values  map[int]map[ima.HashAlgo]ima.Digest
}

// read reports false if the update counter moved between two commands.
func (r *pcrRead) read(banks []ima.HashAlgo, pcrs []int) (stable bool, err error) {
	for first := true; ; first = false {
		missing := r.missing(banks, pcrs)
		if len(missing.PCRSelections) == 0 {
			return true, nil
		}
		rsp, err := tpm2.PCRRead{PCRSelectionIn: missing}.Execute(r.c)
		if err != nil {
			return false, err
		}
		if !first && rsp.PCRUpdateCounter != r.counter {
			return false, nil
		}
		r.counter = rsp.PCRUpdateCounter
		n, err := r.take(rsp)
		if err != nil {
			return false, err
		}
		if n == 0 {
			return false, fmt.Errorf("the TPM has not all of PCRs %v in all of banks %v", pcrs, banks)
		}
	}
}

// missing selects what has not been read yet.
func (r *pcrRead) missing(banks []ima.HashAlgo, pcrs []int) tpm2.TPMLPCRSelection {
	var list tpm2.TPMLPCRSelection
	for _, bank := range banks {
		var want []uint
		for _, pcr := range pcrs {
			if _, ok := r.values[pcr][bank]; !ok {
				want = append(want, uint(pcr))
			}
		}
		if len(want) == 0 {
			continue
		}
		hash, _ := tpmAlgo(bank) // banks come from activeBanks
		list.PCRSelections = append(list.PCRSelections,
			tpm2.TPMSPCRSelection{Hash: hash, PCRSelect: tpm2.PCClientCompatible.PCRs(want...)})
	}
	return list
}

// take stores a response's digests, which come in the order of its selections, within each from the lowest PCR on.
func (r *pcrRead) take(rsp *tpm2.PCRReadResponse) (n int, err error) {
	digests := rsp.PCRValues.Digests
	for _, s := range rsp.PCRSelectionOut.PCRSelections {
		bank, ok := imaAlgo(s.Hash)
		for pcr := range len(s.PCRSelect) * 8 {
			if s.PCRSelect[pcr/8]&(1<<(pcr%8)) == 0 {
				continue
			}
			if !ok || n == len(digests) {
				return 0, errors.New("a response whose selection does not fit its digests")
			}
			d, err := ima.NewDigest(bank, digests[n].Buffer)
			if err != nil {
				return 0, err
			}
			if r.values[pcr] == nil {
				r.values[pcr] = make(map[ima.HashAlgo]ima.Digest)
			}
			r.values[pcr][bank] = d
			n++
		}
	}
	return n, nil
}

// Extend extends a PCR in all active banks by one TPM2_PCR_Extend (Part 3, section 22.2), or TPM_Extend. The digests must be one for each
// active bank, in any order; else nothing is sent. After ErrUnavailable it is unknown whether the PCR was extended; after any
// other error it was not.
func (t *TPM) Extend(ctx context.Context, pcr int, digests []ima.Digest) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if err := t.extendPCR(ctx, pcr, digests); err != nil {
		return named(fmt.Sprintf("extend PCR %d", pcr), err)
	}
	return nil
}

func (t *TPM) extendPCR(ctx context.Context, pcr int, digests []ima.Digest) error {
	if pcr < 0 || pcr >= NumPCRs {
		return fmt.Errorf("PCR %d is not one of 0 to %d", pcr, NumPCRs-1)
	}
	if !covers(digests, t.banks) {
		return fmt.Errorf("digests %v are not one for each of the active banks %v", digests, t.banks)
	}
	if t.tpm12 {
		return t.extend12(ctx, pcr, digests[0])
	}
	t.extend = appendExtend(t.extend[:0], pcr, digests)
	response, err := t.roundTrip(ctx, t.extend)
	if err != nil {
		return err
	}
	if rc := responseCode(response); rc != tpm2.TPMRCSuccess {
		return rc
	}
	return nil
}

func covers(digests []ima.Digest, banks []ima.HashAlgo) bool {
	for _, b := range banks {
		if !slices.ContainsFunc(digests, func(d ima.Digest) bool { return !d.IsNone() && d.Algo() == b }) {
			return false
		}
	}
	return len(digests) == len(banks)
}

// appendExtend writes the command by hand, big endian, because a list sends it by the million and marshalling by reflection
// takes a third of the time that swtpm takes. The PCR is authorized by the empty password.
func appendExtend(b []byte, pcr int, digests []ima.Digest) []byte {
	b = binary.BigEndian.AppendUint16(b, uint16(tpm2.TPMSTSessions))
	b = binary.BigEndian.AppendUint32(b, 0) // size of the whole, set below
	b = binary.BigEndian.AppendUint32(b, uint32(tpm2.TPMCCPCRExtend))
	b = binary.BigEndian.AppendUint32(b, uint32(pcr)) // the handle of a PCR is its index
	b = binary.BigEndian.AppendUint32(b, 9)           // size of the authorization:
	b = binary.BigEndian.AppendUint32(b, uint32(tpm2.TPMRSPW))
	b = append(b, 0, 0, 0, 0, 0) // u16 nonce size, attributes, u16 password size
	b = binary.BigEndian.AppendUint32(b, uint32(len(digests)))
	for _, d := range digests {
		hash, _ := tpmAlgo(d.Algo()) // covers compared it with the banks
		b = binary.BigEndian.AppendUint16(b, uint16(hash))
		b = append(b, d.Bytes()...)
	}
	binary.BigEndian.PutUint32(b[2:], uint32(len(b)))
	return b
}

// Resets is how often the TPM began anew. PCRs survive TPM Resume, which counts as a restart, and nothing else that counts
// here. The numbers are the TPM's word, not signed.
type Resets struct {
	ResetCount   uint32 // TPM Resets since the last TPM2_Clear
	RestartCount uint32 // TPM Restarts and Resumes since the last TPM Reset or TPM2_Clear
}

// Resets reads the counts by TPM2_ReadClock (Part 3, section 29.1).
func (t *TPM) Resets(ctx context.Context) (Resets, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	rsp, err := tpm2.ReadClock{}.Execute(command{t, ctx})
	if err != nil {
		return Resets{}, named("TPM2_ReadClock", err)
	}
	c := rsp.CurrentTime.ClockInfo
	return Resets{ResetCount: c.ResetCount, RestartCount: c.RestartCount}, nil
}
