package binding

import (
	"bytes"
	"encoding/hex"
	"encoding/json"
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/need"
)

// vector is one buffer of testdata/vectors.json, written by testdata/recipe.py.
type vector struct {
	Name   string
	Good   bool
	Buffer string
}

func loadVectors(t testing.TB) []vector {
	t.Helper()
	b, err := os.ReadFile("testdata/vectors.json")
	if err != nil {
		t.Fatal(err)
	}
	var vectors []vector
	if err := json.Unmarshal(b, &vectors); err != nil || len(vectors) < 40 {
		t.Fatalf("%d vectors: %v", len(vectors), err)
	}
	return vectors
}

func (v *vector) bytes(t testing.TB) []byte {
	t.Helper()
	b, err := hex.DecodeString(v.Buffer)
	if err != nil {
		t.Fatal(err)
	}
	return b
}

// again parses a buffer as what it is called, and encodes what it says.
func again(name string, b []byte) ([]byte, error) {
	if strings.HasPrefix(name, "end") {
		e, err := ParseEnd(b)
		if err != nil {
			return nil, err
		}
		return e.Encode()
	}
	a, err := ParseAttach(b)
	if err != nil {
		return nil, err
	}
	return a.Encode()
}

// Each good buffer says what encodes to it again; each bad one is refused by a typed error.
func TestVectors(t *testing.T) {
	for _, v := range loadVectors(t) {
		t.Run(v.Name, func(t *testing.T) {
			b := v.bytes(t)
			got, err := again(v.Name, b)
			if v.Good {
				if err != nil || !bytes.Equal(got, b) {
					t.Errorf("%x, %v; want\n%x", got, err, b)
				}
				return
			}
			_, isVersion := errors.AsType[*VersionError](err)
			_, isFormat := errors.AsType[*FormatError](err)
			if isVersion != strings.Contains(v.Name, "version") || isFormat == isVersion {
				t.Errorf("error %v", err)
			}
		})
	}
}

// TestVectorsAreTheRecipes runs the recipe again and compares.
func TestVectorsAreTheRecipes(t *testing.T) {
	python, dir := need.Program(t, "python3"), t.TempDir()
	if out, err := exec.Command(python, "testdata/recipe.py", dir).CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	made, err := os.ReadFile(filepath.Join(dir, "vectors.json"))
	kept, err2 := os.ReadFile("testdata/vectors.json")
	if err := errors.Join(err, err2); err != nil || !bytes.Equal(made, kept) {
		t.Errorf("vectors.json is not what the recipe makes: %v", err)
	}
}

func example() Attach {
	return Attach{
		ID: ID{4026532281, 7, 1}, TPM: TPM20, Way: Proxy, PCR: 10, Container: "c1", Image: "alpine",
		EK: Name("\x00\x0b" + strings.Repeat("\x00", 32)), AK: Name("\x00\x0b" + strings.Repeat("\xff", 32)),
	}
}

func vectorOf(t *testing.T, name string) []byte {
	t.Helper()
	for _, v := range loadVectors(t) {
		if v.Name == name {
			return v.bytes(t)
		}
	}
	t.Fatalf("no vector %q", name)
	return nil
}

// The package comment's example, and the fields of an end.
func TestFields(t *testing.T) {
	a, err := ParseAttach(vectorOf(t, "attach"))
	if err != nil || a != example() {
		t.Errorf("%+v, %v", a, err)
	}
	if a.ID.String() != "4026532281:7#1" || a.TPM.String() != "2.0" || a.Way.String() != "proxy" {
		t.Errorf("%v, %v, %v", a.ID, a.TPM, a.Way)
	}
	if n, err := ParseName("000B" + strings.Repeat("Ff", 32)); err != nil || n != a.AK || n.String() != "000b"+strings.Repeat("ff", 32) {
		t.Errorf("name %v, %v", n, err)
	}
	e, err := ParseEnd(vectorOf(t, "end"))
	if err != nil || e.ID != a.ID || e.Cause != Ended || e.Entries != 42 || len(e.Values) != 4 {
		t.Errorf("%+v, %v", e, err)
	}
	if sum, err := ima.Sum(ima.SHA256, []byte("pcr")); err != nil || e.Values[1] != sum {
		t.Errorf("SHA-256 %v, want %v, %v", e.Values[1], sum, err)
	}
}

// What no entry may say is refused before it is in a list.
func TestEncodeRefuses(t *testing.T) {
	for name, spoil := range map[string]func(*Attach){
		"no namespace":    func(a *Attach) { a.Inum = 0 },
		"a control byte":  func(a *Attach) { a.Container = "a\x1bb" },
		"a long text":     func(a *Attach) { a.Image = strings.Repeat("x", maxText+1) },
		"no AK":           func(a *Attach) { a.AK = "" },
		"a Name cut":      func(a *Attach) { a.EK = a.EK[:20] },
		"a negative PCR":  func(a *Attach) { a.PCR = -1 },
		"no TPM version":  func(a *Attach) { a.TPM = 0 },
		"no way":          func(a *Attach) { a.Way = 0 },
		"1.2 with a Name": func(a *Attach) { a.TPM = TPM12 },
	} {
		a := example()
		if spoil(&a); a == example() {
			t.Errorf("%s: nothing was spoilt", name)
		}
		if b, err := a.Encode(); err == nil {
			t.Errorf("%s: encoded to %x", name, b)
		}
	}
	e := End{ID: ID{1, 1, 1}, Cause: Ended, Values: []ima.Digest{ima.ZeroDigest(ima.SHA256), ima.ZeroDigest(ima.SHA1)}}
	if b, err := e.Encode(); err == nil {
		t.Errorf("values out of order: encoded to %x", b)
	}
}

// FuzzParse: any bytes are parsed without panic, and what is accepted is the only encoding of what it says.
func FuzzParse(f *testing.F) {
	for _, v := range loadVectors(f) {
		f.Add(strings.HasPrefix(v.Name, "end"), v.bytes(f))
	}
	f.Fuzz(func(t *testing.T, isEnd bool, b []byte) {
		name := "attach"
		if isEnd {
			name = "end"
		}
		got, err := again(name, b)
		_, isVersion := errors.AsType[*VersionError](err)
		_, isFormat := errors.AsType[*FormatError](err)
		if err != nil && !isVersion && !isFormat {
			t.Fatalf("error %v", err)
		}
		if err == nil && !bytes.Equal(got, b) {
			t.Fatalf("%x was taken for\n%x", b, got)
		}
	})
}

// FuzzName: a Name that is taken is written as it is read.
func FuzzName(f *testing.F) {
	f.Add("000b" + strings.Repeat("5b", 32))
	f.Add("0004" + strings.Repeat("00", 19))
	f.Add("0010")
	f.Fuzz(func(t *testing.T, text string) {
		n, err := ParseName(text)
		if err != nil {
			return
		}
		if again, err := ParseName(n.String()); err != nil || again != n || !strings.EqualFold(n.String(), text) {
			t.Fatalf("%q is %v; read again %v, %v", text, n, again, err)
		}
	})
}
