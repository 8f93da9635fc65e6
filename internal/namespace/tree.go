// Package namespace keeps the tree of mount namespaces and, for each, the State that ends with it: policy, measurement list,
// vTPM. It turns what the kernel side saw into entries of the lists of a namespace and of all its ancestors, each by its own
// policy.
//
// Call New, then Start once with what is alive; then File, Birth, Death, Move and Losses in the order of the records, from one
// goroutine, and Activate, AttachTPM, ReleaseTPM and the like from the same; List and Find from any. Close lets go of everything and ends nothing: lists and vTPMs are there again at the next
// Start of the same boot.
//
// # What is promised
//
// A record is through when its Pending is done: its entries are in the logs of all lists concerned, or a violation says why not.
// A namespace's folder is made before its list begins and removed after its vTPM has ended. The native list names a vTPM that a list
// was given before that gets an entry, and says its end before it ends. Two namespaces are never mixed:
// everything is keyed by the kernel's unique id.
package namespace

import (
	"context"
	"errors"
	"fmt"
	"io"
	"maps"
	"path/filepath"
	"slices"
	"sort"
	"sync"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/digest"
	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/loader"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/policy"
	"imans.dev/imans-agent/internal/tpmext"
	"imans.dev/imans-agent/internal/vtpm"
)

// Config says how namespaces are kept.
type Config struct {
	Dir          string // state of this boot; absolute
	Archive      string // folder for namespaces that end; "": their state goes
	RunDir       string // sockets; absolute
	NativePolicy *policy.Policy
	NSPolicy     *policy.Policy // that new namespaces start with
	Mode         Mode           // how namespaces become active
	MaxRules     int            // that a namespace may have
	NativeTPM    measure.TPM    // nil: the native list is not anchored
	NativeSocket string         // address of NativeTPM if that is a program; "": it is the machine's own
	NativePCR    int
	Swtpm        string // program; "": lists of namespaces are not anchored
	SwtpmUser    string // as vtpm.Config.User
	// OpenTPM opens a vTPM that an earlier agent attached, as the Attachment's TPM and Share were opened; nil: none was shared.
	OpenTPM  func(context.Context, *vtpm.Instance) (*tpmext.TPM, io.Closer, error)
	Template string
	Algo     ima.HashAlgo
	Gates    Gates    // nil: nothing is held up
	Gate     GateMode // of namespaces that are given a vTPM
	Kernel   *loader.Kernel
	Log      *zap.Logger
}

// Tree is the tree of mount namespaces.
type Tree struct {
	config   Config
	log      *zap.Logger
	store    *measure.Store
	cache    *digest.Cache
	inodes   *inodes
	trimmed  time.Time // when held inodes were last looked through
	restored uint64    // calls of RestoreLogs
	again    bool      // the kernel side is an earlier agent's, which knew it: its records may come again
	bootAt   time.Time // the wall clock's reading at boot, by today's clock

	caughtUp   bool // no record of an earlier agent's comes any more
	toldEnough bool // a list has noted many violations, see forgetTold

	mu         sync.Mutex // guards what follows, and each State's fields that say so
	native     *State
	states     map[uint64]*State // by unique id
	generation uint64            // of policies; never reused within a boot
	recorded   map[loader.LossKey]uint64
	losses     map[event.Loss]uint64 // of the agent's side, since its start
	events     uint64
	banks      []ima.HashAlgo          // of vTPMs; nil: none was started yet
	unanchored map[event.MountNS]error // vTPMs that did not come, of which the lists do not tell yet

	latencies *latencies // of the native list

	ended      []*State        // in the tree no more; their records are not given back yet
	dead       []event.MountNS // all that ended so
	finishing  sync.WaitGroup  // of namespaces that ended
	ending     context.Context
	stopEnding context.CancelFunc
}

// cacheSize is how many digests are kept: at about 200 bytes each.
const cacheSize = 65536

// New makes an empty tree.
func New(c Config) *Tree {
	if c.OpenTPM == nil {
		c.OpenTPM = openAlone
	}
	boot := sinceBoot()
	ending, stop := context.WithCancel(context.Background())
	return &Tree{
		config: c, log: c.Log, store: measure.NewStore(), cache: digest.NewCache(cacheSize), inodes: newInodes(),
		bootAt: time.Now().Add(-boot), states: make(map[uint64]*State), generation: uint64(boot),
		recorded: make(map[loader.LossKey]uint64), losses: make(map[event.Loss]uint64), unanchored: make(map[event.MountNS]error),
		ending: ending, stopEnding: stop, latencies: newLatencies(),
	}
}

// Start fills the tree: the native namespace, which is that of process 1; those whose state an earlier agent of this boot left;
// those that the kernel side knows. Parents are the kernel side's, else what process ancestry tells, else the native one.
func (t *Tree) Start(ctx context.Context) error {
	side, err := t.lookAtKernelSide()
	if err != nil {
		return err
	}
	t.again = side.same
	tasks, err := t.config.Kernel.Tasks()
	if err != nil {
		return err
	}
	registered, err := t.config.Kernel.Registered()
	if err != nil {
		return err
	}
	// Every namespace gets a new generation below, so what an earlier agent marked stands for nothing any more.
	if err := t.config.Kernel.ForgetAll(); err != nil {
		return err
	}
	native := initNamespace(tasks)
	if native.IsZero() {
		return errors.New("find the native namespace: process 1 is not to be seen; run in the host's pid namespace")
	}
	if err := t.startNative(ctx, native); err != nil {
		return err
	}
	left, err := leftStates(t.nsDir())
	if err != nil {
		return err
	}
	parents := ancestry(tasks)
	for ns, parent := range registered {
		if !parent.IsZero() {
			parents[ns] = parent
		} else if _, ok := parents[ns]; !ok {
			parents[ns] = native
		}
	}
	for ns, f := range left {
		parent := event.MountNS{Inum: f.ParentInum, ID: f.ParentID}
		if known, ok := parents[ns]; !ok || known == native {
			parents[ns] = parent
		}
	}
	delete(parents, native)
	for _, ns := range topDown(parents, native) {
		s := t.add(ns, t.lookup(parents[ns]), originFound)
		if f, ok := left[ns]; ok {
			if err := s.restore(f); err != nil {
				return err
			}
			if err := s.open(ctx); err != nil {
				if err := s.giveUp(ctx, err); err != nil {
					return err
				}
			}
		}
	}
	if err := t.toldOf(ctx, side, left); err != nil {
		return err
	}
	go t.latencies.run(t.ending) // ends with Close
	return t.publish(t.native)
}

// startNative opens the native list and counts the losses that it tells of.
func (t *Tree) startNative(ctx context.Context, ns event.MountNS) error {
	dir := nativeDir(t.config.Dir)
	if err := durable.Mkdir(dir); err != nil {
		return err
	}
	s := &State{
		tree: t, ns: ns, dir: dir, policy: t.config.NativePolicy, pcr: t.config.NativePCR, born: t.bootAt, origin: originNative,
		active: true, template: t.config.Template, algo: t.config.Algo, ids: ima.InitialMaps(), gone: make(chan struct{}),
	}
	if err := s.openList(ctx, measure.Config{TPM: t.config.NativeTPM}); err != nil {
		return err
	}
	t.mu.Lock()
	t.native, t.states[ns.ID] = s, s
	t.mu.Unlock()
	if !t.again {
		return nil // the counters began anew
	}
	return t.readRecordedLosses(s.list)
}

// initNamespace returns the mount namespace of process 1 of the initial pid namespace.
func initNamespace(tasks []event.Task) event.MountNS {
	for _, task := range tasks {
		if task.Process.PID == 1 {
			return task.NS
		}
	}
	return event.MountNS{}
}

// ancestry guesses parents from processes: a namespace's parent is that of its oldest process's parent, if that is another.
func ancestry(tasks []event.Task) map[event.MountNS]event.MountNS {
	oldest := make(map[event.MountNS]event.Task)
	for _, task := range tasks {
		o, ok := oldest[task.NS]
		if task.ParentNS != task.NS && !task.ParentNS.IsZero() && (!ok || task.Process.Start < o.Process.Start) {
			oldest[task.NS] = task
		}
	}
	parents := make(map[event.MountNS]event.MountNS, len(oldest))
	for ns, task := range oldest {
		parents[ns] = task.ParentNS
	}
	return parents
}

// topDown orders namespaces so that each comes after its parent. One whose parents lead nowhere, or in a circle, becomes a child
// of the native one.
func topDown(parents map[event.MountNS]event.MountNS, native event.MountNS) []event.MountNS {
	depth := func(ns event.MountNS) int {
		n := 1
		for p := parents[ns]; p != native; p = parents[p] {
			if _, ok := parents[p]; !ok || n > len(parents) {
				parents[ns] = native
				return 1
			}
			n++
		}
		return n
	}
	var order []event.MountNS
	depths := make(map[event.MountNS]int)
	for ns := range parents {
		order = append(order, ns)
	}
	sort.Slice(order, func(i, j int) bool { return order[i].ID < order[j].ID })
	for _, ns := range order {
		depths[ns] = depth(ns)
	}
	sort.SliceStable(order, func(i, j int) bool { return depths[order[i]] < depths[order[j]] })
	return order
}

// lookup returns a namespace's state, or the native one if it is not known.
func (t *Tree) lookup(ns event.MountNS) *State {
	t.mu.Lock()
	defer t.mu.Unlock()
	if s, ok := t.states[ns.ID]; ok {
		return s
	}
	return t.native
}

func (t *Tree) known(ns event.MountNS) (*State, bool) {
	t.mu.Lock()
	defer t.mu.Unlock()
	s, ok := t.states[ns.ID]
	return s, ok
}

// How a namespace came to be known.
const (
	originNative = "native"
	originFound  = "present at start"
	originBorn   = "born"
	originMet    = "met by an event" // its birth was lost
)

// add makes the state of a namespace. If it is active its list and vTPM come with its first entry.
func (t *Tree) add(ns event.MountNS, parent *State, origin string) *State {
	s := &State{
		tree: t, ns: ns, parent: parent, policy: &policy.Policy{}, pcr: ima.DefaultPCR, born: time.Now(), origin: origin,
		dir:      filepath.Join(t.nsDir(), fmt.Sprintf("%d-%d", ns.Inum, ns.ID)),
		template: t.config.Template, algo: t.config.Algo, ids: parent.idMaps(), gone: make(chan struct{}),
	}
	if t.config.Mode == All {
		s.active, s.policy = true, t.config.nsPolicy(s.ids)
	}
	t.mu.Lock()
	t.states[ns.ID] = s
	parent.children = append(parent.children, s)
	t.mu.Unlock()
	return s
}

// Birth adds a namespace.
func (t *Tree) Birth(b *event.Birth) error {
	if _, ok := t.known(b.NS); ok {
		return nil // seen by Start already
	}
	parent := t.lookup(b.Parent)
	s := t.add(b.NS, parent, originBorn)
	if parent.requested(b) && !s.active {
		s.active, s.policy = true, t.config.nsPolicy(s.ids)
	}
	fault.NamespaceBorn.Pass()
	s.leader = event.Process{TGID: b.Creator}
	t.log.Debug("namespace born", zap.Stringer("ns", b.NS), zap.Stringer("parent", s.parent.ns))
	return t.publish(s)
}

// Move counts who enters a namespace from outside.
func (t *Tree) Move(m *event.Move) {
	s, ok := t.known(m.NS)
	if !ok || m.From == s.parentNS() && time.Since(s.born) < time.Second {
		return // the creator entering what it made
	}
	t.mu.Lock()
	s.entered++
	t.mu.Unlock()
}

// Death takes a namespace out of the tree; its children become its parent's. What it has stays until Finish.
func (t *Tree) Death(ns event.MountNS) error {
	t.dead = append(t.dead, ns)
	s, ok := t.known(ns)
	if !ok || s == t.native {
		return nil
	}
	t.mu.Lock()
	delete(t.states, ns.ID)
	parent := s.parent
	parent.children = remove(parent.children, s)
	for _, c := range s.children {
		c.parent = parent
		parent.children = append(parent.children, c)
	}
	orphans := s.children
	t.mu.Unlock()
	var errs []error
	for _, c := range orphans {
		errs = append(errs, c.record(), t.publish(c))
	}
	close(s.gone)
	t.inodes.forget(ns.ID)
	errs = append(errs, t.config.Kernel.Forget(s.marks.all()))
	s.marks = marks{}
	if s.gate != "" {
		errs = append(errs, t.config.Gates.Close(s.ns))
	}
	t.log.Debug("namespace ended", zap.Stringer("ns", ns))
	t.ended = append(t.ended, s)
	return errors.Join(errs...)
}

// Finish has the vTPMs, the lists and the folders of what ended on their way out. Call it when the records that were handled are given back:
// before, a crash makes the next agent read them again, and it needs to know what they are of.
func (t *Tree) Finish() error {
	for _, s := range t.ended {
		t.finishing.Go(func() { t.finish(t.ending, s) })
	}
	t.forgetTold()
	var errs []error
	for _, ns := range t.dead {
		errs = append(errs, t.config.Kernel.Unregister(ns))
	}
	t.ended, t.dead = nil, nil
	return errors.Join(errs...)
}

// Ended returns the namespaces in the tree that are alive no more. Their deaths are among the records made before the call, but for those that
// there was no room to tell of, and those that an agent gave back when it ended itself.
func (t *Tree) Ended() ([]event.MountNS, error) {
	t.mu.Lock()
	known := make([]event.MountNS, 0, len(t.states))
	for _, s := range t.states {
		if s != t.native {
			known = append(known, s.ns)
		}
	}
	t.mu.Unlock()
	alive, err := t.config.Kernel.Alive()
	if err != nil {
		return nil, err
	}
	return slices.DeleteFunc(known, func(ns event.MountNS) bool { return alive[ns] }), nil
}

// publish gives a namespace and all below it a new generation of policies, and tells the kernel side.
func (t *Tree) publish(s *State) error {
	t.mu.Lock()
	t.generation++
	s.generation = t.generation
	children := append([]*State(nil), s.children...)
	t.mu.Unlock()
	errs := []error{t.tell(s)}
	if t.config.Gates != nil {
		errs = append(errs, t.config.Gates.Flush(s.ns))
	}
	for _, c := range children {
		errs = append(errs, t.publish(c))
	}
	return errors.Join(errs...)
}

// closeTimeout bounds how long Close waits for TPMs: what they did not get, they get at the next Start.
const closeTimeout = 5 * time.Second

// Close lets go of all lists and vTPMs without ending any. It gives the TPMs a moment to catch up with the lists.
func (t *Tree) Close() error {
	ctx, cancel := context.WithTimeout(context.Background(), closeTimeout)
	defer cancel()
	defer t.stopEnding()
	context.AfterFunc(ctx, t.stopEnding)
	var errs []error
	for _, s := range t.states {
		if s.list != nil && s.list.Settle(ctx) != nil {
			t.log.Info("closing a list before its TPM caught up; the next start resumes", zap.Stringer("ns", s.ns))
		}
	}
	for _, s := range slices.AppendSeq(t.ended, maps.Values(t.states)) {
		errs = append(errs, s.close())
	}
	t.finishing.Wait()
	return errors.Join(errs...)
}

func remove(states []*State, s *State) []*State {
	kept := states[:0]
	for _, c := range states {
		if c != s {
			kept = append(kept, c)
		}
	}
	return kept
}
