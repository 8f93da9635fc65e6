package namespace

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/loader"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/policy"
)

// watched is a namespace whose list takes everything, and so does the native list.
func watched(t *testing.T) *host {
	t.Helper()
	h := newHost(t, "")
	all, err := policy.Parse("test", []byte("measure func=BPRM_CHECK\n"))
	if err != nil {
		t.Fatal(err)
	}
	h.s.policy, h.tree.native.policy = all, all
	return h
}

// run has a file measured that the kernel took the digest of.
func (h *host) run(path string, inode uint64, content string) {
	h.t.Helper()
	sum, err := ima.NewDigest(ima.SHA256, []byte(strings.Repeat(content, 32)))
	if err != nil {
		h.t.Fatal(err)
	}
	ev := &event.File{Header: event.Header{NS: h.s.ns}, Func: ima.BPRMCheck, Path: path, Digest: sum, SeenDev: 1, SeenIno: inode}
	ev.Content.Dev, ev.Content.Ino = 1, inode
	p, err := h.tree.File(soon(h.t), ev)
	if err == nil {
		err = p.Logged(soon(h.t))
	}
	if err != nil {
		h.t.Fatal(err)
	}
}

// write has someone open a file for writing.
func (h *host) write(inode uint64) {
	h.t.Helper()
	if err := h.tree.Write(soon(h.t), &event.Write{Inode: event.Inode{Dev: 1, Ino: inode}}); err != nil {
		h.t.Fatal(err)
	}
}

// last checks the last name of the namespace's list.
func (h *host) last(want string) {
	h.t.Helper()
	if names := h.names(); len(names) == 0 || names[len(names)-1] != want {
		h.t.Errorf("the list ends %q, want %q", names, want)
	}
}

// A file's names that the list does not take are not the one that it tells a writer by; those of content that it takes are, though it had
// them before.
func TestHeldByTheListsName(t *testing.T) {
	h := watched(t)
	h.run("/a", 1, "x")
	size := h.s.held.size
	for i := range 100 {
		h.run(fmt.Sprint("/link", i), 1, "x")
	}
	if h.s.held.size != size {
		t.Errorf("the file of what is held grew from %d to %d bytes, the list has %d entries", size, h.s.held.size, len(h.names()))
	}
	h.write(1)
	h.last("/a")
	h.run("/link", 1, "x") // it is told of again
	h.write(1)
	h.last("/link")
	h.run("/b", 2, "y")
	h.run("/a", 1, "x")
	h.run("/b", 1, "y") // the number is another file's now, which the list knows
	entries := len(h.names())
	h.write(1)
	h.last("/b")
	if n := len(h.names()); n != entries+1 {
		t.Errorf("%d entries, want one more than %d", n, entries)
	}
}

// A list that has no room to hold more files lets go of the first, and says so.
func TestHeldTooMany(t *testing.T) {
	h := watched(t)
	h.run("/0", 0, "x")
	h.s.held.maxInodes, h.tree.native.held.maxInodes = 10, 20
	for i := range uint64(10) {
		h.run(fmt.Sprint("/", i+1), i+1, "x")
	}
	dropped := lossName(event.LossHoldsDropped, h.s.ns, 5)
	if names := h.names(); names[len(names)-2] != dropped {
		t.Errorf("the list ends %q, want %q and an entry", names, dropped)
	}
	h.write(4)
	h.last("/10")
	h.write(5)
	h.last("/5")
	st, err := os.Stat(h.s.held.path)
	if err != nil || st.Size() != h.s.held.size || len(h.s.held.at) != 5 {
		t.Errorf("%v of %d bytes, %d inodes, %v", st.Name(), st.Size(), len(h.s.held.at), err)
	}
	for n, name := range names(t, h.tree.native.list) {
		if strings.HasPrefix(name, lossPrefix) {
			t.Errorf("entry %d of the native list is %s", n, name)
		}
	}
}

// A writer that is lost is in each list that tells of files, in no other, and in the native list. An agent that died before that has it told
// again; one that told all has not.
func TestLostWriters(t *testing.T) {
	h := watched(t)
	h.run("/a", 1, "x")
	other := active(h.tree, event.MountNS{Inum: 8, ID: 8}, filepath.Join(h.tree.nsDir(), "8-8"), 10)
	other.parent = h.tree.native
	h.tree.states[8] = other
	if err := other.open(soon(t)); err != nil {
		t.Fatal(err)
	}
	key := loader.LossKey{Reason: event.LossWriterLost}
	lists := map[string]*measure.List{"holder": h.s.list, "other": other.list, "native": h.tree.native.list}
	all := true
	lost := func(count uint64, want bool, told map[string]int) {
		t.Helper()
		handle := func(context.Context) (bool, error) {
			if all {
				h.run("/late", 2, "y") // was recorded before the writer
			}
			return all, nil
		}
		if any, err := h.tree.lostWriters(soon(t), key, count, handle); any != want || err != nil {
			t.Errorf("%t, %v, want %t", any, err, want)
		}
		for which, list := range lists {
			n := 0
			for _, name := range names(t, list) {
				if strings.HasPrefix(name, "imans-lost/writer_lost/0:0/") {
					n++
				}
			}
			if n != told[which] {
				t.Errorf("%d of %d: %d violations in the list of %s, want %d", count, h.tree.recorded[key], n, which, told[which])
			}
		}
	}
	lost(1, true, map[string]int{"holder": 1, "native": 1})
	lost(1, false, map[string]int{"holder": 1, "native": 1})
	all = false
	lost(3, false, map[string]int{"holder": 1, "native": 1})
	all = true
	h.s.held.at = map[event.Inode]heldRecord{} // /late comes meanwhile
	lost(3, true, map[string]int{"holder": 2, "native": 2})
	h.tree.recorded = map[loader.LossKey]uint64{}
	if err := h.tree.readRecordedLosses(h.tree.native.list); err != nil || h.tree.recorded[key] != 3 {
		t.Errorf("the next agent finds %d on record, %v", h.tree.recorded[key], err)
	}
	lost(3, false, map[string]int{"holder": 2, "native": 2})
}
