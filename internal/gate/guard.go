package gate

import (
	"encoding/binary"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"os/exec"
	"sync"
	"sync/atomic"
	"syscall"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/proc"
)

const (
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
	// dropped is called when the guard has let all through.
	dropped func()
	asked   func(h handedOn, file *os.File)
	oldest  func() (time.Time, bool)
	spoke   atomic.Pointer[time.Time] // when the guard last said anything

	mu   sync.Mutex
	conn int // -1: none runs
	cmd  *exec.Cmd
	stop chan struct{}
	held map[event.MountNS]guarded // by their names
}

// guarded is a group as the guard knows it.
type guarded struct {
	group  *os.File
	closed bool
}

// guardState names a running guard.
type guardState struct {
	PID   int    `json:"pid"`
	Start string `json:"start"` // field 22 of /proc/PID/stat
}

func newGuard(c Config, args []string, stateFile string) *guard {
	g := &guard{config: c, args: args, stateFile: stateFile, conn: -1, held: make(map[event.MountNS]guarded)}
	var err error
	if g.old, err = readGuard(stateFile); err != nil {
		c.Log.Warn("gates that it holds closed stay so; end it by hand", zap.Error(err))
	}
	if pid := g.old.PID; pid != 0 && heldUp(pid) { // no gate of this agent's has asked anything yet
		c.Log.Error("an earlier agent's guard was killed, and what waits at its gates will wait for ever: kill it", zap.Int("guard", pid), zap.Ints("kill", Waiting()))
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
	// The guard takes one message at a time, and may have many gates to learn of: it is waited for.
	limit := unix.NsecToTimeval(guardHangsAfter.Nanoseconds())
	if err := unix.SetsockoptTimeval(pair[0], unix.SOL_SOCKET, unix.SO_SNDTIMEO, &limit); err != nil {
		unix.Close(pair[0])
		return fmt.Errorf("start the guard: %w", err)
	}
	args := append(append([]string(nil), g.args...), fmt.Sprint(os.Getpid()), fmt.Sprint((g.config.Timeout + hangAfter).Milliseconds()))
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
	g.heard()
	go g.tell(g.conn, cmd, g.stop)
	go g.listen(g.conn, cmd)
	for name, group := range g.held {
		if err := g.sendGroup(name, group); err != nil {
			close(g.stop)
			g.conn = -1 // listen sees its end, and closes the socket
			return errors.Join(fmt.Errorf("tell the guard of a gate: %w", err), cmd.Process.Kill())
		}
	}
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
		if silent := time.Since(*g.spoke.Load()); silent > guardHangsAfter {
			g.config.Log.Error("the gates' guard hangs", zap.Duration("silent for", silent))
			cmd.Process.Kill()
			unix.Shutdown(conn, unix.SHUT_RDWR) // it may not end by that: listen starts another
			return
		}
	}
}

// heard notes that the guard said something. The time is one that no change of the clock touches.
func (g *guard) heard() {
	now := time.Now()
	g.spoke.Store(&now)
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
		g.heard()
		switch h, ok := handedOnIn(buf[:n]); {
		case buf[0] == sayDropped && g.is(conn):
			g.config.Log.Error("the gates were open: this process did not answer in time, and its guard let all through")
			g.dropped()
		case ok:
			var file *os.File // none if this process has too many open
			if fd, err := descriptorIn(oob[:oobn]); err == nil {
				file = os.NewFile(uintptr(fd), "asked")
			}
			g.asked(h, file)
		}
	}
	go cmd.Wait() // it ends when no file system holds it up
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
	for name, group := range g.held {
		err := control(group.group, unmark)
		if err != nil {
			g.config.Log.Error("take marks off", zap.Stringer("group", name), zap.Error(err))
		}
	}
}

func (g *guard) add(name event.MountNS, group guarded) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.held[name] = group
	return g.sendGroup(name, group)
}

func (g *guard) remove(name event.MountNS) error {
	g.mu.Lock()
	defer g.mu.Unlock()
	delete(g.held, name)
	if g.conn < 0 {
		return nil
	}
	return unix.Send(g.conn, appendName([]byte{sayRemove}, name), unix.MSG_NOSIGNAL)
}

// sendGroup is called with g.mu held.
func (g *guard) sendGroup(name event.MountNS, group guarded) error {
	what := byte(sayAdd)
	if group.closed {
		what = sayAddClosed
	}
	return control(group.group, func(fd int) error {
		return unix.Sendmsg(g.conn, appendName([]byte{what}, name), unix.UnixRights(fd), nil, unix.MSG_NOSIGNAL)
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
		if err := unix.Send(g.conn, message, unix.MSG_NOSIGNAL); err != nil {
			g.config.Log.Warn("tell the guard of an answer", zap.Error(err))
		}
	}
}

// leave has the guard hold those gates that are closed so when this process has ended.
func (g *guard) leave() {
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.conn >= 0 {
		if err := unix.Send(g.conn, []byte{sayLeave}, unix.MSG_NOSIGNAL); err != nil {
			g.config.Log.Error("closed gates will be open", zap.Error(err))
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
func readGuard(stateFile string) (s guardState, err error) {
	b, err := os.ReadFile(stateFile)
	if errors.Is(err, fs.ErrNotExist) {
		return s, nil
	}
	if err == nil {
		s, err = parseGuard(b)
	}
	if err != nil {
		err = fmt.Errorf("read which guard an earlier agent had: %w", err)
	}
	return s, err
}

func parseGuard(b []byte) (s guardState, err error) {
	if err := json.Unmarshal(b, &s); err != nil {
		return guardState{}, err
	}
	return s, nil
}

// EndGuard ends the guard that an agent left, so that the gates are open which it holds closed.
func EndGuard(stateFile string) error {
	s, err := readGuard(stateFile)
	if err != nil {
		return err
	}
	return s.end()
}
