package policy

import "imans.dev/imans-agent/internal/ima"

// MapIDs returns the policy with its rules' ids as another user namespace has them: users and groups say what an id is there,
// ima.NoID if nothing. The first rule that has such an id is returned too, else nil. No id equals it, and each is less.
func (p *Policy) MapIDs(users, groups func(uint32) uint32) (*Policy, *Rule) {
	var unmapped *Rule
	rules := make([]*Rule, len(p.rules))
	for i, r := range p.rules {
		mapped := *r
		for _, c := range []struct {
			flags     flag
			condition *idCondition
			to        func(uint32) uint32
		}{
			{flagUID | flagEUID, &mapped.uid, users}, {flagGID | flagEGID, &mapped.gid, groups},
			{flagFOwner, &mapped.fowner, users}, {flagFGroup, &mapped.fgroup, groups},
		} {
			if !r.has(c.flags) {
				continue
			}
			if c.condition.id = c.to(c.condition.id); c.condition.id == ima.NoID && unmapped == nil {
				unmapped = r
			}
		}
		rules[i] = &mapped
	}
	q := newPolicy(rules)
	q.failUnverifiable = p.failUnverifiable
	return q, unmapped
}
