package imalog

import (
	"bufio"
	"encoding/binary"
	"errors"
	"fmt"
	"io"

	"imans.dev/imans-agent/internal/ima"
)

// Limits that a sane list keeps, against lengths that are nonsense.
const (
	maxTemplateName = maxFields * (maxFieldIDLen + 1)
	maxTemplateData = 1 << 20 // bytes; the kernel's own xattr and signature limits are far below
)

// CorruptError is a list that is not as the package comment describes.
type CorruptError struct {
	Entry  int   // number of the entry, from 0
	Offset int64 // of the entry in the list, bytes
	Reason string
	Cut    bool // the list ends in the middle of the entry
}

// Error says which entry, where and why.
func (e *CorruptError) Error() string {
	return fmt.Sprintf("entry %d at byte %d: %s", e.Entry, e.Offset, e.Reason)
}

// Unwrap makes a cut list io.ErrUnexpectedEOF.
func (e *CorruptError) Unwrap() error {
	if e.Cut {
		return io.ErrUnexpectedEOF
	}
	return nil
}

// Reader reads a binary list. One goroutine uses it.
type Reader struct {
	r         *bufio.Reader
	bank      ima.HashAlgo
	templates map[string]*template
	entry     int
	offset    int64 // of the entry being read
	next      int64
	stored    ima.Digest
	scratch   [maxTemplateName]byte
}

// NewReader reads the list of a bank; SHA1 is the classic binary_runtime_measurements. It may read ahead of what Next returns.
func NewReader(r io.Reader, bank ima.HashAlgo) *Reader {
	return &Reader{r: bufio.NewReaderSize(r, 64<<10), bank: bank, templates: make(map[string]*template)}
}

// Offset returns where the entry last returned by Next begins; End where it ends.
func (r *Reader) Offset() int64 { return r.offset }

// End returns the offset just behind the entry last returned by Next.
func (r *Reader) End() int64 { return r.next }

// StoredDigest returns the template digest that the list claims for the entry last returned by Next. Next does not compare it
// with the data.
func (r *Reader) StoredDigest() ima.Digest { return r.stored }

// Next returns the next entry, io.EOF after the last, or a *CorruptError, after which nothing more can be read. An entry whose
// stored template digest is all zero is a violation.
func (r *Reader) Next() (*Entry, error) {
	r.offset = r.next
	if _, err := r.r.Peek(1); err == io.EOF {
		return nil, io.EOF
	}
	e, err := r.read()
	if err != nil {
		corrupt := &CorruptError{Entry: r.entry, Offset: r.offset, Reason: err.Error()}
		if errors.Is(err, io.ErrUnexpectedEOF) || errors.Is(err, io.EOF) {
			corrupt.Cut, corrupt.Reason = true, "the list ends in the middle of the entry"
		}
		return nil, corrupt
	}
	r.entry++
	return e, nil
}

func (r *Reader) read() (*Entry, error) {
	pcr, err := r.u32()
	if err != nil {
		return nil, err
	}
	if pcr > 23 {
		return nil, fmt.Errorf("PCR %d is not one of 0 to 23", pcr)
	}
	sum := r.scratch[:r.bank.Size()]
	if err := r.fill(sum); err != nil {
		return nil, err
	}
	if r.stored, err = ima.NewDigest(r.bank, sum); err != nil {
		return nil, err
	}
	t, err := r.template()
	if err != nil {
		return nil, err
	}
	e := &Entry{template: t, pcr: pcr, violation: r.stored.IsZero()}
	if t.name == IMA {
		e.data, err = r.legacyData()
	} else {
		e.data, err = r.data()
	}
	if err != nil {
		return nil, err
	}
	return e, checkFields(e)
}

func (r *Reader) template() (*template, error) {
	n, err := r.u32()
	if err != nil {
		return nil, err
	}
	if n == 0 || n > maxTemplateName {
		return nil, fmt.Errorf("a template name of %d bytes", n)
	}
	name := r.scratch[:n]
	if err := r.fill(name); err != nil {
		return nil, err
	}
	if t, ok := r.templates[string(name)]; ok {
		return t, nil
	}
	t, err := lookupTemplate(string(name))
	if err == nil {
		r.templates[t.name] = t
	}
	return t, err
}

func (r *Reader) data() ([]byte, error) {
	n, err := r.u32()
	if err != nil {
		return nil, err
	}
	if n > maxTemplateData {
		return nil, fmt.Errorf("template data of %d bytes", n)
	}
	b := make([]byte, n)
	return b, r.fill(b)
}

// legacyData brings template "ima" into the shape of the others.
func (r *Reader) legacyData() ([]byte, error) {
	var digest [legacyDigestSize]byte
	if err := r.fill(digest[:]); err != nil {
		return nil, err
	}
	n, err := r.u32()
	if err != nil {
		return nil, err
	}
	if n > legacyNameMax {
		return nil, fmt.Errorf("a name of %d bytes in template ima", n)
	}
	b := binary.LittleEndian.AppendUint32(nil, legacyDigestSize)
	b = append(b, digest[:]...)
	b = binary.LittleEndian.AppendUint32(b, n+1)
	at := len(b)
	b = append(b, make([]byte, n+1)...)
	return b, r.fill(b[at : at+int(n)])
}

// checkFields makes sure that the data is exactly the template's fields, so that no later access can go astray.
func checkFields(e *Entry) error {
	rest := e.data
	for _, f := range e.template.fields {
		if len(rest) < 4 {
			return fmt.Errorf("template data ends before field %s", f.id)
		}
		n := binary.LittleEndian.Uint32(rest)
		if uint64(n) > uint64(len(rest)-4) {
			return fmt.Errorf("field %s of %d bytes does not fit", f.id, n)
		}
		if f.check != nil {
			if err := f.check(rest[4 : 4+n]); err != nil {
				return fmt.Errorf("field %s: %w", f.id, err)
			}
		}
		rest = rest[4+n:]
	}
	if len(rest) > 0 {
		return fmt.Errorf("%d bytes of template data behind the last field", len(rest))
	}
	return nil
}

func (r *Reader) u32() (uint32, error) {
	var b [4]byte
	if err := r.fill(b[:]); err != nil {
		return 0, err
	}
	return binary.LittleEndian.Uint32(b[:]), nil
}

func (r *Reader) fill(b []byte) error {
	n, err := io.ReadFull(r.r, b)
	r.next += int64(n)
	return err
}
