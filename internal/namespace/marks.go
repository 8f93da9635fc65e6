package namespace

import (
	"slices"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/loader"
)

// marks are the contents of which the kernel side was told that they need no event any more, by whether rules name no id: of each kind it has
// room for some, and drops all before one that is too many.
type marks [2][]event.MeasuredKey

func (m *marks) of(key event.MeasuredKey) *[]event.MeasuredKey {
	if key.IDsIgnored() {
		return &m[0]
	}
	return &m[1]
}

func (m *marks) all() []event.MeasuredKey { return slices.Concat(m[0], m[1]) }

// Mark tells the kernel side that the content of a record that is through needs no event any more, if nothing of it is in doubt, and the
// gates that it needs no question. In a namespace that has ended meanwhile there will be none. Call it after Logged only.
func (t *Tree) Mark(p Pending) error {
	if !p.mark {
		return nil
	}
	s, ok := t.known(p.event.NS)
	if !ok {
		return nil
	}
	key := p.event.MeasuredKey()
	done, err := t.config.Kernel.MarkMeasured(key)
	if err != nil {
		return err
	}
	t.marked(s, key, done)
	if t.config.Gates != nil && key.IDsIgnored() {
		t.config.Gates.Settled(p.event)
	}
	return nil
}

// marked keeps what is to be forgotten with a namespace, which is no more than the kernel side has.
func (t *Tree) marked(s *State, key event.MeasuredKey, done loader.Marked) {
	t.mu.Lock()
	defer t.mu.Unlock()
	if done.Emptied {
		for _, other := range t.states {
			*other.marks.of(key) = nil
		}
	}
	if done.New && s != t.native { // that one does not end
		mine := s.marks.of(key)
		*mine = append(*mine, key)
	}
}
