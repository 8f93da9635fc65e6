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

// Parse reads a policy. name stands for it in errors, all of which are *SyntaxError.
func Parse(name string, text []byte) (*Policy, error) {
	p := &Policy{}
	number := 0
	for line := range strings.SplitSeq(string(text), "\n") {
		number++
		rule := strings.Trim(line, " \t")
		if rule == "" || rule[0] == '#' {
			continue
		}
		r, err := parseRule(rule)
		if err != nil {
			return nil, &SyntaxError{File: name, Line: number, Rule: rule, Reason: err.Error()}
		}
		r.Line = number
		p.rules = append(p.rules, r)
	}
	return p, nil
}

func parseRule(text string) (*Rule, error) {
	if i := strings.IndexFunc(text, func(c rune) bool { return c < ' ' && c != '\t' || c == 0x7f }); i >= 0 {
		return nil, fmt.Errorf("a control byte at column %d; a rule is plain text on one line (is the file from Windows?)", i+1)
	}
	r := &Rule{Text: text}
	for word := range strings.FieldsFuncSeq(text, func(c rune) bool { return c == ' ' || c == '\t' }) {
		if err := r.parseWord(word); err != nil {
			return nil, err
		}
	}
	return r, r.validate()
}

// parseWord takes one word: an action, an option without value, or KEYWORD and operator and value.
func (r *Rule) parseWord(word string) error {
	if i := slices.Index(actionNames[1:], word); i >= 0 {
		if r.Action != unknown {
			return fmt.Errorf("a second action, %s; a rule has one", word)
		}
		r.Action = Action(i + 1)
		return nil
	}
	if word == "permit_directio" {
		r.flags |= flagDirectIO
		return nil
	}
	i := strings.IndexAny(word, "=<>")
	if i < 0 {
		return fmt.Errorf("unknown word %q; an action is one of %s", word, strings.Join(actionNames[1:], " "))
	}
	keyword, op, value := word[:i], word[i], word[i+1:]
	parse, ok := keywords[keyword]
	if !ok {
		return fmt.Errorf("unknown condition or option %q; known are %s", keyword, strings.Join(keywordNames(), " "))
	}
	if op != '=' && !slices.Contains(idKeywords, keyword) {
		return fmt.Errorf("%s%c: only ids can be compared by < and >; write %s=", keyword, op, keyword)
	}
	if err := parse(r, op, value); err != nil {
		return fmt.Errorf("%s: %w", word, err)
	}
	return nil
}

var idKeywords = []string{"uid", "euid", "gid", "egid", "fowner", "fgroup"}

func keywordNames() []string {
	var names []string
	for k := range keywords {
		names = append(names, k)
	}
	slices.Sort(names)
	return names
}

// keywords is what can stand before an operator.
var keywords = map[string]func(r *Rule, op byte, value string) error{
	"func":           (*Rule).parseFunc,
	"mask":           (*Rule).parseMask,
	"fsmagic":        (*Rule).parseFSMagic,
	"fsname":         (*Rule).parseFSName,
	"fsuuid":         (*Rule).parseFSUUID,
	"uid":            func(r *Rule, op byte, v string) error { return r.parseID(&r.uid, flagUID, flagUID|flagEUID, op, v) },
	"euid":           func(r *Rule, op byte, v string) error { return r.parseID(&r.uid, flagEUID, flagUID|flagEUID, op, v) },
	"gid":            func(r *Rule, op byte, v string) error { return r.parseID(&r.gid, flagGID, flagGID|flagEGID, op, v) },
	"egid":           func(r *Rule, op byte, v string) error { return r.parseID(&r.gid, flagEGID, flagGID|flagEGID, op, v) },
	"fowner":         func(r *Rule, op byte, v string) error { return r.parseID(&r.fowner, flagFOwner, flagFOwner, op, v) },
	"fgroup":         func(r *Rule, op byte, v string) error { return r.parseID(&r.fgroup, flagFGroup, flagFGroup, op, v) },
	"obj_user":       func(r *Rule, _ byte, v string) error { return r.parseLabel(labelObjUser, v) },
	"obj_role":       func(r *Rule, _ byte, v string) error { return r.parseLabel(labelObjRole, v) },
	"obj_type":       func(r *Rule, _ byte, v string) error { return r.parseLabel(labelObjType, v) },
	"subj_user":      func(r *Rule, _ byte, v string) error { return r.parseLabel(labelSubjUser, v) },
	"subj_role":      func(r *Rule, _ byte, v string) error { return r.parseLabel(labelSubjRole, v) },
	"subj_type":      func(r *Rule, _ byte, v string) error { return r.parseLabel(labelSubjType, v) },
	"keyrings":       func(r *Rule, _ byte, v string) error { return r.parseList(&r.keyrings, flagKeyrings, v) },
	"label":          func(r *Rule, _ byte, v string) error { return r.parseList(&r.labels, flagLabel, v) },
	"pcr":            (*Rule).parsePCR,
	"template":       (*Rule).parseTemplate,
	"digest_type":    (*Rule).parseDigestType,
	"appraise_type":  (*Rule).parseAppraiseType,
	"appraise_flag":  func(*Rule, byte, string) error { return nil }, // the kernel reads it and does nothing
	"appraise_algos": (*Rule).parseAppraiseAlgos,
}

var errTwice = errors.New("given twice")

func (r *Rule) parseFunc(_ byte, value string) error {
	if r.has(flagFunc) {
		return errTwice
	}
	f, ok := ima.FuncByName(value)
	if !ok {
		return errors.New("unknown function, such as BPRM_CHECK, MMAP_CHECK or FILE_CHECK")
	}
	r.Func, r.flags = f, r.flags|flagFunc
	return nil
}

var maskNames = []struct {
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
	if r.mask == 0 {
		return errors.New("want MAY_EXEC, MAY_WRITE, MAY_READ or MAY_APPEND, or ^ before one for \"contained in\"")
	}
	r.flags |= flagMask
	if contained {
		r.flags ^= flagMask | flagInMask
	}
	return nil
}

func (r *Rule) parseFSMagic(_ byte, value string) error {
	if r.fsMagic != 0 {
		return errTwice
	}
	value = strings.TrimPrefix(value, "+")
	value = strings.TrimPrefix(strings.TrimPrefix(value, "0x"), "0X")
	magic, err := strconv.ParseUint(value, 16, 64)
	if err != nil {
		return errors.New("want a hexadecimal number, such as 0x9fa0 for proc")
	}
	r.fsMagic, r.flags = magic, r.flags|flagFSMagic
	return nil
}

func (r *Rule) parseFSName(_ byte, value string) error {
	r.fsName, r.flags = value, r.flags|flagFSName
	return nil
}

func (r *Rule) parseFSUUID(_ byte, value string) error {
	if r.fsUUID != [16]byte{} {
		return errTwice
	}
	compact := strings.ReplaceAll(value, "-", "")
	b, err := hex.DecodeString(compact)
	dashes := len(value) == 36 && value[8] == '-' && value[13] == '-' && value[18] == '-' && value[23] == '-'
	if err != nil || len(b) != 16 || !dashes {
		return errors.New("want a UUID, such as 6f1b1b7e-52ef-4d4c-a1b8-0f6b4c5d3a21")
	}
	r.fsUUID, r.flags = [16]byte(b), r.flags|flagFSUUID
	return nil
}

func (r *Rule) parseID(c *idCondition, f, exclusive flag, op byte, value string) error {
	if r.has(exclusive) {
		return errors.New("given twice; uid and euid, and gid and egid, exclude each other")
	}
	id, err := strconv.ParseUint(strings.TrimPrefix(value, "+"), 10, 32)
	if err != nil || id == 1<<32-1 {
		return errors.New("want a number from 0 to 4294967294")
	}
	*c = idCondition{op, uint32(id)}
	r.flags |= f
	return nil
}

func (r *Rule) parseLabel(i int, value string) error {
	if r.lsm[i] != "" {
		return errTwice
	}
	if value == "" {
		return errors.New("want a label")
	}
	r.lsm[i] = value
	return nil
}

func (r *Rule) parseList(list *[]string, f flag, value string) error {
	if r.has(f) {
		return errTwice
	}
	items := strings.Split(value, "|")
	if slices.Contains(items, "") {
		return errors.New("want names, joined by |")
	}
	*list, r.flags = items, r.flags|f
	return nil
}

func (r *Rule) parsePCR(_ byte, value string) error {
	pcr, err := strconv.Atoi(value)
	if err != nil || pcr < 0 || pcr > 63 {
		return errors.New("want a PCR number")
	}
	r.pcr, r.flags = pcr, r.flags|flagPCR
	return nil
}

// templates are those that the kernel defines. Source: ima_template.c, builtin_templates.
var templates = []string{"ima", "ima-ng", "ima-sig", "ima-ngv2", "ima-sigv2", "ima-buf", "ima-modsig", "evm-sig"}

func (r *Rule) parseTemplate(_ byte, value string) error {
	switch {
	case r.Action != Measure:
		return errors.New("only a measure rule has a template, and the action must come before it")
	case r.template != "":
		return errTwice
	case !slices.Contains(templates, value):
		return fmt.Errorf("unknown template; known are %s", strings.Join(templates, " "))
	}
	r.template = value
	return nil
}

func (r *Rule) parseDigestType(_ byte, value string) error {
	switch {
	case r.has(flagDigsig) && !r.sigv3:
		return errors.New("excludes the appraise types imasig and imasig|modsig")
	case value != "verity":
		return errors.New("want verity")
	}
	r.flags |= flagVerity
	return nil
}

// parseAppraiseType takes sigv3 before digest_type=verity too: the kernel does not, but prints them in that order.
func (r *Rule) parseAppraiseType(_ byte, value string) error {
	const digsig = flagDigsig | flagBlacklist
	switch {
	case value == "sigv3":
		r.flags |= digsig
		r.sigv3 = true
	case r.has(flagVerity):
		return errors.New("with digest_type=verity only sigv3 is possible")
	case value == "imasig":
		r.flags |= digsig
	case value == "imasig|modsig":
		r.flags |= digsig | flagModsig
	default:
		return errors.New("want imasig, imasig|modsig or sigv3")
	}
	return nil
}

func (r *Rule) parseAppraiseAlgos(_ byte, value string) error {
	if r.has(flagAlgos) {
		return errTwice
	}
	for name := range strings.SplitSeq(value, ",") {
		a, ok := ima.HashAlgoByName(name)
		if !ok {
			return fmt.Errorf("unknown hash algorithm %q; want names such as sha256,sha512", name)
		}
		if !slices.Contains(r.algos, a) {
			r.algos = append(r.algos, a)
		}
	}
	slices.Sort(r.algos)
	r.flags |= flagAlgos
	return nil
}
