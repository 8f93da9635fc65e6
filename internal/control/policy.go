package control

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"net/url"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/namespace"
)

// policyMax bounds the text of rules that one request loads.
const policyMax = 16 << 20

// Policy asks for a namespace's rules; the caller closes the text.
func (c *Client) Policy(ctx context.Context, name string) (io.ReadCloser, error) {
	return c.get(ctx, policyPath(name))
}

// LoadPolicy asks for rules to be appended to a namespace's, all of them or none. Their ids are the caller's.
func (c *Client) LoadPolicy(ctx context.Context, name string, rules []byte) (Namespace, error) {
	var n Namespace
	return n, c.decode(ctx, http.MethodPost, policyPath(name), bytes.NewReader(rules), &n)
}

func policyPath(name string) string { return "/v1/namespaces/" + url.PathEscape(name) + "/policy" }

func (s *Server) policy(w http.ResponseWriter, r *http.Request) {
	if v, ok := s.find(w, r); ok {
		w.Header().Set("Content-Type", "text/plain; charset=utf-8")
		io.WriteString(w, v.Policy.StringIn(idsOf(r, v.Info)))
	}
}

func (s *Server) loadPolicy(w http.ResponseWriter, r *http.Request) {
	v, ok := s.find(w, r)
	if !ok {
		return
	}
	text, err := io.ReadAll(http.MaxBytesReader(w, r.Body, policyMax))
	if err != nil {
		s.fail(w, http.StatusRequestEntityTooLarge, fmt.Errorf("read the rules: %w; at most %d bytes", err, policyMax))
		return
	}
	rules, err := s.parse(text)
	if err != nil {
		s.fail(w, http.StatusBadRequest, err)
		return
	}
	ns, maps := v.Info.NS, idsOf(r, v.Info)
	err = s.do(r.Context(), func(ctx context.Context) error {
		if err := s.tree.CheckPolicy(ns, rules, maps); err != nil {
			return err
		}
		return s.tree.AppendPolicy(ctx, ns, rules, maps)
	})
	if err != nil && !errors.Is(err, namespace.ErrInactive) {
		err = fmt.Errorf("nothing was loaded: %w", err)
	}
	s.changed(w, r, v.Info, err)
}

// idsOf returns how whoever asks about a namespace numbers ids.
func idsOf(r *http.Request, i namespace.Info) ima.IDMaps {
	if isHost(r) {
		return ima.InitialMaps()
	}
	return i.IDs
}
