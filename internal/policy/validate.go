package policy

import (
	"errors"
	"fmt"
	"slices"

	"imans.dev/imans-agent/internal/ima"
)

// What a rule of each group of functions may have. Source: ima_policy.c, ima_validate_rule.
const (
	inodeFlags = flagFunc | flagFSMagic | flagFSName | flagFSUUID | flagUID | flagEUID | flagGID | flagEGID | flagFOwner |
		flagFGroup | flagPCR
	fileFlags = inodeFlags | flagMask | flagInMask | flagDigsig | flagDirectIO | flagAlgos | flagBlacklist | flagVerity
	// Kernel images and modules may carry an appended signature, and have no fs-verity digest.
	imageFlags = fileFlags&^flagVerity | flagModsig
	bufFlags   = flagFunc | flagUID | flagGID | flagPCR
)

// validate refuses what the kernel refuses once a rule is read whole.
func (r *Rule) validate() error {
	appraiseOnly := flagDigsig | flagModsig | flagBlacklist | flagAlgos
	switch {
	case r.Action == unknown:
		return fmt.Errorf("no action; begin the rule with one of %v", actionNames[1:])
	case r.Action != Measure && r.has(flagPCR):
		return errors.New("pcr= needs the action measure")
	case r.Action != Appraise && r.has(appraiseOnly):
		return errors.New("appraise_type= and appraise_algos= need the action appraise")
	}
	if err := r.validateFunc(); err != nil {
		return err
	}
	switch {
	case r.sigv3 && !r.has(flagVerity):
		return errors.New("appraise_type=sigv3 needs digest_type=verity")
	case r.Action == Appraise && r.has(flagVerity) && !r.sigv3:
		return errors.New("appraise with digest_type=verity needs appraise_type=sigv3 and no other")
	}
	return nil
}

// validateFunc checks that the function takes the rule's action, conditions and options.
func (r *Rule) validateFunc() error {
	allowed := fileFlags
	switch r.Func {
	case ima.ModuleCheck, ima.KexecKernelCheck, ima.KexecInitramfsCheck:
		allowed = imageFlags
	case ima.KexecCmdline:
		allowed = inodeFlags
	case ima.KeyCheck:
		allowed = bufFlags | flagKeyrings
	case ima.CriticalData:
		allowed = bufFlags | flagLabel
	case ima.SetxattrCheck:
		if r.Action != Appraise || !r.has(flagAlgos) {
			return errors.New("func=SETXATTR_CHECK needs the action appraise and appraise_algos=")
		}
		allowed = flagFunc | flagAlgos
	}
	switch r.Func {
	case ima.KexecCmdline, ima.KeyCheck, ima.CriticalData:
		if r.Action != Measure && r.Action != DontMeasure {
			return fmt.Errorf("func=%v takes only measure and dont_measure", r.Func)
		}
	}
	if r.flags&^allowed != 0 {
		return fmt.Errorf("func=%v does not take %v; remove it or choose another function", r.Func, (r.flags &^ allowed).names())
	}
	if (r.Func == ima.KeyCheck || r.Func == ima.CriticalData) && r.hasLabels() {
		return fmt.Errorf("func=%v does not take labels of a security module", r.Func)
	}
	return nil
}

func (r *Rule) hasLabels() bool { return r.lsm != [numLabels]string{} }

var flagNames = []string{
	"func", "mask", "mask", "fsmagic", "fsname", "fsuuid", "uid", "euid", "gid", "egid", "fowner", "fgroup", "pcr", "keyrings", "label",
	"appraise_type", "appraise_type=imasig|modsig", "appraise_type", "appraise_algos", "permit_directio", "digest_type",
}

func (f flag) names() []string {
	var names []string
	for i, name := range flagNames {
		if f&(1<<i) != 0 && !slices.Contains(names, name) {
			names = append(names, name)
		}
	}
	return names
}

// Wired is what a program does of the language.
type Wired struct {
	Funcs     []ima.Func
	Actions   []Action // beside the dont_ ones, which ask for nothing
	Templates []string
	MaxPCR    int
}

// CheckWired refuses, with *SyntaxError, a policy that asks for more than a program does: a rule is never ignored. name stands for
// the policy in the error.
func (p *Policy) CheckWired(name string, w Wired) error {
	for _, r := range p.rules {
		if err := w.check(r); err != nil {
			return &SyntaxError{File: name, Line: r.Line, Rule: r.Text, Reason: err.Error()}
		}
	}
	return nil
}

func (w Wired) check(r *Rule) error {
	switch r.Action {
	case DontMeasure, DontAppraise, DontHash:
		if r.hasLabels() {
			return errors.New("labels of security modules are not looked at yet; remove the condition")
		}
		return nil
	}
	switch {
	case !slices.Contains(w.Actions, r.Action):
		return fmt.Errorf("the action %v is not done yet; remove the rule", r.Action)
	case !r.has(flagFunc):
		return fmt.Errorf("a rule without func= asks for all functions, and only %v are done yet; name one of them", w.Funcs)
	case !slices.Contains(w.Funcs, r.Func):
		return fmt.Errorf("func=%v is not done yet, only %v; remove the rule", r.Func, w.Funcs)
	case r.hasLabels():
		return errors.New("labels of security modules are not looked at yet; remove the condition")
	case r.has(flagVerity):
		return errors.New("digest_type=verity is not done yet; remove it")
	case r.template != "" && !slices.Contains(w.Templates, r.template):
		return fmt.Errorf("template=%s can't be filled yet, only %v", r.template, w.Templates)
	case r.has(flagPCR) && r.pcr > w.MaxPCR:
		return fmt.Errorf("pcr=%d: a TPM has PCRs 0 to %d", r.pcr, w.MaxPCR)
	}
	return nil
}
