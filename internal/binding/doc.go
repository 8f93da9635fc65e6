// Package binding encodes and decodes what the native list says of vTPMs: which one a namespace's list was given, and what became of
// it. It is pure: bytes of a buffer, no list and no TPM.
//
// # What a binding is for
//
// A namespace's list is worth what its vTPM is worth, and anyone can make a vTPM. When the agent gives a list a vTPM it therefore
// appends an entry named AttachName to the native list, with the Names of the vTPM's keys; when the list loses it, one named EndName.
// They are critical data in the kernel's sense: template ima-buf, the digest that of the buffer, the buffer what this package
// encodes. A quote by the machine's own TPM that covers the entry says: the agent of this host vouched, at this point of the native
// list, for the vTPM whose quotes the key AK signs. What it can't say is that the host's software was honest: that is what the rest
// of the native list and the boot log are for.
//
// All that a binding says of container and image is claimed by the runtime that asked for the vTPM.
//
// # The format
//
// Fields in a fixed order, numbers little endian, as in IMA's own template data; text and names are a u32 length and that many bytes.
// It is not JSON, because one meaning must have one form, which is what gets extended: here there are no orders of keys, escapes,
// spaces or spellings of numbers to agree on. There is exactly one encoding of each value; Parse refuses
// all else, bytes behind the end included, so that what was parsed encodes to the same bytes again.
//
// AttachName:
//
//	u32  1, the version of this format
//	u32  inode number of the mount namespace
//	u64  the kernel's unique id of it
//	u32  number: the how manieth vTPM the namespace's list was given, from 1
//	u32  version of the TPM: 1 is TPM 1.2, 2 is TPM 2.0
//	u32  way: 1 the kernel's proxy driver, 2 a socket
//	u32  PCR of the namespace's list in the vTPM
//	text container id; empty if not known
//	text image reference; empty if not known
//	text image digest, as algorithm, ":", small hexadecimal digits; empty if not known
//	name of the endorsement key
//	name of the attestation key; both empty for TPM 1.2, neither for TPM 2.0
//
// EndName:
//
//	u32  1, the version of this format
//	u32  inode number, u64 id, u32 number: which attachment has ended
//	u32  cause: 1 ended (the namespace), 2 released, 3 lost, 4 replaced
//	u64  entries of the namespace's list that the vTPM has got
//	u32  how many final values of the PCR follow; none if they could not be read
//	     each, in rising order of the kernel's algorithm numbers: text, algorithm, ":", small hexadecimal digits
//
// Text is UTF-8 of printable characters, at most 4096 bytes. A name is that of TPM 2.0 Part 1, section 16: the TCG's number of a hash
// algorithm as big endian u16, then the digest of the key's public area.
//
// # An example
//
// Namespace 4026532281:7 of container "c1" got a TPM 2.0 by the proxy, as its first; EK and AK are stood for by Names of zeros and of
// ones:
//
//	01000000                                  version 1
//	b90100f0  0700000000000000                namespace 4026532281, id 7
//	01000000                                  its first
//	02000000  01000000                        TPM 2.0, proxy
//	0a000000                                  PCR 10
//	02000000 6331                             container "c1"
//	06000000 616c70696e65                     image "alpine"
//	00000000                                  no image digest
//	22000000 000b 00…00                       EK: sha256 and 32 zeros
//	22000000 000b ff…ff                       AK: sha256 and 32 bytes of ones
//
// # What to call
//
// Attach.Encode and End.Encode make the buffer, ParseAttach and ParseEnd read it. Errors of parsing are *VersionError and *FormatError.
package binding
