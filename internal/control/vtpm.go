package control

import (
	"context"
	"errors"
	"net/http"
	"net/url"

	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/oci"
)

// Running gives running namespaces, by a name as namespace.Tree.Find takes it, vTPMs and takes them away.
type Running interface {
	Attach(ctx context.Context, namespace string) (oci.Grant, error)
	Release(ctx context.Context, namespace string) error
}

// AttachVTPM gives a running namespace's list a vTPM. The grant's environment says how its programs reach it.
func (c *Client) AttachVTPM(ctx context.Context, name string) (oci.Grant, error) {
	var g oci.Grant
	return g, c.decode(ctx, http.MethodPost, vtpmPath(name), nil, &g)
}

// ReleaseVTPM takes the vTPM away that a namespace's list was given, and ends it.
func (c *Client) ReleaseVTPM(ctx context.Context, name string) error {
	return c.decode(ctx, http.MethodDelete, vtpmPath(name), nil, &struct{}{})
}

func vtpmPath(name string) string { return "/v1/namespaces/" + url.PathEscape(name) + "/vtpm" }

func (s *Server) attachVTPM(w http.ResponseWriter, r *http.Request) {
	grant, err := s.running.Attach(r.Context(), r.PathValue("name"))
	if err != nil {
		s.failVTPM(w, err)
		return
	}
	s.reply(w, grant)
}

func (s *Server) releaseVTPM(w http.ResponseWriter, r *http.Request) {
	if err := s.running.Release(r.Context(), r.PathValue("name")); err != nil {
		s.failVTPM(w, err)
		return
	}
	s.reply(w, struct{}{})
}

func (s *Server) failVTPM(w http.ResponseWriter, err error) {
	code := http.StatusConflict
	var missing *namespace.NotFoundError
	if errors.As(err, &missing) && len(missing.Matches) == 0 || errors.Is(err, namespace.ErrNotAttached) {
		code = http.StatusNotFound
	}
	s.fail(w, code, err)
}
