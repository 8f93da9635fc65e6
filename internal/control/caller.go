package control

import (
	"context"
	"errors"
	"net"
	"net/http"
	"os"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/proc"
)

// caller is who has connected. It is found out when it connects: what the process becomes later counts for its next connection.
type caller struct {
	uid  uint32 // as the host has it
	mnt  uint32 // inode number of its mount namespace
	host bool   // it is in process 1's or the agent's mount namespace, and in the initial user namespace
}

type callerKey struct{}

// peerContext finds out who connected. Without a caller in the context every request is refused.
func peerContext(ctx context.Context, c net.Conn) context.Context {
	u, ok := c.(*net.UnixConn)
	if !ok {
		return ctx
	}
	raw, err := u.SyscallConn()
	if err != nil {
		return ctx
	}
	raw.Control(func(fd uintptr) {
		cred, err := unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		if err != nil {
			return
		}
		// The process may have ended and its number be another's: the descriptor tells, where the kernel has it (since 6.5).
		pidfd, err := unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, soPeerPIDFD)
		if err == nil {
			defer unix.Close(pidfd)
		}
		who, ok := proc.Ask(int(cred.Pid), func() caller { return lookAt(int(cred.Pid)) })
		if !ok || who.mnt == 0 || err == nil && unix.PidfdSendSignal(pidfd, 0, nil, 0) != nil {
			return
		}
		who.uid = cred.Uid
		ctx = context.WithValue(ctx, callerKey{}, who)
	})
	return ctx
}

const soPeerPIDFD = 77 // SO_PEERPIDFD; source: include/uapi/asm-generic/socket.h

func lookAt(pid int) caller {
	at := func(of int, kind string) uint32 {
		n, _ := proc.Namespace(of, kind) // 0, which is none's
		return n
	}
	mnt := at(pid, "mnt")
	return caller{mnt: mnt, host: at(pid, "user") == initialUserNS && (mnt == at(1, "mnt") || mnt == at(os.Getpid(), "mnt"))}
}

const initialUserNS = 0xeffffffd // source: include/linux/proc_ns.h, PROC_USER_INIT_INO

// asking returns who asks; the zero caller, who may see nothing, if that was not to be found out.
func asking(r *http.Request) caller {
	who, _ := r.Context().Value(callerKey{}).(caller)
	return who
}

func isHost(r *http.Request) bool { return asking(r).host }

// sees reports whether the caller may know of a namespace.
func sees(r *http.Request, i namespace.Info) bool {
	who := asking(r)
	return who.host || i.NS.Inum == who.mnt
}

// mayAsk answers 403 itself. Root of the host may ask for everything; root of a namespace's user namespace for that namespace.
func (s *Server) mayAsk(w http.ResponseWriter, r *http.Request) bool {
	who := asking(r)
	if who.host && who.uid == 0 {
		return true
	}
	for _, i := range s.tree.List() {
		if !who.host && sees(r, i) && i.IDs.UIDs.ToHost(0) == who.uid {
			return true
		}
	}
	s.fail(w, http.StatusForbidden, errors.New("only root may ask: of the host, or in a container for the container's own namespace"))
	return false
}

// onlyHost lets nobody in a namespace through.
func (s *Server) onlyHost(next http.HandlerFunc) http.HandlerFunc {
	return func(w http.ResponseWriter, r *http.Request) {
		if !isHost(r) {
			s.fail(w, http.StatusForbidden, errors.New("this is for root of the host only"))
			return
		}
		next(w, r)
	}
}
