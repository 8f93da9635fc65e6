package control

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net/http"
	"net/url"
	"strings"

	"imans.dev/imans-agent/internal/oci"
)

const (
	containersPath = "/v1/containers"
	// containerMax bounds what one request says of a container.
	containerMax = 1 << 20
)

// errNoContainers means that the agent grants containers nothing.
var errNoContainers = errors.New("this agent grants containers nothing; start it with --ns-tpm swtpm")

// Created is the process that is in a new container's namespaces.
type Created struct {
	PID int `json:"pid"`
}

// PrepareContainer asks what a container that is about to be created is granted. Asked again before ContainerCreated, it is the same.
func (c *Client) PrepareContainer(ctx context.Context, r oci.Request) (oci.Grant, error) {
	var g oci.Grant
	return g, c.sendJSON(ctx, http.MethodPost, containersPath, r, &g)
}

// ContainerCreated says which process is in a container's namespaces, and returns when its vTPM is attached to them.
func (c *Client) ContainerCreated(ctx context.Context, id string, pid int) error {
	return c.sendJSON(ctx, http.MethodPost, containerPath(id)+"/created", Created{pid}, &struct{}{})
}

// ContainerStopped says that a container's processes have ended.
func (c *Client) ContainerStopped(ctx context.Context, id string) error {
	return c.sendJSON(ctx, http.MethodPost, containerPath(id)+"/stopped", nil, &struct{}{})
}

// ContainerRemoved says that the runtime deletes a container. One that the agent does not know is no error.
func (c *Client) ContainerRemoved(ctx context.Context, id string) error {
	return c.sendJSON(ctx, http.MethodDelete, containerPath(id), nil, &struct{}{})
}

func containerPath(id string) string { return containersPath + "/" + url.PathEscape(id) }

func (c *Client) sendJSON(ctx context.Context, method, path string, content, answer any) error {
	body, err := json.Marshal(content)
	if err != nil {
		return fmt.Errorf("ask the agent at %s: %w", c.path, err)
	}
	return c.decode(ctx, method, path, bytes.NewReader(body), answer)
}

// readsNothing reports whether a request is answered without the lists: a container does not wait for them.
func readsNothing(r *http.Request) bool {
	return r.URL.Path == containersPath || strings.HasPrefix(r.URL.Path, containersPath+"/")
}

func (s *Server) prepareContainer(w http.ResponseWriter, r *http.Request) {
	var ask oci.Request
	if !s.readContainer(w, r, &ask) {
		return
	}
	if err := ask.Check(); err != nil {
		s.fail(w, http.StatusBadRequest, err)
		return
	}
	grant, err := s.containers.Prepare(r.Context(), ask)
	if err != nil {
		s.fail(w, http.StatusConflict, err)
		return
	}
	s.reply(w, grant)
}

func (s *Server) containerCreated(w http.ResponseWriter, r *http.Request) {
	var c Created
	if !s.readContainer(w, r, &c) {
		return
	}
	if c.PID < 1 {
		s.fail(w, http.StatusBadRequest, fmt.Errorf("pid %d: want that of a process of the container", c.PID))
		return
	}
	s.tellContainers(w, r, func(id string) error { return s.containers.Created(r.Context(), id, c.PID) })
}

func (s *Server) containerStopped(w http.ResponseWriter, r *http.Request) {
	s.tellContainers(w, r, func(id string) error { return s.containers.Stopped(r.Context(), id) })
}

func (s *Server) containerRemoved(w http.ResponseWriter, r *http.Request) {
	s.tellContainers(w, r, func(id string) error { return s.containers.Removed(r.Context(), id) })
}

// ifGranting answers 501 itself if nobody grants anything.
func (s *Server) ifGranting(granting bool, next http.HandlerFunc) http.HandlerFunc {
	return s.onlyHost(func(w http.ResponseWriter, r *http.Request) {
		if !granting {
			s.fail(w, http.StatusNotImplemented, errNoContainers)
			return
		}
		next(w, r)
	})
}

// readContainer reads a request's body, and answers 400 or 413 itself.
func (s *Server) readContainer(w http.ResponseWriter, r *http.Request, v any) bool {
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, containerMax)).Decode(v)
	var large *http.MaxBytesError
	switch {
	case errors.As(err, &large):
		s.fail(w, http.StatusRequestEntityTooLarge, fmt.Errorf("read the request: %w; at most %d bytes", err, containerMax))
	case err != nil:
		s.fail(w, http.StatusBadRequest, fmt.Errorf("read the request: %w; GET /v1/openapi.yaml describes it", err))
	}
	return err == nil
}

// tellContainers passes on what has become of a container.
func (s *Server) tellContainers(w http.ResponseWriter, r *http.Request, tell func(id string) error) {
	id := r.PathValue("id")
	if err := oci.CheckID(id); err != nil {
		s.fail(w, http.StatusBadRequest, err)
		return
	}
	if err := tell(id); err != nil {
		s.fail(w, http.StatusConflict, err)
		return
	}
	s.reply(w, struct{}{})
}
