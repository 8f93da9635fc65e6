package policy

import (
	"slices"
	"strings"
)

type builtin struct{ name, rules string }

// builtins are the policies that have a name, in the order in which the kernel joins them. Source: ima_policy.c
// (dont_measure_rules to critical_data_rules, ima_init_policy), with CONFIG_IMA_WRITE_POLICY and without
// CONFIG_IMA_APPRAISE_SIGNED_INIT. The policy exec is ours.
var builtins = [...]builtin{
	{"ima_tcb", dontMeasure + `measure func=MMAP_CHECK mask=MAY_EXEC
measure func=BPRM_CHECK mask=MAY_EXEC
measure func=FILE_CHECK mask=MAY_READ uid=0
measure func=MODULE_CHECK
measure func=FIRMWARE_CHECK
`},
	{"tcb", dontMeasure + `measure func=MMAP_CHECK mask=MAY_EXEC
measure func=BPRM_CHECK mask=MAY_EXEC
measure func=FILE_CHECK mask=^MAY_READ euid=0
measure func=FILE_CHECK mask=^MAY_READ uid=0
measure func=MODULE_CHECK
measure func=FIRMWARE_CHECK
measure func=POLICY_CHECK
`},
	{"exec", `measure func=BPRM_CHECK mask=MAY_EXEC
measure func=MMAP_CHECK mask=MAY_EXEC
`},
	{"secure_boot", `appraise func=MODULE_CHECK appraise_type=imasig
appraise func=FIRMWARE_CHECK appraise_type=imasig
appraise func=KEXEC_KERNEL_CHECK appraise_type=imasig
appraise func=POLICY_CHECK appraise_type=imasig
`},
	{"appraise_tcb", `dont_appraise fsmagic=0x9fa0
dont_appraise fsmagic=0x62656572
dont_appraise fsmagic=0x64626720
dont_appraise fsmagic=0x1021994
dont_appraise fsmagic=0x858458f6
dont_appraise fsmagic=0x1cd1
dont_appraise fsmagic=0x42494e4d
dont_appraise fsmagic=0x73636673
dont_appraise fsmagic=0xf97cff8c
dont_appraise fsmagic=0x43415d53
dont_appraise fsmagic=0x6e736673
dont_appraise fsmagic=0xde5e81e4
dont_appraise fsmagic=0x27e0eb
dont_appraise fsmagic=0x63677270
appraise func=POLICY_CHECK appraise_type=imasig
appraise fowner=0
`},
	{"critical_data", "measure func=CRITICAL_DATA\n"},
	{failSecurely, ""},
}

// failSecurely has no rules: it says how to appraise.
const failSecurely = "fail_securely"

// dontMeasure leaves out file systems that hold no files of their own, by magic number: proc, sysfs, debugfs, tmpfs,
// devpts, binfmt_misc, securityfs, selinuxfs, smackfs, cgroup, cgroup2, nsfs, efivarfs. It begins the kernel's
// measuring policies.
const dontMeasure = `dont_measure fsmagic=0x9fa0
dont_measure fsmagic=0x62656572
dont_measure fsmagic=0x64626720
dont_measure fsmagic=0x1021994
dont_measure fsmagic=0x1cd1
dont_measure fsmagic=0x42494e4d
dont_measure fsmagic=0x73636673
dont_measure fsmagic=0xf97cff8c
dont_measure fsmagic=0x43415d53
dont_measure fsmagic=0x27e0eb
dont_measure fsmagic=0x63677270
dont_measure fsmagic=0x6e736673
dont_measure fsmagic=0xde5e81e4
`

// Builtin returns the policy of a name, and whether there is one. The names are those of the kernel's command line
// (ima_policy=): tcb, appraise_tcb, secure_boot, critical_data and fail_securely, the older ima_tcb and
// ima_appraise_tcb, and exec, which is ours. Several may be joined by "|", as there; their rules come in the kernel's
// order, whatever the order of the names.
//
// exec measures each program that is run and each file that is mapped to be executed (libraries), on every file system
// and by every user, and nothing else. It is the part of tcb without which no list says what ran: no file that is read
// only, and so no endless list, and no exception for tmpfs, where containers and attackers keep programs.
func Builtin(name string) (*Policy, bool) {
	names := strings.Split(name, "|")
	for i, n := range names {
		if n == "ima_appraise_tcb" {
			names[i] = "appraise_tcb"
		}
	}
	p, found := &Policy{}, 0
	for _, b := range builtins {
		if !slices.Contains(names, b.name) {
			continue
		}
		found++
		p = Append(p, b.parse())
	}
	slices.Sort(names)
	if found != len(slices.Compact(names)) {
		return nil, false
	}
	return p, true
}

// parse makes the rules as the kernel has them. They are as parsed, but for one thing that no text can say: they do not
// look at the blacklist.
func (b builtin) parse() *Policy {
	p, err := Parse(b.name, []byte(b.rules))
	if err != nil {
		panic("built-in policy: " + err.Error())
	}
	for _, r := range p.rules {
		r.flags &^= flagBlacklist
	}
	p.failUnverifiable = b.name == failSecurely
	return p
}
