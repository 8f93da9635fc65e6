package agent

import (
	"errors"
	"strings"
	"testing"
)

func TestNRIOptions(t *testing.T) {
	const socket = "/run/nri.sock"
	for name, c := range map[string]struct {
		nri     NRI
		noSwtpm bool
		says    string // "": it is accepted
	}{
		"off":                         {nri: NRI{Socket: NoNRI}},
		"off, without vTPMs":          {nri: NRI{Socket: NoNRI}, noSwtpm: true},
		"all":                         {nri: NRI{Socket: socket, Namespaces: []string{"prod", "stage"}, Labels: []string{"a.b/c=d", "e="}, Required: true}},
		"no path":                     {nri: NRI{}, says: `--nri ""`},
		"relative path":               {nri: NRI{Socket: "nri.sock"}, says: "absolute path"},
		"without vTPMs":               {nri: NRI{Socket: socket}, noSwtpm: true, says: "--ns-tpm none"},
		"namespaces without a socket": {nri: NRI{Socket: NoNRI, Namespaces: []string{"prod"}}, says: "--nri-namespace"},
		"labels without a socket":     {nri: NRI{Socket: NoNRI, Labels: []string{"a=b"}}, says: "--nri-label"},
		"required without a socket":   {nri: NRI{Socket: NoNRI, Required: true}, says: "--nri-required"},
		"namespace without a name":    {nri: NRI{Socket: socket, Namespaces: []string{""}}, says: "--nri-namespace"},
		"two namespaces in one":       {nri: NRI{Socket: socket, Namespaces: []string{"a,b"}}, says: "several times"},
		"label without a value":       {nri: NRI{Socket: socket, Labels: []string{"a=b", "c"}}, says: `--nri-label "c"`},
		"label without a name":        {nri: NRI{Socket: socket, Labels: []string{"=b"}}, says: "NAME=VALUE"},
	} {
		t.Run(name, func(t *testing.T) {
			err := c.nri.check(!c.noSwtpm)
			var usage *UsageError
			if c.says == "" && err != nil || c.says != "" && (!errors.As(err, &usage) || !strings.Contains(err.Error(), c.says)) {
				t.Errorf("got %v, want %q", err, c.says)
			}
		})
	}
}
