package policy

import "strings"

// templates are those that the kernel defines, in its order. Source: ima_template.c, builtin_templates.
var templates = [...]struct{ name, format string }{
	{"ima", "d|n"},
	{"ima-ng", "d-ng|n-ng"},
	{"ima-sig", "d-ng|n-ng|sig"},
	{"ima-ngv2", "d-ngv2|n-ng"},
	{"ima-sigv2", "d-ngv2|n-ng|sig"},
	{"ima-buf", "d-ng|n-ng|buf"},
	{"ima-modsig", "d-ng|n-ng|sig|d-modsig|modsig"},
	{"evm-sig", "d-ng|n-ng|evmsig|xattrnames|xattrlengths|xattrvalues|iuid|igid|imode"},
}

// templateNames returns all names, for messages.
func templateNames() string {
	var names []string
	for _, t := range templates {
		names = append(names, t.name)
	}
	return strings.Join(names, " ")
}

// findTemplate returns the name of the template that s names, or whose format it is. Source: lookup_template_desc.
func findTemplate(s string) (name string, ok bool) {
	for _, t := range templates {
		if t.name == s || t.format == s {
			return t.name, true
		}
	}
	return "", false
}

// templateFields returns the fields of a template given by name, or by a format of one's own.
func templateFields(s string) []string {
	for _, t := range templates {
		if t.name == s {
			s = t.format
		}
	}
	return strings.Split(s, "|")
}
