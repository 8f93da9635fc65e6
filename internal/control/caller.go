package control

import (
	"context"
	"errors"
	"fmt"
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
	mnt  uint64 // inode number of its mount namespace
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
	at := func(of, kind string) uint64 {
		var st unix.Stat_t
		if unix.Stat(fmt.Sprintf("/proc/%s/ns/%s", of, kind), &st) != nil {
			return 0
		}
		return st.Ino
	}
	p := fmt.Sprint(pid)
	mnt := at(p, "mnt")
	return caller{mnt: mnt, host: at(p, "user") == initialUserNS && (mnt == at("1", "mnt") || mnt == at(fmt.Sprint(os.Getpid()), "mnt"))}
}

const initialUserNS = 0xeffffffd // source: include/linux/proc_ns.h, PROC_USER_INIT_INO

// mayAsk answers 403 itself. Root of the host may ask for everything; root of a namespace's user namespace for that namespace.
func (s *Server) mayAsk(w http.ResponseWriter, r *http.Request) bool {
	who, ok := r.Context().Value(callerKey{}).(caller)
	switch {
	case ok && who.host && who.uid == 0:
		return true
	case ok && !who.host:
		for _, i := range s.tree.List() {
			if uint64(i.NS.Inum) == who.mnt && i.IDs.UIDs.ToHost(0) == who.uid {
				return true
			}
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

func isHost(r *http.Request) bool {
	who, ok := r.Context().Value(callerKey{}).(caller)
	return ok && who.host
}

// sees reports whether the caller may know of a namespace.
func sees(r *http.Request, i namespace.Info) bool {
	who, ok := r.Context().Value(callerKey{}).(caller)
	return ok && (who.host || uint64(i.NS.Inum) == who.mnt)
}
