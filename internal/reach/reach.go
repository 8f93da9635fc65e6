// Package reach opens vTPMs for the agent, and lets the programs of a container reach those that are no device.
//
// A proxy device is shared by the kernel: Open opens it as it is, and the container has the node. swtpm's socket serves one program
// at a time: the agent's connection is the only one, and Serve gives the programs of a network namespace their turns on it.
package reach

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"github.com/google/go-tpm/tpm2/transport"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/tpmext"
	"imans.dev/imans-agent/internal/tpmshare"
	"imans.dev/imans-agent/internal/vtpm"
)

// bootAggregatePCRs is how many registers the boot aggregate is of, from 0 on.
const bootAggregatePCRs = 10

// Ways are the vTPMs that are open and no device. Its methods may be called from several goroutines.
type Ways struct {
	log *zap.Logger
	mu  sync.Mutex
	all map[string]*share // by the instances' folders
}

// New returns Ways without any.
func New(log *zap.Logger) *Ways { return &Ways{log: log, all: make(map[string]*share)} }

// Environment returns the variables, NAME=VALUE, by which a container's programs find a TPM that Serve lets them reach.
func Environment() []string { return tpmshare.Environment() }

// share is a vTPM that the agent shares. It implements io.Closer.
type share struct {
	of   *Ways
	dir  string
	dial tpmext.Dialer
	tpm  *tpmshare.TPM

	mu     sync.Mutex         // guards what follows
	conn   io.Closer          // the connection that was made last
	cancel context.CancelFunc // of the server; nil: the container's programs can't reach it
	served chan struct{}      // closed when the server has ended
	closed bool
}

// Open opens an instance's TPM. The closer, if there is one, is to be closed after the TPM and before the instance is ended: it ends
// what Serve began.
func (w *Ways) Open(ctx context.Context, i *vtpm.Instance) (*tpmext.TPM, io.Closer, error) {
	if _, ok := i.Device(); ok {
		tpm, err := tpmext.Open(ctx, i.Address())
		return tpm, nil, err
	}
	dial, err := tpmext.NewDialer(i.Address())
	if err != nil {
		return nil, nil, err
	}
	one := &share{of: w, dir: i.Dir(), dial: dial}
	if one.tpm, err = tpmshare.Open(ctx, one.connect); err != nil {
		return nil, nil, err
	}
	tpm, err := tpmext.OpenDialer(ctx, i.Address(), one.tpm.Agent)
	if err != nil {
		return nil, nil, errors.Join(err, one.tpm.Close())
	}
	w.mu.Lock()
	w.all[one.dir] = one
	w.mu.Unlock()
	return tpm, one, nil
}

// connect makes the connection to the TPM.
func (s *share) connect(ctx context.Context) (transport.TPMCloser, error) {
	conn, err := s.dial(ctx)
	if err != nil {
		return nil, err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	s.conn = conn
	return conn, nil
}

// hangUp ends the connection to the TPM, and with it the command under way.
func (s *share) hangUp() {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.conn != nil {
		s.conn.Close()
	}
}

// find returns the share of the instance in a folder; nil: there is none.
func (w *Ways) find(dir string) *share {
	w.mu.Lock()
	defer w.mu.Unlock()
	return w.all[dir]
}

// Process is a process of a container, as a way to its network namespace.
type Process struct {
	PID  int
	Inum uint32 // of its mount namespace, so that another process of that number is not taken for it
}

// Serve lets the programs of the process's network namespace use the TPM of the instance in a folder, but for the register of its list
// and those of the boot aggregate. It does nothing for one that is a device or is served. Errors: tpmshare.ErrHostNetwork, and EADDRINUSE if
// a port is taken.
func (w *Ways) Serve(ctx context.Context, dir string, p Process, pcr int) error {
	one := w.find(dir)
	if one == nil || one.serving() {
		return nil
	}
	network, err := p.network()
	if err != nil {
		return err
	}
	defer network.Close()
	return one.serve(ctx, network, pcr)
}

// serving reports whether the container's programs can reach the TPM.
func (s *share) serving() bool {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.cancel != nil
}

// serve serves a network namespace until Close.
func (s *share) serve(ctx context.Context, network *os.File, pcr int) error {
	measured := []int{pcr}
	for n := range bootAggregatePCRs {
		measured = append(measured, n)
	}
	server, err := tpmshare.Listen(ctx, tpmshare.Config{
		TPM: s.tpm, Netns: network, Measured: measured, Protected: vtpm.IdentityHandles(), Log: s.of.log,
	})
	if err != nil {
		return err
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.closed || s.cancel != nil {
		server.Close()
		return nil
	}
	running, cancel := context.WithCancel(context.Background())
	served := make(chan struct{})
	s.cancel, s.served = cancel, served
	go func() { // ends by Close, or when nobody can connect any more: then the next look listens anew
		defer close(served)
		if err := server.Run(running); err != nil {
			s.of.log.Warn("a container can't reach its vTPM", zap.String("vTPM", s.dir), zap.Error(err))
		}
		cancel()
		s.mu.Lock()
		defer s.mu.Unlock()
		s.cancel = nil
	}()
	return nil
}

// closePatience is how long a TPM may take to end what it is doing and to flush what programs have in it.
const closePatience = 2 * time.Second

// Close implements io.Closer: nobody is connected to the TPM when it returns.
func (s *share) Close() error {
	defer time.AfterFunc(closePatience, s.hangUp).Stop()
	s.mu.Lock()
	s.closed = true
	cancel, served := s.cancel, s.served
	s.mu.Unlock()
	if cancel != nil {
		cancel()
		<-served
	}
	s.of.mu.Lock()
	if s.of.all[s.dir] == s {
		delete(s.of.all, s.dir)
	}
	s.of.mu.Unlock()
	return s.tpm.Close()
}

// network opens the process's network namespace.
func (p Process) network() (*os.File, error) {
	network, err := tpmshare.OpenNetns(p.PID)
	if err != nil {
		return nil, err
	}
	inum, err := MountNS(p.PID) // after it was opened: the process that the number means now is the one that is meant
	if err == nil && inum != p.Inum {
		err = fmt.Errorf("process %d is in mount namespace %d now, not in %d", p.PID, inum, p.Inum)
	}
	if err != nil {
		return nil, errors.Join(err, network.Close())
	}
	return network, nil
}

// MountNS returns the inode number of a process's mount namespace.
func MountNS(pid int) (uint32, error) {
	var st unix.Stat_t
	if err := unix.Stat(fmt.Sprintf("/proc/%d/ns/mnt", pid), &st); err != nil {
		return 0, fmt.Errorf("find the mount namespace of process %d: %w", pid, err)
	}
	return uint32(st.Ino), nil
}
