package vtpm

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"github.com/google/go-tpm/tpm2"

	"imans.dev/imans-agent/internal/tpmext"
)

const testIndex = 0x01500001

// A restarted TPM has its keys and NV storage, counters too, and new PCRs. It is restarted on request only, and not beside itself.
func TestRestartKeepsKeysAndNV(t *testing.T) {
	c := config(t)
	identity := provisioned(t, c, authority(t))
	i := start(t, c)
	pcr(t, i.Address(), 1)
	tpm := connect(t, i)
	defineCounter(t, tpm)
	count(t, tpm, true)
	want := count(t, tpm, true)
	tpm.Close()
	again := c
	again.Restart = true
	if _, err := Start(t.Context(), again); err == nil || !strings.Contains(err.Error(), "serves it") {
		t.Errorf("restart beside a running one: %v", err)
	}
	if err := i.Stop(); err != nil {
		t.Fatal(err)
	}
	if _, err := Start(t.Context(), c); !errors.Is(err, ErrLost) {
		t.Errorf("Start without Restart: %v, want ErrLost", err)
	}
	i = start(t, again)
	t.Cleanup(func() { i.Stop() })
	if got := pcr(t, i.Address(), 0); !got.IsZero() {
		t.Errorf("PCR 10 after a restart is %v", got)
	}
	tpm = connect(t, i)
	if got := count(t, tpm, false); got != want {
		t.Errorf("the counter is %s after a restart, was %s", got, want)
	}
	checkQuote(t, tpm, identity.AK)
	tpm.Close()
	if a, err := Adopt(c); err != nil || a.PID() != i.PID() {
		t.Errorf("adopt the restarted one: %v", err)
	} else {
		a.Close()
	}
}

// defineCounter makes a counter that swtpm keeps in memory, until TPM2_Shutdown.
func defineCounter(t *testing.T, tpm *tpmext.TPM) {
	t.Helper()
	_, err := tpm2.NVDefineSpace{
		AuthHandle: withoutPassword(tpm2.TPMRHOwner),
		PublicInfo: tpm2.New2B(tpm2.TPMSNVPublic{
			NVIndex: testIndex, NameAlg: tpm2.TPMAlgSHA256, DataSize: 8,
			Attributes: tpm2.TPMANV{OwnerWrite: true, OwnerRead: true, NT: tpm2.TPMNTCounter, Orderly: true, NoDA: true},
		}),
	}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
}

// count reads the counter, after an increment if asked to.
func count(t *testing.T, tpm *tpmext.TPM, increment bool) string {
	t.Helper()
	owner := withoutPassword(tpm2.TPMRHOwner)
	name := func() tpm2.NamedHandle {
		index, err := tpm2.NVReadPublic{NVIndex: tpm2.TPMHandle(testIndex)}.Execute(tpm)
		if err != nil {
			t.Fatal(err)
		}
		return tpm2.NamedHandle{Handle: testIndex, Name: index.NVName}
	}
	if increment {
		if _, err := (tpm2.NVIncrement{AuthHandle: owner, NVIndex: name()}).Execute(tpm); err != nil {
			t.Fatal(err)
		}
	}
	value, err := tpm2.NVRead{AuthHandle: owner, NVIndex: name(), Size: 8}.Execute(tpm)
	if err != nil {
		t.Fatal(err)
	}
	return fmt.Sprintf("%x", value.Data.Buffer)
}

// Without the driver nothing is begun, and the caller can tell.
func TestNoProxy(t *testing.T) {
	if _, err := os.Stat(vtpmxPath); err == nil {
		t.Skip("this machine has the vTPM proxy")
	}
	c := config(t)
	c.Proxy = true
	if _, err := Start(t.Context(), c); !errors.Is(err, ErrNoProxy) || !strings.Contains(err.Error(), "modprobe tpm_vtpm_proxy") {
		t.Errorf("Start: %v, want ErrNoProxy", err)
	}
	if _, err := os.Stat(c.Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("the folder was made: %v", err)
	}
}

// What an instance keeps under a password is of no use without it, and nobody is shown the password.
func TestPassword(t *testing.T) {
	c, a := config(t), authority(t)
	c.Password = "correct horse"
	want := provisioned(t, c, a)
	i := start(t, c)
	for _, file := range []string{"cmdline", "environ"} {
		if b, err := os.ReadFile(fmt.Sprintf("/proc/%d/%s", i.PID(), file)); err != nil || bytes.Contains(b, []byte("horse")) {
			t.Errorf("%s: %q, %v", file, b, err)
		}
	}
	if _, name := readPublic(t, connect(t, i), AKHandle); name != want.AK {
		t.Errorf("the attestation key is %s, want %s", name, want.AK)
	}
	if err := i.Stop(); err != nil {
		t.Fatal(err)
	}
	c.Restart = true
	for _, password := range []string{"", "battery staple"} {
		other := c
		other.Password = password
		if i, err := Start(t.Context(), other); err == nil {
			t.Errorf("password %q starts it", password)
			i.Stop()
		}
	}
	i = start(t, c)
	t.Cleanup(func() { i.Stop() })
	if _, name := readPublic(t, connect(t, i), AKHandle); name != want.AK {
		t.Errorf("after a restart the attestation key is %s, want %s", name, want.AK)
	}
	c.Password = strings.Repeat("x", passwordMax+1)
	c.Dir = filepath.Join(t.TempDir(), "tpm")
	if _, err := Start(t.Context(), c); err == nil || !strings.Contains(err.Error(), "at most") {
		t.Errorf("a long one: %v", err)
	}
}
