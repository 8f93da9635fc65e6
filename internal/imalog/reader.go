package imalog

import (
	"bufio"
	"bytes"
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
	Cut    bool // the list ends in the middle of the entry, and nothing of what is there contradicts one that goes on
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
	r        *bufio.Reader
	bank     ima.HashAlgo
	template *template // of the last entry: most lists have one for all
	entry    int
	offset   int64 // of the entry being read
	next     int64
	stored   [ima.MaxDigestSize]byte
	err      error // after which nothing more can be read
}

// errCut is the reason of a list that ends in the middle of an entry.
var errCut = errors.New("the list ends in the middle of the entry")

// NewReader reads the list of a bank; SHA1 is the classic binary_runtime_measurements. It may read ahead of what Next
// returns.
func NewReader(r io.Reader, bank ima.HashAlgo) *Reader {
	reader := &Reader{r: bufio.NewReaderSize(r, 64<<10), bank: bank}
	if bank.Size() == 0 {
		reader.err = fmt.Errorf("read list: unknown hash algorithm %s", bank)
	}
	return reader
}

// Offset returns where the entry last returned by Next begins; End where it ends.
func (r *Reader) Offset() int64 { return r.offset }

// End returns the offset just behind the entry last returned by Next, after a cut entry that of the list's end.
func (r *Reader) End() int64 { return r.next }

// StoredDigest returns the template digest that the list claims for the entry last returned by Next. Next does not
// compare it with the data.
func (r *Reader) StoredDigest() ima.Digest {
	d, _ := ima.NewDigest(r.bank, r.stored[:r.bank.Size()]) // none for an unknown bank, which reads no entry
	return d
}

// AppendStoredDigest appends the bytes of StoredDigest.
func (r *Reader) AppendStoredDigest(dst []byte) []byte {
	return append(dst, r.stored[:r.bank.Size()]...)
}

// Next returns the next entry, io.EOF after the last, a *CorruptError, after which nothing more can be read, or the
// error of the underlying reader. An entry whose stored template digest is all zero is a violation.
func (r *Reader) Next() (*Entry, error) {
	e := new(Entry)
	if err := r.ReadInto(e); err != nil {
		return nil, err
	}
	return e, nil
}

// ReadInto is Next into memory that the caller has: what e held is overwritten, its data's room used again. It is for
// those who look at each entry once; e must be known to no one else.
func (r *Reader) ReadInto(e *Entry) error {
	if r.err != nil {
		return r.err
	}
	r.offset = r.next
	if r.readBuffered(e) {
		r.entry++
		return nil
	}
	err := r.read(e)
	switch {
	case err == nil:
		r.entry++
	case err == io.EOF: // between two entries: the list may grow
	default:
		r.err = err
	}
	return err
}

// readBuffered reads an entry that is whole in the buffer, good, and of the template of the one before: nearly all are,
// and it takes half the time. For any other it changes nothing and returns false, and read finds out what there is.
func (r *Reader) readBuffered(e *Entry) bool {
	t := r.template
	if t == nil || t.name == IMA {
		return false
	}
	b, _ := r.r.Peek(r.r.Buffered())
	name := 4 + r.bank.Size() + 4
	data := name + len(t.name) + 4
	if len(b) < data || string(b[name:data-4]) != t.name || binary.LittleEndian.Uint32(b[name-4:]) != uint32(len(t.name)) {
		return false
	}
	pcr, size := binary.LittleEndian.Uint32(b), int64(binary.LittleEndian.Uint32(b[data-4:]))
	if pcr > MaxPCR || size > maxTemplateData || size > int64(len(b)-data) {
		return false
	}
	end := data + int(size)
	if t.check(b[data:end], int(size)) != nil {
		return false
	}
	e.template, e.pcr, e.data = t, pcr, append(e.data[:0], b[data:end]...)
	copy(r.stored[:], b[4:name-4])
	e.violation = allZero(b[4 : name-4])
	r.skip(end)
	return true
}

func (r *Reader) read(e *Entry) error {
	size := r.bank.Size()
	b, err := r.peek(4 + size + 4)
	if len(b) == 0 && err == errCut {
		return io.EOF
	}
	if len(b) >= 4 && binary.LittleEndian.Uint32(b) > MaxPCR {
		return r.corrupt(fmt.Errorf("PCR %d is not one of 0 to %d", binary.LittleEndian.Uint32(b), MaxPCR))
	}
	if err != nil {
		return r.fail(b, err)
	}
	e.pcr = binary.LittleEndian.Uint32(b)
	copy(r.stored[:], b[4:4+size])
	e.violation = allZero(b[4 : 4+size])
	nameSize := int64(binary.LittleEndian.Uint32(b[4+size:]))
	r.skip(len(b))
	if nameSize == 0 || nameSize > maxTemplateName {
		return r.corrupt(fmt.Errorf("a template name of %d bytes", nameSize))
	}
	if e.template, err = r.readTemplate(int(nameSize)); err != nil {
		return err
	}
	if e.template.name == IMA {
		return r.legacyData(e)
	}
	return r.data(e)
}

func (r *Reader) readTemplate(size int) (*template, error) {
	b, err := r.peek(size)
	if err != nil {
		for _, c := range b {
			if (c < 'a' || c > 'z') && (c < '0' || c > '9') && c != '-' && c != '|' {
				return nil, r.corrupt(fmt.Errorf("a template name with a byte %#02x", c))
			}
		}
		return nil, r.fail(b, err)
	}
	if r.template == nil || r.template.name != string(b) {
		t, err := lookupTemplate(string(b))
		if err != nil {
			return nil, r.corrupt(err)
		}
		r.template = t
	}
	r.skip(size)
	return r.template, nil
}

func (r *Reader) data(e *Entry) error {
	b, err := r.peek(4)
	if err != nil {
		return r.fail(b, err)
	}
	size := binary.LittleEndian.Uint32(b)
	r.skip(4)
	if size > maxTemplateData {
		return r.corrupt(fmt.Errorf("template data of %d bytes", size))
	}
	e.data = e.data[:0]
	for left := int(size); left > 0; left = int(size) - len(e.data) {
		b, err := r.peek(min(left, r.r.Size()))
		e.data = append(e.data, b...)
		r.skip(len(b))
		if err != nil {
			if err := e.template.check(e.data, int(size)); err != nil {
				return r.corrupt(err)
			}
			return r.fail(nil, err)
		}
	}
	if err := e.template.check(e.data, int(size)); err != nil {
		return r.corrupt(err)
	}
	return nil
}

// legacyData brings template "ima" into the shape of the others.
func (r *Reader) legacyData(e *Entry) error {
	const head = legacyDigestSize + 4
	b, err := r.peek(head)
	if err != nil {
		return r.fail(b, err)
	}
	size := binary.LittleEndian.Uint32(b[legacyDigestSize:])
	if size > legacyNameMax {
		return r.corrupt(fmt.Errorf("a name of %d bytes in template ima", size))
	}
	b, err = r.peek(head + int(size))
	if bytes.IndexByte(b[head:], 0) >= 0 {
		return r.corrupt(errors.New("a name with a zero byte in template ima"))
	}
	if err != nil {
		return r.fail(b, err)
	}
	e.data = binary.LittleEndian.AppendUint32(e.data[:0], legacyDigestSize)
	e.data = append(e.data, b[:legacyDigestSize]...)
	e.data = binary.LittleEndian.AppendUint32(e.data, size+1)
	e.data = append(e.data, b[head:]...)
	e.data = append(e.data, 0)
	r.skip(len(b))
	return nil
}

// peek returns the next n bytes, n at most the buffer's size; fewer with errCut at the list's end or the reader's
// error.
func (r *Reader) peek(n int) ([]byte, error) {
	b, err := r.r.Peek(n)
	if err == io.EOF {
		err = errCut
	}
	return b, err
}

// skip passes over n bytes that peek has returned.
func (r *Reader) skip(n int) {
	r.next += int64(n)
	r.r.Discard(n) // in the buffer, so it can't fail
}

// fail ends the reading where the list or the underlying reader does; rest is what was there still.
func (r *Reader) fail(rest []byte, err error) error {
	r.skip(len(rest))
	if err == errCut {
		return &CorruptError{Entry: r.entry, Offset: r.offset, Reason: err.Error(), Cut: true}
	}
	return fmt.Errorf("read entry %d at byte %d: %w", r.entry, r.offset, err)
}

func (r *Reader) corrupt(reason error) error {
	return &CorruptError{Entry: r.entry, Offset: r.offset, Reason: reason.Error()}
}

func allZero(b []byte) bool {
	for _, c := range b {
		if c != 0 {
			return false
		}
	}
	return true
}

// check makes sure that template data of size bytes is exactly the template's fields, so that no later access can go
// astray. With only a part of it at hand it finds what no continuation could mend: lengths that were changed, as
// against data that was cut.
func (t *template) check(data []byte, size int) error {
	at := 0
	for _, f := range t.fields {
		if size-at < 4 {
			return fmt.Errorf("template data ends before field %s", f.id)
		}
		if len(data)-at < 4 {
			return nil
		}
		n := binary.LittleEndian.Uint32(data[at:])
		at += 4
		if uint64(n) > uint64(size-at) {
			return fmt.Errorf("field %s of %d bytes does not fit", f.id, n)
		}
		if len(data)-at < int(n) {
			at += int(n)
			continue
		}
		if f.check != nil {
			if err := f.check(data[at : at+int(n)]); err != nil {
				return fmt.Errorf("field %s: %w", f.id, err)
			}
		}
		at += int(n)
	}
	if at != size {
		return fmt.Errorf("%d bytes of template data behind the last field", size-at)
	}
	return nil
}
