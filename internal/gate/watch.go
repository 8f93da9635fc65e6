package gate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"strconv"
	"time"
	"unsafe"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/proc"
	"imans.dev/imans-agent/internal/standing"
)

// Guard is the guard's own work, in a process of its own: conn is the socket to the agent, whose process number is given. It takes all
// questions. Those about what the agent and its descendants open it answers at once: the agent could not, as Go runs nothing else on a
// processor whose thread waits for a child's exec, nor collects garbage. The others it hands on.
//
// While the agent says nothing for longer than patience, all who wait are let through, or turned away if closed, and the marks are taken
// off. It returns when the agent has ended; if closed, and the agent did not end its gates itself, it goes on turning all away instead,
// until it is killed.
func Guard(conn, agent int, patience time.Duration, closed bool) error {
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/null: %w", err)
	}
	standing.StayInMemory() // else it would hang where memory is short; who may not does without
	w := &watch{conn: conn, agent: agent, null: null, closed: closed, groups: make(map[event.MountNS]int), waiting: make(map[int32]int)}
	buf, oob := make([]byte, messageSize), make([]byte, unix.CmsgSpace(4))
	last, hangs := time.Now(), false
	for {
		ready, err := w.poll(conn)
		if err != nil {
			return err
		}
		if ready {
			size, oobn, _, _, err := unix.Recvmsg(conn, buf, oob, unix.MSG_CMSG_CLOEXEC)
			if errors.Is(err, unix.EINTR) {
				continue
			}
			if err != nil || size == 0 {
				return w.orphaned()
			}
			if hangs {
				hangs = false
				unix.Send(conn, []byte{sayDropped}, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
			}
			last = time.Now()
			if err := w.heard(buf[:size], oob[:oobn]); err != nil {
				return err
			}
		}
		if !hangs && time.Since(last) > patience {
			hangs = true
			w.takeOver()
		}
		w.questions(!hangs)
	}
}

// watch is what the guard knows.
type watch struct {
	conn    int // to the agent
	agent   int
	null    int
	closed  bool
	leave   bool
	groups  map[event.MountNS]int
	waiting map[int32]int // questions that were handed on, by their numbers, which are descriptors; and their groups
}

// poll waits a moment for the agent to say something, which it reports, or for a question. conn may be none: -1.
func (w *watch) poll(conn int) (bool, error) {
	fds := []unix.PollFd{{Fd: int32(conn), Events: unix.POLLIN}}
	for _, fd := range w.groups {
		fds = append(fds, unix.PollFd{Fd: int32(fd), Events: unix.POLLIN})
	}
	if _, err := unix.Poll(fds, 100); err != nil && !errors.Is(err, unix.EINTR) {
		return false, err
	}
	return fds[0].Revents != 0, nil
}

func (w *watch) heard(message, oob []byte) error {
	switch {
	case message[0] == sayAlive:
		unix.Send(w.conn, message, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT) // an agent that does not listen is noticed otherwise
	case message[0] == sayLeave:
		w.leave = true
	case message[0] == sayAnswered && len(message) == answeredSize:
		number := int32(binary.LittleEndian.Uint32(message[1:]))
		if _, ok := w.waiting[number]; ok {
			delete(w.waiting, number)
			unix.Close(int(number))
		}
	case message[0] == sayAdd:
		fd, err := descriptorIn(oob)
		if err != nil {
			return err
		}
		if len(message) != messageSize {
			unix.Close(fd)
			return nil
		}
		name := nameIn(message)
		if before, ok := w.groups[name]; ok {
			unix.Close(before)
		}
		w.groups[name] = fd
	case message[0] == sayRemove && len(message) == messageSize && !w.leave:
		ns := nameIn(message)
		if group, ok := w.groups[ns]; ok {
			delete(w.groups, ns)
			for number, of := range w.waiting {
				if of == group {
					respond(group, number, true)
					delete(w.waiting, number)
					unix.Close(int(number))
				}
			}
			unix.Close(group)
		}
	}
	return nil
}

// orphaned is what to do when the agent has ended.
func (w *watch) orphaned() error {
	if !w.closed || len(w.groups) == 0 {
		return nil // the kernel lets all through who wait
	}
	w.takeOver()
	for {
		w.questions(false)
		if _, err := w.poll(-1); err != nil {
			return err
		}
	}
}

// takeOver answers what the agent was asked and did not answer, and takes the marks off, unless closed.
func (w *watch) takeOver() {
	for _, group := range w.groups {
		if !w.closed {
			unmark(group)
		}
	}
	for number, group := range w.waiting {
		respond(group, number, !w.closed) // one that was answered meanwhile is no question any more
		unix.Close(int(number))
	}
	clear(w.waiting)
}

// questions takes all that is asked now, and hands on what the agent is to answer.
func (w *watch) questions(handOn bool) {
	buf := make([]byte, 4096)
	for ns, group := range w.groups {
		for {
			n, err := unix.Read(group, buf)
			if err != nil || n <= 0 {
				break // of an event whose file can't be opened the kernel disposes itself
			}
			for at := 0; at+int(unix.FAN_EVENT_METADATA_LEN) <= n; {
				m := (*unix.FanotifyEventMetadata)(unsafe.Pointer(&buf[at]))
				at += int(m.Event_len)
				if m.Fd < 0 {
					continue
				}
				ours := handOn && isBelow(int(m.Pid), func(pid int) bool { return pid == w.agent })
				if !ours && handOn && w.handOn(ns, m) {
					// The number is taken until it is answered, but the file is not open here any more, as one in use would be.
					unix.Dup3(w.null, int(m.Fd), unix.O_CLOEXEC)
					w.waiting[m.Fd] = group
					continue
				}
				inside := func(pid int) bool {
					of, err := proc.Namespace(pid, "mnt")
					return err == nil && of == ns.Inum
				}
				respond(group, m.Fd, ours || !w.closed || !isBelow(int(m.Pid), inside))
				unix.Close(int(m.Fd))
			}
		}
	}
}

// handOn gives the agent a question; false: it has too many that it did not take.
func (w *watch) handOn(ns event.MountNS, m *unix.FanotifyEventMetadata) bool {
	message := appendName([]byte{sayAsked}, ns)
	message = binary.LittleEndian.AppendUint32(message, uint32(m.Pid))
	message = binary.LittleEndian.AppendUint32(message, uint32(m.Fd))
	exec := byte(0)
	if m.Mask&unix.FAN_OPEN_EXEC_PERM != 0 {
		exec = 1
	}
	return unix.Sendmsg(w.conn, append(message, exec), unix.UnixRights(int(m.Fd)), nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT) == nil
}

// isBelow reports whether a task is one of those meant, or descends from one. With a file system that others have too, and without the agent,
// nobody knows better which of them are in a namespace or below it.
func isBelow(task int, meant func(pid int) bool) bool {
	const descent = 64
	status, err := readStatus(task)
	if err != nil {
		return false
	}
	pid := int(status.number("Tgid")) // the parent of a thread is not its process
	for n := 0; pid > 1 && n < descent; n++ {
		if meant(pid) {
			return true
		}
		fields, err := proc.Stat(pid)
		if err != nil {
			return false
		}
		if pid, err = strconv.Atoi(fields[proc.StatParent]); err != nil {
			return false
		}
	}
	return false
}
