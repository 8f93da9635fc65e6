package tpmshare

import (
	"encoding/binary"
	"slices"

	"github.com/google/go-tpm/tpm2"
)

// rules are what is refused to clients, besides the commands that are refused whatever their handles.
type rules struct {
	measured  []int            // PCRs
	protected []tpm2.TPMHandle // persistent objects and NV indices
}

// alters holds the commands that change, lock or remove the NV index or the persistent object among their handles.
var alters = []tpm2.TPMCC{
	tpm2.TPMCCEvictControl, tpm2.TPMCCNVUndefineSpace, tpm2.TPMCCNVUndefineSpaceSpecial, tpm2.TPMCCNVWrite, tpm2.TPMCCNVIncrement,
	tpm2.TPMCCNVExtend, tpm2.TPMCCNVSetBits, tpm2.TPMCCNVWriteLock, tpm2.TPMCCNVReadLock, tpm2.TPMCCNVChangeAuth,
}

// refuse returns why a client's command is not passed on, as the TPM would say it; success if it is:
//   - TPM_RC_COMMAND_CODE for a command that no client may send;
//   - TPM_RC_HIERARCHY for one by the platform's authorization, which on a machine the firmware keeps to itself, for one that
//     changes the authorization value of a hierarchy other than the owner's, and for one that alters what is protected;
//   - TPM_RC_LOCALITY for one that extends or resets a measured PCR, as the TPM says of PCRs that only another locality may.
func (r rules) refuse(q *request) tpm2.TPMRC {
	if q.refused != "" {
		return tpm2.TPMRCCommandCode
	}
	for i, h := range q.handle[:q.handles] {
		if h == tpm2.TPMRHPlatform || h == tpm2.TPMRHPlatformNV ||
			slices.Contains(r.protected, h) && slices.Contains(alters, q.code) {
			return atHandle(tpm2.TPMRCHierarchy, i)
		}
	}
	switch q.code {
	case tpm2.TPMCCHierarchyChanegAuth:
		if q.handle[0] != tpm2.TPMRHOwner {
			return atHandle(tpm2.TPMRCHierarchy, 0)
		}
	case tpm2.TPMCCEvictControl: // u32 persistentHandle
		if len(q.params) >= 4 && slices.Contains(r.protected, tpm2.TPMHandle(binary.BigEndian.Uint32(q.params))) {
			return atParameter(tpm2.TPMRCHierarchy, 0)
		}
	case tpm2.TPMCCPCRExtend, tpm2.TPMCCPCREvent, tpm2.TPMCCPCRReset, tpm2.TPMCCEventSequenceComplete:
		// A PCR's handle is its number. Source: Part 2, section 7.2.
		if h := q.handle[0]; handleType(h) == tpm2.TPMHTPCR && slices.Contains(r.measured, int(h)) {
			return tpm2.TPMRCLocality
		}
	}
	return tpm2.TPMRCSuccess
}
