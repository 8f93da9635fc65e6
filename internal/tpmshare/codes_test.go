package tpmshare

import (
	"testing"

	"github.com/google/go-tpm/tpm2"
)

// The table says of each command what the TPM says of it (TPMA_CC; Part 2, section 8.9), and every command that the TPM has is in it.
func TestCommandsAreTheTPMs(t *testing.T) {
	tpm, _ := openTPM(t)
	agent := openAgent(t, tpm)
	rsp, err := tpm2.GetCapability{Capability: tpm2.TPMCapCommands, Property: 0, PropertyCount: maxHandles}.Execute(agent)
	if err != nil {
		t.Fatal(err)
	}
	list, err := rsp.CapabilityData.Data.Command()
	if err != nil {
		t.Fatal(err)
	}
	if len(list.CommandAttributes) < 100 {
		t.Errorf("the TPM has %d commands", len(list.CommandAttributes))
	}
	for _, a := range list.CommandAttributes {
		code := tpm2.TPMCC(a.CommandIndex)
		c := commands[code]
		switch {
		case a.V:
			continue // a vendor's
		case c == nil:
			t.Errorf("%v is missing", code)
		case c.handles != int(a.CHandles) || c.creates != a.RHandle:
			t.Errorf("%s: %d handles, creates %v; the TPM says %d, %v", c.name, c.handles, c.creates, a.CHandles, a.RHandle)
		}
	}
}

// handles returns as many handles as a command has, the first as given.
func requestOf(code tpm2.TPMCC, handles ...tpm2.TPMHandle) *request {
	q := &request{command: commands[code], code: code}
	copy(q.handle[:], handles)
	return q
}

func TestRefuse(t *testing.T) {
	r := rules{measured: measured, protected: protected}
	const owner, platform = tpm2.TPMRHOwner, tpm2.TPMRHPlatform
	hierarchy := atHandle(tpm2.TPMRCHierarchy, 0)
	second := atHandle(tpm2.TPMRCHierarchy, 1)
	for name, c := range map[string]struct {
		q    *request
		want tpm2.TPMRC
	}{
		"extend 10":               {requestOf(tpm2.TPMCCPCRExtend, 10), tpm2.TPMRCLocality},
		"extend 11":               {requestOf(tpm2.TPMCCPCRExtend, 11), tpm2.TPMRCLocality},
		"extend 16":               {requestOf(tpm2.TPMCCPCRExtend, 16), 0},
		"extend nothing":          {requestOf(tpm2.TPMCCPCRExtend, tpm2.TPMRHNull), 0},
		"event 10":                {requestOf(tpm2.TPMCCPCREvent, 10), tpm2.TPMRCLocality},
		"reset 10":                {requestOf(tpm2.TPMCCPCRReset, 10), tpm2.TPMRCLocality},
		"reset 23":                {requestOf(tpm2.TPMCCPCRReset, 23), 0},
		"event sequence 10":       {requestOf(tpm2.TPMCCEventSequenceComplete, 10, firstTransient), tpm2.TPMRCLocality},
		"event sequence 16":       {requestOf(tpm2.TPMCCEventSequenceComplete, 16, firstTransient), 0},
		"owner's auth":            {requestOf(tpm2.TPMCCHierarchyChanegAuth, owner), 0},
		"endorsement's auth":      {requestOf(tpm2.TPMCCHierarchyChanegAuth, tpm2.TPMRHEndorsement), hierarchy},
		"lockout's auth":          {requestOf(tpm2.TPMCCHierarchyChanegAuth, tpm2.TPMRHLockout), hierarchy},
		"platform's auth":         {requestOf(tpm2.TPMCCHierarchyChanegAuth, platform), hierarchy},
		"platform's key":          {requestOf(tpm2.TPMCCCreatePrimary, platform), hierarchy},
		"owner's key":             {requestOf(tpm2.TPMCCCreatePrimary, owner), 0},
		"evict the identity":      {requestOf(tpm2.TPMCCEvictControl, owner, protected[0]), second},
		"evict another":           {requestOf(tpm2.TPMCCEvictControl, owner, 0x81000001), 0},
		"use the identity":        {requestOf(tpm2.TPMCCQuote, protected[0]), 0},
		"undefine the identity":   {requestOf(tpm2.TPMCCNVUndefineSpace, owner, protected[1]), second},
		"overwrite the identity":  {requestOf(tpm2.TPMCCNVWrite, protected[1], protected[1]), hierarchy},
		"read the identity":       {requestOf(tpm2.TPMCCNVRead, protected[1], protected[1]), 0},
		"platform undefines":      {requestOf(tpm2.TPMCCNVUndefineSpaceSpecial, 0x01000000, platform), second},
		"write another":           {requestOf(tpm2.TPMCCNVWrite, owner, 0x01000000), 0},
		"a command code, refused": {requestOf(tpm2.TPMCCClear, tpm2.TPMRHLockout), tpm2.TPMRCCommandCode},
	} {
		if rc := r.refuse(c.q); rc != c.want {
			t.Errorf("%s: %#x, want %#x", name, uint32(rc), uint32(c.want))
		}
	}
	persist := requestOf(tpm2.TPMCCEvictControl, owner, firstTransient)
	persist.params = handleBytes(protected[0])
	if rc := r.refuse(persist); rc != atParameter(tpm2.TPMRCHierarchy, 0) {
		t.Errorf("persist at the identity's handle: %#x", uint32(rc))
	}
}

// What the package promises to refuse whatever its handles.
func TestRefusedCommands(t *testing.T) {
	want := []tpm2.TPMCC{
		tpm2.TPMCCClear, tpm2.TPMCCClearControl, tpm2.TPMCCStartup, tpm2.TPMCCShutdown, tpm2.TPMCCHierarchyControl,
		tpm2.TPMCCSetPrimaryPolicy, tpm2.TPMCCChangeEPS, tpm2.TPMCCChangePPS, tpm2.TPMCCPCRAllocate, tpm2.TPMCCPCRSetAuthPolicy,
		tpm2.TPMCCPCRSetAuthValue, tpm2.TPMCCDictionaryAttackLockReset, tpm2.TPMCCDictionaryAttackParameters,
		tpm2.TPMCCFieldUpgradeStart, tpm2.TPMCCFieldUpgradeData, tpm2.TPMCCFirmwareRead, tpm2.TPMCCPPCommands,
		tpm2.TPMCCSetAlgorithmSet, tpm2.TPMCCClockSet, tpm2.TPMCCClockRateAdjust, tpm2.TPMCCSetCommandCodeAuditStatus,
		tpm2.TPMCCGetCommandAuditDigest, tpm2.TPMCCACSend, tpm2.TPMCCACGetCapability, tpm2.TPMCCPolicyACSendSelect,
		tpm2.TPMCCACTSetTimeout,
	}
	for _, code := range want {
		if rc := (rules{}).refuse(requestOf(code)); rc != tpm2.TPMRCCommandCode {
			t.Errorf("%v: %#x", code, uint32(rc))
		}
	}
	refused := 0
	for _, c := range commands {
		if c.refused != "" {
			refused++
		}
	}
	if refused != len(want) {
		t.Errorf("%d commands are refused, %d are in the test", refused, len(want))
	}
}
