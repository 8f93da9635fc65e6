package namespace

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/loader"
	"imans.dev/imans-agent/internal/measure"
)

// lossPrefix begins the name of a violation that stands for events of which not even the file is known. No path begins so.
const lossPrefix = "imans-lost"

// lossName is imans-lost/REASON/INUM:ID/COUNT: how many events of which namespace are missing, and why.
func lossName(reason event.Loss, ns event.MountNS, count uint64) string {
	return fmt.Sprintf("%s/%v/%v/%d", lossPrefix, reason, ns, count)
}

// parseLossName takes such a name apart.
func parseLossName(name string) (key loader.LossKey, count uint64, ok bool) {
	parts := strings.Split(name, "/")
	if len(parts) != 4 || parts[0] != lossPrefix {
		return key, 0, false
	}
	if n, _ := fmt.Sscanf(parts[2]+" "+parts[3], "%d:%d %d", &key.NS.Inum, &key.NS.ID, &count); n != 3 {
		return key, 0, false
	}
	for r := event.Loss(1); r.String() != "unknown"; r++ {
		if r.String() == parts[1] {
			key.Reason = r
			return key, count, true
		}
	}
	return key, 0, false
}

// readRecordedLosses adds up what the native list tells of lost events since the kernel side is the one that it is, so that none is told twice
// after a restart.
func (t *Tree) readRecordedLosses(list *measure.List) error {
	r, _, err := list.Reader(0)
	if err != nil {
		return err
	}
	for {
		e, err := r.Next()
		if err == io.EOF {
			return nil
		} else if err != nil {
			return err
		}
		key, n, ok := parseLossName(e.Name())
		switch {
		case !ok || !e.Violation():
		case key.Reason == event.LossProgramsReplaced:
			clear(t.recorded) // with it the counters began anew
		default:
			t.recorded[key] += n
		}
	}
}

// Losses turns the kernel side's counters into violations in the lists of the namespaces concerned and of all their ancestors,
// and waits until they are logged. What is on record already is not told again. It reports whether there was anything to tell:
// among the lost may be deaths, see Ended. A lost writer is the concern of each list that tells of files; which these are is known when all is
// handled that was recorded before: handle does that, and says whether it was all, or the writer is left for the next call.
func (t *Tree) Losses(ctx context.Context, handle func(context.Context) (all bool, err error)) (any bool, err error) {
	if err := t.recordUnanchored(ctx); err != nil {
		return false, err
	}
	losses, err := t.config.Kernel.Losses()
	if err != nil || len(losses) == 0 {
		return false, err
	}
	for key, count := range losses {
		if key.Reason == event.LossWriterLost {
			if lost, err := t.lostWriters(ctx, key, count, handle); err != nil {
				return any, err
			} else if lost {
				any = true
			}
			continue
		}
		t.mu.Lock()
		missing := count - t.recorded[key]
		t.recorded[key] = count
		t.mu.Unlock()
		s, known := t.known(key.NS)
		if missing != 0 {
			if !known {
				s = t.native
			}
			t.log.Error("events lost", zap.Stringer("reason", key.Reason), zap.Stringer("ns", key.NS), zap.Uint64("count", missing))
			any = true
			if err := s.recordLoss(ctx, lossName(key.Reason, key.NS, missing), key.Reason); err != nil {
				return any, err
			}
		}
		if !known && !key.NS.IsZero() {
			if err := t.forgetLosses(key); err != nil {
				return any, err
			}
		}
	}
	return any, nil
}

// lostWriters is Losses for writers.
func (t *Tree) lostWriters(ctx context.Context, key loader.LossKey, count uint64, handle func(context.Context) (bool, error)) (any bool, err error) {
	t.mu.Lock()
	missing := count - t.recorded[key]
	t.mu.Unlock()
	if missing == 0 {
		return false, nil
	}
	if all, err := handle(ctx); err != nil || !all {
		return false, err
	}
	t.log.Error("writers lost", zap.Uint64("count", missing))
	if err := t.recordLostWriters(ctx, lossName(key.Reason, key.NS, missing)); err != nil {
		return false, err
	}
	t.mu.Lock()
	t.recorded[key] = count
	t.mu.Unlock()
	return true, nil
}

// recordLostWriters appends a violation to each list that tells of files, and waits until it is logged. The native list comes last, and has it
// in any case: what is in it is not told again.
func (t *Tree) recordLostWriters(ctx context.Context, name string) error {
	holders := slices.DeleteFunc(t.listing(), func(s *State) bool { return s == t.native || len(s.held.at) == 0 })
	for _, s := range holders {
		if err := s.appendViolation(name, event.LossWriterLost); err != nil {
			if err := s.giveUp(ctx, err); err != nil {
				return err
			}
		}
	}
	for _, s := range holders {
		if s.ended {
			continue
		}
		if err := s.list.Barrier(ctx); err != nil {
			if err := s.giveUp(ctx, err); err != nil {
				return err
			}
		}
	}
	return t.native.recordOwnLoss(ctx, name, event.LossWriterLost)
}

// listing returns the states whose lists go on.
func (t *Tree) listing() []*State {
	t.mu.Lock()
	defer t.mu.Unlock()
	var states []*State
	for _, s := range t.states {
		if s.list != nil && !s.ended {
			states = append(states, s)
		}
	}
	return states
}

// forgetLosses drops the counter of a namespace that the kernel side does not know any more either: nobody is left to add to it.
func (t *Tree) forgetLosses(key loader.LossKey) error {
	registered, err := t.config.Kernel.Registered()
	if err != nil {
		return err
	}
	if _, alive := registered[key.NS]; alive {
		return nil
	}
	if err := t.config.Kernel.ForgetLosses(key); err != nil {
		return err
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	delete(t.recorded, key)
	return nil
}

// Loss records that an event could not be measured by the agent's own fault, in the native list.
func (t *Tree) Loss(ctx context.Context, reason event.Loss) error {
	return t.native.recordLoss(ctx, lossName(reason, t.native.ns, 1), reason)
}

// recordLoss appends a violation to a namespace's list and to each ancestor's. The native list comes last: after a crash in
// between the loss is told again, never forgotten.
func (s *State) recordLoss(ctx context.Context, name string, reason event.Loss) error {
	for n := s; n != nil; n = n.parent {
		if err := n.recordOwnLoss(ctx, name, reason); err != nil {
			return err
		}
	}
	return nil
}

// recordOwnLoss appends a violation to the namespace's own list, if it is active, and waits until it is logged.
func (s *State) recordOwnLoss(ctx context.Context, name string, reason event.Loss) error {
	if s.ended || !s.active {
		return nil
	}
	err := s.open(ctx)
	if err == nil {
		err = s.appendViolation(name, reason)
	}
	if err == nil {
		err = s.list.Barrier(ctx)
	}
	if err != nil {
		return s.giveUp(ctx, err)
	}
	return nil
}

// appendViolation appends a violation to the namespace's own list.
func (s *State) appendViolation(name string, reason event.Loss) error {
	e, err := s.newViolation(name)
	if err != nil {
		return err
	}
	s.list.Append(e)
	s.tree.countLoss(reason)
	return nil
}

// newViolation makes a violation of the namespace's own list that tells of nothing but a name.
func (s *State) newViolation(name string) (*imalog.Entry, error) {
	return imalog.NewViolation(s.pcr, s.template, imalog.FieldValues{Digest: ima.ZeroDigest(s.algo), Name: name})
}

func (t *Tree) countLoss(reason event.Loss) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.losses[reason]++
}
