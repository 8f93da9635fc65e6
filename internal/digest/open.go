package digest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/proc"
)

// Root is a kept way into a mount namespace: a descriptor of its root folder. It pins the namespace's mounts, so it must be
// closed when the namespace ends.
type Root struct{ fd int }

// OpenRoot opens the root folder as a living process sees it.
func OpenRoot(p event.Process) (*Root, error) {
	path := fmt.Sprintf("/proc/%d/root", p.TGID)
	fd, err := unix.Open(path, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, fmt.Errorf("open %s: %w", path, err)
	}
	if !Alive(p) {
		unix.Close(fd)
		return nil, fmt.Errorf("open %s: %w", path, os.ErrProcessDone)
	}
	return &Root{fd}, nil
}

// Close gives the descriptor back.
func (r *Root) Close() error { return unix.Close(r.fd) }

// Alive reports whether the process is still the one the event saw, not another with its number.
func Alive(p event.Process) bool {
	fields, err := proc.Stat(int(p.TGID))
	if err != nil {
		return false
	}
	ticks, err := strconv.ParseUint(fields[proc.StatStart], 10, 64)
	return err == nil && ticks == uint64(p.Start/(10*time.Millisecond))
}

// Open opens the file that the event saw, or fails with ErrUnreachable. It tries, in this order: the path below the kept root of
// the namespace (root may be nil), the path below the process's own root, the process's program, its mapping.
func Open(ev *event.File, root *Root) (*os.File, error) {
	var reasons []error
	for _, open := range []func() (int, error){
		func() (int, error) { return openBelow(root, ev.Path) },
		func() (int, error) { return openProc(ev.Process, "root"+ev.Path, strings.HasPrefix(ev.Path, "/")) },
		func() (int, error) { return openProc(ev.Process, "exe", ev.Flags&event.Mprotect == 0) },
		func() (int, error) { return openMapping(ev) },
	} {
		fd, err := open()
		if err != nil {
			reasons = append(reasons, err)
			continue
		}
		f, err := verified(fd, ev)
		if err == nil || errors.Is(err, ErrChanged) {
			return f, err
		}
		reasons = append(reasons, err)
	}
	return nil, fmt.Errorf("open %q: %w (%w)", ev.Path, ErrUnreachable, errors.Join(reasons...))
}

// openFlags only find the file: a name may lead to a device or a FIFO by now, and opening those has effects.
const openFlags = unix.O_PATH | unix.O_CLOEXEC

// verified opens for reading what was found, once it is known to be the regular file that the event saw. It closes found.
func verified(found int, ev *event.File) (*os.File, error) {
	path := os.NewFile(uintptr(found), ev.Path)
	defer path.Close()
	if err := Same(path, ev); err != nil {
		return nil, err
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", found), unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, fmt.Errorf("open %q for reading: %w", ev.Path, err)
	}
	return os.NewFile(uintptr(fd), ev.Path), nil
}

func openBelow(root *Root, path string) (int, error) {
	if root == nil || !strings.HasPrefix(path, "/") {
		return 0, errors.New("no root kept")
	}
	return unix.Openat2(root.fd, path, &unix.OpenHow{Flags: openFlags, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS})
}

func openProc(p event.Process, name string, applies bool) (int, error) {
	if !applies {
		return 0, fmt.Errorf("%s does not apply", name)
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/%s", p.TGID, name), openFlags, 0)
	if err != nil {
		return 0, fmt.Errorf("open /proc/%d/%s: %w", p.TGID, name, err)
	}
	return fd, nil
}

func openMapping(ev *event.File) (int, error) {
	name, err := mappingName(ev)
	if err != nil {
		return 0, err
	}
	return openProc(ev.Process, name, true)
}

// MappingPath returns the path of the file behind an mprotect event's mapping, as the process sees it.
func MappingPath(ev *event.File) (string, error) {
	name, err := mappingName(ev)
	if err != nil {
		return "", fmt.Errorf("find the path of a mapping: %w: %w", ErrUnreachable, err)
	}
	path, err := os.Readlink(fmt.Sprintf("/proc/%d/%s", ev.Process.TGID, name))
	if err != nil {
		return "", fmt.Errorf("find the path of a mapping: %w: %w", ErrUnreachable, err)
	}
	return strings.TrimSuffix(path, " (deleted)"), nil
}

// mappingName returns map_files/START-END of the mapping that an event means. mprotect of a part splits the mapping just
// after the event, so any mapping that lies within the event's may be the one: Open checks the inode.
func mappingName(ev *event.File) (string, error) {
	if ev.VMAEnd == 0 {
		return "", errors.New("no mapping")
	}
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/map_files", ev.Process.TGID))
	if err != nil {
		return "", err
	}
	for _, e := range entries {
		var start, end uint64
		if n, _ := fmt.Sscanf(e.Name(), "%x-%x", &start, &end); n == 2 && start < ev.VMAEnd && end > ev.VMAStart {
			return "map_files/" + e.Name(), nil
		}
	}
	return "", errors.New("the mapping is gone")
}

// Hash opens the file that the event saw and hashes it, as Open and Sum do.
func Hash(ctx context.Context, ev *event.File, root *Root, algos ...ima.HashAlgo) ([]ima.Digest, error) {
	f, err := Open(ev, root)
	if err != nil {
		return nil, err
	}
	defer f.Close()
	return Sum(ctx, f, ev, algos...)
}
