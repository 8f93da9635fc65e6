package binding

import (
	"encoding/binary"
	"fmt"
	"unicode"
	"unicode/utf8"

	"imans.dev/imans-agent/internal/ima"
)

// VersionError means that a buffer is of another version of the format, which this program can't read.
type VersionError struct{ Version uint32 }

// Error says what to do.
func (e *VersionError) Error() string {
	return fmt.Sprintf("format %d of a binding is not known here, only %d: use an imans-agent as new as the one that wrote it",
		e.Version, version)
}

// FormatError means that a buffer is not what Encode makes of anything.
type FormatError struct {
	Offset int // of the field in the buffer
	Reason string
}

// Error says where and why.
func (e *FormatError) Error() string { return fmt.Sprintf("byte %d: %s", e.Offset, e.Reason) }

// Encode returns the buffer of an entry named AttachName. It fails for what no entry may say.
func (a *Attach) Encode() ([]byte, error) {
	if err := a.check(); err != nil {
		return nil, fmt.Errorf("encode binding: %w", err)
	}
	b := appendID(nil, a.ID)
	for _, n := range []uint32{uint32(a.TPM), uint32(a.Way), uint32(a.PCR)} {
		b = binary.LittleEndian.AppendUint32(b, n)
	}
	digest := ""
	if !a.ImageDigest.IsNone() {
		digest = a.ImageDigest.String()
	}
	for _, t := range []struct{ what, text string }{{"container id", a.Container}, {"image reference", a.Image}, {"image digest", digest}} {
		if err := checkText(t.text); err != nil {
			return nil, fmt.Errorf("encode binding: %s: %w; leave it out", t.what, err)
		}
		b = appendBytes(b, t.text)
	}
	for _, name := range []Name{a.EK, a.AK} {
		if name != "" {
			if _, err := NewName([]byte(name)); err != nil {
				return nil, fmt.Errorf("encode binding: %w", err)
			}
		}
		b = appendBytes(b, string(name))
	}
	return b, nil
}

// Encode returns the buffer of an entry named EndName. It fails for what no entry may say.
func (e *End) Encode() ([]byte, error) {
	if err := e.check(); err != nil {
		return nil, fmt.Errorf("encode binding's end: %w", err)
	}
	b := appendID(nil, e.ID)
	b = binary.LittleEndian.AppendUint32(b, uint32(e.Cause))
	b = binary.LittleEndian.AppendUint64(b, e.Entries)
	b = binary.LittleEndian.AppendUint32(b, uint32(len(e.Values)))
	for _, v := range e.Values {
		b = appendBytes(b, v.String())
	}
	return b, nil
}

func appendID(b []byte, id ID) []byte {
	b = binary.LittleEndian.AppendUint32(b, version)
	b = binary.LittleEndian.AppendUint32(b, id.Inum)
	b = binary.LittleEndian.AppendUint64(b, id.NSID)
	return binary.LittleEndian.AppendUint32(b, id.Number)
}

func appendBytes(b []byte, s string) []byte {
	b = binary.LittleEndian.AppendUint32(b, uint32(len(s)))
	return append(b, s...)
}

// checkText refuses what would deceive whoever reads it on a line.
func checkText(s string) error {
	if len(s) > maxText {
		return fmt.Errorf("a text of %d bytes, at most %d are possible", len(s), maxText)
	}
	if !utf8.ValidString(s) {
		return fmt.Errorf("text %q is not UTF-8", s)
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return fmt.Errorf("text %q has %U, which is not printable", s, r)
		}
	}
	return nil
}

// ParseAttach reads the buffer of an entry named AttachName. Errors: *VersionError, *FormatError.
func ParseAttach(b []byte) (Attach, error) {
	d := decoder{b: b}
	a := Attach{ID: d.id(), TPM: Version(d.uint32()), Way: Way(d.uint32()), PCR: int(d.uint32())}
	a.Container, a.Image = d.text(), d.text()
	if text := d.text(); text != "" {
		a.ImageDigest = d.digest(text)
	}
	a.EK, a.AK = d.name(), d.name()
	if err := d.end(a.check); err != nil {
		return Attach{}, err
	}
	return a, nil
}

// ParseEnd reads the buffer of an entry named EndName. Errors: *VersionError, *FormatError.
func ParseEnd(b []byte) (End, error) {
	d := decoder{b: b}
	e := End{ID: d.id(), Cause: Cause(d.uint32()), Entries: d.uint64()}
	n := d.uint32()
	if n > maxValues {
		d.fail("%d PCR values, at most %d are possible", n, maxValues)
	}
	for range n {
		if d.err != nil {
			break
		}
		e.Values = append(e.Values, d.digest(d.text()))
	}
	if err := d.end(e.check); err != nil {
		return End{}, err
	}
	return e, nil
}

// decoder reads fields until the first error, which it keeps.
type decoder struct {
	b   []byte
	at  int // of the field that was read last, then behind it
	err error
}

func (d *decoder) fail(format string, args ...any) {
	if d.err == nil {
		d.err = &FormatError{Offset: d.at, Reason: fmt.Sprintf(format, args...)}
	}
}

// take returns the next n bytes; as many zeros after an error, so n is small or within the buffer.
func (d *decoder) take(n int) []byte {
	if d.err == nil && len(d.b)-d.at < n {
		d.fail("the buffer ends within a field of %d bytes", n)
	}
	if d.err != nil {
		return make([]byte, n)
	}
	d.at += n
	return d.b[d.at-n : d.at]
}

func (d *decoder) uint32() uint32 { return binary.LittleEndian.Uint32(d.take(4)) }
func (d *decoder) uint64() uint64 { return binary.LittleEndian.Uint64(d.take(8)) }

// id reads the version and which attachment it is.
func (d *decoder) id() ID {
	if v := d.uint32(); d.err == nil && v != version {
		d.err = &VersionError{v}
	}
	return ID{Inum: d.uint32(), NSID: d.uint64(), Number: d.uint32()}
}

func (d *decoder) bytes() []byte {
	n := d.uint32()
	if d.err != nil {
		return nil
	}
	if int64(n) > int64(len(d.b)-d.at) {
		d.fail("a length of %d, with %d bytes left", n, len(d.b)-d.at)
		return nil
	}
	return d.take(int(n))
}

func (d *decoder) text() string {
	s := string(d.bytes())
	if err := checkText(s); err != nil {
		d.fail("%v", err)
	}
	return s
}

func (d *decoder) digest(text string) ima.Digest {
	if d.err != nil {
		return ima.Digest{}
	}
	digest, err := parseDigest(text)
	if err != nil {
		d.fail("%v", err)
	}
	return digest
}

func (d *decoder) name() Name {
	b := d.bytes()
	if len(b) == 0 {
		return ""
	}
	n, err := NewName(b)
	if err != nil {
		d.fail("%v", err)
	}
	return n
}

// end checks that nothing is left and that what was read may be said.
func (d *decoder) end(check func() error) error {
	if d.err == nil && d.at != len(d.b) {
		d.fail("%d bytes too many", len(d.b)-d.at)
	}
	if d.err == nil {
		if err := check(); err != nil {
			d.at = 0
			d.fail("%v", err)
		}
	}
	return d.err
}
