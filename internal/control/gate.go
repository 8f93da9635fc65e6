package control

import (
	"context"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"slices"
	"strings"

	"imans.dev/imans-agent/internal/namespace"
)

// gateWord is what is said of a gate: nothing if there is none.
func gateWord(m namespace.GateMode) string {
	if m == namespace.GateOff {
		return ""
	}
	return string(m)
}

// SetGate asks for a namespace's opens to be held up until they are measured; mode is one of namespace.GateModes.
func (c *Client) SetGate(ctx context.Context, name, mode string) (Namespace, error) {
	var n Namespace
	return n, c.decode(ctx, http.MethodPost, "/v1/namespaces/"+url.PathEscape(name)+"/gate", strings.NewReader(mode), &n)
}

func (s *Server) setGate(w http.ResponseWriter, r *http.Request) {
	v, ok := s.find(w, r)
	if !ok {
		return
	}
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, 64))
	mode := namespace.GateMode(strings.TrimSpace(string(text)))
	if err != nil || !slices.Contains(namespace.GateModes(), mode) {
		s.fail(w, http.StatusBadRequest, fmt.Errorf("gate %q: want one of %v", mode, namespace.GateModes()))
		return
	}
	ns := v.Info.NS
	s.changed(w, r, v.Info, s.do(r.Context(), func(ctx context.Context) error { return s.tree.SetGate(ctx, ns, mode) }))
}
