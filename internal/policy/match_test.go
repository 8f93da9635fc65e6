package policy

import (
	"testing"

	"imans.dev/imans-agent/internal/ima"
)

const none = ima.Action(0)

func TestMatch(t *testing.T) {
	uuid := [16]byte{0x8b, 0xcb, 0xe3, 0x94, 0x4f, 0x13, 0x41, 0x44, 0xbe, 0x8e, 0x5a, 0xa9, 0xea, 0x2c, 0xe2, 0xf6}
	label := func(l Label, s string) (ls Labels) { ls[l] = s; return ls }
	tests := []struct {
		name, rules string
		q           Query
		want        ima.Action
	}{
		{"no rules", "", Query{Func: ima.BPRMCheck}, none},
		{"func", "measure func=BPRM_CHECK", Query{Func: ima.BPRMCheck}, ima.Measure},
		{"other func", "measure func=BPRM_CHECK", Query{Func: ima.FileCheck}, none},
		{"no func is any", "measure", Query{Func: ima.FirmwareCheck}, ima.Measure},
		{"no func is no key", "measure", Query{Func: ima.KeyCheck}, none},
		{"no func is no critical data", "measure uid=0", Query{Func: ima.CriticalData}, none},
		{"mmap is not reqprot", "measure func=MMAP_CHECK", Query{Func: ima.MmapCheckReqprot}, none},
		{"reqprot is not mmap", "measure func=MMAP_CHECK_REQPROT", Query{Func: ima.MmapCheck}, none},
		{"POST_SETATTR is every func and mask", "appraise func=BPRM_CHECK mask=MAY_EXEC",
			Query{Func: ima.PostSetattr}, ima.Appraise},
		{"POST_SETATTR looks at the rest", "appraise func=BPRM_CHECK uid=1", Query{Func: ima.PostSetattr}, none},

		{"mask alone", "measure mask=MAY_READ", Query{Func: ima.FileCheck, Mask: ima.MayRead}, ima.Measure},
		{"mask among others", "measure mask=MAY_READ",
			Query{Func: ima.FileCheck, Mask: ima.MayRead | ima.MayWrite}, none},
		{"mask ^ alone", "measure mask=^MAY_READ", Query{Func: ima.FileCheck, Mask: ima.MayRead}, ima.Measure},
		{"mask ^ among others", "measure mask=^MAY_READ",
			Query{Func: ima.FileCheck, Mask: ima.MayRead | ima.MayWrite}, ima.Measure},
		{"mask ^ absent", "measure mask=^MAY_READ", Query{Func: ima.FileCheck, Mask: ima.MayWrite}, none},

		{"fsmagic", "measure fsmagic=0xef53", Query{Func: ima.FileCheck, FSMagic: 0xef53}, ima.Measure},
		{"other fsmagic", "measure fsmagic=0xef53", Query{Func: ima.FileCheck, FSMagic: 1}, none},
		{"fsname", "measure fsname=ext4", Query{Func: ima.FileCheck, FSName: "ext4"}, ima.Measure},
		{"other fsname", "measure fsname=ext4", Query{Func: ima.FileCheck, FSName: "ext"}, none},
		{"fs_subtype", "measure fs_subtype=sshfs", Query{Func: ima.FileCheck, FSSubtype: "sshfs"}, ima.Measure},
		{"no fs_subtype", "measure fs_subtype=sshfs", Query{Func: ima.FileCheck}, none},
		{"fsuuid", "measure fsuuid=8bcbe394-4f13-4144-be8e-5aa9ea2ce2f6",
			Query{Func: ima.FileCheck, FSUUID: uuid}, ima.Measure},
		{"other fsuuid", "measure fsuuid=8bcbe394-4f13-4144-be8e-5aa9ea2ce2f6", Query{Func: ima.FileCheck}, none},

		{"uid", "measure uid=5", Query{Func: ima.FileCheck, UID: 5}, ima.Measure},
		{"uid is not euid", "measure uid=5", Query{Func: ima.FileCheck, EUID: 5, SUID: 5, CapSetUID: true}, none},
		{"uid greater", "measure uid>5", Query{Func: ima.FileCheck, UID: 6}, ima.Measure},
		{"uid greater is not equal", "measure uid>5", Query{Func: ima.FileCheck, UID: 5}, none},
		{"uid less", "measure uid<5", Query{Func: ima.FileCheck, UID: 4}, ima.Measure},
		{"uid less is not equal", "measure uid<5", Query{Func: ima.FileCheck, UID: 5}, none},
		{"ids are unsigned", "measure uid>5", Query{Func: ima.FileCheck, UID: 4294967294}, ima.Measure},
		{"euid", "measure euid=5", Query{Func: ima.FileCheck, EUID: 5}, ima.Measure},
		{"suid without the capability", "measure euid=5", Query{Func: ima.FileCheck, SUID: 5, UID: 5}, none},
		{"suid with the capability", "measure euid=5",
			Query{Func: ima.FileCheck, SUID: 5, CapSetUID: true}, ima.Measure},
		{"uid with the capability", "measure euid=5", Query{Func: ima.FileCheck, UID: 5, CapSetUID: true}, ima.Measure},
		{"euid and the wrong capability", "measure euid=5", Query{Func: ima.FileCheck, UID: 5, CapSetGID: true}, none},
		{"gid", "measure gid=5", Query{Func: ima.FileCheck, GID: 5}, ima.Measure},
		{"egid", "measure egid>4", Query{Func: ima.FileCheck, EGID: 5}, ima.Measure},
		{"sgid without the capability", "measure egid=5", Query{Func: ima.FileCheck, SGID: 5}, none},
		{"sgid with the capability", "measure egid=5",
			Query{Func: ima.FileCheck, SGID: 5, CapSetGID: true}, ima.Measure},
		{"gid with the capability", "measure egid=5", Query{Func: ima.FileCheck, GID: 5, CapSetGID: true}, ima.Measure},
		{"fowner", "measure fowner=5", Query{Func: ima.FileCheck, FOwner: 5}, ima.Measure},
		{"fowner greater", "measure fowner>5", Query{Func: ima.FileCheck, FOwner: 5}, none},
		{"fgroup less", "measure fgroup<5", Query{Func: ima.FileCheck, FGroup: 4}, ima.Measure},
		{"fgroup", "measure fgroup=5", Query{Func: ima.FileCheck, FGroup: 4}, none},

		{"label", "measure obj_type=etc_t", Query{Func: ima.FileCheck, Labels: label(ObjType, "etc_t")}, ima.Measure},
		{"the other's label", "measure obj_type=etc_t",
			Query{Func: ima.FileCheck, Labels: label(SubjType, "etc_t")}, none},
		{"two labels", "measure obj_type=etc_t subj_role=r",
			Query{Func: ima.FileCheck, Labels: label(ObjType, "etc_t")}, none},

		{"any key", "measure func=KEY_CHECK", Query{Func: ima.KeyCheck, Keyring: ".x"}, ima.Measure},
		{"keyring", "measure func=KEY_CHECK keyrings=.ima|.evm",
			Query{Func: ima.KeyCheck, Keyring: ".evm"}, ima.Measure},
		{"other keyring", "measure func=KEY_CHECK keyrings=.ima|.evm", Query{Func: ima.KeyCheck, Keyring: ".ev"}, none},
		{"key of no keyring", "measure func=KEY_CHECK keyrings=.ima", Query{Func: ima.KeyCheck}, none},
		{"key and uid", "measure func=KEY_CHECK uid=1", Query{Func: ima.KeyCheck}, none},
		{"key and gid, which the kernel does not look at", "measure func=KEY_CHECK gid=1",
			Query{Func: ima.KeyCheck}, ima.Measure},
		{"critical data", "measure func=CRITICAL_DATA label=selinux|kernel_info",
			Query{Func: ima.CriticalData, DataName: "kernel_info"}, ima.Measure},
		{"other critical data", "measure func=CRITICAL_DATA label=selinux",
			Query{Func: ima.CriticalData, DataName: "kernel_info", Keyring: "selinux"}, none},

		{"first match decides", "dont_measure fsmagic=1\nmeasure", Query{Func: ima.FileCheck, FSMagic: 1}, none},
		{"a dont_ rule below is late", "measure\ndont_measure fsmagic=1",
			Query{Func: ima.FileCheck, FSMagic: 1}, ima.Measure},
		{"kinds are apart", "dont_measure\nmeasure\nappraise\ndont_appraise\naudit\nhash",
			Query{Func: ima.FileCheck}, ima.Appraise | ima.Audit | ima.Hash},
		{"dont_audit", "dont_audit uid=0\naudit", Query{Func: ima.FileCheck}, none},
		{"dont_hash", "dont_hash uid=0\nhash", Query{Func: ima.FileCheck}, none},
		{"appraise takes hash away", "hash\nappraise", Query{Func: ima.FileCheck}, ima.Appraise},
		{"hash below appraise stays", "appraise\nhash", Query{Func: ima.FileCheck}, ima.Appraise | ima.Hash},
		{"only dont_ rules", "dont_measure\ndont_appraise", Query{Func: ima.FileCheck}, none},
		{"setxattr rules are not for Match", "appraise func=SETXATTR_CHECK appraise_algos=sha256",
			Query{Func: ima.SetxattrCheck}, none},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := mustParse(t, tt.rules)
			if got := p.Match(&tt.q).Actions; got != tt.want {
				t.Errorf("got %b, want %b", got, tt.want)
			}
			if asks := p.Asks(tt.q.Func, tt.q.Mask); tt.want&^asks != 0 {
				t.Errorf("Asks says only %b", asks)
			}
		})
	}
}

func TestDecision(t *testing.T) {
	file := &Query{Func: ima.FileCheck, Mask: ima.MayRead}
	tests := []struct {
		name, rules string
		q           *Query
		want        Decision
	}{
		{"nothing", "audit uid=1", file, Decision{PCR: -1}},
		{"PCR and template", "measure pcr=11 template=ima-sig", file,
			Decision{Actions: ima.Measure, PCR: 11, Template: "ima-sig"}},
		{"PCR 0", "measure pcr=0", file, Decision{Actions: ima.Measure}},
		{"of the first rule only", "measure pcr=11\nmeasure pcr=12 template=ima", file,
			Decision{Actions: ima.Measure, PCR: 11}},
		{"directio of a dont_ rule", "dont_appraise permit_directio\nappraise\nmeasure", file,
			Decision{Actions: ima.Measure, PCR: -1, DirectIO: true}},
		{"directio of a kind that none asks for", "dont_appraise permit_directio\nmeasure", file,
			Decision{Actions: ima.Measure, PCR: -1}},
		{"verity", "measure digest_type=verity", file, Decision{Actions: ima.Measure, PCR: -1, Verity: true}},
		{"appraise without func", "appraise fowner=0", &Query{Func: ima.BPRMCheck},
			Decision{Actions: ima.Appraise, PCR: -1, Appraisal: Appraisal{Class: FileAppraise}}},
		{"appraise an exec", "appraise func=BPRM_CHECK appraise_type=imasig appraise_algos=sha256",
			&Query{Func: ima.BPRMCheck}, Decision{Actions: ima.Appraise, PCR: -1, Appraisal: Appraisal{
				Class: BPRMAppraise, Signature: true, Blacklist: true, Algos: 1 << ima.SHA256}}},
		{"appraise a module", "appraise func=MODULE_CHECK appraise_type=imasig|modsig", &Query{Func: ima.ModuleCheck},
			Decision{Actions: ima.Appraise, PCR: -1, Appraisal: Appraisal{
				Class: ReadAppraise, Signature: true, Modsig: true, Blacklist: true}}},
		{"appraise a mapping", "appraise func=MMAP_CHECK_REQPROT", &Query{Func: ima.MmapCheckReqprot},
			Decision{Actions: ima.Appraise, PCR: -1, Appraisal: Appraisal{Class: MmapAppraise}}},
		{"appraise credentials", "appraise func=CREDS_CHECK", &Query{Func: ima.CredsCheck},
			Decision{Actions: ima.Appraise, PCR: -1, Appraisal: Appraisal{Class: CredsAppraise}}},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			if got := mustParse(t, tt.rules).Match(tt.q); got != tt.want {
				t.Errorf("got  %+v\nwant %+v", got, tt.want)
			}
		})
	}
}

// TestWorkedExample is that of the package comment.
func TestWorkedExample(t *testing.T) {
	p := mustParse(t, `dont_measure fsmagic=0x1021994
dont_measure func=FILE_CHECK obj_type=var_log_t
measure func=BPRM_CHECK mask=MAY_EXEC
measure func=FILE_CHECK mask=^MAY_READ uid=0 pcr=11
`)
	const ext4, tmpfs = 0xef53, 0x1021994
	nothing := Decision{PCR: -1}
	passwd := Query{Func: ima.FileCheck, Mask: ima.MayRead | ima.MayWrite, FSMagic: ext4}
	if got, want := p.Match(&passwd), (Decision{Actions: ima.Measure, PCR: 11}); got != want {
		t.Errorf("root opens a file: %+v, want %+v", got, want)
	}
	passwd.UID = 1000
	if got := p.Match(&passwd); got != nothing {
		t.Errorf("another opens it: %+v", got)
	}
	log := Query{Func: ima.FileCheck, Mask: ima.MayRead, FSMagic: ext4}
	log.Labels[ObjType] = "var_log_t"
	if got := p.Match(&log); got != nothing {
		t.Errorf("root reads a log: %+v", got)
	}
	run := Query{Func: ima.BPRMCheck, Mask: ima.MayExec, FSMagic: ext4}
	if got, want := p.Match(&run), (Decision{Actions: ima.Measure, PCR: -1}); got != want {
		t.Errorf("a program: %+v, want %+v", got, want)
	}
	run.FSMagic = tmpfs
	if got := p.Match(&run); got != nothing {
		t.Errorf("a program on tmpfs: %+v", got)
	}
}

func BenchmarkMatch(b *testing.B) {
	p, ok := Builtin("tcb")
	if !ok {
		b.Fatal("no tcb")
	}
	q := &Query{Func: ima.FileCheck, Mask: ima.MayRead, FSMagic: 0xef53, FSName: "ext4"}
	b.ReportAllocs()
	for b.Loop() {
		if p.Match(q).Actions != ima.Measure {
			b.Fatal("no match")
		}
	}
}
