// Package imalog encodes, decodes, prints and replays IMA measurement lists. It is pure: no I/O beyond the given reader.
//
// # The format
//
// A list is a sequence of entries without header or separator. One entry, all numbers little endian (the kernel's
// ima_canonical_fmt, and its native order on amd64 and arm64):
//
//	u32  PCR index
//	     template digest: 20 bytes in binary_runtime_measurements (SHA-1), the bank's size in binary_runtime_measurements_BANK
//	u32  length of the template name
//	     template name, without a final zero, such as "ima-ng"; a free format is named by itself, such as "d-ng|n-ng"
//	u32  length of the template data (absent for template "ima")
//	     template data: for each field of the template, u32 length and that many bytes
//
// Template "ima" alone is older: its data is the bare 20-byte digest, then u32 length and the name without a final zero.
//
// The template digest is the bank's hash of the template data (for "ima": of digest and name padded with zeros to 256
// bytes). A violation's stored template digest is all zero, and the PCR is extended with all ones instead.
//
// The fields that most lists have: d-ng is the algorithm's name, ":", a zero byte and the digest; n-ng the file's name with a
// final zero, its spaces turned into "_"; sig the bytes of security.ima, empty if there is no signature.
//
// An example, /bin/sh by ima-ng, its SHA-256 shown as "D…":
//
//	0a000000                          PCR 10
//	T…                                SHA-1 of all from 28000000 on
//	06000000 "ima-ng"
//	38000000                          56 bytes of data
//	28000000 "sha256:" 00 D…          40 bytes: 7 + 1 + 32
//	08000000 "/bin/sh" 00
//
// Source: security/integrity/ima/ima_fs.c (ima_measurements_show), ima_template_lib.c, ima_crypto.c of Linux 6.12 and
// Documentation/security/IMA-templates.rst.
//
// # What to call
//
// NewEntry, NewViolation and BootAggregate make entries; Entry.AppendBinary and AppendASCII write them; Reader reads a list
// back; Replay computes the PCR values that a list leads to. Nothing here says whether a list is true: see package verify.
package imalog
