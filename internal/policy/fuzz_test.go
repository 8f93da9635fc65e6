package policy

import (
	"errors"
	"os"
	"path/filepath"
	"testing"

	"imans.dev/imans-agent/internal/ima"
)

// FuzzParse: no text makes Parse panic; what it refuses it says where and why; what it takes prints as a policy that
// prints the same and decides the same.
func FuzzParse(f *testing.F) {
	for _, pattern := range []string{"policies/*.policy", "refused/*.policy", "builtin/*.printed"} {
		files, err := filepath.Glob("testdata/" + pattern)
		if err != nil || len(files) == 0 {
			f.Fatalf("%s: %d files, %v", pattern, len(files), err)
		}
		for _, file := range files {
			text, err := os.ReadFile(file)
			if err != nil {
				f.Fatal(err)
			}
			f.Add(text)
		}
	}
	f.Fuzz(func(t *testing.T, text []byte) {
		p, err := Parse("fuzz", text)
		if err != nil {
			var syntax *SyntaxError
			if p != nil || !errors.As(err, &syntax) || syntax.Line < 1 || syntax.Rule == "" || syntax.Reason == "" {
				t.Fatalf("got %v, %v", p, err)
			}
			return
		}
		printed := p.String()
		again, err := Parse("printed", []byte(printed))
		if err != nil {
			t.Fatalf("printed %q: %v", printed, err)
		}
		if again.String() != printed {
			t.Fatalf("printed %q, then %q", printed, again)
		}
		for fn := ima.FileCheck; fn <= ima.SetxattrCheck; fn++ {
			for _, mask := range []ima.Mask{0, ima.MayExec, ima.MayRead, ima.MayRead | ima.MayWrite} {
				q := &Query{Func: fn, Mask: mask, FSMagic: 0x9fa0, FSName: "tmpfs", UID: 1, Keyring: ".ima", DataName: "selinux"}
				d := p.Match(q)
				if b := again.Match(q); d != b {
					t.Fatalf("%+v: %+v, and when printed %+v", *q, d, b)
				}
				if d.Actions&^p.Asks(fn, mask) != 0 {
					t.Fatalf("%+v: %b, but Asks says %b", *q, d.Actions, p.Asks(fn, mask))
				}
			}
		}
	})
}
