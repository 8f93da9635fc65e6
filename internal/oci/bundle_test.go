package oci

import (
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A container that is created twice from one bundle gets the spec that was there first, edited anew.
func TestBundle(t *testing.T) {
	b := Bundle{Dir: t.TempDir()}
	path := filepath.Join(b.Dir, "config.json")
	const first = `{"linux":{"resources":{"vtpms":[{}]}}}`
	if err := os.WriteFile(path, []byte(first), 0o640); err != nil {
		t.Fatal(err)
	}
	for _, edit := range []string{`{"edit":1}`, `{"edit":2}`, first, `{"edit":3}`} {
		spec, err := b.Read()
		if err != nil || string(spec) != first {
			t.Fatalf("before %s: read %s, %v", edit, spec, err)
		}
		if err := b.Write(spec, []byte(edit)); err != nil {
			t.Fatal(err)
		}
		if got, err := os.ReadFile(path); err != nil || string(got) != edit {
			t.Fatalf("wrote %s, %v, want %s", got, err, edit)
		}
	}
	if st, err := os.Stat(path); err != nil || st.Mode().Perm() != 0o640 {
		t.Errorf("mode %v, %v, want 0640", st.Mode(), err)
	}
	const other = `{"somebody":"else's"}`
	if err := os.WriteFile(path, []byte(other), 0o640); err != nil {
		t.Fatal(err)
	}
	if spec, err := b.Read(); err != nil || string(spec) != other {
		t.Errorf("changed by somebody: read %s, %v", spec, err)
	}
	files, err := os.ReadDir(b.Dir)
	if err != nil || len(files) != 2 {
		t.Errorf("the bundle has %v, %v", files, err)
	}
}

func TestBundleRefuses(t *testing.T) {
	b := Bundle{Dir: t.TempDir()}
	if _, err := b.Read(); err == nil {
		t.Error("a bundle without a spec was read")
	}
	if err := b.Write([]byte(`{}`), []byte(`{"a":1}`)); err == nil {
		t.Error("a spec was made where there is none")
	}
	f, err := os.Create(filepath.Join(b.Dir, "config.json"))
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if err := f.Truncate(specMax + 1); err != nil {
		t.Fatal(err)
	}
	if _, err := b.Read(); err == nil || !strings.Contains(err.Error(), "more than") {
		t.Errorf("a spec without end: %v", err)
	}
}

func TestParseState(t *testing.T) {
	s, err := ParseState([]byte(`{"ociVersion":"1.0.2","id":"c1","status":"creating","pid":4,"bundle":"/b","annotations":{}}`))
	if err != nil || s != (State{"c1", 4, "/b"}) {
		t.Errorf("%+v, %v", s, err)
	}
	for _, text := range []string{"", "[]", `{"pid":4}`, `{"id":"../x"}`, `{"id":"c1","pid":"4"}`} {
		if _, err := ParseState([]byte(text)); err == nil {
			t.Errorf("%s was taken", text)
		}
	}
}
