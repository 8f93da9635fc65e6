package policy

import (
	"slices"

	"imans.dev/imans-agent/internal/ima"
)

// Query is one event, as rules can name it. Ids are those of the initial user namespace; FOwner and FGroup are those of
// the file as its mount shows it (idmapped mounts).
type Query struct {
	Func              ima.Func
	Mask              ima.Mask // what is asked for: the kernel's MAY_* bits
	FSMagic           uint64
	FSName            string
	FSSubtype         string // "": the file system has none
	FSUUID            [16]byte
	UID, EUID, SUID   uint32
	GID, EGID, SGID   uint32
	FOwner, FGroup    uint32
	CapSetUID         bool // effective CAP_SETUID: euid conditions then look at suid and uid too
	CapSetGID         bool // the same of CAP_SETGID and egid conditions
	Labels            Labels
	Keyring, DataName string // KEY_CHECK: the keyring's name; CRITICAL_DATA: the label; "": there is none
}

// Match finds what the policy wants of an event. Source: ima_policy.c, ima_match_policy.
func (p *Policy) Match(q *Query) Decision {
	d := Decision{PCR: -1}
	open := p.asked
	for _, r := range p.rules {
		if open == 0 {
			break
		}
		adds, kind := r.Action.does()
		if open&kind == 0 || !r.match(q) {
			continue
		}
		open &^= kind
		d.take(r, q, adds)
		if adds == ima.Appraise {
			d.Appraisal.FailUnverifiable = p.failUnverifiable
		}
	}
	return d
}

// match is ima_match_rules.
func (r *Rule) match(q *Query) bool {
	if !r.matchFunc(q) {
		return false
	}
	if isData(q.Func) {
		return r.matchData(q)
	}
	return r.matchMask(q) && r.matchFile(q) && r.matchSubject(q) && r.labels.match(q.Labels)
}

// isData reports whether a function is about data in memory, to which most conditions do not apply.
func isData(f ima.Func) bool { return f == ima.KeyCheck || f == ima.CriticalData }

// matchFunc: POST_SETATTR (may the mode, owner or xattrs change?) stands for all functions, as any rule may have been
// what the file was appraised by.
func (r *Rule) matchFunc(q *Query) bool {
	switch {
	case isData(q.Func):
		return r.Func == q.Func
	case q.Func == ima.PostSetattr:
		return true
	}
	return !r.has(flagFunc) || r.Func == q.Func
}

func (r *Rule) matchMask(q *Query) bool {
	switch {
	case q.Func == ima.PostSetattr:
		return true
	case r.has(flagMask):
		return r.mask == q.Mask
	case r.has(flagInMask):
		return r.mask&q.Mask != 0
	}
	return true
}

func (r *Rule) matchFile(q *Query) bool {
	switch {
	case r.has(flagFSMagic) && r.fsMagic != q.FSMagic,
		r.has(flagFSName) && r.fsName != q.FSName,
		r.has(flagFSSubtype) && r.fsSubtype != q.FSSubtype,
		r.has(flagFSUUID) && r.fsUUID != q.FSUUID,
		r.has(flagFOwner) && !r.fowner.match(q.FOwner),
		r.has(flagFGroup) && !r.fgroup.match(q.FGroup):
		return false
	}
	return true
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

// matchData is ima_match_rule_data. A gid condition is taken by Parse and not looked at here: so it is in the kernel.
func (r *Rule) matchData(q *Query) bool {
	if r.has(flagUID) && !r.uid.match(q.UID) {
		return false
	}
	if r.Func == ima.KeyCheck {
		return !r.has(flagKeyrings) || slices.Contains(r.keyrings, q.Keyring)
	}
	return !r.has(flagDataNames) || slices.Contains(r.dataNames, q.DataName)
}
