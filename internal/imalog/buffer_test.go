package imalog

import (
	"bytes"
	"encoding/hex"
	"testing"

	"imans.dev/imans-agent/internal/ima"
)

// The entry of critical data is the kernel's: digest of the buffer, name of the event with its spaces turned, the buffer.
func TestNewBuffer(t *testing.T) {
	const sha256OfABC = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
	e, err := NewBuffer(11, "an event", ima.SHA256, []byte("abc"))
	if err != nil {
		t.Fatal(err)
	}
	digest, _ := hex.DecodeString(sha256OfABC)
	want := append([]byte{40, 0, 0, 0}, append([]byte("sha256:\x00"), digest...)...)
	want = append(append(want, 9, 0, 0, 0), "an_event\x00"...)
	want = append(append(want, 3, 0, 0, 0), "abc"...)
	if e.Template() != Buf || e.PCR() != 11 || e.Violation() || !bytes.Equal(e.Data(), want) {
		t.Errorf("%s, PCR %d, %x; want\n%x", e.Template(), e.PCR(), e.Data(), want)
	}
	if b, ok := e.Field("buf"); !ok || string(b) != "abc" || e.FileDigest().String() != "sha256:"+sha256OfABC {
		t.Errorf("buffer %q, digest %v", b, e.FileDigest())
	}
	if e, err := NewBuffer(10, "an event", ima.SHA256, nil); err == nil {
		t.Errorf("of nothing: %+v", e)
	}
	if e, err := NewBuffer(10, "an event", ima.SM3, []byte("abc")); err == nil {
		t.Errorf("by an algorithm that can't be computed: %+v", e)
	}
}
