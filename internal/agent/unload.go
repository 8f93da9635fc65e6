package agent

import (
	"errors"
	"os"
	"path/filepath"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/loader"
	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/vtpm"
)

// Unload takes out what a stopped agent left at work: the kernel side, and the vTPMs of this boot. The lists stay on disk. It
// refuses with ErrRunning while an agent runs.
func Unload(c Config) error {
	unlock, err := lock(c.StateDir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := loader.Unload(c.PinDir); err != nil {
		return err
	}
	dir, err := bootDir(c.StateDir, zap.NewNop())
	if err != nil {
		return err
	}
	folders, err := filepath.Glob(filepath.Join(dir, "ns", "*", "tpm"))
	if err != nil {
		return err
	}
	left, err := namespace.LeftAttached(dir)
	if err != nil {
		return err
	}
	for _, folder := range folders {
		left = append(left, vtpm.Config{Dir: folder, Socket: filepath.Join(c.RunDir, "tpm", filepath.Base(filepath.Dir(folder)))})
	}
	var errs []error
	for _, config := range left {
		i, err := vtpm.Adopt(config)
		if errors.Is(err, vtpm.ErrLost) || errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err == nil {
			err = i.Stop()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}
