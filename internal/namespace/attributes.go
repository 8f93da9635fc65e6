package namespace

import (
	"context"
	"crypto/sha256"
	"fmt"

	"imans.dev/imans-agent/internal/digest"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
)

// attributes returns what a template shows of the file besides digest and name; nil if it shows nothing, or the file can't be
// opened any more: the entry then claims less than was there, never more.
func (l *look) attributes(s *State, template string) *digest.Attributes {
	if !imalog.ShowsAttributes(template) {
		return nil
	}
	if l.asked || l.file == nil && !digest.Local(l.ev.RealFS.Magic) {
		return l.attrs // of a file system that others run it would be their word, and may take their time
	}
	l.asked = true
	attrs, err := l.readAttributes(s)
	if err != nil {
		l.inDoubt = true // to be asked again when it comes again
		return nil
	}
	l.attrs = attrs
	return attrs
}

func (l *look) readAttributes(s *State) (*digest.Attributes, error) {
	var root *digest.Root
	if l.file == nil {
		root = l.root(s)
	}
	return lookWithin(s.allowance(), func(context.Context) (*digest.Attributes, error) {
		if l.file != nil {
			return digest.AttributesOf(l.file, l.ev)
		}
		return digest.ReadAttributes(l.ev, root)
	})
}

// algo returns what a file is hashed with for a template's entry: as security.ima is, if the template shows that, so that its
// signature is one of the digest beside it. Source: ima_main.c, process_measurement; ima_template_lib.c, ima_eventdigest_init.
func (l *look) algo(n, s *State, template string) ima.HashAlgo {
	algo := n.algo
	if attrs := l.attributes(s, template); attrs != nil {
		if signed, ok := attrs.Algo(); ok {
			algo = signed
		}
	}
	if imalog.CheckDigest(template, algo) != nil {
		return ima.SHA1
	}
	return algo
}

// fill adds what a template shows of the file besides digest and name. The owners are the event's.
func (l *look) fill(v *imalog.FieldValues, s *State, template string) {
	attrs := l.attributes(s, template)
	if attrs == nil {
		return
	}
	v.File = true
	v.Sig, v.EVMSig = attrs.IMA, attrs.EVM
	v.XattrNames, v.XattrLengths, v.XattrValues = attrs.XattrNames, attrs.XattrLengths, attrs.XattrValues
	v.IUID, v.IGID, v.IMode = l.ev.FOwner, l.ev.FGroup, attrs.Mode
}

// measured is what an inode was when a list took it.
type measured struct {
	digest     ima.Digest
	attributes [sha256.Size]byte // on an overlayfs, those that the template shows
}

// shown stands for the attributes that a template shows of a file on an overlayfs, where a change of one lets the kernel measure the
// file again; elsewhere it does not. Source: ima_main.c, process_measurement ("On stacked filesystems").
func (l *look) shown(s *State, template string) (sum [sha256.Size]byte) {
	if l.ev.Flags&event.Overlay == 0 {
		return sum
	}
	var v imalog.FieldValues
	l.fill(&v, s, template)
	if v.File {
		sum = sha256.Sum256(fmt.Appendf(nil, "%x %x %q %x %x %d %d %d",
			v.Sig, v.EVMSig, v.XattrNames, v.XattrLengths, v.XattrValues, v.IUID, v.IGID, v.IMode))
	}
	return sum
}
