package namespace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"syscall"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/digest"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/measure"
)

// GateMode is which opens in a namespace, and in those below it, wait until the file is measured: in the logs and in the TPMs of all lists
// that want it.
type GateMode string

// The modes.
const (
	GateOff  GateMode = "off"
	GateExec GateMode = "exec" // of programs, scripts and interpreters that are about to run
	GateAll  GateMode = "all"  // and of each ELF file, which may be mapped executable
	// The same, closed: what was not measured in time may not be used, and nothing that needs an answer while no agent gives one.
	GateExecClosed GateMode = "exec-closed"
	GateAllClosed  GateMode = "all-closed"
)

// GateModes are all modes.
func GateModes() []GateMode {
	return []GateMode{GateOff, GateExec, GateAll, GateExecClosed, GateAllClosed}
}

// Holds reports whether anything waits. The zero mode is as GateOff.
func (m GateMode) Holds() bool { return m != "" && m != GateOff }

// All reports whether more waits than what is about to run.
func (m GateMode) All() bool { return m == GateAll || m == GateAllClosed }

// Closed reports whether what is not measured may not be used.
func (m GateMode) Closed() bool { return m == GateExecClosed || m == GateAllClosed }

// and returns the mode that holds up what either does, and is closed if either is.
func (m GateMode) and(n GateMode) GateMode {
	all, closed := m.All() || n.All(), m.Closed() || n.Closed()
	switch {
	case !m.Holds() && !n.Holds():
		return GateOff
	case all && closed:
		return GateAllClosed
	case closed:
		return GateExecClosed
	case all:
		return GateAll
	}
	return GateExec
}

// ErrNoGates means that the agent was started without gates.
var ErrNoGates = fmt.Errorf("this agent holds nothing up: %w", syscall.ENOTSUP)

// Gates hold up opens; see package gate. They ask the tree, from goroutines of theirs, by Below and Ask.
type Gates interface {
	Open(ns event.MountNS, mode GateMode) error
	Renew(ns event.MountNS, mode GateMode) error // the same, and file systems that are gone are watched no more
	Close(ns event.MountNS) error
	Flush(ns event.MountNS) error // ask about everything anew
	Settled(f *event.File)        // the content that the hook saw needs no question any more
	Asked() uint64                // how many questions there were
}

// SetGate changes which opens in a namespace wait. It has to be active. A namespace keeps its mode, over restarts, too.
func (t *Tree) SetGate(ctx context.Context, ns event.MountNS, mode GateMode) error {
	s, ok := t.known(ns)
	switch {
	case !ok:
		return ErrEnded
	case s == t.native:
		return fmt.Errorf("the native namespace has no gate, as the machine would wait for an agent that it has not started yet: %w", syscall.EPERM)
	case t.config.Gates == nil:
		return ErrNoGates
	case !s.active:
		return ErrInactive
	}
	if err := s.begin(ctx); err != nil {
		return err
	}
	if mode == GateOff {
		s.setGate(mode, 0)
		return errors.Join(t.config.Gates.Close(ns), s.record())
	}
	if err := s.openGate(mode); err != nil {
		return err
	}
	return s.record()
}

// RaiseGate gives a container whose first program does not run yet the gate that it asks for, and what the default has more. One that
// has all that already stays as it is. The namespace is made active, with the policy for new namespaces, if it is not.
func (t *Tree) RaiseGate(ctx context.Context, ns event.MountNS, mode GateMode) error {
	s, ok := t.known(ns)
	switch {
	case !ok:
		return ErrEnded
	case t.config.Gates == nil:
		return ErrNoGates
	case !s.active:
		if err := s.activateByDefault(); err != nil {
			return err
		}
	}
	if err := s.begin(ctx); err != nil {
		return err
	}
	return s.raiseGate(t.config.Gate.and(mode))
}

// gateByDefault opens the gate that a container gets. One that can't be had is no reason to refuse the container its list.
func (s *State) gateByDefault() {
	if s.tree.config.Gates == nil {
		return
	}
	if err := s.raiseGate(s.tree.config.Gate); err != nil {
		s.tree.log.Error("programs of a namespace are not held up until they are measured", zap.Stringer("ns", s.ns), zap.Error(err))
	}
}

func (s *State) raiseGate(mode GateMode) error {
	if mode = s.gate.and(mode); !mode.Holds() || mode == s.gate {
		return nil
	}
	if err := s.openGate(mode); err != nil {
		return err
	}
	s.gateEarly = true
	if err := s.record(); err != nil {
		return fmt.Errorf("the next agent would not know of the gate: %w", err)
	}
	return nil
}

// gateSettles looks at a container's file systems anew when its first program runs: when it was given its gate, its namespace still had all
// of the machine's.
func (s *State) gateSettles() {
	if !s.gateEarly {
		return
	}
	s.gateEarly = false
	if err := s.tree.config.Gates.Renew(s.ns, s.gate); err != nil {
		s.tree.log.Warn("a gate goes on watching file systems that its namespace does not have", zap.Stringer("ns", s.ns), zap.Error(err))
		return
	}
	if err := s.tree.publish(s); err != nil { // each content is to have an event once more, by which it gets its ignore mark
		s.tree.log.Warn("publish", zap.Stringer("ns", s.ns), zap.Error(err))
	}
}

// ReopenGates opens the gates that an earlier agent had, and puts the marks back that the guard took off. What ran without is told of: such
// a gate counts as there all the time.
func (t *Tree) ReopenGates() {
	t.mu.Lock()
	var gated []*State
	for _, s := range t.states {
		if s.gate.Holds() {
			gated = append(gated, s)
		}
	}
	t.mu.Unlock()
	for _, s := range gated {
		if err := t.config.Gates.Open(s.ns, s.gate); err != nil {
			t.log.Error("programs of a namespace are not held up until they are measured", zap.Stringer("ns", s.ns), zap.Error(err))
		}
	}
}

func (s *State) openGate(mode GateMode) error {
	if err := s.tree.config.Gates.Open(s.ns, mode); err != nil {
		return err
	}
	s.setGate(mode, sinceBoot())
	s.tree.log.Info("gate", zap.Stringer("ns", s.ns), zap.String("mode", string(mode)))
	// What was measured before needs an event once more, by which the gate learns that it needs no question.
	return s.tree.publish(s)
}

// gateMissed looks for file systems that the gate does not watch yet, after a file was used that nobody asked about.
func (s *State) gateMissed() {
	const lookEvery = time.Second
	if s.tree.config.Gates == nil || time.Since(s.gateLooked) < lookEvery {
		return
	}
	s.gateLooked = time.Now()
	if err := s.tree.config.Gates.Open(s.ns, s.gate); err != nil {
		s.tree.log.Warn("look for new file systems", zap.Stringer("ns", s.ns), zap.Error(err))
	}
}

func (s *State) setGate(mode GateMode, since time.Duration) {
	s.tree.mu.Lock()
	defer s.tree.mu.Unlock()
	s.gate, s.gateSince = mode, since
}

// gates reports whether the namespace's gate should have held up an event.
func (s *State) gates(ev *event.File) bool {
	if ev.Boottime < s.gateSince {
		return false
	}
	return s.gate.All() || s.gate.Holds() && ev.Func == ima.BPRMCheck
}

// Below reports whether the namespace of an inode number is ns or below it, and whether that is known: the inode number is that of a task
// that stays in it. From any goroutine.
func (t *Tree) Below(ns event.MountNS, inum uint32) (below, known bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.byInum(inum)
	for n := s; n != nil; n = n.parent {
		if n.ns == ns {
			return true, true
		}
	}
	return false, s != nil
}

// byInum is called with the tree locked.
func (t *Tree) byInum(inum uint32) *State {
	for _, s := range t.states {
		if s.ns.Inum == inum {
			return s
		}
	}
	return nil
}

// AskAlgos returns in which algorithms the lists of a namespace and its ancestors want a file's digest. From any goroutine.
func (t *Tree) AskAlgos(inum uint32) []ima.HashAlgo {
	t.mu.Lock()
	defer t.mu.Unlock()
	s := t.byInum(inum)
	if s == nil {
		s = t.native
	}
	algos := []ima.HashAlgo{}
	seen := map[ima.HashAlgo]bool{}
	for n := s; n != nil; n = n.parent {
		if n.active && !seen[n.algo] {
			seen[n.algo] = true
			algos = append(algos, n.algo)
		}
	}
	return algos
}

// Question is a file that a task is held up in opening.
type Question struct {
	Owner   event.MountNS // whose gate it is
	Inum    uint32        // of the task's mount namespace
	Event   *event.File   // what the hook will see, as far as it can be known before
	File    *os.File      // the very file
	Digests map[ima.HashAlgo]ima.Digest
}

// Waiting is what a question waits for.
type Waiting struct{ receipts []measure.Receipt }

// Extended waits until the file is in the logs and the TPMs of those lists that want it.
func (w Waiting) Extended(ctx context.Context) error {
	for _, r := range w.receipts {
		if err := r.Extended(ctx); err != nil {
			return err
		}
	}
	return nil
}

// ErrNotBelow means that the task is not in the gate's namespace, nor in one below it.
var ErrNotBelow = errors.New("of another namespace")

// Ask measures the file in the list of its namespace and of each ancestor that wants it, and returns a wait for those of the gate's
// owner and its ancestors: a namespace below it has its own gate, or none. What it can't measure it leaves to the hook, whose
// event then says why. Like all that changes the tree it is called by the goroutine that handles records.
func (t *Tree) Ask(ctx context.Context, q Question) (Waiting, error) {
	if below, _ := t.Below(q.Owner, q.Inum); !below {
		return Waiting{}, ErrNotBelow
	}
	t.mu.Lock()
	s := t.byInum(q.Inum)
	t.mu.Unlock()
	q.Event.NS = s.ns
	l := &look{tree: t, ev: q.Event, ctx: ctx, digests: q.Digests, entries: map[entryKey]*imalog.Entry{}, file: q.File}
	l.name = l.findName(s)
	var w Waiting
	gated := false
	for n := s; n != nil; n = n.parent {
		gated = gated || n.ns == q.Owner
		if !n.active {
			continue
		}
		if err := l.measure(n, s); err != nil {
			return Waiting{}, fmt.Errorf("measure %q in namespace %v: %w", l.name, n.ns, err)
		}
		if gated && n.list != nil && !n.ended { // also what it holds already, of which the TPM may not know yet
			w.receipts = append(w.receipts, n.list.All())
		}
	}
	return w, nil
}

// Missed records in a gate's list that a file is used though it could not be waited for until it was measured.
func (t *Tree) Missed(ctx context.Context, ns event.MountNS, name string) error {
	s, ok := t.known(ns)
	if !ok || s.list == nil {
		return nil
	}
	return s.recordOwnLoss(ctx, name, event.LossNotGated)
}

// sumOfQuestion hashes the file that is asked about.
func (l *look) sumOfQuestion(s *State, algo ima.HashAlgo) (ima.Digest, event.Loss) {
	sums, err := lookWithin(s.allowance(), func(ctx context.Context) ([]ima.Digest, error) { return digest.Sum(ctx, l.file, l.ev, algo) })
	if err != nil {
		l.because, l.loss = err, event.LossReadError
		return ima.Digest{}, l.loss
	}
	l.digests[algo] = sums[0]
	return sums[0], 0
}
