package namespace

import (
	"context"
	"fmt"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/event"
)

// hold notes that a level's list tells of the file, and by which name: before its entry can be in the log, or a crash in between would leave
// another. Of a file that is held, and that the list takes no entry of by this name, the list has a name: that is kept.
func (l *look) hold(n *State, taken bool) error {
	if l.file != nil {
		return nil // a question; the hook's event is what happened
	}
	for _, i := range l.ev.Inodes() {
		if n.held.has(i) && !taken {
			continue
		}
		if err := n.makeRoomToHold(l.ctx); err != nil {
			return err
		}
		if err := n.held.add(i, l.name); err != nil {
			l.tree.log.Warn("the next agent will not know of a file's writers", zap.String("file", l.name), zap.Stringer("ns", n.ns), zap.Error(err))
		}
	}
	return nil
}

// makeRoomToHold lets go of what the list has held the longest, if there is no room for more, and has the list say so first.
func (s *State) makeRoomToHold(ctx context.Context) error {
	n := s.held.full()
	if n == 0 {
		return nil
	}
	s.tree.log.Warn("a list holds too many files: it tells no more of writers of the first", zap.Stringer("ns", s.ns), zap.Int("files", n))
	if err := s.recordOwnLoss(ctx, lossName(event.LossHoldsDropped, s.ns, uint64(n)), event.LossHoldsDropped); err != nil {
		return err
	}
	// Commit point: before it a crash makes the next agent say it again.
	if err := s.held.dropFirst(n); err != nil {
		s.tree.log.Warn("the next agent may hold again what was let go", zap.Stringer("ns", s.ns), zap.Error(err))
	}
	return nil
}

// Write records in each list that tells of a file that it is being opened for writing while it is in use: a violation by the name that
// the list has for it, once for each content. Source: ima_rdwr_violation_check in security/integrity/ima/ima_main.c.
func (t *Tree) Write(ctx context.Context, w *event.Write) error {
	for _, s := range t.listing() {
		if err := s.written(ctx, w); err != nil {
			if err := s.giveUp(ctx, err); err != nil {
				return err
			}
		}
	}
	return nil
}

// written is Write for one list.
func (s *State) written(ctx context.Context, w *event.Write) error {
	name, ok, err := s.held.name(w.Inode)
	if err != nil {
		name = inodeName(w.Inode)
		s.tree.log.Warn("a violation has no file's name", zap.String("inode", name), zap.Error(err))
	} else if !ok {
		return nil
	}
	s.tree.log.Warn("violation", zap.Stringer("reason", event.LossTomtou), zap.String("file", name), zap.Stringer("ns", s.ns),
		zap.Stringer("writer's ns", w.NS), zap.Uint32("pid", w.Process.TGID), zap.Uint32("uid", w.Subject.UID))
	e, err := s.newViolation(name)
	if err != nil {
		return err
	}
	s.tell(w.Sequence, e)
	s.tree.countLoss(event.LossTomtou)
	if err := s.list.Barrier(ctx); err != nil {
		return err
	}
	// Commit point: before it a crash makes the next agent find the violation told.
	if err := s.held.drop(w.Inode); err != nil {
		s.tree.log.Warn("the next agent may tell of a writer again", zap.String("file", name), zap.Error(err))
	}
	return nil
}

// openHeld reads which inodes the list tells of, if need be, and has the kernel side tell of their writers: it may have begun anew.
func (s *State) openHeld() error {
	if s.held != nil {
		return nil
	}
	h, err := openHeld(s.dir)
	if err != nil {
		return err
	}
	for i := range h.at {
		if err := s.tree.config.Kernel.Hold(i); err != nil {
			return fmt.Errorf("hold an inode: %w", err)
		}
	}
	s.held = h
	return nil
}

// trimPatience is how old a hold must be that no list wants: its record has been handled. It is also how long the next look is put off.
const trimPatience = time.Minute

// TrimHolds lets go of inodes that no list tells of, if the kernel side has no room for more. Call it when all records are handled.
func (t *Tree) TrimHolds() error {
	if time.Since(t.trimmed) < trimPatience {
		return nil
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	full, err := t.config.Kernel.TrimHolds(sinceBoot()-trimPatience, func(i event.Inode) bool {
		for _, s := range t.states {
			if s.held != nil && s.held.has(i) {
				return true
			}
		}
		return false
	})
	if full {
		t.trimmed = time.Now()
	}
	return err
}
