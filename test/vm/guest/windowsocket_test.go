//go:build vm

package guest

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os/exec"
	"strings"
	"testing"

	"github.com/getkin/kin-openapi/openapi3"

	"imans.dev/imans-agent/internal/control"
)

// Who asks the agent from a namespace learns of that one alone, and can do nothing to others.
func TestWindowSocket(t *testing.T) {
	sample(t, "6.12")
	a := startAgent(t, "--namespaces", "all")
	other := exec.Command("unshare", "--mount", "sleep", "1000")
	if err := other.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { other.Process.Kill(); other.Wait() })
	theirs := fmt.Sprint(mountNS(t, other.Process.Pid))
	ask := program + " --run-dir " + a.dir + "/run "
	for _, options := range []string{"--mount", "--mount --user --map-root-user"} {
		t.Run(options, func(t *testing.T) {
			out := sh(t, fmt.Sprintf("unshare %s sh -c 'readlink /proc/self/ns/mnt; exec %s ns list --json'", options, ask))
			first, rest, _ := strings.Cut(out, "\n")
			own := strings.Trim(first, "mnt:[]")
			var seen []control.Namespace
			if err := json.Unmarshal([]byte(rest), &seen); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			if len(seen) != 1 || fmt.Sprint(seen[0].Inum) != own || seen[0].Parent != "" || seen[0].PID != 0 {
				t.Errorf("in %s: %+v", own, seen)
			}
			inside := func(line string) (int, string) { // $own is the namespace's name
				return exits(t, "unshare", append(strings.Fields(options), "sh", "-c", "own=$(readlink /proc/self/ns/mnt | tr -dc 0-9); "+line)...)
			}
			if status, out := inside(ask + "measurements $own && " + ask + "policy show $own && " + ask + "ns activate $own"); status != 0 || !strings.Contains(out, "boot_aggregate") || !strings.Contains(out, "BPRM_CHECK") {
				t.Errorf("its own: exit status %d: %s", status, out)
			}
			for _, line := range []string{"measurements native", "ns show native", "ns show " + theirs, "ns activate " + theirs, "policy show " + theirs,
				"policy load exec --ns " + theirs, "ns window $own", "ns window native"} {
				if status, out := inside(ask + line); status != exitLacksSomething {
					t.Errorf("%s: exit status %d: %s", line, status, out)
				}
			}
			if status, out := inside(ask + "ns show 1"); status != exitLacksSomething || !strings.Contains(out, "no namespace") {
				t.Errorf("one that is not there: exit status %d: %s", status, out)
			}
		})
	}
	a.answersAsDescribed(theirs)
	if out := a.cli("ns", "show", theirs); !strings.Contains(out, theirs) {
		t.Errorf("root of the host: %s", out)
	}
}

// answersAsDescribed asks for everything that openapi.yaml describes of a namespace, and holds the answers against it.
func (a *agent) answersAsDescribed(name string) {
	a.t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", a.dir+"/run/"+control.SocketName)
	}}}
	defer client.CloseIdleConnections()
	doc, err := openapi3.NewLoader().LoadFromData(control.OpenAPI)
	if err != nil {
		a.t.Fatal(err)
	}
	for path, item := range doc.Paths.Map() {
		for method, operation := range item.Operations() {
			for _, name := range []string{name, "1"} { // the second there is not
				body, query := "", ""
				if operation.RequestBody != nil {
					body = "measure func=BPRM_CHECK uid=4321\n"
				}
				if strings.HasSuffix(path, "/measurements") {
					query = "?format=json"
				}
				r, err := http.NewRequest(method, "http://agent"+strings.ReplaceAll(path, "{name}", name)+query, strings.NewReader(body))
				if err != nil {
					a.t.Fatal(err)
				}
				rsp, err := client.Do(r)
				if err != nil {
					a.t.Fatal(err)
				}
				text, err := io.ReadAll(rsp.Body)
				rsp.Body.Close()
				if err != nil {
					a.t.Fatal(err)
				}
				if err := matches(operation, rsp, text); err != nil {
					a.t.Errorf("%s %s: %s: %v\n%s", method, r.URL.Path, rsp.Status, err, tail(string(text), 500))
				}
			}
		}
	}
}

// matches holds an answer against what an operation says of it.
func matches(operation *openapi3.Operation, rsp *http.Response, text []byte) error {
	described := operation.Responses.Status(rsp.StatusCode)
	if described == nil {
		described = operation.Responses.Default()
	}
	kind, _, _ := strings.Cut(rsp.Header.Get("Content-Type"), ";")
	content := described.Value.Content[kind]
	if content == nil {
		return fmt.Errorf("content type %q is not described", kind)
	}
	for decoder := json.NewDecoder(bytes.NewReader(text)); strings.HasSuffix(kind, "json"); {
		var value any
		if err := decoder.Decode(&value); err == io.EOF {
			break
		} else if err != nil {
			return err
		}
		if err := content.Schema.Value.VisitJSON(value); err != nil {
			return err
		}
	}
	return nil
}
