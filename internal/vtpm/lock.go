package vtpm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/proc"
)

// takeOverTimeout is ample for a process that is just starting, and for one to die.
const takeOverTimeout = 5 * time.Second

// takeOver locks an instance's folder, so that two never serve it. A process that has the lock is one that an earlier agent
// started and did not live to record: nobody has used it, so it is ended.
func takeOver(ctx context.Context, c Config) (*os.File, error) {
	lock, err := os.OpenFile(filepath.Join(c.Dir, lockName), os.O_RDONLY|os.O_CREATE, 0o600) // swtpm inherits it
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, takeOverTimeout)
	defer cancel()
	for {
		err := unix.Flock(int(lock.Fd()), unix.LOCK_EX|unix.LOCK_NB)
		if err == nil {
			return lock, nil
		}
		if errors.Is(err, unix.EWOULDBLOCK) {
			endHolder(c)
		}
		select {
		case <-ctx.Done():
			err = fmt.Errorf("%s is in use: lock: %w; end the process that `fuser %s` names", c.Dir, err, lock.Name())
			return nil, errors.Join(err, lock.Close())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// EndUnrecorded ends the process that was started for the folder, if there is one: Adopt does not find it where its agent ended before it
// was on record. One that was only forked has the lock, and is waited for: it becomes swtpm in a moment. Call it where no other agent may be
// starting one.
func EndUnrecorded(ctx context.Context, c Config) error {
	if _, err := os.Stat(filepath.Join(c.Dir, lockName)); errors.Is(err, os.ErrNotExist) {
		return nil
	}
	lock, err := takeOver(ctx, c)
	if err != nil {
		return err
	}
	return lock.Close()
}

// EndRemoved ends the processes whose folder was somewhere in dir and was removed, its record too, so that nothing else finds them. It returns
// how many there were. Call it where no agent uses dir.
func EndRemoved(dir string) (int, error) {
	dir, err := filepath.EvalSymlinks(dir)
	if err != nil {
		return 0, err
	}
	var folder unix.Statx_t
	if err := unix.Statx(unix.AT_FDCWD, dir, 0, 0, &folder); err != nil {
		return 0, fmt.Errorf("look at %s: %w", dir, err)
	}
	return endAll(func(pid int) (bool, error) { return wasIn(pid, dir, &folder) })
}

// wasIn reports whether a process is a swtpm whose lock was a file in dir, by name and by file system: a container's own agent may use the
// same names. Its memory, which may hang, is looked at last: most processes are told by the name alone.
func wasIn(pid int, dir string, folder *unix.Statx_t) (bool, error) {
	name, err := os.Readlink(lockOf(pid))
	if err != nil || !strings.HasPrefix(name, dir+"/") || !strings.HasSuffix(name, "/"+lockName+" (deleted)") {
		return false, err
	}
	var lock unix.Statx_t
	err = unix.Statx(unix.AT_FDCWD, lockOf(pid), unix.AT_STATX_DONT_SYNC, 0, &lock)
	if err != nil || lock.Dev_major != folder.Dev_major || lock.Dev_minor != folder.Dev_minor {
		return false, err
	}
	return isSwtpm(pid)
}

// endHolder kills the swtpm that has the folder's lock.
func endHolder(c Config) {
	endAll(func(pid int) (bool, error) { return serves(pid, c) })
}

// endAll kills the processes that match, waits for their end, and returns how many there were. One that can't be looked at does not match.
func endAll(match func(pid int) (bool, error)) (int, error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, err
	}
	ended := 0
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid <= 1 || pid == os.Getpid() {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		found, err := look(pid, match) // the descriptor holds the process that is looked at
		if found && err == nil && unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0) == nil {
			endsWithin(fd, takeOverTimeout)
			ended++
		}
		unix.Close(fd)
	}
	return ended, nil
}

// look asks something of a process. An error: it can't be looked at.
func look(pid int, match func(pid int) (bool, error)) (bool, error) {
	type answer struct {
		found bool
		err   error
	}
	a, ok := proc.Ask(pid, func() answer {
		found, err := match(pid)
		if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.ESRCH) {
			err = nil // it has ended, or has no such descriptor
		}
		return answer{found, err}
	})
	if !ok {
		return false, fmt.Errorf("look at process %d: no answer; try again when the machine has less to do", pid)
	}
	if a.err != nil {
		return false, fmt.Errorf("look at process %d: %w; run as root with CAP_SYS_PTRACE", pid, a.err)
	}
	return a.found, nil
}

// serves reports whether a process was started for the folder: it is a swtpm, and its lock is the folder's. Only root can open that
// file, so no other process can pass for it.
func serves(pid int, c Config) (bool, error) {
	found, err := isSwtpm(pid)
	if !found || err != nil {
		return false, err
	}
	theirs, err := os.Stat(lockOf(pid))
	if err != nil {
		return false, err
	}
	ours, err := os.Stat(filepath.Join(c.Dir, lockName))
	return err == nil && os.SameFile(theirs, ours), err
}

// isSwtpm reports whether a process was started as one, by its arguments: they are in its memory.
func isSwtpm(pid int) (bool, error) {
	arguments, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return bytes.Contains(arguments, []byte("\x00"+stateOption+"\x00")), err
}

func lockOf(pid int) string { return fmt.Sprintf("/proc/%d/fd/%d", pid, lockFD) }
