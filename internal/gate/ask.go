package gate

import (
	"context"
	"errors"
	"io/fs"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/proc"
)

// takes is told of a question by the guard. Each is answered by a goroutine of its own, so that none waits for another.
func (g *Gates) takes(h handedOn, file *os.File) {
	g.mu.Lock()
	one, ok := g.named[h.group]
	if ok {
		g.answers.Add(1)
	}
	g.mu.Unlock()
	if !ok {
		file.Close() // closed meanwhile: the guard lets it through
		return
	}
	g.asked.Add(1)
	if file == nil {
		defer g.answers.Done()
		g.config.Log.Error("not measured before its use: its descriptor did not come", zap.Stringer("ns", one.owner), zap.Bool("denied", one.closed))
		one.respond(h.number, !one.closed)
		return
	}
	one.mu.Lock()
	one.oldest[h.number] = time.Now()
	one.mu.Unlock()
	q := &question{gate: one, file: file, fd: fdOf(file), number: h.number, task: h.task, exec: h.exec}
	go func() {
		defer g.answers.Done()
		q.answer()
	}()
}

// fdOf returns a descriptor without changing its mode.
func fdOf(file *os.File) (fd int32) {
	control(file, func(n int) error {
		fd = int32(n)
		return nil
	})
	return fd
}

// question is one open that is held up.
type question struct {
	gate *gate
	file *os.File
	fd   int32 // of file
	// number is what the answer names: the question's descriptor in the guard.
	number int32
	task   uint32
	exec   bool // to be run; else opened for whatever purpose
}

// answer lets the open go on, or not.
func (q *question) answer() {
	allow := q.verdict()
	q.gate.mu.Lock()
	delete(q.gate.oldest, q.number)
	q.gate.mu.Unlock()
	q.gate.respond(q.number, allow)
}

// respond answers a question, and tells the guard.
func (g *gate) respond(number int32, allow bool) {
	written := control(g.group, func(fd int) error { return respond(fd, number, allow) })
	// ENOENT: the task was killed, or the guard has answered. The end of the gate: the kernel has.
	if written != nil && !errors.Is(written, unix.ENOENT) && g.ctx.Err() == nil {
		g.gates.config.Log.Error("answer", zap.Stringer("ns", g.owner), zap.Error(written))
	}
	g.gates.guard.answered(number)
}

// grace is how long an answer may take that knows of its deadline.
const grace = 500 * time.Millisecond

// verdict returns whether the open may go on. The file, or the way to it, may be of a file system that somebody lets hang: a look that does is
// left behind. In the end the file is not open for reading here any more, but for such a look: that would make it one in use.
func (q *question) verdict() bool {
	g, patience := q.gate, q.gate.patience()
	allow, err := proc.Within(&g.behind, patience+grace, func() bool {
		ctx, cancel := context.WithTimeout(g.ctx, patience)
		defer cancel()
		defer q.file.Close()
		return q.decide(ctx)
	})
	if err == nil {
		return allow
	}
	if errors.Is(err, proc.ErrManyHang) {
		q.file.Close()
	}
	g.gates.config.Log.Warn("not measured before its use", zap.Stringer("ns", g.owner), zap.Uint32("task", q.task), zap.Bool("denied", g.closed), zap.Error(err))
	return !g.closed
}

// decide returns whether the open may go on. It may hang, but does nothing after ctx has ended that would hide that from the hook.
func (q *question) decide(ctx context.Context) bool {
	g, c := q.gate, q.gate.gates.config
	if !q.exec {
		if elf, err := isELF(q.file); err != nil || !elf {
			q.ignore(q.fd, unix.FAN_OPEN_PERM) // no program can have it mapped by the loader; what maps it all the same, the hooks see
			return true
		}
	}
	t, err := readTask(q.task)
	if errors.Is(err, fs.ErrNotExist) || errors.Is(err, unix.ESRCH) {
		return true // it has been killed
	}
	if err != nil {
		c.Log.Warn("not measured before its use", zap.Stringer("ns", g.owner), zap.Uint32("task", q.task), zap.Bool("denied", g.closed), zap.Error(err))
		return !g.closed
	}
	below, known := c.Below(g.owner, t.inum)
	if known && !below {
		return true
	}
	a, err := q.describe(t)
	if err == nil {
		err = c.Ask(ctx, g.owner, a)
		g.late(errors.Is(err, context.DeadlineExceeded))
	}
	if errors.Is(err, ErrNotConcerned) {
		return true
	}
	if g.ctx.Err() != nil {
		return !g.closed || !g.gates.haveEnded() // a gate that was taken away holds up nobody
	}
	if err != nil {
		c.Log.Warn("not measured before its use", zap.Stringer("ns", g.owner), zap.String("file", q.path(a)), zap.Bool("denied", g.closed), zap.Error(err))
		if !g.closed && errors.Is(err, context.DeadlineExceeded) { // else the hook finds it new to the list
			c.Missed(g.owner, a)
		}
		return !g.closed
	}
	q.keep(t, a)
	return true
}

func (q *question) path(a *Asked) string {
	if a == nil {
		return ""
	}
	return a.Event.Path
}

// ErrNotConcerned is what Ask returns for a task that is not of the namespace or one below it.
var ErrNotConcerned = errors.New("of another namespace")

// patience is how long an open is held up: a quarter of the time after one whose answer came too late, where what is not measured may run
// all the same. A machine whose TPM is dead is to be slow, not to stand still.
func (g *gate) patience() time.Duration {
	c := g.gates.config
	g.mu.Lock()
	defer g.mu.Unlock()
	if g.timeout && !g.closed {
		return c.Timeout / 4
	}
	return c.Timeout
}

func (g *gate) late(late bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.timeout = late
}

// ignore has the kernel not ask about the inode again until it is changed.
func (q *question) ignore(fd int32, mask uint64) error {
	return q.gate.change(unix.FAN_MARK_ADD|unix.FAN_MARK_IGNORED_MASK, mask, selfPath(fd))
}

// function is what the open is to rules. What an exec opens after the program is known from the program: a script's interpreter runs, an
// ELF program's is mapped. Where that is not known, as nobody asked about the program, what may be such an interpreter is taken to run.
func (q *question) function(kind fileKind) ima.Func {
	if !q.exec {
		return ima.MmapCheck
	}
	const tasksMax = 4096
	g := q.gate
	g.mu.Lock()
	defer g.mu.Unlock()
	mapped := g.dynamic[q.task] && kind == interpreter
	delete(g.dynamic, q.task)
	if mapped {
		return ima.MmapCheck
	}
	if kind == dynamic {
		if len(g.dynamic) >= tasksMax {
			clear(g.dynamic)
		}
		g.dynamic[q.task] = true
	}
	return ima.BPRMCheck
}
