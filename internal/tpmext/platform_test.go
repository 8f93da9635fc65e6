package tpmext

import (
	"errors"
	"slices"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/tpmext/tpmtest"
)

func TestAllocateBanks(t *testing.T) {
	swtpm := tpmtest.Start(t)
	tpm := open(t, swtpm.Address())
	before := tpm.Banks()
	for name, banks := range map[string][]ima.HashAlgo{
		"none": nil, "twice": {ima.SHA256, ima.SHA256}, "one that it lacks": {ima.SHA256, ima.SM3},
	} {
		if err := tpm.AllocateBanks(t.Context(), banks); err == nil {
			t.Errorf("%s: no error", name)
		}
	}
	want := []ima.HashAlgo{ima.SHA256, ima.SHA512}
	if err := tpm.AllocateBanks(t.Context(), want); err != nil {
		t.Fatal(err)
	}
	if got := tpm.Banks(); !slices.Equal(got, before) {
		t.Errorf("banks %v before the reset, were %v", got, before)
	}
	if _, err := (tpm2.Shutdown{ShutdownType: tpm2.TPMSUClear}).Execute(tpm); err != nil {
		t.Fatal(err)
	}
	swtpm.Kill()
	swtpm.Run("not-need-init,startup-clear")
	if err := tpm.Reopen(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := tpm.Banks(); !slices.Equal(got, want) {
		t.Errorf("banks %v after the reset, want %v", got, want)
	}
}

// After ClosePlatform the platform's commands fail, until the next reset; after ForbidClear TPM2_Clear does, for ever.
func TestPlatformIsClosed(t *testing.T) {
	swtpm := tpmtest.Start(t)
	tpm := open(t, swtpm.Address())
	lockout := tpm2.AuthHandle{Handle: tpm2.TPMRHLockout, Auth: tpm2.PasswordAuth(nil)}
	if _, err := (tpm2.Clear{AuthHandle: lockout}).Execute(tpm); err != nil {
		t.Fatalf("clear: %v", err)
	}
	if err := tpm.ForbidClear(t.Context()); err != nil {
		t.Fatal(err)
	}
	if _, err := (tpm2.Clear{AuthHandle: lockout}).Execute(tpm); !errors.Is(err, tpm2.TPMRCDisabled) {
		t.Errorf("clear once it is forbidden: %v, want TPM_RC_DISABLED", err)
	}
	if err := tpm.ClosePlatform(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := tpm.ClosePlatform(t.Context()); !errors.Is(err, tpm2.TPMRCHierarchy) {
		t.Errorf("closed twice: %v, want TPM_RC_HIERARCHY", err)
	}
	if err := tpm.AllocateBanks(t.Context(), []ima.HashAlgo{ima.SHA256}); !errors.Is(err, tpm2.TPMRCHierarchy) {
		t.Errorf("allocate with a closed platform: %v, want TPM_RC_HIERARCHY", err)
	}
	swtpm.Kill()
	swtpm.Run("not-need-init,startup-clear")
	if err := tpm.Reopen(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := tpm.ClosePlatform(t.Context()); err != nil {
		t.Errorf("close after a reset: %v", err)
	}
	if _, err := (tpm2.Clear{AuthHandle: lockout}).Execute(tpm); !errors.Is(err, tpm2.TPMRCDisabled) {
		t.Errorf("clear after a reset: %v, want TPM_RC_DISABLED", err)
	}
}
