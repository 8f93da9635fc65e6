package policy

import (
	"errors"
	"strings"
	"testing"
)

func TestParseRefuses(t *testing.T) {
	tests := []struct{ name, rule, says string }{
		{"no action", "func=BPRM_CHECK", "no action"},
		{"two actions", "measure audit func=BPRM_CHECK", "second action"},
		{"action twice", "measure measure", "second action"},
		{"unknown action", "measures func=BPRM_CHECK", "unknown word"},
		{"comment behind a rule", "measure func=BPRM_CHECK # all", "unknown word"},
		{"unknown condition", "measure inode=5", "unknown condition"},
		{"space behind the operator", "measure func= BPRM_CHECK", "no value"},
		{"space before the operator", "measure func =BPRM_CHECK", "unknown word"},
		{"control byte", "measure fsname=ext4\r", "control byte 0x0d"},
		{"NUL", "measure\x00", "control byte 0x00"},
		{"func twice", "measure func=BPRM_CHECK func=BPRM_CHECK", "twice"},
		{"func of old", "measure func=INODE_PERM", "unknown function"},
		{"func that no rule may name", "measure func=POST_SETATTR", "unknown function"},
		{"func NONE", "measure func=NONE", "unknown function"},
		{"mask twice", "measure mask=MAY_READ mask=^MAY_READ", "twice"},
		{"mask unknown", "measure mask=READ", "unknown mask"},
		{"masks joined", "measure mask=MAY_READ|MAY_EXEC", "unknown mask"},
		{"fsmagic twice", "measure fsmagic=1 fsmagic=1", "twice"},
		{"fsmagic too long", "measure fsmagic=0x10000000000000000", "64 bits"},
		{"fsmagic signed", "measure fsmagic=-1", "hexadecimal"},
		{"fsname empty", "measure fsname=", "no value"},
		{"fsname compared", "measure fsname<a", "only numbers"},
		{"fs_subtype twice", "measure fs_subtype=a fs_subtype=b", "twice"},
		{"fsuuid short", "measure fsuuid=8bcbe394-4f13", "UUID"},
		{"fsuuid without dashes", "measure fsuuid=8bcbe3944f134144be8e5aa9ea2ce2f60000", "UUID"},
		{"fsuuid not hexadecimal", "measure fsuuid=gbcbe394-4f13-4144-be8e-5aa9ea2ce2f6", "UUID"},
		{"fsuuid twice",
			"measure fsuuid=8bcbe394-4f13-4144-be8e-5aa9ea2ce2f6 fsuuid=8bcbe394-4f13-4144-be8e-5aa9ea2ce2f6",
			"twice"},
		{"uid twice", "measure uid=1 uid>2", "twice"},
		{"uid and euid", "measure uid=1 euid=1", "excludes uid"},
		{"gid and egid", "measure egid=1 gid=1", "excludes egid"},
		{"uid invalid", "measure uid=4294967295", "not an id"},
		{"uid too large", "measure uid=4294967296", "not an id"},
		{"uid negative", "measure uid=-1", "not an id"},
		{"uid by name", "measure uid=root", "not an id"},
		{"uid at least", "measure uid>=5", "not an id"},
		{"fowner twice", "measure fowner=0 fowner=0", "twice"},
		{"fgroup twice", "measure fgroup=0 fgroup<9", "twice"},
		{"label twice", "measure obj_type=a obj_type=b", "twice"},
		{"keyrings with an empty name", "measure func=KEY_CHECK keyrings=.ima||.evm", "empty name"},
		{"keyrings twice", "measure func=KEY_CHECK keyrings=.ima keyrings=.evm", "twice"},
		{"pcr of a dont_ rule", "dont_measure func=BPRM_CHECK pcr=11", "pcr= does not go with dont_measure"},
		{"pcr too large", "measure pcr=64", "not a PCR"},
		{"pcr negative", "measure pcr=-1", "not a PCR"},
		{"template before the action", "template=ima-ng measure", "after the word measure"},
		{"template of appraise", "appraise template=ima-ng", "only a rule to measure"},
		{"template twice", "measure template=ima-ng template=ima-ng", "twice"},
		{"template unknown", "measure template=ima-sigv3", "unknown template"},
		{"digest type unknown", "measure digest_type=ima", "unknown digest type"},
		{"digest type behind imasig", "appraise appraise_type=imasig digest_type=verity", "sigv3"},
		{"imasig behind digest type", "appraise digest_type=verity appraise_type=imasig", "sigv3"},
		{"imasig before sigv3", "appraise appraise_type=imasig appraise_type=sigv3 digest_type=verity",
			"stands before"},
		{"imasig behind sigv3", "appraise appraise_type=sigv3 appraise_type=imasig digest_type=verity", "excludes"},
		{"digest type twice about sigv3", "appraise digest_type=verity appraise_type=sigv3 digest_type=verity",
			"twice"},
		{"sigv3 alone", "appraise appraise_type=sigv3", "add digest_type=verity"},
		{"verity appraised without signature", "appraise func=BPRM_CHECK digest_type=verity",
			"add appraise_type=sigv3"},
		{"appraise type of measure", "measure appraise_type=imasig", "does not go with measure"},
		{"appraise type unknown", "appraise appraise_type=modsig", "unknown appraise type"},
		{"appraise flag empty", "appraise appraise_flag=", "no value"},
		{"algos of audit", "audit appraise_algos=sha256", "does not go with audit"},
		{"algos twice", "appraise appraise_algos=sha1 appraise_algos=sha1", "twice"},
		{"algos unknown", "appraise appraise_algos=sha257", "unknown hash algorithm"},
		{"algos end with a comma", "appraise appraise_algos=sha256,", "unknown hash algorithm"},
		{"algos that no kernel computes", "appraise appraise_algos=tgr192", "no kernel of today computes"},
		{"directio with a value", "measure permit_directio=1", "unknown condition"},
		{"modsig without func", "appraise appraise_type=imasig|modsig", "without func="},
		{"modsig of exec", "appraise func=BPRM_CHECK appraise_type=imasig|modsig", "write func=MODULE_CHECK"},
		{"verity of a module", "measure func=MODULE_CHECK digest_type=verity",
			"digest_type= does not go with func=MODULE_CHECK"},
		{"keyrings of a file", "measure func=FILE_CHECK keyrings=.ima", "write func=KEY_CHECK"},
		{"label of a file", "measure func=FILE_CHECK label=selinux", "write func=CRITICAL_DATA"},
		{"keyrings of data", "measure func=CRITICAL_DATA keyrings=.ima", "write func=KEY_CHECK"},
		{"audit of a command line", "audit func=KEXEC_CMDLINE", "does not go with audit"},
		{"mask of a command line", "measure func=KEXEC_CMDLINE mask=MAY_READ", "mask= does not go with"},
		{"appraise of a key", "appraise func=KEY_CHECK", "does not go with appraise"},
		{"euid of a key", "measure func=KEY_CHECK euid=0", "euid does not go with"},
		{"fsmagic of a key", "measure func=KEY_CHECK fsmagic=1", "fsmagic= does not go with"},
		{"label condition of a key", "measure func=KEY_CHECK subj_type=a_t", "labels of a security module"},
		{"label condition of data", "dont_measure func=CRITICAL_DATA obj_user=u", "labels of a security module"},
		{"hash of data", "hash func=CRITICAL_DATA", "does not go with hash"},
		{"setxattr measured", "measure func=SETXATTR_CHECK", "appraise_algos="},
		{"setxattr without algos", "appraise func=SETXATTR_CHECK", "appraise_algos="},
		{"setxattr with uid", "appraise func=SETXATTR_CHECK appraise_algos=sha256 uid=0", "uid does not go with"},
		{"setxattr with imasig", "appraise func=SETXATTR_CHECK appraise_algos=sha256 appraise_type=imasig",
			"appraise_type= does not"},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p, err := Parse("file", []byte("# first\n\n"+tt.rule+"\n"))
			var syntax *SyntaxError
			if !errors.As(err, &syntax) {
				t.Fatalf("got %q, %v, want a SyntaxError", p, err)
			}
			if syntax.File != "file" || syntax.Line != 3 || syntax.Rule != tt.rule {
				t.Errorf("got %s:%d: %q", syntax.File, syntax.Line, syntax.Rule)
			}
			if !strings.Contains(syntax.Reason, tt.says) {
				t.Errorf("reason %q does not say %q", syntax.Reason, tt.says)
			}
			tellsWhatToDo(t, err)
		})
	}
}

// tellsWhatToDo checks that a message ends with an instruction.
func tellsWhatToDo(t *testing.T, err error) {
	t.Helper()
	text := err.Error()
	advice := strings.TrimSpace(text[strings.LastIndexByte(text, ';')+1:])
	verb, _, _ := strings.Cut(advice, " ")
	switch verb {
	case "write", "use", "remove", "add", "give", "with": // "with digest_type=verity write …"
	default:
		t.Errorf("%q does not end with what to do", text)
	}
}

func TestParsePrints(t *testing.T) {
	tests := []struct{ name, rule, printed string }{
		{"action alone", "measure", "measure "},
		{"tabs and spaces", " \tmeasure\t \tfunc=BPRM_CHECK  ", "measure func=BPRM_CHECK "},
		{"any order", "uid=0 func=FILE_CHECK measure", "measure func=FILE_CHECK uid=0 "},
		{"old names", "measure func=PATH_CHECK", "measure func=FILE_CHECK "},
		{"old name of mmap", "audit func=FILE_MMAP", "audit func=MMAP_CHECK "},
		{"young action", "dont_audit fs_subtype=sshfs fsname=fuse", "dont_audit fsname=fuse fs_subtype=sshfs "},
		{"fsname, the last of two", "measure fsname=ext4 fsname=xfs", "measure fsname=xfs "},
		{"fsname longer than the kernel prints", "measure fsname=" + strings.Repeat("n", 70),
			"measure fsname=" + strings.Repeat("n", 70) + " "},
		{"pcr, the last of two", "measure pcr=11 pcr=12", "measure pcr=12 "},
		{"fsmagic 0 and another", "measure fsmagic=0 fsmagic=5", "measure fsmagic=0x5 "},
		{"uuid in capitals and with a tail", "measure fsuuid=8BCBE394-4F13-4144-BE8E-5AA9EA2CE2F6rest",
			"measure fsuuid=8bcbe394-4f13-4144-be8e-5aa9ea2ce2f6 "},
		{"largest id", "measure uid<4294967294", "measure uid<4294967294 "},
		{"template by its format", "measure template=d-ng|n-ng|sig", "measure template=ima-sig "},
		{"sigv3 first, as printed", "appraise appraise_type=sigv3 digest_type=verity",
			"appraise appraise_type=sigv3 digest_type=verity "},
		{"algos in the kernel's order", "appraise appraise_algos=sha512,sha1,sha1",
			"appraise appraise_algos=sha1,sha512 "},
		{"flag that does nothing", "appraise appraise_flag=check_blacklist", "appraise "},
		{"all that a file rule can have",
			"measure permit_directio digest_type=verity template=ima-ngv2 " +
				"subj_type=f subj_role=e subj_user=d obj_type=c obj_role=b obj_user=a fgroup<6 fowner>5 egid=4 euid=3 " +
				"fsuuid=8bcbe394-4f13-4144-be8e-5aa9ea2ce2f6 pcr=11 fs_subtype=s fsname=n fsmagic=1 mask=^MAY_READ " +
				"func=FILE_CHECK",
			"measure func=FILE_CHECK mask=^MAY_READ fsmagic=0x1 fsname=n fs_subtype=s pcr=11 " +
				"fsuuid=8bcbe394-4f13-4144-be8e-5aa9ea2ce2f6 euid=3 egid=4 fowner>5 fgroup<6 " +
				"obj_user=a obj_role=b obj_type=c subj_user=d subj_role=e subj_type=f " +
				"template=ima-ngv2 digest_type=verity permit_directio "},
	}
	for _, tt := range tests {
		t.Run(tt.name, func(t *testing.T) {
			p := mustParse(t, tt.rule)
			if got := p.String(); got != tt.printed+"\n" {
				t.Errorf("got  %q\nwant %q", got, tt.printed+"\n")
			}
			if again := mustParse(t, p.String()); again.String() != p.String() {
				t.Errorf("parsed again %q", again)
			}
		})
	}
}

func TestLinesAndText(t *testing.T) {
	p := mustParse(t, "# a policy\n\n  measure func=BPRM_CHECK \n\t# more\n \t \naudit")
	want := []struct {
		line int
		text string
	}{{3, "measure func=BPRM_CHECK"}, {6, "audit"}}
	if len(p.Rules()) != len(want) {
		t.Fatalf("got %d rules", len(p.Rules()))
	}
	for i, r := range p.Rules() {
		if r.Line != want[i].line || r.Text != want[i].text {
			t.Errorf("rule %d: %d %q", i, r.Line, r.Text)
		}
	}
	if p := mustParse(t, "\n# nothing\n"); len(p.Rules()) != 0 || p.String() != "" {
		t.Errorf("a policy of no rules: %q", p)
	}
}
