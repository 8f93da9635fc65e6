package agent

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/zap"

	"imans.dev/imans-agent/internal/ima"
	"imans.dev/imans-agent/internal/measure"
	"imans.dev/imans-agent/internal/namespace"
	"imans.dev/imans-agent/internal/need"
	"imans.dev/imans-agent/internal/tpmext"
	"imans.dev/imans-agent/internal/vtpm"
)

// native is a machine on which only the native list's software TPM runs.
type native struct {
	t      *testing.T
	config Config
	boot   string
}

func newNative(t *testing.T) *native {
	t.Helper()
	need.Program(t, "swtpm")
	dir := t.TempDir()
	n := &native{t: t, boot: dir + "/state/boots/one"}
	n.config = Config{TPM: softwareTPM, StateDir: dir + "/state", RunDir: dir + "/run", Swtpm: "swtpm"}
	t.Cleanup(func() {
		if i, err := vtpm.Adopt(nativeVTPM(n.config)); err == nil {
			i.Stop()
		}
	})
	return n
}

// open opens the TPM as an agent that starts does; done lets go of it.
func (n *native) open() (*tpmext.TPM, error) {
	n.t.Helper()
	t := namespace.Config{Dir: n.boot, Log: zap.NewNop()}
	done, err := openNative(n.t.Context(), n.config, &t)
	if err != nil {
		return nil, err
	}
	n.t.Cleanup(done)
	if want := "unix:" + n.config.RunDir + "/tpm/native"; t.NativeSocket != want {
		n.t.Errorf("address %q, want %q", t.NativeSocket, want)
	}
	return t.NativeTPM.(*tpmext.TPM), nil
}

// once opens it, extends PCR 10 if asked to, and closes it; it returns the register and the process.
func (n *native) once(extend bool) (ima.Digest, int) {
	n.t.Helper()
	tpm, err := n.open()
	if err != nil {
		n.t.Fatal(err)
	}
	defer tpm.Close()
	if extend {
		var digests []ima.Digest
		for _, bank := range tpm.Banks() {
			d, err := ima.NewDigest(bank, slices.Repeat([]byte{0x5a}, bank.Size()))
			if err != nil {
				n.t.Fatal(err)
			}
			digests = append(digests, d)
		}
		if err := tpm.Extend(n.t.Context(), 10, digests); err != nil {
			n.t.Fatal(err)
		}
	}
	values, err := tpm.ReadPCR(n.t.Context(), 10)
	if err != nil {
		n.t.Fatal(err)
	}
	i, err := vtpm.Adopt(nativeVTPM(n.config))
	if err != nil {
		n.t.Fatal(err)
	}
	defer i.Close()
	return values[ima.SHA256], i.PID()
}

// list makes the native list of this boot have entries.
func (n *native) list() {
	n.t.Helper()
	dir := filepath.Join(n.boot, "native")
	if err := os.MkdirAll(dir, 0o700); err != nil {
		n.t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, measure.LogName), []byte("entries"), 0o600); err != nil {
		n.t.Fatal(err)
	}
}

// kill ends the TPM as a crash does.
func (n *native) kill() {
	n.t.Helper()
	i, err := vtpm.Adopt(nativeVTPM(n.config))
	if err != nil {
		n.t.Fatal(err)
	}
	defer i.Close()
	if err := syscall.Kill(i.PID(), syscall.SIGKILL); err != nil {
		n.t.Fatal(err)
	}
	for i.Running() {
		time.Sleep(time.Millisecond)
	}
}

// A software TPM is taken over in the same boot, and begins anew with its keys in the next.
func TestSoftwareTPM(t *testing.T) {
	n := newNative(t)
	first, pid := n.once(true)
	if first.IsZero() {
		t.Error("PCR 10 was not extended")
	}
	identity, err := vtpm.ReadIdentity(nativeVTPM(n.config).Dir)
	if err != nil {
		t.Fatal(err)
	}
	n.list()
	if again, same := n.once(false); again != first || same != pid {
		t.Errorf("taken over: PCR 10 is %v of process %d, was %v of %d", again, same, first, pid)
	}
	n.kill()
	n.boot += "-and-the-next"
	begun, other := n.once(false)
	if !begun.IsZero() || other == pid {
		t.Errorf("after a boot: PCR 10 is %v", begun)
	}
	if after, err := vtpm.ReadIdentity(nativeVTPM(n.config).Dir); err != nil || after.AK != identity.AK || after.EK != identity.EK {
		t.Errorf("after a boot: identity %+v, %v; was %+v", after, err, identity)
	}
}

// A list that has begun gets no new TPM in the place of the one that it had, nor one that it never had.
func TestSoftwareTPMLost(t *testing.T) {
	n := newNative(t)
	n.once(true)
	n.list()
	n.kill()
	before, err := os.ReadDir(nativeVTPM(n.config).Dir)
	if err != nil {
		t.Fatal(err)
	}
	_, err = n.open()
	if !errors.Is(err, ErrNativeLost) {
		t.Fatalf("lost: %v", err)
	}
	for _, want := range []string{"its PCR is lost", n.boot + "/native", "--tpm none"} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("no %q in %v", want, err)
		}
	}
	if after, err := os.ReadDir(nativeVTPM(n.config).Dir); err != nil || len(after) != len(before) {
		t.Errorf("something was changed: %v, %v", after, err)
	}
	if err := os.Rename(n.boot+"/native", n.boot+"/evidence"); err != nil {
		t.Fatal(err)
	}
	if begun, _ := n.once(false); !begun.IsZero() {
		t.Errorf("a list that begins anew: PCR 10 is %v", begun)
	}

	n = newNative(t)
	n.list()
	if _, err := n.open(); err == nil || !strings.Contains(err.Error(), "began without a software TPM") || errors.Is(err, ErrNativeLost) {
		t.Errorf("a list that began otherwise: %v", err)
	}
	if _, err := os.Stat(nativeVTPM(n.config).Dir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a TPM was made: %v", err)
	}
}

// A crash between two steps of the first start leaves nothing that the next start does not go on from.
func TestSoftwareTPMCrashes(t *testing.T) {
	t.Run("it has an identity", func(t *testing.T) {
		n := newNative(t)
		if err := identifySoftware(t.Context(), n.config, nativeVTPM(n.config).Dir); err != nil {
			t.Fatal(err)
		}
		n.once(true)
	})
	t.Run("it runs and is not on record", func(t *testing.T) {
		n := newNative(t)
		_, orphan := n.once(true)
		if err := os.Remove(nativeVTPM(n.config).Dir + "/process.json"); err != nil {
			t.Fatal(err)
		}
		if value, pid := n.once(false); !value.IsZero() || pid == orphan {
			t.Errorf("PCR 10 is %v of process %d", value, pid)
		}
		for deadline := time.Now().Add(10 * time.Second); syscall.Kill(orphan, 0) == nil; time.Sleep(time.Millisecond) {
			if time.Now().After(deadline) {
				t.Fatal("the first still runs")
			}
		}
	})
}

func TestSoftwareTPMWithoutSwtpm(t *testing.T) {
	n := newNative(t)
	n.config.Swtpm = "no-such-swtpm"
	if _, err := n.open(); err == nil || !strings.Contains(err.Error(), "install the package swtpm") || !strings.Contains(err.Error(), "--tpm none") {
		t.Errorf("open: %v", err)
	}
}

// Without --tpm swtpm there is no TPM in software: what is missing is said, with the ways out.
func TestNoFallback(t *testing.T) {
	n := newNative(t)
	n.config.TPM = "/dev/tpm-none"
	if _, err := n.open(); err == nil || !strings.Contains(err.Error(), "--tpm swtpm") || !strings.Contains(err.Error(), "--tpm none") {
		t.Errorf("open: %v", err)
	}
	if _, err := os.Stat(n.config.StateDir); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("something was made: %v", err)
	}
}
