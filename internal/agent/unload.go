package agent

import (
	"context"
	"errors"
	"os"
	"path/filepath"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/gate"
	"imans.dev/imans-agent/internal/grant"
	"imans.dev/imans-agent/internal/loader"
	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/vtpm"
)

// Unload takes out what a stopped agent left at work: gates that are held closed, the kernel side, and the vTPMs of this boot, the native list's and containers'
// too. The lists stay on disk. It refuses with ErrRunning while an agent runs. What can't be ended does not keep the rest from it.
func Unload(c Config) error {
	unlock, err := lock(c.StateDir)
	if err != nil {
		return err
	}
	defer unlock()
	if err := gate.EndGuard(guardFile(c.RunDir)); err != nil {
		return err
	}
	if err := errors.Join(loader.RemoveProtection(c.PinDir), loader.Unload(c.PinDir)); err != nil {
		return err
	}
	dir, err := bootDir(c.StateDir, zap.NewNop())
	if err != nil {
		return err
	}
	left, leftErr := leftVTPMs(c, dir)
	_, err = vtpm.EndRemoved(c.StateDir)
	errs := []error{leftErr, err}
	for _, config := range left {
		i, err := vtpm.Adopt(config)
		if errors.Is(err, os.ErrNotExist) {
			errs = append(errs, vtpm.EndUnrecorded(context.Background(), config))
			continue
		}
		if errors.Is(err, vtpm.ErrLost) {
			continue
		}
		if err == nil {
			err = i.Stop()
		}
		errs = append(errs, err)
	}
	return errors.Join(errs...)
}

// leftVTPMs says where vTPMs may be running, some of them twice, as far as it can be told. boot is the folder of this boot's state.
func leftVTPMs(c Config, boot string) ([]vtpm.Config, error) {
	left := []vtpm.Config{nativeVTPM(c)}
	folders, err := filepath.Glob(filepath.Join(boot, "ns", "*", "tpm"))
	for _, folder := range folders {
		left = append(left, vtpm.Config{Dir: folder, Socket: filepath.Join(c.RunDir, "tpm", filepath.Base(filepath.Dir(folder)))})
	}
	attached, attachedErr := namespace.LeftAttached(boot)
	others, othersErr := grant.Left(containersDir(c.StateDir))
	return append(append(left, attached...), others...), errors.Join(err, attachedErr, othersErr)
}
