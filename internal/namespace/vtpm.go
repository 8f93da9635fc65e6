package namespace

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/tpmext"
	"imans.dev/imans-agent/internal/vtpm"
)

// errNeverStarted means that a namespace is to have a vTPM and none was ever used.
var errNeverStarted = errors.New("no vTPM was started yet")

// adoptTPM finds the vTPM of an earlier agent. errNeverStarted: there never was any. The folder of a vTPM is made before its
// namespace's list begins: a list without it began without one.
func (s *State) adoptTPM(ctx context.Context) (*tpmext.TPM, error) {
	c := s.vtpmConfig()
	instance, err := vtpm.Adopt(c)
	if errors.Is(err, os.ErrNotExist) {
		_, noLog := os.Stat(filepath.Join(s.dir, measure.LogName))
		if _, noFolder := os.Stat(c.Dir); noLog == nil && noFolder != nil {
			return nil, vtpm.ErrLost
		}
		return nil, errNeverStarted
	}
	if err != nil {
		return nil, err
	}
	tpm, err := tpmext.Open(ctx, instance.Address())
	if err != nil {
		return nil, errors.Join(err, instance.Close())
	}
	s.setInstance(instance)
	return tpm, nil
}

func (s *State) setInstance(i *vtpm.Instance) {
	s.tree.mu.Lock()
	defer s.tree.mu.Unlock()
	s.swtpm = i
}

// start is a vTPM that is being started. It may take seconds: nobody waits for it but its own namespace's extends.
type start struct {
	cancel context.CancelFunc
	done   chan struct{} // closed when what follows is set
	tpm    *tpmext.TPM
	err    error
}

// startTPM begins to start a vTPM; endStart ends that.
func (s *State) startTPM() error {
	c := s.vtpmConfig()
	// Commit point: a crash before this leaves no list; after it the next agent starts the vTPM and extends the list from its
	// beginning, until the instance is on record.
	if err := durable.Mkdir(c.Dir); err != nil {
		return err
	}
	fault.VTPMFolder.Pass()
	ctx, cancel := context.WithCancel(context.Background())
	st := &start{cancel: cancel, done: make(chan struct{})}
	s.starting = st
	go func() { // ends with the start, or with endStart
		defer close(st.done)
		if st.tpm, st.err = s.runStart(ctx, c); st.err != nil && ctx.Err() == nil {
			s.tree.noteUnanchored(s.ns, st.err)
		}
	}()
	return nil
}

// openLate opens the list of a namespace whose vTPM is being started.
func (s *State) openLate(ctx context.Context) error {
	return s.openList(ctx, measure.Config{Late: s.starting.late(s.tree.vtpmBanks(), s.algo)})
}

func (s *State) runStart(ctx context.Context, c vtpm.Config) (*tpmext.TPM, error) {
	instance, err := vtpm.Start(ctx, c)
	if err != nil {
		return nil, err
	}
	s.setInstance(instance)
	tpm, err := tpmext.Open(ctx, instance.Address())
	if err != nil {
		return nil, err
	}
	s.tree.noteBanks(tpm.Banks())
	return tpm, nil
}

// endStart waits for the end of a start, which it hastens. The instance, if there is one, is the state's then.
func (s *State) endStart() {
	if s.starting == nil {
		return
	}
	s.starting.cancel()
	<-s.starting.done
	s.tpm, s.starting = s.starting.tpm, nil
}

// late is the vTPM as a list waits for it. banks are those that it is taken to have.
func (st *start) late(banks []ima.HashAlgo, algo ima.HashAlgo) *measure.Late {
	return &measure.Late{
		BootAggregate: tpmext.StartedBootAggregate(banks, algo),
		Await: func(ctx context.Context) (measure.TPM, error) {
			select {
			case <-st.done:
			case <-ctx.Done():
				return nil, ctx.Err()
			}
			if st.err != nil {
				return nil, st.err
			}
			return st.tpm, nil
		},
	}
}

// vtpmBanks returns the banks that a vTPM has: those of the last one started, and before that those that swtpm has by default. A list
// whose vTPM then has others ends, and says so.
func (t *Tree) vtpmBanks() []ima.HashAlgo {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.banks == nil {
		return []ima.HashAlgo{ima.SHA1, ima.SHA256, ima.SHA384, ima.SHA512}
	}
	return t.banks
}

func (t *Tree) noteBanks(banks []ima.HashAlgo) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.banks = banks
}

func (t *Tree) noteUnanchored(ns event.MountNS, cause error) {
	t.mu.Lock()
	defer t.mu.Unlock()
	t.unanchored[ns] = cause
}

// recordUnanchored says in the lists concerned which vTPMs did not come.
func (t *Tree) recordUnanchored(ctx context.Context) error {
	t.mu.Lock()
	causes := t.unanchored
	t.unanchored = make(map[event.MountNS]error)
	t.mu.Unlock()
	for ns, cause := range causes {
		s, ok := t.known(ns)
		if !ok || s.list == nil || s.ended {
			continue
		}
		err := s.noTPM(cause)
		if err == nil {
			err = s.list.Barrier(ctx)
		}
		if err != nil {
			if err := s.giveUp(ctx, fmt.Errorf("record the loss of a vTPM: %w", err)); err != nil {
				return err
			}
		}
	}
	return nil
}
