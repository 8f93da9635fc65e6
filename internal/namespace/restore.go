package namespace

import (
	"go.uber.org/zap"
)

// restoreMost is about how many logs one call of RestoreLogs looks for: records wait meanwhile.
const restoreMost = 100

// RestoreLogs looks whether the logs of lists are where they are to be, and writes those anew that somebody removed. What else was in a
// folder is gone: the next agent does not find a vTPM whose folder was removed, and says that it is lost. It is called every now
// and then, by the goroutine that handles records. Where there are many lists, some calls one after another look at all.
func (t *Tree) RestoreLogs() {
	t.mu.Lock()
	calls := uint64(1 + len(t.states)/restoreMost)
	var states []*State
	for _, s := range t.states {
		if s.list != nil && (s == t.native || s.ns.ID%calls == t.restored%calls) {
			states = append(states, s)
		}
	}
	t.mu.Unlock()
	t.restored++
	for _, s := range states {
		restored, err := s.list.Restore()
		if restored {
			err = s.record()
			t.log.Error("a list's log was removed while the agent runs; it is written anew, and nothing of it is lost. "+
				"Keep the state folder away from what cleans up: a vTPM whose folder is gone is lost to the next agent",
				zap.Stringer("ns", s.ns), zap.String("folder", s.dir))
		}
		if err != nil && !s.lostLog {
			t.log.Error("a list's log is not where it is to be, and can't be written anew for now; tried again. "+
				"If the agent ends before, the list is lost", zap.Stringer("ns", s.ns), zap.String("folder", s.dir), zap.Error(err))
		}
		s.lostLog = err != nil
	}
}
