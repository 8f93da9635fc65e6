package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"net/http"
	"net/url"

	"imans.dev/imans-agent/internal/container"
)

// Window says where a namespace's window is now.
type Window struct {
	Namespace string `json:"namespace"` // inum:id
	PID       int    `json:"pid"`       // of the process whose root it is below
	Path      string `json:"path"`      // as that process sees it
}

// AttachWindow asks for a window over /sys/kernel/security in a namespace. If it is there, nothing is done.
func (c *Client) AttachWindow(ctx context.Context, name string) (Window, error) {
	return c.window(ctx, http.MethodPost, name)
}

// DetachWindow asks for the window over /sys/kernel/security to be taken away. If there is none, nothing is done.
func (c *Client) DetachWindow(ctx context.Context, name string) (Window, error) {
	return c.window(ctx, http.MethodDelete, name)
}

func (c *Client) window(ctx context.Context, method, name string) (Window, error) {
	body, err := c.request(ctx, method, "/v1/namespaces/"+url.PathEscape(name)+"/window")
	if err != nil {
		return Window{}, err
	}
	defer body.Close()
	var w Window
	if err := json.NewDecoder(body).Decode(&w); err != nil {
		return Window{}, fmt.Errorf("read the agent's answer: %w", err)
	}
	return w, nil
}

func (s *Server) attachWindow(w http.ResponseWriter, r *http.Request) {
	s.changeWindow(w, r, func(t container.Target) error { return container.Attach(r.Context(), s.windowDir, t) })
}

func (s *Server) detachWindow(w http.ResponseWriter, r *http.Request) {
	s.changeWindow(w, r, func(t container.Target) error { return container.Detach(r.Context(), t) })
}

// changeWindow finds a way into the namespace and answers with what change came to.
func (s *Server) changeWindow(w http.ResponseWriter, r *http.Request, change func(container.Target) error) {
	v, ok := s.find(w, r)
	if !ok {
		return
	}
	if v.Info.Depth == 0 {
		s.fail(w, http.StatusConflict, fmt.Errorf("namespace %v is the native one: %w", v.Info.NS, container.ErrOwn))
		return
	}
	t, err := container.Process(v.Info.NS.Inum)
	if err == nil {
		s.windows.Lock() // two at once would each mount one
		err = change(t)
		s.windows.Unlock()
	}
	switch {
	case err == nil:
		s.reply(w, Window{Namespace: v.Info.NS.String(), PID: t.PID, Path: container.SecurityFS})
	case errors.Is(err, container.ErrNoAgent):
		s.fail(w, http.StatusServiceUnavailable, err)
	case errors.Is(err, fs.ErrNotExist):
		s.fail(w, http.StatusNotFound, err)
	default:
		s.fail(w, http.StatusConflict, err)
	}
}

// Activate asks for a namespace to be made an IMA namespace of its own. If it is one already, nothing is done.
func (c *Client) Activate(ctx context.Context, name string) (Namespace, error) {
	body, err := c.request(ctx, http.MethodPost, "/v1/namespaces/"+url.PathEscape(name)+"/activate")
	if err != nil {
		return Namespace{}, err
	}
	defer body.Close()
	var n Namespace
	if err := json.NewDecoder(body).Decode(&n); err != nil {
		return Namespace{}, fmt.Errorf("read the agent's answer: %w", err)
	}
	return n, nil
}

func (s *Server) activate(w http.ResponseWriter, r *http.Request) {
	v, ok := s.find(w, r)
	if !ok {
		return
	}
	ns := v.Info.NS
	if err := s.do(r.Context(), func(ctx context.Context) error { return s.tree.Activate(ctx, ns) }); err != nil {
		s.fail(w, http.StatusConflict, err)
		return
	}
	if v, ok = s.find(w, r); ok {
		s.reply(w, jsonNamespace(v.Info))
	}
}
