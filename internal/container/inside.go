package container

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// source is the file system to attach.
type source struct {
	dir    int
	dev    uint64
	groups map[int]bool // peer groups of the agent's own mounts
}

func (s *source) close() { unix.Close(s.dir) }

// openSource opens the agent's own mount of the file system. It asks the server nothing, which is this process: killed meanwhile, it would wait
// for itself, and for ever.
func openSource(fsDir string) (*source, error) {
	dir, err := unix.Open(fsDir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("%w (%w)", &os.PathError{Op: "open", Path: fsDir, Err: err}, ErrNoAgent)
	}
	s := &source{dir: dir, groups: make(map[int]bool)}
	var st unix.Statx_t
	if err := unix.Statx(dir, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC, unix.STATX_TYPE, &st); err != nil {
		s.close()
		return nil, fmt.Errorf("%w (%w)", &os.PathError{Op: "statx", Path: fsDir, Err: err}, ErrNoAgent)
	}
	if st.Attributes&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		s.close()
		return nil, fmt.Errorf("%s: %w", fsDir, ErrNoAgent)
	}
	s.dev = unix.Mkdev(st.Dev_major, st.Dev_minor)
	mounts, err := readMounts(unix.AT_FDCWD, "/proc/self/mountinfo")
	if err != nil {
		s.close()
		return nil, err
	}
	for _, m := range mounts {
		if m.shared != 0 {
			s.groups[m.shared] = true
		}
	}
	return s, nil
}

// clone makes a detached mount of what a window shows. It is in no peer group: a copy of a shared mount would carry what the
// container mounts inside it to the host and to all other containers.
func (s *source) clone(w Window) (int, error) {
	at, err := unix.Openat2(s.dir, "."+w.Root, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_XDEV,
	})
	if err != nil {
		return -1, &os.PathError{Op: "open", Path: "window's " + w.Root, Err: err}
	}
	defer unix.Close(at)
	tree, err := unix.OpenTree(at, "", unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_EMPTY_PATH)
	if err != nil {
		return -1, fmt.Errorf("open_tree: %w", err)
	}
	attr := unix.MountAttr{Attr_set: unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC, Propagation: unix.MS_PRIVATE}
	if w.ReadOnly {
		attr.Attr_set |= unix.MOUNT_ATTR_RDONLY
	}
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &attr); err != nil {
		unix.Close(tree)
		return -1, fmt.Errorf("mount_setattr: %w", err)
	}
	return tree, nil
}

// inside is a thread in a container's mount namespace. Its methods are called on that thread only.
type inside struct {
	proc int // the host's /proc, the working folder
	tree int // a detached mount; -1: none
}

// place is an open folder or file of the container, with the mount that it is in: the topmost there.
type place struct {
	fd    int
	mount mount
}

func (p place) close() { unix.Close(p.fd) }

// open opens a path of the container's without following symbolic links, and without a word to the file system's server.
func (in *inside) open(path string) (place, error) {
	fd, err := unix.Openat2(unix.AT_FDCWD, path, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return place{}, &os.PathError{Op: "open", Path: path, Err: err}
	}
	var st unix.Statx_t
	err = unix.Statx(fd, "", unix.AT_EMPTY_PATH|unix.AT_STATX_DONT_SYNC|unix.AT_NO_AUTOMOUNT, unix.STATX_MNT_ID, &st)
	if err != nil {
		unix.Close(fd)
		return place{}, &os.PathError{Op: "statx", Path: path, Err: err}
	}
	mounts, err := readMounts(in.proc, "thread-self/mountinfo")
	if err != nil {
		unix.Close(fd)
		return place{}, err
	}
	for _, m := range mounts {
		if uint64(m.id) == st.Mnt_id {
			return place{fd, m}, nil
		}
	}
	unix.Close(fd)
	return place{}, fmt.Errorf("%s: %w", path, ErrChanged)
}

// unmount takes a mount away, lazily: what is open in it stays open.
func (in *inside) unmount(p place) error {
	err := unix.Unmount(fmt.Sprintf("thread-self/fd/%d", p.fd), unix.MNT_DETACH)
	if errors.Is(err, unix.EINVAL) {
		return ErrLocked
	}
	return err
}

// place mounts the tree over the window's place unless the same is there already.
func (in *inside) place(ctx context.Context, s *source, w Window) error {
	at, err := in.clear(ctx, s, w.Point)
	if errors.Is(err, fs.ErrNotExist) {
		return in.explain(err)
	} else if err != nil {
		return err
	}
	defer at.close()
	if at.mount.dev == s.dev && at.mount.point == w.Point && at.mount.root == w.Root {
		return nil
	}
	return in.cover(s, at, w.Point)
}

// replace puts the tree in the place of a dead window, and reports whether there was one.
func (in *inside) replace(ctx context.Context, s *source, w Window) (bool, error) {
	at, err := in.open(w.Point)
	if err != nil {
		return false, err
	}
	stale := in.stale(ctx, s, w.Point, at)
	at.close()
	if !stale {
		return false, nil
	}
	if at, err = in.clear(ctx, s, w.Point); err != nil {
		return false, err
	}
	defer at.close()
	if at.mount.dev == s.dev && at.mount.point == w.Point {
		return true, nil // it had come from an outer namespace and was only hidden
	}
	return true, in.cover(s, at, w.Point)
}

// clear takes dead windows away and returns what they covered, or the first that can't be taken away.
func (in *inside) clear(ctx context.Context, s *source, path string) (place, error) {
	for range maxStack {
		at, err := in.open(path)
		if err != nil {
			return place{}, err
		}
		if !in.stale(ctx, s, path, at) {
			return at, nil
		}
		err = in.unmount(at)
		if errors.Is(err, ErrLocked) {
			return at, nil
		}
		at.close()
		if err != nil {
			return place{}, fmt.Errorf("unmount %s: %w", path, err)
		}
	}
	return place{}, fmt.Errorf("unmount %s: more than %d dead windows are mounted there", path, maxStack)
}

// stale reports whether a dead window is mounted at the path itself.
func (in *inside) stale(ctx context.Context, s *source, path string, at place) bool {
	return at.mount.ours() && at.mount.point == path && at.mount.dev != s.dev && dead(ctx, at.fd)
}

// cover mounts the tree over a place.
func (in *inside) cover(s *source, at place, path string) error {
	if s.groups[at.mount.shared] {
		return fmt.Errorf("mount over %s: %w", path, ErrShared)
	}
	err := unix.MoveMount(in.tree, "", at.fd, "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH)
	if err != nil {
		return &os.PathError{Op: "move_mount", Path: path, Err: err}
	}
	return nil
}

// remove takes all windows away that are on top at /sys/kernel/security.
func (in *inside) remove() error {
	for range maxStack {
		at, err := in.open(SecurityFS)
		if errors.Is(err, fs.ErrNotExist) {
			return nil
		} else if err != nil {
			return err
		}
		if !at.mount.ours() || at.mount.point != SecurityFS {
			at.close()
			return nil
		}
		err = in.unmount(at)
		at.close()
		if err != nil {
			return fmt.Errorf("unmount %s: %w", SecurityFS, err)
		}
	}
	return fmt.Errorf("unmount %s: more than %d windows are mounted there", SecurityFS, maxStack)
}

// explain says what to do about a missing /sys/kernel/security.
func (in *inside) explain(err error) error {
	var st unix.Statfs_t
	if statErr := unix.Statfs("/sys", &st); statErr != nil || st.Type != unix.SYSFS_MAGIC {
		return fmt.Errorf("%w; the container has no sysfs at /sys: mount it there, or make the folder %s", err, SecurityFS)
	}
	return fmt.Errorf("%w; the container's sysfs has no %s: the kernel lacks CONFIG_SECURITYFS", err, strings.TrimPrefix(SecurityFS, "/sys/"))
}

// probeTimeout bounds the wait for the server of a file system that says it is ours.
const probeTimeout = 2 * time.Second

// dead reports whether a FUSE file system has lost its server. One that does not answer in time is alive: who serves it may be
// the container itself.
func dead(ctx context.Context, fd int) bool {
	own, err := unix.FcntlInt(uintptr(fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return false
	}
	answer := make(chan error, 1)
	go func() {
		defer unix.Close(own)
		var st unix.Statfs_t
		answer <- unix.Fstatfs(own, &st)
	}()
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	select {
	case err := <-answer:
		return errors.Is(err, unix.ENOTCONN) || errors.Is(err, unix.ECONNABORTED)
	case <-ctx.Done():
		return false
	}
}
