package control

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"net/http/httptest"
	"net/url"
	"path/filepath"
	"reflect"
	"strings"
	"testing"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/oci"
	"imans.dev/imans-agent/internal/policy"
)

// FuzzAnswers: whatever answers in the agent's place, an answer is read as one that is written again is, and a refusal says something.
func FuzzAnswers(f *testing.F) {
	for _, answer := range []any{
		Status{Namespaces: 1, Lost: map[string]uint64{"lost_read": 7}}, []Namespace{{Inum: 7, ID: 8, Trust: Software, State: "idle"}},
		PCRs{PCR: 10, Values: []string{"sha1:00"}}, Error{Error: "none"}, oci.Grant{},
	} {
		b, err := json.Marshal(answer)
		if err != nil {
			f.Fatal(err)
		}
		f.Add(b)
	}
	f.Add([]byte(`{"inum":7} {"inum":8}`))
	f.Fuzz(func(t *testing.T, answer []byte) {
		if refusal("400 Bad Request", bytes.NewReader(answer)).Error() == "" {
			t.Fatal("a refusal that says nothing")
		}
		for _, v := range []any{new(Status), new([]Namespace), new(Namespace), new(PCRs), new(oci.Grant)} {
			if readAnswer(bytes.NewReader(answer), v) != nil {
				continue
			}
			if !json.Valid(answer) {
				t.Fatalf("%q is taken", answer)
			}
			b, err := json.Marshal(v)
			if err != nil {
				t.Fatal(err)
			}
			again := reflect.New(reflect.TypeOf(v).Elem()).Interface()
			if err := readAnswer(bytes.NewReader(b), again); err != nil {
				t.Fatal(err)
			}
			if b2, err := json.Marshal(again); err != nil || !bytes.Equal(b2, b) {
				t.Fatalf("%s, read and written again %s, %v", b, b2, err)
			}
		}
	})
}

// FuzzRequests: whatever the host's root asks an agent without namespaces, it is answered, or told what is wrong.
func FuzzRequests(f *testing.F) {
	for pattern := range new(Server).routes() {
		method, path, _ := strings.Cut(pattern, " ")
		f.Add(method, strings.NewReplacer("{name}", "native", "{id}", "c1").Replace(path), "format=ascii", []byte(`{"id":"c1","vtpm":true}`))
	}
	f.Add("POST", "/v1/containers/c1/created", "", []byte(`{"pid":-1}`))
	f.Add("POST", "/v1/namespaces/1:2/gate", "", []byte("exec"))
	f.Add("GET", "/v1/namespaces/4026532201/measurements", "from=-1&wait=1ms", []byte(nil))
	s, err := Listen(filepath.Join(f.TempDir(), SocketName), Config{
		Tree: namespace.New(namespace.Config{Log: zap.NewNop()}), Containers: &told{}, Log: zap.NewNop(),
		Do:         func(ctx context.Context, do func(context.Context) error) error { return do(ctx) },
		ParseRules: func(text []byte) (*policy.Policy, error) { return policy.Parse("written", text) },
	})
	if err != nil {
		f.Fatal(err)
	}
	f.Cleanup(func() { s.listener.Close() })
	f.Fuzz(func(t *testing.T, method, path, query string, body []byte) {
		target := &url.URL{Path: "/" + strings.TrimPrefix(path, "/"), RawQuery: query}
		r, err := http.NewRequest(method, target.String(), strings.NewReader(string(body)))
		if err != nil || r.URL.Path == "/v1/status" { // the status takes the kernel side
			t.Skip()
		}
		w := httptest.NewRecorder()
		s.http.Handler.ServeHTTP(w, r.WithContext(context.WithValue(t.Context(), callerKey{}, caller{host: true})))
		if w.Code < 300 || w.Header().Get("Content-Type") != "application/json" { // else it is net/http's own answer
			return
		}
		var e Error
		if err := json.Unmarshal(w.Body.Bytes(), &e); err != nil || e.Error == "" || w.Code >= 500 && w.Code != http.StatusNotImplemented {
			t.Fatalf("%s %s: status %d, %s", method, target, w.Code, w.Body)
		}
	})
}
