package policy

import (
	"slices"

	"imans.dev/imans-agent/internal/ima"
)

// WrittenIn returns the policy, whose ids so far are the initial user namespace's, as one written in a user namespace of those
// maps: each id means what it is there. "uid=" and the like then match the host's id; "uid<" and "uid>" compare as the user
// namespace counts, so that uid<1000 means its own users below 1000, whatever its ids are outside, and though it has no 1000. An
// id that it does not have equals none and is greater than each that it has. The first rule that names such an id is returned
// too, else nil. Source: ima_policy.c, ima_parse_rule (make_kuid); for the comparisons, docs/adr/0006.
func (p *Policy) WrittenIn(maps ima.IDMaps) (*Policy, *Rule) {
	if equalMaps(maps, ima.InitialMaps()) {
		return p, nil
	}
	var unmapped *Rule
	rules := make([]*Rule, len(p.rules))
	for i, r := range p.rules {
		var mapped bool
		if rules[i], mapped = r.writtenIn(&maps); !mapped && unmapped == nil {
			unmapped = r
		}
	}
	q := newPolicy(rules)
	q.failUnverifiable = p.failUnverifiable
	return q, unmapped
}

// Part is a run of rules that were written in one user namespace.
type Part struct {
	Text string     // one a line, with the ids as they were written
	IDs  ima.IDMaps // what the ids mean: see WrittenIn
}

// Parts takes the policy apart, so that it can be kept as text: what Parse, WrittenIn and Append make of its parts is it again.
func (p *Policy) Parts() []Part {
	var parts []Part
	for _, r := range p.rules {
		ids := ima.InitialMaps()
		if r.ids != nil {
			ids = *r.ids
		}
		if n := len(parts); n == 0 || !equalMaps(parts[n-1].IDs, ids) {
			parts = append(parts, Part{IDs: ids})
		}
		parts[len(parts)-1].Text += r.String()
	}
	return parts
}

func equalMaps(a, b ima.IDMaps) bool {
	return slices.Equal(a.UIDs, b.UIDs) && slices.Equal(a.GIDs, b.GIDs)
}

// NamesIDs reports whether any rule looks at a user or group id of the subject.
func (p *Policy) NamesIDs() bool {
	return slices.ContainsFunc(p.rules, func(r *Rule) bool {
		return r.has(flagUID | flagEUID | flagGID | flagEGID)
	})
}

// NamesAnyIDs reports whether any rule looks at an id, of the subject or of the file.
func (p *Policy) NamesAnyIDs() bool { return slices.ContainsFunc(p.rules, (*Rule).namesIDs) }

func (r *Rule) namesIDs() bool {
	return r.has(flagUID | flagEUID | flagGID | flagEGID | flagFOwner | flagFGroup)
}

// idConditions returns the rule's conditions on users and on groups, those that it has.
func (r *Rule) idConditions() (users, groups []*idCondition) {
	for _, c := range []struct {
		flags     flag
		condition *idCondition
		to        *[]*idCondition
	}{
		{flagUID | flagEUID, &r.uid, &users}, {flagGID | flagEGID, &r.gid, &groups},
		{flagFOwner, &r.fowner, &users}, {flagFGroup, &r.fgroup, &groups},
	} {
		if r.has(c.flags) {
			*c.to = append(*c.to, c.condition)
		}
	}
	return users, groups
}

// writtenIn returns the rule with conditions in those ids, and whether all are ids of the host.
func (r *Rule) writtenIn(maps *ima.IDMaps) (*Rule, bool) {
	if !r.namesIDs() {
		return r, true
	}
	written, mapped := *r, true
	written.ids = maps
	users, groups := written.idConditions()
	for _, c := range users {
		c.in = &maps.UIDs
		mapped = mapped && c.host() != ima.NoID
	}
	for _, c := range groups {
		c.in = &maps.GIDs
		mapped = mapped && c.host() != ima.NoID
	}
	return &written, mapped
}

func (r *Rule) shownIn(maps ima.IDMaps) *Rule {
	if !r.namesIDs() {
		return r
	}
	shown := *r
	users, groups := shown.idConditions()
	for _, c := range users {
		c.id = c.shownIn(maps.UIDs)
	}
	for _, c := range groups {
		c.id = c.shownIn(maps.GIDs)
	}
	return &shown
}

// idCondition is an id, as it was written in a user namespace, and how to compare with it.
type idCondition struct {
	op byte // '=', '<' or '>'
	id uint32
	in *ima.IDMap // of that user namespace; nil: the initial one
}

// host returns what the condition's id is on the host, ima.NoID if nothing.
func (c idCondition) host() uint32 {
	if c.in == nil {
		return c.id
	}
	return c.in.ToHost(c.id)
}

// match compares with an id of the host.
func (c idCondition) match(id uint32) bool {
	if c.op == '=' {
		return id == c.host() && id != ima.NoID
	}
	if c.in != nil {
		id = c.in.FromHost(id) // NoID is the greatest
	}
	if c.op == '<' {
		return id < c.id
	}
	return id > c.id
}

// shownIn returns what the condition's id is to a reader. Where it was written it is what was written, even if that is nobody.
func (c idCondition) shownIn(reader ima.IDMap) uint32 {
	if c.in != nil && slices.Equal(*c.in, reader) {
		return c.id
	}
	return reader.ShowHost(c.host())
}
