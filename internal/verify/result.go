package verify

import (
	"errors"
	"fmt"

	"imans.dev/imans-agent/internal/ima"
)

// Result is what List found out. The zero value says nothing about any list.
type Result struct {
	Entries    int   // whole entries read
	Violations int   // how many of them are violations
	Size       int64 // bytes of these entries

	// BootAggregate is what the first entry says, none if it is no boot aggregate. All zero means that there was no TPM
	// then. It is claimed unless Proven.BootAggregate.
	BootAggregate ima.Digest
	// Computed are the values that all entries read lead to, for each PCR of the list and each bank replayed, in rising
	// order.
	Computed []PCRValue

	// Bindings are the vTPMs that the list speaks of, in the order of the entries that attach them.
	Bindings []Binding

	Proven  Proven
	Claimed Claimed
	// Broken is what is wrong, in the order of the list, PCR values last; empty if nothing was found. It holds the first
	// 100; BrokenMore counts the others.
	Broken     []*ReplayError
	BrokenMore int
}

// PCRValue is one register's value in one bank.
type PCRValue struct {
	PCR   int
	Value ima.Digest // names the bank
}

// Proven is what the given PCR values establish: see the package comment. Without given values, and where no prefix
// leads to them, it is the zero value.
type Proven struct {
	Matched       bool  // some prefix, be it of no entry, leads to all given values together
	Prefix        int   // length in entries of the longest such prefix, up to its last entry of a given PCR
	End           int64 // its length in bytes
	Entries       int   // its entries of a given PCR, violations included
	Violations    int   // its violations of a given PCR
	BootAggregate bool  // the boot aggregate is one of the entries
}

// Claimed counts the entries that nothing but the list itself vouches for.
type Claimed struct {
	Trailing  int // behind the prefix: in the list, but not (yet, or ever) in the TPM; all of them without a prefix
	Uncovered int // within the prefix, but of a PCR whose value was not given
}

// Err returns nil if nothing is broken, else all of Broken as one error. Nil does not say that anything is proven.
func (r *Result) Err() error {
	errs := make([]error, 0, len(r.Broken)+1)
	for _, b := range r.Broken {
		errs = append(errs, b)
	}
	if r.BrokenMore > 0 {
		errs = append(errs, fmt.Errorf("and %d more", r.BrokenMore))
	}
	return errors.Join(errs...)
}

// Kind is in which way a list is broken.
type Kind uint8

// The kinds of ReplayError.
const (
	// Cut is a list that ends in the middle of an entry, which a copy of a list that is being written may do.
	Cut Kind = iota + 1
	// Corrupt is an entry that is none; what follows it was not read.
	Corrupt
	// TemplateDigest is a template digest that is not that of the data: one or the other was changed.
	TemplateDigest
	// BootAggregate is a first entry that is no boot aggregate, or not the expected one.
	BootAggregate
	// PCRMismatch is a given PCR value that no prefix leads to, or not the same prefix as the other values.
	PCRMismatch
	// MalformedBinding is an entry in a binding's place that is none, or that contradicts those before it.
	MalformedBinding
)

// String returns a word for programs to print.
func (k Kind) String() string {
	switch k {
	case Cut:
		return "cut"
	case Corrupt:
		return "corrupt"
	case TemplateDigest:
		return "template-digest"
	case BootAggregate:
		return "boot-aggregate"
	case PCRMismatch:
		return "pcr-mismatch"
	case MalformedBinding:
		return "malformed-binding"
	}
	return fmt.Sprintf("kind-%d", uint8(k))
}

// ReplayError is one place at which a list breaks.
type ReplayError struct {
	Kind   Kind
	Entry  int          // number of the entry, from 0; for PCRMismatch how many entries were replayed
	Offset int64        // of the entry in the list, bytes
	PCR    int          // of the entry, or with the value; -1 if unknown
	Bank   ima.HashAlgo // of the template digest, or of the value
	Reason string
	Err    error // *imalog.CorruptError for Cut and Corrupt, what package binding says for MalformedBinding; may be nil
}

// Error says where and why.
func (e *ReplayError) Error() string {
	if e.Kind == PCRMismatch {
		return fmt.Sprintf("PCR %d in bank %s: %s", e.PCR, e.Bank, e.Reason)
	}
	return fmt.Sprintf("entry %d at byte %d: %s", e.Entry, e.Offset, e.Reason)
}

// Unwrap returns Err.
func (e *ReplayError) Unwrap() error { return e.Err }
