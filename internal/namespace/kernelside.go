package namespace

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"

	"imans.dev/imans-agent/internal/durable"
	"imans.dev/imans-agent/internal/event"
	"imans.dev/imans-agent/internal/fault"
)

// kernelSideName is the file in a boot's folder that names the kernel side which its lists know. What runs between two kernel sides is
// unknown to every list that there was, whatever became of the first: replaced by one of another build, unloaded, its pins cleaned away. The
// lists say so before the file names the second one. A crash in between has it said twice.
const kernelSideName = "kernel_side"

// kernelSide is what is known of the kernel side when an agent starts.
type kernelSide struct {
	path, id string
	same     bool // as the lists know
	first    bool // that the lists know
}

func (t *Tree) lookAtKernelSide() (kernelSide, error) {
	s := kernelSide{path: filepath.Join(t.config.Dir, kernelSideName), id: t.config.Kernel.ID()}
	known, err := os.ReadFile(s.path)
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return s, fmt.Errorf("read which kernel side the lists know: %w", err)
	}
	s.first = err != nil
	s.same = strings.TrimSpace(string(known)) == s.id
	return s, nil
}

// toldOf has each list that there was say that the kernel side is another one, if it is. The native list comes last. Those of the namespaces
// that an earlier agent left are given.
func (t *Tree) toldOf(ctx context.Context, side kernelSide, left map[event.MountNS]stateFile) error {
	if side.same {
		return nil
	}
	if began := side.first && t.native.list.Accepted() <= 1 && len(left) == 0; !began {
		t.log.Error("the kernel side is another than the lists know: what ran in between is unknown")
		for ns := range left {
			if s, ok := t.known(ns); ok {
				if err := s.recordOwnLoss(ctx, lossName(event.LossProgramsReplaced, ns, 1), event.LossProgramsReplaced); err != nil {
					return err
				}
			}
		}
		if err := t.Loss(ctx, event.LossProgramsReplaced); err != nil {
			return err
		}
	}
	fault.KernelSideTold.Pass()
	return durable.WriteFile(side.path, []byte(side.id+"\n"))
}
