package oci

import (
	"errors"
	"strings"
	"testing"
)

// FuzzParseRequest: what a spec asks for passes the check that the agent makes of what it is sent, or the spec is refused.
func FuzzParseRequest(f *testing.F) {
	for _, name := range []string{"docker.json", "podman.json", "crun.json"} {
		f.Add(string(readTestdata(f, name)))
	}
	f.Add(`{"annotations":{"imans.dev/gate":"exec","imans.dev/policy":"p","imans.dev/vtpm":"false"}}`)
	f.Add(`{"linux":{"resources":{"vtpms":[{"vtpmVersion":"1.2","statePath":"/s"}]},"uidMappings":[{"containerID":0,"hostID":5,"size":1}],"namespaces":[{"type":"user"}]}}`)
	f.Fuzz(func(t *testing.T, spec string) {
		r, err := ParseRequest([]byte(spec), "c1", "/b", true)
		if err != nil {
			return
		}
		if err := r.Check(); err != nil {
			t.Fatalf("%+v: %v", r, err)
		}
	})
}

// FuzzAsk: annotations are taken or refused by their name, and never ask for what is none of the words.
func FuzzAsk(f *testing.F) {
	f.Add("true", "web", "exec", "false", `{"imans.dev/gate":"all"}`)
	f.Add("", "../web", "off", "true", `{`)
	f.Fuzz(func(t *testing.T, vtpm, policy, gate, required, pod string) {
		var r Request
		err := r.annotate(map[string]string{
			AnnotationVTPM: vtpm, AnnotationPolicy: policy, AnnotationGate: gate, AnnotationRequired: required, crioAnnotations: pod,
		})
		var field *FieldError
		if err != nil {
			if !errors.As(err, &field) || !strings.Contains(field.Field, "imans.dev/") {
				t.Fatal(err)
			}
			return
		}
		if r.Policy != policy || r.Gate != gate || r.VTPM != (vtpm == "true") {
			t.Fatalf("%+v", r)
		}
		r.ID = "c1"
		if err := r.Check(); err != nil {
			t.Fatal(err)
		}
	})
}

// FuzzParseArgs: a command line of a runtime's is read or refused.
func FuzzParseArgs(f *testing.F) {
	f.Add("--root\x00/r\x00create\x00--bundle\x00/b\x00--pid-file=/p\x00c1")
	f.Add("delete\x00--force\x00c1")
	f.Add("--log\x00/l\x00--log-format\x00json\x00run\x00-d\x00c1")
	f.Fuzz(func(t *testing.T, line string) {
		inv, err := ParseArgs(strings.Split(line, "\x00"))
		if err == nil && inv.ID != "" && !strings.Contains(line, inv.ID) {
			t.Fatalf("%q: id %q", line, inv.ID)
		}
	})
}

// FuzzParseState: a state names a container by an id that leads nowhere else.
func FuzzParseState(f *testing.F) {
	f.Add([]byte(`{"ociVersion":"1.0.2","id":"c1","status":"created","pid":4422,"bundle":"/b"}`))
	f.Add([]byte(`{"id":".."}`))
	f.Fuzz(func(t *testing.T, text []byte) {
		s, err := ParseState(text)
		if err == nil && (CheckID(s.ID) != nil || strings.Contains(s.ID, "/")) {
			t.Fatalf("%+v", s)
		}
	})
}
