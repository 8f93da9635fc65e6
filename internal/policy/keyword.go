package policy

import (
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"strings"

	"imans.dev/imans-agent/internal/ima"
)

// keyword is what can stand before an operator. Its parse function takes a value, never empty, into the rule.
type keyword struct {
	name     string
	compares bool // takes < and > beside =
	parse    func(r *Rule, op byte, value string) error
}

var keywords = [...]keyword{
	{"func", false, (*Rule).parseFunc},
	{"mask", false, (*Rule).parseMask},
	{"fsmagic", false, (*Rule).parseFSMagic},
	{"fsname", false, (*Rule).parseFSName},
	{"fs_subtype", false, (*Rule).parseFSSubtype},
	{"fsuuid", false, (*Rule).parseFSUUID},
	{"uid", true, func(r *Rule, op byte, v string) error { return r.parseID(&r.uid, flagUID, flagEUID, op, v) }},
	{"euid", true, func(r *Rule, op byte, v string) error { return r.parseID(&r.uid, flagEUID, flagUID, op, v) }},
	{"gid", true, func(r *Rule, op byte, v string) error { return r.parseID(&r.gid, flagGID, flagEGID, op, v) }},
	{"egid", true, func(r *Rule, op byte, v string) error { return r.parseID(&r.gid, flagEGID, flagGID, op, v) }},
	{"fowner", true, func(r *Rule, op byte, v string) error { return r.parseID(&r.fowner, flagFOwner, 0, op, v) }},
	{"fgroup", true, func(r *Rule, op byte, v string) error { return r.parseID(&r.fgroup, flagFGroup, 0, op, v) }},
	{"obj_user", false, func(r *Rule, _ byte, v string) error { return r.parseLabel(ObjUser, v) }},
	{"obj_role", false, func(r *Rule, _ byte, v string) error { return r.parseLabel(ObjRole, v) }},
	{"obj_type", false, func(r *Rule, _ byte, v string) error { return r.parseLabel(ObjType, v) }},
	{"subj_user", false, func(r *Rule, _ byte, v string) error { return r.parseLabel(SubjUser, v) }},
	{"subj_role", false, func(r *Rule, _ byte, v string) error { return r.parseLabel(SubjRole, v) }},
	{"subj_type", false, func(r *Rule, _ byte, v string) error { return r.parseLabel(SubjType, v) }},
	{"keyrings", false, func(r *Rule, _ byte, v string) error { return r.parseList(&r.keyrings, flagKeyrings, v) }},
	{"label", false, func(r *Rule, _ byte, v string) error { return r.parseList(&r.dataNames, flagDataNames, v) }},
	{"pcr", false, (*Rule).parsePCR},
	{"template", false, (*Rule).parseTemplate},
	{"digest_type", false, (*Rule).parseDigestType},
	{"appraise_type", false, (*Rule).parseAppraiseType},
	{"appraise_flag", false, (*Rule).parseAppraiseFlag},
	{"appraise_algos", false, (*Rule).parseAppraiseAlgos},
}

func findKeyword(name string) (keyword, bool) {
	for _, k := range keywords {
		if k.name == name {
			return k, true
		}
	}
	return keyword{}, false
}

func keywordNames() string {
	var names []string
	for _, k := range keywords {
		names = append(names, k.name)
	}
	return strings.Join(names, " ")
}

var errTwice = errors.New("given twice; remove one")

func (r *Rule) parseFunc(_ byte, value string) error {
	if r.has(flagFunc) {
		return errTwice
	}
	f, ok := ima.FuncByName(value)
	if !ok {
		return fmt.Errorf("unknown function; use one of %s", funcNames())
	}
	r.Func, r.flags = f, r.flags|flagFunc
	return nil
}

func funcNames() string {
	var names []string
	for f := ima.FileCheck; f <= ima.SetxattrCheck; f++ {
		if f != ima.PostSetattr {
			names = append(names, f.String())
		}
	}
	return strings.Join(names, " ")
}

var maskNames = [...]struct {
	mask ima.Mask
	name string
}{{ima.MayExec, "MAY_EXEC"}, {ima.MayWrite, "MAY_WRITE"}, {ima.MayRead, "MAY_READ"}, {ima.MayAppend, "MAY_APPEND"}}

func (r *Rule) parseMask(_ byte, value string) error {
	if r.has(flagMask | flagInMask) {
		return errTwice
	}
	name, contained := strings.CutPrefix(value, "^")
	for _, m := range maskNames {
		if m.name == name {
			r.mask = m.mask
		}
	}
	switch {
	case r.mask == 0:
		return errors.New("unknown mask; use MAY_EXEC, MAY_WRITE, MAY_READ or MAY_APPEND, or ^ and one for \"among others\"")
	case contained:
		r.flags |= flagInMask
	default:
		r.flags |= flagMask
	}
	return nil
}

// parseFSMagic reads as the kernel's kstrtoul of base 16: a "+" and then a "0x" may stand before the digits.
func (r *Rule) parseFSMagic(_ byte, value string) error {
	if r.fsMagic != 0 {
		return errTwice
	}
	value = strings.TrimPrefix(value, "+")
	if len(value) > 1 && value[0] == '0' && value[1]|0x20 == 'x' {
		value = value[2:]
	}
	magic, err := strconv.ParseUint(value, 16, 64)
	if err != nil {
		return errors.New("not a number; write a hexadecimal one of 64 bits at most, such as 0x9fa0 for proc")
	}
	r.fsMagic, r.flags = magic, r.flags|flagFSMagic
	return nil
}

// parseFSName takes the last of several, as the kernel does.
func (r *Rule) parseFSName(_ byte, value string) error {
	r.fsName, r.flags = value, r.flags|flagFSName
	return nil
}

func (r *Rule) parseFSSubtype(_ byte, value string) error {
	if r.has(flagFSSubtype) {
		return errTwice
	}
	r.fsSubtype, r.flags = value, r.flags|flagFSSubtype
	return nil
}

// parseFSUUID reads 36 characters and, as the kernel's uuid_parse, does not look at what follows them.
func (r *Rule) parseFSUUID(_ byte, value string) error {
	const length = 36
	if r.fsUUID != [16]byte{} {
		return errTwice
	}
	errForm := errors.New("not a UUID; write one as blkid prints it, such as 8bcbe394-4f13-4144-be8e-5aa9ea2ce2f6")
	if len(value) < length {
		return errForm
	}
	value = value[:length]
	if value[8] != '-' || value[13] != '-' || value[18] != '-' || value[23] != '-' {
		return errForm
	}
	b, err := hex.DecodeString(value[:8] + value[9:13] + value[14:18] + value[19:23] + value[24:])
	if err != nil {
		return errForm
	}
	r.fsUUID, r.flags = [16]byte(b), r.flags|flagFSUUID
	return nil
}

// parseID takes the condition own; other is the one that shares its place, as euid shares that of uid.
func (r *Rule) parseID(c *idCondition, own, other flag, op byte, value string) error {
	switch {
	case r.has(own):
		return errTwice
	case r.has(other):
		return fmt.Errorf("excludes %s; remove one of them, or write two rules", other.first())
	}
	id, err := strconv.ParseUint(strings.TrimPrefix(value, "+"), 10, 32)
	if err != nil || id == 1<<32-1 {
		return errors.New("not an id; write a number from 0 to 4294967294")
	}
	*c = idCondition{op: op, id: uint32(id)}
	r.flags |= own
	return nil
}

func (r *Rule) parseLabel(l Label, value string) error {
	if r.labels[l] != "" {
		return errTwice
	}
	r.labels[l] = value
	return nil
}

func (r *Rule) parseList(list *[]string, f flag, value string) error {
	if r.has(f) {
		return errTwice
	}
	items := strings.Split(value, "|")
	if slices.Contains(items, "") {
		return errors.New("an empty name; write names with one | between them, and no other")
	}
	*list, r.flags = items, r.flags|f
	return nil
}
