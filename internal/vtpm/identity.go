package vtpm

import (
	"crypto/x509"
	"encoding/json"
	"fmt"
	"os"
	"path/filepath"

	"github.com/google/go-tpm/tpm2"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/ima"
)

// Where a provisioned TPM has what. Source: TCG EK Credential Profile for TPM Family 2.0, section 2.2.1.4 (NV indexes of the low
// range), and swtpm_setup, which persists each endorsement key at the handle whose end is that of the NV index.
const (
	// EKHandle is the endorsement key's: ECC NIST P-256 by template L-2, the profile's default.
	EKHandle = 0x8101000a
	// EKCertificateIndex is the NV index of its certificate.
	EKCertificateIndex = 0x01c0000a
	// AKHandle is the attestation key's: ECC NIST P-256, restricted, ECDSA with SHA-256, no password. It is a primary key of the
	// endorsement hierarchy, so that it can be made again, the same, from the seed. The handle is outside the first 256, where tools
	// put the endorsement keys that they make.
	AKHandle = 0x81010100
)

// IdentityHandles returns the handles of what makes a provisioned TPM's identity.
func IdentityHandles() []tpm2.TPMHandle {
	return []tpm2.TPMHandle{EKHandle, EKCertificateIndex, AKHandle}
}

// Names in Config.Dir.
const (
	identityName      = "identity.json"
	ekCertificateName = "ek.der"
)

// Identity is what tells a provisioned TPM from all others. The container has no part in it.
type Identity struct {
	EK            string         // TPM Name of the endorsement key: 0x000b and the SHA-256 of its public area, in hexadecimal
	AK            string         // TPM Name of the attestation key
	EKCertificate string         // path of the endorsement key's certificate, DER
	Banks         []ima.HashAlgo // active PCR banks, in the TPM's order
}

// identityFile is how an Identity is kept.
type identityFile struct {
	EK            string   `json:"ek"`
	AK            string   `json:"ak"`
	EKCertificate string   `json:"ek_certificate"` // the file's name in the same folder
	Banks         []string `json:"banks"`
}

// ReadIdentity returns the identity of the TPM in a folder (Config.Dir). An error that is os.ErrNotExist: it was never provisioned.
func ReadIdentity(dir string) (Identity, error) {
	path := filepath.Join(dir, identityName)
	b, err := os.ReadFile(path)
	if err != nil {
		return Identity{}, fmt.Errorf("read the identity of a vTPM: %w", err)
	}
	var f identityFile
	if err := json.Unmarshal(b, &f); err != nil {
		return Identity{}, fmt.Errorf("read %s: %w; provision the vTPM anew", path, err)
	}
	if f.EKCertificate != ekCertificateName {
		return Identity{}, fmt.Errorf("read %s: the certificate %q is not that of this folder; provision the vTPM anew", path, f.EKCertificate)
	}
	i := Identity{EK: f.EK, AK: f.AK, EKCertificate: filepath.Join(dir, f.EKCertificate)}
	for _, name := range f.Banks {
		bank, ok := ima.HashAlgoByName(name)
		if !ok {
			return Identity{}, fmt.Errorf("read %s: %q is no bank; provision the vTPM anew", path, name)
		}
		i.Banks = append(i.Banks, bank)
	}
	return i, nil
}

// write is the commit point of Provision: before it the folder is half-made, after it the TPM has its identity.
func (i Identity) write(dir string) error {
	f := identityFile{EK: i.EK, AK: i.AK, EKCertificate: filepath.Base(i.EKCertificate)}
	for _, bank := range i.Banks {
		f.Banks = append(f.Banks, bank.String())
	}
	b, err := json.MarshalIndent(f, "", "  ")
	if err != nil {
		return err
	}
	return durable.WriteFile(filepath.Join(dir, identityName), append(b, '\n'))
}

// issuedBy makes sure that an identity's certificate is the authority's.
func (i Identity) issuedBy(a *Authority) error {
	der, err := os.ReadFile(i.EKCertificate)
	if err != nil {
		return err
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("parse %s: %w", i.EKCertificate, err)
	}
	return certificate.CheckSignatureFrom(a.certificate)
}
