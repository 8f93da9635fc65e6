package control

import (
	"context"
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
	var w Window
	return w, c.decode(ctx, method, "/v1/namespaces/"+url.PathEscape(name)+"/window", nil, &w)
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
