package imalog

import (
	"crypto/sha1"
	"crypto/sha256"
	"crypto/sha512"
	"errors"
	"fmt"

	"imans.dev/imans-agent/internal/ima"
)

// ErrBank says that the digests of a bank can't be computed here.
var ErrBank = errors.New("not one of the banks sha1, sha256, sha384, sha512")

// CheckBank returns nil for the banks whose digests this program computes, else an error that is ErrBank.
func CheckBank(bank ima.HashAlgo) error {
	switch bank {
	case ima.SHA1, ima.SHA256, ima.SHA384, ima.SHA512:
		return nil
	}
	return fmt.Errorf("bank %s: %w", bank, ErrBank)
}

// appendSum appends the bank's hash of data. It allocates nothing where dst has room: this is what a replay spends its
// time on.
func appendSum(dst []byte, bank ima.HashAlgo, data []byte) []byte {
	switch bank {
	case ima.SHA1:
		s := sha1.Sum(data)
		return append(dst, s[:]...)
	case ima.SHA256:
		s := sha256.Sum256(data)
		return append(dst, s[:]...)
	case ima.SHA384:
		s := sha512.Sum384(data)
		return append(dst, s[:]...)
	case ima.SHA512:
		s := sha512.Sum512(data)
		return append(dst, s[:]...)
	}
	panic("imalog: " + CheckBank(bank).Error())
}

// AppendDigest appends the bytes of Digest. It panics for a bank that CheckBank refuses.
func (e *Entry) AppendDigest(dst []byte, bank ima.HashAlgo) []byte {
	if e.violation {
		return appendFill(dst, bank, 0)
	}
	return e.appendDataSum(dst, bank)
}

// AppendExtendDigest appends the bytes of ExtendDigest. It panics for a bank that CheckBank refuses.
func (e *Entry) AppendExtendDigest(dst []byte, bank ima.HashAlgo) []byte {
	if e.violation {
		return appendFill(dst, bank, 0xff)
	}
	return e.appendDataSum(dst, bank)
}

// appendDataSum hashes what the template digest covers. Source: ima_crypto.c, ima_calc_field_array_hash_tfm.
func (e *Entry) appendDataSum(dst []byte, bank ima.HashAlgo) []byte {
	if e.template.name != IMA {
		return appendSum(dst, bank, e.data)
	}
	var padded [legacyDigestSize + legacyNameMax + 1]byte
	copy(padded[:], e.data[4:4+legacyDigestSize])
	copy(padded[legacyDigestSize:], e.data[4+legacyDigestSize+4:])
	return appendSum(dst, bank, padded[:])
}

func appendFill(dst []byte, bank ima.HashAlgo, c byte) []byte {
	if err := CheckBank(bank); err != nil {
		panic("imalog: " + err.Error())
	}
	for range bank.Size() {
		dst = append(dst, c)
	}
	return dst
}
