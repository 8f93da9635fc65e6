package vtpm

import (
	"errors"
	"fmt"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/durable"
)

// credential returns whom swtpm runs as, without supplementary groups; nil: as the agent.
func (c Config) credential() (*syscall.Credential, error) {
	if c.User == "" {
		return nil, nil
	}
	u, err := user.Lookup(c.User)
	if _, numeric := strconv.ParseUint(c.User, 10, 32); err != nil && numeric == nil {
		u, err = user.LookupId(c.User)
	}
	if err != nil {
		return nil, fmt.Errorf("%w; make it (useradd --system --no-create-home %s), or name another", err, c.User)
	}
	uid, err := strconv.ParseUint(u.Uid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("user %s has the number %q: %w", c.User, u.Uid, err)
	}
	gid, err := strconv.ParseUint(u.Gid, 10, 32)
	if err != nil {
		return nil, fmt.Errorf("user %s has the group %q: %w", c.User, u.Gid, err)
	}
	return &syscall.Credential{Uid: uint32(uid), Gid: uint32(gid)}, nil
}

// openState makes and opens the folder that swtpm works in, and hands over what is there to the user that swtpm runs as. The names
// in it were an earlier swtpm's to choose, so none is followed.
func openState(c Config, owner *syscall.Credential) (*os.File, error) {
	path := filepath.Join(c.Dir, stateName)
	if err := durable.Mkdir(path); err != nil {
		return nil, err
	}
	dir, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	for _, name := range []string{socketName, socketName + controlSuffix} {
		if err := unix.Unlinkat(int(dir.Fd()), name, 0); err != nil && !errors.Is(err, unix.ENOENT) {
			return nil, errors.Join(fmt.Errorf("remove %s/%s: %w", path, name, err), dir.Close())
		}
	}
	if owner == nil {
		owner = &syscall.Credential{Uid: uint32(os.Geteuid()), Gid: uint32(os.Getegid())}
	}
	err = eachStateFile(dir, func(f *os.File) error { return f.Chown(int(owner.Uid), int(owner.Gid)) })
	if err == nil {
		err = dir.Chown(int(owner.Uid), int(owner.Gid))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("hand %s over to user %d: %w", path, owner.Uid, err), dir.Close())
	}
	return dir, nil
}

// eachStateFile calls do with each regular file of a folder. A file with another name elsewhere may be somebody else's that swtpm's
// user has linked here: it is passed over.
func eachStateFile(dir *os.File, do func(*os.File) error) error {
	names, err := dir.Readdirnames(-1)
	if err != nil {
		return err
	}
	for _, name := range names {
		fd, err := unix.Openat(int(dir.Fd()), name, unix.O_RDONLY|unix.O_NOFOLLOW|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
		if errors.Is(err, unix.ELOOP) || errors.Is(err, unix.ENXIO) || errors.Is(err, unix.ENOENT) {
			continue // a link, a socket, or gone
		}
		if err != nil {
			return fmt.Errorf("open %s: %w", name, err)
		}
		f := os.NewFile(uintptr(fd), name)
		var st unix.Stat_t
		err = unix.Fstat(fd, &st)
		if err == nil && st.Mode&unix.S_IFMT == unix.S_IFREG && st.Nlink == 1 {
			err = do(f)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return err
		}
	}
	return nil
}

// syncState makes the TPM's state durable: swtpm itself does not.
func syncState(c Config) error {
	dir, err := os.Open(filepath.Join(c.Dir, stateName))
	if err != nil {
		return err
	}
	defer dir.Close()
	if err := eachStateFile(dir, (*os.File).Sync); err != nil {
		return err
	}
	return dir.Sync()
}
