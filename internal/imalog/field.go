package imalog

import (
	"bytes"
	"encoding/binary"
	"encoding/hex"
	"fmt"
	"strconv"
	"strings"

	"imans.dev/imans-agent/internal/ima"
)

// FieldValues is what is known of an event, for the fields of any template to choose from.
type FieldValues struct {
	Digest       ima.Digest // of the file or buffer; a violation needs only its algorithm
	Verity       bool       // Digest is an fs-verity digest (d-ngv2)
	Name         string
	Sig          []byte // security.ima, if it holds a signature
	Buf          []byte
	ModsigDigest ima.Digest
	Modsig       []byte
	EVMSig       []byte
	XattrNames   []string
	XattrLengths []uint32
	XattrValues  []byte
	IUID, IGID   uint32
	IMode        uint16
}

// field is one kind of template field. Source: ima_template.c (supported_fields), ima_template_lib.c.
type field struct {
	id     string
	encode func(v *FieldValues) []byte
	ascii  func(dst, data []byte) []byte
	check  func(data []byte) error // nil: any bytes will do
}

// fields is the registry of the kernel's 16 fields.
var fields = map[string]*field{
	"d":            {"d", encodeLegacyDigest, asciiHex, nil},
	"n":            {"n", encodeLegacyName, asciiString, checkString},
	"d-ng":         {"d-ng", func(v *FieldValues) []byte { return digestField("", v.Digest) }, asciiDigest, checkDigest},
	"d-ngv2":       {"d-ngv2", encodeDigestV2, asciiDigest, checkDigest},
	"n-ng":         {"n-ng", func(v *FieldValues) []byte { return stringField(v.Name) }, asciiString, checkString},
	"sig":          {"sig", func(v *FieldValues) []byte { return v.Sig }, asciiHex, nil},
	"buf":          {"buf", func(v *FieldValues) []byte { return v.Buf }, asciiHex, nil},
	"d-modsig":     {"d-modsig", encodeModsigDigest, asciiDigest, checkDigestOrEmpty},
	"modsig":       {"modsig", func(v *FieldValues) []byte { return v.Modsig }, asciiHex, nil},
	"evmsig":       {"evmsig", func(v *FieldValues) []byte { return v.EVMSig }, asciiHex, nil},
	"xattrnames":   {"xattrnames", encodeXattrNames, asciiString, checkStringOrEmpty},
	"xattrlengths": {"xattrlengths", encodeXattrLengths, asciiHex, nil},
	"xattrvalues":  {"xattrvalues", func(v *FieldValues) []byte { return v.XattrValues }, asciiHex, nil},
	"iuid":         {"iuid", func(v *FieldValues) []byte { return binary.LittleEndian.AppendUint32(nil, v.IUID) }, asciiUint, nil},
	"igid":         {"igid", func(v *FieldValues) []byte { return binary.LittleEndian.AppendUint32(nil, v.IGID) }, asciiUint, nil},
	"imode":        {"imode", func(v *FieldValues) []byte { return binary.LittleEndian.AppendUint16(nil, v.IMode) }, asciiUint, nil},
}

// legacyDigestSize is IMA_DIGEST_SIZE: field d holds SHA-1, or MD5 padded.
const legacyDigestSize = 20

// legacyNameMax is IMA_EVENT_NAME_LEN_MAX in bytes, without the final zero.
const legacyNameMax = 255

func encodeLegacyDigest(v *FieldValues) []byte {
	b := make([]byte, legacyDigestSize)
	copy(b, v.Digest.Bytes())
	return b
}

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

func encodeXattrNames(v *FieldValues) []byte { return stringField(strings.Join(v.XattrNames, "|")) }

func encodeXattrLengths(v *FieldValues) []byte {
	var b []byte
	for _, n := range v.XattrLengths {
		b = binary.LittleEndian.AppendUint32(b, n)
	}
	return b
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

// splitDigest takes [type ":"] algorithm ":" zero digest apart. Violations of kernels before 6.8 have 20 zero bytes whatever the
// algorithm, so the length is not compared.
func splitDigest(b []byte) (prefix string, sum []byte, err error) {
	i := bytes.IndexByte(b, 0)
	if i < 2 || b[i-1] != ':' {
		return "", nil, fmt.Errorf("a digest field must begin with its algorithm, a colon and a zero byte")
	}
	return string(b[:i]), b[i+1:], nil
}

// fieldDigest reads a digest field; none if its algorithm is unknown or its length not the algorithm's.
func fieldDigest(b []byte) ima.Digest {
	prefix, sum, err := splitDigest(b)
	if err != nil {
		return ima.Digest{}
	}
	name := strings.TrimSuffix(prefix, ":")
	name = name[strings.LastIndexByte(name, ':')+1:]
	algo, ok := ima.HashAlgoByName(name)
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
	return hex.AppendEncode(append(dst, prefix...), sum)
}

// asciiString escapes what could forge a line or a field: control bytes, space and backslash become \ooo in octal. The kernel
// prints such bytes as they are.
func asciiString(dst, b []byte) []byte {
	for _, c := range bytes.TrimSuffix(b, []byte{0}) {
		if c <= ' ' || c == 0x7f || c == '\\' {
			dst = append(dst, '\\', '0'+c>>6, '0'+c>>3&7, '0'+c&7)
		} else {
			dst = append(dst, c)
		}
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
