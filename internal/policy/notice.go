package policy

import (
	"fmt"
	"slices"
)

// Notices returns what is no error but loses something a verifier will want, one line each, with what to do. own is the
// template, by name or format, of the list that takes the entries of rules that name none. The kernel says the same in
// its log. Source: ima_policy.c, check_template_modsig and check_template_field.
func (p *Policy) Notices(name, own string) []string {
	var notices []string
	for _, r := range p.rules {
		template := own
		if r.template != "" {
			template = r.template
		}
		fields := templateFields(template)
		has := func(field string) bool { return slices.Contains(fields, field) }
		say := func(format string, args ...any) {
			notices = append(notices, fmt.Sprintf("%s:%d: %q: ", name, r.Line, r.Text)+fmt.Sprintf(format, args...))
		}
		if r.has(flagModsig) && has("modsig") && !has("d-modsig") {
			say("the template %s keeps an appended signature but not the digest that it signs; add the field d-modsig", template)
		}
		if r.Action == Measure && r.has(flagVerity) && !has("d-ngv2") {
			say("the template %s does not tell fs-verity's digest from IMA's; use template=ima-ngv2 or ima-sigv2", template)
		}
	}
	return notices
}
