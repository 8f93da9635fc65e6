package imafs

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"slices"
	"strconv"
	"strings"

	"github.com/hanwen/go-fuse/v2/fuse"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/proc"
)

// Capabilities. Source: include/uapi/linux/capability.h.
const (
	capDACOverride   = 1
	capDACReadSearch = 2
	capSysAdmin      = 21
	capMACAdmin      = 33
)

// What a caller wants of a file, as mode bits.
const (
	wantRead  = 4
	wantWrite = 2
	wantExec  = 1
)

// task is a caller with what decides its rights. The task waits for the answer meanwhile, so its number stays its own.
type task struct {
	Caller
	groups []uint32
	caps   uint64 // effective, in its own user namespace
}

// callerNS returns the inode number of the caller's mount namespace. EACCES: the task is none that the agent can see.
func callerNS(tid uint32) (uint32, error) { return namespaceOf(tid, "mnt") }

func namespaceOf(tid uint32, kind string) (uint32, error) {
	n, err := proc.Namespace(int(tid), kind)
	if tid == 0 || errors.As(err, new(*fs.PathError)) {
		return 0, unix.EACCES
	}
	return n, err
}

// callerMountNS returns the caller's mount namespace, with its unique id where the kernel tells.
func callerMountNS(tid uint32) (event.MountNS, error) {
	inum, err := callerNS(tid)
	if err != nil {
		return event.MountNS{}, err
	}
	fd, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", tid), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return event.MountNS{}, unix.EACCES
	}
	defer unix.Close(fd)
	return event.MountNS{Inum: inum, ID: mountNSID(fd)}, nil
}

// newTask reads what there is to know of the task that made a request.
func newTask(c fuse.Caller) (*task, error) {
	ns, err := callerMountNS(c.Pid)
	if err != nil {
		return nil, err
	}
	userNS, err := namespaceOf(c.Pid, "user")
	if err != nil {
		return nil, err
	}
	t := &task{Caller: Caller{TID: c.Pid, NS: ns, UID: c.Uid, GID: c.Gid, UserNS: userNS}}
	if t.UIDs, err = readIDMap(c.Pid, "uid_map"); err != nil {
		return nil, err
	}
	if t.GIDs, err = readIDMap(c.Pid, "gid_map"); err != nil {
		return nil, err
	}
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", t.TID))
	if err != nil {
		return nil, unix.EACCES
	}
	return t, t.parseStatus(string(status))
}

// parseStatus takes what the text of a status file tells.
func (t *task) parseStatus(text string) (err error) {
	for line := range strings.Lines(text) {
		name, value, _ := strings.Cut(line, ":")
		value = strings.TrimSpace(value)
		switch name {
		case "Tgid":
			_, err = fmt.Sscan(value, &t.TGID)
		case "CapEff":
			t.caps, err = strconv.ParseUint(value, 16, 64)
		case "Groups":
			t.groups, err = parseGroups(value)
		}
		if err != nil {
			return fmt.Errorf("read status of task %d: %s: %w", t.TID, name, err)
		}
	}
	return nil
}

func parseGroups(value string) (groups []uint32, err error) {
	for word := range strings.FieldsSeq(value) {
		gid, err := strconv.ParseUint(word, 10, 32)
		if err != nil {
			return nil, err
		}
		groups = append(groups, uint32(gid))
	}
	return groups, nil
}

// readIDMap reads a uid_map or gid_map. Its outer ids are the host's, since the agent reads it.
func readIDMap(tid uint32, name string) (ima.IDMap, error) {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", tid, name))
	if err != nil {
		return nil, unix.EACCES
	}
	m, err := ima.ParseIDMap(b)
	if err != nil {
		return nil, fmt.Errorf("read %s of task %d: %w", name, tid, err)
	}
	return m, nil
}

func (t *task) has(capability int) bool { return t.caps&(1<<capability) != 0 }

// may checks a mode as the kernel does: owner, group, others, then the capabilities over inodes whose ids the caller's user
// namespace maps. Source: fs/namei.c, generic_permission; kernel/capability.c, capable_wrt_inode_uidgid.
func (t *task) may(o Owner, mode, want uint32) error {
	all := mode
	switch {
	case t.UID == o.UID:
		mode >>= 6
	case t.GID == o.GID || slices.Contains(t.groups, o.GID):
		mode >>= 3
	}
	if mode&want == want {
		return nil
	}
	if want&wantExec != 0 && all&0o111 == 0 {
		return unix.EACCES
	}
	if t.UIDs.FromHost(o.UID) != ima.NoID && t.GIDs.FromHost(o.GID) != ima.NoID &&
		(t.has(capDACOverride) || want == wantRead && t.has(capDACReadSearch)) {
		return nil
	}
	return unix.EACCES
}

// administers reports whether the caller has CAP_SYS_ADMIN or CAP_MAC_ADMIN over the user namespace that owns its mount
// namespace: it has it where it is, and is there or further out.
func (t *task) administers() bool {
	if !t.has(capSysAdmin) && !t.has(capMACAdmin) {
		return false
	}
	mnt, err := unix.Open(fmt.Sprintf("/proc/%d/ns/mnt", t.TID), unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return false
	}
	defer unix.Close(mnt)
	user, err := unix.IoctlRetInt(mnt, unix.NS_GET_USERNS)
	for err == nil {
		var st unix.Stat_t
		if err = unix.Fstat(user, &st); err == nil && uint32(st.Ino) == t.UserNS {
			unix.Close(user)
			return true
		}
		outer := -1
		if err == nil {
			outer, err = unix.IoctlRetInt(user, unix.NS_GET_PARENT)
		}
		unix.Close(user)
		user = outer
	}
	return false
}
