package imalog

import (
	"fmt"
	"slices"
	"strings"

	"imans.dev/imans-agent/internal/ima"
)

// The names of the templates that the kernel defines. Source: ima_template.c, builtin_templates.
const (
	IMA    = "ima"
	NG     = "ima-ng"
	Sig    = "ima-sig"
	NGv2   = "ima-ngv2"
	Sigv2  = "ima-sigv2"
	Buf    = "ima-buf"
	Modsig = "ima-modsig"
	EVMSig = "evm-sig"
)

// Limits of a free format. Source: ima.h (IMA_TEMPLATE_NUM_FIELDS_MAX, IMA_TEMPLATE_FIELD_ID_MAX_LEN).
const (
	maxFields     = 15
	maxFieldIDLen = 16
)

// MaxPCR is the last register of a TPM that follows the PC Client platform's profile. No entry has a higher one.
const MaxPCR = 23

var builtinFormats = map[string]string{
	IMA:    "d|n",
	NG:     "d-ng|n-ng",
	Sig:    "d-ng|n-ng|sig",
	NGv2:   "d-ngv2|n-ng",
	Sigv2:  "d-ngv2|n-ng|sig",
	Buf:    "d-ng|n-ng|buf",
	Modsig: "d-ng|n-ng|sig|d-modsig|modsig",
	EVMSig: "d-ng|n-ng|evmsig|xattrnames|xattrlengths|xattrvalues|iuid|igid|imode",
}

// template is a named list of fields; entries of one template share it.
type template struct {
	name   string
	fields []*field
}

// lookupTemplate finds a template by name, or makes one of a free format.
func lookupTemplate(name string) (*template, error) {
	format, ok := builtinFormats[name]
	if !ok {
		format = name
	}
	ids := strings.Split(format, "|")
	if len(ids) > maxFields {
		return nil, fmt.Errorf("template %q: %d fields, at most %d are allowed", name, len(ids), maxFields)
	}
	t := &template{name: name}
	for _, id := range ids {
		f, ok := fields[id]
		if !ok || len(id) > maxFieldIDLen {
			if ids[0] == name {
				return nil, fmt.Errorf("template %q: unknown; the built-in ones are %s, a free one joins fields by |",
					name, "ima ima-ng ima-sig ima-ngv2 ima-sigv2 ima-buf ima-modsig evm-sig")
			}
			return nil, fmt.Errorf("template %q: unknown field %q", name, id)
		}
		t.fields = append(t.fields, f)
	}
	return t, nil
}

// checkAlgo reports whether t's digest fields can hold a file digest of that algorithm.
func (t *template) checkAlgo(algo ima.HashAlgo) error {
	for _, f := range t.fields {
		switch {
		case f.id != "d" || algo == ima.SHA1:
		case t.name == IMA:
			// The kernel would write MD5's 16 bytes as they are, but the list does not tell their number and readers take 20.
			return fmt.Errorf("template %q holds a sha1 digest, not %s", t.name, algo)
		case algo != ima.MD5:
			return fmt.Errorf("template %q holds a sha1 or md5 digest, not %s", t.name, algo)
		}
	}
	return nil
}

// CheckDigest reports whether entries of that template can hold file digests of that algorithm: the old field d takes
// sha1 only (md5 too in a free format), where the kernel hashes the file a second time. Ask when a template is
// configured.
func CheckDigest(templateName string, algo ima.HashAlgo) error {
	t, err := lookupTemplate(templateName)
	if err != nil {
		return err
	}
	return t.checkAlgo(algo)
}

// attributeFields show a file's extended attributes, owners and mode.
var attributeFields = []string{"sig", "evmsig", "xattrnames", "xattrlengths", "xattrvalues", "iuid", "igid", "imode"}

// ShowsAttributes reports whether a template shows a file's extended attributes, owners or mode.
func ShowsAttributes(templateName string) bool {
	t, err := lookupTemplate(templateName)
	return err == nil && slices.ContainsFunc(t.fields, func(f *field) bool { return slices.Contains(attributeFields, f.id) })
}

// CheckTemplate reports whether a template of that name (or free format) can be written and read.
func CheckTemplate(name string) error {
	_, err := lookupTemplate(name)
	return err
}
