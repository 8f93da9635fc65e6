package policy

import "imans.dev/imans-agent/internal/ima"

// Decision is one policy's answer. It is comparable.
type Decision struct {
	Actions   ima.Action
	PCR       int       // of the matching rule to measure; -1: it names none, the list's own is meant
	Template  string    // the same; "": it names none
	Verity    bool      // the digest wanted is fs-verity's
	DirectIO  bool      // permit_directio: a file opened with O_DIRECT is no violation, and is not refused
	Appraisal Appraisal // zero unless Actions has ima.Appraise
}

// Appraisal is how a file is appraised.
type Appraisal struct {
	Class            AppraiseClass
	Signature        bool    // a hash is not enough; with Decision.Verity the signature's format is sigv3
	Modsig           bool    // a signature appended to the file will do
	Blacklist        bool    // what the blacklist keyring names is refused
	FailUnverifiable bool    // on a file system that can't be trusted, appraisal fails
	Algos            AlgoSet // in which security.ima may be
}

// AppraiseClass says for which use of a file a verdict holds: one that passed for execution has not passed for reading.
// Source: ima_policy.c, get_subaction.
type AppraiseClass uint8

// The classes. A rule without func= always asks for FileAppraise, whatever the event.
const (
	NoAppraise AppraiseClass = iota
	FileAppraise
	MmapAppraise
	BPRMAppraise
	CredsAppraise
	ReadAppraise
)

// take adds what a matching rule says. Options count even of a dont_ rule, as in the kernel.
func (d *Decision) take(r *Rule, q *Query, adds ima.Action) {
	d.Actions |= adds
	d.Verity = d.Verity || r.has(flagVerity)
	d.DirectIO = d.DirectIO || r.has(flagDirectIO)
	if r.has(flagPCR) {
		d.PCR = r.pcr
	}
	if r.template != "" {
		d.Template = r.template
	}
	if adds != ima.Appraise {
		return
	}
	// Appraising makes hashing needless, but only if it was decided before: a later hash rule adds it again.
	d.Actions &^= ima.Hash
	d.Appraisal = Appraisal{
		Class:     r.class(q.Func),
		Signature: r.has(flagDigsig), Modsig: r.has(flagModsig), Blacklist: r.has(flagBlacklist),
		Algos: r.algos,
	}
}

func (r *Rule) class(f ima.Func) AppraiseClass {
	if !r.has(flagFunc) {
		return FileAppraise
	}
	switch f {
	case ima.MmapCheck, ima.MmapCheckReqprot:
		return MmapAppraise
	case ima.BPRMCheck:
		return BPRMAppraise
	case ima.CredsCheck:
		return CredsAppraise
	case ima.FileCheck, ima.PostSetattr:
		return FileAppraise
	}
	return ReadAppraise
}
