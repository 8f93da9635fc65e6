package binding

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
)

// Name is a TPM's Name of a key, its bytes: algorithm and digest of the public area. It names the key for good: another key has
// another Name. It is comparable; "" is none. Source: TPM 2.0 Part 1, section 16.
type Name string

// nameSizes are the digests' sizes by the TCG's algorithm numbers. Source: TCG Algorithm Registry, section 6.10.
var nameSizes = map[uint16]int{
	0x0004: 20, 0x000b: 32, 0x000c: 48, 0x000d: 64, // SHA-1, SHA-256, SHA-384, SHA-512
	0x0012: 32, 0x0027: 32, 0x0028: 48, 0x0029: 64, // SM3-256, SHA3-256, SHA3-384, SHA3-512
}

// NewName makes a Name of a TPM's bytes, which it copies.
func NewName(b []byte) (Name, error) {
	if len(b) < 2 {
		return "", fmt.Errorf("a Name of %d bytes: want the TCG's number of a hash algorithm and a digest", len(b))
	}
	algo := binary.BigEndian.Uint16(b)
	size, ok := nameSizes[algo]
	if !ok {
		return "", fmt.Errorf("a Name by hash algorithm %#04x, which is none of the TCG's", algo)
	}
	if len(b)-2 != size {
		return "", fmt.Errorf("a Name of %d bytes by hash algorithm %#04x: want %d", len(b), algo, 2+size)
	}
	return Name(b), nil
}

// ParseName reads a Name from hexadecimal digits, as String and tpm2-tools print it.
func ParseName(s string) (Name, error) {
	b, err := hex.DecodeString(s)
	if err != nil {
		return "", fmt.Errorf("name %q: %w", s, err)
	}
	return NewName(b)
}

// String returns small hexadecimal digits, "" for none.
func (n Name) String() string { return hex.EncodeToString([]byte(n)) }
