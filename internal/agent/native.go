package agent

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/feature"
	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/tpmext"
	"imans.dev/imans-agent/internal/vtpm"
)

// softwareTPM is the --tpm that has the agent run a TPM of its own for the native list.
const softwareTPM = "swtpm"

// ErrNativeLost means that the software TPM of the native list has ended though this boot's list has entries in it.
var ErrNativeLost = errors.New("the software TPM of the native list is not running any more, its PCR is lost")

// openNative opens the native list's TPM, if it is to have one, for the tree. The tree is closed before it is.
func openNative(ctx context.Context, c Config, t *namespace.Config) (closeTPM func(), err error) {
	var tpm *tpmext.TPM
	switch {
	case c.TPM == "none":
		t.Log.Warn("no TPM proves the native list (--tpm none)")
		return func() {}, nil
	case c.TPM == softwareTPM:
		tpm, t.NativeSocket, err = openSoftware(ctx, c, t.Dir)
	default:
		if !strings.HasPrefix(c.TPM, "/") {
			t.NativeSocket = c.TPM
		}
		tpm, err = openTPM(ctx, c)
	}
	if err != nil {
		return nil, err
	}
	t.NativeTPM = tpm
	t.Log.Info("native TPM", zap.String("address", c.TPM), zap.Bool("software", t.NativeSocket != ""),
		zap.Stringers("banks", tpm.Banks()), zap.Int("pcr", c.PCR))
	return func() { tpm.Close() }, nil
}

// openTPM opens a TPM that is there and refuses to share a PCR with the kernel's own IMA.
func openTPM(ctx context.Context, c Config) (*tpmext.TPM, error) {
	if n, err := kernelMeasurements(); err == nil && n > 1 && c.PCR == ima.DefaultPCR {
		return nil, fmt.Errorf("PCR %d: %w (it has %d entries)", c.PCR, ErrSharedPCR, n)
	}
	if proxy, err := vtpm.IsProxy(c.TPM); err == nil && proxy {
		return nil, fmt.Errorf("--tpm %s is a vTPM, made for some container; give the machine's own, or --tpm none", c.TPM)
	}
	tpm, err := tpmext.Open(ctx, c.TPM)
	if err != nil {
		return nil, fmt.Errorf("%w; is the TPM enabled? --tpm names another, --tpm swtpm has one in software, --tpm none does without", err)
	}
	return tpm, nil
}

// nativeVTPM says where the native list's software TPM lives: its keys outlive the boot, its socket does not. It runs as a user of its own
// even where all others have one in common (--swtpm-user): none of them reaches it. It is root's where they are, as some machine may not let others run swtpm.
func nativeVTPM(c Config) vtpm.Config {
	config := vtpm.Config{
		Program: c.Swtpm, Dir: filepath.Join(c.StateDir, "native-tpm"), Socket: filepath.Join(c.RunDir, "tpm", "native"),
	}
	if c.SwtpmUser == "root" || c.SwtpmUser == "0" {
		config.User = c.SwtpmUser
	}
	return config
}

// openSoftware finds the software TPM that an earlier agent of this boot left, or starts it. boot is the folder of this boot's state.
func openSoftware(ctx context.Context, c Config, boot string) (tpm *tpmext.TPM, address string, err error) {
	instance, err := vtpm.Adopt(nativeVTPM(c))
	if errors.Is(err, vtpm.ErrLost) || errors.Is(err, os.ErrNotExist) {
		instance, err = startSoftware(ctx, c, boot, err)
	}
	if err != nil {
		return nil, "", fmt.Errorf("--tpm swtpm: %w", err)
	}
	defer instance.Close()
	if tpm, err = tpmext.Open(ctx, instance.Address()); err != nil {
		return nil, "", fmt.Errorf("--tpm swtpm: %w; if process %d hangs, end it by imans-agent unload", err, instance.PID())
	}
	return tpm, instance.Address(), nil
}

// startSoftware starts the software TPM for a list that has no entry yet: anew, with the keys that it has, or for the first time. why is
// what Adopt found: that it was lost, or that none ever ran. A new TPM can't prove what it did not see, so a list that has begun
// never gets one.
func startSoftware(ctx context.Context, c Config, boot string, why error) (*vtpm.Instance, error) {
	begun, err := namespace.NativeBegun(boot)
	if err != nil {
		return nil, err
	}
	lost := errors.Is(why, vtpm.ErrLost)
	if begun {
		if err = ErrNativeLost; !lost {
			err = errors.New("this boot's native list began without a software TPM, which can't prove what it did not see")
		}
		return nil, fmt.Errorf("%w; move %s away, as evidence, and start again: that begins a new list with new PCRs, as a reboot does "+
			"(--tpm none goes on with the list, and nothing proves it)", err, filepath.Join(boot, "native"))
	}
	if _, err := feature.Swtpm(c.Swtpm); err != nil {
		return nil, fmt.Errorf("%w; or run with --tpm none", err)
	}
	config := nativeVTPM(c)
	if config.Restart = lost; !lost {
		if err := identifySoftware(ctx, c, config.Dir); err != nil {
			return nil, err
		}
	}
	return vtpm.Start(ctx, config)
}

// identifySoftware gives the folder of a TPM that never ran its identity, by the way of the pool: it is there whole, or not at all.
func identifySoftware(ctx context.Context, c Config, dir string) error {
	if _, err := vtpm.ReadIdentity(dir); err == nil {
		return nil // a crash came before its first start
	}
	authority, err := openAuthority(c)
	if err != nil {
		return err
	}
	c.SwtpmUser = nativeVTPM(c).User
	pool, err := openPool(ctx, c, authority)
	if err != nil {
		return err
	}
	_, err = pool.Take(ctx, dir)
	return err
}

// kernelMeasurements returns how many entries the kernel's own IMA has: 1 is its boot_aggregate.
func kernelMeasurements() (int, error) {
	b, err := os.ReadFile("/sys/kernel/security/ima/runtime_measurements_count")
	if err != nil {
		return 0, err
	}
	var n int
	_, err = fmt.Sscan(string(b), &n)
	return n, err
}

// hint adds what most likely stands behind a PCR that is not as a new list needs it. software: it is a TPM that is a program.
func hint(err error, software bool) error {
	if !errors.Is(err, measure.ErrForeign) {
		return err
	}
	if software {
		return fmt.Errorf("%w (a TPM that --tpm swtpm has started begins anew after imans-agent unload)", err)
	}
	if n, countErr := kernelMeasurements(); countErr == nil && n > 0 {
		return fmt.Errorf("%w (the kernel's IMA extended its boot_aggregate there: %w)", err, ErrSharedPCR)
	}
	return err
}
