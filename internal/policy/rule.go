package policy

import "imans.dev/imans-agent/internal/ima"

// Rule is one rule.
type Rule struct {
	Action Action
	Func   ima.Func // FuncNone: any
	Line   int      // in its file, or in the text of a built-in policy, from 1
	Text   string   // as it was written, without the spaces around it

	flags     flag
	mask      ima.Mask
	fsMagic   uint64
	fsName    string
	fsSubtype string
	fsUUID    [16]byte
	uid       idCondition // uid or euid: a rule can have one of them
	gid       idCondition
	fowner    idCondition
	fgroup    idCondition
	ids       *ima.IDMaps // of the user namespace whose ids these are; nil: the initial one
	labels    Labels
	pcr       int
	template  string // "": none named
	keyrings  []string
	dataNames []string // label=
	algos     AlgoSet
	sigv3     bool // appraise_type=sigv3
}

func (r *Rule) has(f flag) bool { return r.flags&f != 0 }

// flag says which conditions and options a rule has: the kernel's IMA_* rule flags. Labels and template= have none, in
// the kernel as here, so that no function refuses them by its flags.
type flag uint32

const (
	flagFunc flag = 1 << iota
	flagMask
	flagInMask
	flagFSMagic
	flagFSName
	flagFSSubtype
	flagFSUUID
	flagUID
	flagEUID
	flagGID
	flagEGID
	flagFOwner
	flagFGroup
	flagPCR
	flagKeyrings
	flagDataNames
	flagDigsig    // IMA_DIGSIG_REQUIRED
	flagModsig    // IMA_MODSIG_ALLOWED
	flagBlacklist // IMA_CHECK_BLACKLIST
	flagAlgos     // IMA_VALIDATE_ALGOS
	flagDirectIO  // IMA_PERMIT_DIRECTIO
	flagVerity    // IMA_VERITY_REQUIRED
)

// flagWords is indexed by the flag's bit: what to write, or remove, in a rule.
var flagWords = [...]string{
	"func=", "mask=", "mask=", "fsmagic=", "fsname=", "fs_subtype=", "fsuuid=", "uid", "euid", "gid", "egid", "fowner",
	"fgroup", "pcr=", "keyrings=", "label=", "appraise_type=", "appraise_type=imasig|modsig", "appraise_type=",
	"appraise_algos=", "permit_directio", "digest_type=",
}

// first returns the word of the lowest flag of a set.
func (f flag) first() string {
	for i, word := range flagWords {
		if f&(1<<i) != 0 {
			return word
		}
	}
	return ""
}
