package verify

import (
	"encoding/binary"
	"fmt"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// Binding is a vTPM that a native list vouches for. Container and image are claimed by the container runtime, whatever is proven.
type Binding struct {
	binding.Attach
	Entry  int         // that attaches it
	Proven bool        // by the given PCR values; else it is only claimed
	End    *BindingEnd // nil: the list does not say that it has ended

	pcr int // of the entry
}

// BindingEnd is the entry that says that a vTPM is attached no more.
type BindingEnd struct {
	binding.End
	Entry  int
	Proven bool

	pcr int
}

// VouchesFor reports whether a list says that the vTPM whose attestation key has that Name is attached, and nothing that it has ended,
// be that only claimed. With proven, the given PCR values must prove the attaching.
func (r *Result) VouchesFor(ak binding.Name, proven bool) bool {
	if ak == "" {
		return false
	}
	for _, b := range r.Bindings {
		if b.AK == ak && b.End == nil && (b.Proven || !proven) {
			return true
		}
	}
	return false
}

// bindingEntry takes an entry in a binding's place apart. What makes it one is its data alone: no digest covers the template's name, so
// an entry could hide behind another that has as many fields.
func bindingEntry(e *imalog.Entry) (name string, digest, buf []byte, ok bool) {
	var fields [3][]byte
	rest := e.Data()
	for i := range fields {
		if len(rest) < 4 {
			return "", nil, nil, false
		}
		n := binary.LittleEndian.Uint32(rest) // an Entry's lengths fit its data
		fields[i], rest = rest[4:4+n], rest[4+n:]
		if i == 1 {
			name = nameOf(fields[i])
			if name == "" {
				return "", nil, nil, false
			}
		}
	}
	return name, fields[0], fields[2], len(rest) == 0
}

// nameOf returns which binding's name a field holds, "" if none.
func nameOf(field []byte) string {
	switch string(field) {
	case binding.AttachName + "\x00":
		return binding.AttachName
	case binding.EndName + "\x00":
		return binding.EndName
	}
	return ""
}

// binding takes note of the next entry if it is a binding's.
func (c *checker) binding(e *imalog.Entry, offset int64) {
	name, digest, buf, ok := bindingEntry(e)
	if !ok {
		return
	}
	err := checkBuffer(e, digest, buf)
	switch {
	case err != nil:
	case name == binding.AttachName:
		err = c.attach(e.PCR(), buf)
	default:
		err = c.end(e.PCR(), buf)
	}
	if err != nil {
		c.broken(&ReplayError{Kind: MalformedBinding, Entry: c.result.Entries, Offset: offset, PCR: e.PCR(), Bank: c.fileBank,
			Reason: fmt.Sprintf("%s: %v", name, err), Err: err})
	}
}

// checkBuffer makes sure that the entry is what the agent writes: critical data with its digest.
func checkBuffer(e *imalog.Entry, digest, buf []byte) error {
	d := e.FileDigest()
	switch {
	case e.Violation():
		return fmt.Errorf("a violation stands in its place")
	case e.Template() != imalog.Buf:
		return fmt.Errorf("its template is %q, want %q", e.Template(), imalog.Buf)
	case d.IsNone():
		return fmt.Errorf("its digest %s is of no known algorithm", quote(string(digest)))
	}
	want, err := ima.Sum(d.Algo(), buf)
	if err == nil && d != want {
		err = fmt.Errorf("its digest is %v, that of its buffer %v", d, want)
	}
	return err
}

func (c *checker) attach(pcr int, buf []byte) error {
	a, err := binding.ParseAttach(buf)
	if err != nil {
		return err
	}
	if i, ok := c.attached[a.ID]; ok {
		return fmt.Errorf("%v was attached by entry %d already", a.ID, c.result.Bindings[i].Entry)
	}
	c.attached[a.ID] = len(c.result.Bindings)
	c.result.Bindings = append(c.result.Bindings, Binding{Attach: a, Entry: c.result.Entries, pcr: pcr})
	return nil
}

func (c *checker) end(pcr int, buf []byte) error {
	e, err := binding.ParseEnd(buf)
	if err != nil {
		return err
	}
	i, ok := c.attached[e.ID]
	if !ok {
		return fmt.Errorf("%v was never attached", e.ID)
	}
	b := &c.result.Bindings[i]
	if b.End != nil {
		return fmt.Errorf("%v was ended by entry %d already", e.ID, b.End.Entry)
	}
	b.End = &BindingEnd{End: e, Entry: c.result.Entries, pcr: pcr}
	return nil
}

// proveBindings says which of them the given values prove.
func (c *checker) proveBindings() {
	proven := func(entry, pcr int) bool { return entry < c.result.Proven.Prefix && c.covered[pcr] }
	for i := range c.result.Bindings {
		b := &c.result.Bindings[i]
		b.Proven = proven(b.Entry, b.pcr)
		if b.End != nil {
			b.End.Proven = proven(b.End.Entry, b.End.pcr)
		}
	}
}
