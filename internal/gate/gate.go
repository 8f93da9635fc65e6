// Package gate holds up whoever opens a file to run it until the file is measured: in the log, and in the TPM.
//
// A Gate is one fanotify group for one namespace. It marks that namespace's file systems, so that namespaces which are born in it are held
// up too, from their first program on; the kernel then asks before each open of a program, script or interpreter (FAN_OPEN_EXEC_PERM), and
// with All before each open (FAN_OPEN_PERM). The question carries a descriptor of the very file. Content that needs no question any more gets
// an ignore mark, which the kernel drops when the file is changed (fs/notify/fanotify). So do the machine's own mounts of the same file systems:
// what is opened by those is none of the namespace's.
//
// # What is promised
//
// Every question is answered: within Config.Timeout, also where looking at the file hangs, and if this process hangs by its guard, a process
// that takes the questions (Guard).
// The agent's own opens and those of its descendants the guard lets through, so what the answer takes never waits for an answer.
//
// # What is not held up
//
// Files of file systems that others run (FUSE, network: looking at one could take for ever), memfds, which have no file system that can be
// marked, file systems that were mounted since the namespace was last looked at, and what a task of the namespace reaches by one of the machine's
// mounts, as one does that has a folder of the machine's open. The hooks see those, and the caller says so in the list.
package gate

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	"go.uber.org/zap"
	"golang.org/x/sys/unix"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/proc"
)

// Config says what to ask, and how long an answer may take.
type Config struct {
	// Ask returns when the file is measured wherever it must be before it is used. Any goroutine calls it.
	Ask func(ctx context.Context, owner event.MountNS, a *Asked) error
	// Below reports whether the namespace of an inode number is the owner or below it, and whether that is known yet.
	Below func(owner event.MountNS, inum uint32) (below, known bool)
	// Missed is told of a file that is used though Ask did not return in time.
	Missed func(owner event.MountNS, a *Asked)
	// Dropped is told that the guard let all through and took the marks off: whoever had gates opens them again.
	Dropped func()
	Timeout time.Duration // that an open is held up at most
	Closed  bool          // all gates are, see How
	Log     *zap.Logger
}

// How is how a namespace's opens are held up.
type How struct {
	All    bool // all of them; else those of what is about to run
	Closed bool // what was not measured within Config.Timeout may not be opened, and nothing may while no agent runs; else it may
}

// Mounts are those of a namespace.
type Mounts struct {
	PID  int      // of a process that sees them, whose fault it is if one hangs; 0: the machine's
	Root *os.File // its root folder, open for its path only
	All  []Mount
}

// Mount is one of them.
type Mount struct {
	Point string // below the root folder
	Type  string // as in /proc/filesystems
	Dev   uint64 // of its file system, one for each
}

// Asked is a file that a task is held up in opening.
type Asked struct {
	Inum  uint32 // of the task's mount namespace
	Event *event.File
	File  *os.File // open for reading, by no other than the kernel itself; valid until Ask returns
}

// Gates are all gates of the agent.
type Gates struct {
	config Config
	guard  *guard

	asked   atomic.Uint64
	answers sync.WaitGroup // of the goroutines that answer, also for groups that were renewed or closed

	mu    sync.Mutex
	ended bool
	gates map[event.MountNS]*gate // by owner
	named map[event.MountNS]*gate // by the name that each has with the guard
	last  uint64                  // of those names' numbers
	kept  map[uint32][]keptFile   // by task
	keeps int
}

// New makes gates that hold up nobody yet, and their guard, which is this program with the arguments given. stateFile is where the guard is
// known by to the next agent.
func New(c Config, guardArgs []string, stateFile string) *Gates {
	g := &Gates{config: c, gates: make(map[event.MountNS]*gate), named: make(map[event.MountNS]*gate), kept: make(map[uint32][]keptFile)}
	g.guard = newGuard(c, guardArgs, stateFile)
	g.guard.dropped, g.guard.asked, g.guard.oldest = func() { c.Dropped() }, g.takes, g.oldest
	return g
}

// Ready is called when all gates that an earlier agent had are open again: what its guard holds closed is let go.
func (g *Gates) Ready() { g.guard.endOld() }

// oldest returns when the question came that waits longest for its answer.
func (g *Gates) oldest() (oldest time.Time, any bool) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, one := range g.named {
		one.mu.Lock()
		for _, at := range one.oldest {
			if !any || at.Before(oldest) {
				oldest, any = at, true
			}
		}
		one.mu.Unlock()
	}
	return oldest, any
}

// Asked returns how many questions there were.
func (g *Gates) Asked() uint64 { return g.asked.Load() }

// gate is one namespace's.
type gate struct {
	gates  *Gates
	owner  event.MountNS
	name   event.MountNS // with the guard: the owner's inode number, and a number that no other group had
	group  *os.File      // the fanotify group
	all    bool          // whoever opens gates uses it
	closed bool
	ctx    context.Context // ends with the gate
	end    context.CancelFunc

	mu      sync.Mutex
	dynamic map[uint32]bool   // tasks that were asked about a program which names an ELF interpreter: the same exec opens that next
	marked  map[uint32]string // of a device, as dev of event.Content, its file system's type
	oldest  map[int32]time.Time
	timeout bool // the last answer came too late

	behind, settling proc.Behind // questions, and files that need none any more
	flushes          atomic.Uint64
}

// Open begins to hold up, or changes what is held up, and watches file systems that are new. Errors name the kernel's lack of fanotify, or that
// none of the file systems can be marked; os.ErrClosed after Shutdown.
func (g *Gates) Open(owner event.MountNS, its, machine Mounts, how How) error {
	how.Closed = how.Closed || g.config.Closed
	g.mu.Lock()
	one, ended := g.gates[owner], g.ended
	g.mu.Unlock()
	if ended {
		return fmt.Errorf("gate of namespace %v: %w", owner, os.ErrClosed)
	}
	if err := g.guard.run(); err != nil {
		return fmt.Errorf("gate of namespace %v: %w", owner, err)
	}
	if one != nil && (one.all && !how.All || one.closed != how.Closed) {
		return g.Renew(owner, its, machine, how)
	}
	if one == nil {
		var err error
		if one, err = g.begin(owner, how); err != nil {
			return err
		}
		g.mu.Lock()
		g.gates[owner] = one
		g.mu.Unlock()
	}
	one.all = how.All
	if n, err := one.mark(its, machine); n == 0 {
		return errors.Join(fmt.Errorf("gate of namespace %v: none of its file systems can be watched: %w", owner, err), g.Close(owner))
	}
	return nil
}

// Renew is Open for a namespace that has a gate and may have lost file systems: those are not watched any more. Everything is asked about
// anew. Nobody slips through meanwhile.
func (g *Gates) Renew(owner event.MountNS, its, machine Mounts, how How) error {
	how.Closed = how.Closed || g.config.Closed
	g.mu.Lock()
	old, ok := g.gates[owner]
	g.mu.Unlock()
	if !ok {
		return g.Open(owner, its, machine, how)
	}
	one, err := g.begin(owner, how)
	if err != nil {
		return err
	}
	if n, err := one.mark(its, machine); n == 0 {
		return errors.Join(fmt.Errorf("gate of namespace %v: none of its file systems can be watched: %w", owner, err), g.close(one))
	}
	g.mu.Lock()
	g.gates[owner] = one
	g.mu.Unlock()
	return g.retire(old)
}

// retire has a group ask nothing more, and closes it when what it has asked is answered: who waits goes on waiting for that.
func (g *Gates) retire(old *gate) error {
	if err := control(old.group, unmark); err != nil {
		return errors.Join(fmt.Errorf("gate of namespace %v: take marks off: %w", old.owner, err), g.close(old))
	}
	go func() { // ends with the gate
		select {
		case <-old.ctx.Done():
		case <-time.After(g.config.Timeout + hangAfter):
			g.close(old)
		}
	}()
	return nil
}

// begin makes a group without marks, whose questions the guard takes.
func (g *Gates) begin(owner event.MountNS, how How) (*gate, error) {
	const flags = unix.FAN_CLASS_CONTENT | unix.FAN_CLOEXEC | unix.FAN_NONBLOCK | unix.FAN_UNLIMITED_QUEUE | unix.FAN_UNLIMITED_MARKS | unix.FAN_REPORT_TID
	fd, err := unix.FanotifyInit(flags, unix.O_RDONLY|unix.O_LARGEFILE|unix.O_CLOEXEC|unix.O_NONBLOCK)
	if errors.Is(err, unix.EMFILE) {
		return nil, fmt.Errorf("gate of namespace %v: %w; raise fs.fanotify.max_user_groups", owner, err)
	} else if err != nil {
		return nil, fmt.Errorf("gate of namespace %v: fanotify: %w; the kernel needs CONFIG_FANOTIFY_ACCESS_PERMISSIONS", owner, err)
	}
	one := &gate{
		gates: g, owner: owner, group: os.NewFile(uintptr(fd), "fanotify"), all: how.All, closed: how.Closed, dynamic: make(map[uint32]bool),
		marked: make(map[uint32]string), oldest: make(map[int32]time.Time),
	}
	one.ctx, one.end = context.WithCancel(context.Background())
	g.mu.Lock()
	g.last++
	one.name = event.MountNS{Inum: owner.Inum, ID: g.last}
	g.named[one.name] = one
	g.mu.Unlock()
	if err := g.guard.add(one.name, guarded{one.group, how.Closed}); err != nil { // before the first mark: nobody waits for a reader
		return nil, errors.Join(fmt.Errorf("gate of namespace %v: %w", owner, err), g.close(one))
	}
	return one, nil
}

// mask is what is asked before.
func (g *gate) mask() uint64 {
	if g.all {
		return unix.FAN_OPEN_EXEC_PERM | unix.FAN_OPEN_PERM
	}
	return unix.FAN_OPEN_EXEC_PERM
}

// local are the file systems whose files this kernel itself keeps: looking at one waits for nobody. Beside those of digest.Local,
// overlayfs, whose layers are mostly such.
var local = map[string]bool{
	"overlay": true, "ext2": true, "ext3": true, "ext4": true, "xfs": true, "btrfs": true, "tmpfs": true, "ramfs": true, "rootfs": true,
	"squashfs": true, "erofs": true, "f2fs": true, "bcachefs": true, "iso9660": true, "vfat": true,
}

// mark has the kernel ask about the file systems, and returns how many it now asks about.
func (g *gate) mark(its, machine Mounts) (int, error) {
	errs := []error{errors.New("no local file system")}
	devs := make(map[uint64]bool)
	for _, m := range its.All {
		if !local[m.Type] || devs[m.Dev] {
			continue
		}
		devs[m.Dev] = true
		if err := g.markOne(its, m); err != nil {
			errs = append(errs, fmt.Errorf("%s: %w", m.Point, err))
			g.gates.config.Log.Info("not gated", zap.Stringer("ns", g.owner), zap.String("mount", m.Point), zap.Error(err))
		}
	}
	for _, m := range machine.All {
		if !devs[m.Dev] {
			continue
		}
		if err := g.spare(machine, m); err != nil { // asked about, and let through
			g.gates.config.Log.Debug("the machine's programs are asked about", zap.Stringer("ns", g.owner), zap.String("mount", m.Point), zap.Error(err))
		}
	}
	g.mu.Lock()
	defer g.mu.Unlock()
	return len(g.marked), errors.Join(errs...)
}

// markOne has the kernel ask about a mount's file system, by whatever mount its files are opened.
func (g *gate) markOne(its Mounts, m Mount) error {
	top, dev, err := its.open(m)
	if err != nil {
		return err
	}
	defer top.Close()
	mask := g.mask()
	if m.Point == "/dev" || m.Point == "/proc" || m.Point == "/sys" {
		mask = unix.FAN_OPEN_EXEC_PERM // devices are opened there, and an open has effects
	}
	g.mu.Lock() // the first question finds what it is about
	_, before := g.marked[dev]
	g.marked[dev] = m.Type
	g.mu.Unlock()
	err, ok := proc.Ask(its.PID, func() error { return g.change(unix.FAN_MARK_ADD|unix.FAN_MARK_FILESYSTEM, mask, selfPath(fdOf(top))) })
	if !ok {
		err = fmt.Errorf("it hangs: %w", unix.ETIMEDOUT)
	}
	if err != nil && !before {
		g.mu.Lock()
		defer g.mu.Unlock()
		delete(g.marked, dev)
	}
	return err
}

// spare has the kernel not ask about what is opened by a mount of the machine's own, whatever is changed there.
func (g *gate) spare(machine Mounts, m Mount) error {
	top, _, err := machine.open(m)
	if err != nil {
		return err
	}
	defer top.Close()
	const flags = unix.FAN_MARK_ADD | unix.FAN_MARK_MOUNT | unix.FAN_MARK_IGNORED_MASK | unix.FAN_MARK_IGNORED_SURV_MODIFY
	return g.change(flags, g.mask(), selfPath(fdOf(top)))
}

// open opens the top folder of a mount for its path only, and returns its device as dev of event.Content. The way there may lead through a file
// system that somebody lets hang.
func (of Mounts) open(m Mount) (*os.File, uint32, error) {
	type opened struct {
		file *os.File // closed by its finalizer if it comes too late
		dev  uint32
		err  error
	}
	o, ok := proc.Ask(of.PID, func() opened {
		how := unix.OpenHow{Flags: unix.O_PATH | unix.O_CLOEXEC, Resolve: unix.RESOLVE_IN_ROOT | unix.RESOLVE_NO_MAGICLINKS}
		fd, err := unix.Openat2(int(fdOf(of.Root)), m.Point, &how)
		if err != nil {
			return opened{err: err}
		}
		file := os.NewFile(uintptr(fd), m.Point)
		var st unix.Stat_t
		if err := unix.Fstat(fd, &st); err != nil {
			file.Close()
			return opened{err: err}
		}
		return opened{file, unix.Major(st.Dev)<<20 | unix.Minor(st.Dev), nil}
	})
	if !ok {
		return nil, 0, fmt.Errorf("the way to it hangs: %w", unix.ETIMEDOUT)
	}
	return o.file, o.dev, o.err
}

// change changes the group's marks.
func (g *gate) change(flags uint, mask uint64, path string) error {
	return control(g.group, func(fd int) error { return unix.FanotifyMark(fd, flags, mask, unix.AT_FDCWD, path) })
}

func selfPath(fd int32) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// Close holds up nobody any more on behalf of the namespace. Who waits goes on. One that has no gate is no error.
func (g *Gates) Close(owner event.MountNS) error {
	g.mu.Lock()
	delete(g.gates, owner)
	var all []*gate
	for _, one := range g.named {
		if one.owner == owner {
			all = append(all, one)
		}
	}
	g.mu.Unlock()
	var errs []error
	for _, one := range all {
		errs = append(errs, g.close(one))
	}
	return errors.Join(errs...)
}

// close ends a group. One that was closed is no error.
func (g *Gates) close(one *gate) error {
	g.mu.Lock()
	_, open := g.named[one.name]
	delete(g.named, one.name)
	g.mu.Unlock()
	if !open {
		return nil
	}
	one.end()
	err := g.guard.remove(one.name)
	go one.group.Close() // mostly the guard's descriptor is the last; else see letGo
	return err
}

// Flush has the kernel ask about all files anew, as after a change of what is measured.
func (g *Gates) Flush(owner event.MountNS) error {
	g.mu.Lock()
	one, ok := g.gates[owner]
	g.mu.Unlock()
	if !ok {
		return nil
	}
	one.flushes.Add(1)
	return one.change(unix.FAN_MARK_FLUSH, 0, "")
}

func (g *Gates) haveEnded() bool {
	g.mu.Lock()
	defer g.mu.Unlock()
	return g.ended
}

// Shutdown ends all gates and their guard, but for those that are closed: the guard holds them so until a next agent has opened its own.
func (g *Gates) Shutdown() error {
	g.mu.Lock()
	g.ended = true
	all := slices.Collect(maps.Keys(g.gates))
	g.mu.Unlock()
	var errs []error
	g.guard.leave()
	for _, owner := range all {
		errs = append(errs, g.Close(owner))
	}
	g.answers.Wait()
	g.mu.Lock()
	g.expire(time.Now().Add(2 * keepFor)) // all that is kept
	g.mu.Unlock()
	g.guard.end()
	return errors.Join(errs...)
}
