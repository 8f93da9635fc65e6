// Package control is the agent's Unix socket: HTTP with JSON, for the command line and other programs of the host's root.
//
// Every request about namespaces is answered as of a moment after it came: what the kernel side had recorded by then is in the
// answer. Those about containers come from runtimes that are creating one, and wait for no list. Root of
// the host may ask for everything. Where the socket is mounted into a container, root there may ask for the container's own
// namespace, and learns of no other. Who it is comes from the socket (SO_PEERCRED), never from the request.
//
//	GET /v1/openapi.yaml                     describes all this
//	GET /v1/status                           what the agent has counted
//	GET /v1/namespaces                       all namespaces, parents first
//	GET /v1/namespaces/NAME                  one: its inode number, INUM:ID, or "native"
//	GET /v1/namespaces/NAME/policy           its rules, as text
//	POST /v1/namespaces/NAME/policy          appends rules to it, all of them or none
//	GET /v1/namespaces/NAME/pcrs             its PCR in each bank of its TPM, as the agent reads it now
//	GET /v1/namespaces/NAME/measurements     its list; ?format=binary|ascii|json, ?bank=sha256, ?follow=true
//	POST /v1/namespaces/NAME/activate        makes it an IMA namespace of its own
//	POST /v1/namespaces/NAME/gate            says what waits there until it is measured: off, exec or all
//	POST /v1/namespaces/NAME/window          mounts its window over /sys/kernel/security in it
//	DELETE /v1/namespaces/NAME/window        takes that away again
//	POST /v1/namespaces/NAME/vtpm            gives its list a vTPM, which its programs reach by socket
//	DELETE /v1/namespaces/NAME/vtpm          takes the vTPM away that its list was given
//	POST /v1/containers                      asks what a container that is about to be created is granted
//	POST /v1/containers/ID/created           says which process is in its namespaces
//	POST /v1/containers/ID/stopped           says that its processes have ended
//	DELETE /v1/containers/ID                 says that the runtime deletes it
package control

import (
	"context"
	_ "embed"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"time"

	"go.uber.org/zap"
	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/oci"
	"imans.dev/imans-agent/internal/policy"
)

// SocketName is the socket's file name in the run folder.
const SocketName = "agent.sock"

// barrierTimeout bounds how long a request waits for the pipeline to drain: no stale answer is given instead.
const barrierTimeout = 10 * time.Second

// Server answers requests.
type Server struct {
	tree       *namespace.Tree
	do         func(context.Context, func(context.Context) error) error
	parse      func([]byte) (*policy.Policy, error)
	windowDir  string // where the window is mounted in the agent's namespace
	containers oci.Containers
	running    Running
	log        *zap.Logger
	path       string
	listener   *net.UnixListener
	http       *http.Server

	windows sync.Mutex // one change of windows at a time
}

// Config is what a Server works with.
type Config struct {
	Tree *namespace.Tree
	// Do changes the tree when all that is recorded is in the lists.
	Do func(context.Context, func(context.Context) error) error
	// ParseRules parses rules that a namespace is given, and refuses what the agent does not do.
	ParseRules func([]byte) (*policy.Policy, error)
	WindowDir  string // where the agent has the window mounted
	// Containers grants containers what they need before they are created, Running while they run; nil: nothing, and who asks is told.
	Containers oci.Containers
	Running    Running
	Log        *zap.Logger
}

// lookEvery is how often Run looks whether the socket is still there.
const lookEvery = time.Second

// listen makes the socket, mode 0600 in a folder of mode 0700.
func listen(path string) (*net.UnixListener, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return nil, fmt.Errorf("listen: %w; choose another folder with --run-dir", err)
	}
	// The state folder's lock says that no other agent runs, so what stands here is left over.
	if err := os.Remove(path); err != nil && !errors.Is(err, os.ErrNotExist) {
		return nil, fmt.Errorf("listen: %w", err)
	}
	listener, err := net.ListenUnix("unix", &net.UnixAddr{Name: path, Net: "unix"})
	if err != nil {
		return nil, fmt.Errorf("listen: %w", err)
	}
	if err := os.Chmod(path, 0o600); err != nil {
		return nil, errors.Join(fmt.Errorf("listen: %w", err), listener.Close())
	}
	return listener, nil
}

// Listen makes the socket.
func Listen(path string, c Config) (*Server, error) {
	listener, err := listen(path)
	if err != nil {
		return nil, err
	}
	s := &Server{
		tree: c.Tree, do: c.Do, parse: c.ParseRules, windowDir: c.WindowDir, containers: c.Containers, running: c.Running, log: c.Log, path: path, listener: listener,
	}
	mux := http.NewServeMux()
	for pattern, handler := range s.routes() {
		mux.HandleFunc(pattern, handler)
	}
	s.http = &http.Server{
		Handler: s.asOfNow(mux), ConnContext: peerContext, ReadHeaderTimeout: 5 * time.Second,
		ErrorLog: zap.NewStdLog(c.Log.Named("control")),
	}
	return s, nil
}

// routes are what openapi.yaml describes.
func (s *Server) routes() map[string]http.HandlerFunc {
	return map[string]http.HandlerFunc{
		"GET /v1/openapi.yaml":                   s.openAPI,
		"GET /v1/status":                         s.onlyHost(s.status),
		"GET /v1/namespaces":                     s.namespaces,
		"GET /v1/namespaces/{name}":              s.namespace,
		"GET /v1/namespaces/{name}/policy":       s.policy,
		"POST /v1/namespaces/{name}/policy":      s.loadPolicy,
		"POST /v1/namespaces/{name}/activate":    s.activate,
		"POST /v1/namespaces/{name}/gate":        s.onlyHost(s.setGate),
		"GET /v1/namespaces/{name}/pcrs":         s.pcrs,
		"GET /v1/namespaces/{name}/measurements": s.measurements,
		"POST /v1/namespaces/{name}/window":      s.onlyHost(s.attachWindow),
		"DELETE /v1/namespaces/{name}/window":    s.onlyHost(s.detachWindow),
		"POST /v1/namespaces/{name}/vtpm":        s.ifGranting(s.running != nil, s.attachVTPM),
		"DELETE /v1/namespaces/{name}/vtpm":      s.ifGranting(s.running != nil, s.releaseVTPM),
		"POST /v1/containers":                    s.ifGranting(s.containers != nil, s.prepareContainer),
		"POST /v1/containers/{id}/created":       s.ifGranting(s.containers != nil, s.containerCreated),
		"POST /v1/containers/{id}/stopped":       s.ifGranting(s.containers != nil, s.containerStopped),
		"DELETE /v1/containers/{id}":             s.ifGranting(s.containers != nil, s.containerRemoved),
	}
}

// OpenAPI describes the socket: openapi.yaml.
//
//go:embed openapi.yaml
var OpenAPI []byte

func (s *Server) openAPI(w http.ResponseWriter, _ *http.Request) {
	w.Header().Set("Content-Type", "application/yaml")
	w.Write(OpenAPI)
}

// Path returns the socket's path.
func (s *Server) Path() string { return s.path }

// Run serves until ctx ends. If somebody takes the socket away, as one that cleans /run does, it makes another.
func (s *Server) Run(ctx context.Context) error {
	s.http.BaseContext = func(net.Listener) context.Context { return ctx }
	failed := make(chan error, 1)
	go func() { failed <- s.http.Serve(s.listener) }()
	ticker := time.NewTicker(lookEvery)
	defer ticker.Stop()
	for ctx.Err() == nil {
		select {
		case err := <-failed:
			return fmt.Errorf("serve %s: %w", s.path, err)
		case <-ctx.Done():
		case <-ticker.C:
			if _, err := os.Lstat(s.path); errors.Is(err, os.ErrNotExist) {
				s.renew(failed)
			}
		}
	}
	stop, cancel := context.WithTimeout(context.WithoutCancel(ctx), 2*time.Second)
	defer cancel()
	s.http.Shutdown(stop)
	s.http.Close()
	<-failed
	return nil
}

// renew makes the socket anew and serves it. Who is connected stays so.
func (s *Server) renew(failed chan error) {
	listener, err := listen(s.path)
	if err != nil {
		s.log.Warn("the control socket is gone, and can't be made again", zap.Error(err))
		return
	}
	s.log.Warn("the control socket was gone; made again", zap.String("socket", s.path))
	s.listener.SetUnlinkOnClose(false) // it would be the new one
	s.listener.Close()
	<-failed
	s.listener = listener
	go func() { failed <- s.http.Serve(listener) }()
}

// asOfNow refuses who may not ask, then waits until what is recorded is in the lists.
func (s *Server) asOfNow(next http.Handler) http.Handler {
	return http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !s.mayAsk(w, r) {
			return
		}
		if readsNothing(r) {
			next.ServeHTTP(w, r)
			return
		}
		ctx, cancel := context.WithTimeout(r.Context(), barrierTimeout)
		defer cancel()
		if err := s.do(ctx, func(context.Context) error { return nil }); err != nil {
			s.fail(w, http.StatusServiceUnavailable, fmt.Errorf("the lists are behind: %w; try again", err))
			return
		}
		next.ServeHTTP(w, r)
	})
}

// Error is the body of every answer that is not a success.
type Error struct {
	Error string `json:"error"`
}

func (s *Server) fail(w http.ResponseWriter, code int, err error) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(code)
	json.NewEncoder(w).Encode(Error{err.Error()})
}

func (s *Server) reply(w http.ResponseWriter, v any) {
	w.Header().Set("Content-Type", "application/json")
	if err := json.NewEncoder(w).Encode(v); err != nil {
		s.log.Debug("reply", zap.Error(err))
	}
}
