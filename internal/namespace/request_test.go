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

func TestParentOf(t *testing.T) {
	if got := parentOf(uint32(os.Getpid())); got != uint32(os.Getppid()) {
		t.Errorf("parent %d, want %d", got, os.Getppid())
	}
	if got := parentOf(1 << 22); got != 0 {
		t.Errorf("parent %d of no process", got)
	}
}
