package gate

import (
	"context"
	"errors"
	"os"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
)

// takes is told of a question by the guard. Each is answered by a goroutine of its own, so that none waits for another.
func (g *Gates) takes(name event.MountNS, task uint32, number int32, exec bool, file *os.File) {
	g.mu.Lock()
	one, ok := g.named[name]
	if ok {
		g.answers.Add(1)
	}
	g.mu.Unlock()
	if !ok {
		file.Close() // closed meanwhile: the guard lets it through
		return
	}
	g.asked.Add(1)
	one.mu.Lock()
	one.oldest[number] = time.Now()
	one.mu.Unlock()
	q := &question{gate: one, file: file, fd: fdOf(file), number: number, task: task, exec: exec}
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

// answer lets the open go on, or not. By then the file is not open for reading here any more: that would make it one in use.
func (q *question) answer() {
	allow := q.decide()
	q.file.Close()
	q.gate.mu.Lock()
	delete(q.gate.oldest, q.number)
	q.gate.mu.Unlock()
	written := control(q.gate.group, func(fd int) error { return respond(fd, q.number, allow) })
	// ENOENT: the task was killed, or the guard has answered. The end of the gate: the kernel has.
	if written != nil && !errors.Is(written, unix.ENOENT) && q.gate.ctx.Err() == nil {
		q.gate.gates.config.Log.Error("answer", zap.Stringer("ns", q.gate.owner), zap.Error(written))
	}
	q.gate.gates.guard.answered(q.number)
}

// decide returns whether the open may go on.
func (q *question) decide() bool {
	g, c := q.gate, q.gate.gates.config
	if !q.exec {
		if elf, err := isELF(q.file); err != nil || !elf {
			q.ignore(q.fd, unix.FAN_OPEN_PERM) // no program can have it mapped by the loader; what maps it all the same, the hooks see
			return true
		}
	}
	t, err := readTask(q.task)
	if err != nil {
		return true // it has been killed
	}
	below, known := c.Below(g.owner, t.inum)
	if known && !below {
		return true
	}
	a, err := q.describe(t)
	if err == nil {
		ctx, cancel := context.WithTimeout(g.ctx, g.patience())
		err = c.Ask(ctx, g.owner, a)
		cancel()
		g.late(errors.Is(err, context.DeadlineExceeded))
	}
	if errors.Is(err, ErrNotConcerned) || g.ctx.Err() != nil {
		return true
	}
	if err != nil {
		c.Log.Warn("not measured before its use", zap.Stringer("ns", g.owner), zap.String("file", q.path(a)), zap.Bool("denied", c.Closed), zap.Error(err))
		if !c.Closed && errors.Is(err, context.DeadlineExceeded) { // else the hook finds it new to the list
			c.Missed(g.owner, a)
		}
		return !c.Closed
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
	if g.timeout && !c.Closed {
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
