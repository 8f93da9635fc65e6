package tpmshare

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2"
	"go.uber.org/zap"
)

// Bounds of one Server.
const (
	maxConnections = 64 // for commands
	maxControl     = 16 // to the control channel
	maxClients     = 64 // processes that have something in the TPM, or a connection

	maxOwnConnections = 16 // of one process
)

// times are what a client has. Its turn is not among them: that comes when it comes.
type times struct {
	idle    time.Duration // from an answer to the next command
	command time.Duration // from connecting to the first command, and from a command's first byte to its last
	answer  time.Duration // to take an answer
}

// clientTimes are long enough for a program that is stopped and continued by hand, between commands.
var clientTimes = times{idle: 5 * time.Minute, command: 10 * time.Second, answer: 10 * time.Second}

// answerBuffer is how many bytes of answers the kernel keeps for a client: some, as it has asked for one at a time.
const answerBuffer = 16 << 10

// acceptPause is how long to wait when no connection can be accepted because the agent is out of descriptors.
const acceptPause = 50 * time.Millisecond

// Config says whom to share a TPM with, and what to refuse.
type Config struct {
	TPM       *TPM
	Netns     *os.File         // the container's network namespace; Listen does not keep it
	Measured  []int            // the PCRs that lists extend: clients may neither extend nor reset them
	Protected []tpm2.TPMHandle // persistent objects and NV indices that clients may not alter
	Log       *zap.Logger
}

// Environment returns the variables, NAME=VALUE, by which programs find the TPM: those of the TCG software stack's tpm2-tools, and those
// of IBM's stack, which evmctl uses.
func Environment() []string {
	host, port, _ := net.SplitHostPort(commandAddress)
	return []string{
		"TPM2TOOLS_TCTI=swtpm:host=" + host + ",port=" + port,
		"TPM_INTERFACE_TYPE=socsim", "TPM_SERVER_TYPE=raw", "TPM_SERVER_NAME=" + host, "TPM_COMMAND_PORT=" + port,
	}
}

// Server is the TPM of one container, in its network namespace.
type Server struct {
	tpm     *TPM
	rules   rules
	log     *zap.Logger
	times   times
	sockets sockets

	watching sync.WaitGroup // a goroutine for each client that is a process
	looking  sync.Mutex     // held while a peer's process is looked for: one at a time, so that a flood costs one processor at most

	mu          sync.Mutex // guards what follows
	clients     map[int]*client
	connections map[net.Conn]bool // true: to the control channel
	told        map[tpm2.TPMCC]bool
}

// Listen begins to listen on 127.0.0.1, ports 2321 and 2322, in a network namespace, and sets its loopback device up if it is down.
// Clients that connect before Run wait. Errors: ErrHostNetwork; one that is EADDRINUSE if a port is taken.
//
// The Server keeps the namespace alive until Run has ended, or Close: who starts it ends it when the container ends.
func Listen(ctx context.Context, c Config) (*Server, error) {
	s, err := openSockets(ctx, c.Netns)
	if err != nil {
		return nil, fmt.Errorf("share a TPM with a container: %w", err)
	}
	return &Server{
		tpm: c.TPM, rules: rules{measured: c.Measured, protected: c.Protected}, log: c.Log, times: clientTimes, sockets: s,
		clients: make(map[int]*client), connections: make(map[net.Conn]bool), told: make(map[tpm2.TPMCC]bool),
	}, nil
}

// Close lets go of a Server that is not going to be run.
func (s *Server) Close() { s.sockets.close() }

// Run serves until the context ends, then ends all connections, flushes what the clients have in the TPM and returns nil. The TPM
// stays open. An error means that no more clients can connect.
func (s *Server) Run(ctx context.Context) error {
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	stop := context.AfterFunc(ctx, s.endConnections)
	defer stop()
	var running sync.WaitGroup
	errs := make(chan error, 2)
	for _, l := range []net.Listener{s.sockets.command, s.sockets.control} {
		running.Go(func() {
			errs <- s.accept(ctx, l, &running)
			cancel()
		})
	}
	running.Wait()
	s.sockets.close()
	s.endClients()
	return errors.Join(<-errs, <-errs)
}

// endConnections closes the listeners and the connections.
func (s *Server) endConnections() {
	s.sockets.command.Close()
	s.sockets.control.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	for conn := range s.connections {
		conn.Close()
	}
}

// accept serves each connection of one listener in a goroutine of its own.
func (s *Server) accept(ctx context.Context, l net.Listener, running *sync.WaitGroup) error {
	control := l == s.sockets.control
	for {
		conn, err := l.Accept()
		switch {
		case ctx.Err() != nil:
			if err == nil {
				conn.Close()
			}
			return nil
		case errors.Is(err, net.ErrClosed):
			return fmt.Errorf("share a TPM with a container: %w", err)
		case err != nil:
			s.log.Warn("a container's TPM can't accept a connection", zap.Error(err))
			select {
			case <-time.After(acceptPause):
			case <-ctx.Done():
			}
			continue
		}
		if !s.admit(ctx, conn, control) {
			refuseConnection(conn, control)
			continue
		}
		conn.(*net.TCPConn).SetWriteBuffer(answerBuffer) // else a client that never reads is noticed late
		running.Go(func() {
			defer s.release(conn)
			if control {
				serveControl(conn, s.times.command)
			} else {
				s.serve(ctx, conn)
			}
		})
	}
}

// admit counts a connection, unless there are too many of its kind, or the Server ends.
func (s *Server) admit(ctx context.Context, conn net.Conn, control bool) bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	n, most := 0, maxConnections
	if control {
		most = maxControl
	}
	for _, kind := range s.connections {
		if kind == control {
			n++
		}
	}
	if n >= most || ctx.Err() != nil {
		return false
	}
	s.connections[conn] = control
	return true
}

func (s *Server) release(conn net.Conn) {
	conn.Close()
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.connections, conn)
}

// refuseConnection tells a client that has not sent anything yet to try again, as a TPM does that has too much to do.
func refuseConnection(conn net.Conn, control bool) {
	defer conn.Close()
	if !control && conn.SetWriteDeadline(time.Now().Add(time.Second)) == nil {
		conn.Write(answer(tpm2.TPMRCRetry)) // into the empty buffer of a new connection: it does not wait
	}
}

// tell logs the first refusal of each command: a client could fill the log.
func (s *Server) tell(q *request, c *client, rc tpm2.TPMRC) {
	s.mu.Lock()
	told := s.told[q.code]
	s.told[q.code] = true
	s.mu.Unlock()
	if !told {
		s.log.Info("refused a command to a container's TPM; more of its kind are not logged", zap.String("command", "TPM2_"+q.name),
			zap.Int("pid", c.pid), zap.Uint32("response code", uint32(rc)), zap.String("reason", q.refused))
	}
}
