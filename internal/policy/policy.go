package policy

import (
	"slices"

	"imans.dev/imans-agent/internal/ima"
)

// Policy is a list of rules. The zero value has none and matches nothing.
type Policy struct {
	rules []*Rule
	// asked is what at least one rule asks for; a kind of action that none asks for is not looked at, not even for its
	// dont_ rules. Source: ima_policy.c, ima_update_policy_flags.
	asked ima.Action
	// failUnverifiable: a signature on a file system that can't be trusted to stay the same counts as bad.
	failUnverifiable bool
}

func newPolicy(rules []*Rule) *Policy {
	p := &Policy{rules: rules}
	for _, r := range rules {
		if r.Func != ima.SetxattrCheck {
			adds, _ := r.Action.does()
			p.asked |= adds
		}
	}
	return p
}

// Rules returns the rules in order. Don't change them.
func (p *Policy) Rules() []*Rule { return p.rules }

// Append returns a policy of both parties' rules, as a second write to the kernel's policy file makes it.
func Append(first, second *Policy) *Policy {
	p := newPolicy(slices.Concat(first.rules, second.rules))
	p.failUnverifiable = first.failUnverifiable || second.failUnverifiable
	return p
}

// Asks returns the actions that some event of that function and mask can get: what is not among them, no Match of such
// an event returns. It looks at nothing else of an event, so that an event can be left aside before anything is found
// out about it.
func (p *Policy) Asks(f ima.Func, mask ima.Mask) ima.Action {
	var asks ima.Action
	q := &Query{Func: f, Mask: mask}
	for _, r := range p.rules {
		if adds, _ := r.Action.does(); adds != 0 && r.matchFunc(q) && (isData(f) || r.matchMask(q)) {
			asks |= adds
		}
	}
	return asks & p.asked
}

// SetxattrAlgos returns the algorithms in which security.ima may be written: those of the first SETXATTR_CHECK rule.
// Such rules take no part in Match. An empty set means that any will do. Source: ima_policy.c, ima_update_policy_flags.
func (p *Policy) SetxattrAlgos() AlgoSet {
	for _, r := range p.rules {
		if r.Func == ima.SetxattrCheck {
			return r.algos
		}
	}
	return 0
}

// PCRs returns the registers that rules name by pcr=, each once, in the order of the rules.
func (p *Policy) PCRs() []int {
	var pcrs []int
	for _, r := range p.rules {
		if r.has(flagPCR) && !slices.Contains(pcrs, r.pcr) {
			pcrs = append(pcrs, r.pcr)
		}
	}
	return pcrs
}

// First returns a policy of the first n rules.
func (p *Policy) First(n int) *Policy {
	q := newPolicy(p.rules[:min(n, len(p.rules))])
	q.failUnverifiable = p.failUnverifiable
	return q
}
