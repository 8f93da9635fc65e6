package namespace

import (
	"testing"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/loader"
)

func ns(id uint64) event.MountNS { return event.MountNS{Inum: uint32(4026531840 + id), ID: id} }

func TestAncestryTakesTheOldestProcess(t *testing.T) {
	task := func(in, parent event.MountNS, pid uint32, start time.Duration) event.Task {
		return event.Task{NS: in, ParentNS: parent, Process: event.Process{TGID: pid, PID: pid, Start: start}}
	}
	parents := ancestry([]event.Task{
		task(ns(1), event.MountNS{}, 1, 0),
		task(ns(2), ns(3), 40, 40), // entered from ns(3) later
		task(ns(2), ns(1), 20, 20),
		task(ns(2), ns(2), 10, 10), // its parent is within
		task(ns(3), ns(1), 30, 30),
	})
	if parents[ns(2)] != ns(1) || parents[ns(3)] != ns(1) || len(parents) != 2 {
		t.Errorf("parents %v", parents)
	}
}

func TestTopDown(t *testing.T) {
	native := ns(1)
	for name, c := range map[string]struct {
		parents map[event.MountNS]event.MountNS
		strays  []event.MountNS // become children of the native one
	}{
		"a chain whose ids run backwards": {map[event.MountNS]event.MountNS{ns(2): ns(3), ns(3): ns(4), ns(4): native}, nil},
		"a parent that is gone":           {map[event.MountNS]event.MountNS{ns(2): ns(9), ns(3): ns(2)}, []event.MountNS{ns(2)}},
		"a circle":                        {map[event.MountNS]event.MountNS{ns(2): ns(3), ns(3): ns(2)}, []event.MountNS{ns(2)}},
		"its own parent":                  {map[event.MountNS]event.MountNS{ns(2): ns(2)}, []event.MountNS{ns(2)}},
		"none":                            {map[event.MountNS]event.MountNS{}, nil},
	} {
		t.Run(name, func(t *testing.T) {
			order := topDown(c.parents, native)
			seen := map[event.MountNS]bool{native: true}
			for _, n := range order {
				if !seen[c.parents[n]] {
					t.Errorf("%v comes before its parent %v: %v", n, c.parents[n], order)
				}
				seen[n] = true
			}
			if len(order) != len(c.parents) {
				t.Errorf("%d of %d namespaces", len(order), len(c.parents))
			}
			for _, n := range c.strays {
				if c.parents[n] != native {
					t.Errorf("the parent of %v is %v", n, c.parents[n])
				}
			}
		})
	}
}

func TestLossNames(t *testing.T) {
	key := loader.LossKey{NS: ns(7), Reason: event.LossRingBufferFull}
	name := lossName(key.Reason, key.NS, 17)
	if name != "imans-lost/ring_buffer_full/4026531847:7/17" {
		t.Errorf("name %q", name)
	}
	got, n, ok := parseLossName(name)
	if !ok || got != key || n != 17 {
		t.Errorf("parsed %+v, %d, %v", got, n, ok)
	}
	for _, other := range []string{"/bin/true", "imans-lost", "imans-lost/no_such_reason/1:1/1", "imans-lost/ring_buffer_full/x/1", "boot_aggregate"} {
		if _, _, ok := parseLossName(other); ok {
			t.Errorf("%q passes for a loss", other)
		}
	}
}

func TestInodesRememberTheLastContent(t *testing.T) {
	i := newInodes()
	i.max = 2
	one, two := measured{digest: ima.ZeroDigest(ima.SHA256)}, measured{digest: ima.ZeroDigest(ima.SHA512)}
	s := &State{ns: ns(2)}
	file := func(ino uint64) *event.File { return &event.File{SeenIno: ino} }
	if i.same(s, 10, file(1), one) {
		t.Error("known before it was seen")
	}
	if !i.same(s, 10, file(1), one) {
		t.Error("a link is taken for new content")
	}
	if i.same(s, 10, file(1), two) || i.same(s, 10, file(1), one) {
		t.Error("changed content is taken for the old")
	}
	if i.same(s, 11, file(1), one) || i.same(&State{ns: ns(3)}, 10, file(1), one) {
		t.Error("another register or list knows it too")
	}
	if i.same(s, 10, file(1), measured{one.digest, [32]byte{1}}) {
		t.Error("content signed anew is taken for the old")
	}
	if n := remembered(i); n > i.max || n != i.count {
		t.Errorf("%d remembered, %d counted, at most %d", n, i.count, i.max)
	}
}

func remembered(i *inodes) (n int) {
	for _, list := range i.taken {
		n += len(list)
	}
	return n
}

func TestInodesOfAListEndWithIt(t *testing.T) {
	i := newInodes()
	i.max = 10
	other, busy, m := &State{ns: ns(2)}, &State{ns: ns(3)}, measured{digest: ima.ZeroDigest(ima.SHA256)}
	file := func(ino uint64) *event.File { return &event.File{SeenIno: ino} }
	i.same(other, 10, file(1), m)
	for ino := range uint64(1000) {
		i.same(busy, 10, file(ino), m)
	}
	if !i.same(other, 10, file(1), m) {
		t.Error("a busy list takes another's place")
	}
	if n := remembered(i); n != i.max || n != i.count {
		t.Errorf("%d remembered, %d counted, want %d", n, i.count, i.max)
	}
	i.forget(3)
	if n := remembered(i); n != 1 || n != i.count || len(i.taken) != 1 {
		t.Errorf("%d remembered of %d lists, %d counted, after the busy one's end", n, len(i.taken), i.count)
	}
	i.forget(4)                     // which took nothing
	for ino := range uint64(1000) { // there is room again
		i.same(busy, 10, file(ino), m)
	}
	if n := remembered(i); n != i.max || n != i.count {
		t.Errorf("%d remembered, %d counted, want %d", n, i.count, i.max)
	}
}

// What is to be forgotten with a namespace is no more than the kernel side has.
func TestMarksAreForgotten(t *testing.T) {
	tree := New(Config{Log: zap.NewNop()})
	native := active(tree, event.MountNS{Inum: 1, ID: 1}, "", 11)
	one, other := active(tree, event.MountNS{Inum: 2, ID: 2}, "", 10), active(tree, event.MountNS{Inum: 3, ID: 3}, "", 10)
	tree.native, tree.states = native, map[uint64]*State{1: native, 2: one, 3: other}
	key := func(ino uint64, ignored bool) event.MeasuredKey {
		k := event.MeasuredKey{Content: event.MeasuredContent{Ino: ino}}
		if ignored {
			k.Content.Func = uint32(event.IDsIgnored) << 8
		}
		return k
	}
	isNew, emptied := loader.Marked{New: true}, loader.Marked{New: true, Emptied: true}
	tree.marked(native, key(1, true), isNew)
	tree.marked(one, key(2, true), isNew)
	tree.marked(one, key(2, true), loader.Marked{}) // of another record
	tree.marked(one, key(3, false), isNew)
	tree.marked(other, key(4, true), isNew)
	check := func(want map[*State]int) {
		t.Helper()
		for s, n := range want {
			if got := s.marks.all(); len(got) != n {
				t.Errorf("%v: %d marks, want %d: %v", s.ns, len(got), n, got)
			}
		}
	}
	check(map[*State]int{native: 0, one: 2, other: 1})
	tree.marked(native, key(5, true), emptied)
	check(map[*State]int{native: 0, one: 1, other: 0})
	tree.marked(other, key(6, false), emptied)
	check(map[*State]int{native: 0, one: 0, other: 1})
}
