package policy

import "imans.dev/imans-agent/internal/ima"

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
	DontAudit // younger than Linux 6.12
	Hash
	DontHash
)

var actionNames = [...]string{
	"", "measure", "dont_measure", "appraise", "dont_appraise", "audit", "dont_audit", "hash", "dont_hash",
}

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
	case DontAudit:
		return 0, ima.Audit
	case Hash:
		return ima.Hash, ima.Hash
	case DontHash:
		return 0, ima.Hash
	}
	return 0, 0
}
