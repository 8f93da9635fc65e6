package policy

import (
	"errors"
	"testing"

	"imans.dev/imans-agent/internal/ima"
)

// TestBuiltinPrints: the kernel's built-in policies print as the kernel prints them.
func TestBuiltinPrints(t *testing.T) {
	for name, file := range map[string]string{
		"ima_tcb": "ima_tcb", "tcb": "tcb", "secure_boot": "secure_boot", "appraise_tcb": "appraise_tcb",
		"ima_appraise_tcb": "appraise_tcb", "critical_data": "critical_data",
		"critical_data|fail_securely|appraise_tcb|tcb|secure_boot": "all", "tcb|tcb": "tcb",
	} {
		p, ok := Builtin(name)
		if !ok {
			t.Errorf("no %s", name)
			continue
		}
		if want := string(read(t, "testdata/builtin/"+file+".printed")); p.String() != want {
			t.Errorf("%s prints\n%s\nwant\n%s", name, p, want)
		}
	}
}

func TestBuiltinNames(t *testing.T) {
	for _, name := range []string{"", "|", "tcb|", "TCB", "tcb|none", "policy.txt"} {
		if p, ok := Builtin(name); ok || p != nil {
			t.Errorf("Builtin(%q) = %q", name, p)
		}
	}
}

func TestBuiltinExec(t *testing.T) {
	p, ok := Builtin("exec")
	if !ok {
		t.Fatal("no exec")
	}
	const want = "measure func=BPRM_CHECK mask=MAY_EXEC \nmeasure func=MMAP_CHECK mask=MAY_EXEC \n"
	if p.String() != want {
		t.Errorf("got %q", p)
	}
	for f := ima.FileCheck; f <= ima.SetxattrCheck; f++ {
		want := none
		if f == ima.BPRMCheck || f == ima.MmapCheck || f == ima.PostSetattr {
			want = ima.Measure
		}
		if got := p.Match(&Query{Func: f, Mask: ima.MayExec, FSMagic: 0x1021994, UID: 1000}).Actions; got != want {
			t.Errorf("%v: got %b, want %b", f, got, want)
		}
	}
}

// TestBuiltinAppraisal: the kernel's arrays ask for a signature and, unlike parsed rules, not for the blacklist.
func TestBuiltinAppraisal(t *testing.T) {
	q := &Query{Func: ima.ModuleCheck}
	builtin, _ := Builtin("secure_boot")
	want := Appraisal{Class: ReadAppraise, Signature: true}
	if got := builtin.Match(q).Appraisal; got != want {
		t.Errorf("built in: %+v, want %+v", got, want)
	}
	want.Blacklist = true
	if got := mustParse(t, builtin.String()).Match(q).Appraisal; got != want {
		t.Errorf("parsed: %+v, want %+v", got, want)
	}
	strict, _ := Builtin("fail_securely|secure_boot")
	if got := strict.Match(q).Appraisal; !got.FailUnverifiable {
		t.Errorf("fail_securely: %+v", got)
	}
	if alone, ok := Builtin("fail_securely"); !ok || len(alone.Rules()) != 0 {
		t.Errorf("fail_securely alone: %q, %v", alone, ok)
	}
}

// TestBuiltinTCBIsRefusedWhereNotWired: the caller decides, but never gets a part of it.
func TestBuiltinTCBIsRefusedWhereNotWired(t *testing.T) {
	p, _ := Builtin("tcb")
	wired := Wired{Funcs: []ima.Func{ima.BPRMCheck, ima.MmapCheck}, Actions: []Action{Measure}, MaxPCR: 23}
	err := p.CheckWired("tcb", wired)
	var syntax *SyntaxError
	if !errors.As(err, &syntax) || syntax.Line != 16 || syntax.Rule != "measure func=FILE_CHECK mask=^MAY_READ euid=0" {
		t.Errorf("got %v", err)
	}
}
