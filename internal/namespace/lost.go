package namespace

import (
	"context"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/vtpm"
)

// loseTimeout bounds how long the lists of all namespaces wait while one of them loses its vTPM.
const loseTimeout = 2 * time.Second

// LostTPMs looks for vTPMs that have died. A list whose vTPM is among them goes on without, for good, which a violation in it says; of
// one that it was given the native list says that it is lost. It is called every now and then, as AttachTPM is.
func (t *Tree) LostTPMs(ctx context.Context) {
	owners := make(map[*vtpm.Instance]*State)
	var all []*vtpm.Instance
	t.mu.Lock()
	for _, s := range t.states {
		if s.swtpm != nil {
			owners[s.swtpm] = s
			all = append(all, s.swtpm)
		}
	}
	t.mu.Unlock()
	for _, i := range vtpm.Ended(all) {
		s := owners[i]
		if err := s.loseTPM(ctx); err != nil {
			t.log.Warn("the loss of a vTPM is not on record yet; tried again", zap.Stringer("ns", s.ns), zap.Error(err))
		}
	}
}

func (s *State) loseTPM(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, loseTimeout)
	defer cancel()
	if s.attached != nil {
		return s.tree.ReleaseTPM(ctx, s.ns, binding.Lost)
	}
	if _, err := s.letGo(ctx); err != nil {
		return err
	}
	s.endOwn()
	s.tpm = nil
	s.setInstance(nil)
	if s.list == nil || s.ended {
		return nil
	}
	if err := s.noTPM(vtpm.ErrLost); err != nil {
		return err
	}
	return s.list.Barrier(ctx)
}
