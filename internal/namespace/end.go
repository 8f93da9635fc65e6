package namespace

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/fault"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/vtpm"
)

// Files of an archived namespace's folder.
const (
	ArchivedList   = "binary_runtime_measurements"
	ArchivedPCRs   = "pcrs"   // NUMBER=ALGORITHM:HEX, a line each, in the order of the banks' names; missing without a TPM
	ArchivedPolicy = "policy" // ids as the host has them
)

// settleTimeout bounds how long the archive waits for the TPM to have the whole list.
const settleTimeout = time.Minute

// finish ends a namespace that is in the tree no more: it goes to the archive, if there is one, and its state goes. What can't be
// archived stays as it is, vTPM included, and the next start tries again. In a goroutine of its own, as it may take long.
func (t *Tree) finish(ctx context.Context, s *State) {
	fault.NamespaceEnding.Pass()
	err := t.archive(ctx, s)
	if err == nil {
		fault.NamespaceArchived.Pass()
		err = s.endAttached(ctx)
	}
	if err != nil {
		t.log.Error("a namespace was not archived, or not ended in the native list; its state is kept, and the next start tries again",
			zap.Stringer("ns", s.ns), zap.String("folder", s.dir), zap.Error(err))
		err = s.close()
	} else {
		err = s.end()
	}
	if err != nil {
		t.log.Warn("end of a namespace", zap.Stringer("ns", s.ns), zap.Error(err))
	}
}

// archive writes a namespace's folder below the archive: all of it, or nothing under that name.
func (t *Tree) archive(ctx context.Context, s *State) error {
	if t.config.Archive == "" || !s.active {
		return nil
	}
	ctx, cancel := context.WithTimeout(ctx, settleTimeout)
	defer cancel()
	if s.list == nil {
		if _, err := os.Stat(filepath.Join(s.dir, measure.LogName)); errors.Is(err, os.ErrNotExist) {
			return nil // nothing was measured in it
		}
		if err := s.open(ctx); err != nil { // as an earlier agent left it
			return err
		}
	}
	if err := s.list.Settle(ctx); err != nil && !s.ended {
		return fmt.Errorf("wait for its TPM: %w", err)
	}
	s.endStart() // over since the list is settled: s.tpm is what came of it
	name := fmt.Sprintf("%s-%d-%d", filepath.Base(t.config.Dir), s.ns.Inum, s.ns.ID)
	partial := filepath.Join(t.config.Archive, ".partial-"+name)
	if err := os.RemoveAll(partial); err != nil {
		return err
	}
	if err := durable.Mkdir(partial); err != nil {
		return err
	}
	if err := s.writeArchive(ctx, partial); err != nil {
		return errors.Join(err, os.RemoveAll(partial))
	}
	// Commit point: a crash before this leaves the state for the next start, one after it a second archiving, which finds this one.
	fault.NamespaceArchiving.Pass()
	final := filepath.Join(t.config.Archive, name)
	if err := os.Rename(partial, final); errors.Is(err, os.ErrExist) {
		return os.RemoveAll(partial)
	} else if err != nil {
		return errors.Join(err, os.RemoveAll(partial))
	}
	t.log.Info("namespace archived", zap.Stringer("ns", s.ns), zap.String("folder", final))
	return durable.SyncDir(t.config.Archive)
}

func (s *State) writeArchive(ctx context.Context, dir string) error {
	description, err := json.MarshalIndent(struct {
		stateFile
		Born  time.Time `json:"born"`
		Ended time.Time `json:"ended"`
	}{s.description(), s.born.UTC(), time.Now().UTC()}, "", "\t")
	if err != nil {
		return err
	}
	files := map[string][]byte{stateFileName: append(description, '\n'), ArchivedPolicy: []byte(s.policy.String())}
	if s.tpm != nil {
		values, err := s.list.PCRs(ctx)
		if err != nil {
			return err
		}
		var lines []string
		for _, d := range values {
			lines = append(lines, fmt.Sprintf("%d=%v\n", s.pcr, d))
		}
		slices.Sort(lines)
		files[ArchivedPCRs] = []byte(strings.Join(lines, ""))
	}
	for name, content := range files {
		if err := durable.WriteFile(filepath.Join(dir, name), content); err != nil {
			return err
		}
	}
	list, err := durable.OpenLog(filepath.Join(dir, ArchivedList))
	if err != nil {
		return err
	}
	_, err = io.Copy(list, s.list.Snapshot())
	return errors.Join(err, list.Sync(), list.Close(), durable.SyncDir(dir))
}

// end ends the vTPM and deletes the folder: the namespace is gone. A crash in between leaves a folder that the next agent ends.
func (s *State) end() error {
	errs := []error{s.release()}
	if s.swtpm != nil {
		errs = append(errs, s.swtpm.Stop())
	}
	if s.attached != nil {
		errs = append(errs, s.attached.remove())
	}
	fault.NamespaceStopped.Pass()
	if s.active {
		errs = append(errs, vtpm.Remove(s.vtpmConfig()), os.RemoveAll(s.dir))
	}
	fault.NamespaceRemoved.Pass()
	return errors.Join(errs...)
}

// close lets go of list and vTPM without ending them.
func (s *State) close() error {
	errs := []error{s.release()}
	if s.swtpm != nil {
		errs = append(errs, s.swtpm.Close())
	}
	return errors.Join(errs...)
}

// release closes what both of them close.
func (s *State) release() error {
	var errs []error
	if s.root != nil {
		errs = append(errs, s.root.Close())
	}
	if s.list != nil {
		errs = append(errs, s.list.Close())
	}
	s.endStart()
	if s.tpm != nil {
		errs = append(errs, s.tpm.Close())
	}
	return errors.Join(append(errs, s.attached.closeShare())...)
}
