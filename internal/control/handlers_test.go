package control

import (
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/namespace"
)

// What stands behind a list is told as it is: what is not anchored is never said to be proven.
func TestTrust(t *testing.T) {
	anchored := measure.Status{Anchored: true}
	for name, c := range map[string]struct {
		info namespace.Info
		want Trust
	}{
		"the machine's TPM":          {namespace.Info{Listed: true, Status: anchored}, Hardware},
		"a program":                  {namespace.Info{Listed: true, Software: true, Status: anchored}, Software},
		"no TPM":                     {namespace.Info{Listed: true}, Nothing},
		"a vTPM that was lost":       {namespace.Info{Depth: 1, Listed: true, Software: true}, Nothing},
		"nothing was measured in it": {namespace.Info{Depth: 1, Software: true}, ""},
	} {
		if got := jsonNamespace(c.info).Trust; got != c.want {
			t.Errorf("%s: %q, want %q", name, got, c.want)
		}
	}
	if err := notProven(namespace.Info{}); !strings.Contains(err.Error(), "native list") || !strings.Contains(err.Error(), "--tpm swtpm") {
		t.Errorf("the native list: %v", err)
	}
}
