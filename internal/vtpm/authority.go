package vtpm

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"os"
	"path/filepath"
	"time"

	"imans.dev/imans-agent/internal/durable"
)

// Names in the folder of an Authority.
const (
	// AuthorityKeyName is the file of the authority's private key, PKCS #8 in PEM, for root only.
	AuthorityKeyName = "ek-ca.key"
	// AuthorityCertificateName is the file of its certificate in PEM: what a verifier is given to trust.
	AuthorityCertificateName = "ek-ca.pem"
)

// Authority issues the certificates of endorsement keys. It is this machine's own: a certificate says that its agent made the
// vTPM, and what that is worth is what the hardware TPM shows of the machine. Its methods may be called from several goroutines.
type Authority struct {
	key         *ecdsa.PrivateKey
	certificate *x509.Certificate
}

// noExpiry is how a certificate says that it has no end. Source: RFC 5280, section 4.1.2.5.
var noExpiry = time.Date(9999, 12, 31, 23, 59, 59, 0, time.UTC)

// clockSkew is how far a verifier's clock may be behind this machine's.
const clockSkew = time.Hour

// OpenAuthority opens the authority that is kept in a folder, or makes one if the folder has none. A crash while it is made leaves
// none, or its key, for which the next call makes the certificate.
func OpenAuthority(dir string) (*Authority, error) {
	a, err := openAuthority(dir)
	if err != nil {
		return nil, fmt.Errorf("open the authority in %s: %w; bring back what is missing or broken, or move the folder away to have a "+
			"new authority made", dir, err)
	}
	return a, nil
}

func openAuthority(dir string) (*Authority, error) {
	if err := durable.Mkdir(dir); err != nil {
		return nil, err
	}
	certificate, err := readCertificate(filepath.Join(dir, AuthorityCertificateName))
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, err
	}
	key, err := readKey(filepath.Join(dir, AuthorityKeyName))
	if errors.Is(err, os.ErrNotExist) && certificate == nil {
		key, err = makeKey(filepath.Join(dir, AuthorityKeyName))
	}
	if err != nil {
		return nil, err
	}
	if certificate == nil {
		if certificate, err = makeCertificate(filepath.Join(dir, AuthorityCertificateName), key); err != nil {
			return nil, err
		}
	}
	if !key.PublicKey.Equal(certificate.PublicKey) {
		return nil, fmt.Errorf("%s is not the certificate of %s", AuthorityCertificateName, AuthorityKeyName)
	}
	return &Authority{key: key, certificate: certificate}, nil
}

// Certificate returns the authority's certificate, which is not to be changed.
func (a *Authority) Certificate() *x509.Certificate { return a.certificate }

func makeKey(path string) (*ecdsa.PrivateKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return key, durable.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}))
}

func readKey(path string) (*ecdsa.PrivateKey, error) {
	der, err := readPEM(path, "PRIVATE KEY")
	if err != nil {
		return nil, err
	}
	key, err := x509.ParsePKCS8PrivateKey(der)
	if err != nil {
		return nil, fmt.Errorf("parse %s: %w", path, err)
	}
	ec, ok := key.(*ecdsa.PrivateKey)
	if !ok {
		return nil, fmt.Errorf("parse %s: it is no ECDSA key", path)
	}
	return ec, nil
}

func makeCertificate(path string, key *ecdsa.PrivateKey) (*x509.Certificate, error) {
	host, err := os.Hostname()
	if err != nil {
		return nil, err
	}
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: "imans-agent vTPM EK CA of " + host},
		NotBefore:             time.Now().Add(-clockSkew),
		NotAfter:              noExpiry,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
		BasicConstraintsValid: true,
		IsCA:                  true,
		MaxPathLenZero:        true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, key.Public(), key)
	if err != nil {
		return nil, err
	}
	if err := durable.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})); err != nil {
		return nil, err
	}
	return x509.ParseCertificate(der)
}

func readCertificate(path string) (*x509.Certificate, error) {
	der, err := readPEM(path, "CERTIFICATE")
	if err != nil {
		return nil, err
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse %s: %w", path, err)
	}
	return c, nil
}

func readPEM(path, kind string) ([]byte, error) {
	b, err := os.ReadFile(path)
	if err != nil {
		return nil, err
	}
	block, _ := pem.Decode(b)
	if block == nil || block.Type != kind {
		return nil, fmt.Errorf("parse %s: it is no %s in PEM", path, kind)
	}
	return block.Bytes, nil
}

// newSerial returns a serial number that no other certificate has: 127 random bits.
func newSerial() (*big.Int, error) {
	return rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 127))
}

// maker is what a TPM says of itself, as the certificate of its endorsement key repeats it.
type maker struct {
	manufacturer string // such as id:00001014
	model        string
	version      string // of the firmware, such as id:20191023
	revision     int    // of the TPM 2.0 Library Specification, in hundredths
}

// Object identifiers of the TCG. Source: TCG EK Credential Profile for TPM Family 2.0, section 3.
var (
	oidEKCertificate    = asn1.ObjectIdentifier{2, 23, 133, 8, 1}
	oidTPMManufacturer  = asn1.ObjectIdentifier{2, 23, 133, 2, 1}
	oidTPMModel         = asn1.ObjectIdentifier{2, 23, 133, 2, 2}
	oidTPMVersion       = asn1.ObjectIdentifier{2, 23, 133, 2, 3}
	oidTPMSpecification = asn1.ObjectIdentifier{2, 23, 133, 2, 16}

	oidSubjectAltName             = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidSubjectDirectoryAttributes = asn1.ObjectIdentifier{2, 5, 29, 9}
)

// issue makes the certificate of an ECC endorsement key, in DER, as the TCG EK Credential Profile has it. name is the subject's.
func (a *Authority) issue(key *ecdsa.PublicKey, name string, m maker) ([]byte, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	alternative, err := alternativeName(m)
	if err != nil {
		return nil, err
	}
	attributes, err := specification(m.revision)
	if err != nil {
		return nil, err
	}
	template := &x509.Certificate{
		SerialNumber:          serial,
		Subject:               pkix.Name{CommonName: name},
		NotBefore:             time.Now().Add(-clockSkew),
		NotAfter:              noExpiry,
		KeyUsage:              x509.KeyUsageKeyAgreement,
		UnknownExtKeyUsage:    []asn1.ObjectIdentifier{oidEKCertificate},
		BasicConstraintsValid: true,
		ExtraExtensions: []pkix.Extension{
			{Id: oidSubjectAltName, Value: alternative},
			{Id: oidSubjectDirectoryAttributes, Value: attributes},
		},
	}
	return x509.CreateCertificate(rand.Reader, template, a.certificate, key, a.key)
}

// alternativeName encodes GeneralNames with one directoryName that names manufacturer, model and version.
func alternativeName(m maker) ([]byte, error) {
	var names pkix.RDNSequence
	for _, n := range []struct {
		oid   asn1.ObjectIdentifier
		value string
	}{{oidTPMManufacturer, m.manufacturer}, {oidTPMModel, m.model}, {oidTPMVersion, m.version}} {
		value := asn1.RawValue{Class: asn1.ClassUniversal, Tag: asn1.TagUTF8String, Bytes: []byte(n.value)}
		names = append(names, pkix.RelativeDistinguishedNameSET{{Type: n.oid, Value: value}})
	}
	der, err := asn1.Marshal(names)
	if err != nil {
		return nil, err
	}
	const directoryName = 4
	return asn1.Marshal([]asn1.RawValue{{Class: asn1.ClassContextSpecific, Tag: directoryName, IsCompound: true, Bytes: der}})
}

// specification encodes SubjectDirectoryAttributes with the TPMSpecification: family, level, revision.
func specification(revision int) ([]byte, error) {
	type tpmSpecification struct {
		Family   string `asn1:"utf8"`
		Level    int
		Revision int
	}
	type attribute struct {
		Type   asn1.ObjectIdentifier
		Values []tpmSpecification `asn1:"set"`
	}
	return asn1.Marshal([]attribute{{oidTPMSpecification, []tpmSpecification{{Family: "2.0", Revision: revision}}}})
}
