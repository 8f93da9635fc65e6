package control

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/url"
	"os"
)

// ErrNoAgent means that no agent answers at the socket.
var ErrNoAgent = errors.New("no agent is running here; start one: imans-agent --policy exec")

// Client asks an agent.
type Client struct {
	path string
	http *http.Client
}

// NewClient returns a client of the agent at a socket. It connects with the first request.
func NewClient(path string) *Client {
	dial := func(ctx context.Context, _, _ string) (net.Conn, error) {
		return (&net.Dialer{}).DialContext(ctx, "unix", path)
	}
	return &Client{path, &http.Client{Transport: &http.Transport{DialContext: dial}}}
}

// Close closes the connections that no request uses. A client that is used again connects again.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// get asks for a path; the caller closes the body.
func (c *Client) get(ctx context.Context, path string) (io.ReadCloser, error) {
	return c.request(ctx, http.MethodGet, path, nil)
}

// request sends a request; the caller closes the answer's body.
func (c *Client) request(ctx context.Context, method, path string, content io.Reader) (io.ReadCloser, error) {
	r, err := http.NewRequestWithContext(ctx, method, "http://agent"+path, content)
	if err != nil {
		return nil, err
	}
	rsp, err := c.http.Do(r)
	var dial *net.OpError
	switch {
	case errors.Is(err, os.ErrPermission):
		return nil, fmt.Errorf("ask the agent at %s: %w; run as root", c.path, err)
	case errors.As(err, &dial) && dial.Op == "dial":
		return nil, fmt.Errorf("ask the agent at %s: %w", c.path, ErrNoAgent)
	case err != nil:
		return nil, fmt.Errorf("ask the agent at %s: %w", c.path, err)
	case rsp.StatusCode == http.StatusOK:
		return rsp.Body, nil
	}
	defer rsp.Body.Close()
	return nil, refusal(rsp.Status, rsp.Body)
}

// refusal is the error that an answer tells; one that tells none, its status.
func refusal(status string, body io.Reader) error {
	var e Error
	if err := readAnswer(body, &e); err != nil || e.Error == "" {
		e.Error = status
	}
	return errors.New(e.Error)
}

func (c *Client) decode(ctx context.Context, method, path string, content io.Reader, v any) error {
	body, err := c.request(ctx, method, path, content)
	if err != nil {
		return err
	}
	defer body.Close()
	return readAnswer(body, v)
}

// readAnswer reads an answer that is one JSON value and nothing else.
func readAnswer(body io.Reader, v any) error {
	d := json.NewDecoder(body)
	err := d.Decode(v)
	if err == nil {
		if _, err = d.Token(); err == io.EOF {
			return nil
		} else if err == nil {
			err = errors.New("there is more behind it")
		}
	}
	return fmt.Errorf("read the agent's answer: %w", err)
}

// Status asks what the agent has counted.
func (c *Client) Status(ctx context.Context) (Status, error) {
	var s Status
	return s, c.decode(ctx, http.MethodGet, "/v1/status", nil, &s)
}

// Namespaces asks for all namespaces.
func (c *Client) Namespaces(ctx context.Context) ([]Namespace, error) {
	var list []Namespace
	return list, c.decode(ctx, http.MethodGet, "/v1/namespaces", nil, &list)
}

// Namespace asks for one namespace.
func (c *Client) Namespace(ctx context.Context, name string) (Namespace, error) {
	var n Namespace
	return n, c.decode(ctx, http.MethodGet, "/v1/namespaces/"+url.PathEscape(name), nil, &n)
}

// Activate asks for a namespace to be made an IMA namespace of its own. If it is one already, nothing is done.
func (c *Client) Activate(ctx context.Context, name string) (Namespace, error) {
	var n Namespace
	return n, c.decode(ctx, http.MethodPost, "/v1/namespaces/"+url.PathEscape(name)+"/activate", nil, &n)
}

// PCRs asks for a namespace's PCR, as the agent reads it from the namespace's TPM.
func (c *Client) PCRs(ctx context.Context, name string) (PCRs, error) {
	var p PCRs
	return p, c.decode(ctx, http.MethodGet, "/v1/namespaces/"+url.PathEscape(name)+"/pcrs", nil, &p)
}

// Measurements asks for a namespace's list; the caller closes it. format is ascii, binary or json.
func (c *Client) Measurements(ctx context.Context, name, format, bank string, follow bool) (io.ReadCloser, error) {
	q := url.Values{"format": {format}, "bank": {bank}}
	if follow {
		q.Set("follow", "true")
	}
	return c.get(ctx, "/v1/namespaces/"+url.PathEscape(name)+"/measurements?"+q.Encode())
}
