package gate

import (
	"errors"
	"os"
	"time"

	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/digest"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/proc"
)

// keptFile is a file that was let through and is kept open until its hook has told of it: whether its content needs no question any more
// only the kernel side can know. It is open for its path only, so it counts as no reader; but it keeps its file system mounted, so it is not
// kept for long.
type keptFile struct {
	question *question
	file     *os.File
	asked    *Asked
	until    time.Time
}

const (
	keepFor = 10 * time.Second
	keepMax = 1024
)

// keep keeps the file, if there are not too many: then it is asked about again next time.
func (q *question) keep(t task, a *Asked) {
	g := q.gate.gates
	g.mu.Lock()
	defer g.mu.Unlock()
	g.expire(time.Now())
	if g.keeps >= keepMax {
		return
	}
	fd, err := unix.Open(selfPath(q.fd), unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return
	}
	g.kept[t.process.PID] = append(g.kept[t.process.PID], keptFile{q, os.NewFile(uintptr(fd), "kept"), a, time.Now().Add(keepFor)})
	g.keeps++
}

// expire closes what was kept in vain. g.mu is held.
func (g *Gates) expire(now time.Time) {
	for task, files := range g.kept {
		for len(files) > 0 && files[0].until.Before(now) {
			files[0].file.Close()
			files = files[1:]
			g.keeps--
		}
		if g.kept[task] = files; len(files) == 0 {
			delete(g.kept, task)
		}
	}
}

// Expire closes what was kept in vain.
func (g *Gates) Expire() {
	g.mu.Lock()
	defer g.mu.Unlock()
	g.expire(time.Now())
}

// Settled takes note that the hook saw a file whose content is measured in all lists concerned and needs no event any more, so it needs no
// question either.
func (g *Gates) Settled(f *event.File) {
	g.mu.Lock()
	var settled []keptFile
	kept := g.kept[f.Process.PID][:0]
	for _, k := range g.kept[f.Process.PID] {
		if k.is(f) {
			settled = append(settled, k)
		} else {
			kept = append(kept, k)
		}
	}
	g.keeps -= len(settled)
	if g.kept[f.Process.PID] = kept; len(kept) == 0 {
		delete(g.kept, f.Process.PID)
	}
	g.mu.Unlock()
	for _, k := range settled {
		k.question.gate.settle(k)
	}
}

// settlePatience is how long a file that is settled is waited for: one of a layer that somebody lets hang may take for ever.
const settlePatience = 100 * time.Millisecond

// settle settles a file, and mostly waits for that. Where too many hang it is asked about again.
func (g *gate) settle(k keptFile) {
	flushes := g.flushes.Load()
	_, err := proc.Within(&g.settling, settlePatience, func() struct{} {
		k.settle(flushes)
		return struct{}{}
	})
	if errors.Is(err, proc.ErrManyHang) {
		k.file.Close()
	}
}

func (k keptFile) is(f *event.File) bool {
	e := k.asked.Event
	return e.Func == f.Func && e.Path == f.Path && e.Content.Size == f.Content.Size && e.Content.CtimeSec == f.Content.CtimeSec &&
		e.Content.CtimeNsec == f.Content.CtimeNsec
}

// settle lets the kernel ask no more, unless there was a flush since. A change before the ignore mark was there did not drop it, so the file is
// looked at after.
func (k keptFile) settle(flushes uint64) {
	defer k.file.Close()
	q, fd := k.question, fdOf(k.file)
	mask := uint64(unix.FAN_OPEN_PERM)
	if q.exec {
		mask = unix.FAN_OPEN_EXEC_PERM
	}
	if q.ignore(fd, mask) != nil {
		return // gone, or closed: asked again
	}
	if digest.Same(k.file, k.asked.Event) != nil || q.gate.flushes.Load() != flushes {
		q.gate.change(unix.FAN_MARK_REMOVE|unix.FAN_MARK_IGNORED_MASK, mask, selfPath(fd))
	}
}
