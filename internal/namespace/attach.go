package namespace

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/binding"
	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/imalog"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/tpmext"
	"imans.dev/imans-agent/internal/vtpm"
)

var (
	// ErrAttached means that a namespace's list was given a vTPM already.
	ErrAttached = fmt.Errorf("the namespace has been given a vTPM; release that first: %w", syscall.EBUSY)
	// ErrNative means that the namespace is the native one.
	ErrNative = fmt.Errorf("the native list has the TPM of --tpm, and no other: %w", syscall.EPERM)
	// ErrNotAttached means that a namespace's list was given no vTPM.
	ErrNotAttached = fmt.Errorf("the namespace has been given no vTPM; attach one first: %w", syscall.ENOENT)
)

// Attachment is a vTPM for a namespace's list. The caller has started it, and nothing has been extended in it.
type Attachment struct {
	TPM      *tpmext.TPM
	Share    io.Closer // of the vTPM with the namespace's programs; closed after TPM, before Instance is ended; nil: they have its device
	Instance *vtpm.Instance
	Config   vtpm.Config // by which vtpm.Adopt finds the instance after a restart; it is written to the namespace's folder
	Keep     bool        // what the instance keeps in its folder outlives it
	// Binding is what the native list is to say. ID and PCR are the tree's to fill in.
	Binding binding.Attach
}

// attached is the vTPM that a namespace's list was given.
type attached struct {
	Attachment
	buffer []byte // of the native list's entry
	end    []byte // likewise, of the one that ends it; nil: it has not ended
	told   bool   // this agent has appended the first
}

// attachedFile is the same in the state file.
type attachedFile struct {
	VTPM    vtpm.Config `json:"vtpm"`
	Keep    bool        `json:"keep,omitempty"`
	Binding []byte      `json:"binding"`
	End     []byte      `json:"end,omitempty"`
}

func (a *attached) file() *attachedFile {
	return &attachedFile{VTPM: a.Config, Keep: a.Keep, Binding: a.buffer, End: a.end}
}

func (f *attachedFile) restore() (*attached, error) {
	b, err := binding.ParseAttach(f.Binding)
	if err != nil {
		return nil, err
	}
	if f.End != nil {
		if _, err := binding.ParseEnd(f.End); err != nil {
			return nil, err
		}
	}
	return &attached{Attachment: Attachment{Config: f.VTPM, Keep: f.Keep, Binding: b}, buffer: f.Binding, end: f.End}, nil
}

// AttachTPM gives a namespace's list a vTPM in place of what it has, which is ended. The namespace is made active, with the policy for
// new namespaces, if it is not. When AttachTPM returns, the native list names the vTPM, on disk, and the vTPM gets the namespace's
// whole list, in order, and nothing else gets any of it; View.List.Settle, of either list, waits for their TPMs. TPM, Share and Instance
// are the tree's from then on. After an error they are the caller's, and the list goes on with what it had; if the native list named
// the vTPM already, it also says that it was released.
//
// Errors: ErrEnded, ErrAttached, measure.ErrForeign for a vTPM that was used, and what ended one of the lists. Like all that changes
// the tree it is called by the goroutine that handles records; ctx should have a deadline of a second or two.
func (t *Tree) AttachTPM(ctx context.Context, ns event.MountNS, a Attachment) error {
	s, ok := t.known(ns)
	switch {
	case !ok:
		return ErrEnded
	case s == t.native:
		return ErrNative
	case s.attached != nil:
		return ErrAttached
	case s.ended:
		return fmt.Errorf("attach vTPM to namespace %v: the list has ended: %w", ns, syscall.EIO)
	}
	if err := s.readyForTPM(ctx, a.TPM); err != nil {
		return fmt.Errorf("attach vTPM to namespace %v: %w", ns, err)
	}
	a.Binding.ID, a.Binding.PCR = binding.ID{Inum: ns.Inum, NSID: ns.ID, Number: s.given + 1}, s.pcr
	buffer, err := a.Binding.Encode()
	if err != nil {
		return fmt.Errorf("attach vTPM to namespace %v: %w", ns, err)
	}
	began := s.list == nil
	s.given++
	s.setAttached(&attached{Attachment: a, buffer: buffer})
	if err := s.attach(ctx); err != nil {
		return errors.Join(fmt.Errorf("attach vTPM to namespace %v: %w", ns, err), s.withdraw(began))
	}
	s.endOwn()
	s.tpm = a.TPM
	s.setInstance(a.Instance)
	s.gateByDefault()
	t.log.Info("vTPM attached", zap.Stringer("ns", ns), zap.Stringer("binding", a.Binding.ID), zap.Stringer("AK", a.Binding.AK))
	return nil
}

func (s *State) setAttached(a *attached) {
	s.tree.mu.Lock()
	defer s.tree.mu.Unlock()
	s.attached = a
}

// readyForTPM makes the namespace active, and looks at the TPM if there is a list.
func (s *State) readyForTPM(ctx context.Context, tpm measure.TPM) error {
	if !s.active {
		if err := s.activateByDefault(); err != nil {
			return err
		}
	}
	if s.list == nil {
		if _, err := os.Stat(filepath.Join(s.dir, measure.LogName)); errors.Is(err, os.ErrNotExist) {
			return nil // the list will begin with this TPM
		}
		if err := s.open(ctx); err != nil {
			return err
		}
	}
	return s.list.CheckTPM(ctx, tpm)
}

// activateByDefault makes a namespace active with the policy for new namespaces.
func (s *State) activateByDefault() error {
	t := s.tree
	t.mu.Lock()
	s.active, s.policy = true, t.config.nsPolicy(s.ids)
	t.mu.Unlock()
	return t.publish(s)
}

// attach takes the list over to the vTPM that is to be attached.
func (s *State) attach(ctx context.Context) error {
	// Commit point: a crash before the record leaves all as it was, and a vTPM that nobody has used; after it the next agent adopts
	// the vTPM and does what is left of this.
	if err := durable.Mkdir(s.dir); err != nil {
		return err
	}
	if err := s.writeRecord(); err != nil {
		return err
	}
	fault.GrantAttached.Pass()
	tpm := s.attached.TPM
	if s.list == nil {
		if err := s.openList(ctx, measure.Config{Late: awaited(tpm.Banks(), s.algo)}); err != nil {
			return err
		}
		if err := s.list.CheckTPM(ctx, tpm); err != nil {
			return err
		}
	}
	if err := s.tellAttached(ctx); err != nil {
		return err
	}
	fault.GrantTold.Pass()
	_, err := s.list.Anchor(ctx, tpm)
	fault.GrantAnchored.Pass()
	return err
}

// awaited is a TPM that comes by Anchor, or not at all.
func awaited(banks []ima.HashAlgo, algo ima.HashAlgo) *measure.Late {
	return &measure.Late{
		BootAggregate: tpmext.StartedBootAggregate(banks, algo),
		Await:         func(ctx context.Context) (measure.TPM, error) { <-ctx.Done(); return nil, ctx.Err() },
	}
}

// tellTimeout bounds how long it waits for the disk to say that an attaching did not succeed.
const tellTimeout = 2 * time.Second

// withdraw takes an attaching back that did not succeed. began: the list was begun for it, and nothing was extended.
func (s *State) withdraw(began bool) error {
	var errs []error
	if a := s.attached; a.told {
		ctx, cancel := context.WithTimeout(context.Background(), tellTimeout)
		defer cancel()
		e := binding.End{ID: a.Binding.ID, Cause: binding.Released}
		b, err := e.Encode()
		if err == nil {
			err = s.tree.tellEnd(ctx, b)
		}
		errs = append(errs, err)
	}
	s.setAttached(nil)
	if began && s.list != nil {
		errs = append(errs, s.list.Close())
		s.tree.mu.Lock()
		s.list = nil
		s.tree.mu.Unlock()
	}
	if began {
		if err := os.Remove(filepath.Join(s.dir, measure.LogName)); !errors.Is(err, os.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, s.writeRecord())...)
}

// endOwn ends the vTPM that the namespace had of its own, or was starting. Its list is with another already.
func (s *State) endOwn() {
	s.endStart()
	t, tpm, instance := s.tree, s.tpm, s.swtpm
	t.mu.Lock()
	delete(t.unanchored, s.ns)
	t.mu.Unlock()
	config := s.vtpmConfig()
	t.finishing.Go(func() {
		if err := errors.Join(closeTPM(tpm), stopInstance(instance), vtpm.Remove(config)); err != nil {
			t.log.Warn("end of a vTPM whose list has another", zap.Stringer("ns", s.ns), zap.Error(err))
		}
	})
}

func closeTPM(t *tpmext.TPM) error {
	if t == nil {
		return nil
	}
	return t.Close()
}

func stopInstance(i *vtpm.Instance) error {
	if i == nil {
		return nil
	}
	return i.Stop()
}

// tellAttached has the native list name the vTPM. What it says already is not said again.
func (s *State) tellAttached(ctx context.Context) error {
	r, err := s.tree.appendNative(binding.AttachName, s.attached.buffer)
	if err != nil {
		return err
	}
	s.attached.told = true
	return r.Logged(ctx)
}

// tellEnd has the native list say that a vTPM has ended.
func (t *Tree) tellEnd(ctx context.Context, buffer []byte) error {
	r, err := t.appendNative(binding.EndName, buffer)
	if err == nil {
		err = r.Logged(ctx)
	}
	fault.GrantEndTold.Pass()
	return err
}

// appendNative appends critical data of the agent's own to the native list, whatever its policy.
func (t *Tree) appendNative(name string, buffer []byte) (measure.Receipt, error) {
	e, err := imalog.NewBuffer(t.native.pcr, name, t.native.algo, buffer)
	if err != nil {
		return measure.Receipt{}, err
	}
	return t.native.list.Append(e), nil
}

// openAlone opens a vTPM that nobody else uses, or that the kernel shares.
func openAlone(ctx context.Context, i *vtpm.Instance) (*tpmext.TPM, io.Closer, error) {
	tpm, err := tpmext.Open(ctx, i.Address())
	return tpm, nil, err
}

// closeShare ends the sharing of the vTPM: then nobody is connected to it, and it can be shut down.
func (a *attached) closeShare() error {
	if a == nil || a.Share == nil {
		return nil
	}
	return a.Share.Close()
}

// remove deletes what the vTPM kept, unless it is to be kept.
func (a *attached) remove() error {
	if a.Keep {
		return nil
	}
	return vtpm.Remove(a.Config)
}
