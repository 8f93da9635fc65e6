package tpmext

import (
	"bytes"
	"context"
	"crypto/sha1"
	"errors"
	"strings"
	"testing"
	"time"

	"github.com/google/go-tpm/tpm2"
	"github.com/google/go-tpm/tpm2/transport"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/tpmext/tpmtest"
)

func TestTPM12(t *testing.T) {
	tpm := open(t, tpmtest.StartTPM12(t).Address())
	if banks := tpm.Banks(); len(banks) != 1 || banks[0] != ima.SHA1 {
		t.Fatalf("banks %v, want SHA-1 alone", banks)
	}
	for _, algo := range []ima.HashAlgo{ima.SHA1, ima.SHA256, ima.SHA512} {
		d, err := tpm.BootAggregate(t.Context(), algo)
		if want := StartedBootAggregate(tpm.Banks(), algo); err != nil || d != want || d.Algo() != ima.SHA1 {
			t.Errorf("boot aggregate for %v: %v, %v, want %v", algo, d, err, want)
		}
	}
	want := make([]byte, sha1.Size)
	for _, b := range []byte{1, 2} {
		if err := tpm.Extend(t.Context(), 10, digests(t, tpm.Banks(), b)); err != nil {
			t.Fatal(err)
		}
		sum := sha1.Sum(append(want, bytes.Repeat([]byte{b}, sha1.Size)...))
		want = sum[:]
	}
	got, err := tpm.ReadPCRs(t.Context(), 9, 10, 11)
	if err != nil || len(got) != 3 || !got[9][ima.SHA1].IsZero() || !got[11][ima.SHA1].IsZero() || !bytes.Equal(got[10][ima.SHA1].Bytes(), want) {
		t.Errorf("PCRs %v, %v, want PCR 10 %x", got, err, want)
	}
	if err := tpm.Reopen(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := read(t, tpm, 10)[ima.SHA1]; !bytes.Equal(got.Bytes(), want) {
		t.Errorf("PCR 10 is %v after Reopen, want %x", got, want)
	}
}

// Commands of a TPM 2.0 are refused by name, and wrong digests before anything is sent.
func TestTPM12Refuses(t *testing.T) {
	tpm := open(t, tpmtest.StartTPM12(t).Address())
	_, resets := tpm.Resets(t.Context())
	for name, err := range map[string]error{
		"Resets": resets, "ForbidClear": tpm.ForbidClear(t.Context()), "ClosePlatform": tpm.ClosePlatform(t.Context()),
	} {
		if !errors.Is(err, ErrVersion) {
			t.Errorf("%s: %v, want ErrVersion", name, err)
		}
	}
	one := digests(t, tpm.Banks(), 1)
	for name, ds := range map[string][]ima.Digest{"none": nil, "of another bank": digests(t, []ima.HashAlgo{ima.SHA256}, 1), "two": append(one, one...)} {
		if err := tpm.Extend(t.Context(), 10, ds); err == nil || errors.Is(err, ErrUnavailable) {
			t.Errorf("digests %s: %v, want a refusal", name, err)
		}
	}
	if got := read(t, tpm, 10)[ima.SHA1]; !got.IsZero() {
		t.Errorf("a refused extend made PCR 10 %v", got)
	}
	var code Code12
	if _, err := tpm.command12(t.Context(), ordinalPCRRead12, 255, nil); !errors.As(err, &code) || code != 2 || !strings.Contains(err.Error(), "0x2") {
		t.Errorf("PCR 255: %v, want TPM_BADINDEX", err)
	}
}

func TestTPM12Codes(t *testing.T) {
	swtpm := tpmtest.StartTPM12(t)
	const tagResponse12 = 0xc4 // TPM_TAG_RSP_COMMAND
	r := &refuser{tag: tagResponse12}
	tpm, err := OpenDialer(t.Context(), "refusing", func(ctx context.Context) (transport.TPMCloser, error) {
		conn, err := dialUnix(ctx, swtpm.Socket)
		r.TPMCloser = conn
		return r, err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer tpm.Close()
	for _, code := range []tpm2.TPMRC{retry12, testing12} {
		before := read(t, tpm, 10)[ima.SHA1]
		r.code, r.times = code, 4
		if err := tpm.Extend(t.Context(), 10, digests(t, tpm.Banks(), 1)); err != nil {
			t.Errorf("%#x: %v", uint32(code), err)
		}
		once := sha1.Sum(append(before.Bytes(), bytes.Repeat([]byte{1}, sha1.Size)...))
		if got := read(t, tpm, 10)[ima.SHA1]; !bytes.Equal(got.Bytes(), once[:]) {
			t.Errorf("%#x: PCR 10 is %v, want one extend", uint32(code), got)
		}
	}
	r.times, tpm.pauses.total = 1000, 10*time.Millisecond
	var always Code12
	if err := tpm.Extend(t.Context(), 10, digests(t, tpm.Banks(), 1)); !errors.As(err, &always) || always != Code12(testing12) {
		t.Errorf("always testing itself: %v", err)
	}
	for code, want := range map[tpm2.TPMRC]error{failedSelfTest12: ErrFailureMode, notStarted12: ErrNotStarted} {
		r.code = code
		if err := tpm.Extend(t.Context(), 10, digests(t, tpm.Banks(), 1)); !errors.Is(err, want) {
			t.Errorf("%#x: %v, want %v", uint32(code), err, want)
		}
	}
}

func TestTPM12NotStarted(t *testing.T) {
	if _, err := Open(t.Context(), tpmtest.StartTPM12Flags(t, "not-need-init").Address()); !errors.Is(err, ErrNotStarted) {
		t.Errorf("%v, want ErrNotStarted", err)
	}
}

// other12 extends PCR 3 of the real TPM before each read of PCR 10 but the first times, as another program would.
type other12 struct {
	transport.TPMCloser
	times int
}

func (o *other12) Send(b []byte) ([]byte, error) {
	if len(b) == headerSize+4 && b[headerSize+3] == 10 && o.times > 0 {
		o.times--
		extend := []byte{0, 0xc1, 0, 0, 0, 34, 0, 0, 0, ordinalExtend12, 0, 0, 0, 3}
		if _, err := o.TPMCloser.Send(append(extend, make([]byte, sha1.Size)...)); err != nil {
			return nil, err
		}
	}
	return o.TPMCloser.Send(b)
}

func TestTPM12OneMoment(t *testing.T) {
	swtpm := tpmtest.StartTPM12(t)
	o := &other12{}
	tpm, err := OpenDialer(t.Context(), "meddled", func(ctx context.Context) (transport.TPMCloser, error) {
		conn, err := dialUnix(ctx, swtpm.Socket)
		o.TPMCloser = conn
		return o, err
	})
	if err != nil {
		t.Fatal(err)
	}
	defer tpm.Close()
	o.times = 5
	got, err := tpm.ReadPCRs(t.Context(), 3, 10)
	if err != nil || o.times != 0 || got[3][ima.SHA1] != read(t, tpm, 3)[ima.SHA1] {
		t.Errorf("read %v, %v; want the value after the last extend", got[3], err)
	}
	o.times = 1000
	if _, err := tpm.ReadPCRs(t.Context(), 3, 10); !errors.Is(err, ErrUnstable) {
		t.Errorf("always overtaken: %v, want ErrUnstable", err)
	}
}

func TestSysfsDigest(t *testing.T) {
	if d, err := sysfsDigest("x", []byte(strings.Repeat("AB", sha1.Size)+"\n")); err != nil || d.String() != "sha1:"+strings.Repeat("ab", sha1.Size) {
		t.Errorf("%v, %v", d, err)
	}
	for _, text := range []string{"", "zz", "abcd"} {
		if d, err := sysfsDigest("x", []byte(text)); err == nil {
			t.Errorf("%q is %v", text, d)
		}
	}
}
