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
)

// takeOverTimeout is ample for a process that is just starting, and for one to die.
const takeOverTimeout = 5 * time.Second

// takeOver locks an instance's folder, so that two never serve it. A process that has the lock is one that an earlier agent
// started and did not live to record: nobody has used it, so it is ended.
func takeOver(ctx context.Context, c Config) (*os.File, error) {
	lock, err := os.OpenFile(filepath.Join(c.Dir, lockName), os.O_RDWR|os.O_CREATE, 0o600)
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
			endUnrecorded(c)
		}
		select {
		case <-ctx.Done():
			err = fmt.Errorf("%s is in use: lock: %w; end the process that `fuser %s` names", c.Dir, err, lock.Name())
			return nil, errors.Join(err, lock.Close())
		case <-time.After(5 * time.Millisecond):
		}
	}
}

// endUnrecorded kills the process that told its number in the folder, if it was started for the folder.
func endUnrecorded(c Config) {
	b, err := os.ReadFile(filepath.Join(c.Dir, pidName))
	if err != nil {
		return // it has not got that far
	}
	pid, err := strconv.Atoi(strings.TrimSpace(string(b)))
	if err != nil || pid <= 1 {
		return
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if err != nil {
		return
	}
	defer unix.Close(fd)
	if serves(pid, c) { // the descriptor holds the process that was looked at
		unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0)
	}
}

// serves reports whether a process was started for the folder.
func serves(pid int, c Config) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cmdline", pid))
	return err == nil && bytes.Contains(b, []byte(stateOption(c)+"\x00"))
}

// stateOption is the argument that says where swtpm keeps its state.
func stateOption(c Config) string { return "dir=" + c.Dir + ",mode=0600" }
