package gate

import (
	"cmp"
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"strconv"
	"sync"
	"sync/atomic"
	"syscall"
	"time"
	"unsafe"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/proc"
)

// The agent tells its guard, a message each: a byte of these and a group's name, which is a number in 8 bytes and the namespace's inode number in 4,
// little endian, or for sayAnswered a question's number in 4.
const (
	sayAdd      = 'a' // with the group's descriptor (SCM_RIGHTS)
	sayRemove   = 'r'
	sayAlive    = 'h' // alone; the guard says it back
	sayLeave    = 'l' // alone; when the agent has ended: hold the gates closed
	sayAnswered = 'n' // alone but for the number
	// And the guard the agent:
	sayAsked   = 'q' // the group, the task in 4 bytes, the question's number in 4, 1 in one if the file is to run; with the file's descriptor
	sayDropped = 'd' // alone; it took the agent for hanging and let all through
)

const (
	messageSize  = 1 + 8 + 4
	askedSize    = messageSize + 4 + 4 + 1
	answeredSize = 1 + 4

	aliveEvery = 500 * time.Millisecond
	// hangAfter is how much longer than the longest answer the agent may be silent.
	hangAfter = 2 * time.Second
	// guardHangsAfter is how long the guard may be silent. It has nothing to wait for.
	guardHangsAfter = 10 * time.Second
)

// guard is the agent's end of its guard.
type guard struct {
	config    Config
	args      []string
	stateFile string
	old       guardState // an earlier agent's
	// Dropped is called when the guard has let all through.
	dropped func()
	asked   func(name event.MountNS, task uint32, number int32, exec bool, file *os.File)
	oldest  func() (time.Time, bool)
	spoke   atomic.Int64 // when the guard last said anything, in nanoseconds since 1970

	mu   sync.Mutex
	conn int // -1: none runs
	cmd  *exec.Cmd
	stop chan struct{}
	held map[event.MountNS]*os.File
}

// guardState names a running guard.
type guardState struct {
	PID   int    `json:"pid"`
	Start string `json:"start"` // field 22 of /proc/PID/stat
}

func newGuard(c Config, args []string, stateFile string) *guard {
	g := &guard{config: c, args: args, stateFile: stateFile, conn: -1, held: make(map[event.MountNS]*os.File)}
	var err error
	if g.old, err = readGuard(stateFile); err != nil {
		c.Log.Warn("gates that it holds closed stay so; end it by hand", zap.Error(err))
	}
	return g
}

// run starts the guard if none runs.
func (g *guard) run() error {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.conn >= 0 {
		return nil
	}
	pair, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_SEQPACKET|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return fmt.Errorf("start the guard: %w", err)
	}
	end := os.NewFile(uintptr(pair[1]), "guard")
	defer end.Close()
	args := append(append([]string(nil), g.args...), fmt.Sprint(os.Getpid()), fmt.Sprint((g.config.Timeout + hangAfter).Milliseconds()))
	if g.config.Closed {
		args = append(args, "closed")
	}
	cmd := exec.Command("/proc/self/exe", args...)
	cmd.ExtraFiles = []*os.File{end} // and no output: whoever reads the agent's waits for its end
	cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
	if err := cmd.Start(); err != nil {
		unix.Close(pair[0])
		return fmt.Errorf("start the guard: %w", err)
	}
	g.conn, g.cmd, g.stop = pair[0], cmd, make(chan struct{})
	if err := g.record(); err != nil {
		g.config.Log.Warn("the next agent will not know the guard", zap.Error(err))
	}
	for ns, group := range g.held {
		if err := g.send(sayAdd, ns, group); err != nil {
			return err
		}
	}
	g.spoke.Store(time.Now().UnixNano())
	go g.tell(g.conn, cmd, g.stop)
	go g.listen(g.conn, cmd)
	return nil
}

func (g *guard) record() error {
	fields, err := proc.Stat(g.cmd.Process.Pid)
	if err != nil {
		return err
	}
	b, err := json.Marshal(guardState{g.cmd.Process.Pid, fields[proc.StatStart]})
	if err != nil {
		return err
	}
	return durable.WriteFile(g.stateFile, b)
}

// tell says that the agent answers, as long as it does.
func (g *guard) tell(conn int, cmd *exec.Cmd, stop chan struct{}) {
	tick := time.NewTicker(aliveEvery)
	defer tick.Stop()
	for {
		select {
		case <-stop:
			return
		case <-tick.C:
		}
		if at, any := g.oldest(); any && time.Since(at) > g.config.Timeout+hangAfter/2 {
			continue // a question is not answered as it must be
		}
		if err := unix.Send(conn, []byte{sayAlive}, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT); err != nil && !errors.Is(err, unix.EAGAIN) {
			return // listen sees why
		}
		if silent := time.Since(time.Unix(0, g.spoke.Load())); silent > guardHangsAfter {
			g.config.Log.Error("the gates' guard hangs", zap.Duration("silent for", silent))
			cmd.Process.Kill() // listen starts another
			return
		}
	}
}

// listen waits for what the guard says, and for its end: then another is started.
func (g *guard) listen(conn int, cmd *exec.Cmd) {
	buf, oob := make([]byte, askedSize), make([]byte, unix.CmsgSpace(4))
	for {
		n, oobn, _, _, err := unix.Recvmsg(conn, buf, oob, unix.MSG_CMSG_CLOEXEC)
		if errors.Is(err, unix.EINTR) {
			continue
		}
		if err != nil || n == 0 {
			break
		}
		g.spoke.Store(time.Now().UnixNano())
		switch {
		case buf[0] == sayDropped && g.is(conn):
			g.config.Log.Error("the gates were open: this process did not answer in time, and its guard let all through")
			g.dropped()
		case buf[0] == sayAsked && n == askedSize:
			fd, err := descriptorIn(oob[:oobn])
			if err != nil {
				g.config.Log.Error("a question without a file", zap.Error(err))
				continue
			}
			task, number := binary.LittleEndian.Uint32(buf[messageSize:]), binary.LittleEndian.Uint32(buf[messageSize+4:])
			g.asked(namespaceIn(buf), task, int32(number), buf[askedSize-1] == 1, os.NewFile(uintptr(fd), "asked"))
		}
	}
	cmd.Wait()
	g.mu.Lock()
	ended := g.conn != conn
	if !ended {
		close(g.stop)
		g.conn = -1
	}
	g.mu.Unlock()
	unix.Close(conn)
	if !ended {
		g.config.Log.Error("the gates were open: their guard was ended; another one is started")
		g.unmark() // nobody answers, and the new one has to be run
		if err := g.run(); err != nil {
			g.config.Log.Error("the gates stay open: they have no guard", zap.Error(err))
			return
		}
		g.dropped()
	}
}

// unmark takes all marks on file systems off.
func (g *guard) unmark() {
	g.mu.Lock()
	defer g.mu.Unlock()
	for ns, group := range g.held {
		err := control(group, func(fd int) error {
			return unix.FanotifyMark(fd, unix.FAN_MARK_FLUSH|unix.FAN_MARK_FILESYSTEM, 0, unix.AT_FDCWD, "")
		})
		if err != nil {
			g.config.Log.Error("take marks off", zap.Stringer("ns", ns), zap.Error(err))
		}
	}
}

func (g *guard) add(ns event.MountNS, group *os.File) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held[ns] = group
	return g.send(sayAdd, ns, group)
}

func (g *guard) remove(ns event.MountNS) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.held, ns)
	if g.conn < 0 {
		return nil
	}
	return g.send(sayRemove, ns, nil)
}

// send is called with g.mu held.
func (g *guard) send(what byte, ns event.MountNS, group *os.File) error {
	message := appendNamespace([]byte{what}, ns)
	if group == nil {
		return unix.Sendmsg(g.conn, message, nil, nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
	}
	return control(group, func(fd int) error {
		return unix.Sendmsg(g.conn, message, unix.UnixRights(fd), nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT)
	})
}

// is reports whether the guard is the one of that connection, and none that was let go of.
func (g *guard) is(conn int) bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.conn == conn
}

// answered says that the question with that number was answered.
func (g *guard) answered(number int32) {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.conn >= 0 {
		message := binary.LittleEndian.AppendUint32([]byte{sayAnswered}, uint32(number))
		if err := unix.Send(g.conn, message, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT); err != nil {
			g.config.Log.Warn("tell the guard of an answer", zap.Error(err))
		}
	}
}

// leave has the guard hold the gates closed when this process has ended.
func (g *guard) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.conn >= 0 {
		if err := unix.Send(g.conn, []byte{sayLeave}, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT); err != nil {
			g.config.Log.Error("the gates will be open", zap.Error(err))
		}
	}
}

// end lets go of the guard, which ends.
func (g *guard) end() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.conn >= 0 {
		close(g.stop)
		unix.Shutdown(g.conn, unix.SHUT_RDWR) // listen closes it
		g.conn = -1
	}
}

// endOld ends the guard of an earlier agent, which holds that one's gates closed.
func (g *guard) endOld() {
	if err := g.old.end(); err != nil {
		g.config.Log.Error("an earlier agent's gates stay closed", zap.Int("guard", g.old.PID), zap.Error(err))
	}
	g.old = guardState{}
}

// end ends the guard. One that has ended, or none, is no error.
func (s guardState) end() error {
	if s.PID == 0 {
		return nil
	}
	if fields, err := proc.Stat(s.PID); err != nil || fields[proc.StatStart] != s.Start {
		return nil // it has ended; the number may be another's by now
	}
	return unix.Kill(s.PID, unix.SIGKILL) // SIGTERM asks an agent to stop in order, and this is its program
}

// readGuard reads which guard an agent had. No file is no guard.
func readGuard(stateFile string) (guardState, error) {
	var s guardState
	b, err := os.ReadFile(stateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		err = json.Unmarshal(b, &s)
	}
	if err != nil {
		err = fmt.Errorf("read which guard an earlier agent had: %w", err)
	}
	return s, err
}

// EndGuard ends the guard that an agent left, so that the gates are open which it holds closed.
func EndGuard(stateFile string) error {
	s, err := readGuard(stateFile)
	if err != nil {
		return err
	}
	return s.end()
}

// control calls f with a file's descriptor, which stays open meanwhile. Unlike Fd it leaves the file's mode alone.
func control(file *os.File, f func(fd int) error) error {
	raw, err := file.SyscallConn()
	if err != nil {
		return err
	}
	var result error
	if err := raw.Control(func(fd uintptr) { result = f(int(fd)) }); err != nil {
		return err
	}
	return result
}

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
	case message[0] == sayAdd && len(message) == messageSize:
		fd, err := descriptorIn(oob)
		if err != nil {
			return err
		}
		w.groups[namespaceIn(message)] = fd
	case message[0] == sayRemove && len(message) == messageSize && !w.leave:
		ns := namespaceIn(message)
		if group, ok := w.groups[ns]; ok {
			delete(w.groups, ns)
			for number, of := range w.waiting {
				if of == group {
					w.respond(group, number, false)
					delete(w.waiting, number)
					unix.Close(int(number))
				}
			}
			unix.Close(group)
		}
	}
	return nil
}

// descriptorIn returns the one descriptor of a control message.
func descriptorIn(oob []byte) (int, error) {
	controls, err := unix.ParseSocketControlMessage(oob)
	if err == nil && len(controls) == 1 {
		var fds []int
		if fds, err = unix.ParseUnixRights(&controls[0]); err == nil && len(fds) == 1 {
			return fds[0], nil
		}
	}
	return -1, fmt.Errorf("a message without a descriptor: %w", cmp.Or(err, errors.ErrUnsupported))
}

func namespaceIn(message []byte) event.MountNS {
	return event.MountNS{ID: binary.LittleEndian.Uint64(message[1:]), Inum: binary.LittleEndian.Uint32(message[9:])}
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
			unix.FanotifyMark(group, unix.FAN_MARK_FLUSH|unix.FAN_MARK_FILESYSTEM, 0, unix.AT_FDCWD, "")
		}
	}
	for number, group := range w.waiting {
		w.respond(group, number, w.closed) // one that was answered meanwhile is no question any more
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
				w.respond(group, m.Fd, !ours && w.closed && isBelow(int(m.Pid), inside))
				unix.Close(int(m.Fd))
			}
		}
	}
}

// handOn gives the agent a question; false: it has too many that it did not take.
func (w *watch) handOn(ns event.MountNS, m *unix.FanotifyEventMetadata) bool {
	message := appendNamespace([]byte{sayAsked}, ns)
	message = binary.LittleEndian.AppendUint32(message, uint32(m.Pid))
	message = binary.LittleEndian.AppendUint32(message, uint32(m.Fd))
	exec := byte(0)
	if m.Mask&unix.FAN_OPEN_EXEC_PERM != 0 {
		exec = 1
	}
	return unix.Sendmsg(w.conn, append(message, exec), unix.UnixRights(int(m.Fd)), nil, unix.MSG_NOSIGNAL|unix.MSG_DONTWAIT) == nil
}

func appendNamespace(message []byte, ns event.MountNS) []byte {
	return binary.LittleEndian.AppendUint32(binary.LittleEndian.AppendUint64(message, ns.ID), ns.Inum)
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

func (w *watch) respond(group int, fd int32, deny bool) {
	r := unix.FanotifyResponse{Fd: fd, Response: unix.FAN_ALLOW}
	if deny {
		r.Response = unix.FAN_DENY
	}
	unix.Write(group, (*[unsafe.Sizeof(r)]byte)(unsafe.Pointer(&r))[:])
}
