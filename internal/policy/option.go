package policy

import (
	"errors"
	"fmt"
	"strconv"
	"strings"

	"imans.dev/imans-agent/internal/ima"
)

// maxPCR is the highest PCR that a rule may name: the kernel keeps those measured into as bits of a 64-bit word.
// Source: ima_policy.c, INVALID_PCR.
const maxPCR = 63

// parsePCR takes the last of several, as the kernel does.
func (r *Rule) parsePCR(_ byte, value string) error {
	pcr, err := strconv.Atoi(value)
	if err != nil || pcr < 0 || pcr > maxPCR {
		return fmt.Errorf("not a PCR; write a number from 0 to %d (a TPM has 0 to 23)", maxPCR)
	}
	r.pcr, r.flags = pcr, r.flags|flagPCR
	return nil
}

func (r *Rule) parseTemplate(_ byte, value string) error {
	name, ok := findTemplate(value)
	switch {
	case r.Action != Measure:
		return errors.New("only a rule to measure has a template; write it after the word measure, or remove it")
	case r.template != "":
		return errTwice
	case !ok:
		return fmt.Errorf("unknown template; use one of %s", templateNames())
	}
	r.template = name
	return nil
}

func (r *Rule) parseDigestType(_ byte, value string) error {
	switch {
	case value != "verity":
		return errors.New("unknown digest type; write digest_type=verity, or remove it for IMA's own digest")
	case r.has(flagDigsig) && !r.sigv3:
		return errors.New("excludes the appraise types imasig and imasig|modsig; write appraise_type=sigv3")
	case r.sigv3 && r.has(flagVerity):
		return errTwice
	}
	r.flags |= flagVerity
	return nil
}

// parseAppraiseType takes sigv3 before digest_type=verity too, as the kernel prints them; validate sees to it that
// digest_type=verity comes.
func (r *Rule) parseAppraiseType(_ byte, value string) error {
	switch value {
	case "sigv3":
		if r.has(flagDigsig) && !r.sigv3 {
			return errors.New("another appraise type stands before it; remove one")
		}
		r.sigv3 = true
	case "imasig|modsig", "imasig":
		if r.sigv3 || r.has(flagVerity) {
			return errors.New("excludes digest_type=verity and sigv3; with digest_type=verity write appraise_type=sigv3")
		}
		if value != "imasig" {
			r.flags |= flagModsig
		}
	default:
		return errors.New("unknown appraise type; use imasig, imasig|modsig or sigv3")
	}
	r.flags |= flagDigsig | flagBlacklist
	return nil
}

// parseAppraiseFlag takes anything: the kernel reads the word and does nothing, since appraise_type= sets what
// check_blacklist once stood for.
func (r *Rule) parseAppraiseFlag(byte, string) error { return nil }

func (r *Rule) parseAppraiseAlgos(_ byte, value string) error {
	if r.has(flagAlgos) {
		return errTwice
	}
	for name := range strings.SplitSeq(value, ",") {
		a, ok := ima.HashAlgoByName(name)
		switch {
		case !ok:
			return fmt.Errorf("unknown hash algorithm %q; write names with commas between, such as sha256,sha512", name)
		case uncomputable(a):
			return fmt.Errorf("no kernel of today computes %s; remove it", name)
		}
		r.algos |= 1 << a
	}
	r.flags |= flagAlgos
	return nil
}
