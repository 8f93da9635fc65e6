package main

import (
	"encoding/json"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/control"
)

// Tables say what stands behind each list: the native one's TPM is the machine's, a program or none.
func TestNSTrust(t *testing.T) {
	for trust, want := range map[control.Trust]struct{ table, one string }{
		control.Hardware: {"11 native measuring", "trust hardware: the machine's own TPM"},
		control.Software: {"11 software measuring", "trust software: a TPM that is a program"},
		control.Nothing:  {"11 none measuring", "trust none: no TPM proves this list"},
	} {
		namespaces := []control.Namespace{
			{Inum: 1, ID: 1, PCR: 11, State: "measuring", Trust: trust},
			{Inum: 2, ID: 2, Depth: 1, PCR: 10, State: "measuring", TPM: "unix:/run/tpm", Trust: control.Software},
			{Inum: 3, ID: 3, Depth: 1, PCR: 10, State: "idle"},
		}
		dir := t.TempDir()
		listener, err := net.Listen("unix", filepath.Join(dir, control.SocketName))
		if err != nil {
			t.Fatal(err)
		}
		answer := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if strings.HasSuffix(r.URL.Path, "/native") {
				json.NewEncoder(w).Encode(namespaces[0])
			} else {
				json.NewEncoder(w).Encode(namespaces)
			}
		})
		server := http.Server{Handler: answer}
		go server.Serve(listener) // ends with Close
		said := func(args ...string) string {
			t.Helper()
			var out, errs strings.Builder
			if status := run(t.Context(), append(args, "--run-dir", dir), &out, &errs); status != 0 {
				t.Errorf("%v: status %d: %s", args, status, errs.String())
			}
			return strings.Join(strings.Fields(out.String()), " ")
		}
		if out := said("ns"); !strings.Contains(out, want.table) || !strings.Contains(out, "10 swtpm measuring") || !strings.Contains(out, "10 - idle") {
			t.Errorf("%s: %s", trust, out)
		}
		if out := said("ns", "show", "native"); !strings.Contains(out, want.one) {
			t.Errorf("%s: no %q in %s", trust, want.one, out)
		}
		server.Close()
	}
}
