package measure

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/durable"
)

// restoringName is what a log is called while it is written anew.
const restoringName = LogName + ".restoring"

// Restore writes the log anew if it is no longer where it was: somebody has removed it, or its folder, or moved one away. The list has the
// bytes as long as it is open; the next Open would not. It reports whether that was so. Errors: the disk's, and that another file
// stands there, which is not touched; the list goes on in any case. While the log is being written to it does nothing.
func (l *List) Restore() (restored bool, err error) {
	if !l.writing.TryLock() {
		return false, nil
	}
	defer l.writing.Unlock()
	if l.hasEnded() {
		return false, nil
	}
	path := filepath.Join(l.config.Dir, LogName)
	there, err := os.Lstat(path)
	if err == nil {
		ours, err := l.file.Stat()
		if err == nil && !os.SameFile(there, ours) {
			err = fmt.Errorf("another file stands in place of the log %s: move it away, and the log is written anew", path)
		}
		return false, err
	}
	if !errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("look for the log: %w", err)
	}
	if err := l.restore(path); err != nil {
		return false, fmt.Errorf("write the removed log anew: %w; %s", err, durable.Advice(err))
	}
	return true, nil
}

// restore writes what is logged to a new file, and has all who read and write the log go on with that.
func (l *List) restore(path string) error {
	if err := durable.Mkdir(l.config.Dir); err != nil {
		return err
	}
	part := filepath.Join(l.config.Dir, restoringName)
	if err := os.Remove(part); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	f, err := durable.OpenLog(part)
	if err != nil {
		return err
	}
	l.mu.Lock()
	size := l.loggedSize
	l.mu.Unlock()
	_, err = io.Copy(f, io.NewSectionReader(l.file, 0, size))
	if err == nil {
		err = f.Sync()
	}
	// Commit point: a crash before this leaves no log, one after it the whole.
	if err == nil {
		err = os.Rename(part, path)
	}
	if err == nil {
		err = durable.SyncDir(l.config.Dir)
	}
	if err == nil {
		// The descriptor stays the same: whoever reads by it does not notice.
		err = unix.Dup3(int(f.Fd()), int(l.file.Fd()), unix.O_CLOEXEC)
	}
	return errors.Join(err, f.Close())
}
