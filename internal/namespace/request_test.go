package namespace

import (
	"os"
	"testing"

	"imans.dev/imans-agent/internal/event"
)

func TestRequestedByTheProcessTree(t *testing.T) {
	const gone = 1 << 22 // beyond the highest process number
	self := uint32(os.Getpid())
	for name, c := range map[string]struct {
		request request
		birth   event.Birth
		want    bool
	}{
		"by the cloner itself":                {request{tgid: self}, event.Birth{Creator: self}, true},
		"by an ancestor":                      {request{tgid: self}, event.Birth{Creator: 70, Ancestors: [8]uint32{60, self}}, true},
		"by a stranger":                       {request{tgid: self}, event.Birth{Creator: 70, Ancestors: [8]uint32{60, 1}}, false},
		"by a sibling that has ended":         {request{tgid: gone, parent: 60}, event.Birth{Creator: 70, Ancestors: [8]uint32{60, 1}}, true},
		"by a sibling that is still there":    {request{tgid: self, parent: 60}, event.Birth{Creator: 70, Ancestors: [8]uint32{60, 1}}, false},
		"by one whose parent was init's only": {request{tgid: gone, parent: 1}, event.Birth{Creator: 70, Ancestors: [8]uint32{60, 1}}, false},
	} {
		t.Run(name, func(t *testing.T) {
			s := &State{requests: []request{c.request}}
			if got := s.requested(&c.birth); got != c.want {
				t.Errorf("requested: %v", got)
			}
			if (len(s.requests) == 0) != c.want {
				t.Errorf("%d requests are left", len(s.requests))
			}
			if c.want && s.requested(&c.birth) {
				t.Error("one request made two")
			}
		})
	}
}

// Reading and taking back mean the request that a clone by the caller would take.
func TestRequestsAreReadAndWithdrawn(t *testing.T) {
	self, parent := uint32(os.Getpid()), uint32(os.Getppid())
	const gone, stranger = 1 << 22, 1<<22 + 1
	s := &State{ns: event.MountNS{Inum: 1, ID: 1}}
	tree := &Tree{states: map[uint64]*State{1: s}}
	asked := func(tgid uint32, want bool) {
		t.Helper()
		if got, err := tree.Requested(s.ns, tgid); err != nil || got != want {
			t.Errorf("asked for by %d: %v, %v", tgid, got, err)
		}
	}
	asked(self, false)
	for range 2 {
		if err := tree.RequestNew(s.ns, parent); err != nil {
			t.Fatal(err)
		}
	}
	asked(self, true)
	asked(parent, true)
	asked(stranger, false)
	if err := tree.WithdrawNew(s.ns, stranger); err != nil || len(s.requests) != 1 {
		t.Errorf("a stranger leaves %d requests, %v", len(s.requests), err)
	}
	s.requests = append(s.requests, request{tgid: gone, parent: parent})
	if err := tree.RequestNew(s.ns, self); err != nil || len(s.requests) != 2 {
		t.Errorf("%d requests after one in place of another, %v", len(s.requests), err)
	}
	if err := tree.WithdrawNew(s.ns, self); err != nil || len(s.requests) != 0 {
		t.Errorf("%d requests are left, %v", len(s.requests), err)
	}
	asked(parent, false)
	if _, err := tree.Requested(event.MountNS{Inum: 2, ID: 2}, self); err != ErrEnded {
		t.Errorf("of a namespace that is gone: %v", err)
	}
}

func TestParentOf(t *testing.T) {
	if got := parentOf(uint32(os.Getpid())); got != uint32(os.Getppid()) {
		t.Errorf("parent %d, want %d", got, os.Getppid())
	}
	if got := parentOf(1 << 22); got != 0 {
		t.Errorf("parent %d of no process", got)
	}
}
