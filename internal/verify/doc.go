// Package verify replays a measurement list and compares it with PCR values. It is pure: no TPM, no files, no clock.
//
// # What List establishes
//
// Given PCR values that the caller knows to be a TPM's (out of a quote whose signature and nonce were checked, or read
// from the TPM itself), and of the longest prefix of the list that replays to all of them together:
//
//  1. Each entry of the prefix that goes to a given PCR was extended into it: PCR number and template data, byte
//     for byte.
//  2. They were extended in this order, and nothing else was extended between them or before them, for each PCR taken
//     by itself.
//  3. For a violation, that one took place at this point.
//
// And of the list as it was read, which needs no PCR value:
//
//  4. It consists of whole entries whose data fits their template.
//  5. Each entry's template digest is that of its data, or zero, which makes it a violation.
//  6. It begins with a boot aggregate, which is the expected one if one was given.
//  7. Each entry that is named as a binding's is one (package binding), its digest that of its buffer; none attaches what was attached
//     before, or ends what was not attached or has ended.
//
// # What it does not
//
// What the PCR values don't cover is only claimed by whoever wrote the list: entries behind the prefix (tolerated,
// since an entry is in the list before it is in the TPM) and entries of PCRs that were not given; the data of a
// violation, name included; the name of a template, which no digest covers; the order of entries of different PCRs. A
// prefix can be older than the values' reader thinks if the values are: freshness is the quote's business. A value that
// no prefix leads to proves nothing of any entry, and does not tell which entry is wrong; where a template digest
// disagrees with its data, that does. Whether the measured files are good ones is another question altogether.
//
// A binding that is proven says that the agent vouched for a vTPM's keys when it was extended, not that the host was honest. Whether
// it stands, or an end took it back, is told by what was read of the list: behind the prefix an end is only claimed, and the lack of
// one is the list's word up to the time of the values.
//
// Registers are taken to have begun at zero, so a PCR that something else extended before the list began matches no
// prefix.
//
// # What to call
//
// List does all of it. Its Result keeps apart what is proven, what is only claimed and where it broke; a caller that
// needs one answer takes Result.Err, and still has to look at Result.Proven, which a list without PCR values leaves
// empty.
package verify
