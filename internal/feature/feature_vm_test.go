//go:build vm

package feature

import (
	"errors"
	"strings"
	"testing"
)

// The kernels of the matrix have every feature: a probe that says no here is wrong.
func TestProbesFindWhatTheMatrixHas(t *testing.T) {
	for _, p := range Probes(Config{TPM: "/dev/tpmrm0", PinDir: "/sys/fs/bpf/imans", Swtpm: "swtpm"}) {
		found, err := p.Run()
		if err != nil && p.Name != "vTPM proxy" && p.Name != "overlayfs types" {
			t.Errorf("%s: %v", p.Name, err)
			continue
		}
		t.Logf("%s: %s %v", p.Name, found, err)
	}
	if !KernelDigest(NewTypes()) {
		t.Error("no kernel digest")
	}
}

func TestProbesTellTheFix(t *testing.T) {
	c := Config{TPM: "/dev/tpm-none", PinDir: "/tmp/imans", Swtpm: "swtpm-none"}
	for name, want := range map[string]string{
		"TPM": "--tpm swtpm (one in software) or --tpm none", "BPF file system": "mount -t bpf", "swtpm": "install the package swtpm",
	} {
		for _, p := range Probes(c) {
			if p.Name != name {
				continue
			}
			_, err := p.Run()
			var missing *Unsupported
			if !errors.As(err, &missing) || !strings.Contains(err.Error(), want) {
				t.Errorf("%s: %v, want a fix with %q", name, err, want)
			}
		}
	}
	if err := Missing(c); err == nil || !strings.Contains(err.Error(), "mount -t bpf") {
		t.Errorf("Missing: %v", err)
	}
}
