package tpmshare

import (
	"bytes"
	"encoding/hex"
	"testing"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/tpmext"
)

// extendAgent extends PCR 10 as a list does, by a digest of the given byte.
func extendAgent(t testing.TB, agent *tpmext.TPM, b byte) {
	t.Helper()
	var digests []ima.Digest
	for _, bank := range agent.Banks() {
		d, err := ima.NewDigest(bank, bytes.Repeat([]byte{b}, bank.Size()))
		if err != nil {
			t.Fatal(err)
		}
		digests = append(digests, d)
	}
	if err := agent.Extend(t.Context(), 10, digests); err != nil {
		t.Fatal(err)
	}
}

// pcr10 returns the SHA-256 bank's PCR 10.
func pcr10(t testing.TB, agent *tpmext.TPM) string {
	t.Helper()
	values, err := agent.ReadPCR(t.Context(), 10)
	if err != nil {
		t.Fatal(err)
	}
	return hex.EncodeToString(values[ima.SHA256].Bytes())
}
