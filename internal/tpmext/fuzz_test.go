package tpmext

import (
	"context"
	"errors"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2/transport"

	"imans.dev/imans-agent/internal/ima"
)

// FuzzSysfsDigest: what sysfs shows of a register of a TPM 1.2 is taken as it is written, or refused.
func FuzzSysfsDigest(f *testing.F) {
	f.Add([]byte("DA39A3EE5E6B4B0D3255BFEF95601890AFD80709\n"))
	f.Add([]byte("DA39\n"))
	f.Fuzz(func(t *testing.T, text []byte) {
		d, err := sysfsDigest("fuzzed", text)
		if err != nil {
			return
		}
		if want := "sha1:" + strings.ToLower(strings.TrimSpace(string(text))); d.String() != want {
			t.Fatalf("%q is %v", text, d)
		}
	})
}

// FuzzResponses: whatever answers in a TPM's place, one response for each command, a read ends with an error or with values of the banks
// that it says it has.
func FuzzResponses(f *testing.F) {
	answer := func(body string) []byte {
		return append([]byte{0x80, 1, 0, 0, 0, byte(headerSize + len(body))}, body...)
	}
	f.Add(answer("\x00\x00\x00\x00"), true)
	f.Add(answer("\x00\x00\x00\x1e"), false) // TPM_BADTAG, by which a TPM 1.2 is known
	f.Add(answer("\x00\x00\x00\x00aaaaaaaaaaaaaaaaaaaa"), true)
	f.Add(append(answer("\x00\x00\x01\x00"), answer("\x00\x00\x01\x20")...), false)
	f.Fuzz(func(t *testing.T, responses []byte, tpm12 bool) {
		dial := func(context.Context) (transport.TPMCloser, error) {
			ours, theirs := net.Pipe()
			left := responses
			go func() { // takes whatever is written, and has all said at once
				buf := make([]byte, maxResponse)
				for {
					if _, err := theirs.Read(buf); err != nil {
						return
					}
					theirs.SetWriteDeadline(time.Now().Add(10 * time.Millisecond))
					n, err := theirs.Write(left)
					left = left[n:]
					if err != nil || len(left) == 0 {
						theirs.Close()
						return
					}
				}
			}()
			return &socket{conn: ours}, nil
		}
		ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
		defer cancel()
		tpm := &TPM{address: "fuzzed", dial: dial, tpm12: tpm12}
		if tpm12 {
			tpm.banks = []ima.HashAlgo{ima.SHA1}
		}
		err := tpm.Reopen(ctx)
		if err == nil {
			var values map[ima.HashAlgo]ima.Digest
			if values, err = tpm.ReadPCR(ctx, 10); err == nil && len(values) != len(tpm.Banks()) {
				t.Fatalf("values %v of banks %v", values, tpm.Banks())
			}
		}
		if err := tpm.Close(); err != nil && !errors.Is(err, net.ErrClosed) {
			t.Fatal(err)
		}
	})
}
