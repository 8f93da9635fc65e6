package namespace

import (
	"context"
	"errors"
	"fmt"
	"maps"
	"os"
	"slices"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/vtpm"
)

// ReleaseTPM takes the vTPM away that a namespace's list was given, and ends it. The list goes on without one, which a violation in it
// says, unless the cause is binding.Replaced: then AttachTPM is to follow. What is logged and not extended yet stays out of the vTPM:
// wait for View.List.Settle before, where that matters. When it returns the native list has the end with its cause, on disk. The cause
// binding.Lost asks the vTPM nothing; binding.Ended is the tree's own.
//
// Errors: ErrEnded, ErrNotAttached, and what ended one of the lists. It is called as AttachTPM is.
func (t *Tree) ReleaseTPM(ctx context.Context, ns event.MountNS, cause binding.Cause) error {
	s, ok := t.known(ns)
	switch {
	case !ok:
		return ErrEnded
	case s.attached == nil:
		return ErrNotAttached
	case cause != binding.Released && cause != binding.Lost && cause != binding.Replaced:
		return fmt.Errorf("release the vTPM of namespace %v: cause %v is not for callers", ns, cause)
	}
	if err := s.releaseTPM(ctx, cause); err != nil {
		return fmt.Errorf("release the vTPM of namespace %v: %w", ns, err)
	}
	if cause == binding.Replaced || s.ended {
		return nil
	}
	if err := s.noTPM(fmt.Errorf("%s %v", binding.AttachName, cause)); err != nil {
		return err
	}
	return s.list.Barrier(ctx)
}

func (s *State) releaseTPM(ctx context.Context, cause binding.Cause) error {
	if s.attached.end == nil {
		held, err := s.letGo(ctx)
		if err != nil {
			return err
		}
		if err := s.decideEnd(ctx, cause, held); err != nil {
			return err
		}
	}
	if err := s.tree.tellEnd(ctx, s.attached.end); err != nil {
		return err
	}
	a, tpm, instance := s.attached, s.tpm, s.swtpm
	s.setAttached(nil)
	s.tpm = nil
	s.setInstance(nil)
	s.tree.finishing.Go(func() {
		if err := errors.Join(closeTPM(tpm), a.closeShare(), stopInstance(instance), a.remove()); err != nil {
			s.tree.log.Warn("end of a vTPM that was released", zap.Stringer("ns", s.ns), zap.Error(err))
		}
	})
	return s.writeRecord()
}

// letGo makes the list use its vTPM no more, and returns how many entries that has got.
func (s *State) letGo(ctx context.Context) (held int, err error) {
	if s.list == nil {
		return 0, nil
	}
	if s.list.Status().Fatal == nil {
		held, err = s.list.Detach(ctx)
	}
	if status := s.list.Status(); status.Fatal != nil { // it has used the vTPM for the last time
		return status.Extended, nil
	}
	return held, err
}

// readTimeout bounds how long the end of an attachment waits for the vTPM's last values.
const readTimeout = 2 * time.Second

// decideEnd makes what the native list will say of the vTPM's end. Once it is on record it does not change, whatever happens, so that
// the native list says it once.
func (s *State) decideEnd(ctx context.Context, cause binding.Cause, entries int) error {
	e := binding.End{ID: s.attached.Binding.ID, Cause: cause, Entries: uint64(entries)}
	if cause != binding.Lost && s.tpm != nil {
		ctx, cancel := context.WithTimeout(ctx, readTimeout)
		defer cancel()
		values, err := s.tpm.ReadPCR(ctx, s.pcr)
		if err != nil {
			s.tree.log.Warn("the last values of a vTPM can't be read", zap.Stringer("ns", s.ns), zap.Error(err))
		}
		for _, bank := range slices.Sorted(maps.Keys(values)) {
			e.Values = append(e.Values, values[bank])
		}
	}
	b, err := e.Encode()
	if err != nil {
		return err
	}
	s.attached.end = b
	err = s.writeRecord()
	fault.GrantEndDecided.Pass()
	return err
}

// endAttached has the native list say that the vTPM of a namespace has ended with it. It does nothing without one.
func (s *State) endAttached(ctx context.Context) error {
	if s.attached == nil {
		return nil
	}
	if s.attached.end == nil {
		if err := s.settleEnd(ctx); err != nil {
			return err
		}
	}
	return s.tree.tellEnd(ctx, s.attached.end)
}

// settleEnd lets the vTPM of a namespace that has ended catch up with the list, and makes what is to be said of its end.
func (s *State) settleEnd(ctx context.Context) error {
	cause := binding.Ended
	if s.swtpm == nil || !s.swtpm.Running() {
		cause = binding.Lost
	}
	entries := 0
	if s.list != nil {
		if cause == binding.Ended && !s.ended {
			settling, cancel := context.WithTimeout(ctx, settleTimeout)
			defer cancel()
			if err := s.list.Settle(settling); err != nil && ctx.Err() != nil {
				return err // the agent ends; the next one does it
			}
		}
		entries = s.list.Status().Extended
	}
	return s.decideEnd(ctx, cause, entries)
}

// openAttached opens the list of a namespace that an earlier agent gave a vTPM. If that is lost, or was being released, both lists say
// so, and the namespace's goes on without.
func (s *State) openAttached(ctx context.Context) error {
	if err := s.removeOwn(); err != nil {
		return err
	}
	if err := s.tellAttached(ctx); err != nil {
		return err
	}
	if err := s.adoptAttached(ctx); err != nil {
		return err
	}
	if s.tpm != nil && (s.attached.end == nil || s.attached.endCause() == binding.Ended) {
		return s.openList(ctx, measure.Config{TPM: s.tpm})
	}
	if s.attached.end == nil {
		if err := s.decideEnd(ctx, binding.Lost, 0); err != nil {
			return err
		}
	}
	cause := s.attached.endCause()
	if err := s.releaseTPM(ctx, cause); err != nil {
		return err
	}
	if err := s.openList(ctx, measure.Config{}); err != nil {
		return err
	}
	return s.noTPM(fmt.Errorf("%s %v", binding.AttachName, cause))
}

// adoptAttached finds the vTPM again; one that does not answer is as good as lost, and is ended.
func (s *State) adoptAttached(ctx context.Context) error {
	instance, err := vtpm.Adopt(s.attached.Config)
	if err != nil {
		s.tree.log.Error("a namespace's vTPM is lost", zap.Stringer("ns", s.ns), zap.Error(err))
		return nil
	}
	s.setInstance(instance)
	if s.tpm, s.attached.Share, err = s.tree.config.OpenTPM(ctx, instance); err == nil {
		return nil
	}
	s.tpm = nil
	if ctx.Err() != nil {
		s.setInstance(nil)
		return errors.Join(ctx.Err(), instance.Close())
	}
	s.tree.log.Error("a namespace's vTPM does not answer", zap.Stringer("ns", s.ns), zap.Error(err))
	return nil
}

// removeOwn ends the vTPM that the namespace had of its own, if a crash came in between.
func (s *State) removeOwn() error {
	c := s.vtpmConfig()
	instance, err := vtpm.Adopt(c)
	switch {
	case errors.Is(err, os.ErrNotExist), errors.Is(err, vtpm.ErrLost):
	case err != nil:
		return err
	default:
		if err := instance.Stop(); err != nil {
			return err
		}
	}
	return vtpm.Remove(c)
}

// endCause returns the cause in the end that was decided.
func (a *attached) endCause() binding.Cause {
	e, _ := binding.ParseEnd(a.end) // made by decideEnd, or looked at by restore
	return e.Cause
}

// LeftAttached returns where the vTPMs are that the lists below a boot's folder were given by an earlier agent.
func LeftAttached(dir string) ([]vtpm.Config, error) {
	left, err := leftStates(nsDir(dir))
	if err != nil {
		return nil, err
	}
	var configs []vtpm.Config
	for _, f := range left {
		if f.Attached != nil {
			configs = append(configs, f.Attached.VTPM)
		}
	}
	return configs, nil
}
