package imalog

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"hash"
	"strings"

	"imans.dev/imans-agent/internal/ima"
)

// Entry is one entry of a measurement list. It is immutable, and may be shared by any number of lists and goroutines.
type Entry struct {
	template  *template
	data      []byte // of each field: u32 length, bytes
	pcr       uint32
	violation bool
}

// BootAggregateName is the name of a list's first entry.
const BootAggregateName = "boot_aggregate"

// NewEntry makes the entry of a measured file or buffer. It fails if the template is unknown, the digest missing, or the name
// empty or with a zero byte in it.
func NewEntry(pcr int, templateName string, v FieldValues) (*Entry, error) {
	return newEntry(pcr, templateName, v, false)
}

// NewViolation makes the entry of an event that could not be measured: its digest is zero, of v.Digest's algorithm.
func NewViolation(pcr int, templateName string, v FieldValues) (*Entry, error) {
	v.Digest = ima.ZeroDigest(v.Digest.Algo())
	return newEntry(pcr, templateName, v, true)
}

// BootAggregate makes a list's first entry, from the digest of PCRs 0 to 7 (SHA-1) or 0 to 9 of the list's own TPM.
func BootAggregate(pcr int, templateName string, d ima.Digest) (*Entry, error) {
	return newEntry(pcr, templateName, FieldValues{Digest: d, Name: BootAggregateName}, false)
}

func newEntry(pcr int, templateName string, v FieldValues, violation bool) (*Entry, error) {
	t, err := lookupTemplate(templateName)
	if err != nil {
		return nil, err
	}
	if v.Digest.IsNone() {
		return nil, fmt.Errorf("make entry of %q: no digest", v.Name)
	}
	if v.Name == "" || strings.IndexByte(v.Name, 0) >= 0 {
		return nil, fmt.Errorf("make entry of %q: a name must have at least a byte and no zero", v.Name)
	}
	if pcr < 0 || pcr > 23 {
		return nil, fmt.Errorf("make entry of %q: PCR %d is not one of 0 to 23", v.Name, pcr)
	}
	var data []byte
	for _, f := range t.fields {
		b := f.encode(&v)
		data = binary.LittleEndian.AppendUint32(data, uint32(len(b)))
		data = append(data, b...)
	}
	return &Entry{template: t, data: data, pcr: uint32(pcr), violation: violation}, nil
}

// PCR returns the register that the entry extends.
func (e *Entry) PCR() int { return int(e.pcr) }

// Template returns the template's name.
func (e *Entry) Template() string { return e.template.name }

// Violation reports whether the entry stands for an event that could not be measured.
func (e *Entry) Violation() bool { return e.violation }

// Data returns the template data: of each field a u32 length and its bytes, for every template alike. Don't change it.
func (e *Entry) Data() []byte { return e.data }

// Field returns the bytes of the field of that id, and whether the template has it. Don't change them.
func (e *Entry) Field(id string) ([]byte, bool) {
	rest := e.data
	for _, f := range e.template.fields {
		n := binary.LittleEndian.Uint32(rest)
		if f.id == id {
			return rest[4 : 4+n : 4+n], true
		}
		rest = rest[4+n:]
	}
	return nil, false
}

// Name returns the file's name, or "" if the template has none.
func (e *Entry) Name() string {
	for _, id := range []string{"n-ng", "n"} {
		if b, ok := e.Field(id); ok {
			return strings.TrimSuffix(string(b), "\x00")
		}
	}
	return ""
}

// FileDigest returns the digest of the file or buffer. None if the template has none, or its algorithm is unknown. Template
// "ima" does not say whether it is SHA-1 or MD5: it is taken for SHA-1.
func (e *Entry) FileDigest() ima.Digest {
	for _, id := range []string{"d-ng", "d-ngv2"} {
		if b, ok := e.Field(id); ok {
			return fieldDigest(b)
		}
	}
	if b, ok := e.Field("d"); ok {
		if d, err := ima.NewDigest(ima.SHA1, b); err == nil {
			return d
		}
	}
	return ima.Digest{}
}

// Digest returns the template digest as the list of that bank stores it: all zero for a violation, none for an algorithm that
// this program lacks. It is computed at each call.
func (e *Entry) Digest(bank ima.HashAlgo) ima.Digest {
	if e.violation {
		return ima.ZeroDigest(bank)
	}
	h, ok := bank.Hash()
	if !ok {
		return ima.Digest{}
	}
	sum := h.New()
	e.hashTo(sum)
	d, _ := ima.NewDigest(bank, sum.Sum(nil))
	return d
}

// ExtendDigest returns what the PCR of that bank is extended with: all ones for a violation.
func (e *Entry) ExtendDigest(bank ima.HashAlgo) ima.Digest {
	if !e.violation {
		return e.Digest(bank)
	}
	ones := make([]byte, bank.Size())
	for i := range ones {
		ones[i] = 0xff
	}
	d, err := ima.NewDigest(bank, ones)
	if err != nil {
		return ima.Digest{}
	}
	return d
}

// hashTo writes what the template digest covers. Source: ima_crypto.c, ima_calc_field_array_hash_tfm.
func (e *Entry) hashTo(h hash.Hash) {
	if e.template.name != IMA {
		h.Write(e.data)
		return
	}
	d, _ := e.Field("d")
	n, _ := e.Field("n")
	var padded [legacyNameMax + 1]byte
	copy(padded[:], n)
	h.Write(d)
	h.Write(padded[:])
}

// AppendBinary appends the entry as the binary list of a bank has it; SHA1 is the classic binary_runtime_measurements.
func (e *Entry) AppendBinary(dst []byte, bank ima.HashAlgo) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, e.pcr)
	dst = append(dst, e.Digest(bank).Bytes()...)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(e.template.name)))
	dst = append(dst, e.template.name...)
	if e.template.name != IMA {
		dst = binary.LittleEndian.AppendUint32(dst, uint32(len(e.data)))
		return append(dst, e.data...)
	}
	d, _ := e.Field("d")
	name := e.Name()
	dst = append(dst, d...)
	dst = binary.LittleEndian.AppendUint32(dst, uint32(len(name)))
	return append(dst, name...)
}

// AppendASCII appends the entry's line, with its newline, as the ascii list of a bank has it. Bytes of a name that could forge a
// line or a field are escaped as \ooo in octal, where the kernel prints them as they are.
func (e *Entry) AppendASCII(dst []byte, bank ima.HashAlgo) []byte {
	dst = fmt.Appendf(dst, "%2d ", e.pcr)
	dst = hex.AppendEncode(dst, e.Digest(bank).Bytes())
	dst = append(dst, ' ')
	dst = append(dst, e.template.name...)
	rest := e.data
	for _, f := range e.template.fields {
		n := binary.LittleEndian.Uint32(rest)
		dst = append(dst, ' ')
		if n > 0 {
			dst = f.ascii(dst, rest[4:4+n])
		}
		rest = rest[4+n:]
	}
	return append(dst, '\n')
}
