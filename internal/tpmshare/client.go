package tpmshare

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/google/go-tpm/tpm2"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/proc"
)

// client is who sends commands: a process, whatever connections it makes, or one connection whose process can't be told. What it
// has in the TPM ends with it.
type client struct {
	pid   int      // 0: a connection's
	pidfd *os.File // nil: a connection's
	space *space

	mu    sync.Mutex // held from waiting for a turn to its end: a client waits for one turn at a time
	ended bool       // guarded by mu: the process has ended, and the space with it

	connections int // guarded by Server.mu, as joined
	joined      int // how many connections there have been
}

// connection is one of a client's.
type connection struct {
	net.Conn
	server *Server
	client *client // nil until the first command
}

// serve passes on what a client sends on one connection.
func (s *Server) serve(ctx context.Context, conn net.Conn) {
	c := &connection{Conn: conn, server: s}
	defer c.leave()
	for limit := s.times.command; ; limit = s.times.idle { // a client connects to send something
		raw, rc := c.readCommand(limit)
		if raw == nil && rc == tpm2.TPMRCSuccess {
			return
		}
		response := answer(rc)
		if rc == tpm2.TPMRCSuccess {
			var err error
			if response, err = c.run(ctx, raw); err != nil {
				s.log.Debug("a client of a container's TPM is sent away", zap.Error(err))
				response, rc = answer(tpm2.TPMRCRetry), tpm2.TPMRCRetry
			}
		}
		if c.SetWriteDeadline(time.Now().Add(s.times.answer)) != nil {
			return
		}
		// Behind a command that was not read whole there is no telling where the next begins.
		if _, err := c.Write(response); err != nil || rc != tpm2.TPMRCSuccess {
			return
		}
	}
}

// run finds out who the client is, and passes its command on.
func (c *connection) run(ctx context.Context, raw []byte) ([]byte, error) {
	for {
		if c.client == nil {
			var err error
			if c.client, err = c.server.enter(c); err != nil {
				return nil, err
			}
		}
		response, err := c.server.pass(ctx, c.client, raw)
		if !errors.Is(err, errEnded) {
			return response, err
		}
		c.leave() // another process has the socket too
	}
}

// leave counts the connection out.
func (c *connection) leave() {
	if c.client != nil {
		c.server.leave(c.client)
		c.client = nil
	}
}

// readCommand reads a command. It returns neither command nor response code if the client ended the connection or took too long:
// limit is for the first byte.
func (c *connection) readCommand(limit time.Duration) ([]byte, tpm2.TPMRC) {
	var header [headerSize]byte
	if c.SetReadDeadline(time.Now().Add(limit)) != nil {
		return nil, tpm2.TPMRCSuccess
	}
	if _, err := io.ReadFull(c, header[:1]); err != nil {
		return nil, tpm2.TPMRCSuccess
	}
	if c.SetReadDeadline(time.Now().Add(c.server.times.command)) != nil {
		return nil, tpm2.TPMRCSuccess
	}
	if _, err := io.ReadFull(c, header[1:]); err != nil {
		return nil, tpm2.TPMRCSuccess
	}
	tag := tpm2.TPMST(binary.BigEndian.Uint16(header[:]))
	if tag != tpm2.TPMSTNoSessions && tag != tpm2.TPMSTSessions {
		return nil, badTag
	}
	size := binary.BigEndian.Uint32(header[2:])
	if size < headerSize || size > maxCommand {
		return nil, tpm2.TPMRCCommandSize
	}
	raw := make([]byte, size)
	copy(raw, header[:])
	if _, err := io.ReadFull(c, raw[headerSize:]); err != nil {
		return nil, tpm2.TPMRCSuccess
	}
	return raw, tpm2.TPMRCSuccess
}

// errEnded means that a client's process has ended.
var errEnded = errors.New("the client has ended")

// pass runs a client's command, if it is one that is passed on. Errors: errEnded, and the context's.
func (s *Server) pass(ctx context.Context, c *client, raw []byte) ([]byte, error) {
	q, rc := parseRequest(raw)
	if rc != tpm2.TPMRCSuccess {
		return answer(rc), nil
	}
	if rc := s.rules.refuse(q); rc != tpm2.TPMRCSuccess {
		s.tell(q, c, rc)
		return answer(rc), nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.ended {
		return nil, errEnded
	}
	if err := s.tpm.turns.take(ctx, false); err != nil {
		return nil, err
	}
	defer s.tpm.turns.give()
	response, err := c.space.execute(q)
	if err != nil {
		return answer(tpm2.TPMRCFailure), nil
	}
	return response, nil
}

// Why a client is sent away.
var (
	errManyClients     = errors.New("as many clients as there may be")
	errManyConnections = errors.New("as many connections of one client as there may be")
)

// enter finds out who is at the other end of a connection, which waits for an answer.
func (s *Server) enter(conn net.Conn) (*client, error) {
	s.looking.Lock()
	defer s.looking.Unlock()
	from, to := conn.RemoteAddr().(*net.TCPAddr).AddrPort(), conn.LocalAddr().(*net.TCPAddr).AddrPort()
	inode, err := s.sockets.peers.inode(from, to)
	if err != nil {
		return nil, err
	}
	if inode == 0 {
		return &client{space: newSpace(s.tpm, false)}, nil
	}
	for _, c := range s.processes() {
		if opens(c.pid, inode) && !exited(c.pidfd) {
			return c, s.join(c)
		}
	}
	pid, err := s.sockets.peers.process(inode)
	if err != nil {
		return nil, err
	}
	if pid == 0 {
		return &client{space: newSpace(s.tpm, false)}, nil
	}
	return s.newClient(pid, inode)
}

// processes returns the clients that are processes.
func (s *Server) processes() []*client {
	s.mu.Lock()
	defer s.mu.Unlock()
	var all []*client
	for _, c := range s.clients {
		all = append(all, c)
	}
	return all
}

// join counts a connection in.
func (s *Server) join(c *client) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.clients[c.pid] != c {
		return os.ErrProcessDone
	}
	if c.connections >= maxOwnConnections {
		return errManyConnections
	}
	c.connections++
	c.joined++
	return nil
}

// newClient makes a process a client, until it ends.
func (s *Server) newClient(pid int, inode uint32) (*client, error) {
	fd, err := unix.PidfdOpen(pid, unix.PIDFD_NONBLOCK) // for Go's poller
	if err != nil {
		return nil, fmt.Errorf("open process %d: %w", pid, err)
	}
	c := &client{pid: pid, pidfd: os.NewFile(uintptr(fd), "pidfd"), space: newSpace(s.tpm, false), connections: 1}
	// The descriptor holds the process; only now can the number not be another's any more.
	if !opens(pid, inode) || exited(c.pidfd) {
		c.pidfd.Close()
		return nil, os.ErrProcessDone
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if len(s.clients) >= maxClients {
		c.pidfd.Close()
		return nil, errManyClients
	}
	if old := s.clients[pid]; old != nil { // it ended, and its watch is about to notice
		delete(s.clients, pid)
	}
	s.clients[pid] = c
	s.watching.Go(func() { s.watch(c) })
	return c, nil
}

// opens reports whether a process has a socket open.
func opens(pid int, inode uint32) bool {
	has, ok := proc.Ask(pid, func() bool { return hasSocket(pid, inode) })
	return ok && has
}

// exited reports whether the process of a pidfd has ended.
func exited(pidfd *os.File) bool {
	raw, err := pidfd.SyscallConn()
	if err != nil {
		return true
	}
	ended := true // a closed descriptor is that of one that has
	raw.Control(func(fd uintptr) { ended = readable(fd) })
	return ended
}

// readable reports whether a pidfd can be read, which is to say that its process has ended.
func readable(fd uintptr) bool {
	fds := []unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		if !errors.Is(err, syscall.EINTR) {
			return err == nil && n > 0
		}
	}
}

// watch ends a client when its process has, or when its descriptor is closed because the client was dropped.
func (s *Server) watch(c *client) {
	raw, err := c.pidfd.SyscallConn()
	if err != nil {
		return
	}
	if raw.Read(readable) != nil {
		return
	}
	s.drop(c)
	s.end(c)
}

// leave counts a connection that has ended. A client that has nothing left in the TPM is dropped; one without a process is ended.
func (s *Server) leave(c *client) {
	if c.pidfd == nil {
		s.end(c)
		return
	}
	s.mu.Lock()
	c.connections--
	idle, joined := c.connections == 0, c.joined
	s.mu.Unlock()
	if idle && s.isEmpty(c) {
		s.mu.Lock()
		defer s.mu.Unlock()
		if c.joined == joined && s.clients[c.pid] == c { // else whoever came meanwhile sees to it
			delete(s.clients, c.pid)
			c.pidfd.Close()
		}
	}
}

// isEmpty reports whether a client without connections has nothing in the TPM.
func (s *Server) isEmpty(c *client) bool {
	if s.tpm.turns.take(context.Background(), false) != nil {
		return false
	}
	defer s.tpm.turns.give()
	return c.space.empty()
}

// drop forgets a client.
func (s *Server) drop(c *client) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.clients[c.pid] == c {
		delete(s.clients, c.pid)
	}
}

// end flushes what a client has.
func (s *Server) end(c *client) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.ended = true
	if c.pidfd != nil {
		c.pidfd.Close()
	}
	if s.tpm.turns.take(context.Background(), false) != nil {
		return
	}
	defer s.tpm.turns.give()
	c.space.end()
}

// endClients flushes what all clients have, when no connection is left.
func (s *Server) endClients() {
	for _, c := range s.processes() {
		s.drop(c)
		s.end(c)
	}
	s.watching.Wait()
}
