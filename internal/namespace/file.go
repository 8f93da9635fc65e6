package namespace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/digest"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/policy"
)

// Pending is what must happen before a record may be given back to the kernel.
type Pending struct {
	entries []pendingEntry
	mark    bool // nothing of the event is in doubt: its content needs no event any more
	event   *event.File
}

// pendingEntry is one entry on its way into a list.
type pendingEntry struct {
	state   *State
	receipt measure.Receipt
}

// Logged waits until all entries of the record are in their logs. A list that can't go on is given up, the native one apart.
func (p Pending) Logged(ctx context.Context) error {
	for _, e := range p.entries {
		if err := e.receipt.Logged(ctx); err != nil {
			if err := e.state.giveUp(ctx, err); err != nil {
				return err
			}
		}
	}
	return nil
}

// look is one file event on its way through the chain: what one level found out serves the next.
type look struct {
	tree    *Tree
	ev      *event.File
	ctx     context.Context
	name    string
	digests map[ima.HashAlgo]ima.Digest
	loss    event.Loss         // why there is no digest
	because error              // the same, in detail
	attrs   *digest.Attributes // nil: not read, or not to be had
	asked   bool               // for attrs
	entries map[entryKey]*imalog.Entry
	pending Pending
	inDoubt bool
	proven  bool     // once provable, for good
	file    *os.File // of a question; nil: the hook has seen it already
}

// entryKey tells apart the entries that levels want of one event; equal ones share one.
type entryKey struct {
	pcr      int
	template string
	algo     ima.HashAlgo
	loss     event.Loss
}

// File measures a file in the list of its namespace and of each ancestor that wants it.
func (t *Tree) File(ctx context.Context, ev *event.File) (Pending, error) {
	s, err := t.stateOf(ctx, ev.NS)
	if err != nil {
		return Pending{}, err
	}
	t.mu.Lock()
	t.events++
	if s.leader.Start == 0 {
		s.leader = ev.Process
	}
	current := s.generation
	t.mu.Unlock()
	l := &look{tree: t, ev: ev, ctx: ctx, digests: map[ima.HashAlgo]ima.Digest{}, entries: map[entryKey]*imalog.Entry{}}
	l.name = l.findName(s)
	for n := s; n != nil; n = n.parent {
		if !n.active {
			continue
		}
		if err := l.measure(n, s); err != nil {
			return Pending{}, fmt.Errorf("measure %q in namespace %v: %w", l.name, n.ns, err)
		}
	}
	s.gateSettles()
	l.pending.event = ev
	l.pending.mark = !l.inDoubt && ev.Policy == current && ev.Nlink > 0 && l.provable()
	return l.pending, nil
}

// stateOf returns the state of an event's namespace. One that is not known had its birth lost, or was there without any task when the
// agent began: the kernel side knows it and its parent. If not even that, it is gone, and its event is the native list's alone.
func (t *Tree) stateOf(ctx context.Context, ns event.MountNS) (*State, error) {
	if s, ok := t.known(ns); ok {
		return s, nil
	}
	registered, err := t.config.Kernel.Registered()
	if err != nil {
		return nil, err
	}
	parent, ok := registered[ns]
	if !ok {
		return t.native, t.native.recordLoss(ctx, lossName(event.LossNoNamespaceID, ns, 1), event.LossNoNamespaceID)
	}
	s := t.add(ns, t.lookup(parent), originMet)
	return s, t.publish(s)
}

// provable reports whether the content's identity stands for its bytes from the event on: it did so then, or does so now and nobody has opened
// the file for writing meanwhile.
func (t *Tree) provable(ev *event.File) bool {
	const doubt = event.Writers | event.Changed | event.RealUnknown
	if ev.Flags&doubt != 0 || !digest.Versioned(ev.RealFS.Magic) {
		return false
	}
	if digest.Old(ev.Content, wallTime(ev.Boottime)) {
		return true
	}
	clock, err := digest.ClockOfChanges() // before the look for writers: who comes after that moves the change time
	return err == nil && digest.Settled(ev.Content, clock) && t.unwritten(ev) == nil
}

// provable asks the tree until it is so: what one level found out serves the next.
func (l *look) provable() bool {
	l.proven = l.proven || l.tree.provable(l.ev)
	return l.proven
}

// unwritten returns an error unless it is known that nobody has opened a file for writing since its event. Who had it open then is a flag of the event.
func (t *Tree) unwritten(ev *event.File) error {
	writes, held, err := t.config.Kernel.Writes(ev.Inodes()...)
	if err != nil {
		return err
	}
	if !held {
		return fmt.Errorf("%w, it may be: there was no room to count its writers", digest.ErrChanged)
	}
	if writes != ev.Writes {
		return fmt.Errorf("%w, it may be: it was opened for writing since its use", digest.ErrChanged)
	}
	return nil
}

// findName returns the path for the entry, as the kernel's IMA would have it.
func (l *look) findName(s *State) string {
	name := l.ev.Path
	if l.ev.Flags&event.Mprotect != 0 {
		path, err := lookWithin(s.allowance(), func(context.Context) (string, error) { return digest.MappingPath(l.ev) })
		if err == nil {
			name = path
		}
	}
	if l.ev.Flags&event.Unlinked != 0 && strings.HasPrefix(name, "/memfd:") {
		name = name[1:] // the name of its directory entry, as it has no path
	}
	if name == "" {
		name = inodeName(l.ev.Inodes()[0])
	}
	return name
}

// inodeName stands for a file without a name.
func inodeName(i event.Inode) string {
	return fmt.Sprintf("inode-%d-on-%d:%d", i.Ino, i.Dev>>20, i.Dev&0xfffff)
}

// functions returns what the event is to rules, in the kernel's order.
func (l *look) functions() []ima.Func {
	if l.ev.Func == ima.MmapCheck && l.ev.Flags&event.Reqprot != 0 {
		return []ima.Func{ima.MmapCheckReqprot, ima.MmapCheck}
	}
	return []ima.Func{l.ev.Func}
}

func (l *look) query(f ima.Func) *policy.Query {
	ev := l.ev
	return &policy.Query{
		Func: f, Mask: ima.MayExec,
		FSMagic: ev.SeenFS.Magic, FSName: ev.SeenFS.Name, FSUUID: ev.SeenFS.UUID,
		UID: ev.Subject.UID, EUID: ev.Subject.EUID, SUID: ev.Subject.SUID,
		GID: ev.Subject.GID, EGID: ev.Subject.EGID, SGID: ev.Subject.SGID,
		FOwner: ev.FOwner, FGroup: ev.FGroup,
		CapSetUID: ev.Flags&event.SetUIDCap != 0, CapSetGID: ev.Flags&event.SetGIDCap != 0,
	}
}

// measure does what one level's policy says. n is the level, s the event's own namespace.
func (l *look) measure(n, s *State) error {
	for _, f := range l.functions() {
		d := n.policy.Match(l.query(f))
		if l.file != nil {
			d.Actions &^= ima.Audit // the hook's event is what happened
		}
		if d.Actions&(ima.Measure|ima.Audit) == 0 {
			continue
		}
		if n.ended {
			l.inDoubt = true
			continue
		}
		if err := n.open(l.ctx); err != nil {
			l.inDoubt = true
			if err := n.giveUp(l.ctx, err); err != nil {
				return err
			}
			continue
		}
		template := n.template
		if d.Template != "" {
			template = d.Template
		}
		sum, loss := l.digest(s, l.algo(n, s, template))
		fault.RecordHashed.Pass()
		if d.Actions&ima.Audit != 0 {
			l.audit(n, f, sum)
		}
		if d.Actions&ima.Measure == 0 {
			continue
		}
		key := entryKey{pcr: n.pcr, template: template, algo: sum.Algo()}
		if d.PCR >= 0 {
			key.pcr = d.PCR
		}
		if loss != 0 && l.file != nil {
			continue // the hook says so
		}
		if loss != 0 {
			key = n.violation(loss)
		}
		if err := l.append(n, s, key, sum); err != nil {
			return err
		}
	}
	return nil
}

// violation is of the list's own template and register, whatever the rule says. Source: ima_api.c, ima_add_violation.
func (s *State) violation(loss event.Loss) entryKey {
	return entryKey{pcr: s.pcr, template: s.template, algo: s.algo, loss: loss}
}

// append hands the entry, or the violation, to a level's list.
func (l *look) append(n, s *State, key entryKey, sum ima.Digest) error {
	if l.ev.Flags&event.Writers != 0 && key.loss == 0 && !n.writers[l.ev.Content] {
		// As the kernel does: a violation first, then what the file was all the same; once for each content.
		if n.writers == nil || len(n.writers) >= 4096 {
			n.writers = make(map[event.Content]bool)
		}
		n.writers[l.ev.Content] = true
		if err := l.appendEntry(n, s, n.violation(event.LossOpenWriters), sum); err != nil {
			return err
		}
	}
	if key.loss == 0 && n.tree.inodes.same(n, key.pcr, l.ev, measured{sum, l.shown(s, key.template)}) {
		return l.hold(n, false) // the same content under another name, by a link or a rename: not measured again, as in the kernel
	}
	return l.appendEntry(n, s, key, sum)
}

func (l *look) appendEntry(n, s *State, key entryKey, sum ima.Digest) error {
	if err := l.hold(n, true); err != nil {
		return err
	}
	e, ok := l.entries[key]
	if !ok {
		v := imalog.FieldValues{Digest: sum, Name: l.name}
		l.fill(&v, s, key.template)
		var err error
		if key.loss != 0 {
			v.Digest = ima.ZeroDigest(key.algo)
			e, err = imalog.NewViolation(key.pcr, key.template, v)
			l.inDoubt = true
			l.tree.countLoss(key.loss)
			l.tree.log.Warn("violation", zap.Stringer("reason", key.loss), zap.String("file", l.name), zap.Stringer("ns", l.ev.NS),
				zap.NamedError("because", l.because))
		} else {
			e, err = imalog.NewEntry(key.pcr, key.template, v)
		}
		if err != nil {
			return err
		}
		l.entries[key] = e
	}
	if key.loss != 0 {
		if receipt, appended := n.tell(l.ev.Sequence, e); appended {
			l.pending.entries = append(l.pending.entries, pendingEntry{n, receipt})
		}
		return nil
	}
	if l.file == nil && n.gates(l.ev) && !n.list.Holds(e) { // nobody asked before its use; before the entry, or a crash in between would hide it
		n.gateMissed()
		if err := l.appendEntry(n, s, n.violation(event.LossNotGated), sum); err != nil {
			return err
		}
	}
	receipt := n.list.Append(e)
	l.pending.entries = append(l.pending.entries, pendingEntry{n, receipt})
	if n == l.tree.native && l.tree.config.NativeTPM != nil && l.file == nil {
		l.tree.latencies.add(receipt, l.ev.Boottime)
	}
	return nil
}

// audit writes what the kernel's IMA would give to the audit system (AUDIT_INTEGRITY_RULE).
func (l *look) audit(n *State, f ima.Func, sum ima.Digest) {
	l.tree.log.Info("audit", zap.Stringer("ns", n.ns), zap.Stringer("func", f), zap.String("file", l.name),
		zap.Stringer("hash", sum), zap.Uint32("pid", l.ev.Process.TGID), zap.Uint32("uid", l.ev.Subject.UID))
}

// digest returns the content's digest, or why there is none.
func (l *look) digest(s *State, algo ima.HashAlgo) (ima.Digest, event.Loss) {
	if l.ev.Flags&event.Changed != 0 {
		return ima.Digest{}, event.LossContentChanged
	}
	if d := l.ev.Digest; !d.IsNone() && d.Algo() == algo {
		if l.provable() {
			l.tree.cache.Put(l.ev.Content, d)
		}
		return d, 0
	}
	if d, ok := l.digests[algo]; ok || l.loss != 0 {
		return d, l.loss
	}
	if l.file != nil {
		return l.sumOfQuestion(s, algo)
	}
	cacheable := l.provable()
	if cacheable {
		if d := l.tree.cache.Get(l.ev.Content, algo); !d.IsNone() {
			return d, 0
		}
	}
	root := l.root(s)
	sums, err := lookWithin(s.allowance(), func(ctx context.Context) ([]ima.Digest, error) { return digest.Hash(ctx, l.ev, root, algo) })
	if err == nil && !cacheable {
		err = l.tree.unwritten(l.ev)
	}
	if err != nil {
		l.because, l.loss = err, event.LossReadError
		if errors.Is(err, digest.ErrChanged) {
			l.loss = event.LossContentChanged
		} else if errors.Is(err, digest.ErrUnreachable) {
			l.loss = event.LossFileUnreachable
		}
		return ima.Digest{}, l.loss
	}
	l.tree.cache.CountHashed()
	l.digests[algo] = sums[0]
	if cacheable {
		l.tree.cache.Put(l.ev.Content, sums[0])
	} else {
		l.inDoubt = true
	}
	return sums[0], 0
}

// root returns the way into the event's namespace that is kept from the first time it was needed. Where no process is left in
// the namespace it is that of the nearest ancestor: most of its mounts are the same, and whatever is opened proves what it is.
func (l *look) root(s *State) *digest.Root {
	if s.root == nil && s.ns == l.ev.NS {
		s.root, _ = digest.OpenRoot(l.ev.Process)
	}
	if s.root != nil {
		return s.root
	}
	tasks, err := l.tree.config.Kernel.Tasks()
	if err != nil {
		l.tree.log.Warn("look for a process", zap.Stringer("ns", s.ns), zap.Error(err))
	}
	for n := s; n != nil; n = n.parent {
		if n.root == nil {
			n.root = openRoot(tasks, n.ns)
		}
		if n.root != nil {
			return n.root
		}
	}
	return nil
}

// openRoot opens the root folder that one of the tasks sees that are in a namespace; nil if there is none.
func openRoot(tasks []event.Task, ns event.MountNS) *digest.Root {
	for _, task := range tasks {
		if task.NS != ns {
			continue
		}
		if root, err := digest.OpenRoot(task.Process); err == nil {
			return root
		}
	}
	return nil
}
