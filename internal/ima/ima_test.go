package ima

import "testing"

func TestFuncNames(t *testing.T) {
	for f := FuncNone; f < numFuncs; f++ {
		got, ok := FuncByName(f.String())
		if wantOK := f != FuncNone && f != PostSetattr; ok != wantOK || ok && got != f {
			t.Errorf("FuncByName(%s) = %v, %v", f, got, ok)
		}
	}
	for alias, want := range map[string]Func{"PATH_CHECK": FileCheck, "FILE_MMAP": MmapCheck} {
		if got, ok := FuncByName(alias); !ok || got != want {
			t.Errorf("FuncByName(%s) = %v, %v", alias, got, ok)
		}
	}
}

func TestDigest(t *testing.T) {
	const text = "sha1:da39a3ee5e6b4b0d3255bfef95601890afd80709"
	d, err := ParseDigest(text)
	if err != nil {
		t.Fatal(err)
	}
	if d.String() != text || d.IsNone() || d.IsZero() || len(d.Bytes()) != 20 {
		t.Errorf("ParseDigest(%q) = %v", text, d)
	}
	if z := ZeroDigest(SHA256); z.IsNone() || !z.IsZero() || len(z.Bytes()) != 32 {
		t.Errorf("ZeroDigest(SHA256) = %v", z)
	}
	for _, bad := range []string{"", "sha1", "sha1:00", "nohash:00", "sha256:zz"} {
		if _, err := ParseDigest(bad); err == nil {
			t.Errorf("ParseDigest(%q) did not fail", bad)
		}
	}
	if _, err := NewDigest(200, nil); err == nil {
		t.Error("NewDigest(200) did not fail")
	}
}
