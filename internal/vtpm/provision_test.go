package vtpm

import (
	"crypto/ecdsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"math/big"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/need"
	"imans.dev/imans-agent/internal/tpmext"
)

func authority(t *testing.T) *Authority {
	t.Helper()
	a, err := OpenAuthority(filepath.Join(t.TempDir(), "ca"))
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func provisioned(t *testing.T, c Config, a *Authority, banks ...ima.HashAlgo) Identity {
	t.Helper()
	begun := time.Now()
	i, err := Provision(t.Context(), c, a, banks)
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("provisioned in %v", time.Since(begun))
	return i
}

// connect opens a connection that ends with the test.
func connect(t *testing.T, i *Instance) *tpmext.TPM {
	t.Helper()
	tpm, err := tpmext.Open(t.Context(), i.Address())
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tpm.Close() })
	return tpm
}

// readPublic returns a persistent key's public area and Name, as the TPM says.
func readPublic(t *testing.T, tpm *tpmext.TPM, handle tpm2.TPMHandle) (*ecdsa.PublicKey, string) {
	t.Helper()
	rsp, err := tpm2.ReadPublic{ObjectHandle: handle}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	public, err := rsp.OutPublic.Contents()
	if err != nil {
		t.Fatal(err)
	}
	key, err := tpm2.Pub(*public)
	if err != nil {
		t.Fatal(err)
	}
	return key.(*ecdsa.PublicKey), hex.EncodeToString(rsp.Name.Buffer)
}

func TestProvisionedIdentityIsTheTPMs(t *testing.T) {
	c, a := config(t), authority(t)
	identity := provisioned(t, c, a)
	if read, err := ReadIdentity(c.Dir); err != nil || read.EK != identity.EK || read.AK != identity.AK ||
		read.EKCertificate != identity.EKCertificate || !slices.Equal(read.Banks, identity.Banks) {
		t.Errorf("ReadIdentity: %+v, %v; want %+v", read, err, identity)
	}
	i := start(t, c)
	t.Cleanup(func() { i.Stop() })
	tpm := connect(t, i)
	if !slices.Equal(tpm.Banks(), identity.Banks) {
		t.Errorf("banks %v, recorded are %v", tpm.Banks(), identity.Banks)
	}
	ekPublic, ek := readPublic(t, tpm, EKHandle)
	if ek != identity.EK {
		t.Errorf("endorsement key %s, recorded is %s", ek, identity.EK)
	}
	der, err := os.ReadFile(identity.EKCertificate)
	if err != nil {
		t.Fatal(err)
	}
	certificate, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	if !ekPublic.Equal(certificate.PublicKey) {
		t.Error("the certificate is for another key")
	}
	index, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(EKCertificateIndex)}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	stored, err := tpm2.NVRead{
		AuthHandle: withoutPassword(tpm2.TPMRHOwner), NVIndex: tpm2.NamedHandle{Handle: EKCertificateIndex, Name: index.NVName},
		Size: uint16(len(der)),
	}.Execute(tpm)
	if err != nil || string(stored.Data.Buffer) != string(der) {
		t.Errorf("the certificate in NV is another, %v", err)
	}
	checkQuote(t, tpm, identity.AK)
}

// checkQuote has the attestation key quote PCR 10.
func checkQuote(t *testing.T, tpm *tpmext.TPM, ak string) {
	t.Helper()
	public, name := readPublic(t, tpm, AKHandle)
	if name != ak {
		t.Errorf("attestation key %s, recorded is %s", name, ak)
	}
	raw, err := hex.DecodeString(ak)
	if err != nil {
		t.Fatal(err)
	}
	quote, err := tpm2.Quote{
		SignHandle: tpm2.AuthHandle{Handle: AKHandle, Name: tpm2.TPM2BName{Buffer: raw}, Auth: tpm2.PasswordAuth(nil)},
		InScheme:   tpm2.TPMTSigScheme{Scheme: tpm2.TPMAlgNull},
		PCRSelect:  tpm2.TPMLPCRSelection{PCRSelections: []tpm2.TPMSPCRSelection{{Hash: tpm2.TPMAlgSHA256, PCRSelect: []byte{0, 4, 0}}}},
	}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	signature, err := quote.Signature.Signature.ECDSA()
	if err != nil {
		t.Fatal(err)
	}
	sum := sha256.Sum256(quote.Quoted.Bytes())
	r, s := new(big.Int).SetBytes(signature.SignatureR.Buffer), new(big.Int).SetBytes(signature.SignatureS.Buffer)
	if !ecdsa.Verify(public, sum[:], r, s) {
		t.Error("the quote's signature is not the attestation key's")
	}
}

// Other programs find what they look for: the same endorsement key by the profile's template, its certificate, a chain that holds.
func TestProvisionedIdentityByOtherPrograms(t *testing.T) {
	tools := need.Program(t, "tpm2_createek")
	openssl := need.Program(t, "openssl")
	c := config(t)
	ca := filepath.Join(t.TempDir(), "ca")
	a, err := OpenAuthority(ca)
	if err != nil {
		t.Fatal(err)
	}
	identity := provisioned(t, c, a)
	i := start(t, c)
	t.Cleanup(func() { i.Stop() })
	dir := t.TempDir()
	command := func(name string, args ...string) string {
		t.Helper()
		cmd := exec.Command(name, args...)
		cmd.Dir, cmd.Env = dir, append(os.Environ(), "TPM2TOOLS_TCTI=swtpm:path="+c.Socket)
		out, err := cmd.CombinedOutput()
		if err != nil {
			t.Fatalf("%s %s: %v\n%s", name, strings.Join(args, " "), err, out)
		}
		return string(out)
	}
	command(tools, "-G", "ecc", "-c", "ek.ctx", "-u", "ek.pub")
	if out := command("tpm2_readpublic", "-c", "ek.ctx"); !strings.Contains(out, identity.EK) {
		t.Errorf("tpm2_createek makes another key than %s:\n%s", identity.EK, out)
	}
	command("tpm2_nvread", "0x01c0000a", "-C", "o", "-o", "ek.der")
	command(openssl, "x509", "-inform", "DER", "-in", "ek.der", "-out", "ek.pem")
	command(openssl, "verify", "-CAfile", filepath.Join(ca, AuthorityCertificateName), "ek.pem")
	text := command(openssl, "x509", "-in", "ek.pem", "-noout", "-text")
	for _, want := range []string{"2.23.133.8.1", "2.23.133.2.1", "id:49424D00", "2.23.133.2.2", "swtpm", "2.23.133.2.3", "Key Agreement"} {
		if !strings.Contains(text, want) {
			t.Errorf("the certificate lacks %s:\n%s", want, text)
		}
	}
}

func TestProvisionBanks(t *testing.T) {
	c := config(t)
	want := []ima.HashAlgo{ima.SHA1, ima.SHA256}
	if got := provisioned(t, c, authority(t), want...).Banks; !slices.Equal(got, want) {
		t.Errorf("recorded banks %v, want %v", got, want)
	}
	i := start(t, c)
	t.Cleanup(func() { i.Stop() })
	if got := connect(t, i).Banks(); !slices.Equal(got, want) {
		t.Errorf("banks %v, want %v", got, want)
	}
	c = config(t)
	if _, err := Provision(t.Context(), c, authority(t), []ima.HashAlgo{ima.SM3}); err == nil || !strings.Contains(err.Error(), "choose among") {
		t.Errorf("a bank that swtpm lacks: %v", err)
	}
	if _, err := ReadIdentity(c.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("identity after a failed provisioning: %v, want os.ErrNotExist", err)
	}
}

// An identity is given to a new TPM only, and to a TPM 2.0 only.
func TestProvisionRefusesUsedFolders(t *testing.T) {
	c, a := config(t), authority(t)
	provisioned(t, c, a)
	if _, err := Provision(t.Context(), c, a, nil); err == nil || !strings.Contains(err.Error(), "has identity.json already") {
		t.Errorf("provisioned twice: %v", err)
	}
	used := config(t)
	if err := start(t, used).Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := Provision(t.Context(), used, a, nil); err == nil || !strings.Contains(err.Error(), "has process.json already") {
		t.Errorf("provisioned after use: %v", err)
	}
	old := config(t)
	old.Version = TPM12
	if _, err := Provision(t.Context(), old, a, nil); !errors.Is(err, tpmext.ErrVersion) {
		t.Errorf("TPM 1.2: %v, want ErrVersion", err)
	}
	if _, err := Start(t.Context(), old); !errors.Is(err, tpmext.ErrVersion) {
		t.Errorf("TPM 1.2 by socket: %v, want ErrVersion", err)
	}
}

// Whoever uses the TPM can't take its identity away, nor choose other banks.
func TestIdentityIsNotTheContainersToDelete(t *testing.T) {
	c := config(t)
	provisioned(t, c, authority(t))
	i := start(t, c)
	t.Cleanup(func() { i.Stop() })
	tpm := connect(t, i)
	_, err := tpm2.Clear{AuthHandle: withoutPassword(tpm2.TPMRHLockout)}.Execute(tpm)
	if !errors.Is(err, tpm2.TPMRCDisabled) {
		t.Errorf("TPM2_Clear: %v, want TPM_RC_DISABLED", err)
	}
	if err := tpm.AllocateBanks(t.Context(), []ima.HashAlgo{ima.SHA1}); !errors.Is(err, tpm2.TPMRCHierarchy) {
		t.Errorf("TPM2_PCR_Allocate: %v, want TPM_RC_HIERARCHY", err)
	}
	_, ak := readPublic(t, tpm, AKHandle)
	raw, err := hex.DecodeString(ak)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.EvictControl{
		Auth: withoutPassword(tpm2.TPMRHOwner), PersistentHandle: AKHandle,
		ObjectHandle: tpm2.NamedHandle{Handle: AKHandle, Name: tpm2.TPM2BName{Buffer: raw}},
	}.Execute(tpm)
	if err != nil { // this the owner may
		t.Fatal(err)
	}
	if _, again, err := makePrimary(tpm, akTemplate, AKHandle); err != nil || again != ak {
		t.Errorf("the attestation key made again is %s, %v; was %s", again, err, ak)
	}
	index, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(EKCertificateIndex)}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	_, err = tpm2.NVUndefineSpace{
		AuthHandle: withoutPassword(tpm2.TPMRHOwner), NVIndex: tpm2.NamedHandle{Handle: EKCertificateIndex, Name: index.NVName},
	}.Execute(tpm)
	if err == nil {
		t.Error("the owner deleted the certificate")
	}
}

func TestAuthorityIsKept(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "ca")
	first, err := OpenAuthority(dir)
	if err != nil {
		t.Fatal(err)
	}
	again, err := OpenAuthority(dir)
	if err != nil || !again.Certificate().Equal(first.Certificate()) {
		t.Errorf("another authority: %v", err)
	}
	key, certificate := filepath.Join(dir, AuthorityKeyName), filepath.Join(dir, AuthorityCertificateName)
	if st, err := os.Stat(key); err != nil || st.Mode().Perm() != 0o600 {
		t.Errorf("mode of the key: %v, %v", st.Mode(), err)
	}
	if err := os.Remove(certificate); err != nil { // as after a crash
		t.Fatal(err)
	}
	again, err = OpenAuthority(dir)
	if err != nil || !first.key.Equal(again.key) {
		t.Errorf("another key for the certificate that was lost: %v", err)
	}
	if err := os.Remove(key); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenAuthority(dir); !errors.Is(err, os.ErrNotExist) || !strings.Contains(err.Error(), "bring back what is missing") {
		t.Errorf("a lost key: %v", err)
	}
	if _, err := makeKey(key); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenAuthority(dir); err == nil || !strings.Contains(err.Error(), "is not the certificate of") {
		t.Errorf("another's key: %v", err)
	}
	if err := os.WriteFile(key, []byte("no PEM"), 0o600); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenAuthority(dir); err == nil || !strings.Contains(err.Error(), "no PRIVATE KEY in PEM") {
		t.Errorf("a broken key: %v", err)
	}
}
