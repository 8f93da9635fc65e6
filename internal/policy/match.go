package policy

import (
	"slices"

	"imans.dev/imans-agent/internal/ima"
)

// Query is one event, as rules can name it. Ids are those of the initial user namespace.
type Query struct {
	Func              ima.Func
	Mask              ima.Mask
	FSMagic           uint64
	FSName            string
	FSUUID            [16]byte
	UID, EUID, SUID   uint32
	GID, EGID, SGID   uint32
	FOwner, FGroup    uint32
	CapSetUID         bool // effective: euid rules then look at suid and uid too
	CapSetGID         bool
	Labels            [numLabels]string // obj_user, obj_role, obj_type, subj_user, subj_role, subj_type
	Keyring, DataName string            // KEY_CHECK: the keyring; CRITICAL_DATA: the label
}

// Decision is one policy's answer.
type Decision struct {
	Actions  ima.Action
	PCR      int    // of the matching rules; -1: none says
	Template string // the same; "": none says
	Verity   bool   // the digest wanted is fs-verity's
}

// Match finds what the policy wants of an event. Source: ima_policy.c, ima_match_policy.
func (p *Policy) Match(q *Query) Decision {
	d := Decision{PCR: -1}
	open := ima.Measure | ima.Appraise | ima.Audit | ima.Hash
	for _, r := range p.rules {
		adds, kind := r.Action.does()
		if open&kind == 0 || !r.match(q) {
			continue
		}
		d.Actions |= adds
		if adds == ima.Appraise {
			d.Actions &^= ima.Hash
			open &^= ima.Hash
		}
		open &^= kind
		d.Verity = d.Verity || r.has(flagVerity)
		if r.has(flagPCR) {
			d.PCR = r.pcr
		}
		if r.template != "" {
			d.Template = r.template
		}
		if open == 0 {
			break
		}
	}
	return d
}

// match is ima_match_rules.
func (r *Rule) match(q *Query) bool {
	if r.has(flagFunc) && r.Func != q.Func {
		return false
	}
	switch q.Func {
	case ima.KeyCheck, ima.CriticalData:
		return r.Func == q.Func && r.matchData(q)
	}
	switch {
	case r.has(flagMask) && r.mask != q.Mask,
		r.has(flagInMask) && r.mask&q.Mask == 0,
		r.has(flagFSMagic) && r.fsMagic != q.FSMagic,
		r.has(flagFSName) && r.fsName != q.FSName,
		r.has(flagFSUUID) && r.fsUUID != q.FSUUID,
		r.has(flagFOwner) && !r.fowner.match(q.FOwner),
		r.has(flagFGroup) && !r.fgroup.match(q.FGroup):
		return false
	}
	return r.matchSubject(q) && r.matchLabels(q)
}

func (r *Rule) matchSubject(q *Query) bool {
	anyOf := func(c idCondition, effective, saved, real uint32, capable bool) bool {
		return c.match(effective) || capable && (c.match(saved) || c.match(real))
	}
	switch {
	case r.has(flagUID) && !r.uid.match(q.UID),
		r.has(flagEUID) && !anyOf(r.uid, q.EUID, q.SUID, q.UID, q.CapSetUID),
		r.has(flagGID) && !r.gid.match(q.GID),
		r.has(flagEGID) && !anyOf(r.gid, q.EGID, q.SGID, q.GID, q.CapSetGID):
		return false
	}
	return true
}

func (r *Rule) matchLabels(q *Query) bool {
	for i, label := range r.lsm {
		if label != "" && label != q.Labels[i] {
			return false
		}
	}
	return true
}

// matchData is ima_match_rule_data.
func (r *Rule) matchData(q *Query) bool {
	if r.has(flagUID) && !r.uid.match(q.UID) {
		return false
	}
	list, name := r.keyrings, q.Keyring
	if r.Func == ima.CriticalData {
		list, name = r.labels, q.DataName
	}
	return list == nil || slices.Contains(list, name)
}
