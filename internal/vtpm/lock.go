package vtpm

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
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

// endHolder kills the swtpm that has the folder's lock.
func endHolder(c Config) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid <= 1 || pid == os.Getpid() {
			continue
		}
		fd, err := unix.PidfdOpen(pid, 0)
		if err != nil {
			continue
		}
		if found, err := serves(pid, c); found && err == nil { // the descriptor holds the process that was looked at
			unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
		}
		unix.Close(fd)
	}
}

// serves reports whether a process was started for the folder: it is a swtpm, and its lock is the folder's. Only root can open that
// file, so no other process can pass for it. An error: the process can't be looked at.
func serves(pid int, c Config) (bool, error) {
	type answer struct {
		found bool
		err   error
	}
	a, ok := proc.Ask(pid, func() answer {
		found, err := hasLock(pid, c)
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

func hasLock(pid int, c Config) (bool, error) {
	arguments, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	if err != nil || !bytes.Contains(arguments, []byte("\x00"+stateOption+"\x00")) {
		return false, err
	}
	theirs, err := os.Stat(fmt.Sprintf("/proc/%d/fd/%d", pid, lockFD))
	if err != nil {
		return false, err
	}
	ours, err := os.Stat(filepath.Join(c.Dir, lockName))
	return err == nil && os.SameFile(theirs, ours), err
}
