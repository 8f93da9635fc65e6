package tpmshare

import (
	"encoding/binary"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"strconv"
	"sync"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/proc"
)

// peers finds the processes at the other ends of connections within one network namespace.
//
// The kernel says which socket is there (sock_diag), /proc which process has it open. What is looked at of a process it tells of
// itself: one that passes a socket to another makes them one client, and shares with it what is its own.
type peers struct {
	ns uint32 // the namespace's inode number, which the sockets keep

	mu  sync.Mutex // guards what follows
	fd  int        // a netlink socket of the namespace
	seq uint32
}

// answerTime bounds the wait for the kernel's answer, which is there at once.
const answerTime = time.Second

// openPeers opens the socket in the thread's network namespace.
func openPeers() (*peers, error) {
	var st unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &st); err != nil {
		return nil, fmt.Errorf("look at the thread's network namespace: %w", err)
	}
	fd, err := unix.Socket(unix.AF_NETLINK, unix.SOCK_RAW|unix.SOCK_CLOEXEC, unix.NETLINK_SOCK_DIAG)
	if err != nil {
		return nil, fmt.Errorf("open a sock_diag socket: %w", err)
	}
	limit := unix.NsecToTimeval(answerTime.Nanoseconds())
	if err := unix.SetsockoptTimeval(fd, unix.SOL_SOCKET, unix.SO_RCVTIMEO, &limit); err != nil {
		return nil, errors.Join(err, unix.Close(fd))
	}
	p := &peers{ns: uint32(st.Ino), fd: fd}
	nobody := netip.AddrPortFrom(netip.AddrFrom4([4]byte{127, 0, 0, 1}), 1)
	if _, err := p.inode(nobody, nobody); err != nil { // better now than at the first client
		p.close()
		return nil, err
	}
	return p, nil
}

func (p *peers) close() { unix.Close(p.fd) }

// Sizes and offsets of struct inet_diag_req_v2, struct inet_diag_sockid and struct inet_diag_msg, behind a struct nlmsghdr.
// Source: include/uapi/linux/inet_diag.h.
const (
	netlinkHeader  = 16
	diagRequest    = netlinkHeader + 56
	diagRequestID  = netlinkHeader + 8
	diagID         = 48 // be16 source, be16 destination port, be32[4] source, be32[4] destination, u32 interface, u32[2] cookie
	diagMessage    = netlinkHeader + 72
	diagMessageID  = netlinkHeader + 4
	diagInode      = diagMessageID + diagID + 16
	sockDiagFamily = 20 // SOCK_DIAG_BY_FAMILY
)

// inode returns the inode number of the TCP socket that is bound to one address and connected to the other; 0 if it is not there any
// more, or nobody has it open.
func (p *peers) inode(from, to netip.AddrPort) (uint32, error) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.seq++
	b := make([]byte, diagRequest)
	binary.NativeEndian.PutUint32(b, diagRequest)
	binary.NativeEndian.PutUint16(b[4:], sockDiagFamily)
	binary.NativeEndian.PutUint16(b[6:], unix.NLM_F_REQUEST)
	binary.NativeEndian.PutUint32(b[8:], p.seq)
	b[netlinkHeader], b[netlinkHeader+1] = unix.AF_INET, unix.IPPROTO_TCP
	binary.NativeEndian.PutUint32(b[netlinkHeader+4:], ^uint32(0)) // whatever its state
	id := b[diagRequestID:]
	binary.BigEndian.PutUint16(id, from.Port())
	binary.BigEndian.PutUint16(id[2:], to.Port())
	copy(id[4:], from.Addr().AsSlice())
	copy(id[20:], to.Addr().AsSlice())
	binary.NativeEndian.PutUint64(id[40:], ^uint64(0)) // no cookie
	if err := unix.Sendto(p.fd, b, 0, &unix.SockaddrNetlink{Family: unix.AF_NETLINK}); err != nil {
		return 0, fmt.Errorf("ask for the peer's socket: %w", err)
	}
	return p.receive(id[:20+4])
}

// receive reads the answer, which must be about the ports and addresses asked for.
func (p *peers) receive(id []byte) (uint32, error) {
	b := make([]byte, 4096)
	for {
		n, _, err := unix.Recvfrom(p.fd, b, 0)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil {
			return 0, fmt.Errorf("ask for the peer's socket: %w", err)
		}
		inode, answers, err := parseDiag(b[:n], p.seq, id)
		if !answers {
			continue // it came after its time
		}
		return inode, err
	}
}

// parseDiag reads an answer about the socket of that id; answers: it is that to the request with that number.
func parseDiag(b []byte, seq uint32, id []byte) (inode uint32, answers bool, err error) {
	if len(b) < netlinkHeader+4 || binary.NativeEndian.Uint32(b[8:]) != seq {
		return 0, false, nil
	}
	if binary.NativeEndian.Uint16(b[4:]) == unix.NLMSG_ERROR {
		errno := unix.Errno(-int32(binary.NativeEndian.Uint32(b[netlinkHeader:])))
		if errno == unix.ENOENT {
			return 0, true, nil
		}
		return 0, true, fmt.Errorf("ask for the peer's socket: %w; it takes the kernel's module tcp_diag", errno)
	}
	if len(b) < diagMessage || string(b[diagMessageID:diagMessageID+len(id)]) != string(id) {
		return 0, true, nil
	}
	return binary.NativeEndian.Uint32(b[diagInode:]), true, nil
}

// process returns a process of the namespace that has a socket open; 0 if there is none. The one with the lowest number is most
// likely the one that made the socket, if others inherited it.
func (p *peers) process(inode uint32) (int, error) {
	dir, err := os.Open("/proc")
	if err != nil {
		return 0, err
	}
	defer dir.Close()
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return 0, err
	}
	for _, name := range names { // the kernel lists them in ascending order
		pid, err := strconv.Atoi(name)
		if err != nil {
			continue
		}
		has, ok := proc.Ask(pid, func() bool {
			ns, err := proc.Namespace(pid, "net")
			return err == nil && ns == p.ns && hasSocket(pid, inode)
		})
		if ok && has {
			return pid, nil
		}
	}
	return 0, nil
}

// maxDescriptors bounds how many descriptors of a process are looked at.
const maxDescriptors = 4096

// hasSocket reports whether a process has a socket open. It may be held up: see proc.Ask.
func hasSocket(pid int, inode uint32) bool {
	path := fmt.Sprintf("/proc/%d/fd", pid)
	dir, err := os.Open(path)
	if err != nil {
		return false
	}
	defer dir.Close()
	names, err := dir.Readdirnames(maxDescriptors)
	if err != nil {
		return false
	}
	want := fmt.Sprintf("socket:[%d]", inode)
	for _, name := range names {
		if link, err := os.Readlink(path + "/" + name); err == nil && link == want {
			return true
		}
	}
	return false
}
