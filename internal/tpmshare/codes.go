package tpmshare

import "github.com/google/go-tpm/tpm2"

// command is what has to be known of a command to pass it on. Source: TCG TPM 2.0 Library, Part 3, the command tables of each
// section; Part 2, section 8.9 (TPMA_CC).
type command struct {
	name    string // Part 3's, without TPM2_
	handles int    // in the request's handle area
	creates bool   // the response's handle area has the handle of what the command loaded
	refused string // why no client may send it; empty: clients may
}

// Why commands are refused.
const (
	endsLog     = "it would end what the PCRs say of the list"
	resetsTPM   = "the TPM is started and shut down by who runs it"
	ownerOfAll  = "it takes the TPM, and the identity made in it, from who runs it"
	unlocksAll  = "dictionary attack protection is set by who runs the TPM"
	firmware    = "the TPM's program is the host's"
	audits      = "what commands are audited is set by who runs the TPM"
	movesClock  = "the clock is in quotes, and goes forward only by the TPM itself"
	attachments = "attached components are the host's"
)

// commands holds every command that this package passes on or refuses by name. One that is not here is refused: how many handles
// it has is not known, so it can't be kept from other clients' objects. Vendor commands (bit 29 of the code) are of that kind.
var commands = map[tpm2.TPMCC]*command{
	// Part 3, sections 9 and 10: start-up and testing.
	tpm2.TPMCCStartup:             {name: "Startup", refused: resetsTPM},
	tpm2.TPMCCShutdown:            {name: "Shutdown", refused: resetsTPM},
	tpm2.TPMCCSelfTest:            {name: "SelfTest"},
	tpm2.TPMCCIncrementalSelfTest: {name: "IncrementalSelfTest"},
	tpm2.TPMCCGetTestResult:       {name: "GetTestResult"},
	// Section 11: sessions.
	tpm2.TPMCCStartAuthSession: {name: "StartAuthSession", handles: 2, creates: true},
	tpm2.TPMCCPolicyRestart:    {name: "PolicyRestart", handles: 1},
	// Sections 12 and 13: objects and their duplication.
	tpm2.TPMCCCreate:             {name: "Create", handles: 1},
	tpm2.TPMCCLoad:               {name: "Load", handles: 1, creates: true},
	tpm2.TPMCCLoadExternal:       {name: "LoadExternal", creates: true},
	tpm2.TPMCCReadPublic:         {name: "ReadPublic", handles: 1},
	tpm2.TPMCCActivateCredential: {name: "ActivateCredential", handles: 2},
	tpm2.TPMCCMakeCredential:     {name: "MakeCredential", handles: 1},
	tpm2.TPMCCUnseal:             {name: "Unseal", handles: 1},
	tpm2.TPMCCObjectChangeAuth:   {name: "ObjectChangeAuth", handles: 2},
	tpm2.TPMCCCreateLoaded:       {name: "CreateLoaded", handles: 1, creates: true},
	tpm2.TPMCCDuplicate:          {name: "Duplicate", handles: 2},
	tpm2.TPMCCRewrap:             {name: "Rewrap", handles: 2},
	tpm2.TPMCCImport:             {name: "Import", handles: 1},
	// Sections 14 to 16: asymmetric and symmetric primitives, random numbers.
	tpm2.TPMCCRSAEncrypt:      {name: "RSA_Encrypt", handles: 1},
	tpm2.TPMCCRSADecrypt:      {name: "RSA_Decrypt", handles: 1},
	tpm2.TPMCCECDHKeyGen:      {name: "ECDH_KeyGen", handles: 1},
	tpm2.TPMCCECDHZGen:        {name: "ECDH_ZGen", handles: 1},
	tpm2.TPMCCECCParameters:   {name: "ECC_Parameters"},
	tpm2.TPMCCZGen2Phase:      {name: "ZGen_2Phase", handles: 1},
	eccEncrypt:                {name: "ECC_Encrypt", handles: 1},
	eccDecrypt:                {name: "ECC_Decrypt", handles: 1},
	tpm2.TPMCCEncryptDecrypt:  {name: "EncryptDecrypt", handles: 1},
	tpm2.TPMCCEncryptDecrypt2: {name: "EncryptDecrypt2", handles: 1},
	tpm2.TPMCCHash:            {name: "Hash"},
	tpm2.TPMCCMAC:             {name: "HMAC", handles: 1},
	tpm2.TPMCCGetRandom:       {name: "GetRandom"},
	tpm2.TPMCCStirRandom:      {name: "StirRandom"},
	// Section 17: hash sequences.
	tpm2.TPMCCMACStart:              {name: "HMAC_Start", handles: 1, creates: true},
	tpm2.TPMCCHashSequenceStart:     {name: "HashSequenceStart", creates: true},
	tpm2.TPMCCSequenceUpdate:        {name: "SequenceUpdate", handles: 1},
	tpm2.TPMCCSequenceComplete:      {name: "SequenceComplete", handles: 1},
	tpm2.TPMCCEventSequenceComplete: {name: "EventSequenceComplete", handles: 2},
	// Sections 18 to 20: attestation, ephemeral keys, signing.
	tpm2.TPMCCCertify:               {name: "Certify", handles: 2},
	tpm2.TPMCCCertifyCreation:       {name: "CertifyCreation", handles: 2},
	tpm2.TPMCCQuote:                 {name: "Quote", handles: 1},
	tpm2.TPMCCGetSessionAuditDigest: {name: "GetSessionAuditDigest", handles: 3},
	tpm2.TPMCCGetCommandAuditDigest: {name: "GetCommandAuditDigest", handles: 2, refused: audits},
	tpm2.TPMCCGetTime:               {name: "GetTime", handles: 2},
	tpm2.TPMCCCertifyX509:           {name: "CertifyX509", handles: 2},
	tpm2.TPMCCCommit:                {name: "Commit", handles: 1},
	tpm2.TPMCCECEphemeral:           {name: "EC_Ephemeral"},
	tpm2.TPMCCVerifySignature:       {name: "VerifySignature", handles: 1},
	tpm2.TPMCCSign:                  {name: "Sign", handles: 1},
	// Section 21: command audit.
	tpm2.TPMCCSetCommandCodeAuditStatus: {name: "SetCommandCodeAuditStatus", handles: 1, refused: audits},
	// Section 22: PCRs. Extends and resets of a measured one are refused in refuse.go.
	tpm2.TPMCCPCRExtend:        {name: "PCR_Extend", handles: 1},
	tpm2.TPMCCPCREvent:         {name: "PCR_Event", handles: 1},
	tpm2.TPMCCPCRRead:          {name: "PCR_Read"},
	tpm2.TPMCCPCRAllocate:      {name: "PCR_Allocate", handles: 1, refused: endsLog},
	tpm2.TPMCCPCRSetAuthPolicy: {name: "PCR_SetAuthPolicy", handles: 1, refused: endsLog},
	tpm2.TPMCCPCRSetAuthValue:  {name: "PCR_SetAuthValue", handles: 1, refused: endsLog},
	tpm2.TPMCCPCRReset:         {name: "PCR_Reset", handles: 1},
	// Section 23: enhanced authorization.
	tpm2.TPMCCPolicySigned:            {name: "PolicySigned", handles: 2},
	tpm2.TPMCCPolicySecret:            {name: "PolicySecret", handles: 2},
	tpm2.TPMCCPolicyTicket:            {name: "PolicyTicket", handles: 1},
	tpm2.TPMCCPolicyOR:                {name: "PolicyOR", handles: 1},
	tpm2.TPMCCPolicyPCR:               {name: "PolicyPCR", handles: 1},
	tpm2.TPMCCPolicyLocality:          {name: "PolicyLocality", handles: 1},
	tpm2.TPMCCPolicyNV:                {name: "PolicyNV", handles: 3},
	tpm2.TPMCCPolicyCounterTimer:      {name: "PolicyCounterTimer", handles: 1},
	tpm2.TPMCCPolicyCommandCode:       {name: "PolicyCommandCode", handles: 1},
	tpm2.TPMCCPolicyPhysicalPresence:  {name: "PolicyPhysicalPresence", handles: 1},
	tpm2.TPMCCPolicyCpHash:            {name: "PolicyCpHash", handles: 1},
	tpm2.TPMCCPolicyNameHash:          {name: "PolicyNameHash", handles: 1},
	tpm2.TPMCCPolicyDuplicationSelect: {name: "PolicyDuplicationSelect", handles: 1},
	tpm2.TPMCCPolicyAuthorize:         {name: "PolicyAuthorize", handles: 1},
	tpm2.TPMCCPolicyAuthValue:         {name: "PolicyAuthValue", handles: 1},
	tpm2.TPMCCPolicyPassword:          {name: "PolicyPassword", handles: 1},
	tpm2.TPMCCPolicyGetDigest:         {name: "PolicyGetDigest", handles: 1},
	tpm2.TPMCCPolicyNvWritten:         {name: "PolicyNvWritten", handles: 1},
	tpm2.TPMCCPolicyTemplate:          {name: "PolicyTemplate", handles: 1},
	tpm2.TPMCCPolicyAuthorizeNV:       {name: "PolicyAuthorizeNV", handles: 3},
	// Sections 24 and 25: hierarchies, dictionary attack protection. Of the former the owner's authorization value is the client's to
	// change, see refuse.go.
	tpm2.TPMCCCreatePrimary:              {name: "CreatePrimary", handles: 1, creates: true},
	tpm2.TPMCCHierarchyControl:           {name: "HierarchyControl", handles: 1, refused: ownerOfAll},
	tpm2.TPMCCSetPrimaryPolicy:           {name: "SetPrimaryPolicy", handles: 1, refused: ownerOfAll},
	tpm2.TPMCCChangePPS:                  {name: "ChangePPS", handles: 1, refused: ownerOfAll},
	tpm2.TPMCCChangeEPS:                  {name: "ChangeEPS", handles: 1, refused: ownerOfAll},
	tpm2.TPMCCClear:                      {name: "Clear", handles: 1, refused: ownerOfAll},
	tpm2.TPMCCClearControl:               {name: "ClearControl", handles: 1, refused: ownerOfAll},
	tpm2.TPMCCHierarchyChanegAuth:        {name: "HierarchyChangeAuth", handles: 1},
	tpm2.TPMCCDictionaryAttackLockReset:  {name: "DictionaryAttackLockReset", handles: 1, refused: unlocksAll},
	tpm2.TPMCCDictionaryAttackParameters: {name: "DictionaryAttackParameters", handles: 1, refused: unlocksAll},
	// Sections 26 and 27: physical presence, firmware.
	tpm2.TPMCCPPCommands:        {name: "PP_Commands", handles: 1, refused: ownerOfAll},
	tpm2.TPMCCSetAlgorithmSet:   {name: "SetAlgorithmSet", handles: 1, refused: firmware},
	tpm2.TPMCCFieldUpgradeStart: {name: "FieldUpgradeStart", handles: 2, refused: firmware},
	tpm2.TPMCCFieldUpgradeData:  {name: "FieldUpgradeData", refused: firmware},
	tpm2.TPMCCFirmwareRead:      {name: "FirmwareRead", refused: firmware},
	// Section 28: contexts. FlushContext's handle is a parameter.
	tpm2.TPMCCContextSave:  {name: "ContextSave", handles: 1},
	tpm2.TPMCCContextLoad:  {name: "ContextLoad", creates: true},
	tpm2.TPMCCFlushContext: {name: "FlushContext"},
	tpm2.TPMCCEvictControl: {name: "EvictControl", handles: 2},
	// Sections 29 and 30: clock and capabilities.
	tpm2.TPMCCReadClock:       {name: "ReadClock"},
	tpm2.TPMCCClockSet:        {name: "ClockSet", handles: 1, refused: movesClock},
	tpm2.TPMCCClockRateAdjust: {name: "ClockRateAdjust", handles: 1, refused: movesClock},
	tpm2.TPMCCGetCapability:   {name: "GetCapability"},
	tpm2.TPMCCTestParms:       {name: "TestParms"},
	// Section 31: non-volatile storage.
	tpm2.TPMCCNVDefineSpace:          {name: "NV_DefineSpace", handles: 1},
	tpm2.TPMCCNVUndefineSpace:        {name: "NV_UndefineSpace", handles: 2},
	tpm2.TPMCCNVUndefineSpaceSpecial: {name: "NV_UndefineSpaceSpecial", handles: 2},
	tpm2.TPMCCNVReadPublic:           {name: "NV_ReadPublic", handles: 1},
	tpm2.TPMCCNVWrite:                {name: "NV_Write", handles: 2},
	tpm2.TPMCCNVIncrement:            {name: "NV_Increment", handles: 2},
	tpm2.TPMCCNVExtend:               {name: "NV_Extend", handles: 2},
	tpm2.TPMCCNVSetBits:              {name: "NV_SetBits", handles: 2},
	tpm2.TPMCCNVWriteLock:            {name: "NV_WriteLock", handles: 2},
	tpm2.TPMCCNVGlobalWriteLock:      {name: "NV_GlobalWriteLock", handles: 1},
	tpm2.TPMCCNVRead:                 {name: "NV_Read", handles: 2},
	tpm2.TPMCCNVReadLock:             {name: "NV_ReadLock", handles: 2},
	tpm2.TPMCCNVChangeAuth:           {name: "NV_ChangeAuth", handles: 1},
	tpm2.TPMCCNVCertify:              {name: "NV_Certify", handles: 3},
	// Sections 32 and 33: attached components, authenticated countdown timers.
	tpm2.TPMCCACGetCapability:    {name: "AC_GetCapability", handles: 1, refused: attachments},
	tpm2.TPMCCACSend:             {name: "AC_Send", handles: 3, refused: attachments},
	tpm2.TPMCCPolicyACSendSelect: {name: "Policy_AC_SendSelect", handles: 1, refused: attachments},
	tpm2.TPMCCACTSetTimeout:      {name: "ACT_SetTimeout", handles: 1, refused: attachments},
}

// Command codes that go-tpm has no name for. Source: Part 2, section 6.5.2.
const (
	eccEncrypt tpm2.TPMCC = 0x199
	eccDecrypt tpm2.TPMCC = 0x19A
)
