// Package policy is IMA's rule language: Parse, String, Match. It is pure: no I/O, any OS.
//
// # The language
//
// A policy is text, one rule a line. A line whose first character (spaces and tabs aside) is "#", and an empty line, is no rule.
// A rule is an action, then conditions and options in any order, separated by spaces or tabs:
//
//	action     measure dont_measure appraise dont_appraise audit hash dont_hash
//	condition  func= mask= fsmagic= fsname= fsuuid= uid euid gid egid fowner fgroup (each with = < or >)
//	           obj_user= obj_role= obj_type= subj_user= subj_role= subj_type= keyrings= label=
//	option     pcr= template= digest_type= appraise_type= appraise_flag= appraise_algos= permit_directio
//
// For an event the rules are tried in order. The first that matches decides about its kind of action (measure or dont_measure,
// and so on), and later rules only about the other kinds. A condition that is absent matches anything.
//
// An example: nothing on tmpfs, else all that runs, root's reads into PCR 11.
//
//	dont_measure fsmagic=0x1021994
//	measure func=BPRM_CHECK mask=MAY_EXEC
//	measure func=FILE_CHECK mask=^MAY_READ uid=0 pcr=11
//
// Parse accepts what Linux 6.12 accepts and refuses what it refuses, but says why. String prints as the kernel's policy file
// does, so a policy printed and parsed again is the same policy. Source: security/integrity/ima/ima_policy.c (ima_parse_rule,
// ima_validate_rule, ima_match_rules, ima_policy_show) and Documentation/ABI/testing/ima_policy.
//
// A Policy is immutable and may be used by any number of goroutines.
package policy

import (
	"fmt"
	"slices"

	"imans.dev/imans-agent/internal/ima"
)

// Policy is a list of rules.
type Policy struct{ rules []*Rule }

// Rules returns the rules in order. Don't change them.
func (p *Policy) Rules() []*Rule { return p.rules }

// Append returns a policy of both parties' rules, as a second write to the kernel's policy file makes it.
func Append(first, second *Policy) *Policy {
	return &Policy{rules: slices.Concat(first.rules, second.rules)}
}

// NamesIDs reports whether any rule looks at a user or group id of the subject.
func (p *Policy) NamesIDs() bool {
	return slices.ContainsFunc(p.rules, func(r *Rule) bool {
		return r.has(flagUID | flagEUID | flagGID | flagEGID)
	})
}

// Action is a rule's action.
type Action uint8

// The actions, in the order in which the kernel knows them.
const (
	unknown Action = iota
	Measure
	DontMeasure
	Appraise
	DontAppraise
	Audit
	Hash
	DontHash
)

var actionNames = [...]string{"", "measure", "dont_measure", "appraise", "dont_appraise", "audit", "hash", "dont_hash"}

// String returns the word of the language.
func (a Action) String() string { return actionNames[a] }

// does returns what the action adds to a decision, and which kind of action it decides about.
func (a Action) does() (adds, kind ima.Action) {
	switch a {
	case Measure:
		return ima.Measure, ima.Measure
	case DontMeasure:
		return 0, ima.Measure
	case Appraise:
		return ima.Appraise, ima.Appraise
	case DontAppraise:
		return 0, ima.Appraise
	case Audit:
		return ima.Audit, ima.Audit
	case Hash:
		return ima.Hash, ima.Hash
	}
	return 0, ima.Hash
}

// flag says which conditions and options a rule has: the kernel's IMA_* rule flags.
type flag uint32

const (
	flagFunc flag = 1 << iota
	flagMask
	flagInMask
	flagFSMagic
	flagFSName
	flagFSUUID
	flagUID
	flagEUID
	flagGID
	flagEGID
	flagFOwner
	flagFGroup
	flagPCR
	flagKeyrings
	flagLabel
	flagDigsig
	flagModsig
	flagBlacklist
	flagAlgos
	flagDirectIO
	flagVerity
)

// idCondition is an id and how to compare with it.
type idCondition struct {
	op byte // '=', '<' or '>'
	id uint32
}

func (c idCondition) match(id uint32) bool {
	switch c.op {
	case '<':
		return id < c.id
	case '>':
		return id > c.id
	}
	return id == c.id
}

// Rule is one rule.
type Rule struct {
	Action   Action
	Func     ima.Func
	Line     int    // in its file, from 1; 0 for a built-in policy
	Text     string // as it was written
	flags    flag
	mask     ima.Mask
	fsMagic  uint64
	fsName   string
	fsUUID   [16]byte
	uid      idCondition // uid or euid: a rule can have one of them
	gid      idCondition
	fowner   idCondition
	fgroup   idCondition
	lsm      [numLabels]string
	pcr      int
	template string
	keyrings []string
	labels   []string
	algos    []ima.HashAlgo // ascending
	sigv3    bool           // appraise_type=sigv3
}

func (r *Rule) has(f flag) bool { return r.flags&f != 0 }

// The LSM label conditions, in the kernel's order.
const (
	labelObjUser = iota
	labelObjRole
	labelObjType
	labelSubjUser
	labelSubjRole
	labelSubjType
	numLabels
)

var labelNames = [numLabels]string{"obj_user", "obj_role", "obj_type", "subj_user", "subj_role", "subj_type"}

// SyntaxError is a rule that is refused.
type SyntaxError struct {
	File   string
	Line   int // from 1
	Rule   string
	Reason string
}

// Error tells where, what and why.
func (e *SyntaxError) Error() string {
	return fmt.Sprintf("%s:%d: %q: %s", e.File, e.Line, e.Rule, e.Reason)
}
