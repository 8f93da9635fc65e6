package namespace

import (
	"fmt"
	"sort"
	"time"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/policy"
)

// Info is what there is to say of a namespace at one moment.
type Info struct {
	NS       event.MountNS
	Parent   event.MountNS // zero: the native namespace
	Depth    int           // 0: the native namespace
	Origin   string        // how it came to be known
	Born     time.Time     // when the agent learned of it
	Leader   event.Process // the first process seen in it
	Entered  int           // processes that came in from outside
	PCR      int
	TPM      string // address; "" without one, before the first entry, and for the machine's own
	Software bool   // its TPM, if it has one, is a program
	Attached bool   // its TPM is a vTPM that it was given by AttachTPM
	Active   bool   // it is an IMA namespace, and does not share its parent's fate
	Listed   bool   // it has a list
	Status   measure.Status
	Rules    int // in its policy
	Template string
	Algo     ima.HashAlgo
	IDs      ima.IDMaps // of the user namespace that owns it
	Gate     GateMode   // what waits there until it is measured
}

// List returns all namespaces, each after its parent, siblings by inode number.
func (t *Tree) List() []Info {
	t.mu.Lock()
	defer t.mu.Unlock()
	var infos []Info
	var walk func(s *State, depth int)
	walk = func(s *State, depth int) {
		infos = append(infos, s.info(depth))
		children := append([]*State(nil), s.children...)
		sort.Slice(children, func(i, j int) bool { return children[i].ns.Inum < children[j].ns.Inum })
		for _, c := range children {
			walk(c, depth+1)
		}
	}
	if t.native != nil {
		walk(t.native, 0)
	}
	return infos
}

// info is called with the tree locked.
func (s *State) info(depth int) Info {
	i := Info{
		NS: s.ns, Parent: s.parentNS(), Depth: depth, Origin: s.origin, Born: s.born, Leader: s.leader, Entered: s.entered,
		PCR: s.pcr, Active: s.active, Listed: s.list != nil, Rules: len(s.policy.Rules()), Template: s.template, Algo: s.algo, IDs: s.ids,
		Software: s.parent != nil || s.tree.config.NativeSocket != "", Attached: s.attached != nil, Gate: s.gate,
	}
	if s.parent == nil {
		i.TPM = s.tree.config.NativeSocket
	}
	if s.list != nil {
		i.Status = s.list.Status()
	}
	if s.swtpm != nil {
		i.TPM = s.swtpm.Address()
	}
	return i
}

// NotFoundError means that no namespace, or more than one, has that name.
type NotFoundError struct {
	Name    string
	Matches []event.MountNS
}

// Error says what to do.
func (e *NotFoundError) Error() string {
	if len(e.Matches) == 0 {
		return fmt.Sprintf("no namespace %q; imans-agent ns lists them", e.Name)
	}
	return fmt.Sprintf("%q names more than one namespace: %v; say which, as INUM:ID", e.Name, e.Matches)
}

// View is what others may read of a namespace.
type View struct {
	Info   Info
	Policy *policy.Policy
	List   *measure.List // nil until the first entry
	Gone   <-chan struct{}
}

// Find returns the namespace of that name: its inode number as lsns prints it, inum:id, or "native".
func (t *Tree) Find(name string) (View, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var found []*State
	for _, s := range t.states {
		if name == s.ns.String() || name == fmt.Sprint(s.ns.Inum) || name == "native" && s == t.native {
			found = append(found, s)
		}
	}
	if len(found) != 1 {
		e := &NotFoundError{Name: name}
		for _, s := range found {
			e.Matches = append(e.Matches, s.ns)
		}
		return View{}, e
	}
	return found[0].view(), nil
}

// view is called with the tree locked.
func (s *State) view() View {
	depth := 0
	for n := s.parent; n != nil; n = n.parent {
		depth++
	}
	return View{Info: s.info(depth), Policy: s.policy, List: s.list, Gone: s.gone}
}

// Lookup returns a namespace by its inode number and id; by the number alone, if the id is 0, the youngest. ErrEnded: there is none.
func (t *Tree) Lookup(ns event.MountNS) (View, error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	found := t.states[ns.ID]
	if ns.ID == 0 {
		for _, s := range t.states {
			if s.ns.Inum == ns.Inum && (found == nil || s.ns.ID > found.ns.ID) {
				found = s
			}
		}
	}
	if found == nil || found.ns.Inum != ns.Inum {
		return View{}, ErrEnded
	}
	return found.view(), nil
}

// Counters is what the tree has counted since the agent began.
type Counters struct {
	Namespaces int
	Events     uint64
	Entries    int               // different ones, however many lists hold them
	Hashed     uint64            // files read by the agent
	Asked      uint64            // questions of gates
	Lost       map[string]uint64 // by the kernel side, by reason, since the programs were loaded
	Violations map[string]uint64 // events that could not be measured, by reason
	Latency    Latency           // of the native list
}

// Counters returns the counters.
func (t *Tree) Counters() (Counters, error) {
	lost, err := t.config.Kernel.Losses()
	if err != nil {
		return Counters{}, err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	c := Counters{
		Namespaces: len(t.states), Events: t.events, Entries: t.store.Len(), Hashed: t.cache.Hashed(),
		Lost: make(map[string]uint64), Violations: make(map[string]uint64), Latency: t.latencies.get(),
	}
	if t.config.Gates != nil {
		c.Asked = t.config.Gates.Asked()
	}
	for key, n := range lost {
		c.Lost[key.Reason.String()] += n
	}
	for reason, n := range t.losses {
		c.Violations[reason.String()] = n
	}
	return c, nil
}
