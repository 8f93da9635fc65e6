package namespace

import (
	"testing"

	"imans.dev/imans-agent/internal/digest"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// A file is hashed as its signature was, where the template shows that, and with SHA-1 where the template has no room for more.
func TestAlgoOfAnEntry(t *testing.T) {
	sha512 := &digest.Attributes{IMA: append([]byte{3, 2, 6}, make([]byte, 60)...)}
	for name, c := range map[string]struct {
		template string
		attrs    *digest.Attributes
		want     ima.HashAlgo
	}{
		"not shown":            {imalog.NG, sha512, ima.SHA256},
		"shown":                {imalog.Sig, sha512, ima.SHA512},
		"shown, with all":      {imalog.EVMSig, sha512, ima.SHA512},
		"not to be had":        {imalog.Sig, nil, ima.SHA256},
		"unsigned":             {imalog.Sig, &digest.Attributes{}, ima.SHA256},
		"no room":              {imalog.IMA, sha512, ima.SHA1},
		"no room, but shown":   {"d|n|sig", sha512, ima.SHA1},
		"of a buffer, no file": {imalog.Buf, sha512, ima.SHA256},
	} {
		l := &look{ev: &event.File{RealFS: event.FileSystem{Magic: 0xef53}}, attrs: c.attrs, asked: true}
		n := &State{algo: ima.SHA256}
		if got := l.algo(n, n, c.template); got != c.want {
			t.Errorf("%s: %v, want %v", name, got, c.want)
		}
	}
}

// The owners are those of the event; a template that shows no attributes gets none.
func TestFillAttributes(t *testing.T) {
	l := &look{
		ev:    &event.File{RealFS: event.FileSystem{Magic: 0xef53}, FOwner: 7, FGroup: 8},
		attrs: &digest.Attributes{EVM: []byte{5}, Mode: 0o100755}, asked: true,
	}
	var v imalog.FieldValues
	if l.fill(&v, nil, imalog.NG); v.File || v.EVMSig != nil {
		t.Errorf("for %s: %+v", imalog.NG, v)
	}
	if l.fill(&v, nil, imalog.EVMSig); !v.File || v.IUID != 7 || v.IGID != 8 || v.IMode != 0o100755 || len(v.EVMSig) != 1 {
		t.Errorf("for %s: %+v", imalog.EVMSig, v)
	}
	if l.shown(nil, imalog.EVMSig) != [32]byte{} {
		t.Error("attributes count where the kernel does not look at them again")
	}
	l.ev.Flags |= event.Overlay
	before := l.shown(nil, imalog.EVMSig)
	l.attrs.Mode ^= 0o20
	if l.shown(nil, imalog.EVMSig) == before || l.shown(nil, imalog.NG) != [32]byte{} {
		t.Error("another mode on an overlay is not noticed, or where it is not shown")
	}
}
