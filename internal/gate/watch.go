package gate

import (
	"encoding/binary"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"strconv"
	"sync"
	"sync/atomic"
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
// While the agent says nothing for longer than patience, all who wait are let through, and the marks are taken off; at a gate that is closed
// they are turned away. It returns when the agent has ended; where gates are closed, and the agent did not end them itself, it goes on turning
// all away instead, until it is killed.
func Guard(conn, agent int, patience time.Duration) error {
	null, err := unix.Open("/dev/null", unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("open /dev/null: %w", err)
	}
	standing.StayInMemory() // else it would hang where memory is short; who may not does without
	w := &watch{
		conn: conn, agent: agent, null: null, groups: make(map[event.MountNS]*group), waiting: make(map[int32]waiting),
		messages: make(chan message), asked: make(chan asked),
	}
	go w.listen()
	tick := time.NewTicker(readerHangsAfter / 2)
	defer tick.Stop()
	last, hangs := time.Now(), false
	for {
		select {
		case m, ok := <-w.messages:
			if !ok {
				return w.orphaned(tick.C)
			}
			if m.text[0] == sayAlive { // nothing else means that it answers what it is asked
				if hangs {
					hangs = false
					unix.Send(conn, []byte{sayDropped}, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
				}
				last = time.Now()
			}
			if err := w.heard(m.text, m.control); err != nil {
				return err
			}
		case a := <-w.asked:
			w.questions(a, !hangs)
		case <-tick.C:
			w.addReaders()
			w.closeEnded(time.Now())
		}
		if !hangs && time.Since(last) > patience {
			hangs = true
			w.takeOver()
		}
	}
}

// watch is what the guard knows. One goroutine uses it, but for the channels.
type watch struct {
	conn     int // to the agent
	agent    int
	null     int
	leave    bool
	groups   map[event.MountNS]*group
	ended    []*group          // that are to be closed
	waiting  map[int32]waiting // questions that were handed on, by their numbers, which are descriptors
	messages chan message      // of the agent; closed when it has ended
	asked    chan asked
}

// waiting is a question that was handed on.
type waiting struct {
	group *group
	since time.Time
}

// message is one of the agent's, with what came with it.
type message struct{ text, control []byte }

// asked are questions of a group, as read from it.
type asked struct {
	group     *group
	questions []byte
}

// group is one of the agent's, and who reads it. Reading a question opens its file, which may be of a file system that somebody lets hang: each
// group has a reader of its own, and another where one hangs.
type group struct {
	name    event.MountNS
	fd      int
	closed  bool
	readers []*reader
	ended   time.Time // when the agent let it go
}

// reader is a goroutine that reads a group by a descriptor of its own.
type reader struct {
	file  *os.File
	since atomic.Pointer[time.Time] // when its read began; nil: it waits for something to read
}

const (
	readerHangsAfter = 200 * time.Millisecond
	readersMax       = 64
)

// listen takes the agent's messages.
func (w *watch) listen() {
	defer close(w.messages)
	for {
		text, control := make([]byte, messageSize), make([]byte, unix.CmsgSpace(4))
		n, controlled, _, _, err := unix.Recvmsg(w.conn, text, control, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			return
		}
		w.messages <- message{text[:n], control[:controlled]}
	}
}

// addReader starts one.
func (w *watch) addReader(g *group) error {
	fd, err := unix.FcntlInt(uintptr(g.fd), unix.F_DUPFD_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("another descriptor of a group: %w", err)
	}
	r := &reader{file: os.NewFile(uintptr(fd), "group")} // which does not block, so it waits without a thread
	raw, err := r.file.SyscallConn()
	if err != nil {
		return errors.Join(err, r.file.Close())
	}
	g.readers = append(g.readers, r)
	go func() {
		for {
			buf := make([]byte, 4096)
			var n int
			var err error
			ended := raw.Read(func(fd uintptr) bool {
				now := time.Now()
				r.since.Store(&now)
				n, err = unix.Read(int(fd), buf)
				r.since.Store(nil)
				return !errors.Is(err, unix.EAGAIN)
			})
			if ended != nil || err == nil && n == 0 {
				return
			}
			if err == nil { // of an event whose file can't be opened the kernel disposes itself
				w.asked <- asked{g, buf[:n]}
			}
		}
	}()
	return nil
}

// all returns all groups, those that are to be closed among them.
func (w *watch) all() []*group { return append(slices.Collect(maps.Values(w.groups)), w.ended...) }

// hangs reports whether all readers do.
func (g *group) hangs() bool {
	now := time.Now()
	return !slices.ContainsFunc(g.readers, func(r *reader) bool { return !r.hangs(now) })
}

func (r *reader) hangs(now time.Time) bool {
	since := r.since.Load()
	return since != nil && now.Sub(*since) >= readerHangsAfter
}

// addReaders gives each group one more whose readers all hang. One that has too many asks nothing more: the hooks see what it would have asked.
func (w *watch) addReaders() {
	for _, g := range w.all() {
		if !g.hangs() {
			continue
		}
		if len(g.readers) < readersMax {
			w.addReader(g) // tried again, if it fails
		} else {
			unmark(g.fd)
		}
	}
}

// letGo has a group ask nothing more, lets all through who wait at it, and closes it later: who waits at another group for the answer about a file that
// both watch, holds this one, and the kernel lets whoever closes its last descriptor wait for that answer, be it this process, the agent, or a child
// of the agent's before its exec. Source: fs/notify/mark.c, fsnotify_prepare_user_wait; fs/notify/group.c, fsnotify_destroy_group.
func (w *watch) letGo(g *group) {
	delete(w.groups, g.name)
	unmark(g.fd)
	for number, q := range w.waiting {
		if q.group == g {
			respond(g.fd, number, true)
			w.forget(number)
		}
	}
	g.ended = time.Now()
	w.ended = append(w.ended, g)
}

// forget is called when a question is none any more.
func (w *watch) forget(number int32) {
	delete(w.waiting, number)
	unix.Close(int(number))
}

// unreadFor is how long a question may be on its way to this process.
const unreadFor = 100 * time.Millisecond

// closeEnded closes the groups that were let go, once nobody waits who was there before. One whose question is not read, as its reader hangs, is not
// known here: so the close is not waited for.
func (w *watch) closeEnded(now time.Time) {
	oldest := now
	for _, q := range w.waiting {
		if q.since.Before(oldest) {
			oldest = q.since
		}
	}
	w.ended = slices.DeleteFunc(w.ended, func(g *group) bool {
		if g.ended.Add(unreadFor).After(oldest) || g.oneHangs(now) {
			return false
		}
		go g.close()
		return true
	})
}

// close ends the readers, when they come back, and the group, if the agent has closed it, too.
func (g *group) close() {
	for _, r := range g.readers {
		r.file.Close()
	}
	unix.Close(g.fd)
}

func (w *watch) heard(text, control []byte) error {
	switch {
	case text[0] == sayAlive:
		unix.Send(w.conn, text, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT) // an agent that does not listen is noticed otherwise
	case text[0] == sayLeave:
		w.leave = true
	case text[0] == sayAnswered && len(text) == answeredSize:
		number := int32(binary.LittleEndian.Uint32(text[1:]))
		if _, ok := w.waiting[number]; ok {
			w.forget(number)
		}
	case text[0] == sayAdd || text[0] == sayAddClosed:
		fd, err := descriptorIn(control)
		if err != nil {
			return err
		}
		if len(text) != messageSize {
			unix.Close(fd)
			return nil
		}
		name := nameIn(text)
		if before, ok := w.groups[name]; ok {
			w.letGo(before)
		}
		g := &group{name: name, fd: fd, closed: text[0] == sayAddClosed}
		w.groups[name] = g
		return w.addReader(g)
	case text[0] == sayRemove && len(text) == messageSize:
		name := nameIn(text)
		if g, ok := w.groups[name]; ok && !(g.closed && w.leave) {
			w.letGo(g)
		}
	}
	return nil
}

// orphaned is what to do when the agent has ended. A reader that hangs keeps this process, and so all groups, from ending: the marks have to be
// off by then, and what is asked still is let through.
func (w *watch) orphaned(tick <-chan time.Time) error {
	w.takeOver()
	for w.anyIsClosed() || w.anyHangs() {
		select {
		case a := <-w.asked:
			w.questions(a, false)
		case <-tick:
			w.addReaders()
		}
	}
	w.closeAll()
	return nil
}

// closeAll closes all groups at once, after the agent, and the kernel lets all through who wait. In turns, as at an exit, the first could wait
// for a question of the next, for ever (see letGo).
func (w *watch) closeAll() {
	groups := w.all()
	if len(groups) == 0 {
		return
	}
	const patience = 2 * time.Second
	for began := time.Now(); os.Getppid() == w.agent && time.Since(began) < patience; {
		time.Sleep(time.Millisecond)
	}
	closed := make(chan struct{})
	go func() {
		var all sync.WaitGroup
		for _, g := range groups {
			all.Go(g.close)
		}
		all.Wait()
		close(closed)
	}()
	select {
	case <-closed:
	case <-time.After(patience):
	}
}

func (w *watch) anyIsClosed() bool {
	for _, g := range w.groups {
		if g.closed {
			return true
		}
	}
	return false
}

// anyHangs reports whether one of the readers does.
func (w *watch) anyHangs() bool {
	return slices.ContainsFunc(w.all(), func(g *group) bool { return g.oneHangs(time.Now()) })
}

// oneHangs reports whether one of the readers does.
func (g *group) oneHangs(now time.Time) bool {
	return slices.ContainsFunc(g.readers, func(r *reader) bool { return r.hangs(now) })
}

// takeOver answers what the agent was asked and did not answer, and takes the marks off, but those of closed gates.
func (w *watch) takeOver() {
	for _, g := range w.groups {
		if !g.closed {
			unmark(g.fd)
		}
	}
	for number, q := range w.waiting {
		respond(q.group.fd, number, !q.group.closed) // one that was answered meanwhile is no question any more
		w.forget(number)
	}
}

// questions hands on what the agent is to answer, and answers the rest.
func (w *watch) questions(a asked, handOn bool) {
	for at := 0; at+int(unix.FAN_EVENT_METADATA_LEN) <= len(a.questions); {
		m := (*unix.FanotifyEventMetadata)(unsafe.Pointer(&a.questions[at]))
		at += int(m.Event_len)
		if m.Fd < 0 {
			continue
		}
		let := !a.group.ended.IsZero() || handOn && isBelow(int(m.Pid), func(pid int) bool { return pid == w.agent })
		if !let && handOn && w.handOn(a.group.name, m) {
			// The number is taken until it is answered, but the file is not open here any more, as one in use would be.
			unix.Dup3(w.null, int(m.Fd), unix.O_CLOEXEC)
			w.waiting[m.Fd] = waiting{a.group, time.Now()}
			continue
		}
		inside := func(pid int) bool {
			of, err := proc.Namespace(pid, "mnt")
			return err == nil && of == a.group.name.Inum
		}
		respond(a.group.fd, m.Fd, let || !a.group.closed || !isBelow(int(m.Pid), inside))
		unix.Close(int(m.Fd))
	}
}

// handOn gives the agent a question; false: it has too many that it did not take.
func (w *watch) handOn(ns event.MountNS, m *unix.FanotifyEventMetadata) bool {
	message := handedOn{ns, uint32(m.Pid), m.Fd, m.Mask&unix.FAN_OPEN_EXEC_PERM != 0}.append(nil)
	return unix.Sendmsg(w.conn, message, unix.UnixRights(int(m.Fd)), nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT) == nil
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
