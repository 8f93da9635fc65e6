// Package ima holds the words of the kernel's Integrity Measurement Architecture as Go values: functions (hooks),
// masks, policy actions, hash algorithms and digests. It does no I/O and imports nothing of ours.
//
// Numbers that appear in files or cross from the kernel (HashAlgo, Mask) are the kernel's own; the others are private
// to this program and never stored. Source: security/integrity/ima/ima.h, include/uapi/linux/hash_info.h and
// Documentation/ABI/testing/ima_policy of Linux 6.12.
package ima
