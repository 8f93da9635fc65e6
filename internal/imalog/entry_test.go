package imalog

import (
	"bytes"
	"encoding/hex"
	"errors"
	"regexp"
	"strings"
	"testing"
	"unsafe"

	"imans.dev/imans-agent/internal/ima"
)

func TestNewEntryRefuses(t *testing.T) {
	sha1, sha256, md5 := ima.ZeroDigest(ima.SHA1), ima.ZeroDigest(ima.SHA256), ima.ZeroDigest(ima.MD5)
	tests := []struct {
		name     string
		pcr      int
		template string
		values   FieldValues
		reason   string
	}{
		{"no digest", 10, NG, FieldValues{Name: "/a"}, "no digest"},
		{"no name", 10, NG, FieldValues{Digest: sha256}, "at least a byte"},
		{"zero in the name", 10, NG, FieldValues{Digest: sha256, Name: "/a\x00b"}, "no zero"},
		{"PCR 24", 24, NG, FieldValues{Digest: sha256, Name: "/a"}, "PCR 24"},
		{"PCR -1", -1, NG, FieldValues{Digest: sha256, Name: "/a"}, "PCR -1"},
		{"unknown template", 10, "ima-ngv3", FieldValues{Digest: sha256, Name: "/a"}, "ima-ng"},
		{"unknown field", 10, "d-ng|name", FieldValues{Digest: sha256, Name: "/a"}, `unknown field "name"`},
		{"empty field", 10, "d-ng||n-ng", FieldValues{Digest: sha256, Name: "/a"}, `unknown field ""`},
		{"16 fields", 10, strings.Repeat("sig|", 15) + "sig", FieldValues{Digest: sha256, Name: "/a"}, "at most 15"},
		{"sha256 cut to 20 bytes", 10, IMA, FieldValues{Digest: sha256, Name: "/a"}, "sha1 digest, not sha256"},
		{"md5 in ima", 10, IMA, FieldValues{Digest: md5, Name: "/a"}, "sha1 digest, not md5"},
		{"sha256 in d", 10, "d|n", FieldValues{Digest: sha256, Name: "/a"}, "sha1 or md5"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if _, err := NewEntry(tt.pcr, tt.template, tt.values); err == nil || !strings.Contains(err.Error(), tt.reason) {
				t.Errorf("got %v, want %q", err, tt.reason)
			}
		})
	}
	if _, err := NewViolation(10, NG, FieldValues{Name: "/a"}); err == nil {
		t.Error("a violation without an algorithm was made")
	}
	if err := CheckDigest(IMA, ima.SHA256); err == nil {
		t.Error("CheckDigest(ima, sha256) passed")
	}
	err := errors.Join(CheckDigest(IMA, sha1.Algo()), CheckDigest(NG, ima.SHA512), CheckTemplate("d-ng|n-ng"))
	if err != nil {
		t.Error(err)
	}
}

func TestDigests(t *testing.T) {
	e := sample(t, NG, "/a")
	v, err := NewViolation(10, NG, sampleValues(t, "/a"))
	if err != nil {
		t.Fatal(err)
	}
	for _, bank := range banks() {
		if d := v.Digest(bank); !d.IsZero() || d.Algo() != bank {
			t.Errorf("violation's digest %v", d)
		}
		if got := v.ExtendDigest(bank).String(); got != bank.String()+":"+strings.Repeat("ff", bank.Size()) {
			t.Errorf("violation extends %s", got)
		}
		if e.Digest(bank).IsZero() || e.Digest(bank) != e.ExtendDigest(bank) {
			t.Errorf("entry's digest %v, extends %v", e.Digest(bank), e.ExtendDigest(bank))
		}
	}
	for _, bank := range []ima.HashAlgo{ima.MD5, ima.SM3, 200} {
		if !errors.Is(CheckBank(bank), ErrBank) || !e.Digest(bank).IsNone() ||
			!v.Digest(bank).IsNone() || !v.ExtendDigest(bank).IsNone() {
			t.Errorf("bank %s: %v, %v", bank, CheckBank(bank), e.Digest(bank))
		}
	}
	if got := NewReplay(ima.SM3, ima.SHA256).Banks(); len(got) != 1 || got[0] != ima.SHA256 {
		t.Errorf("banks %v", got)
	}
}

func TestReplayZeroViolations(t *testing.T) {
	v, err := NewViolation(10, NG, sampleValues(t, "/a"))
	if err != nil {
		t.Fatal(err)
	}
	zeros, ones := NewReplay(ima.SHA256), NewReplay(ima.SHA256)
	zeros.ExtendZeroViolations(v)
	ones.Extend(v)
	// SHA-256 of 64 zeros; of 32 zeros and 32 times ff.
	const want = "sha256:f5a5fd42d16a20302798ef6ed309979b43003d2320d9f0e8ea9831a92759fb4b"
	if got := zeros.Value(10, ima.SHA256).String(); got != want {
		t.Errorf("zeros: %s", got)
	}
	if zeros.Value(10, ima.SHA256) == ones.Value(10, ima.SHA256) {
		t.Error("a violation extends the same either way")
	}
	ones.ExtendDigest(10, ima.SHA1, v.Digest(ima.SHA1).Bytes()) // not replayed
	if d := ones.Value(10, ima.SHA1); !d.IsNone() {
		t.Errorf("a bank that is not replayed has %v", d)
	}
	if d := ones.Value(11, ima.SHA256); d != ima.ZeroDigest(ima.SHA256) {
		t.Errorf("an untouched register has %v", d)
	}
}

// TestASCIIForgesNothing gives every byte and some longer sequences to every place of an entry that text comes from, as
// a reader would hand it on.
func TestASCIIForgesNothing(t *testing.T) {
	line := regexp.MustCompile(`^[ 1-9][0-9] [0-9a-f]{40} ima-ng [^\x00-\x20\x7f]* [^\x00-\x20\x7f]*\n$`)
	var texts []string
	for c := 1; c < 256; c++ {
		texts = append(texts, string([]byte{byte(c)}))
	}
	texts = append(texts, "\r\n", "\u0085", "\u2028", "\u2029", "\u009b2J", "\xc2\n", "\xe2\x80\n", "\xc2", "\xf0\x9f\x92")
	for _, s := range texts {
		data := appendField(nil, "sha256"+s+":\x00"+strings.Repeat("x", 32))
		data = appendField(data, "/tmp/"+s+"end\x00")
		tmpl, err := lookupTemplate(NG)
		if err != nil {
			t.Fatal(err)
		}
		if err := tmpl.check(data, len(data)); err != nil {
			t.Fatal(err)
		}
		got := (&Entry{template: tmpl, data: data, pcr: 9}).AppendASCII(nil, ima.SHA1)
		if !line.Match(got) || strings.ContainsAny(string(got), "\u0085\u009b\u2028\u2029") {
			t.Errorf("%q became %q", s, got)
		}
	}
}

func appendField(dst []byte, data string) []byte {
	return append(append(dst, byte(len(data)), 0, 0, 0), data...)
}

// TestPackageExample is the example of the package comment, byte for byte.
func TestPackageExample(t *testing.T) {
	const list = "0a000000" + "df6496ba016db65204477db13fa771237e42c714" + "06000000" + "696d612d6e67" + "38000000" +
		"28000000" + "7368613235363a" + "00" + "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855" +
		"08000000" + "2f62696e2f7368" + "00"
	d, err := ima.ParseDigest("sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855")
	if err != nil {
		t.Fatal(err)
	}
	e, err := NewEntry(10, NG, FieldValues{Digest: d, Name: "/bin/sh"})
	if err != nil {
		t.Fatal(err)
	}
	if got := hex.EncodeToString(e.AppendBinary(nil, ima.SHA1)); got != list {
		t.Errorf("got  %s\nwant %s", got, list)
	}
	const line = "10 df6496ba016db65204477db13fa771237e42c714 ima-ng " +
		"sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855 /bin/sh\n"
	if got := string(e.AppendASCII(nil, ima.SHA1)); got != line {
		t.Errorf("got  %swant %s", got, line)
	}
	r := NewReplay(ima.SHA1)
	r.Extend(e)
	if got := r.Value(10, ima.SHA1).String(); got != "sha1:c287db097472356a9f377964af09de943ee75c0a" {
		t.Errorf("PCR 10 is %s", got)
	}
}

// TestEntryIsCompact: an entry is its data and no more than 48 bytes, with no spare room.
func TestEntryIsCompact(t *testing.T) {
	if n := unsafe.Sizeof(Entry{}); n > 48 {
		t.Errorf("an Entry takes %d bytes", n)
	}
	e := sample(t, NG, "/usr/bin/"+strings.Repeat("x", 30))
	if len(e.data) != cap(e.data) {
		t.Errorf("%d bytes of data in %d", len(e.data), cap(e.data))
	}
	if !bytes.Equal(e.Data(), e.data) {
		t.Error("Data is not the data")
	}
}
