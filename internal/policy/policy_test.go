package policy

import (
	"errors"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/ima"
)

func TestAppend(t *testing.T) {
	first, second := mustParse(t, "dont_measure fsmagic=1"), mustParse(t, "measure func=FILE_CHECK")
	p := Append(first, second)
	if want := first.String() + second.String(); p.String() != want {
		t.Errorf("got %q, want %q", p, want)
	}
	if len(first.Rules()) != 1 || len(second.Rules()) != 1 {
		t.Error("a part of it changed")
	}
	for magic, want := range map[uint64]ima.Action{1: none, 2: ima.Measure} {
		if got := p.Match(&Query{Func: ima.FileCheck, FSMagic: magic}).Actions; got != want {
			t.Errorf("fsmagic %d: got %b, want %b", magic, got, want)
		}
	}
	strict, _ := Builtin("fail_securely")
	appraise := mustParse(t, "appraise")
	for name, p := range map[string]*Policy{"before": Append(strict, appraise), "behind": Append(appraise, strict)} {
		if !p.Match(&Query{Func: ima.FileCheck}).Appraisal.FailUnverifiable {
			t.Errorf("fail_securely %s the rule is lost", name)
		}
	}
}

func TestAsks(t *testing.T) {
	p := mustParse(t, `dont_measure func=FIRMWARE_CHECK
measure func=FILE_CHECK mask=^MAY_READ uid=0
audit func=BPRM_CHECK mask=MAY_EXEC
measure func=KEY_CHECK
appraise func=SETXATTR_CHECK appraise_algos=sha256
`)
	tests := []struct {
		name string
		f    ima.Func
		mask ima.Mask
		want ima.Action
	}{
		{"read and write", ima.FileCheck, ima.MayRead | ima.MayWrite, ima.Measure},
		{"write", ima.FileCheck, ima.MayWrite, none},
		{"exec", ima.BPRMCheck, ima.MayExec, ima.Audit},
		{"exec and read", ima.BPRMCheck, ima.MayExec | ima.MayRead, none},
		{"only a dont_ rule", ima.FirmwareCheck, 0, none},
		{"key", ima.KeyCheck, 0, ima.Measure},
		{"other data", ima.CriticalData, 0, none},
		{"setxattr", ima.SetxattrCheck, 0, none},
	}
	for _, tt := range tests {
		if got := p.Asks(tt.f, tt.mask); got != tt.want {
			t.Errorf("%s: got %b, want %b", tt.name, got, tt.want)
		}
	}
}

func TestNamesIDs(t *testing.T) {
	for rules, want := range map[string]bool{
		"": false, "measure fowner=0 fgroup>5": false, "measure uid=0": true, "dont_measure euid>5": true,
		"measure\naudit gid<5": true, "measure egid=5": true,
	} {
		if got := mustParse(t, rules).NamesIDs(); got != want {
			t.Errorf("%q: got %v", rules, got)
		}
	}
}

func TestSetxattrAlgos(t *testing.T) {
	p := mustParse(t, `appraise appraise_algos=md5
appraise func=SETXATTR_CHECK appraise_algos=sha256,sha512
appraise func=SETXATTR_CHECK appraise_algos=sha1
`)
	algos := p.SetxattrAlgos()
	if algos.String() != "sha256,sha512" || !algos.Allows(ima.SHA512) || algos.Allows(ima.SHA1) || algos.Allows(200) {
		t.Errorf("got %v", algos)
	}
	if any := mustParse(t, "measure").SetxattrAlgos(); any != 0 || !any.Allows(ima.MD5) {
		t.Errorf("without such a rule: %v", any)
	}
}

func TestCheckWired(t *testing.T) {
	some := Wired{
		Funcs: []ima.Func{ima.BPRMCheck, ima.MmapCheck}, Actions: []Action{Measure, Audit}, Templates: []string{"ima-ng"},
		MaxPCR: 23,
	}
	more := some
	more.Labels, more.FSSubtype, more.Verity = true, true, true
	tests := []struct {
		name, rules string
		wired       Wired
		line        int // 0: passes
		says        string
	}{
		{"wired", "measure func=BPRM_CHECK uid=0 pcr=23 template=ima-ng\naudit func=MMAP_CHECK", some, 0, ""},
		{"nothing is wired", "measure func=BPRM_CHECK", Wired{}, 1, "action measure"},
		{"func", "measure func=BPRM_CHECK\n\nmeasure func=FILE_CHECK", some, 3, "func=FILE_CHECK is not done yet"},
		{"action", "hash func=BPRM_CHECK", some, 1, "action hash is not done yet"},
		{"no func", "measure fowner=0", some, 1, "without func="},
		{"dont_ rules ask for nothing", "dont_measure func=FILE_CHECK\ndont_appraise fsmagic=1\ndont_hash\ndont_audit",
			some, 0, ""},
		{"label", "dont_measure obj_type=a_t", some, 1, "labels of security modules"},
		{"label wired", "dont_measure obj_type=a_t", more, 0, ""},
		{"subtype", "measure func=BPRM_CHECK fs_subtype=sshfs", some, 1, "fs_subtype="},
		{"subtype wired", "measure func=BPRM_CHECK fs_subtype=sshfs", more, 0, ""},
		{"verity", "measure func=BPRM_CHECK digest_type=verity", some, 1, "digest_type=verity"},
		{"verity of a dont_ rule", "dont_measure digest_type=verity", some, 1, "digest_type=verity"},
		{"verity wired", "measure func=BPRM_CHECK digest_type=verity", more, 0, ""},
		{"template", "measure func=BPRM_CHECK template=evm-sig", some, 1, "template=evm-sig"},
		{"PCR", "measure func=BPRM_CHECK pcr=24", some, 1, "use 0 to 23"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			err := mustParse(t, tt.rules).CheckWired("file", tt.wired)
			if tt.line == 0 {
				if err != nil {
					t.Error(err)
				}
				return
			}
			var syntax *SyntaxError
			if !errors.As(err, &syntax) || syntax.File != "file" || syntax.Line != tt.line ||
				!strings.Contains(syntax.Reason, tt.says) {
				t.Fatalf("got %v, want line %d and %q", err, tt.line, tt.says)
			}
			tellsWhatToDo(t, err)
		})
	}
}

func TestNotices(t *testing.T) {
	const modsig = "appraise func=MODULE_CHECK appraise_type=imasig|modsig\n"
	tests := []struct {
		name, rules, own string
		want             []string // what each notice says
	}{
		{"nothing to say", "measure func=BPRM_CHECK\n" + modsig, "ima-ng", nil},
		{"verity in ima-ng", "measure digest_type=verity", "ima-ng", []string{"ima-ng does not tell"}},
		{"verity in the rule's template", "measure digest_type=verity template=ima-sig", "ima-ngv2",
			[]string{"ima-sig does not tell"}},
		{"verity in ima-ngv2", "measure digest_type=verity", "ima-ngv2", nil},
		{"verity in a format", "measure digest_type=verity", "n-ng|d-ngv2", nil},
		{"verity not measured", "appraise digest_type=verity appraise_type=sigv3", "ima-ng", nil},
		{"modsig in ima-modsig", modsig, "ima-modsig", nil},
		{"modsig without its digest", modsig, "d-ng|n-ng|modsig", []string{"add the field d-modsig"}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			got := mustParse(t, tt.rules).Notices("file", tt.own)
			if len(got) != len(tt.want) {
				t.Fatalf("got %q", got)
			}
			for i := range got {
				if !strings.HasPrefix(got[i], "file:1: ") || !strings.Contains(got[i], tt.want[i]) {
					t.Errorf("got %q, want %q", got[i], tt.want[i])
				}
			}
		})
	}
}
