// Package durable makes files and folders that are still there after a crash of the machine.
//
// A file's content is durable after fsync of the file, its name after fsync of its folder. Mkdir and WriteFile do both before
// they return nil. WriteFile replaces: a crash leaves the old content or the new, whole, never a part of either. OpenLog does it
// for the name; the content of a log is its writer's to sync.
//
// BUG: after a failed fsync Linux may mark the pages clean though they never reached the disk. So an error here means that the
// state is unknown, and trying fsync again proves nothing; the caller has to write anew.
package durable

import (
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/fault"
)

// Mkdir makes a folder and its parents with mode 0700, and syncs each folder that gained an entry. One that exists is no error;
// its entry is synced all the same, as whoever made it may have crashed before that.
func Mkdir(dir string) error {
	made, err := mkdir(dir)
	if err != nil || made {
		return err
	}
	return SyncDir(filepath.Dir(dir))
}

// mkdir reports whether it made the folder, durable.
func mkdir(dir string) (made bool, err error) {
	st, err := os.Stat(dir)
	if err == nil && st.IsDir() {
		return false, nil
	} else if err == nil {
		return false, fmt.Errorf("make folder %s: a file stands in its place", dir)
	} else if !errors.Is(err, os.ErrNotExist) {
		return false, fmt.Errorf("make folder: %w", err)
	}
	parent := filepath.Dir(dir)
	if _, err := mkdir(parent); err != nil {
		return false, err
	}
	if err := os.Mkdir(dir, 0o700); err != nil && !errors.Is(err, os.ErrExist) {
		return false, fmt.Errorf("make folder: %w", err)
	}
	return true, SyncDir(parent)
}

// ErrLocked means that another process has the log open.
var ErrLocked = errors.New("in use by another process")

// OpenLog opens a file to append to, with mode 0600 and a durable name if it is new, and locks it until it is closed or the
// process ends. ErrLocked: someone else has it.
func OpenLog(path string) (*os.File, error) {
	f, err := os.OpenFile(path, os.O_RDWR|os.O_CREATE, 0o600)
	if err != nil {
		return nil, err
	}
	err = unix.Flock(int(f.Fd()), unix.LOCK_EX|unix.LOCK_NB)
	if errors.Is(err, unix.EWOULDBLOCK) {
		err = ErrLocked
	}
	if err == nil {
		err = SyncDir(filepath.Dir(path))
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("open %s: %w", path, err), f.Close())
	}
	return f, nil
}

// WriteFile writes a file with mode 0600 in place of any other of that name.
func WriteFile(path string, content []byte) (err error) {
	f, err := os.CreateTemp(filepath.Dir(path), "."+filepath.Base(path)+".*")
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	defer func() {
		if err != nil {
			os.Remove(f.Name())
		}
	}()
	_, err = f.Write(content)
	if err == nil {
		err = f.Sync()
	}
	if err2 := f.Close(); err == nil {
		err = err2
	}
	// Commit point: before the rename a crash leaves the old file, after it the new one.
	if err == nil {
		fault.FileWritten.Pass()
		err = os.Rename(f.Name(), path)
	}
	if err != nil {
		return fmt.Errorf("write %s: %w", path, err)
	}
	fault.FileReplaced.Pass()
	return SyncDir(filepath.Dir(path))
}

// Troubled reports whether an error is one of the disk's or the file system's, which may go away: it is full, it has errors, it is
// mounted read-only after one.
func Troubled(err error) bool {
	return isFull(err) || errors.Is(err, unix.EIO) || errors.Is(err, unix.EROFS)
}

func isFull(err error) bool { return errors.Is(err, unix.ENOSPC) || errors.Is(err, unix.EDQUOT) }

// Advice says what to do about an error of writing.
func Advice(err error) string {
	switch {
	case isFull(err):
		return "make room on its disk"
	case errors.Is(err, unix.EROFS):
		return "its file system is read-only: see why (dmesg), stop the agent, check it (fsck), mount it anew, start the agent"
	}
	return "look for errors of its disk (dmesg); if its file system has suffered, stop the agent, check it (fsck), mount it anew, start the agent"
}

// SyncDir makes the entries of a folder durable. The first sync may report an error from before this process began, of what another one
// wrote: then the folder is changed, so that the kernel writes it anew, and synced again. That is rewriting all of it where it is one block,
// as a folder of some hundred entries is.
func SyncDir(dir string) error {
	err := syncDir(dir)
	if !errors.Is(err, unix.EIO) {
		return err
	}
	made, err2 := os.MkdirTemp(dir, ".sync.*") // an empty folder is passed over where a crash leaves it
	if err2 == nil {
		err2 = os.Remove(made)
	}
	if err2 != nil {
		return errors.Join(err, err2)
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return fmt.Errorf("sync folder: %w", err)
	}
	defer d.Close()
	if err := d.Sync(); err != nil {
		return fmt.Errorf("sync folder %s: %w", dir, err)
	}
	return nil
}
