package vtpm

import (
	"errors"
	"fmt"
	"math/rand/v2"
	"os"
	"os/user"
	"path/filepath"
	"strconv"
	"syscall"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/durable"
)

// Numbers of users, of which each process is given one for as long as it runs. Those below are systemd's for containers (to 1879048191) and
// sssd's for a directory's users (to 2000200000), those above systemd's for foreign file systems (from 2147352576).
const (
	ownFirst = 2013265920 // 0x78000000
	ownCount = 1 << 26
)

// noID is the number that the kernel takes for none.
const noID uint32 = 1<<32 - 1

// CheckUser reports whether a name or number can be Config.User.
func CheckUser(name string) error {
	_, err := Config{User: name}.credential()
	return err
}

// credential returns whom swtpm runs as, without supplementary groups; nil: as the agent.
func (c Config) credential() (*syscall.Credential, error) {
	switch {
	case c.User == "" && os.Geteuid() != 0:
		return nil, nil
	case c.User == "":
		return ownCredential(), nil
	case c.User == "root":
		return &syscall.Credential{}, nil
	}
	number, notNumeric := strconv.ParseUint(c.User, 10, 32)
	if errors.Is(notNumeric, strconv.ErrRange) || notNumeric == nil && uint32(number) == noID {
		return nil, fmt.Errorf("user %s: want a number from 0 to %d, or a name", c.User, noID-1)
	}
	u, err := user.Lookup(c.User)
	if err != nil && notNumeric == nil {
		if u, err = user.LookupId(c.User); err != nil {
			return &syscall.Credential{Uid: uint32(number), Gid: uint32(number)}, nil // it needs no name
		}
	}
	if err != nil {
		return nil, fmt.Errorf("%w; make it (useradd --system --no-create-home %s), or give another, or a number", err, c.User)
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

// ownCredential returns a user and a group that no process on the machine has. Nothing holds the number until the process runs: another start
// would have to draw the same of 67 million meanwhile.
func ownCredential() *syscall.Credential {
	number := ownFirst + rand.Uint32N(ownCount)
	for isUser(number) {
		number = ownFirst + rand.Uint32N(ownCount)
	}
	return &syscall.Credential{Uid: number, Gid: number}
}

// isUser reports whether some process is the user of that number.
func isUser(number uint32) bool {
	_, err := unix.Getpriority(unix.PRIO_USER, int(number))
	return !errors.Is(err, unix.ESRCH)
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
		return nil, errors.Join(fmt.Errorf("hand %s over to user %d: %w; run with CAP_CHOWN, or with --swtpm-user root", path, owner.Uid, err), dir.Close())
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
