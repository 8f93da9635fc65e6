package tpmshare

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"runtime"

	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// ErrHostNetwork means that a container has the host's network namespace, or the agent's own: every program there would reach its TPM.
var ErrHostNetwork = errors.New("the container has the host's network namespace, where others would reach its TPM")

// Where clients look for a TPM: the ports that are swtpm's by custom, and the TCG software stack's swtpm interface's by default.
const (
	commandAddress = "127.0.0.1:2321"
	controlAddress = "127.0.0.1:2322" // the interface takes the command port's number plus one
)

// OpenNetns opens the network namespace of a process, for Config. The process's number may be another's meanwhile, so who calls
// makes sure, after the call, that the process it means is still there.
func OpenNetns(pid int) (*os.File, error) {
	f, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return nil, fmt.Errorf("open network namespace of process %d: %w", pid, err)
	}
	return f, nil
}

// sockets are what a Server has in a container's network namespace. They keep the namespace alive.
type sockets struct {
	command, control net.Listener
	peers            *peers
}

func (s sockets) close() {
	for _, l := range []net.Listener{s.command, s.control} {
		if l != nil {
			l.Close()
		}
	}
	if s.peers != nil {
		s.peers.close()
	}
}

// openSockets opens them on a thread that enters the namespace.
func openSockets(ctx context.Context, ns *os.File) (s sockets, err error) {
	onThread(func() (back bool) {
		s, back, err = openInside(ctx, ns)
		return back
	})
	if err != nil {
		s.close()
		return sockets{}, err
	}
	return s, nil
}

// onThread runs a function on a thread of its own, other than the first, whose namespaces are what /proc/self shows. A thread that the
// function says is not back where it was ends: it never runs other code.
func onThread(f func() (back bool)) {
	done := make(chan struct{})
	go func() {
		defer close(done)
		runtime.LockOSThread()
		if unix.Gettid() == unix.Getpid() {
			defer runtime.UnlockOSThread()
			onThread(f) // another, while this one waits
			return
		}
		if f() {
			runtime.UnlockOSThread()
		}
	}()
	<-done
}

// openInside reports whether the thread is back in the namespace that it came from.
func openInside(ctx context.Context, ns *os.File) (s sockets, back bool, err error) {
	home, err := netns.Get()
	if err != nil {
		return s, true, fmt.Errorf("open the agent's network namespace: %w", err)
	}
	defer home.Close()
	defer runtime.KeepAlive(ns)
	if err := checkNotHost(ns); err != nil {
		return s, true, err
	}
	if err := netns.Set(netns.NsHandle(ns.Fd())); err != nil {
		return s, true, fmt.Errorf("enter the container's network namespace: %w", err)
	}
	err = s.open(ctx)
	if back := netns.Set(home); back != nil {
		return s, false, errors.Join(err, fmt.Errorf("leave the container's network namespace: %w", back))
	}
	return s, true, err
}

func (s *sockets) open(ctx context.Context) error {
	if err := raiseLoopback(); err != nil {
		return err
	}
	var err error
	if s.peers, err = openPeers(); err != nil {
		return err
	}
	var c net.ListenConfig
	if s.command, err = c.Listen(ctx, "tcp4", commandAddress); err == nil {
		s.control, err = c.Listen(ctx, "tcp4", controlAddress)
	}
	if errors.Is(err, unix.EADDRINUSE) {
		err = fmt.Errorf("%w; another program of that network has the port, or the TPM of another container of the pod", err)
	}
	return err
}

// checkNotHost is ErrHostNetwork for the thread's namespace, which is the agent's, and for that of the first process. Where the
// agent may not look at the first process, only its own is compared.
func checkNotHost(ns *os.File) error {
	var theirs, ours unix.Stat_t
	if err := unix.Fstat(int(ns.Fd()), &theirs); err != nil {
		return fmt.Errorf("look at the container's network namespace: %w", err)
	}
	for _, path := range []string{"/proc/thread-self/ns/net", "/proc/1/ns/net"} {
		err := unix.Stat(path, &ours)
		if errors.Is(err, unix.EACCES) && path == "/proc/1/ns/net" {
			continue
		}
		if err != nil {
			return fmt.Errorf("look at the host's network namespace: stat %s: %w", path, err)
		}
		if ours.Dev == theirs.Dev && ours.Ino == theirs.Ino {
			return ErrHostNetwork
		}
	}
	return nil
}

// raiseLoopback sees to it that the loopback device of the thread's network namespace is up; a new namespace's is down, and
// nothing can be reached in it. The kernel gives the device its address as it goes up. Source: net/ipv4/devinet.c, inetdev_event.
func raiseLoopback() error {
	fd, err := unix.Socket(unix.AF_INET, unix.SOCK_DGRAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("look at the loopback device: %w", err)
	}
	defer unix.Close(fd)
	lo, err := unix.NewIfreq("lo")
	if err != nil {
		return err
	}
	if err := unix.IoctlIfreq(fd, unix.SIOCGIFFLAGS, lo); err != nil {
		return fmt.Errorf("look at the loopback device: %w", err)
	}
	if lo.Uint16()&unix.IFF_UP != 0 {
		return nil
	}
	lo.SetUint16(lo.Uint16() | unix.IFF_UP)
	if err := unix.IoctlIfreq(fd, unix.SIOCSIFFLAGS, lo); err != nil {
		return fmt.Errorf("set the loopback device up: %w", err)
	}
	return nil
}
