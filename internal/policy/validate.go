package policy

import (
	"errors"
	"fmt"
	"strings"

	"imans.dev/imans-agent/internal/ima"
)

// What a rule of each group of functions may have. Source: ima_policy.c, ima_validate_rule.
const (
	// inodeFlags are of any function that has a file system's object.
	inodeFlags = flagFunc | flagFSMagic | flagFSName | flagFSSubtype | flagFSUUID | flagUID | flagEUID | flagGID |
		flagEGID | flagFOwner | flagFGroup | flagPCR
	fileFlags = inodeFlags | flagMask | flagInMask | flagDigsig | flagDirectIO | flagAlgos | flagBlacklist | flagVerity
	// Kernel images and modules may carry an appended signature, and have no fs-verity digest.
	imageFlags = fileFlags&^flagVerity | flagModsig
	dataFlags  = flagFunc | flagUID | flagGID | flagPCR
)

// validate refuses what the kernel refuses once a rule is read whole. It establishes, in this order: that there is an
// action; that pcr= stands with measure, and the appraise_ options with appraise; that the function takes the action,
// the conditions and the options; that fs-verity's digest and its signature format stand together.
func (r *Rule) validate() error {
	appraiseOnly := flagDigsig | flagModsig | flagBlacklist | flagAlgos
	switch {
	case r.Action == unknown:
		return fmt.Errorf("no action; write one of %s", strings.Join(actionNames[1:], " "))
	case r.Action != Measure && r.has(flagPCR):
		return fmt.Errorf("pcr= does not go with %v; remove it, or write measure", r.Action)
	case r.Action != Appraise && r.has(appraiseOnly):
		return fmt.Errorf("%s does not go with %v; remove it, or write appraise", (r.flags & appraiseOnly).first(), r.Action)
	}
	if err := r.validateFunc(); err != nil {
		return err
	}
	switch {
	case r.sigv3 && !r.has(flagVerity):
		return errors.New("appraise_type=sigv3 is a signature of fs-verity's digest; add digest_type=verity before it")
	case r.Action == Appraise && r.has(flagVerity) && !r.sigv3:
		return errors.New("fs-verity's digest is appraised by its signature; add appraise_type=sigv3 behind it")
	}
	return nil
}

// validateFunc checks that the function takes the rule's action, conditions and options.
func (r *Rule) validateFunc() error {
	allowed, measureOnly, labels := fileFlags, false, true
	switch r.Func {
	case ima.ModuleCheck, ima.KexecKernelCheck, ima.KexecInitramfsCheck:
		allowed = imageFlags
	case ima.KexecCmdline:
		allowed, measureOnly = inodeFlags, true
	case ima.KeyCheck:
		allowed, measureOnly, labels = dataFlags|flagKeyrings, true, false
	case ima.CriticalData:
		allowed, measureOnly, labels = dataFlags|flagDataNames, true, false
	case ima.SetxattrCheck:
		allowed = flagFunc | flagAlgos
		if r.Action != Appraise || !r.has(flagAlgos) {
			return errors.New("func=SETXATTR_CHECK names algorithms that may be written; write appraise and appraise_algos=")
		}
	}
	if measureOnly && r.Action != Measure && r.Action != DontMeasure {
		return fmt.Errorf("func=%v does not go with %v; write measure or dont_measure", r.Func, r.Action)
	}
	if excess := r.flags &^ allowed; excess != 0 {
		return fmt.Errorf("%s does not go with %s; remove it%s", excess.first(), r.funcWord(), excess.home())
	}
	if !labels && r.labels != (Labels{}) {
		return fmt.Errorf("labels of a security module do not go with func=%v; remove them", r.Func)
	}
	return nil
}

// funcWord names the rule's function in a message.
func (r *Rule) funcWord() string {
	if !r.has(flagFunc) {
		return "a rule without func="
	}
	return "func=" + r.Func.String()
}

// home says with which functions the first flag of a set does go, if it is few.
func (f flag) home() string {
	switch f & -f {
	case flagKeyrings:
		return ", or write func=KEY_CHECK"
	case flagDataNames:
		return ", or write func=CRITICAL_DATA"
	case flagModsig:
		return ", or write func=MODULE_CHECK, KEXEC_KERNEL_CHECK or KEXEC_INITRAMFS_CHECK"
	}
	return ""
}
