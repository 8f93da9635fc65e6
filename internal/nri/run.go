package nri

import (
	"context"
	"errors"
	"fmt"
	"net"
	"time"

	"github.com/containerd/nri/pkg/api"
	"github.com/containerd/nri/pkg/stub"
	"go.uber.org/zap"
)

// DefaultSocket is where runtimes have their socket unless told otherwise.
const DefaultSocket = api.DefaultSocketPath

const (
	pluginName  = "imans"
	pluginIndex = "90" // behind those that decide what a container is
	// retryDelay is between two tries to connect.
	retryDelay = time.Second
	// stopTimeout bounds the wait for the connection to end.
	stopTimeout = 2 * time.Second
)

// Run is the plugin until ctx ends. It waits for a runtime that is not there, and connects again to one that was started anew.
// The first failure of each kind is logged.
func Run(ctx context.Context, c Config) error {
	if c.Containers == nil || c.There == nil {
		return errors.New("run the NRI plugin: nobody grants containers anything")
	}
	if c.Socket == "" {
		c.Socket = DefaultSocket
	}
	said := ""
	for {
		connected, err := serve(ctx, c)
		if ctx.Err() != nil {
			return nil
		}
		if connected {
			said = ""
		}
		if text := fmt.Sprint(err); text != said {
			c.Log.Warn("no container runtime is connected; containers of Kubernetes get no vTPM meanwhile", zap.String("socket", c.Socket), zap.Error(err))
			said = text
		}
		select {
		case <-time.After(retryDelay):
		case <-ctx.Done():
			return nil
		}
	}
}

// serve is one connection. It reports whether the runtime took the plugin.
func serve(ctx context.Context, c Config) (connected bool, err error) {
	conn, err := (&net.Dialer{}).DialContext(ctx, "unix", c.Socket)
	if err != nil {
		return false, fmt.Errorf("%w; enable NRI in the runtime's configuration", err)
	}
	defer conn.Close()
	taken := make(chan struct{}, 1)
	served := &connection{plugin: plugin{c}, taken: taken}
	s, err := stub.New(served, stub.WithConnection(conn), stub.WithPluginName(pluginName), stub.WithPluginIdx(pluginIndex),
		stub.WithLogger(logger{c.Log.Sugar()}), stub.WithOnClose(func() {}))
	if err != nil {
		return false, fmt.Errorf("make the NRI plugin: %w", err)
	}
	served.allowed = s.RequestTimeout
	ended := make(chan error, 1)
	go func() { ended <- s.Run(ctx) }()
	register := time.After(stub.DefaultRegistrationTimeout + retryDelay)
	for {
		select {
		case <-taken:
			connected, register = true, nil
			continue
		case err := <-ended:
			return connected, err
		case <-register: // one that takes the connection and says nothing
			return false, errors.New("the runtime does not take the plugin; look into its log")
		case <-ctx.Done():
		}
		select {
		case <-ended:
		case <-time.After(stopTimeout):
		}
		return connected, nil
	}
}

// connection is the plugin of one connection.
type connection struct {
	plugin
	taken   chan struct{}
	allowed func() time.Duration // what the runtime gives a plugin for an answer, once it has said so
}

// Configure is called once the runtime has taken the plugin. No mask of events: all that the plugin has methods for.
func (c *connection) Configure(_ context.Context, _, runtime, version string) (api.EventMask, error) {
	if c.c.Timeout <= 0 {
		c.c.Timeout = timeout(c.allowed())
	}
	c.c.Log.Info("connected to a container runtime", zap.String("runtime", runtime), zap.String("version", version), zap.Duration("timeout", c.c.Timeout))
	c.taken <- struct{}{}
	return 0, nil
}

// timeout leaves the runtime a quarter of what it allows, for the way there and back.
func timeout(allowed time.Duration) time.Duration {
	if allowed <= 0 { // an older runtime
		return DefaultTimeout
	}
	return allowed * 3 / 4
}

// logger hands on what the interface's library has to say. It knows no failure that Run does not report.
type logger struct{ log *zap.SugaredLogger }

func (l logger) Debugf(_ context.Context, format string, args ...any) { l.log.Debugf(format, args...) }
func (l logger) Infof(_ context.Context, format string, args ...any)  { l.log.Debugf(format, args...) }
func (l logger) Warnf(_ context.Context, format string, args ...any)  { l.log.Debugf(format, args...) }
func (l logger) Errorf(_ context.Context, format string, args ...any) { l.log.Warnf(format, args...) }
