package imafs

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"time"

	"github.com/hanwen/go-fuse/v2/fuse"
	"go.uber.org/zap"
	"golang.org/x/sys/unix"
)

// fsName is what mount tables show; the type is fuse.imans.
const fsName = "imans"

// Server is one mount of the window.
type Server struct {
	dir  string
	fuse *fuse.Server
	fs   *fileSystem
	log  *zap.Logger
}

// fileSystem answers the kernel's requests, each in a goroutine of its own.
type fileSystem struct {
	fuse.RawFileSystem // answers ENOSYS
	views              Views
	log                *zap.Logger
	started            time.Time
	open               *openFiles
	sizes              *sizes
	stopping           chan struct{} // closed when Run ends
}

// Mount mounts the window at a folder, which it makes if it has to. What an agent that was killed left mounted there is taken
// away first. Who looks in before Run is called waits.
func Mount(dir string, views Views, log *zap.Logger) (*Server, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, err
	}
	if err := unmountLeft(dir, log); err != nil {
		return nil, err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("make the window's folder: %w", err)
	}
	s := &fileSystem{
		RawFileSystem: fuse.NewDefaultRawFileSystem(), views: views, log: log, started: time.Now(), open: newOpenFiles(),
		sizes: newSizes(), stopping: make(chan struct{}),
	}
	server, err := newServer(s, dir)
	if err != nil {
		return nil, fmt.Errorf("mount the window at %s: %w", dir, err)
	}
	return &Server{dir, server, s, log}, nil
}

// newServer mounts. go-fuse opens /dev/fuse without O_CLOEXEC: a child that inherits it would keep the mount alive, and whoever
// looks in waiting, when the agent is gone. So nothing is executed until that is put right.
func newServer(s *fileSystem, dir string) (*fuse.Server, error) {
	syscall.ForkLock.RLock()
	defer syscall.ForkLock.RUnlock()
	server, err := fuse.NewServer(s, dir, &fuse.MountOptions{
		AllowOther: true, DirectMountStrict: true, DirectMountFlags: unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC,
		FsName: fsName, Name: fsName, DisableXAttrs: true, DisableReadDirPlus: true, DisableSplice: true,
		Logger: zap.NewStdLog(s.log), PanicHandler: s.panicked,
	})
	if err != nil {
		return nil, err
	}
	fds, err := os.ReadDir("/proc/self/fd")
	if err != nil {
		return nil, errors.Join(err, server.Unmount())
	}
	for _, fd := range fds {
		if link, err := os.Readlink("/proc/self/fd/" + fd.Name()); err == nil && link == "/dev/fuse" {
			if n, err := strconv.Atoi(fd.Name()); err == nil {
				unix.CloseOnExec(n)
			}
		}
	}
	return server, nil
}

// Run answers until the context ends, then unmounts; what is open then gets ENOTCONN. It is an error if someone else unmounted.
func (s *Server) Run(ctx context.Context) error {
	served := make(chan struct{})
	go func() {
		defer close(served)
		s.fuse.Serve()
	}()
	// No WaitMount here: it opens a file of the window's own. Killed meanwhile, the agent would wait for itself as it closes that
	// file, and for ever. The agent opens none.
	select {
	case <-served:
		return fmt.Errorf("the window at %s was unmounted; restart the agent", s.dir)
	case <-ctx.Done():
	}
	close(s.fs.stopping)
	// Forced, which ends the connection: mounts of it elsewhere would keep it.
	err := unix.Unmount(s.dir, unix.MNT_FORCE|unix.MNT_DETACH)
	if err != nil {
		return fmt.Errorf("unmount the window at %s: %w", s.dir, err)
	}
	<-served
	return nil
}

// unmountLeft takes away the mounts of ours at a folder.
func unmountLeft(dir string, log *zap.Logger) error {
	table, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		return fmt.Errorf("look for mounts: %w", err)
	}
	for line := range strings.Lines(string(table)) {
		mount, rest, _ := strings.Cut(line, " - ")
		fields := strings.Fields(mount)
		if len(fields) < 5 || unescape.Replace(fields[4]) != dir || !strings.HasPrefix(rest, "fuse."+fsName+" ") {
			continue
		}
		if err := unix.Unmount(dir, unix.MNT_FORCE|unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount what an earlier agent left at %s: %w", dir, err)
		}
		log.Info("unmounted what an earlier agent left", zap.String("dir", dir))
	}
	return nil
}

// unescape undoes what mount tables do to names.
var unescape = strings.NewReplacer(`\040`, " ", `\011`, "\t", `\012`, "\n", `\134`, `\`)

// String names the file system.
func (s *fileSystem) String() string { return fsName }

func (s *fileSystem) panicked(what any) fuse.Status {
	s.log.Error("a request of a namespace's window panicked", zap.Any("panic", what), zap.Stack("stack"))
	return fuse.EIO
}

// errUnexpected ends what the kernel should not ask.
var errUnexpected = errors.New("a request for a file that is not open")
