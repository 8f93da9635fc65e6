package namespace

import (
	"context"
	"fmt"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/event"
)

// hold notes that a level's list tells of the file, and by which name.
func (l *look) hold(n *State) {
	for _, i := range l.ev.Inodes() {
		if err := n.held.add(i, l.name); err != nil {
			l.tree.log.Warn("the next agent will not know of a file's writers", zap.String("file", l.name), zap.Stringer("ns", n.ns), zap.Error(err))
		}
	}
}

// Write records in each list that tells of a file that it is being opened for writing while it is in use: a violation by the name that
// the list has for it, once for each content. Source: ima_rdwr_violation_check in security/integrity/ima/ima_main.c.
func (t *Tree) Write(ctx context.Context, w *event.Write) error {
	t.mu.Lock()
	states := make([]*State, 0, len(t.states))
	for _, s := range t.states {
		states = append(states, s)
	}
	t.mu.Unlock()
	for _, s := range states {
		if s.list == nil || s.ended {
			continue
		}
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
			if s.held != nil {
				if _, ok := s.held.at[i]; ok {
					return true
				}
			}
		}
		return false
	})
	if full {
		t.trimmed = time.Now()
	}
	return err
}
