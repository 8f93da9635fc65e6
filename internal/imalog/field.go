package imalog

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"errors"
	"fmt"
	"strconv"
	"strings"
	"unicode/utf8"

	"imans.dev/imans-agent/internal/ima"
)

// FieldValues is what is known of an event, for the fields of any template to choose from.
type FieldValues struct {
	Digest ima.Digest // of the file or buffer; a violation needs only its algorithm
	Verity bool       // Digest is an fs-verity digest (d-ngv2)
	Name   string     // spaces become underscores
	// Sig and EVMSig are the whole values of security.ima and security.evm. Only signatures are written, which their first
	// byte tells; the field sig has the EVM signature where there is no IMA signature.
	Sig, EVMSig  []byte
	Buf          []byte
	ModsigDigest ima.Digest
	Modsig       []byte
	// What follows is written only if File says that the event has a file.
	File         bool
	XattrNames   []string // those that EVM protects
	XattrLengths []uint32
	XattrValues  []byte
	IUID, IGID   uint32 // as in the initial user namespace; the kernel has those of the file system's user namespace
	IMode        uint16
}

// First byte of security.ima and security.evm. Source: integrity.h, enum evm_ima_xattr_type.
const (
	xattrDigsig         = 3
	xattrPortableDigsig = 5
	xattrVerityDigsig   = 6
)

// field is one kind of template field. Source: ima_template.c (supported_fields), ima_template_lib.c.
type field struct {
	id     string
	encode func(v *FieldValues) []byte
	ascii  func(dst, data []byte) []byte
	check  func(data []byte) error // nil: any bytes will do
}

// fields is the registry of the kernel's 16 fields.
var fields = map[string]*field{
	"d":            {"d", func(v *FieldValues) []byte { return v.Digest.Bytes() }, asciiHex, nil},
	"n":            {"n", encodeLegacyName, asciiString, checkString},
	"d-ng":         {"d-ng", func(v *FieldValues) []byte { return digestField("", v.Digest) }, asciiDigest, checkDigest},
	"d-ngv2":       {"d-ngv2", encodeDigestV2, asciiDigest, checkDigest},
	"n-ng":         {"n-ng", func(v *FieldValues) []byte { return stringField(v.Name) }, asciiString, checkString},
	"sig":          {"sig", encodeSig, asciiHex, nil},
	"buf":          {"buf", func(v *FieldValues) []byte { return v.Buf }, asciiHex, nil},
	"d-modsig":     {"d-modsig", encodeModsigDigest, asciiDigest, checkDigestOrEmpty},
	"modsig":       {"modsig", func(v *FieldValues) []byte { return v.Modsig }, asciiHex, nil},
	"evmsig":       {"evmsig", encodeEVMSig, asciiHex, nil},
	"xattrnames":   {"xattrnames", encodeXattrNames, asciiString, checkStringOrEmpty},
	"xattrlengths": {"xattrlengths", encodeXattrLengths, asciiHex, nil},
	"xattrvalues":  {"xattrvalues", encodeXattrValues, asciiHex, nil},
	"iuid":         {"iuid", func(v *FieldValues) []byte { return inodeField(v, v.IUID) }, asciiUint, nil},
	"igid":         {"igid", func(v *FieldValues) []byte { return inodeField(v, v.IGID) }, asciiUint, nil},
	"imode":        {"imode", encodeMode, asciiUint, nil},
}

// legacyDigestSize is IMA_DIGEST_SIZE: what template "ima" has of a digest, and the field d of any violation.
const legacyDigestSize = 20

// legacyNameMax is IMA_EVENT_NAME_LEN_MAX in bytes, without the final zero.
const legacyNameMax = 255

// encodeLegacyName keeps a name that is too long to its last component, as the kernel does.
func encodeLegacyName(v *FieldValues) []byte {
	name := v.Name
	if len(name) > legacyNameMax {
		name = name[strings.LastIndexByte(name, '/')+1:]
	}
	return stringField(name[:min(len(name), legacyNameMax)])
}

// digestField is [type ":"] algorithm ":" zero digest.
func digestField(kind string, d ima.Digest) []byte {
	b := append([]byte(kind+d.Algo().String()), ':', 0)
	return append(b, d.Bytes()...)
}

func encodeDigestV2(v *FieldValues) []byte {
	if v.Verity {
		return digestField("verity:", v.Digest)
	}
	return digestField("ima:", v.Digest)
}

func encodeModsigDigest(v *FieldValues) []byte {
	if v.ModsigDigest.IsNone() {
		return nil
	}
	return digestField("", v.ModsigDigest)
}

// stringField ends in a zero, and has no space: one would split the field in an ascii list.
func stringField(s string) []byte {
	return append([]byte(strings.ReplaceAll(s, " ", "_")), 0)
}

func encodeSig(v *FieldValues) []byte {
	if len(v.Sig) > 0 && (v.Sig[0] == xattrDigsig || v.Sig[0] == xattrVerityDigsig) {
		return v.Sig
	}
	return encodeEVMSig(v)
}

func encodeEVMSig(v *FieldValues) []byte {
	if len(v.EVMSig) > 0 && v.EVMSig[0] == xattrPortableDigsig {
		return v.EVMSig
	}
	return nil
}

func encodeXattrNames(v *FieldValues) []byte {
	if !v.File || len(v.XattrNames) == 0 {
		return nil
	}
	return append([]byte(strings.Join(v.XattrNames, "|")), 0)
}

func encodeXattrLengths(v *FieldValues) []byte {
	var b []byte
	if v.File {
		for _, n := range v.XattrLengths {
			b = binary.LittleEndian.AppendUint32(b, n)
		}
	}
	return b
}

func encodeXattrValues(v *FieldValues) []byte {
	if !v.File {
		return nil
	}
	return v.XattrValues
}

func inodeField(v *FieldValues, id uint32) []byte {
	if !v.File {
		return nil
	}
	return binary.LittleEndian.AppendUint32(nil, id)
}

func encodeMode(v *FieldValues) []byte {
	if !v.File {
		return nil
	}
	return binary.LittleEndian.AppendUint16(nil, v.IMode)
}

func checkString(b []byte) error {
	if i := bytes.IndexByte(b, 0); i != len(b)-1 {
		return fmt.Errorf("a string of %d bytes must end in its only zero byte", len(b))
	}
	return nil
}

func checkStringOrEmpty(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	return checkString(b)
}

func checkDigestOrEmpty(b []byte) error {
	if len(b) == 0 {
		return nil
	}
	return checkDigest(b)
}

func checkDigest(b []byte) error {
	_, _, err := splitDigest(b)
	return err
}

// splitDigest takes [type ":"] algorithm ":" zero digest apart. Violations of older kernels have 20 zero bytes whatever
// the algorithm, so the length is not compared.
func splitDigest(b []byte) (prefix, sum []byte, err error) {
	i := bytes.IndexByte(b, 0)
	if i < 2 || b[i-1] != ':' {
		return nil, nil, errors.New("a digest field must begin with its algorithm, a colon and a zero byte")
	}
	return b[:i], b[i+1:], nil
}

// fieldDigest reads a digest field; none if its algorithm is unknown or its length not the algorithm's.
func fieldDigest(b []byte) ima.Digest {
	prefix, sum, err := splitDigest(b)
	if err != nil {
		return ima.Digest{}
	}
	name := prefix[:len(prefix)-1]
	name = name[bytes.LastIndexByte(name, ':')+1:]
	algo, ok := ima.HashAlgoByName(string(name))
	if !ok {
		return ima.Digest{}
	}
	d, err := ima.NewDigest(algo, sum)
	if err != nil {
		return ima.Digest{}
	}
	return d
}

func asciiHex(dst, b []byte) []byte { return hex.AppendEncode(dst, b) }

func asciiDigest(dst, b []byte) []byte {
	prefix, sum, err := splitDigest(b)
	if err != nil {
		return asciiHex(dst, b)
	}
	return hex.AppendEncode(asciiString(dst, prefix), sum)
}

// asciiString prints a string up to its final zero, with every control character as one \ooo in octal for each of its
// bytes. Those are what ends a line or a field in some reader's eyes: the bytes up to space and 0x7f, U+0080 to U+009F
// (also as one byte), U+2028 and U+2029. All else, the backslash too, is printed as the kernel does, so that \x2d in a
// name stays what it is.
func asciiString(dst, b []byte) []byte {
	b = bytes.TrimSuffix(b, []byte{0})
	for len(b) > 0 {
		if c := b[0]; c > ' ' && c < 0x7f {
			dst, b = append(dst, c), b[1:]
			continue
		}
		r, n := utf8.DecodeRune(b)
		invalid := r == utf8.RuneError && n == 1
		if r <= ' ' || r >= 0x7f && r < 0xa0 || r == 0x2028 || r == 0x2029 || invalid && b[0] < 0xa0 {
			for _, c := range b[:n] {
				dst = append(dst, '\\', '0'+c>>6, '0'+c>>3&7, '0'+c&7)
			}
		} else {
			dst = append(dst, b[:n]...)
		}
		b = b[n:]
	}
	return dst
}

func asciiUint(dst, b []byte) []byte {
	switch len(b) {
	case 1:
		return strconv.AppendUint(dst, uint64(b[0]), 10)
	case 2:
		return strconv.AppendUint(dst, uint64(binary.LittleEndian.Uint16(b)), 10)
	case 4:
		return strconv.AppendUint(dst, uint64(binary.LittleEndian.Uint32(b)), 10)
	case 8:
		return strconv.AppendUint(dst, binary.LittleEndian.Uint64(b), 10)
	}
	return dst
}
