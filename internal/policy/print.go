package policy

import (
	"fmt"
	"strings"

	"imans.dev/imans-agent/internal/ima"
)

// String prints the rules as the kernel's policy file does, one a line, each with a space before its newline, with the ids that
// the host has.
func (p *Policy) String() string { return p.StringIn(ima.InitialMaps()) }

// StringIn is String for a reader in a user namespace of those maps: ids are what they are there, ima.OverflowID if nothing.
func (p *Policy) StringIn(maps ima.IDMaps) string {
	var b strings.Builder
	for _, r := range p.rules {
		b.WriteString(r.shownIn(maps).String())
	}
	return b.String()
}

// String prints the rule as the kernel does, newline included, with the ids as they were written. Source: ima_policy.c,
// ima_policy_show.
func (r *Rule) String() string {
	var b strings.Builder
	b.WriteString(r.Action.String() + " ")
	put := func(f flag, format string, args ...any) {
		if r.has(f) {
			fmt.Fprintf(&b, format+" ", args...)
		}
	}
	put(flagFunc, "func=%v", r.Func)
	put(flagMask, "mask=%s", r.maskName())
	put(flagInMask, "mask=^%s", r.maskName())
	put(flagFSMagic, "fsmagic=0x%x", r.fsMagic)
	put(flagFSName, "fsname=%s", r.fsName)
	put(flagFSSubtype, "fs_subtype=%s", r.fsSubtype)
	put(flagKeyrings, "keyrings=%s", strings.Join(r.keyrings, "|"))
	put(flagDataNames, "label=%s", strings.Join(r.dataNames, "|"))
	put(flagPCR, "pcr=%d", r.pcr)
	u := r.fsUUID
	put(flagFSUUID, "fsuuid=%x-%x-%x-%x-%x", u[:4], u[4:6], u[6:8], u[8:10], u[10:])
	put(flagUID, "uid%v", r.uid)
	put(flagEUID, "euid%v", r.uid)
	put(flagGID, "gid%v", r.gid)
	put(flagEGID, "egid%v", r.gid)
	put(flagFOwner, "fowner%v", r.fowner)
	put(flagFGroup, "fgroup%v", r.fgroup)
	put(flagAlgos, "appraise_algos=%v", r.algos)
	for i, label := range r.labels {
		if label != "" {
			fmt.Fprintf(&b, "%v=%s ", Label(i), label)
		}
	}
	if r.template != "" {
		fmt.Fprintf(&b, "template=%s ", r.template)
	}
	switch {
	case r.has(flagVerity):
		put(flagDigsig, "appraise_type=sigv3")
	case r.has(flagModsig):
		put(flagDigsig, "appraise_type=imasig|modsig")
	default:
		put(flagDigsig, "appraise_type=imasig")
	}
	put(flagVerity, "digest_type=verity")
	put(flagDirectIO, "permit_directio")
	return b.String() + "\n"
}

// String is the operator and the id.
func (c idCondition) String() string { return fmt.Sprintf("%c%d", c.op, c.id) }

func (r *Rule) maskName() string {
	for _, n := range maskNames {
		if n.mask == r.mask {
			return n.name
		}
	}
	return ""
}
