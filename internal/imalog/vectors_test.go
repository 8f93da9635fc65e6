package imalog

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/need"
)

// vector is one list of testdata/vectors, written by testdata/recipe.py.
type vector struct {
	name    string
	Entries []vectorEntry
	PCRs    map[string]map[string]string // PCR, bank: value after the last entry
}

type vectorEntry struct {
	PCR       int
	Template  string
	Violation bool
	Values    *vectorValues // nil: no constructor makes such an entry any more
	Fields    [][2]string   // id, hex
}

type vectorValues struct {
	Digest, Name, Sig, EVMSig, Buf, Modsig, ModsigDigest, XattrValues string // but for the digests in hex
	Verity                                                            bool
	Inode                                                             []uint32
	XattrNames                                                        []string
	XattrLengths                                                      []uint32
}

func banks() []ima.HashAlgo { return []ima.HashAlgo{ima.SHA1, ima.SHA256, ima.SHA384, ima.SHA512} }

func loadVectors(t testing.TB) []vector {
	t.Helper()
	files, err := filepath.Glob("testdata/vectors/*.json")
	if err != nil || len(files) < 11 {
		t.Fatalf("%d vectors found: %v", len(files), err)
	}
	var vectors []vector
	for _, f := range files {
		b, err := os.ReadFile(f)
		if err != nil {
			t.Fatal(err)
		}
		v := vector{name: strings.TrimSuffix(filepath.Base(f), ".json")}
		if err := json.Unmarshal(b, &v); err != nil {
			t.Fatalf("%s: %v", f, err)
		}
		vectors = append(vectors, v)
	}
	return vectors
}

func (v *vector) read(t testing.TB, bank ima.HashAlgo, kind string) []byte {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("testdata/vectors/%s.%s.%s", v.name, bank, kind))
	if err != nil {
		t.Fatal(err)
	}
	return b
}

func unhex(t testing.TB, s string) []byte {
	t.Helper()
	b, err := hex.DecodeString(s)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// make builds the entry by the constructors.
func (v *vectorEntry) make(t testing.TB) *Entry {
	t.Helper()
	d, err := ima.ParseDigest(v.Values.Digest)
	if err != nil {
		t.Fatal(err)
	}
	f := FieldValues{
		Digest: d, Verity: v.Values.Verity, Name: string(unhex(t, v.Values.Name)), Sig: unhex(t, v.Values.Sig),
		EVMSig: unhex(t, v.Values.EVMSig), Buf: unhex(t, v.Values.Buf), Modsig: unhex(t, v.Values.Modsig),
		XattrNames: v.Values.XattrNames, XattrLengths: v.Values.XattrLengths, XattrValues: unhex(t, v.Values.XattrValues),
	}
	if v.Values.ModsigDigest != "" {
		if f.ModsigDigest, err = ima.ParseDigest(v.Values.ModsigDigest); err != nil {
			t.Fatal(err)
		}
	}
	if in := v.Values.Inode; in != nil {
		f.File, f.IUID, f.IGID, f.IMode = true, in[0], in[1], uint16(in[2])
	}
	var e *Entry
	switch {
	case v.Violation:
		e, err = NewViolation(v.PCR, v.Template, f)
	case f.Name == BootAggregateName:
		e, err = BootAggregate(v.PCR, v.Template, d)
	default:
		e, err = NewEntry(v.PCR, v.Template, f)
	}
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// TestVectors takes each list through the reader, the field accessors, the constructors, both printers and the replay.
func TestVectors(t *testing.T) {
	for _, v := range loadVectors(t) {
		for _, bank := range banks() {
			t.Run(v.name+"/"+bank.String(), func(t *testing.T) { v.check(t, bank) })
		}
	}
}

func (v *vector) check(t *testing.T, bank ima.HashAlgo) {
	list := v.read(t, bank, "bin")
	r := NewReader(bytes.NewReader(list), bank)
	replay := NewReplay(banks()...)
	var binary, ascii []byte
	for i := range v.Entries {
		want := &v.Entries[i]
		e, err := r.Next()
		if err != nil {
			t.Fatal(err)
		}
		if r.Offset() != int64(len(binary)) {
			t.Errorf("entry %d: offset %d, want %d", i, r.Offset(), len(binary))
		}
		want.compare(t, i, e)
		if got := r.StoredDigest(); got != e.Digest(bank) {
			t.Errorf("entry %d: the list says %v, the data %v", i, got, e.Digest(bank))
		}
		before := len(binary)
		binary, ascii = e.AppendBinary(binary, bank), e.AppendASCII(ascii, bank)
		if len(binary)-before != e.Size(bank) || r.End() != int64(len(binary)) {
			t.Errorf("entry %d: Size %d, End %d; %d bytes written, %d in all",
				i, e.Size(bank), r.End(), len(binary)-before, len(binary))
		}
		replay.Extend(e)
		if want.Values != nil {
			made := want.make(t)
			if got := made.AppendBinary(nil, bank); !bytes.Equal(got, binary[before:]) {
				t.Errorf("entry %d: made\n%x\nwant\n%x", i, got, binary[before:])
			}
		}
	}
	if _, err := r.Next(); err != io.EOF {
		t.Errorf("after the last entry: %v", err)
	}
	if !bytes.Equal(binary, list) {
		t.Error("the list written is not the list read")
	}
	if want := v.read(t, bank, "ascii"); !bytes.Equal(ascii, want) {
		t.Errorf("ascii list:\n%s\nwant\n%s", ascii, want)
	}
	v.comparePCRs(t, replay)
}

func (v *vectorEntry) compare(t *testing.T, i int, e *Entry) {
	if e.PCR() != v.PCR || e.Template() != v.Template || e.Violation() != v.Violation {
		t.Errorf("entry %d: PCR %d, %s, violation %v", i, e.PCR(), e.Template(), e.Violation())
	}
	var name string
	for _, f := range v.Fields {
		got, ok := e.Field(f[0])
		if !ok || hex.EncodeToString(got) != f[1] {
			t.Errorf("entry %d: field %s is %x, %v; want %s", i, f[0], got, ok, f[1])
		}
		if f[0] == "n" || f[0] == "n-ng" {
			name = strings.TrimSuffix(string(unhex(t, f[1])), "\x00")
		}
	}
	if e.Name() != name {
		t.Errorf("entry %d: name %q, want %q", i, e.Name(), name)
	}
	if v.Values != nil && !v.Violation && e.FileDigest().String() != v.Values.Digest {
		t.Errorf("entry %d: file digest %v, want %s", i, e.FileDigest(), v.Values.Digest)
	}
}

func (v *vector) comparePCRs(t *testing.T, replay *Replay) {
	if len(replay.PCRs()) != len(v.PCRs) {
		t.Errorf("PCRs %v, want %d of them", replay.PCRs(), len(v.PCRs))
	}
	for pcr, values := range v.PCRs {
		n, err := strconv.Atoi(pcr)
		if err != nil {
			t.Fatal(err)
		}
		for _, bank := range banks() {
			if got := replay.Value(n, bank).String(); got != bank.String()+":"+values[bank.String()] {
				t.Errorf("PCR %d is %s, want %s", n, got, values[bank.String()])
			}
		}
	}
}

// TestVectorsAreTheRecipes runs the recipe again and compares.
func TestVectorsAreTheRecipes(t *testing.T) {
	python := need.Program(t, "python3")
	dir := t.TempDir()
	if out, err := exec.Command(python, "testdata/recipe.py", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	for _, from := range []string{dir, "testdata/vectors"} {
		files, err := os.ReadDir(from)
		if err != nil || len(files) == 0 {
			t.Fatalf("%s: %d files, %v", from, len(files), err)
		}
		for _, f := range files {
			made, err1 := os.ReadFile(filepath.Join(dir, f.Name()))
			kept, err2 := os.ReadFile(filepath.Join("testdata/vectors", f.Name()))
			if err := errors.Join(err1, err2); err != nil || !bytes.Equal(made, kept) {
				t.Errorf("%s is not what the recipe makes: %v", f.Name(), err)
			}
		}
	}
}
