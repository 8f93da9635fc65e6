package digest

import (
	"bytes"
	"testing"

	"imans.dev/imans-agent/internal/ima"
)

// FuzzAlgo: whatever the owner of a file writes into its security.ima, an algorithm that it says can be computed, and only the head of a
// digest or signature that names one says so.
func FuzzAlgo(f *testing.F) {
	f.Add(append([]byte{imaDigestNG, byte(ima.SHA256)}, make([]byte, 32)...))
	f.Add(append([]byte{imaSignature, 2, byte(ima.SHA512), 1, 2, 3, 4, 0, 8}, make([]byte, 8)...))
	f.Add(append([]byte{veritySignature, 3, byte(ima.SHA256), 1, 2, 3, 4, 0, 8}, make([]byte, 8)...))
	f.Add(append([]byte{imaDigest}, make([]byte, 20)...))
	f.Fuzz(func(t *testing.T, value []byte) {
		algo, ok := (&Attributes{IMA: bytes.Clone(value)}).Algo()
		if !ok {
			return
		}
		if _, computed := algo.Hash(); !computed {
			t.Fatalf("%x says %v, which is not computed", value, algo)
		}
		if value[0] == imaDigest {
			return
		}
		head := min(len(value), signatureHeader)
		behind := append(bytes.Clone(value[:head]), bytes.Repeat([]byte{0xff}, 1+len(value)-head)...)
		if again, ok := (&Attributes{IMA: behind}).Algo(); !ok || again != algo {
			t.Fatalf("%x says %v, with another end %v, %v", value, algo, again, ok)
		}
	})
}
