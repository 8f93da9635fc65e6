// Package imalog encodes, decodes, prints and replays IMA measurement lists. It is pure: no I/O beyond the given
// reader.
//
// # The format
//
// A list is a sequence of entries without header or separator. One entry, all numbers little endian (the kernel's
// ima_canonical_fmt, and its native order on amd64 and arm64; a list of a big endian kernel without that option can't
// be read):
//
//	u32  PCR index
//	     template digest: 20 bytes in binary_runtime_measurements (SHA-1), the bank's size in the file of a bank,
//	     binary_runtime_measurements_BANK
//	u32  length of the template name
//	     template name, without a final zero, such as "ima-ng"; a free format is named by itself, such as "d-ng|n-ng"
//	u32  length of the template data (absent for template "ima")
//	     template data: for each field of the template, u32 length and that many bytes
//
// Template "ima" alone is older: its data is the bare 20-byte SHA-1 digest, then u32 length and the name, of at most
// 255 bytes, without a final zero. (With ima_hash=md5 the kernel writes 16 bytes there, which no reader can tell: such
// entries are refused.)
//
// The template digest is the bank's hash of the template data, lengths included (for "ima": of digest and name padded
// with zeros to 256 bytes, no lengths). It covers neither the PCR index nor the template's name.
//
// A violation's stored template digest is all zero in every bank, and the PCR is extended with all ones instead. Its
// file digest is zero too, of the length of the configured algorithm's; older kernels wrote 20 zeros after any
// algorithm's name.
//
// The fields, of which a length of zero means that the event has no such thing:
//
//	d             bare digest, SHA-1 or MD5; 20 zeros in a violation
//	d-ng          algorithm, ":", zero byte, digest
//	d-ngv2        "ima:" or "verity:", algorithm, ":", zero byte, digest
//	d-modsig      as d-ng: what an appended signature covers
//	n, n-ng       name with a final zero, spaces turned into "_"; n has at most 255 bytes before the zero
//	sig           security.ima if it is a signature, else as evmsig
//	evmsig        security.evm if it is a portable signature
//	modsig, buf   the appended signature; the measured buffer
//	xattrnames    names joined by "|", final zero
//	xattrlengths  u32 for each name
//	xattrvalues   the values, one after the other
//	iuid, igid    u32 of the inode's owner; imode u16
//
// # An example
//
// /bin/sh, an empty file, by ima-ng, in the SHA-1 list; it leads PCR 10 from zeros to
// c287db097472356a9f377964af09de943ee75c0a:
//
//	0a000000                                  PCR 10
//	df6496ba016db65204477db13fa771237e42c714  SHA-1 of the 56 bytes of data
//	06000000 696d612d6e67                     "ima-ng"
//	38000000                                  56 bytes of data
//	28000000                                  d-ng: 40 bytes, 7 + 1 + 32
//	  7368613235363a 00                       "sha256:" and zero
//	  e3b0c44298fc1c149afbf4c8996fb924        SHA-256 of nothing
//	  27ae41e4649b934ca495991b7852b855
//	08000000                                  n-ng: 8 bytes
//	  2f62696e2f7368 00                       "/bin/sh" and zero
//
// # The ascii list
//
// A line for each entry: PCR in two columns, template digest in hex, template name, then each field after a space:
// digests with what stands before their zero byte, names as they are, numbers in decimal, all else in hex, nothing for
// an empty field. It is the kernel's line byte for byte but for one thing. The kernel prints a name's control
// characters as they are, so a file name with a newline forges a line; here each byte of one is printed as a backslash
// and three octal digits: bytes below 0x21 and 0x7f, U+0080 to U+009F, U+2028 and U+2029. A backslash stays single, as
// the kernel has it, so a line does not tell the name "a", newline from the name `a\012`: the binary list does, and the
// template digest is that of the true name.
//
// Source: security/integrity/ima/ima_fs.c (ima_measurements_show, ima_ascii_measurements_show), ima_template.c,
// ima_template_lib.c, ima_crypto.c (ima_calc_field_array_hash_tfm) and ima_queue.c of Linux 6.12,
// Documentation/security/IMA-templates.rst.
//
// # What to call
//
// CheckTemplate, CheckDigest and CheckBank say at start-up whether a configuration can work. NewEntry, NewViolation and
// BootAggregate make entries; Entry.AppendBinary and AppendASCII write them; Reader reads a list back, bounds checked
// and in memory that grows only with what is really there; Replay computes the PCR values that a list leads to. Nothing
// here says whether a list is true, and Reader does not compare a template digest with the data: see package verify.
//
// BUG: PCRs 17 to 22 are replayed from zeros, though a TPM starts them at ones; only locality 2 and higher extends
// them.
package imalog
