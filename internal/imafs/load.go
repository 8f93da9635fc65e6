package imafs

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"time"
	"unsafe"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"
)

// loadTimeout bounds how long a write waits for the file system of the file that it names.
const loadTimeout = 10 * time.Second

// load takes the rules of a file, which who writes finds in its own root with its own rights. Its file system may be in the hands
// of whoever would like to hold up the agent: it gets loadTimeout, and the namespace no other load until it answers.
func (w *policyWriter) load(ctx context.Context, path string) error {
	c, ok := fuse.FromContext(ctx)
	if !ok {
		return unix.EACCES
	}
	writer, err := newTask(*c)
	if err != nil {
		return err
	}
	if !w.open.startLoading(w.task.NS) {
		return unix.EBUSY
	}
	root, err := unix.Open(fmt.Sprintf("/proc/%d/root", c.Pid), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		w.open.stopLoading(w.task.NS)
		return fmt.Errorf("open the root of task %d: %w", c.Pid, err)
	}
	type result struct {
		text []byte
		err  error
	}
	done := make(chan result, 1)
	go func() { // ends when the file system answers, or with it
		defer w.open.stopLoading(w.task.NS)
		defer unix.Close(root)
		text, err := readAs(writer, root, path)
		done <- result{text, err}
	}()
	timeout := time.After(loadTimeout)
	select {
	case r := <-done:
		if r.err == nil && bytes.IndexByte(r.text, 0) >= 0 {
			r.err = unix.EINVAL // the kernel takes no rule beyond it
		}
		if r.err != nil {
			return fmt.Errorf("load %q: %w", path, r.err)
		}
		return w.add(bytes.TrimSuffix(r.text, []byte("\n")))
	case <-ctx.Done():
		return ctx.Err()
	case <-timeout:
		return unix.ETIMEDOUT
	}
}

// readAs reads a regular file below a root folder with a task's file system ids. The thread that takes them on ends with them.
func readAs(t *task, root int, path string) ([]byte, error) {
	runtime.LockOSThread() // and never unlocked
	if err := takeIDs(t); err != nil {
		return nil, err
	}
	// Only looked at first: opening a device or a FIFO has effects.
	found, err := unix.Openat2(root, path, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, err
	}
	defer unix.Close(found)
	var st unix.Stat_t
	switch err := unix.Fstat(found, &st); {
	case err != nil:
		return nil, err
	case st.Mode&unix.S_IFMT != unix.S_IFREG:
		return nil, unix.EACCES
	case st.Size == 0:
		return nil, unix.EINVAL
	case st.Size > policyMax:
		return nil, unix.EFBIG
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/self/fd/%d", found), unix.O_RDONLY|unix.O_NONBLOCK|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), path)
	defer f.Close()
	text, err := io.ReadAll(io.LimitReader(f, policyMax+1))
	if err == nil && len(text) > policyMax {
		err = unix.EFBIG
	}
	return text, err
}

// takeIDs gives this thread alone the groups and file system ids of a task; an fsuid that is not 0 also takes the capabilities
// over files away.
func takeIDs(t *task) error {
	var first unsafe.Pointer
	if len(t.groups) > 0 {
		first = unsafe.Pointer(&t.groups[0])
	}
	if _, _, no := unix.RawSyscall(unix.SYS_SETGROUPS, uintptr(len(t.groups)), uintptr(first), 0); no != 0 {
		return fmt.Errorf("take on groups: %w", no)
	}
	if err := unix.Setfsgid(int(t.GID)); err != nil {
		return fmt.Errorf("take on a file system group: %w", err)
	}
	if err := unix.Setfsuid(int(t.UID)); err != nil {
		return fmt.Errorf("take on a file system user: %w", err)
	}
	uid, err := unix.SetfsuidRetUid(-1)
	if err != nil || uint32(uid) != t.UID {
		return unix.EACCES
	}
	return nil
}
