package vtpm

import (
	"context"
	"crypto/ecdsa"
	"encoding/hex"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"

	"github.com/google/go-tpm/tpm2"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/tpmext"
)

// Provision makes a TPM in a new folder and gives it its identity: keys, certificate, banks (nil: those that swtpm has by default).
// The TPM does not run afterwards; Start starts it. Of the configuration Program, Dir and User count. It takes two starts of swtpm
// if banks are chosen, otherwise one. A crash leaves a folder without identity, to be removed.
func Provision(ctx context.Context, c Config, a *Authority, banks []ima.HashAlgo) (Identity, error) {
	identity, err := provision(ctx, c, a, banks)
	if err != nil {
		return Identity{}, fmt.Errorf("provision vTPM in %s: %w", c.Dir, err)
	}
	return identity, nil
}

func provision(ctx context.Context, c Config, a *Authority, banks []ima.HashAlgo) (Identity, error) {
	if c.Version != TPM20 {
		return Identity{}, tpmext.ErrVersion
	}
	c.Socket, c.Proxy = "", false
	if err := durable.Mkdir(c.Dir); err != nil {
		return Identity{}, err
	}
	for _, name := range []string{recordName, identityName, stateName} {
		if _, err := os.Lstat(filepath.Join(c.Dir, name)); err == nil {
			return Identity{}, fmt.Errorf("it has %s already: an identity is given once, to a new TPM; choose another folder", name)
		}
	}
	lock, err := takeOver(ctx, c)
	if err != nil {
		return Identity{}, err
	}
	defer lock.Close()
	ctx, cancel := context.WithTimeout(ctx, startTimeout)
	defer cancel()
	if banks != nil {
		err := session(ctx, c, lock, func(tpm *tpmext.TPM) error { return allocate(ctx, tpm, banks) })
		if err != nil {
			return Identity{}, err
		}
	}
	var identity Identity
	err = session(ctx, c, lock, func(tpm *tpmext.TPM) (err error) {
		identity, err = identify(ctx, c, tpm, a)
		return err
	})
	if err != nil {
		return Identity{}, err
	}
	if err := syncState(c); err != nil {
		return Identity{}, err
	}
	fault.GrantMade.Pass()
	return identity, identity.write(c.Dir)
}

// session runs swtpm for the length of do, and has it save everything.
func session(ctx context.Context, c Config, lock *os.File, do func(*tpmext.TPM) error) error {
	p, err := run(c, lock, nil)
	if err != nil {
		return err
	}
	defer p.kill()
	tpm, err := p.open(ctx, c.socketAddress())
	if err != nil {
		return err
	}
	err = do(tpm)
	if err == nil {
		_, err = tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}.Execute(tpm)
	}
	return errors.Join(err, tpm.Close())
}

// allocate has the next session begin with the given banks.
func allocate(ctx context.Context, tpm *tpmext.TPM, banks []ima.HashAlgo) error {
	active := tpm.Banks()
	if len(active) == len(banks) && !slices.ContainsFunc(banks, func(b ima.HashAlgo) bool { return !slices.Contains(active, b) }) {
		return nil
	}
	return tpm.AllocateBanks(ctx, banks)
}

// identify makes keys and certificate, and sees to it that the container can't delete them by TPM2_Clear.
func identify(ctx context.Context, c Config, tpm *tpmext.TPM, a *Authority) (Identity, error) {
	ekPublic, ek, err := makePrimary(tpm, tpm2.ECCEKTemplate, EKHandle)
	if err != nil {
		return Identity{}, fmt.Errorf("make the endorsement key: %w", err)
	}
	_, ak, err := makePrimary(tpm, akTemplate, AKHandle)
	if err != nil {
		return Identity{}, fmt.Errorf("make the attestation key: %w", err)
	}
	m, err := askMaker(tpm)
	if err != nil {
		return Identity{}, fmt.Errorf("ask for the TPM's maker: %w", err)
	}
	der, err := a.issue(ekPublic, "vTPM "+ek, m)
	if err != nil {
		return Identity{}, fmt.Errorf("issue the endorsement key's certificate: %w", err)
	}
	if err := writeEKCertificate(tpm, der); err != nil {
		return Identity{}, fmt.Errorf("store the endorsement key's certificate: %w", err)
	}
	if err := tpm.ForbidClear(ctx); err != nil {
		return Identity{}, err
	}
	path := filepath.Join(c.Dir, ekCertificateName)
	return Identity{EK: ek, AK: ak, EKCertificate: path, Banks: tpm.Banks()}, durable.WriteFile(path, der)
}

// akTemplate is the attestation key: it signs only what the TPM itself made.
var akTemplate = tpm2.TPMTPublic{
	Type:    tpm2.TPMAlgECC,
	NameAlg: tpm2.TPMAlgSHA256,
	ObjectAttributes: tpm2.TPMAObject{
		FixedTPM: true, FixedParent: true, SensitiveDataOrigin: true, UserWithAuth: true, NoDA: true,
		Restricted: true, SignEncrypt: true,
	},
	Parameters: tpm2.NewTPMUPublicParms(tpm2.TPMAlgECC, &tpm2.TPMSECCParms{
		Scheme: tpm2.TPMTECCScheme{
			Scheme:  tpm2.TPMAlgECDSA,
			Details: tpm2.NewTPMUAsymScheme(tpm2.TPMAlgECDSA, &tpm2.TPMSSigSchemeECDSA{HashAlg: tpm2.TPMAlgSHA256}),
		},
		CurveID: tpm2.TPMECCNistP256,
	}),
	Unique: tpm2.NewTPMUPublicID(tpm2.TPMAlgECC, &tpm2.TPMSECCPoint{}),
}

// withoutPassword authorizes with the empty password that a new TPM's hierarchies have.
func withoutPassword(hierarchy tpm2.TPMHandle) tpm2.AuthHandle {
	return tpm2.AuthHandle{Handle: hierarchy, Auth: tpm2.PasswordAuth(nil)}
}

// makePrimary makes an ECC key of the endorsement hierarchy, persists it, and returns its public key and its Name.
func makePrimary(tpm *tpmext.TPM, template tpm2.TPMTPublic, at tpm2.TPMHandle) (*ecdsa.PublicKey, string, error) {
	key, err := tpm2.CreatePrimary{
		PrimaryHandle: withoutPassword(tpm2.TPMRHEndorsement), InPublic: tpm2.New2B(template),
	}.Execute(tpm)
	if err != nil {
		return nil, "", fmt.Errorf("TPM2_CreatePrimary: %w", err)
	}
	_, err = tpm2.EvictControl{
		Auth:             withoutPassword(tpm2.TPMRHOwner),
		ObjectHandle:     tpm2.NamedHandle{Handle: key.ObjectHandle, Name: key.Name},
		PersistentHandle: at,
	}.Execute(tpm)
	if err != nil {
		return nil, "", fmt.Errorf("TPM2_EvictControl to %#x: %w", at, err)
	}
	if _, err := (tpm2.FlushContext{FlushHandle: key.ObjectHandle}).Execute(tpm); err != nil {
		return nil, "", fmt.Errorf("TPM2_FlushContext: %w", err)
	}
	public, err := key.OutPublic.Contents()
	if err != nil {
		return nil, "", err
	}
	decoded, err := tpm2.Pub(*public)
	if err != nil {
		return nil, "", err
	}
	ec, ok := decoded.(*ecdsa.PublicKey)
	if !ok {
		return nil, "", fmt.Errorf("a key of type %T", decoded)
	}
	return ec, hex.EncodeToString(key.Name.Buffer), nil
}

// askMaker reads what the TPM says of itself.
func askMaker(tpm *tpmext.TPM) (maker, error) {
	rsp, err := tpm2.GetCapability{
		Capability: tpm2.TPMCapTPMProperties, Property: uint32(tpm2.TPMPTRevision),
		PropertyCount: uint32(tpm2.TPMPTFirmwareVersion1-tpm2.TPMPTRevision) + 1,
	}.Execute(tpm)
	if err != nil {
		return maker{}, fmt.Errorf("TPM2_GetCapability: %w", err)
	}
	properties, err := rsp.CapabilityData.Data.TPMProperties()
	if err != nil {
		return maker{}, err
	}
	m := maker{model: "swtpm"}
	for _, p := range properties.TPMProperty {
		switch p.Property {
		case tpm2.TPMPTRevision:
			m.revision = int(p.Value)
		case tpm2.TPMPTManufacturer:
			m.manufacturer = fmt.Sprintf("id:%08X", p.Value)
		case tpm2.TPMPTFirmwareVersion1:
			m.version = fmt.Sprintf("id:%08X", p.Value)
		}
	}
	return m, nil
}

// nvPiece is how much is written at once; each TPM takes that much (TPM_PT_NV_BUFFER_MAX is 1,024 in swtpm).
const nvPiece = 512

// writeEKCertificate puts the certificate where software looks for it. Only the platform can write or delete it there, and the
// platform is closed before anyone uses the TPM. Source: TCG PC Client Platform TPM Profile, section 4.5 (NV attributes).
func writeEKCertificate(tpm *tpmext.TPM, der []byte) error {
	platform := withoutPassword(tpm2.TPMRHPlatform)
	public := tpm2.New2B(tpm2.TPMSNVPublic{
		NVIndex: EKCertificateIndex,
		NameAlg: tpm2.TPMAlgSHA256,
		Attributes: tpm2.TPMANV{
			PPWrite: true, PPRead: true, OwnerRead: true, AuthRead: true, NoDA: true, PlatformCreate: true, NT: tpm2.TPMNTOrdinary,
		},
		DataSize: uint16(len(der)),
	})
	if _, err := (tpm2.NVDefineSpace{AuthHandle: platform, PublicInfo: public}).Execute(tpm); err != nil {
		return fmt.Errorf("TPM2_NV_DefineSpace %#x: %w", EKCertificateIndex, err)
	}
	offset := 0
	for piece := range slices.Chunk(der, nvPiece) {
		index, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(EKCertificateIndex)}.Execute(tpm)
		if err != nil {
			return fmt.Errorf("TPM2_NV_ReadPublic %#x: %w", EKCertificateIndex, err)
		}
		_, err = tpm2.NVWrite{
			AuthHandle: platform,
			NVIndex:    tpm2.NamedHandle{Handle: EKCertificateIndex, Name: index.NVName}, // the first write changes the name
			Data:       tpm2.TPM2BMaxNVBuffer{Buffer: piece},
			Offset:     uint16(offset),
		}.Execute(tpm)
		if err != nil {
			return fmt.Errorf("TPM2_NV_Write %#x at %d: %w", EKCertificateIndex, offset, err)
		}
		offset += len(piece)
	}
	return nil
}
