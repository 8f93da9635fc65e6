package imalog

import (
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strings"

	"imans.dev/imans-agent/internal/ima"
)

// Entry is one entry of a measurement list. It is immutable, and may be shared by any number of lists and goroutines;
// only Reader.ReadInto writes to the one it is given. It holds no digests: each is computed when asked for.
type Entry struct {
	template  *template
	data      []byte // of each field: u32 length, bytes
	pcr       uint32
	violation bool
}

// BootAggregateName is the name of a list's first entry.
const BootAggregateName = "boot_aggregate"

// NewEntry makes the entry of a measured file or buffer. It fails if the template is unknown, the digest missing or not
// one that the template can hold (CheckDigest), the name empty or with a zero byte in it, or the data too long to be
// read back.
func NewEntry(pcr int, templateName string, v FieldValues) (*Entry, error) {
	return newEntry(pcr, templateName, &v, false)
}

// NewViolation makes the entry of an event that could not be measured. Its file digest is zero, of the length of
// v.Digest's algorithm; of v's other values it has the name, the EVM signature and the inode's, which are known without
// the content.
func NewViolation(pcr int, templateName string, v FieldValues) (*Entry, error) {
	if !v.Digest.IsNone() {
		v.Digest = ima.ZeroDigest(v.Digest.Algo())
	}
	v.Verity, v.Sig, v.Buf, v.ModsigDigest, v.Modsig = false, nil, nil, ima.Digest{}, nil
	return newEntry(pcr, templateName, &v, true)
}

// NewBuffer makes the entry of critical data: template ima-buf, whatever the list's own is, with the buffer itself and its digest. It
// is named by the event; the label, by which a policy chooses, is in no entry. It fails if there is no buffer or its digest can't be
// computed. Source: ima_measure_critical_data and process_buffer_measurement in security/integrity/ima/ima_main.c.
func NewBuffer(pcr int, event string, algo ima.HashAlgo, buf []byte) (*Entry, error) {
	if len(buf) == 0 {
		return nil, fmt.Errorf("make entry of %q: no buffer", event)
	}
	d, err := ima.Sum(algo, buf)
	if err != nil {
		return nil, fmt.Errorf("make entry of %q: %w", event, err)
	}
	return NewEntry(pcr, Buf, FieldValues{Digest: d, Name: event, Buf: buf})
}

// BootAggregate makes a list's first entry, from the digest of PCRs 0 to 7 (SHA-1) or 0 to 9 of the list's own TPM.
func BootAggregate(pcr int, templateName string, d ima.Digest) (*Entry, error) {
	return newEntry(pcr, templateName, &FieldValues{Digest: d, Name: BootAggregateName}, false)
}

func newEntry(pcr int, templateName string, v *FieldValues, violation bool) (*Entry, error) {
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
	if pcr < 0 || pcr > MaxPCR {
		return nil, fmt.Errorf("make entry of %q: PCR %d is not one of 0 to %d", v.Name, pcr, MaxPCR)
	}
	if !violation {
		if err := t.checkAlgo(v.Digest.Algo()); err != nil {
			return nil, fmt.Errorf("make entry of %q: %w", v.Name, err)
		}
	}
	return t.newEntry(pcr, v, violation)
}

func (t *template) newEntry(pcr int, v *FieldValues, violation bool) (*Entry, error) {
	encoded := make([][]byte, len(t.fields))
	size := 0
	for i, f := range t.fields {
		if f.id == "d" && violation {
			encoded[i] = make([]byte, legacyDigestSize) // whatever the algorithm
		} else {
			encoded[i] = f.encode(v)
		}
		size += 4 + len(encoded[i])
	}
	if size > maxTemplateData {
		return nil, fmt.Errorf("make entry of %q: %d bytes of template data, at most %d can be read back",
			v.Name, size, maxTemplateData)
	}
	data := make([]byte, 0, size)
	for _, b := range encoded {
		data = binary.LittleEndian.AppendUint32(data, uint32(len(b)))
		data = append(data, b...)
	}
	return &Entry{template: t, data: data, pcr: uint32(pcr), violation: violation}, nil
}

// PCR returns the register that the entry extends.
func (e *Entry) PCR() int { return int(e.pcr) }

// Template returns the template's name, or its format if it has none. No digest covers it: in a list that was read it
// is claimed by whoever wrote the list, bound only by the fields having to fit.
func (e *Entry) Template() string { return e.template.name }

// Violation reports whether the entry stands for an event that could not be measured. A PCR covers that there was a
// violation; what the entry says besides is claimed by whoever wrote the list.
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

// FileDigest returns the digest of the file or buffer. None if the template has none, its algorithm is unknown or its
// length is not the algorithm's, as in the violations of older kernels. The field d of 20 bytes is taken for SHA-1, of
// 16 for MD5.
func (e *Entry) FileDigest() ima.Digest {
	for _, id := range []string{"d-ng", "d-ngv2"} {
		if b, ok := e.Field(id); ok {
			return fieldDigest(b)
		}
	}
	if b, ok := e.Field("d"); ok {
		algo := ima.SHA1
		if len(b) == ima.MD5.Size() {
			algo = ima.MD5
		}
		if d, err := ima.NewDigest(algo, b); err == nil {
			return d
		}
	}
	return ima.Digest{}
}

// Digest returns the template digest as the list of that bank stores it: all zero for a violation, none for an
// algorithm that CheckBank refuses. It is computed at each call.
func (e *Entry) Digest(bank ima.HashAlgo) ima.Digest { return bankDigest(bank, e.AppendDigest) }

// ExtendDigest returns what the PCR of that bank is extended with: all ones for a violation, else Digest.
func (e *Entry) ExtendDigest(bank ima.HashAlgo) ima.Digest {
	return bankDigest(bank, e.AppendExtendDigest)
}

func bankDigest(bank ima.HashAlgo, sum func([]byte, ima.HashAlgo) []byte) ima.Digest {
	if CheckBank(bank) != nil {
		return ima.Digest{}
	}
	var buf [ima.MaxDigestSize]byte
	d, _ := ima.NewDigest(bank, sum(buf[:0], bank)) // of the bank's own size
	return d
}

// Size returns the entry's length in bytes in the binary list of that bank.
func (e *Entry) Size(bank ima.HashAlgo) int {
	n := 4 + bank.Size() + 4 + len(e.template.name) + len(e.data)
	if e.template.name == IMA {
		return n - 4 - 1 // no length of the digest field, no zero after the name
	}
	return n + 4
}

// AppendBinary appends the entry as the binary list of a bank has it; SHA1 is the classic binary_runtime_measurements.
// It panics for a bank that CheckBank refuses.
func (e *Entry) AppendBinary(dst []byte, bank ima.HashAlgo) []byte {
	dst = binary.LittleEndian.AppendUint32(dst, e.pcr)
	dst = e.AppendDigest(dst, bank)
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

// AppendASCII appends the entry's line, with its newline, as the ascii list of a bank has it: see the package comment
// for the one difference. It panics for a bank that CheckBank refuses.
func (e *Entry) AppendASCII(dst []byte, bank ima.HashAlgo) []byte {
	dst = fmt.Appendf(dst, "%2d ", e.pcr)
	var sum [ima.MaxDigestSize]byte
	dst = hex.AppendEncode(dst, e.AppendDigest(sum[:0], bank))
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
