package ima

import (
	"crypto"
	"encoding/hex"
	"fmt"
	"strings"

	// The digests that this package names must be linked in.
	_ "crypto/md5"
	_ "crypto/sha1"
	_ "crypto/sha256"
	_ "crypto/sha512"
)

// HashAlgo is a hash algorithm by the kernel's number. Source: enum hash_algo in include/uapi/linux/hash_info.h.
type HashAlgo uint8

// The kernel's numbers of the algorithms that IMA files and TPM banks name.
const (
	MD5     HashAlgo = 1
	SHA1    HashAlgo = 2
	RMD160  HashAlgo = 3
	SHA256  HashAlgo = 4
	SHA384  HashAlgo = 5
	SHA512  HashAlgo = 6
	SHA224  HashAlgo = 7
	RMD128  HashAlgo = 8
	RMD256  HashAlgo = 9
	RMD320  HashAlgo = 10
	WP256   HashAlgo = 11
	WP384   HashAlgo = 12
	WP512   HashAlgo = 13
	TGR128  HashAlgo = 14
	TGR160  HashAlgo = 15
	TGR192  HashAlgo = 16
	SM3     HashAlgo = 17
	SBOG256 HashAlgo = 18
	SBOG512 HashAlgo = 19
	SHA3256 HashAlgo = 20
	SHA3384 HashAlgo = 21
	SHA3512 HashAlgo = 22
)

// hashAlgos is indexed by HashAlgo: the name that files and policies use, the digest's size in bytes, and Go's number
// where the standard library computes it. Source: crypto/hash_info.c.
var hashAlgos = [...]struct {
	name string
	size int
	hash crypto.Hash
}{
	{"md4", 16, 0}, {"md5", 16, crypto.MD5}, {"sha1", 20, crypto.SHA1}, {"rmd160", 20, 0}, {"sha256", 32, crypto.SHA256},
	{"sha384", 48, crypto.SHA384}, {"sha512", 64, crypto.SHA512}, {"sha224", 28, crypto.SHA224}, {"rmd128", 16, 0},
	{"rmd256", 32, 0}, {"rmd320", 40, 0}, {"wp256", 32, 0}, {"wp384", 48, 0}, {"wp512", 64, 0}, {"tgr128", 16, 0},
	{"tgr160", 20, 0}, {"tgr192", 24, 0}, {"sm3", 32, 0}, {"streebog256", 32, 0}, {"streebog512", 64, 0},
	{"sha3-256", 32, 0}, {"sha3-384", 48, 0}, {"sha3-512", 64, 0},
}

// Valid reports whether the kernel knows an algorithm of that number.
func (a HashAlgo) Valid() bool { return int(a) < len(hashAlgos) }

// String returns the kernel's name, such as sha256.
func (a HashAlgo) String() string {
	if a.Valid() {
		return hashAlgos[a].name
	}
	return fmt.Sprintf("hash-algo-%d", uint8(a))
}

// Size returns the digest's size in bytes, 0 for an unknown algorithm.
func (a HashAlgo) Size() int {
	if a.Valid() {
		return hashAlgos[a].size
	}
	return 0
}

// Hash returns Go's implementation; ok is false where this program can't compute the algorithm itself.
func (a HashAlgo) Hash() (h crypto.Hash, ok bool) {
	if !a.Valid() || hashAlgos[a].hash == 0 {
		return 0, false
	}
	return hashAlgos[a].hash, true
}

// HashAlgoByName returns the algorithm of that kernel name.
func HashAlgoByName(name string) (HashAlgo, bool) {
	for i := range hashAlgos {
		if hashAlgos[i].name == name {
			return HashAlgo(i), true
		}
	}
	return 0, false
}

// MaxDigestSize is the size in bytes of the longest digest.
const MaxDigestSize = 64

// Digest is a hash value with its algorithm. It is comparable; the zero value means "none".
type Digest struct {
	algo HashAlgo
	size uint8
	b    [MaxDigestSize]byte
}

// NewDigest makes a Digest of a copy of sum. It is an error if sum's length is not the algorithm's.
func NewDigest(a HashAlgo, sum []byte) (Digest, error) {
	if !a.Valid() {
		return Digest{}, fmt.Errorf("digest: unknown hash algorithm number %d", uint8(a))
	}
	if len(sum) != a.Size() {
		return Digest{}, fmt.Errorf("digest: %s takes %d bytes, got %d", a, a.Size(), len(sum))
	}
	d := Digest{algo: a, size: uint8(len(sum))}
	copy(d.b[:], sum)
	return d, nil
}

// ZeroDigest returns the all-zero digest of an algorithm, which IMA writes for a violation.
func ZeroDigest(a HashAlgo) Digest { return Digest{algo: a, size: uint8(a.Size())} }

// Sum returns the digest of bytes. It is an error if this program can't compute the algorithm.
func Sum(a HashAlgo, b []byte) (Digest, error) {
	hash, ok := a.Hash()
	if !ok {
		return Digest{}, fmt.Errorf("digest: %s can't be computed here; choose sha256", a)
	}
	h := hash.New()
	h.Write(b)
	return NewDigest(a, h.Sum(nil))
}

// ParseDigest reads "sha256:HEX".
func ParseDigest(s string) (Digest, error) {
	name, hexSum, ok := strings.Cut(s, ":")
	if !ok {
		return Digest{}, fmt.Errorf("digest %q: want ALGORITHM:HEX", s)
	}
	a, ok := HashAlgoByName(name)
	if !ok {
		return Digest{}, fmt.Errorf("digest %q: unknown hash algorithm %q", s, name)
	}
	sum, err := hex.DecodeString(hexSum)
	if err != nil {
		return Digest{}, fmt.Errorf("digest %q: %w", s, err)
	}
	return NewDigest(a, sum)
}

// Algo returns the algorithm; it means nothing where IsNone.
func (d Digest) Algo() HashAlgo { return d.algo }

// IsNone reports whether d is the zero value: no digest at all.
func (d Digest) IsNone() bool { return d.size == 0 }

// IsZero reports whether all bytes of the digest are zero, as in a violation.
func (d Digest) IsZero() bool { return d.b == [MaxDigestSize]byte{} }

// Bytes returns a copy of the digest's bytes.
func (d Digest) Bytes() []byte { return append([]byte(nil), d.b[:d.size]...) }

// String returns "sha256:HEX", or "none".
func (d Digest) String() string {
	if d.IsNone() {
		return "none"
	}
	return d.algo.String() + ":" + hex.EncodeToString(d.b[:d.size])
}
