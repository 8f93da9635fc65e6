package digest

import (
	"encoding/binary"
	"errors"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
)

// Attributes are what templates show of a file besides its content, and its owners, which the event has.
//
// They are claimed by whoever may set them: security.* by the owner of the file system's user namespace.
//
// BUG: security.capability of version 3 whose root is the host's is read as version 2, 4 bytes shorter than the kernel's own IMA
// has it, and with SELinux or Smack at work their labels are what they have in memory: getxattr(2) tells no other. It would take
// a kfunc that reads security.*.
type Attributes struct {
	IMA, EVM []byte // security.ima and security.evm, as they are; nil: none
	// Those that EVM protects, in its order; none if one can't be read, as in the kernel.
	XattrNames   []string
	XattrLengths []uint32
	XattrValues  []byte // one behind the other
	Mode         uint16 // type and permissions
}

// protected are the names that EVM protects, in the order that the kernel lists them, whether the security module is built in or
// not. Source: security/integrity/evm/evm_main.c, evm_config_default_xattrnames and evm_read_protected_xattrs. Names that were
// added on the machine (evm/evm_xattrs) are not among them: lists are to mean the same on every machine.
var protected = []string{
	"security.selinux", "security.SMACK64", "security.SMACK64EXEC", "security.SMACK64TRANSMUTE", "security.SMACK64MMAP",
	"security.apparmor", "security.ima", "security.capability",
}

// ReadAttributes opens the file that the event saw, as Open does, and reads its attributes. They are those at the event: a change
// of one moves the file's change time, and is ErrChanged.
func ReadAttributes(ev *event.File, root *Root) (*Attributes, error) {
	f, err := Open(ev, root)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return AttributesOf(f, ev)
}

// AttributesOf reads the attributes of an open file, which is the content that the event saw, or will see.
func AttributesOf(f *os.File, ev *event.File) (*Attributes, error) {
	a, err := readAttributes(f)
	if err != nil {
		return nil, err
	}
	return a, Same(f, ev)
}

func readAttributes(f *os.File) (*Attributes, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return nil, err
	}
	a := &Attributes{Mode: uint16(st.Mode)}
	scratch := make([]byte, 65536) // XATTR_SIZE_MAX
	a.EVM, _ = xattr(f, "security.evm", scratch)
	for _, name := range protected {
		value, err := xattr(f, name, scratch)
		if errors.Is(err, unix.ENODATA) {
			continue
		}
		if err != nil {
			a.XattrNames, a.XattrLengths, a.XattrValues = nil, nil, nil
			break
		}
		if name == "security.ima" {
			a.IMA = value
		}
		a.XattrNames = append(a.XattrNames, name)
		a.XattrLengths = append(a.XattrLengths, uint32(len(value)))
		a.XattrValues = append(a.XattrValues, value...)
	}
	return a, nil
}

// xattr reads one extended attribute; its value is never nil but for an error.
func xattr(f *os.File, name string, scratch []byte) ([]byte, error) {
	n, err := unix.Fgetxattr(int(f.Fd()), name, scratch)
	if err != nil {
		return nil, err
	}
	return slices.Concat([]byte{}, scratch[:n]), nil
}

// Kinds of security.ima. Source: security/integrity/integrity.h, enum evm_ima_xattr_type.
const (
	imaDigest       = 1 // IMA_XATTR_DIGEST: SHA-1, or MD5 of 16 bytes or with 4 zeros behind it
	imaSignature    = 3 // EVM_IMA_XATTR_DIGSIG
	imaDigestNG     = 4 // IMA_XATTR_DIGEST_NG: the algorithm, the digest
	veritySignature = 6 // IMA_VERITY_DIGSIG
)

// signatureHeader is the size in bytes of struct signature_v2_hdr: type, version, algorithm, key id, size of the signature.
const signatureHeader = 9

// Algo returns the algorithm that security.ima was made with, by which the kernel's IMA then hashes the file; false: there is
// none, or it does not say. Source: security/integrity/ima/ima_appraise.c, ima_get_hash_algo.
func (a *Attributes) Algo() (ima.HashAlgo, bool) {
	b := a.IMA
	if len(b) < 2 {
		return 0, false
	}
	algo := ima.HashAlgo(0)
	switch {
	case b[0] == imaSignature && b[1] == 2 && len(b) > signatureHeader, b[0] == veritySignature && b[1] == 3 && len(b) > signatureHeader:
		algo = ima.HashAlgo(b[2])
	case b[0] == imaDigestNG:
		algo = ima.HashAlgo(b[1])
	case b[0] == imaDigest && len(b) == 17, b[0] == imaDigest && len(b) == 21 && binary.LittleEndian.Uint32(b[17:]) == 0:
		algo = ima.MD5
	case b[0] == imaDigest && len(b) == 21:
		algo = ima.SHA1
	default:
		return 0, false
	}
	_, ok := algo.Hash()
	return algo, ok
}
