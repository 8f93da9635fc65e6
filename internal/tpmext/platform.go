package tpmext

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"imans.dev/imans-agent/internal/ima"
)

// What follows is a machine's firmware's to send: commands with the platform's authorization, which is empty after each reset of a
// TPM and until ClosePlatform.

// AllocateBanks makes the given PCR banks the active ones from the next reset of the TPM on. Until then registers and Banks are
// what they were. Source: Part 3, section 22.5 (TPM2_PCR_Allocate).
func (t *TPM) AllocateBanks(ctx context.Context, banks []ima.HashAlgo) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	selections, err := t.allocation(ctx, banks)
	if err != nil {
		return fmt.Errorf("allocate PCR banks %v: %w", banks, err)
	}
	response, err := t.platformCommand(ctx, tpm2.TPMCCPCRAllocate, tpm2.Marshal(tpm2.TPMLPCRSelection{PCRSelections: selections}))
	if err != nil {
		return named("TPM2_PCR_Allocate", err)
	}
	// u32 size of the parameters, u8 whether it took the allocation, three u32 of sizes.
	if len(response) < headerSize+5 || response[headerSize+4] == 0 {
		return fmt.Errorf("TPM2_PCR_Allocate: the TPM has no room for the banks %v; choose fewer", banks)
	}
	return nil
}

// allocation selects all PCRs of the given banks and none of the TPM's others. t.mu is held.
func (t *TPM) allocation(ctx context.Context, banks []ima.HashAlgo) ([]tpm2.TPMSPCRSelection, error) {
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapPCRs, PropertyCount: 1}.Execute(command{t, ctx})
	if err != nil {
		return nil, named("TPM2_GetCapability", err)
	}
	assigned, err := rsp.CapabilityData.Data.AssignedPCR()
	if err != nil {
		return nil, err
	}
	var selections []tpm2.TPMSPCRSelection
	found := 0
	for _, s := range assigned.PCRSelections {
		selected := make([]byte, NumPCRs/8)
		if a, ok := imaAlgo(s.Hash); ok && slices.Contains(banks, a) {
			found++
			for i := range selected {
				selected[i] = 0xff
			}
		}
		selections = append(selections, tpm2.TPMSPCRSelection{Hash: s.Hash, PCRSelect: selected})
	}
	if found == 0 || found != len(banks) {
		return nil, errors.New("the TPM lacks some of them, or one is named twice, or there is none; choose among sha1, sha256, sha384, sha512")
	}
	return selections, nil
}

// ForbidClear makes TPM2_Clear fail for good, so that whoever uses the TPM can't delete the keys and NV indexes that it came with.
// Source: Part 3, section 24.7 (TPM2_ClearControl).
func (t *TPM) ForbidClear(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if _, err := t.platformCommand(ctx, tpm2.TPMCCClearControl, []byte{1}); err != nil {
		return named("TPM2_ClearControl", err)
	}
	return nil
}

// ClosePlatform disables the platform hierarchy until the next reset: nobody else can then allocate banks, change seeds or delete
// the platform's NV indexes. Those stay readable. Source: Part 3, section 24.2 (TPM2_HierarchyControl).
func (t *TPM) ClosePlatform(ctx context.Context) error {
	t.mu.Lock()
	defer t.mu.Unlock()
	parameters := binary.BigEndian.AppendUint32(nil, uint32(tpm2.TPMRHPlatform)) // the hierarchy to enable or disable
	if _, err := t.platformCommand(ctx, tpm2.TPMCCHierarchyControl, append(parameters, 0)); err != nil {
		return named("TPM2_HierarchyControl", err)
	}
	return nil
}

// platformCommand sends a command that go-tpm does not have, whose one handle is the platform, authorized by the empty password.
// t.mu is held. Source: Part 1, section 18 (command structure).
func (t *TPM) platformCommand(ctx context.Context, code tpm2.TPMCC, parameters []byte) ([]byte, error) {
	const authorization = 4 + 2 + 1 + 2 // session handle, empty nonce, attributes, empty password
	b := binary.BigEndian.AppendUint16(nil, uint16(tpm2.TPMSTSessions))
	b = binary.BigEndian.AppendUint32(b, uint32(headerSize+4+4+authorization+len(parameters)))
	b = binary.BigEndian.AppendUint32(b, uint32(code))
	b = binary.BigEndian.AppendUint32(b, uint32(tpm2.TPMRHPlatform))
	b = binary.BigEndian.AppendUint32(b, authorization)
	b = binary.BigEndian.AppendUint32(b, uint32(tpm2.TPMRSPW))
	b = append(b, 0, 0, 0, 0, 0)
	response, err := t.roundTrip(ctx, append(b, parameters...))
	if err != nil {
		return nil, err
	}
	if rc := responseCode(response); rc != tpm2.TPMRCSuccess {
		return nil, rc
	}
	return response, nil
}
