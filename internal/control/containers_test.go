package control

import (
	"context"
	"io"
	"net/http"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/oci"
)

// told writes down what it is told and grants what it is asked for.
type told struct{ calls []string }

func (c *told) Prepare(_ context.Context, r oci.Request) (oci.Grant, error) {
	c.calls = append(c.calls, "prepare "+r.ID)
	return oci.Grant{Env: []string{"POLICY=" + r.Policy}}, nil
}

func (c *told) Created(_ context.Context, id string, pid int) error {
	c.calls = append(c.calls, "created "+id)
	return nil
}

func (c *told) Stopped(_ context.Context, id string) error {
	c.calls = append(c.calls, "stopped "+id)
	return nil
}

func (c *told) Removed(_ context.Context, id string) error {
	c.calls = append(c.calls, "removed "+id)
	return nil
}

// serveTest serves a socket without lists: a request that waits for them fails.
func serveTest(t *testing.T, containers oci.Containers) *Client {
	t.Helper()
	path := filepath.Join(t.TempDir(), SocketName)
	s, err := Listen(path, Config{
		Containers: containers, Log: zap.NewNop(),
		Do: func(context.Context, func(context.Context) error) error { return context.DeadlineExceeded },
	})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	return NewClient(path)
}

func TestContainers(t *testing.T) {
	c := &told{}
	client := serveTest(t, c)
	g, err := client.PrepareContainer(t.Context(), oci.Request{ID: "c1", VTPM: true, Policy: "p"})
	if err != nil || !slices.Equal(g.Env, []string{"POLICY=p"}) {
		t.Errorf("granted %+v, %v", g, err)
	}
	for _, err := range []error{
		client.ContainerCreated(t.Context(), "c1", 7), client.ContainerStopped(t.Context(), "c1"), client.ContainerRemoved(t.Context(), "c1"),
	} {
		if err != nil {
			t.Error(err)
		}
	}
	if want := []string{"prepare c1", "created c1", "stopped c1", "removed c1"}; !slices.Equal(c.calls, want) {
		t.Errorf("told %q, want %q", c.calls, want)
	}
	if _, err := client.Status(t.Context()); err == nil || !strings.Contains(err.Error(), "behind") {
		t.Errorf("a request about lists: %v, want one that waits for them", err)
	}
}

func TestContainersRefuse(t *testing.T) {
	c := &told{}
	client := serveTest(t, c)
	for name, r := range map[string]struct {
		method, path, body string
		status             int
	}{
		"garbage":     {http.MethodPost, "/v1/containers", "{", http.StatusBadRequest},
		"nothing":     {http.MethodPost, "/v1/containers", "", http.StatusBadRequest},
		"wrong type":  {http.MethodPost, "/v1/containers", `{"id":1}`, http.StatusBadRequest},
		"no id":       {http.MethodPost, "/v1/containers", `{}`, http.StatusBadRequest},
		"id":          {http.MethodPost, "/v1/containers", `{"id":"../c1"}`, http.StatusBadRequest},
		"policy":      {http.MethodPost, "/v1/containers", `{"id":"c1","policy":"/etc/shadow"}`, http.StatusBadRequest},
		"state path":  {http.MethodPost, "/v1/containers", `{"id":"c1","vtpms":[{"statePath":"x"}]}`, http.StatusBadRequest},
		"large":       {http.MethodPost, "/v1/containers", `{"id":"` + strings.Repeat("c", containerMax) + `"}`, http.StatusRequestEntityTooLarge},
		"id in path":  {http.MethodPost, "/v1/containers/a%2Fb/stopped", "", http.StatusBadRequest},
		"no pid":      {http.MethodPost, "/v1/containers/c1/created", `{}`, http.StatusBadRequest},
		"bad pid":     {http.MethodPost, "/v1/containers/c1/created", `{"pid":-1}`, http.StatusBadRequest},
		"other verb":  {http.MethodGet, "/v1/containers", "", http.StatusMethodNotAllowed},
		"no such end": {http.MethodPost, "/v1/containers/c1/burnt", "", http.StatusNotFound},
	} {
		t.Run(name, func(t *testing.T) {
			ask, err := http.NewRequestWithContext(t.Context(), r.method, "http://agent"+r.path, strings.NewReader(r.body))
			if err != nil {
				t.Fatal(err)
			}
			rsp, err := client.http.Do(ask)
			if err != nil {
				t.Fatal(err)
			}
			defer rsp.Body.Close()
			answer, err := io.ReadAll(rsp.Body)
			if err != nil || rsp.StatusCode != r.status {
				t.Errorf("status %d, %s, %v, want %d", rsp.StatusCode, answer, err, r.status)
			}
		})
	}
	if len(c.calls) != 0 {
		t.Errorf("told %q", c.calls)
	}
	nobody := serveTest(t, nil)
	for name, err := range map[string]error{
		"created": nobody.ContainerCreated(t.Context(), "c1", 7), "removed": nobody.ContainerRemoved(t.Context(), "c1"),
	} {
		if err == nil || !strings.Contains(err.Error(), "--ns-tpm swtpm") {
			t.Errorf("%s, and nobody grants anything: %v", name, err)
		}
	}
}
