package gate

import (
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/proc"
)

// task is what is known of who opens a file. It is held up, so it stays so.
type task struct {
	inum    uint32 // of its mount namespace
	process event.Process
	subject event.Subject
	caps    uint64 // effective
}

func readTask(tid uint32) (task, error) {
	status, err := readStatus(int(tid))
	if err != nil {
		return task{}, err
	}
	t := task{process: event.Process{TGID: uint32(status.number("Tgid")), PID: tid}, caps: status.hex("CapEff")}
	uids, gids := status.numbers("Uid"), status.numbers("Gid")
	if len(uids) < 3 || len(gids) < 3 {
		return task{}, fmt.Errorf("read status of task %d: no ids", tid)
	}
	t.subject = event.Subject{UID: uids[0], EUID: uids[1], SUID: uids[2], GID: gids[0], EGID: gids[1], SGID: gids[2]}
	t.inum, err = proc.Namespace(int(tid), "mnt")
	return t, err
}

// status is /proc/PID/status. Ids are those of the reader's user namespace, the initial one.
type status map[string]string

func readStatus(pid int) (status, error) {
	text, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		return nil, err
	}
	return parseStatus(string(text)), nil
}

func parseStatus(text string) status {
	s := make(status)
	for line := range strings.Lines(text) {
		if name, value, ok := strings.Cut(strings.TrimSuffix(line, "\n"), ":"); ok {
			s[name] = strings.TrimSpace(value)
		}
	}
	return s
}

func (s status) number(name string) uint64 {
	n, _ := strconv.ParseUint(s[name], 10, 64) // fields of the kernel's; the callers check what they need
	return n
}

func (s status) hex(name string) uint64 {
	n, _ := strconv.ParseUint(s[name], 16, 64)
	return n
}

func (s status) numbers(name string) []uint32 {
	var all []uint32
	for _, field := range strings.Fields(s[name]) {
		n, err := strconv.ParseUint(field, 10, 32)
		if err != nil {
			return nil
		}
		all = append(all, uint32(n))
	}
	return all
}

// describe makes of the question what the hook will see when the open has gone on. What only the kernel side can know is left out: the
// version of the content and the layer of an overlayfs file.
func (q *question) describe(t task) (*Asked, error) {
	var st unix.Statx_t
	want := unix.STATX_BASIC_STATS
	if err := unix.Statx(int(q.fd), "", unix.AT_EMPTY_PATH, want, &st); err != nil {
		return nil, fmt.Errorf("stat the file: %w", err)
	}
	var fs unix.Statfs_t
	if err := unix.Fstatfs(int(q.fd), &fs); err != nil {
		return nil, fmt.Errorf("stat its file system: %w", err)
	}
	name, err := nameSeenBy(q.fd, t.process.PID)
	if err != nil {
		return nil, fmt.Errorf("find its path: %w", err)
	}
	dev := st.Dev_major<<20 | st.Dev_minor
	e := &event.File{
		Process: t.process, Subject: t.subject, Func: q.function(kindOf(q.file)), Nlink: st.Nlink, Path: name,
		SeenIno: st.Ino, SeenDev: dev, FOwner: st.Uid, FGroup: st.Gid,
		SeenFS: event.FileSystem{Magic: uint64(fs.Type), Name: q.gate.fsName(dev, uint64(fs.Type)), UUID: fsUUID(q.fd)},
		Content: event.Content{
			Dev: dev, Ino: st.Ino, Size: st.Size, CtimeSec: st.Ctime.Sec, CtimeNsec: st.Ctime.Nsec,
		},
	}
	e.RealFS = e.SeenFS
	if t.caps&(1<<unix.CAP_SETUID) != 0 {
		e.Flags |= event.SetUIDCap
	}
	if t.caps&(1<<unix.CAP_SETGID) != 0 {
		e.Flags |= event.SetGIDCap
	}
	if st.Nlink == 0 {
		e.Flags |= event.Unlinked
	}
	return &Asked{Inum: t.inum, Event: e, File: q.file}, nil
}

// fsName returns what rules call a file system that is asked about: what it is mounted as. Files of two have other devices than their mount,
// those of a subvolume and of a layer. Source: include/uapi/linux/magic.h, and each file system's file_system_type.
func (g *gate) fsName(dev uint32, magic uint64) string {
	g.mu.Lock()
	name, ok := g.marked[dev]
	g.mu.Unlock()
	switch {
	case ok:
		return name
	case magic == unix.BTRFS_SUPER_MAGIC:
		return "btrfs"
	case magic == unix.OVERLAYFS_SUPER_MAGIC:
		return "overlay"
	}
	return ""
}

// fsUUID returns a file system's UUID, or zeros where the kernel does not tell it (before 6.9).
func fsUUID(fd int32) (uuid [16]byte) {
	const getUUID = 0x80111500 // FS_IOC_GETFSUUID: _IOR(0x15, 0, struct fsuuid2)
	var answer struct {
		len  uint8
		uuid [16]byte
	}
	if err := ioctl(fd, getUUID, &answer); err == nil && answer.len == 16 {
		uuid = answer.uuid
	}
	return uuid
}
